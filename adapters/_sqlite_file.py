# SPDX-License-Identifier: Apache-2.0
"""The file of a SQLite store: its URL, what lies beside it, and what makes it one of ours.

Nothing here opens the file but through a connection that is given: closing any other handle of
it would release the locks that SQLite holds on it in this process (a rule of POSIX).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from pydedup.errors import (
    ArgumentError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyError,
    UnavailableError,
)

__all__ = ["APPLICATION_ID", "Stamp", "StoreFile", "configure", "is_ours", "locate", "make_ours"]

#: Marks a SQLite database as ours, in its header.
APPLICATION_ID: Final = int.from_bytes(b"pydd", "big")

TIMEOUT_SECONDS: Final = 30.0
MOST_SECONDS: Final = 86400.0

#: Size of the smallest database that is not empty.
LEAST_BYTES: Final = 512

Stamp = tuple[int, int, int]


def locate(url: str) -> tuple[StoreFile, float]:
    """Return the file, and the wait for locks in seconds, of ``sqlite:///...``.

    The path is taken as it is written, as SQLAlchemy does: nothing in it is percent-decoded.

    Raises
    ------
    ArgumentError
        For another form, a database in memory, or an option that is not known.
    """
    rest, _, query = url.partition("://")[2].partition("?")
    host, slash, path = rest.partition("/")
    if path == ":memory:" or (not host and not path):
        raise ArgumentError(
            f"{url!r} is a database in memory, of which each thread would see another; name a "
            "file, e.g. sqlite:///models.db"
        )
    if host or not slash or "\0" in path:
        raise ArgumentError(
            f"{_unless_secret(url)} names no file; write sqlite:///relative.db or sqlite:////absolute.db"
        )
    timeout = TIMEOUT_SECONDS
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "timeout":
            raise ArgumentError(f"{url!r}: option {name!r} is not known; there is: timeout")
        try:
            timeout = float(value)
        except ValueError:
            timeout = -1.0
        if not 0 <= timeout <= MOST_SECONDS:
            raise ArgumentError(
                f"{url!r}: timeout={value} must be a number of seconds, 0 to {MOST_SECONDS:.0f}"
            )
    return StoreFile(os.path.realpath(path)), timeout


def _unless_secret(url: str) -> str:
    """Return a URL for a message, but for one that may hold a password."""
    return "this URL" if "@" in url else repr(url)


class StoreFile:
    """An absolute path, and what the file system says of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = Path(path).parent
        self._wal = Path(path + "-wal")

    def size(self, *, create: bool) -> int | None:
        """Return the size; ``None`` when there is no file and one may be created.

        Raises
        ------
        MissingStoreError
            When there is none and it may not be created.
        NotAStoreError
            When it is no regular file.
        ArgumentError, ReadOnlyError
            When the folder to create it in is missing or cannot be written.
        UnavailableError
            When the folder may not be looked into.
        """
        try:
            status = Path(self.path).stat()
        except (FileNotFoundError, NotADirectoryError):
            if not create:
                raise MissingStoreError(
                    f"there is no file {self.path}", self._hindrance()
                ) from None
            if not self.folder.is_dir():
                raise ArgumentError(
                    f"cannot create {self.path}: there is no folder {self.folder}; create it first"
                ) from None
            if not os.access(self.folder, os.W_OK):
                raise ReadOnlyError(
                    f"cannot create {self.path}: the folder {self.folder} cannot be written"
                ) from None
            return None
        except OSError as error:
            raise UnavailableError(f"cannot reach {self.path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise NotAStoreError(f"{self.path} is not a file, and so holds no store")
        if 0 < status.st_size < LEAST_BYTES:  # SQLite would take it for empty, and overwrite it
            raise NotAStoreError(
                f"{self.path} is too short for a database, and so is something else"
            )
        return status.st_size

    def _hindrance(self) -> str:
        """Say what must be done before the file can be created, if anything."""
        if not self.folder.is_dir():
            return f"create the folder {self.folder}"
        if not os.access(self.folder, os.W_OK):
            return f"let its owner make the folder {self.folder} one that you may write"
        return ""

    def is_writable(self) -> bool:
        """Whether both the file and its folder may be written, as WAL mode needs."""
        return os.access(self.path, os.W_OK) and os.access(self.folder, os.W_OK)

    def uri(self, options: str) -> str:
        """Return a SQLite URI of the file, whatever bytes are in its name."""
        return f"file:///{quote(os.fsencode(self.path.lstrip('/')))}?{options}"

    def has_empty_wal(self) -> bool:
        """Whether a write-ahead log lies beside the file, with nothing in it."""
        return self._wal.exists() and not self.wal_bytes()

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log, 0 when there is none."""
        try:
            return self._wal.stat().st_size
        except OSError:
            return 0

    def stored_bytes(self) -> int:
        """Return what the file and its log occupy together."""
        stamp = self.stamp()
        if stamp is None:
            raise UnavailableError(f"{self.path} was moved or deleted while it was open")
        return stamp[1] + self.wal_bytes()

    def refuse_unmerged_wal(self) -> None:
        """Raise UnavailableError when a log lies beside a file whose folder cannot be written."""
        if self.wal_bytes():
            raise UnavailableError(
                f"{self._wal} holds changes that are not in {self.path} yet, and the folder "
                f"{self.folder} cannot be written; open the store once where it can be written, "
                "or copy both files to such a place"
            )

    def stamp(self) -> Stamp | None:
        """Return what changes when the file is written or replaced; ``None`` when it is gone."""
        try:
            status = Path(self.path).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def ask(connection: Any, sql: str) -> Any:
    """Return the one value that a pragma, or a count, answers with."""
    return connection.execute(sql).fetchone()[0]


def is_ours(connection: Any) -> bool:
    """Whether a database bears our mark, or nothing at all."""
    mark = ask(connection, "PRAGMA application_id")
    if mark == 0:
        return bool(ask(connection, "SELECT COUNT(*) FROM sqlite_master") == 0)
    return bool(mark == APPLICATION_ID)


def make_ours(connection: Any) -> None:
    """Prepare an empty database; a no-op on one that is prepared.

    What shapes the file comes before the first table. The mark comes before the log, and so is
    in the main file itself from its first page on, where :func:`is_ours` can be asked of a file
    without reading its log.
    """
    if ask(connection, "PRAGMA application_id") != APPLICATION_ID:
        shape = "PRAGMA page_size = 65536; PRAGMA auto_vacuum = INCREMENTAL;"
        if ask(connection, "PRAGMA page_count"):
            shape = f"PRAGMA journal_mode = DELETE; {shape} VACUUM;"
        connection.executescript(f"{shape} PRAGMA application_id = {APPLICATION_ID};")
    if ask(connection, "PRAGMA journal_mode") != "wal":
        connection.execute("PRAGMA journal_mode = WAL")


def configure(connection: Any) -> None:
    """Set what SQLite does not keep in the file."""
    for setting in (
        "PRAGMA synchronous = FULL",
        "PRAGMA cache_size = -4096",  # KiB; payloads are read past it
        "PRAGMA secure_delete = FAST",  # to overwrite what is deleted would double the work
        "PRAGMA trusted_schema = OFF",  # the file may come from anybody
    ):
        connection.execute(setting)
