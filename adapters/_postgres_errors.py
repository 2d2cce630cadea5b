# SPDX-License-Identifier: Apache-2.0
"""What PostgreSQL's error codes mean to a user."""

from __future__ import annotations

from collections.abc import Mapping
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
from ._postgres_url import Place
from ._schema import NUMBERED

__all__ = ["MissingDatabaseError", "meaning", "numbered_twice", "refusal"]


class MissingDatabaseError(UnavailableError):
    """The server answers, and has no database of this name."""


_AGAIN: Final = "nothing of the transaction was kept; try again"
_FULL: Final = "raise max_connections of the server, or use fewer clients"
_POOL: Final = "raise default_pool_size and max_client_conn of pgbouncer, or use fewer clients"
_GONE: Final = "check that the server runs; reading goes on by itself when it is back"
_DOWN: Final = "check that the server runs and can be reached, and try again"

#: SQLSTATE, or its first two letters -> error and what to do
#: (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_MEANINGS: Final[dict[str, tuple[type[PydedupError], str]]] = {
    "08": (ConnectionLostError, _GONE),
    "0A": (StoreError, "this server lacks what is needed; PostgreSQL 13 or newer has it"),
    "22": (ArgumentError, "a column does not take this value"),
    "23": (ArgumentError, "a column does not take this value"),
    "23505": (KeyTakenError, "there is a row of this key"),
    "25006": (ReadOnlyError, "connect to the primary server, as a role that may write"),
    "25P03": (ConnectionLostError, "raise idle_in_transaction_session_timeout for this role"),
    "25P04": (ConnectionLostError, "raise transaction_timeout for this role"),
    "28": (UnavailableError, "check the user and password"),
    "3D": (MissingDatabaseError, "create the database first, with createdb, or name another"),
    "3F": (NotAStoreError, "the schema was dropped; open the store again"),
    # Serialization failures, deadlocks, and what a standby's replay is in need of.
    "40": (CancelledError, _AGAIN),
    "42501": (  # insufficient_privilege
        DeniedError,
        'ask the owner of schema {schema} for GRANT USAGE ON SCHEMA "{schema}", and to read GRANT '
        "SELECT, to write GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES and GRANT USAGE ON "
        'ALL SEQUENCES IN SCHEMA "{schema}"',
    ),
    "42P01": (NotAStoreError, "tables of schema {schema} were dropped; restore a backup"),
    "53": (UnavailableError, "the server is short of resources; try again later"),
    "53100": (
        StorageFullError,
        "free some space on the server; what was complete is there, and nothing of the rest",
    ),
    "53400": (UnavailableError, "raise this limit for this role"),
    "53300": (CrowdedError, _FULL),
    "54": (ArgumentError, "write it in smaller pieces"),
    "55P03": (  # lock_not_available
        ConflictError,
        "another process or thread is writing; try again, or wait longer with ?timeout=seconds",
    ),
    "57014": (  # query_canceled
        UnavailableError,
        "raise statement_timeout for this role, unless somebody cancelled the statement",
    ),
    "57P05": (ConnectionLostError, "raise idle_session_timeout for this role"),
    "57": (ConnectionLostError, _GONE),  # the server shuts down, or starts up
    "58": (UnavailableError, "check the server's log and its disks"),
    "XX": (StoreError, "see the server's log"),
    "XX001": (CorruptStoreError, "run `pydedup verify`, or restore a backup"),
    "XX002": (CorruptStoreError, 'REINDEX SCHEMA "{schema}", then run `pydedup verify`'),
}


_SSL: Final = "see sslmode, sslrootcert, sslcert and sslkey of libpq, all of which a URL takes"
_LOGIN: Final = "check the user and the password (%-encoded in a URL)"
_OPTIONS: Final = "correct options= in the URL"
_SESSION: Final = "name another server, or correct target_session_attrs in the URL"

#: SQLSTATE of a server that refuses a connection, or its first letters -> error and what to do,
#: where that is another than of a statement.
_REFUSED: Final[dict[str, tuple[type[PydedupError], str]]] = {
    "22": (ArgumentError, _OPTIONS),
    "28": (UnavailableError, f"{_LOGIN}, and the server's pg_hba.conf"),
    "28P01": (UnavailableError, _LOGIN),
    "42": (ArgumentError, _OPTIONS),
    "42501": (
        UnavailableError,
        "let an administrator run GRANT CONNECT ON DATABASE for this user",
    ),
    "XX": (UnavailableError, "see the server's log"),
}

