# SPDX-License-Identifier: Apache-2.0
"""Connections to a SQLite file: to write, to read, and to see whether it is ours."""

from __future__ import annotations

import contextlib
import sqlite3

from pydedup.errors import NotAStoreError

from ._connection import closed_on_error
from ._sqlite_errors import meaning
from ._sqlite_file import ANY_READ, Stamp, StoreFile, is_ours

__all__ = ["FileConnection", "code_of", "open_file", "open_to_read", "refuse_others"]


class FileConnection(sqlite3.Connection):
    """A connection to a file of ours."""

    number: int | None = None  # of its own, see `SqliteBase.change_mark`
    stamp: Stamp | None = None
    """What the file looked like when it was taken for one that nobody changes."""
    log: int | None = None
    """Which write-ahead log it reads and writes; see `StoreFile.log_number`."""


def open_file(file: StoreFile, options: str, timeout: float = 0.0) -> FileConnection:
    """Open a file with these options of a SQLite URI; ``timeout`` in seconds."""
    return sqlite3.connect(
        file.uri(options),
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,  # each thread has its own, but any may close it
        factory=FileConnection,
        uri=True,
    )


def code_of(error: sqlite3.Error) -> int:
    """Return the code of an error, without what extends it."""
    return error.sqlite_errorcode & 0xFF


def open_to_read(file: StoreFile, timeout: float) -> FileConnection:
    """Open a file to read from it, which was tried.

    Where a writer was killed while he changed the file itself, that is undone first, as far as
    this process may write.
    """
    try:
        return _opened_to_read(file, timeout)
    except sqlite3.OperationalError as error:
        is_half_done = error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
        if not is_half_done or not file.is_writable():
            raise
    with contextlib.closing(open_file(file, "mode=rw", timeout)) as connection:
        connection.execute(ANY_READ).fetchall()
    return _opened_to_read(file, timeout)


def _opened_to_read(file: StoreFile, timeout: float) -> FileConnection:
    connection = open_file(file, "mode=ro", timeout)
    with closed_on_error(connection):
        connection.execute(ANY_READ).fetchall()
    return connection


def refuse_others(file: StoreFile, timeout: float) -> None:
    """Raise NotAStoreError for a file that is no store, without changing anything."""
    try:
        try:
            # As one that nobody changes, it is opened without recovery or a file beside it.
            with contextlib.closing(open_file(file, "mode=ro&immutable=1")) as connection:
                ours = is_ours(connection)
        except sqlite3.DatabaseError as error:
            if code_of(error) != sqlite3.SQLITE_CORRUPT:
                raise
            # Without its log, or its journal, a file looks damaged while, or after a writer was
            # killed while, pages go from the one to the other.
            with contextlib.closing(open_to_read(file, timeout)) as connection:
                ours = is_ours(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise meaning(error, file.path) from error
    if not ours:
        raise NotAStoreError(
            f"{file.path} is a SQLite database of something else; give the store its own file"
        )
