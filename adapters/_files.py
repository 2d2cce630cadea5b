# SPDX-License-Identifier: Apache-2.0
"""Databases that are a file: their URLs, and what the file system says before one is opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import parse_qsl

from pydedup.errors import (
    ArgumentError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyError,
    StorageFullError,
    UnavailableError,
    is_full,
)

from ._url import TIMEOUT_SECONDS, seconds_of

__all__ = ["DatabaseFile", "locate_file"]


def locate_file(url: str) -> tuple[DatabaseFile, float]:
    """Return the file, and the wait for locks in seconds, of ``sqlite:///...`` and the like.

    The path is taken as it is written, as SQLAlchemy does: nothing in it is percent-decoded.
    Options follow the last ``?``, so one at the end lets a path hold others.

    Raises ArgumentError for another form, a database in memory, or an option that is not known.
    """
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.rpartition("?")
    if not mark:
        rest, query = query, ""
    shown = f"{scheme}://{rest}"  # an option that is none of ours may be a password
    host, slash, path = rest.partition("/")
    if path == ":memory:" or (not host and not path):
        raise ArgumentError(
            f"{shown!r} is a database in memory, of which each thread would see another; name a "
            f"file, e.g. {scheme}:///models.db"
        )
    if host or not slash or "\0" in path:
        raise ArgumentError(
            f"{_unless_secret(shown)} names no file; write {scheme}:///relative.db or "
            f"{scheme}:////absolute.db"
        )
    timeout = TIMEOUT_SECONDS
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "timeout":
            raise ArgumentError(
                f"{shown!r}: option {name!r} is not known; there is: timeout (the URL of a path "
                f"that holds '?' ends in one more: {scheme}:///PATH?)"
            )
        try:
            timeout = seconds_of(value)
        except ValueError as error:
            raise ArgumentError(f"{shown!r}: timeout={value} must be {error}") from None
    return DatabaseFile(os.path.realpath(path)), timeout


def _unless_secret(url: str) -> str:
    """Return a URL for a message, but for one that may hold a password."""
    return "this URL" if "@" in url else repr(url)


class DatabaseFile:
    """An absolute path, and what the file system says of it.

    Attributes
    ----------
    path, folder
        Where it is.
    least_bytes
        Size of the smallest database that is not empty: what is shorter, the database may take for
        empty, and overwrite.
    """

    least_bytes = 0

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = Path(path).parent

    def size(self, *, create: bool) -> int | None:
        """Return the size; ``None`` when there is no file and one may be created.

        Raises MissingStoreError when there is none and it may not be created, NotAStoreError when
        it is no regular file, ArgumentError and ReadOnlyError when the folder to create it in is
        missing or cannot be written, StorageFullError when its disk is full, UnavailableError when
        the folder may not be looked into.
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
                    f"cannot create {self.path}: there is no folder {self.folder}; "
                    f"{self._not_home() or 'create it first'}"
                ) from None
            if not os.access(self.folder, os.W_OK):
                raise ReadOnlyError(
                    f"cannot create {self.path}: the folder {self.folder} cannot be written"
                ) from None
            if is_full(self.folder):  # or a file without a store would stay
                raise StorageFullError(
                    f"no room for a new store in {self.path}: its disk is full; free some space, "
                    "a few MiB, and open it again"
                ) from None
            return None
        except OSError as error:
            raise UnavailableError(f"cannot reach {self.path}: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            raise NotAStoreError(f"{self.path} is a folder; name a file in it, such as models.db")
        if not stat.S_ISREG(status.st_mode):
            raise NotAStoreError(f"{self.path} is not a file, and so holds no store")
        if 0 < status.st_size < self.least_bytes:
            raise NotAStoreError(f"{self.path} is no store: it is too short for a database")
        return status.st_size

    def _hindrance(self) -> str:
        """Say what must be done before the file can be created, if anything."""
        if not self.folder.is_dir():
            return self._not_home() or f"create the folder {self.folder}"
        if not os.access(self.folder, os.W_OK):
            return f"let its owner make the folder {self.folder} one that you may write"
        return ""

    def _not_home(self) -> str:
        """Say what to write for a home folder, where a shell did not see its ``~``."""
        is_meant = "~" in self.folder.parts
        return "write your home folder out, ~ is no name for it here" if is_meant else ""

    def is_writable(self) -> bool:
        """Whether both the file and its folder may be written, as WAL mode needs."""
        return os.access(self.path, os.W_OK) and os.access(self.folder, os.W_OK)
