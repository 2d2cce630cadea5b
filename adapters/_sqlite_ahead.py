# SPDX-License-Identifier: Apache-2.0
"""Asking the system for the payloads of pages before SQLite reads them.

SQLite reads 64 KiB at a time, and what the system then reads ahead by itself, up to megabytes for
each place, is mostly not what is wanted next. So it is told: where the row of a page lies is found
in the file, by its format (https://sqlite.org/fileformat2.html, 1.5 and 1.6), and asked for as a
whole.

These are hints and nothing else: what is read comes from SQLite, with its locks and its log. A file
that is being written, of which a part is looked at here in the middle of a change, costs a wrong
hint. The handle is one that SQLite has open; to close one of our own would release its locks.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pydedup.errors import PydedupError

__all__ = ["PagesAhead"]

#: Pages asked for before the first of them is read, by each thread that reads.
_WINDOW: Final = 16
#: A page is one of a stretch with so many others that lie among twice as many. One less will do
#: where there are no more: what several readers share is as little as four pages for each.
_NEIGHBOURS: Final = 4
#: Places that are remembered: 3 MiB.
_MOST_KNOWN: Final = 16384
#: Deeper no tree is that fits a file.
_MOST_LEVELS: Final = 20

_INTERIOR, _LEAF = 5, 13
#: What is read of a leaf, to know where its rows begin: a dozen, of pages as ours are.
_HEAD_BYTES: Final = 4096

#: Bytes of the file, from and behind: where a row lies, but for its beginning if it is a long one.
_Place = tuple[int, int]


class PagesAhead:
    """Asks for payloads of the table ``pages`` in the file at ``path``.

    ``root`` returns the number of the table's first page in the file.
    """

    def __init__(self, path: str, root: Callable[[], int]) -> None:
        self._path = path
        self._root = root
        self._known: dict[int, _Place] = {}
        self._size = 0
        self._handle = -1
        self._helps = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")

    def walk(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the ids, each after it and the next few were asked for.

        Where most pages of a stretch are wanted, the system reads ahead what is needed by itself.
        """
        apart = _apart(ids) if self._helps else []
        asked = 0
        for number, page_id in enumerate(ids):
            if self._helps and asked < len(apart) and apart[asked] <= number + _WINDOW // 2:
                some = apart[asked : asked + _WINDOW]
                self.ask([ids[each] for each in some])
                asked += len(some)
            yield page_id

    def ask(self, ids: Sequence[int]) -> None:
        """Ask for what is not in memory of these pages; a hint that fails is none."""
        try:
            handle, size = self._open_handle()
            if size != self._size:  # rows move when a file shrinks, which then may grow again
                self._known.clear()
            self._size = size
            places = self._places(handle, size, ids)
            for start, stop in places:
                # The end first: to look brings in what is looked for, and where what lies before it
                # is in memory, as behind another row, the system takes that for reading in a row.
                if not (_is_here(handle, stop - 1) and _is_here(handle, start)):
                    os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_WILLNEED)
        except (_NoHintError, PydedupError):
            pass
        except OSError as error:
            # Some file systems cannot say what is in memory; a handle may be closed meanwhile.
            if error.errno == errno.EOPNOTSUPP:
                self._helps = False

    def place(self, page_id: int) -> _Place | None:
        """Return where a page's row lies in the file, ``None`` where that cannot be told."""
        try:
            return next(iter(self._places(*self._open_handle(), [page_id])), None)
        except (_NoHintError, PydedupError):
            return None

    # ---- inside -------------------------------------------------------------------------------

    def _open_handle(self) -> tuple[int, int]:
        """Return a handle of the file that SQLite has open, and the file's size."""
        try:
            file = Path(self._path).stat()
            handle = self._handle
            if not _is_of(handle, file):
                handle = _handle_of(self._path, file)
                if handle < 0:
                    self._root()  # has it opened where it is not, as after a fork
                    handle = _handle_of(self._path, file)
                self._handle = handle
        except OSError as error:
            raise _NoHintError from error
        if handle < 0:
            raise _NoHintError
        return handle, file.st_size

    def _places(self, handle: int, size: int, ids: Sequence[int]) -> list[_Place]:
        known = self._known
        unknown = [page_id for page_id in ids if page_id not in known]
        if unknown:
            if len(known) + len(unknown) > _MOST_KNOWN:
                known.clear()
            tree = _Tree(handle, size)
            known.update(tree.find(self._root(), sorted(unknown)))
        # Another thread may have forgotten some meanwhile.
        places = [known.get(page_id) for page_id in ids]
        return [place for place in places if place is not None]


class _NoHintError(Exception):
    """Where something lies cannot be told."""


def _apart(ids: Sequence[int]) -> list[int]:
    """Return the numbers of those of which few others are wanted of the pages around them."""
    others = min(_NEIGHBOURS, max(len(ids) - 1, _NEIGHBOURS - 1))
    apart = bytearray(b"\1" * len(ids))
    for number, (first, last) in enumerate(zip(ids, ids[others:], strict=False)):
        if 0 < last - first <= 2 * others:
            apart[number : number + others + 1] = bytes(others + 1)
    return [number for number, is_apart in enumerate(apart) if is_apart]


