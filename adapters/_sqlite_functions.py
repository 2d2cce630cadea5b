# SPDX-License-Identifier: Apache-2.0
"""Functions of ours on a connection of a user's to SQLite.

The connection is the user's own: nothing about it is changed but that it knows the functions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError, CorruptStoreError, StoreError

from ._sqlite_base import DIALECT
from ._sqlite_file import locate
from ._values import WrongValueError, as_recorded
from .sqlite import SqliteAdapter

__all__ = ["as_seen", "bind", "main_file", "state"]

_STATE: Final = (
    f"SELECT value FROM {DIALECT.name('meta')} "  # noqa: S608
    "WHERE name IN ('epoch', 'store_id') ORDER BY name DESC"
)


def bind(
    connection: object, functions: Sequence[tuple[str, int, bool, Callable[..., Any]]]
) -> None:
    """Make functions known to a connection, in the place of those of the same name.

    Parameters
    ----------
    functions
        Name; number of arguments, or -1; whether one call answers for all with the same arguments
        in a statement; and what is called.
    """
    for name, count, once, function in functions:
        _checked(connection).create_function(name, count, function, deterministic=once)


def main_file(connection: object) -> str:
    """Return the file of a connection. Raises ArgumentError when it has none."""
    rows = _rows(_checked(connection), "PRAGMA database_list")
    path = next((row[2] for row in rows if row[1] in ("main", b"main")), "")
    if not path:
        raise ArgumentError(
            "this connection is to a database in memory, which is no store; name the store that "
            "has the models"
        )
    return path if isinstance(path, str) else str(path, "utf-8")


def state(connection: object) -> tuple[str, str]:
    """Return id and epoch of the store in a connection's file, as its statement sees it.

    The connection is one that `bind` took: this is asked for each row.
    """
    rows = _rows(cast(sqlite3.Connection, connection), _STATE)
    try:
        (store_id,), (epoch,) = as_recorded(rows, ["text"])
    except (ValueError, WrongValueError) as error:
        raise CorruptStoreError(
            "the store in the file of this connection lacks its id or epoch; restore a backup"
        ) from error
    return store_id, epoch


def as_seen(connection: object, url: str) -> Adapter:
    """Return the store in a connection's file, read as the connection's statement sees it.

    To look models up; closing it leaves the connection open.
    """
    return _AsSeen(_checked(connection), url)


class _AsSeen(SqliteAdapter):
    def __init__(self, connection: sqlite3.Connection, url: str) -> None:
        self._users = connection
        file, timeout = locate(url)
        super().__init__(url, file, "mode=ro", timeout)

    def _connect(self) -> _Borrowed:
        return _Borrowed(self._users)

    def change_mark(self) -> None:
        """Return none: what the user's transaction undoes changes no number that there is."""


class _Borrowed:
    """A connection of a user's, for reading rows as they are."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.getlimit = connection.getlimit

    def cursor(self) -> sqlite3.Cursor:
        cursor = self._connection.cursor()
        cursor.row_factory = None
        return cursor

    def close(self) -> None:
        """Leave it open: it is the user's."""


def _checked(connection: object) -> sqlite3.Connection:
    if not isinstance(connection, sqlite3.Connection):
        raise ArgumentError(
            f"a connection of the module sqlite3 is needed, not {type(connection).__name__}"
        )
    try:
        connection.cursor().close()
    except sqlite3.ProgrammingError as error:  # closed, or of another thread
        raise ArgumentError(f"this connection cannot be used here: {error}") from error
    return connection


def _rows(connection: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    """Return rows as they are, whatever the user made of his connection."""
    cursor = _Borrowed(connection).cursor()
    try:
        return cursor.execute(sql).fetchall()
    except sqlite3.Error as error:
        raise StoreError(
            f"the file of this connection cannot be read as a store: {error}"
        ) from error
    finally:
        cursor.close()
