# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: a store in a schema of its own, through psycopg 3.

Here: all that needs the driver, which is connecting and what its errors are. Nothing is ever sent
or fetched as text that is not text.
"""

from __future__ import annotations

import time
from typing import Any, Final, cast

import psycopg
from psycopg import pq
from psycopg.types.json import set_json_loads
from psycopg.types.numeric import Int8BinaryDumper

from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError, PydedupError, StoreError, without_frames

from ._base import fetch_all
from ._connection import closed_on_error
from ._errors import CrowdedError
from ._postgres_base import CAPABILITIES, dialect_of
from ._postgres_copy import PostgresCopy
from ._postgres_cursor import BinaryCursor, json_or_text
from ._postgres_errors import meaning, numbered_twice, refusal
from ._postgres_pooler import check_sessions
from ._postgres_said import said, sqlstate_of
from ._postgres_statement import is_stale
from ._postgres_url import Place, locate
from ._schema import NUMBERED, TABLES, Dialect
from ._sessions import Connection, Session, SessionPool
from ._url import TIMEOUT_SECONDS

__all__ = ["PostgresAdapter", "connect", "known_options"]

#: Identity columns, 13 being the oldest that is not long gone.
OLDEST_SERVER: Final = 130000

#: What each connection is set to. Names in statements are full, so that what somebody put into
#: another schema is never called instead.
_SETTINGS: Final = """SELECT
  set_config('search_path', 'pg_catalog', false),
  set_config('lock_timeout', CASE WHEN %(default)s AND current_setting('lock_timeout') <> '0'
    THEN current_setting('lock_timeout') ELSE %(wait)s END, false),
  CASE WHEN %(read)s THEN set_config('default_transaction_read_only', 'on', false) END"""

#: Keys of which the server makes the values.
_NUMBERS: Final = frozenset(f"{table}_pkey" for table in NUMBERED)

#: From rows that row-level security hides would follow what is to be deleted.
_CANNOT_WRITE: Final = """SELECT current_setting('transaction_read_only') = 'on' OR EXISTS (
  SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname = %b AND c.relname = ANY(%b) AND (row_security_active(c.oid)
    OR (c.relname = 'meta' AND NOT has_table_privilege(c.oid, 'INSERT'))))"""


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open ``postgresql://user@host:port/database``, with any parameter of libpq after a ``?``.

    Beside those there are ``schema=`` (where the store lives, ``pydedup`` unless told otherwise)
    and ``timeout=``, how many seconds a writer waits for another.

    Raises
    ------
    ArgumentError
        For a URL that libpq does not understand, or an impossible schema.
    MissingStoreError
        With mode ``"r"``, when there are no tables.
    UnavailableError
        When the server cannot be reached, or refuses.
    """
    adapter = PostgresAdapter(locate(url, schema, known_options()), mode)
    with closed_on_error(adapter):
        if mode == "r" and adapter.schema_version() is None:
            raise adapter.missing()
    return adapter


def known_options() -> list[str]:
    """Return the parameters that libpq knows."""
    return [option.keyword.decode() for option in pq.Conninfo.get_defaults()]


class PostgresAdapter(PostgresCopy):
    """A store in a schema of a PostgreSQL database."""

    driver_error = psycopg.Error
    _is_checked = False  # whether sessions are kept

    def __init__(self, place: Place, mode: str, url: str | None = None) -> None:
        self._place, self._reads_only = place, mode == "r"
        url = place.shown if url is None else url
        pool = SessionPool(
            self._connect,
            name=url,
            is_stale=is_stale,
            crowded=CrowdedError,
            shares=self._reads_only,
        )
        with pool.acquire_first() as session:
            read_only = self._reads_only or self._cannot_write(session)
        super().__init__(
            url,
            dialect=self._dialect(),
            read_only=read_only,
            capabilities=CAPABILITIES,
            pool=pool,
        )

    def _dialect(self) -> Dialect:
        return dialect_of(self._place.schema)

    # ---- connecting ---------------------------------------------------------------------------

    def _connect(self) -> Connection:
        began = time.monotonic()
        try:
            connection: psycopg.Connection[Any] = psycopg.connect(
                self._place.conninfo,
                autocommit=True,
                cursor_factory=BinaryCursor,
                fallback_application_name="pydedup",
                client_encoding="utf8",
            )
        except psycopg.ProgrammingError:
            # libpq quotes the URL, and what it takes for a port may be a piece of a password.
            raise ArgumentError(
                "libpq cannot read the URL of the PostgreSQL database: its port, or a user, "
                "password or option that is not percent-encoded (%40 for @, %3D for =)"
            ) from None
        except psycopg.Error as error:
            needs = error.pgconn is not None and error.pgconn.needs_password
            code = None if needs else sqlstate_of(self._place.conninfo, time.monotonic() - began)
            cause = without_frames(error)
            raise refusal(code, said(error), self._place, needs_password=needs) from cause
        try:
            with closed_on_error(connection):
                if not self._is_checked:
                    check_sessions(connection, self._place.conninfo, self._place.shown)
                    self._is_checked = True
                self._configure(connection)
            return cast(Connection, connection)
        except psycopg.Error as error:
            raise self._translate(error) from error

    def _configure(self, connection: psycopg.Connection[Any]) -> None:
        info = connection.info
        encoding = info.parameter_status("server_encoding")
        if info.server_version < OLDEST_SERVER or encoding != "UTF8":
            raise StoreError(
                f"{self._place.shown} is PostgreSQL {info.server_version // 10000} with encoding "
                f"{encoding}; a store needs 13 or newer, and a database with encoding UTF8"
            )
        wait = TIMEOUT_SECONDS if self._place.timeout is None else self._place.timeout
        connection.adapters.register_dumper(int, Int8BinaryDumper)  # one type, whatever the value
        set_json_loads(json_or_text, connection)  # a row is refused then, and not its query
        connection.execute(
            _SETTINGS,
            {
                "default": self._place.timeout is None,
                "wait": str(max(1, int(wait * 1000))),  # 0 would be for ever
                "read": self._reads_only,
            },
        )

    def _cannot_write(self, session: Session) -> bool:
        asked = [self._place.schema, list(TABLES)]
        return bool(self._run(session, _CANNOT_WRITE, asked, fetch_all)[0][0])

    def _translate(self, error: Exception) -> PydedupError:
        if isinstance(error, psycopg.errors.UniqueViolation):
            schema, key = error.diag.schema_name, error.diag.constraint_name
            if schema == self._place.schema and key in _NUMBERS:
                return numbered_twice(said(error), self._place)
        lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        return meaning(getattr(error, "sqlstate", None), said(error), self._place, lost=lost)
