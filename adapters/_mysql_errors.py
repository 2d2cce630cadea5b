# SPDX-License-Identifier: Apache-2.0
"""What the error numbers of MySQL, MariaDB and their clients mean to a user."""

from __future__ import annotations

import re
from typing import Final

from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

from ._errors import (
    CancelledError,
    ConnectionLostError,
    CrowdedError,
    DeniedError,
    KeyTakenError,
)
from ._mysql_url import Place

__all__ = ["LOST", "PACKET_BYTES", "DefinedError", "RefusedError", "meaning", "packet_advice"]


class DefinedError(StoreError):
    """What was to be defined exists already."""


class RefusedError(DeniedError, ReadOnlyError):
    """The user may not make a change; the server would."""


#: What a server needs for the largest payload; MariaDB's own default, and below MySQL's.
PACKET_BYTES: Final = 16 << 20


def packet_advice() -> str:
    """Say which setting to raise, and to what."""
    return (
        f"raise the server's max_allowed_packet to {PACKET_BYTES}: SET GLOBAL "
        f"max_allowed_packet = {PACKET_BYTES}, and max_allowed_packet={PACKET_BYTES >> 20}M "
        "under [mysqld] in its configuration, then connect again"
    )


_AGAIN: Final = "try again"
_WAIT: Final = (
    "another writer was in the way, or this node of Galera waits for its cluster; try again, or "
    "wait longer with ?timeout=seconds"
)
_ALONE: Final = (
    "this node of a Galera cluster takes no part in it: it is not with the majority, or still "
    "catching up; try again, ask another node, or let an administrator look at wsrep_cluster_status"
)
_LOGIN_CODES: Final = (1045, 1251, 1524, 1698, 1820, 1862, 2059, 2061)
_LOGIN: Final = (
    "check the user and the password (of the URL, its option_file or MYSQL_PWD), and what the user "
    "may do"
)
_NOTHING: Final = (
    "let an administrator grant this user SELECT there, to write INSERT, UPDATE and DELETE too; a "
    "role's privileges hold when it is the user's default (SET DEFAULT ROLE)"
)
_PLAIN: Final = (
    "; without TLS, who was created with REQUIRE SSL is refused like this, and on MariaDB 10.11 "
    "everybody where require_secure_transport is on: leave out ssl_disabled"
)
_TLS: Final = "check the options of the URL that begin with ssl_ (ssl_ca, ssl_disabled, ...)"
_SLOW: Final = (
    "it took too long; raise max_statement_time (MariaDB) or max_execution_time (MySQL) for this "
    "user, or try again"
)
_MANY: Final = "raise max_connections of the server, or that of this user, or use fewer clients"
_HOURLY: Final = (
    "wait for the hour to pass, or let an administrator raise this limit of the user: ALTER USER "
    "... WITH"
)
_LOCKED: Final = "let an administrator unlock this user: ALTER USER ... ACCOUNT UNLOCK"
_BLOCKED: Final = (
    "let an administrator run FLUSH HOSTS on the server, and where MySQL has it no more (8.4): "
    "TRUNCATE TABLE performance_schema.host_cache"
)
_OFFLINE: Final = "wait, or let an administrator run SET GLOBAL offline_mode = OFF on the server"
_MEMORY: Final = "raise connection_memory_limit or global_connection_memory_limit of the server"
_THREADS: Final = (
    "the server's system gives it no more threads or memory: raise its limits (ulimit -u, TasksMax "
    "of its service), or use fewer clients"
)
_SHORT: Final = (
    "the server has no memory left: let it have more, or lower what it takes (its "
    "innodb_buffer_pool_size, the number of its connections), and try again"
)
_LOCKS: Final = (
    "there is no room for the locks of all that write: raise innodb_buffer_pool_size of the "
    "server, or try again when fewer do"
)
_HOST: Final = "check the host in the URL, and that its name is known here"
_DOWN: Final = "check that the server runs and can be reached, and try again"
_FULL: Final = "free some space on the server; what was complete is there, and nothing of the rest"
_REPAIR: Final = "run `pydedup verify`, or restore a backup"
_WRITABLE: Final = "write to the primary server, or make this one writable"
_TABLE: Final = "a table of the store is missing or another; restore a backup"