def _handle_of(path: str, file: os.stat_result) -> int:
    """Return a handle of a file that this process has open, -1 for none.

    Others are told apart by their names: to ask what they are could hang, as on a network that is
    down.
    """
    name = os.path.realpath(path)
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(entry.readlink()) == name and _is_of(int(entry.name), file):
                return int(entry.name)
    return -1


def _is_of(handle: int, file: os.stat_result) -> bool:
    try:
        return handle >= 0 and os.path.samestat(os.fstat(handle), file)
    except OSError:
        return False


def _is_here(handle: int, at: int) -> bool:
    """Whether a byte of the file is in memory; if not, it comes, and a page with it."""
    try:
        return os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


class _Tree:
    """The b-tree of a table, as it is in the file at this moment."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle, self._size = handle, size
        header = os.pread(handle, 100, 0)
        if len(header) < 100:
            raise _NoHintError
        (page_bytes,) = struct.unpack_from(">H", header, 16)
        self._page_bytes = 65536 if page_bytes == 1 else page_bytes
        self._usable = self._page_bytes - header[20]
        if self._usable < 480:
            raise _NoHintError
        self._pages: dict[int, bytes] = {}

    def find(self, root: int, ids: Sequence[int]) -> dict[int, _Place]:
        """Return the places of those of the rows that are found."""
        leaves: dict[int, list[int]] = {}
        for row in ids:
            leaf = self._leaf_of(root, row)
            leaves.setdefault(leaf, []).append(row)
        for leaf in leaves:
            os.posix_fadvise(
                self._handle, self._offset(leaf), self._page_bytes, os.POSIX_FADV_WILLNEED
            )
        found = {}
        for leaf, rows in leaves.items():
            on_leaf = self._rows_on(leaf)
            found.update({row: on_leaf[row] for row in rows if row in on_leaf})
        return found

    def _offset(self, number: int) -> int:
        at = (number - 1) * self._page_bytes
        if not 0 <= at <= self._size - self._page_bytes:
            raise _NoHintError
        return at

    def _read(self, number: int) -> bytes:
        page = os.pread(self._handle, self._page_bytes, self._offset(number))
        if len(page) < self._page_bytes:
            raise _NoHintError
        return page

    def _leaf_of(self, root: int, row: int) -> int:
        """Return the number of the leaf that has the row, if any has."""
        number = root
        for _ in range(_MOST_LEVELS):
            if number not in self._pages:
                self._pages[number] = self._read(number)
            page = self._pages[number]
            if page[0] == _LEAF:
                return number
            if page[0] != _INTERIOR:
                break
            number = _child(page, row)
        raise _NoHintError

    def _rows_on(self, leaf: int) -> dict[int, _Place]:
        """Return the rows on a leaf, and where they go on, if not on this leaf.

        Little of it is read: most of it is what rows begin with.
        """
        begin = self._offset(leaf)
        head = os.pread(self._handle, _HEAD_BYTES, begin)
        if head[:1] != bytes([_LEAF]):
            raise _NoHintError
        most, least = self._usable - 35, (self._usable - 12) * 32 // 255 - 23
        found = {}
        for cell in _cells(head, 8):
            start_of_row = os.pread(self._handle, 18, begin + cell)
            length, at = _varint(start_of_row, 0)
            row, at = _varint(start_of_row, at)
            if length <= most:
                found[row] = begin, begin + self._page_bytes
                continue
            here = least + (length - least) % (self._usable - 4)
            here = here if here <= most else least
            first = os.pread(self._handle, 4, begin + cell + at + here)
            start = self._offset(int.from_bytes(first, "big"))
            pages = -(-(length - here) // (self._usable - 4))
            stop = start + pages * self._page_bytes
            if stop <= self._size:
                found[row] = start, stop
        return found


def _child(page: bytes, row: int) -> int:
    """Return the number of the child of an interior page that a row is below."""
    count = _count(page, 12)

    def cell(number: int) -> int:
        (at,) = struct.unpack_from(">H", page, 12 + 2 * number)
        return int(at)

    # Of thousands of cells a dozen are looked at.
    number = bisect.bisect_left(range(count), row, key=lambda n: _varint(page, cell(n) + 4)[0])
    return _number(page, cell(number) if number < count else 8)


def _cells(page: bytes, header_bytes: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{_count(page, header_bytes)}H", page, header_bytes)


def _count(page: bytes, header_bytes: int) -> int:
    """Return how many cells a page has, of which the header is followed by where they are."""
    if len(page) < header_bytes:
        raise _NoHintError
    count = int.from_bytes(page[3:5], "big")
    if header_bytes + 2 * count > len(page):
        raise _NoHintError
    return count


def _number(page: bytes, at: int) -> int:
    if at + 4 > len(page):
        raise _NoHintError
    return int.from_bytes(page[at : at + 4], "big")


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to 64 bits, and where it ends."""
    value = 0
    for end, byte in enumerate(page[at : at + 8], at + 1):
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, end
    if at + 9 > len(page):
        raise _NoHintError
    return value << 8 | page[at + 8], at + 9
