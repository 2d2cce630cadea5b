# SPDX-License-Identifier: Apache-2.0
"""DuckDB: a store in a file that one process at a time may write.

All connections of a process share one instance of DuckDB, so threads see each other's commits. Its
transactions are optimistic: of two that change a row the second fails at once, where pydedup wants
it to wait. So here writers of a process take turns.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import duckdb

from pydedup.adapter import Adapter, Capabilities
from pydedup.adapters.dbapi import (
    Connection,
    DbApiAdapter,
    Dialect,
    KeyTakenError,
    SessionPool,
    locate_file,
)
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

__all__ = ["DuckdbAdapter", "connect"]

DIALECT: Final = Dialect(
    types=dict.fromkeys(("word", "name", "text"), "VARCHAR")
    | {"int": "BIGINT", "float": "DOUBLE", "hash": "BLOB", "blob": "BLOB"},
    identity="BIGINT PRIMARY KEY DEFAULT nextval('pydedup_ids')",
    list_tables="SELECT table_name FROM information_schema.tables WHERE table_schema = 'main'",
    begin_write=("BEGIN TRANSACTION",),
    # A transaction begins for a database when it first looks into it.
    begin_snapshot=("BEGIN TRANSACTION", "SELECT COUNT(*) FROM duckdb_tables()"),
    increment="CAST(CAST(value AS BIGINT) + 1 AS VARCHAR)",
    many_rows=True,  # one by one takes ten times as long
    partial_indexes=False,
    expression_indexes=True,
    returning_id=True,
    join_text="string_agg({value}, ', ' ORDER BY {value})",
    byte_length="octet_length({value})",
)

MAX_PAYLOAD_BYTES: Final = 1 << 30

#: DuckDB reads what a file begins with before it asks for its lock: one that another process is
#: just creating is no database of its yet. So long that is not believed.
_CREATED_WITHIN_SECONDS: Final = 2.0

#: Whether this process was forked from one that may have used DuckDB: its threads are gone here.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_after_fork)

#: Who writes to a file in this process.
_writers: dict[Path, threading.RLock] = {}
_writers_lock: Final = threading.Lock()


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open ``duckdb:///relative.duckdb`` or ``duckdb:////absolute.duckdb``.

    ``?timeout=`` says how many seconds a writer waits for another thread.

    Raises
    ------
    ArgumentError
        For another form of URL, a ``schema``, or a missing folder.
    NotAStoreError
        When the file is something else, or, with mode ``"r"``, when it does not exist.
    ReadOnlyError, UnavailableError
        When it cannot be created, or another process has it open.
    """
    if schema is not None:
        raise ArgumentError(f"a store in DuckDB has a file of its own; leave out schema={schema!r}")
    file, timeout = locate_file(url)
    file.size(create=mode == "a")
    return DuckdbAdapter(Path(file.path), mode, timeout)


class _Cursor:
    """A cursor that belongs to its connection's transaction: those of DuckDB have their own."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self.execute = connection.execute
        self.fetchone = connection.fetchone
        self.fetchall = connection.fetchall

    @property
    def description(self) -> Any:
        return self._connection.description

    @property
    def rowcount(self) -> int:
        """How many rows a change concerned, which DuckDB gives as its result."""
        row = self._connection.fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Do nothing: there is nothing but the connection."""


