# SPDX-License-Identifier: Apache-2.0
"""Reading what lies in a file: out of the system's cache, through it, or past it.

A file that fits in memory is read through the cache, where the next reader finds it. Where it does
not fit, what is read pushes out what would have been used before, and the system reads ahead what
is gone before it is wanted. So once something that was read is gone when it is wanted again, most
of what is not in memory is read past the cache (``O_DIRECT``); the rest shows when there is room
again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from pydedup._pages import is_in_memory, scatter

__all__ = [
    "Fill",
    "SystemCache",
    "close_gone",
    "out_of_cache",
    "past_cache",
    "reads_past_cache",
    "through_cache",
]

#: Reads what follows each other in a file into pieces of memory; arguments: a handle of the file,
#: the pieces, where it begins. Raises OSError when it does not all come.
Fill: TypeAlias = Callable[[int, Sequence[memoryview], int], None]

#: What disks want requests to be a multiple of, generously.
_ALIGNMENT: Final = 4096
#: Memory of each thread that reads past the cache: a huge page.
_ROOM_BYTES: Final = 2 << 20
#: Read what is in memory, and nothing else.
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)
_DIRECT: Final = getattr(os, "O_DIRECT", 0)

#: Of what is not in memory, the share that is read through a cache that lost something.
_LEAST_SHARE: Final = 1 / 64
#: What that grows by with each that is still there: five times for eighty.
_GROWTH: Final = 1.02


class SystemCache:
    """Whether the system's cache keeps what is read until it is wanted again."""

    def __init__(self) -> None:
        self._share = 1.0  # of what is not in memory, to be read through it
        self._due = 0.0

    @property
    def is_roomy(self) -> bool:
        """Whether it keeps all, as far as is known."""
        return self._share == 1.0

    def kept(self) -> None:
        """Note that something was still there."""
        self._share = min(self._share * _GROWTH, 1.0)

    def lost(self) -> None:
        """Note that something was gone."""
        self._share = _LEAST_SHARE

    def fill(self) -> tuple[Fill, bool]:
        """Return how to read what is not in memory, and whether it is in the cache afterwards."""
        if self.is_roomy or not _DIRECT:
            return through_cache, True
        self._due += self._share
        if self._due < 1.0:
            return past_cache, False
        self._due -= 1.0
        return _at_once, True


def out_of_cache(handle: int, pieces: Sequence[memoryview], at: int) -> None:
    """Read what is in memory; else it fails, and the system begins to read it."""
    try:
        _read_all(handle, pieces, at, _NOWAIT)
    except OSError as error:
        # Not every file system can be asked for that; what is there, it says in another way.
        if error.errno != errno.EOPNOTSUPP or not is_in_memory(
            handle, at, at + sum(map(len, pieces))
        ):
            raise
        _read_all(handle, pieces, at, 0)


def through_cache(handle: int, pieces: Sequence[memoryview], at: int) -> None:
    """Read piece by piece, so that the system also reads what follows."""
    for number in range(0, len(pieces), 2):
        some = pieces[number : number + 2]
        _read_all(handle, some, at, 0)
        at += sum(map(len, some))


def past_cache(handle: int, pieces: Sequence[memoryview], at: int) -> None:
    """Read from the disk, leaving what is in memory as it is."""
    direct = _past_handle(handle)
    if direct < 0:
        through_cache(handle, pieces, at)
        return
    room = memoryview(_own_room())
    for some in _within(pieces, len(room) - 2 * _ALIGNMENT):
        before = at % _ALIGNMENT
        nbytes = before + sum(map(len, some))
        wanted = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if os.preadv(direct, [room[:wanted]], at - before) < nbytes:
            raise BlockingIOError
        scatter(room[before:nbytes], some)
        at += nbytes - before


def _at_once(handle: int, pieces: Sequence[memoryview], at: int) -> None:
    """Read in one request: of a large one the system reads what it asks for and no more."""
    _read_all(handle, pieces, at, 0)


def _read_all(handle: int, pieces: Sequence[memoryview], at: int, flags: int) -> None:
    # Of more pieces than a system takes in one request it is an OSError, too.
    if os.preadv(handle, pieces, at, flags) != sum(map(len, pieces)):
        raise BlockingIOError


def _within(pieces: Sequence[memoryview], limit: int) -> Iterator[list[memoryview]]:
    """Yield the pieces in groups of at most so many bytes, each more than one of them has."""
    some: list[memoryview] = []
    nbytes = 0
    for piece in pieces:
        if nbytes + len(piece) > limit:
            yield some
            some, nbytes = [], 0
        some.append(piece)
        nbytes += len(piece)
    yield some


# ---- handles ------------------------------------------------------------------------------------
# To close any handle of a file releases all locks that this process has on it, SQLite's too. So
# these stay open until nobody can open the file any more: one for each file that was too large for
# memory.

_handles: dict[tuple[int, int], int] = {}  # by device and number of the file; -1: it takes none
_lock = threading.Lock()
_own = threading.local()


def reads_past_cache(handle: int) -> bool:
    """Whether a handle is one that reads past the cache, which takes no other reads."""
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & _DIRECT)


def close_gone() -> None:
    """Close those of files that are deleted, whose room on the disk they hold."""
    with _lock:
        for key, handle in list(_handles.items()):
            # Others are not asked themselves, which could hang, as on a network that is down.
            if handle >= 0 and _looks_deleted(handle) and os.fstat(handle).st_nlink == 0:
                del _handles[key]
                os.close(handle)


def _looks_deleted(handle: int) -> bool:
    try:
        name = str(Path(f"/proc/self/fd/{handle}").readlink())
    except OSError:  # somebody else closed it
        return False
    return name.endswith(" (deleted)") and reads_past_cache(handle)


def _past_handle(handle: int) -> int:
    file = os.fstat(handle)
    key = (file.st_dev, file.st_ino)
    known = _known_handle(key)
    if known is not None:
        return known
    close_gone()
    with _lock:
        known = _known_handle(key)
        if known is None:
            known = _handles[key] = _open_past(handle)
        return known


def _known_handle(key: tuple[int, int]) -> int | None:
    """Return the handle of a file, if there is one that nobody else closed."""
    known = _handles.get(key)
    if known is None or known < 0:
        return known
    try:
        file = os.fstat(known)
    except OSError:
        return None
    return known if (file.st_dev, file.st_ino) == key else None


def _open_past(handle: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | _DIRECT)
    except OSError:  # not on every file system
        return -1


def _begin_in_child() -> None:
    global _lock  # another thread of the parent may have held it
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_in_child)


def _own_room() -> mmap.mmap:
    room: mmap.mmap | None = getattr(_own, "room", None)
    if room is None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        room = _own.room = mmap.mmap(-1, _ROOM_BYTES, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            room.madvise(mmap.MADV_HUGEPAGE)  # in one piece, for the disk
    return room
