# SPDX-License-Identifier: Apache-2.0
"""What SQLite's result codes mean to a user."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Final

from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
    is_full,
)

from ._errors import KeyTakenError
from ._schema import PREFIX
from ._sqlite_file import LARGE_PAGE_BYTES

__all__ = ["meaning"]

_FREE: Final = (
    "free some space, a few MiB, and run a copy or restore again, which goes on; else run "
    "`pydedup vacuum`, which gives back what was written; what was complete is there, and nothing "
    "of the rest"
)
_FREE_TO_READ: Final = (
    "whoever opens a store, also to read it, needs 64 KiB beside it; free some space, a few MiB, "
    "and open it again"
)
_FREE_FIRST: Final = "free some space, a few MiB, and open it again"
# Also what `pydedup verify` itself says, of a file that was cut off.
_DAMAGED: Final = (
    "`pydedup verify` lists what is damaged; where that says no more than this, the file cannot be "
    "read any more: restore a backup"
)

#: Result code of who finds no room for the file that those who have a store open share.
_NO_SHARED_FILE: Final = 10 | 19 << 8  # IOERR_SHMSIZE
#: Result codes of a write that failed, IOERR_WRITE and IOERR_TRUNCATE among them.
_WRITES: Final = (10 | 3 << 8, 10 | 6 << 8, _NO_SHARED_FILE)

#: Result code -> error and what to do. An extended code that is not here counts as its lowest
#: byte. The numbers are part of SQLite's interface (https://sqlite.org/rescode.html).
_MEANINGS: Final[dict[int, tuple[type[PydedupError], str]]] = {
    3: (ReadOnlyError, "make the file and its folder accessible"),  # PERM
    5: (  # BUSY
        ConflictError,
        "another process or thread is writing; try again, or wait longer with ?timeout=seconds",
    ),
    6: (ConflictError, "end the transaction that is open in this thread first"),  # LOCKED
    8: (ReadOnlyError, "make the file and its folder writable"),  # READONLY
    8 | 3 << 8: (  # READONLY_ROLLBACK
        UnavailableError,
        "a writer was interrupted; open the store once as who may write it, and its folder",
    ),
    8 | 4 << 8: (  # READONLY_DBMOVED
        UnavailableError,
        "the file was moved, deleted or replaced while it was open; open it again",
    ),
    10: (UnavailableError, "check the medium it lies on"),  # IOERR
    _NO_SHARED_FILE: (StorageFullError, _FREE_TO_READ),
    11: (CorruptStoreError, _DAMAGED),  # CORRUPT
    13: (StorageFullError, _FREE),  # FULL
    14: (  # CANTOPEN
        UnavailableError,
        "check that the file exists and that this user may read it, and its folder",
    ),
    15: (UnavailableError, "check that its file system supports locks"),  # PROTOCOL
    18: (ArgumentError, "write it in smaller pieces"),  # TOOBIG
    19: (ArgumentError, "a column does not take this value"),  # CONSTRAINT
    19 | 6 << 8: (KeyTakenError, "there is a row of this key"),  # CONSTRAINT_PRIMARYKEY
    19 | 8 << 8: (KeyTakenError, "there is a row of this key"),  # CONSTRAINT_UNIQUE
    26: (  # NOTADB
        NotAStoreError,
        "name the file of a store, or of one that is to be made; this one was left as it is",
    ),
}


def meaning(error: Exception, path: str) -> PydedupError:
    """Return what an exception of the ``sqlite3`` module means for the store at ``path``.

    One of Python is what the module makes of SQLite's words where they are no UTF-8.
    """
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, UnicodeDecodeError):  # SQLite names what a damaged schema has
        return CorruptStoreError(f"{path}: {error.object.decode(errors='replace')}; {_DAMAGED}")
    if code is None:
        # What the module refuses by itself: a text that is no UTF-8, or before it asks SQLite, a
        # parameter of a type that it does not know.
        if str(error).startswith("Could not decode to UTF-8"):
            return CorruptStoreError(f"{path}: {error}; {_DAMAGED}")
        return ArgumentError(f"{path}: {error}")
    if code & 0xFF == 10 and code != _NO_SHARED_FILE and is_full(Path(path).parent):
        code = 13
    elif code in _WRITES and (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) >= 0:
        return StorageFullError(
            f"{path}: {error}; a file of this process may have no more than {limit} bytes: raise "
            "`ulimit -f`"
        )
    elif code & 0xFF == 14 and _has_no_files_left():
        return UnavailableError(
            f"{path}: {error}; this process has as many files open as it may: close some (stores, "
            "threads that read from one), or raise `ulimit -n`"
        )
    if code == 19 | 12 << 8 and f"column {PREFIX}" in str(error):
        code = 11  # CONSTRAINT_DATATYPE of a table of ours: the row that is changed was damaged
    temporary = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
    if code == 13 and not is_full(Path(path).parent) and is_full(Path(temporary)):
        return StorageFullError(
            f"{path}: {error}; that is {temporary}, where SQLite has temporary files: free some "
            "space there, or set TMPDIR to another folder before you start again; what was "
            "complete is in the store, and nothing of the rest"
        )
    kind, advice = _MEANINGS.get(code) or _MEANINGS.get(code & 0xFF) or (StoreError, "")
    if kind is StorageFullError and _is_empty(path):
        return kind(f"no room for a new store in {path} ({error}); {_FREE_FIRST}")
    if kind is ReadOnlyError and (left := _left_by_others(path)):
        advice = (
            f"{' and '.join(left)} is what another user left who may only read the store: make it "
            "writable for this one, or, where no program uses the store and it is empty, delete it"
        )
    return kind(f"{path}: {error}" + (f"; {advice}" if advice else f" (code {code})"))


def _has_no_files_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _left_by_others(path: str) -> list[str]:
    """Return the files beside one that may be written that may not."""
    beside = [file for file in (f"{path}-wal", f"{path}-shm") if Path(file).exists()]
    return [file for file in beside if os.access(path, os.W_OK) and not os.access(file, os.W_OK)]


def _is_empty(path: str) -> bool:
    """Whether a file is there, and nothing in it or its log but one page, so no table of ours."""
    try:
        if Path(path).stat().st_size > LARGE_PAGE_BYTES:
            return False
        return Path(f"{path}-wal").stat().st_size <= LARGE_PAGE_BYTES
    except FileNotFoundError as error:
        return bool(error.filename != path)
    except OSError:
        return False