class _Connection:
    """A connection as pydedup wants it."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self.close = connection.close

    def cursor(self) -> _Cursor:
        """Return a cursor of this very connection."""
        return _Cursor(self._connection)


class DuckdbAdapter(DbApiAdapter):
    """A store in a file of DuckDB."""

    driver_error = duckdb.Error

    def __init__(self, path: Path, mode: str, timeout: float) -> None:
        self._path, self._reads_only, self._timeout = path, mode == "r", timeout
        with _writers_lock:
            self._writer_turn = _writers.setdefault(path, threading.RLock())
        url = f"duckdb:///{path}"
        pool = SessionPool(self._open, name=url, file=str(path))
        with pool.acquire():
            pass  # so that what is wrong is told now
        super().__init__(
            url,
            dialect=DIALECT,
            read_only=self._reads_only,
            capabilities=Capabilities(
                max_payload_bytes=MAX_PAYLOAD_BYTES,
                max_parameters=1_000,
                concurrent_writers=False,
                shrinks=False,
                many_processes=False,
            ),
            pool=pool,
        )

    def _open(self) -> Connection:
        if _is_forked:
            raise UnavailableError(
                f"{self._path}: DuckDB cannot be used after a fork; start the process afresh "
                "(multiprocessing's 'spawn')"
            )
        end = time.monotonic() + _CREATED_WITHIN_SECONDS
        while True:
            try:
                return _Connection(self._connected())
            except duckdb.Error as error:
                if "not a valid DuckDB database" not in str(error) or time.monotonic() > end:
                    raise self.translate(error) from error
            time.sleep(0.02)

    def _connected(self) -> duckdb.DuckDBPyConnection:
        if self._reads_only:
            # Where this process has it open for writing, that instance is shared.
            with contextlib.suppress(duckdb.ConnectionException):
                return duckdb.connect(self._path, read_only=True)
        return duckdb.connect(self._path)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write transaction, as in the protocol; waits for others of this process."""
        self.refuse_when_read_only()
        if not self._writer_turn.acquire(timeout=self._timeout):
            raise ConflictError(
                f"{self.url}: another thread has been writing for {self._timeout} seconds; try "
                "again, or wait longer with ?timeout=seconds"
            )
        try:
            with super().transaction():
                yield
        finally:
            self._writer_turn.release()

    def create_tables(self) -> None:
        """Create the sequence that ids come from, then the tables."""
        self.execute("CREATE SEQUENCE IF NOT EXISTS pydedup_ids")
        super().create_tables()

    def translate(self, error: Exception) -> PydedupError:
        """Return what an error of DuckDB means."""
        said = " ".join(str(error).split())
        kind: type[PydedupError] = StoreError
        advice = "see the documentation of DuckDB"
        if "lock on file" in said:
            kind, advice = UnavailableError, "another process has it open; try again later"
        elif "No space left" in said or "not enough disk space" in said.lower():
            kind, advice = StorageFullError, "free some space; the store is as it was before"
        elif isinstance(error, duckdb.ConstraintException):
            kind, advice = KeyTakenError, "there is a row of this key"
        elif isinstance(error, duckdb.TransactionException):
            kind, advice = ConflictError, "nothing of it was kept; try again"
        elif isinstance(error, duckdb.CatalogException):
            kind, advice = NotAStoreError, "a table is missing; restore a backup"
        elif isinstance(error, duckdb.SerializationException | duckdb.FatalException):
            kind, advice = CorruptStoreError, "run `pydedup verify`, or restore a backup"
        elif isinstance(error, duckdb.ConversionException | duckdb.InvalidInputException):
            kind, advice = ArgumentError, "a column does not take this value"
        elif isinstance(error, duckdb.IOException):
            kind, advice = UnavailableError, "check the file and its folder"
        return kind(f"{self._path}: {said}; {advice}")

    # ---- upkeep -------------------------------------------------------------------------------

    def stored_bytes(self) -> int:
        """Return the size of the file and of the log beside it."""
        log = self._path.with_name(f"{self._path.name}.wal")
        return sum(file.stat().st_size for file in (self._path, log) if file.exists())

    def checkpoint(self) -> None:
        """Write the log into the file, unless somebody is reading or writing just now."""
        if not self.read_only:
            with contextlib.suppress(ConflictError):
                self.query("CHECKPOINT")

    def compact(self) -> None:
        """Write the log into the file. Deleted rows keep their space until DuckDB uses it again."""
        self.refuse_when_read_only()
        self.checkpoint()

    def integrity_errors(self) -> list[str]:
        """Return nothing: DuckDB checks its blocks when it reads them, and no sooner."""
        return []
