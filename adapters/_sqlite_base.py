# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names are those of the dialect; values are always bound)
"""SQLite beside its driver: dialect, payloads in the file, waiting for the writer's lock, care."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Final

from pydedup.errors import (
    ConflictError,
    CorruptStoreError,
    PydedupError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

from ._base import fetch_all
from ._damage import who_is_told
from ._dbapi import PAYLOADS_PER_READ, DbApiAdapter
from ._schema import NUMBERED, Dialect
from ._sessions import READ, WRITE, Connection, Session
from ._sqlite_ahead import PagesAhead
from ._sqlite_errors import meaning
from ._sqlite_file import ANY_READ, Stamp, StoreFile, enlarge_pages, wants_large_pages
from ._sqlite_places import PagePlaces
from ._sqlite_rows import SqliteRows
from ._values import Row

__all__ = ["DIALECT", "SqliteBase"]

# Move the log when it has so many pages, 64 MiB of large ones. Staging leaves that to `settle`.
_AUTOCHECKPOINT: Final = "PRAGMA wal_autocheckpoint = 1000"

DIALECT: Final = Dialect(
    types=dict.fromkeys(("word", "name", "text"), "TEXT")
    | {"int": "INTEGER", "float": "REAL", "hash": "BLOB", "blob": "BLOB"},
    identity="INTEGER PRIMARY KEY AUTOINCREMENT",
    table_options=" STRICT",
    # Else the key is an index beside the table, and each takes a page of the file at least.
    keyed_table_options=", WITHOUT ROWID",
    page_pad=True,
    list_tables="SELECT name FROM sqlite_master WHERE type IN ('table', 'view')",
    # On the disk when it is committed: see `staging`.
    begin_write=("PRAGMA synchronous = FULL", _AUTOCHECKPOINT, "BEGIN IMMEDIATE"),
    begin_snapshot=("BEGIN", ANY_READ),
)

_CONNECTION_NUMBERS: Final = itertools.count()
_LAST_ID: Final = (1 << 63) - 1
# A commit leaves a log of up to 256 MiB alone: `settle` moves it, and may be at it. Many small
# models, copied one by one, give nobody reason to.
_BEGIN_UNSETTLED: Final = ("PRAGMA wal_autocheckpoint = 4000", "BEGIN IMMEDIATE")

#: Between slices of waiting for the writer's lock, Ctrl-C is heard.
WAIT_SLICE_SECONDS: Final = 0.25
#: A checkpoint that readers hold up is not worth a longer wait.
CHECKPOINT_SECONDS: Final = 1.0
_LOG_LOST: Final = (
    "no longer has the log that this process writes, and what it wrote since may be lost. Somebody "
    "deleted that; or another process did as it ended, since this one gave up its locks when it "
    "opened the file by other means, say to copy it. Start this process afresh, and let nothing "
    "open the file of a store beside pydedup: store.backup copies it"
)
#: Pages of the file given back in one transaction, which holds them in memory: 16 MiB at most.
COMPACT_STEP: Final = 256


class SqliteBase(SqliteRows, DbApiAdapter):
    """A store in a SQLite file, but for what needs the driver."""

    # Set before the first connection is opened, and places before the first page is read.
    _file: StoreFile
    _timeout: float
    _places: PagePlaces

    def _translate(self, error: Exception) -> PydedupError:
        return meaning(error, self._file.path)

    def _query_ours(self, sql: str, parameters: Sequence[Any]) -> list[Row]:
        """Return rows of our tables, whatever is in them."""
        try:
            return self._query(sql, parameters)
        except CorruptStoreError:
            # A text that is no UTF-8 is, for the driver, an error of all rows; or the file cannot
            # be read, and cannot now.
            with self._pool.acquire() as session:
                connection: Any = session.connection
                connection.text_factory = _as_it_is
                try:
                    return self._run(session, sql, parameters, fetch_all)
                finally:
                    connection.text_factory = str

    def _insert(self, sql: str, parameters: Sequence[Any]) -> int:
        try:
            return super()._insert(sql, parameters)
        except StorageFullError as error:
            self._refuse_last_ids(error)
            raise

    def _write_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        try:
            super()._write_many(sql, rows)
        except StorageFullError as error:
            self._refuse_last_ids(error)
            raise

    def _refuse_last_ids(self, error: StorageFullError) -> None:
        """Raise CorruptStoreError where a damaged row has the last id there is.

        Then none can follow, and SQLite says that the database is full.
        """
        found: list[Row] = []
        for name in map(self._sql.dialect.name, NUMBERED):
            with contextlib.suppress(StoreError):  # it is full indeed
                found = self._query(f"SELECT id FROM {name} WHERE id = ?", [_LAST_ID])
            if found:
                raise CorruptStoreError(
                    f"{self._url} is damaged: a row of {name} has the id {_LAST_ID}, which none "
                    "can follow; run verify --repair-from on the store, or restore a backup"
                ) from error

    def set_page_state(
        self, ids: Sequence[int], state: str, retired_at: float | None = None
    ) -> None:
        """Change the state of pages, also of those whose row is damaged."""
        try:
            super().set_page_state(ids, state, retired_at)
        except CorruptStoreError:
            # Nothing of a row can be changed while it has a value of another type than its column.
            for piece in self._members(ids):
                self._write(self._as_bytes(len(piece)), piece)
            super().set_page_state(ids, state, retired_at)

    def _as_bytes(self, members: int) -> str:
        """Return what makes bytes of what must be bytes, in the rows of pages."""
        wrong = "typeof({}) NOT IN ('blob', 'null')".format
        return (
            f"UPDATE {self._sql.dialect.name('pages')} "
            "SET checksum = CAST(checksum AS BLOB), payload = CAST(payload AS BLOB) "
            f"WHERE ({wrong('checksum')} OR {wrong('payload')}) "
            f"AND id {self._sql.members(members)}"
        )

    def change_mark(self) -> Hashable | None:
        """Return what no two states of the database have in common.

        See `pydedup.adapter_options.ChangeMarkAdapter`.
        """
        with self._pool.acquire() as session:
            if session.scope is not None or who_is_told(self) is not None:
                return None
            connection: Any = session.connection
            if connection.number is None:
                connection.number = next(_CONNECTION_NUMBERS)
            try:  # what others commit changes the version, and what is done here the total
                (version,) = connection.execute("PRAGMA data_version").fetchone()
            except self.driver_error:  # the next query meets it, too, and says so
                return None
            return connection.number, version, connection.total_changes

    # ---- payloads where they lie --------------------------------------------------------------

    def read_pages_into(
        self, ids: Sequence[int], memory: Callable[[int], memoryview]
    ) -> Iterator[tuple[int, bytes, memoryview]]:
        """Yield id, checksum and payload of pages that lie in the file in one piece.

        See `pydedup.adapter_options.ReadIntoAdapter`.
        """
        for page, payload in self._places.read(list(dict.fromkeys(ids)), memory):
            yield page.id, page.checksum, payload

    def _walk(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield those of the pages that there are, with their checksums, before each is read.

        It was asked for by then, with the next few, and several checksums are one query.
        """
        checksums: dict[int, bytes] = {}
        for number, page_id in enumerate(PagesAhead(self._places).walk(ids)):
            if number % PAYLOADS_PER_READ == 0:
                checksums = dict(self._checksums(ids[number : number + PAYLOADS_PER_READ]))
            if page_id in checksums:
                yield page_id, checksums[page_id]

    def _root_of_pages(self) -> int:
        """Return the number of the first page of the table ``pages`` in the file, 0 for none."""
        sql = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        rows = self._query(sql, [DIALECT.name("pages")])
        return int(rows[0][0]) if rows else 0

    # ---- files that nobody changes ------------------------------------------------------------

    def _is_stale(self, connection: Connection) -> bool:
        """Whether a file that was opened as one that nobody changes has been changed."""
        stamp = _stamp_of(connection)
        return stamp is not None and (stamp != self._file.stamp() or self._file.wal_bytes() > 0)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read transaction; raises ConflictError when what was read is no one state."""
        with super().snapshot():
            yield
            with self._pool.acquire() as session:
                stamp = _stamp_of(session.connection)
            if stamp is not None and stamp != self._file.stamp():
                raise ConflictError(f"{self._file.path} was changed while it was read; read again")

    # ---- staging ------------------------------------------------------------------------------

    def expect(self, nbytes: int) -> None:
        """Give a file that is small beside what comes larger pages, if nobody else has it open."""
        with self._pool.acquire() as session:
            if not wants_large_pages(session.connection, nbytes):
                return
        self._file.refuse_other_names()
        with self._pool.emptied() as is_empty:
            if is_empty:
                # Where that fails the pages stay as they are; who connects next sees to the log.
                with (
                    contextlib.closing(self._connect()) as connection,
                    contextlib.suppress(self.driver_error),
                ):
                    enlarge_pages(connection)

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Write transaction that a loss of power may undo, until a later one is committed.

        The log is synced as a whole and before any of it goes into the main file, so no commit
        outlives an earlier one.
        """
        self._refuse_when_read_only()
        with self._scope(WRITE, ("PRAGMA synchronous = NORMAL", *_BEGIN_UNSETTLED)):
            yield

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Write transaction that is on the disk once it is committed, with all before it."""
        self._refuse_when_read_only()
        with self._scope(WRITE, ("PRAGMA synchronous = FULL", *_BEGIN_UNSETTLED)):
            yield

    def settle(self) -> None:
        """Move what of the log is committed into the main file, without waiting for anybody."""
        with contextlib.suppress(ConflictError, StorageFullError), self._pool.acquire() as session:
            self._pragma(session, "wal_checkpoint(PASSIVE)")
            self._places.begin_writeback()  # SQLite does not sync before it moved all of the log

    # ---- waiting ------------------------------------------------------------------------------

    def _begin(self, session: Session, statements: Sequence[str]) -> None:
        if session.scope == READ:
            super()._begin(session, statements)
            return
        self._file.same()
        self._file.refuse_other_names()
        deadline = time.monotonic() + self._timeout
        with self._patience(session, min(WAIT_SLICE_SECONDS, self._timeout)):
            while True:
                try:
                    super()._begin(session, statements)
                    return
                except ConflictError:
                    if time.monotonic() >= deadline:
                        raise

    @contextlib.contextmanager
    def _committed(self, session: Session, begin: Sequence[str]) -> Iterator[None]:
        self._check_log(session)
        with super()._committed(session, begin):
            yield
        self._check_log(session)

    def _check_log(self, session: Session) -> None:
        """Raise UnavailableError where others deleted the log that the session writes.

        They could since this process gave its locks up, by closing another handle of the file (a
        rule of POSIX). What it would write goes nowhere, and at its end over what others wrote.
        """
        with session.lock:
            log: int | None = getattr(session.connection, "log", None)
            # Once another thread closed the store, the log is gone rightly.
            if session.closed or log is None or log == self._file.log_number():
                return
        self._file.same()
        self._pool.abandon(_LOG_LOST)
        raise UnavailableError(f"{self._url} {_LOG_LOST}")

    @contextlib.contextmanager
    def _patience(self, session: Session, seconds: float) -> Iterator[None]:
        """Wait that long for locks of others, inside."""
        self._pragma(session, f"busy_timeout = {int(seconds * 1000)}")
        try:
            yield
        finally:
            if not session.closed:
                self._pragma(session, f"busy_timeout = {int(self._timeout * 1000)}")

    def _pragma(self, session: Session, pragma: str) -> list[Row]:
        with session.use():
            return self._run(session, f"PRAGMA {pragma}", (), fetch_all)

    # ---- upkeep -------------------------------------------------------------------------------

    def stored_bytes(self) -> int:
        """Return the size of the file and of the log beside it."""
        return self._file.stored_bytes()

    def checkpoint(self) -> None:
        """Move the log into the main file, as far as readers let it, and cut it to nothing."""
        if self._read_only:
            return
        with (
            contextlib.suppress(ConflictError, StorageFullError),
            self._pool.acquire() as session,
            self._patience(session, min(CHECKPOINT_SECONDS, self._timeout)),
        ):
            self._pragma(session, "wal_checkpoint(TRUNCATE)")

    def compact(self) -> None:
        """Shrink the file by its free pages, in steps between which others may write."""
        self._refuse_when_read_only()
        self._refuse_inside("compact()")
        step = COMPACT_STEP
        while True:
            with self._pool.acquire() as session:
                self._check_log(session)
                ((free,),) = self._pragma(session, "freelist_count")
                try:
                    self._give_back(session, step)
                except StorageFullError:  # the log wants room for each page that is moved
                    if step == 1:
                        raise
                    step, free = max(step // 16, 1), free + 1
                ((left,),) = self._pragma(session, "freelist_count")
            if left == 0 or left >= free:
                break
            if step < COMPACT_STEP:
                self.checkpoint()
        self.checkpoint()

    def _give_back(self, session: Session, pages: int) -> None:
        cursor = session.connection.cursor()
        try:
            # Pages behind the new end are touched as they are freed. Those in memory at the commit
            # are left out of the log; a full cache would write them there before, 100 times more.
            cursor.execute("PRAGMA cache_spill = OFF")
            cursor.execute(_AUTOCHECKPOINT)
            # One page is freed per step, and only a script is stepped to its end.
            cursor.executescript(f"PRAGMA incremental_vacuum({pages})")
        except self.driver_error as error:
            raise self._translate(error) from error
        finally:
            cursor.execute("PRAGMA cache_spill = ON")

    def integrity_errors(self) -> list[str]:
        """Return what SQLite's own check finds wrong, and which views are missing."""
        try:
            with self._pool.acquire() as session:
                rows = self._pragma(session, "integrity_check")
        except CorruptStoreError as error:
            return [str(error)]
        return [said for (said,) in rows if said != "ok"] + self._missing_views()


def _as_it_is(value: bytes) -> str | bytes:
    """Return a text, or what it is where it is none."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _stamp_of(connection: Connection) -> Stamp | None:
    """Return what the file looked like when it was opened as one that nobody changes."""
    stamp: Stamp | None = getattr(connection, "stamp", None)
    return stamp