#: What is said where no connection comes about -> error and what to do; the first that fits. Where
#: there is a SQLSTATE, that decides which error it is, and these may only know better what to do.
_REFUSALS: Final[tuple[tuple[tuple[str, ...], type[PydedupError], str], ...]] = (
    (("password authentication failed",), UnavailableError, _LOGIN),
    (("database ", "does not exist"), *_MEANINGS["3D"]),
    (("role ", "does not exist"), UnavailableError, "check the user, or create it: CREATE ROLE"),
    (("not permitted to log in",), UnavailableError, "let it: ALTER ROLE ... LOGIN"),
    (("permission denied for database",), *_REFUSED["42501"]),
    (("no more connections allowed",), CrowdedError, _POOL),
    (("too many connections for role",), CrowdedError, "raise its limit: ALTER ROLE"),
    (("too many",), CrowdedError, _FULL),
    (("connection slots",), CrowdedError, _FULL),
    (("invalid ", " value: "), ArgumentError, "correct this option of the URL"),
    (("invalid ", " for "), ArgumentError, "correct this option of the URL"),
    (("configuration parameter",), ArgumentError, _OPTIONS),
    (("invalid port",), ArgumentError, "correct the port in the URL"),
    (("definition of service",), ArgumentError, "name one that is in ~/.pg_service.conf"),
    # A server that is none of those asked for; another may become one, as a standby does.
    (("session is ",), ConnectionLostError, _SESSION),
    (("hot standby mode",), ConnectionLostError, _SESSION),
    (
        ("resolve host",),
        ConnectionLostError,
        "check the host in the URL, and that its name is known here",
    ),
    # A server that goes away while TLS is agreed on, or a user let in, is no fault of TLS.
    (("unexpected eof",), ConnectionLostError, _DOWN),
    (("SSL SYSCALL",), ConnectionLostError, _DOWN),
    (("SSL connection", "closed unexpectedly"), ConnectionLostError, _DOWN),
    (("SSL",), UnavailableError, _SSL),
    (("no encryption",), UnavailableError, _SSL),
    (("certificate",), UnavailableError, _SSL),
    (
        ("pg_hba.conf",),
        UnavailableError,
        "allow this user, database and address in the server's pg_hba.conf",
    ),
)


def meaning(code: str | None, said: str, place: Place, *, lost: bool) -> PydedupError:
    """Return what an error means that came while the store at ``place`` was used.

    Parameters
    ----------
    code
        The SQLSTATE; ``None`` when the driver, and not the server, complains.
    said
        What it says.
    lost
        Whether the driver complains of the connection.
    """
    if code is None:
        if lost:
            return ConnectionLostError(f"{place.shown}: {said}; {_GONE}")
        return ArgumentError(f"{place.shown}: {said}")
    kind, advice = _of(code, _MEANINGS) or (StoreError, "")
    if said == "query_wait_timeout":  # of pgbouncer, in no other language: it has waited enough
        kind, advice = UnavailableError, _POOL
    return _told(kind, said, advice, code, place)


def numbered_twice(said: str, place: Place) -> PydedupError:
    """Return what it means that a new row got the number of another one."""
    *others, last = (f'"{place.schema}".{table}' for table in NUMBERED)
    return StoreError(
        f"{place.shown}: {said}; a sequence is behind the rows that it numbered, as after logical "  # noqa: S608
        "replication, which leaves sequences out: let their owner run SELECT "
        f"setval(pg_get_serial_sequence('{last}', 'id'), max(id)) FROM {last}, and the same for "
        f"{' and '.join(others)}"
    )


def refusal(code: str | None, said: str, place: Place, *, needs_password: bool) -> PydedupError:
    """Return what it means that no connection came about.

    Parameters
    ----------
    code
        The server's SQLSTATE; ``None`` when it is not known, as where no server answers. What is
        said then decides, which a server does in any language.
    """
    if needs_password:
        advice = "give a password in the URL, in PGPASSWORD or in ~/.pgpass"
        return UnavailableError(f"{place.shown}: {said}; {advice}")
    found = [
        (kind, advice) for words, kind, advice in _REFUSALS if all(word in said for word in words)
    ]
    if code is None:
        kind, advice = found[0] if found else (ConnectionLostError, _DOWN)
    else:
        kind, advice = _of(code, _REFUSED) or _of(code, _MEANINGS) or (UnavailableError, "")
        advice = next((advised for its, advised in found if its is kind), advice)
    return _told(kind, said, advice, code, place)


def _of(
    code: str, table: Mapping[str, tuple[type[PydedupError], str]]
) -> tuple[type[PydedupError], str] | None:
    return table.get(code) or table.get(code[:2])


def _told(
    kind: type[PydedupError], said: str, advice: str, code: str | None, place: Place
) -> PydedupError:
    more = f"; {advice.format(schema=place.schema)}" if advice else f" (SQLSTATE {code})"
    return kind(f"{place.shown}: {said}{more}")