#: The connection is gone, or could not be made.
LOST: Final = frozenset(
    {1040, 1042, 1053, 1077, 1079, 1129, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1927}
    | {2002, 2003, 2005, 2006, 2012, 2013, 2014, 2027, 2048, 2055, 3032, 3169, 4031, 4082, 4083}
)

#: Errors of servers: https://mariadb.com/kb/en/mariadb-error-codes/; of clients: 2000 to 2999.
_MEANINGS: Final[dict[int, tuple[type[PydedupError], str]]] = {
    **dict.fromkeys(LOST, (ConnectionLostError, _DOWN)),
    **dict.fromkeys((1040, 1203), (CrowdedError, _MANY)),
    1047: (UnavailableError, _ALONE),
    1226: (UnavailableError, _HOURLY),
    1129: (ConnectionLostError, _BLOCKED),
    2005: (ConnectionLostError, _HOST),
    **dict.fromkeys((1205, 3572), (ConflictError, _WAIT)),
    **dict.fromkeys((1020, 1213, 1412, 1613, 1614), (CancelledError, _AGAIN)),
    1317: (UnavailableError, "it was stopped; try again"),
    **dict.fromkeys((1969, 3024), (UnavailableError, _SLOW)),
    **dict.fromkeys(_LOGIN_CODES, (UnavailableError, _LOGIN)),
    1130: (UnavailableError, "let this user connect from this host"),
    **dict.fromkeys((3118, 3955, 4151), (UnavailableError, _LOCKED)),
    4150: (UnavailableError, "let an administrator run FLUSH PRIVILEGES on the server"),
    3032: (ConnectionLostError, _OFFLINE),
    **dict.fromkeys((4082, 4083), (UnavailableError, _MEMORY)),
    1135: (CrowdedError, _THREADS),
    **dict.fromkeys((1037, 1041), (UnavailableError, _SHORT)),
    1038: (UnavailableError, "raise sort_buffer_size of the server"),
    1206: (UnavailableError, _LOCKS),
    3159: (UnavailableError, _TLS),
    **dict.fromkeys((1036, 1290, 1792, 1836, 3100), (ReadOnlyError, _WRITABLE)),
    **dict.fromkeys((1021, 1114), (StorageFullError, _FULL)),
    **dict.fromkeys((1062, 1586), (KeyTakenError, "there is a row of this key")),
    **dict.fromkeys((1048, 1264, 1366, 1406), (ArgumentError, "a column does not take this value")),
    **dict.fromkeys((1032, 1034, 1194, 1195, 1712, 1877), (CorruptStoreError, _REPAIR)),
    **dict.fromkeys((1054, 1146, 1356), (NotAStoreError, _TABLE)),
    **dict.fromkeys((1050, 1060, 1061), (DefinedError, "see what made it, or drop it")),
    **dict.fromkeys((1044, 1227), (DeniedError, "grant it to this user, or use another")),
    **dict.fromkeys((1153, 1162, 1301, 2020), (StoreError, packet_advice())),
    1071: (StoreError, "a store needs an innodb_page_size of 16384, which is the default, or more"),
    1665: (StoreError, "set binlog_format of the server to MIXED or ROW"),
    1461: (UnavailableError, "raise max_prepared_stmt_count on the server, or try again"),
}

