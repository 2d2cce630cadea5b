# SPDX-License-Identifier: Apache-2.0
"""Poolers between a client and PostgreSQL, such as pgbouncer: whether one keeps sessions.

One that gives a session of the server to another client after each transaction would give it away
with the settings that ours have, by which others are read-only or find no tables, and would answer
a prepared statement of one client with that of another.
"""

from __future__ import annotations

import contextlib
import select
import time
from typing import Any, Final

import psycopg

from pydedup.errors import StoreError

__all__ = ["check_sessions"]

#: Where a pooler has no other session to give within this time, it keeps the one that we have.
SECONDS: Final = 1.0
#: Where others use a pooler, two statements in a row may meet the same session by chance.
_ASKED: Final = 16
#: In this process of the server a statement runs.
_PROCESS: Final = "SELECT pg_catalog.pg_backend_pid()"


def check_sessions(connection: psycopg.Connection[Any], conninfo: str, shown: str) -> None:
    """Raise StoreError where a pooler does not keep sessions.

    Parameters
    ----------
    connection
        Nothing has been set on it yet.
    """
    first = _process_of(connection)
    if first == connection.info.backend_pid:  # what the server itself said at the beginning
        return
    processes = (_process_of(connection) for _ in range(_ASKED))
    if _process_of_another(conninfo) == first or any(process != first for process in processes):
        raise StoreError(
            f"{shown} is a pooler that keeps no sessions, which a store needs; set it to keep them "
            "(pgbouncer: pool_mode = session), or name the server itself"
        )


def _process_of(connection: psycopg.Connection[Any]) -> int:
    ((process,),) = connection.execute(_PROCESS)
    return int(process)


def _process_of_another(conninfo: str) -> int | None:
    """Return the process of another connection; ``None`` where none comes about soon."""
    end = time.monotonic() + SECONDS
    with contextlib.suppress(psycopg.Error):
        other = psycopg.connect(conninfo, autocommit=True, connect_timeout=2)
        with contextlib.closing(other):
            pgconn = other.pgconn
            pgconn.send_query(_PROCESS.encode())
            poll = select.poll()
            poll.register(pgconn.socket, select.POLLIN)
            while pgconn.is_busy():
                if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                    return None
                pgconn.consume_input()
            result = pgconn.get_result()
            return int((result and result.get_value(0, 0)) or 0)
    return None
