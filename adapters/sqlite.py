# SPDX-License-Identifier: Apache-2.0
"""SQLite: a store in one file, which nothing has to be installed for.

The file is in WAL mode, so that reading never waits for writing, and every commit is synced but
those that only stage (``SqliteBase.staging``).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import cast

from pydedup.adapter import Adapter, Capabilities
from pydedup.errors import StoreError

from ._connection import closed_on_error
from ._sessions import Connection, SessionPool, forks_held_off
from ._sqlite_base import DIALECT, SqliteBase
from ._sqlite_connect import FileConnection, code_of, open_file, open_to_read, refuse_others
from ._sqlite_file import ANY_READ, StoreFile, configure, locate, make_ours
from ._sqlite_places import PagePlaces

__all__ = ["SqliteAdapter", "connect"]

#: What a row of ``pages`` needs beside its payload, generously.
ROW_BYTES = 1024


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open ``sqlite:///relative.db`` or ``sqlite:////absolute.db``; ``?timeout=`` in seconds.

    Raises
    ------
    ArgumentError
        For a URL that is none of these, a ``schema``, or a missing folder.
    NotAStoreError
        When the file is something else, which is then left as it is, or, with mode ``"r"``,
        when it does not exist.
    ReadOnlyError, StorageFullError, UnavailableError
        When it cannot be created or opened.
    StoreError
        When Python's SQLite is older than 3.37.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; 3.37 or newer is needed")
    file, timeout = locate(url, schema)
    size = file.size(create=mode == "a")
    if size:
        with forks_held_off():
            refuse_others(file, timeout)
    if size is None:
        return SqliteAdapter(url, file, "mode=rwc", timeout)
    writes = mode == "a" and file.is_writable()
    return SqliteAdapter(url, file, "mode=rw" if writes else "mode=ro", timeout)


class SqliteAdapter(SqliteBase):
    """A store in a SQLite file, opened with these options of a SQLite URI."""

    driver_error = sqlite3.Error

    def __init__(self, url: str, file: StoreFile, options: str, timeout: float) -> None:
        self._file, self._options, self._timeout = file, options, timeout
        read_only = options == "mode=ro"
        is_stale = self._is_stale if read_only else None
        pool = SessionPool(self._connect, name=url, file=file.path, is_stale=is_stale)
        try:
            with pool.acquire() as session:
                limit = cast(FileConnection, session.connection).getlimit
                capabilities = Capabilities(
                    max_payload_bytes=limit(sqlite3.SQLITE_LIMIT_LENGTH) - ROW_BYTES,
                    max_parameters=limit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER),
                    concurrent_writers=False,
                    shrinks=True,
                    page_readers=4,  # a disk has deeper queues than one reader fills
                )
            super().__init__(
                url, dialect=DIALECT, read_only=read_only, capabilities=capabilities, pool=pool
            )
            self._places = PagePlaces(file.path, self._root_of_pages, self._checksums)
        except BaseException:
            pool.close()
            self._take_empty_log(read_only=read_only)
            raise
        # Of a file that is deleted from now on, another thread makes no new one.
        self._options = "mode=ro" if read_only else "mode=rw"

    def _connect(self) -> Connection:
        try:
            if self._options == "mode=ro":
                connection = self._open_to_read()
            else:
                connection = open_file(self._file, self._options, self._timeout)
            with closed_on_error(connection):
                if self._options != "mode=ro":
                    self._make_ours(connection)
                configure(connection)
                self._file.refuse_views(connection)
                self._file.same()
            if connection.stamp is None:
                connection.log = self._file.log_number()
            return connection
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._translate(error) from error

    def _make_ours(self, connection: FileConnection) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                make_ours(connection)
                return
            except sqlite3.OperationalError as error:
                # Two that switch to WAL at once get in each other's way without waiting.
                if code_of(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _open_to_read(self) -> FileConnection:
        try:
            return open_to_read(self._file, self._timeout)
        except sqlite3.OperationalError as error:
            # Reading in WAL mode needs a file beside the database, to agree with writers.
            refusals = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            if code_of(error) not in refusals or os.access(self._file.folder, os.W_OK):
                raise
        self._file.refuse_unmerged()
        stamp = self._file.stamp()
        connection = open_file(self._file, "mode=ro&immutable=1")
        connection.stamp = stamp
        return connection

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        table = DIALECT.name("pages")
        for page_id, checksum in self._walk(ids):
            self._places.look_again(page_id)
            try:
                with self._pool.acquire() as session:
                    connection = cast(FileConnection, session.connection)
                    with connection.blobopen(table, "payload", page_id, readonly=True) as blob:
                        payload = blob.read()
            except (sqlite3.Error, OverflowError):
                # There is no such page, or its payload is no bytes; or Debian 12's Python 3.11.2,
                # which takes ids of 31 bits here.
                yield from super()._read_payloads([page_id])
                continue
            yield page_id, checksum, payload

    def close(self) -> None:
        """Close all connections of this process. Idempotent."""
        first = True
        try:
            first = self._pool.close()
        finally:  # also where that is interrupted
            if first:
                self._take_empty_log(read_only=self._read_only)

    def _take_empty_log(self, *, read_only: bool) -> None:
        """Take away the empty log that reading leaves, as a writer does that is the last to go."""
        if read_only and self._file.has_empty_wal() and self._file.is_writable():
            with (
                forks_held_off(),
                contextlib.suppress(sqlite3.Error, UnicodeDecodeError),  # of a damaged schema
                contextlib.closing(open_file(self._file, "mode=rw")) as connection,
            ):
                connection.execute(ANY_READ).fetchall()
