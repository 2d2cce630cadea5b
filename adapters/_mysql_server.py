# SPDX-License-Identifier: Apache-2.0
"""MySQL and MariaDB: what a server must be, how sessions are set, and who may create a store."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from pydedup.errors import StoreError

from ._mysql_errors import PACKET_BYTES, packet_advice
from ._mysql_url import Place

__all__ = ["MOST_PAYLOAD_BYTES", "check_server", "may_create", "session_statements"]

#: Sent with a payload: the other columns of its row, generously.
ROW_BYTES: Final = 64 << 10
#: The largest payload: with its row just below where one packet becomes several, which the
#: driver without its C extension cannot read (it does without after an import of torch).
MOST_PAYLOAD_BYTES: Final = PACKET_BYTES - ROW_BYTES
#: Below this, not even our own pages and parts would pass.
LEAST_PACKET_BYTES: Final = 2 << 20


def check_server(version: str, packet_bytes: int, place: Place) -> int:
    """Return the largest payload that a server takes.

    Raises StoreError when it is too old, or takes too small packets.
    """
    number = tuple(map(int, re.findall(r"\d+", version)[:2]))
    is_maria = "mariadb" in version.lower()
    if number < ((10, 11) if is_maria else (8, 0)):
        raise StoreError(
            f"{place.url}: server {version} is too old; MariaDB 10.11 or MySQL 8.0 is needed"
        )
    if packet_bytes < LEAST_PACKET_BYTES:
        raise StoreError(
            f"{place.url}: the server takes at most {packet_bytes} bytes in one packet, less than "
            f"a page of a store needs; {packet_advice()}"
        )
    return min(packet_bytes - ROW_BYTES, MOST_PAYLOAD_BYTES)


def may_create(grants: Sequence[str], database: str) -> bool:
    """Whether what SHOW GRANTS says allows tables to be made; names in it may be patterns."""
    for grant in grants:
        found = re.match(r"GRANT (.*?) ON (\*|`(?:[^`]|``)*`)\.\*", grant)
        if found and {"ALL PRIVILEGES", "CREATE"} & set(found[1].split(", ")):
            place = found[2].strip("`").replace("``", "`")
            letters = re.findall(r"\\?.", place)
            known = {"%": ".*", "_": ".", "*": ".*"}
            pattern = "".join(known.get(letter) or re.escape(letter[-1]) for letter in letters)
            if re.fullmatch(pattern, database, re.DOTALL):
                return True
    return False


def session_statements(version: str, timeout: float, *, read_only: bool) -> list[str]:
    """Return what makes a new session ours."""
    seconds = max(1, math.ceil(timeout))
    settings = [
        f"innodb_lock_wait_timeout = {seconds}",
        f"lock_wait_timeout = {seconds}",
        f"group_concat_max_len = {1 << 24}",
        # Whatever the server's are: by them results end early, statements are refused, and a commit
        # begins another transaction.
        f"sql_select_limit = {2**64 - 1}",
        "sql_safe_updates = 0",
        "sql_big_selects = 1",
        "completion_type = 0",
    ]
    if "mariadb" not in version.lower():
        settings.append("information_schema_stats_expiry = 0")  # sizes as they are now
    access = ", READ ONLY" if read_only else ""  # else as the server has it
    return [
        f"SET SESSION {', '.join(settings)}",
        f"SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED{access}",
    ]