#: What the driver without its C extension raises where it waited too long.
_PURE_TIMEOUTS: Final = ("ConnectionTimeoutError", "ReadTimeoutError", "WriteTimeoutError")
#: Errors that name the one of the operating system -> which are ENOSPC and EDQUOT, as MariaDB and
#: MySQL write it; a number in a file's name is another, and so is 122 of a storage engine.
_NO_ROOM: Final = {
    **dict.fromkeys((3, 1026, 1598), re.compile(r"\b(28|122)( \"| - )")),
    1030: re.compile(r"\b28( \"| - )"),
}
#: What OpenSSL says of a server that went away while TLS was agreed on: which is no fault of TLS.
_ENDED: Final = re.compile(r"unexpected.eof|:reason\(0\)", re.IGNORECASE)
#: What 1142 and 1143 refuse: before the name of the user, and alone in capitals, in any language.
_COMMANDS: Final = re.compile(r"[A-Z]{2,}(, [A-Z]{2,}| [A-Z]{2,})*")


def meaning(error: Exception, place: Place, *, connected: bool = True) -> PydedupError:
    """Return what an exception of the driver means for the database at a place.

    Parameters
    ----------
    connected
        Whether there was a connection; else it is what none came about for.
    """
    code: int | None = getattr(error, "errno", None)
    said = str(getattr(error, "msg", None) or error)
    kind: type[PydedupError]
    if code == 1049 and f"'{place.database}'".lower() not in said.lower():  # of a table of a user's
        return ArgumentError(f"{place.url}: {said}; create it, or name another database")
    if code == 1049:
        return UnavailableError(
            f"{place.url}: there is no database {place.database!r}; create it: CREATE DATABASE "
            f"`{place.database.replace('`', '``')}` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
    if code in (1142, 1143):
        # A user who may only read meets this when something is changed.
        refused = _COMMANDS.search(said)
        reads = refused is not None and "SELECT" in refused.group()
        kind, advice = (DeniedError if reads else RefusedError), "grant it, or use another user"
    elif code == 1286 or (code == 1290 and "NO_ENGINE_SUBSTITUTION" in said):
        kind, advice = StoreError, "a store needs InnoDB; see enforce_storage_engine of the server"
    elif code == 1015 and "errno: 165" in said:  # MySQL's InnoDB that only reads
        kind, advice = ReadOnlyError, _WRITABLE
    elif code == 1226 and "max_user_connections" in said:  # else of so much in an hour
        kind, advice = CrowdedError, _MANY
    elif code == 2026 or (code in LOST and "[SSL: " in said):  # as the pure driver says it
        lost = _ENDED.search(said) is not None
        kind, advice = (ConnectionLostError, _DOWN) if lost else (UnavailableError, _TLS)
    elif code == 2003 and "Errno -" in said:  # what getaddrinfo says, by the pure driver
        kind, advice = ConnectionLostError, _HOST
    elif code in _NO_ROOM and _NO_ROOM[code].search(said):
        kind, advice = StorageFullError, _FULL
    elif "requires SSL" in said:  # the pure driver of MySQL's plugins, also of an unknown user
        kind, advice = UnavailableError, f"{_LOGIN}; such a user is let in by TLS alone"
    elif code is None or code <= 0:
        # The driver itself: its connection is not there any more, or a value is none it knows.
        lost = type(error).__name__ in ("OperationalError", "InterfaceError")
        kind, advice = (ConnectionLostError, _DOWN) if lost else (ArgumentError, "")
    elif code == 1044 and not connected:
        kind, advice = UnavailableError, _NOTHING
    elif type(error).__name__ in _PURE_TIMEOUTS:
        said, kind, advice = "the server did not answer in time", ConnectionLostError, _DOWN
        if connected:
            advice = f"where it is slow, raise read_timeout and write_timeout in the URL; {_DOWN}"
    else:
        kind, advice = _MEANINGS.get(code, (StoreError, ""))
        if code in _LOGIN_CODES and place.options.get("ssl_disabled"):
            advice += _PLAIN
    number = f" ({code})" if code is not None and code > 0 else ""
    return kind(f"{place.url}: {said}; {advice}" if advice else f"{place.url}: {said}{number}")
