# SPDX-License-Identifier: Apache-2.0
"""The file of a SQLite store: what lies beside it, and what makes it one of ours.

Nothing here opens the file but through a connection that is given: closing any other handle of
it would release the locks that SQLite holds on it in this process (a rule of POSIX).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from pydedup.errors import ArgumentError, NotAStoreError, ReadOnlyError, UnavailableError

from ._files import DatabaseFile, locate_file
from ._schema import PREFIX, TABLES

__all__ = [
    "ANY_READ",
    "LARGE_PAGE_BYTES",
    "Stamp",
    "StoreFile",
    "configure",
    "enlarge_pages",
    "is_ours",
    "locate",
    "make_ours",
    "wants_large_pages",
]

#: Marks a SQLite database as ours, in its header.
_APPLICATION_ID: Final = int.from_bytes(b"pydd", "big")

#: The cheapest statement that really reads the database.
ANY_READ: Final = "SELECT 1 FROM sqlite_master LIMIT 1"

#: Bytes of a page of the file. Each table and index has one at least, so a new file has small ones;
#: of large ones a megabyte is written and read in a third less of the processor's time.
_PAGE_BYTES: Final = 16 << 10
LARGE_PAGE_BYTES: Final = 64 << 10
#: So much must come that it pays to write the file anew, and so many times what is there, which may
#: be no more than that: meanwhile others wait.
_ENLARGE_BYTES: Final = 32 << 20
_ENLARGE_TIMES: Final = 8

Stamp = tuple[int, int, int]


def locate(url: str, schema: str | None = None) -> tuple[StoreFile, float]:
    """Return the file, and the wait for locks in seconds, of a URL; see `locate_file`."""
    if schema is not None:
        raise ArgumentError(f"SQLite has no schemas; leave out schema={schema!r}")
    file, timeout = locate_file(url)
    return StoreFile(file.path), timeout


class StoreFile(DatabaseFile):
    """The file, and the write-ahead log beside it."""

    least_bytes = 512

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._wal = Path(path + "-wal")
        self._journal = Path(path + "-journal")  # of a file that others took out of WAL mode
        self._inode: int | None = None

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

    def log_number(self) -> int | None:
        """Return what tells the write-ahead log from one that follows it, ``None`` without one."""
        try:
            return self._wal.stat().st_ino
        except OSError:
            return None

    def stored_bytes(self) -> int:
        """Return what the file and its log occupy together."""
        return self.same()[1] + self.wal_bytes()

    def same(self) -> Stamp:
        """Return the stamp of the file, which must be the one that it was when first asked.

        Another of that name has other pages under the same ids, and what is written to one that
        has no name any more is lost. Raises UnavailableError.
        """
        stamp = self.stamp()
        if stamp is None or stamp[0] != (self._inode or stamp[0]):
            raise UnavailableError(
                f"{self.path} was moved, deleted or replaced while it was open; open it again"
            )
        self._inode = stamp[0]
        return stamp

    def refuse_other_names(self) -> None:
        """Raise ReadOnlyError for a file with hard links: SQLite keeps a log beside each name.

        Who has it open by another name sees neither that log nor its locks.
        """
        names = Path(self.path).stat().st_nlink
        if names > 1:
            raise ReadOnlyError(
                f"{self.path} is one of {names} names of the same file (hard links), and writers "
                "by several of them would destroy it; delete the others (find -samefile finds "
                "them), or make this one a copy"
            )

    def refuse_views(self, connection: Any) -> None:
        """Raise NotAStoreError where what has the name of a table of ours is a view.

        The file may come from anybody, and reading a view may take for ever.
        """
        sql = "SELECT name FROM sqlite_master WHERE type <> 'index' AND coalesce(rootpage, 0) = 0"
        ours = {PREFIX + table for table in TABLES}
        for (name,) in connection.execute(sql):
            if str(name).lower() in ours:
                raise NotAStoreError(
                    f"{self.path} is no store of pydedup: its {name} is a view, where a store has "
                    "a table; do not trust the file"
                )

    def refuse_unmerged(self) -> None:
        """Raise UnavailableError for a file that is nothing without the log beside it.

        To be asked where the folder cannot be written, so that SQLite cannot put them together.
        """
        log, what = self._wal, "holds changes that are not yet in"
        if not self.wal_bytes():
            log, what = self._journal, "would undo what a writer left half done in"
            if not _is_hot(log):
                return
        raise UnavailableError(
            f"{log} {what} {self.path}, and the folder {self.folder} cannot be written; open the "
            "store once where it can be written, or copy both files to such a place"
        )

    def stamp(self) -> Stamp | None:
        """Return what changes when the file is written or replaced; ``None`` when it is gone."""
        try:
            status = Path(self.path).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _is_hot(journal: Path) -> bool:
    """Whether a journal is of a transaction that did not end: else it is gone, empty or zeroed."""
    try:
        with journal.open("rb") as file:
            return any(file.read(1))
    except OSError:
        return journal.exists()


def ask(connection: Any, sql: str) -> Any:
    """Return the one value that a pragma, or a count, answers with."""
    return connection.execute(sql).fetchone()[0]


def is_ours(connection: Any) -> bool:
    """Whether a database bears our mark, or nothing at all."""
    mark = ask(connection, "PRAGMA application_id")
    if mark == 0:
        return bool(ask(connection, "SELECT COUNT(*) FROM sqlite_master") == 0)
    return bool(mark == _APPLICATION_ID)


def make_ours(connection: Any) -> None:
    """Prepare an empty database; a no-op on one that is prepared.

    What shapes the file comes before the first table. The mark comes before the log, and so is
    in the main file itself from its first page on, where :func:`is_ours` can be asked of a file
    without reading its log.
    """
    if ask(connection, "PRAGMA application_id") != _APPLICATION_ID:
        shape = f"PRAGMA page_size = {_PAGE_BYTES}; PRAGMA auto_vacuum = INCREMENTAL;"
        if ask(connection, "PRAGMA page_count"):
            shape = f"PRAGMA journal_mode = DELETE; {shape} VACUUM;"
        connection.executescript(f"{shape} PRAGMA application_id = {_APPLICATION_ID};")
    if ask(connection, "PRAGMA journal_mode") != "wal":
        connection.execute("PRAGMA journal_mode = WAL")


def wants_large_pages(connection: Any, nbytes: int) -> bool:
    """Whether a file is to have large pages before so many bytes of payloads come.

    Not where a user has tables in it: their rows may get other numbers when it is written anew.
    """
    if nbytes < _ENLARGE_BYTES:  # most adds, which ask the database nothing
        return False
    page_bytes = ask(connection, "PRAGMA page_size")
    there = ask(connection, "PRAGMA page_count") * page_bytes
    if page_bytes >= LARGE_PAGE_BYTES or there > min(_ENLARGE_BYTES, nbytes // _ENLARGE_TIMES):
        return False
    ours = {PREFIX + table for table in TABLES}
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return all(name in ours or name.startswith("sqlite_") for (name,) in tables)


def enlarge_pages(connection: Any) -> None:
    """Write a file anew with large pages; SQLite refuses that while it is open elsewhere."""
    connection.executescript(
        f"PRAGMA journal_mode = DELETE; PRAGMA page_size = {LARGE_PAGE_BYTES}; VACUUM;"
        "PRAGMA journal_mode = WAL"
    )


def configure(connection: Any) -> None:
    """Set what SQLite does not keep in the file."""
    for setting in (
        "PRAGMA synchronous = FULL",  # the library may be built for none, also for checkpoints
        "PRAGMA cache_size = -4096",  # KiB, of each thread; payloads fill it, too
        "PRAGMA secure_delete = FAST",  # to overwrite what is deleted would double the work
        "PRAGMA trusted_schema = OFF",  # the file may come from anybody
    ):
        connection.execute(setting)
