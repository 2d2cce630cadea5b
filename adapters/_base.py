# SPDX-License-Identifier: Apache-2.0
"""What every DB-API adapter stands on: hooks, running statements, transactions.

The calls of :class:`pydedup.adapter.Adapter` are built on it in ``_catalog`` and ``_dbapi``;
statements are in ``_sql``, threads and forks in ``_sessions``.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pydedup.adapter import LIVE, RETIRED, STAGING, Capabilities
from pydedup.adapter_options import TellRow
from pydedup.errors import (
    ArgumentError,
    CorruptStoreError,
    PydedupError,
    ReadOnlyError,
    StoreError,
)

from . import _damage
from ._schema import TABLES, VIEWS, Dialect
from ._sessions import READ, WRITE, Session, SessionPool
from ._sql import MAX_MEMBERS, Statements, batches, insert_pieces
from ._values import Row, WrongValueError, as_recorded

__all__ = ["DbApiBase", "check_state", "fetch_all"]

T = TypeVar("T", int, bytes)
R = TypeVar("R")


class DbApiBase(abc.ABC):
    """An open database. Subclasses set the attributes below before anything else is called."""

    #: The base class of the driver's exceptions, given to :meth:`_translate`.
    driver_error: type[Exception]
    #: Whether it is to read alone, whatever may be done; what cannot be changed is not asked again.
    _reads_only: bool = True

    def __init__(
        self,
        url: str,
        *,
        dialect: Dialect,
        read_only: bool,
        capabilities: Capabilities,
        pool: SessionPool,
    ) -> None:
        self._url = url
        self._read_only = read_only
        self._capabilities = capabilities
        self._sql = Statements(dialect)
        self._pool = pool

    @property
    def url(self) -> str:
        """The URL, without credentials."""
        return self._url

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""
        if self._read_only and not self._reads_only:
            # A standby may have become the primary, and a user been granted more.
            with contextlib.suppress(StoreError), self._pool.acquire() as session:
                self._read_only = self._cannot_write(session)
        return self._read_only

    def _cannot_write(self, session: Session) -> bool:
        """Whether the database only reads, or the user may only read the store there is."""
        return True

    @property
    def capabilities(self) -> Capabilities:
        """What this database can do."""
        return self._capabilities

    def close(self) -> None:
        """Close all connections of this process. Idempotent."""
        self._pool.close()

    # ---- hooks --------------------------------------------------------------------------------

    @abc.abstractmethod
    def _translate(self, error: Exception) -> PydedupError:
        """Return the pydedup error that says what a driver's error means."""

    @abc.abstractmethod
    def stored_bytes(self) -> int:
        """Return what the store occupies in its database, in bytes."""

    def size_is_exact(self) -> bool:
        """Whether the user may know what the store occupies; else it is at least `stored_bytes`."""
        return True

    @abc.abstractmethod
    def checkpoint(self) -> None:
        """Fold write-ahead data into the main file where there is such a thing."""

    @abc.abstractmethod
    def compact(self) -> None:
        """Give freed space back where the database can.

        Raises ReadOnlyError when changes are refused, StoreError inside of a transaction or
        snapshot.
        """

    @abc.abstractmethod
    def integrity_errors(self) -> list[str]:
        """Return what the database's own consistency check complains about."""

    def _begin(self, session: Session, statements: Sequence[str]) -> None:
        """Begin a transaction, waiting for other writers as long as the URL allows."""
        for statement in statements:
            with session.use():
                self._run(session, statement, (), _nothing)

    # ---- running statements -------------------------------------------------------------------

    def _run(
        self, session: Session, sql: str, parameters: Sequence[Any], result: Callable[[Any], R]
    ) -> R:
        """Run one statement in a locked session and return what ``result`` makes of its cursor."""
        try:
            cursor = session.connection.cursor()
            try:
                cursor.execute(sql, parameters)
                return result(cursor)
            finally:
                cursor.close()
        except self.driver_error as error:
            raise self._translate(error) from error

    def _ask(self, sql: str, parameters: Sequence[Any], result: Callable[[Any], R]) -> R:
        """Run a SELECT and return what ``result`` makes of its cursor."""
        with self._pool.acquire() as session:
            return self._run(session, sql, parameters, result)

    def _query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Return all rows that a SELECT finds."""
        return self._ask(sql, parameters, fetch_all)

    def _query_ours(self, sql: str, parameters: Sequence[Any]) -> list[Row]:
        """Return rows of our tables, whatever is in them; texts may come as bytes."""
        return self._query(sql, parameters)

    def _recorded(
        self,
        table: str,
        sql: str,
        parameters: Sequence[Any] = (),
        columns: Sequence[str] | None = None,
    ) -> list[Row]:
        """Return rows of one of our tables or views, of all its columns unless told otherwise.

        Raises CorruptStoreError for a value that its column cannot have.
        """
        spec = TABLES.get(table) or VIEWS[table]
        names = spec.names if columns is None else columns
        rows = self._query_ours(sql, parameters)
        try:
            return as_recorded(rows, spec.kinds(names))
        except WrongValueError as error:
            dialect, tell = self._sql.dialect, _damage.who_is_told(self)
            if tell is not None:
                return _damage.sound(dialect, table, names, rows, tell)
            said = _damage.damage(dialect, table, names, rows)
            raise CorruptStoreError(f"{self._url} is damaged: {said}") from error

    def sound_rows(self, tell: TellRow) -> AbstractContextManager[None]:
        """Leave out rows with a value that its column cannot have.

        See `pydedup.adapter_options.SoundRowsAdapter`.
        """
        return _damage.leaving_out(self, tell)

    def _writer(self) -> Session:
        """Return this thread's session, locked and in a write transaction."""
        session = self._pool.acquire()
        if session.scope == WRITE:
            return session
        session.lock.release()
        self._refuse_when_read_only()
        raise StoreError("changes are made inside of transaction(); this call was made outside")

    def _write(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one change; return the number of rows it concerned."""
        with self._writer() as session:
            return self._run(session, sql, parameters, _row_count)

    def _write_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one INSERT, that ends in its values, for each of many rows."""
        if self._sql.dialect.many_rows:
            head, _, marks = sql.rpartition(" VALUES ")
            with self._writer():
                pass  # raises where nothing may be written, also for no rows
            for piece in insert_pieces(rows, self.capabilities.max_parameters):
                values = [value for row in piece for value in row]
                self._write(f"{head} VALUES {', '.join([marks] * len(piece))}", values)
            return
        with self._writer() as session:
            try:
                cursor = session.connection.cursor()
                try:
                    cursor.executemany(sql, rows)
                finally:
                    cursor.close()
            except self.driver_error as error:
                raise self._translate(error) from error

    def _insert_many(
        self, table: str, rows: Iterable[Sequence[Any]], columns: Sequence[str] | None = None
    ) -> None:
        """Insert many rows, of all columns unless told otherwise."""
        self._write_many(self._sql.insert(table, columns), rows)

    def _insert(self, sql: str, parameters: Sequence[Any]) -> int:
        """Insert one row and return its new id."""
        returning = self._sql.dialect.returning_id
        with self._writer() as session:
            return self._run(session, sql, parameters, _returned if returning else _last_id)

    def _members(self, values: Sequence[T], reserved: int = 0) -> Iterator[Sequence[Any]]:
        """Yield parameters for pieces of distinct values, ascending."""
        distinct = sorted(set(values))
        if self._sql.dialect.arrays:
            starts = range(0, len(distinct), MAX_MEMBERS)
            return ([distinct[start : start + MAX_MEMBERS]] for start in starts)
        return batches(distinct, self.capabilities.max_parameters - reserved)

    def _refuse_when_read_only(self) -> None:
        if self.read_only:
            raise ReadOnlyError(
                f"{self._url} cannot be changed: it was opened with mode 'r', this user may not "
                "write there, or its place cannot be written to"
            )

    def _refuse_inside(self, call: str) -> None:
        if (scope := self._pool.scope()) is not None:
            raise StoreError(f"{call} cannot run inside of a {scope}")

    def _sized(self, payload: bytes, what: str) -> bytes:
        """Return the payload; raises ArgumentError when it is too large for the database."""
        limit = self.capabilities.max_payload_bytes
        if len(payload) > limit:
            raise ArgumentError(
                f"{what} has {len(payload)} bytes, and {self._url} takes at most {limit} in one "
                "value; write it in smaller pieces"
            )
        return payload

    # ---- transactions -------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write transaction of the calling thread; commits, or rolls back on any exception.

        Raises ReadOnlyError, ConflictError, StorageFullError.
        """
        self._refuse_when_read_only()
        with self._scope(WRITE, self._sql.dialect.begin_write):
            yield

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read transaction: all reads of this thread inside see one committed state.

        A snapshot within a snapshot is part of the outer one.
        """
        if self._pool.scope() == READ:
            yield
            return
        with self._scope(READ, self._sql.dialect.begin_snapshot):
            yield

    @contextlib.contextmanager
    def _scope(self, scope: str, begin: Sequence[str]) -> Iterator[None]:
        with self._pool.enter(scope) as session, self._committed(session, begin):
            yield

    @contextlib.contextmanager
    def _committed(self, session: Session, begin: Sequence[str]) -> Iterator[None]:
        """Begin, and commit at the end, or roll back on any exception; in the session's scope."""
        try:
            self._begin(session, begin)
            yield
            with session.use():
                self._run(session, "COMMIT", (), _nothing)
        except BaseException:
            self._roll_back(session)
            raise

    def _roll_back(self, session: Session) -> None:
        self._end(session, "ROLLBACK")

    def _end(self, session: Session, sql: str) -> None:
        """Run what gives back what a session holds, such as a lock; where that fails, close it."""
        try:
            with session.lock:
                if not session.closed:
                    self._run(session, sql, (), fetch_all)
        except PydedupError:
            # Some failures end the transaction by themselves. Whatever the state of the
            # connection is, closing it rolls back.
            self._pool.discard(session)
        except BaseException:
            self._pool.discard(session)  # interrupted: never keep a lock that nobody ends
            raise


def check_state(state: str) -> None:
    """Raise ArgumentError for a state that models and pages do not have."""
    if state not in (STAGING, LIVE, RETIRED):
        raise ArgumentError(f"there is no state {state!r}; choose {STAGING}, {LIVE} or {RETIRED}")


def fetch_all(cursor: Any) -> list[Row]:
    """Return all rows of a cursor; none of a statement that has no result."""
    return list(cursor.fetchall()) if cursor.description else []


def _row_count(cursor: Any) -> int:
    return int(cursor.rowcount)


def _last_id(cursor: Any) -> int:
    return int(cursor.lastrowid)


def _returned(cursor: Any) -> int:
    return int(cursor.fetchone()[0])


def _nothing(cursor: Any) -> None:
    """Leave the result of a statement that has none."""
