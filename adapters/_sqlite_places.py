# SPDX-License-Identifier: Apache-2.0
"""Payloads of pages where they lie in the file: found, and read without a copy.

SQLite reads a payload 64 KiB at a time, and then it is copied twice: into `bytes`, and to where the
pool keeps it. Here it goes there at once. Which pages there are, and their checksums, SQLite says;
what was read is held against those, so where a row lies is a guess that may be wrong. A payload
that is in pieces, or still in the log, is left to SQLite.

A page never changes, and its id is never given again: so its checksum is asked for once.

The handle is one that SQLite has open; to close one of our own would release its locks.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from pydedup._pages import begin_writeback
from pydedup.errors import PydedupError

from ._sqlite_tree import NotFoundInFileError, Place, Tree

__all__ = ["PagePlaces", "StoredPage", "pages_apart"]

#: Pages that are remembered: 8 MiB.
_MOST_KNOWN: Final = 16384
#: Pages looked for before the first of them is read, by each thread that reads.
_AT_ONCE: Final = 16
#: A page is one of a stretch with so many others that lie among twice as many. One less will do
#: where there are no more: what several readers share is as little as four pages for each.
_NEIGHBOURS: Final = 4
#: Pieces that every system takes in one request.
_MOST_PIECES: Final = 1024
#: A page of the file begins with the number of the one after it.
_LINK_BYTES: Final = 4
#: Read what is in memory, and nothing else.
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)

#: Gives so many bytes for a payload.
Memory: TypeAlias = Callable[[int], memoryview]


class StoredPage(NamedTuple):
    """A page of the store in the file, of which a page has ``page_bytes``; 0 for one in pieces.

    ``checksum`` is empty until SQLite was asked for it.
    """

    id: int
    place: Place
    page_bytes: int
    checksum: bytes = b""

    def read(self, handle: int, memory: Memory, *, waits: bool) -> memoryview | None:
        """Return the payload, ``None`` when it is not in one piece.

        Raises OSError, as for what is not in memory unless it ``waits``.
        """
        start, stop, value, here, nbytes = self.place
        if self.page_bytes == 0:
            return None
        pages, room = (stop - start) // self.page_bytes, self.page_bytes - _LINK_BYTES
        if here < 0 or not (pages - 1) * room < nbytes - here <= pages * room:
            return None
        payload, links = memory(nbytes), memoryview(bytearray((pages + 1) * _LINK_BYTES))
        pieces = []
        for number in range(pages):
            pieces.append(links[(number + 1) * _LINK_BYTES : (number + 2) * _LINK_BYTES])
            pieces.append(payload[here + number * room : here + (number + 1) * room])
        beginning = [payload[:here], links[:_LINK_BYTES]]
        if 0 <= value - stop < self.page_bytes:  # SQLite writes where a row begins last
            last = memoryview(bytearray(stop - start - sum(map(len, pieces)) + value - stop))
            _fill(handle, [*pieces, last, *beginning], start, waits=waits)
        else:
            _fill(handle, pieces, start, waits=waits)
            _fill(handle, beginning, value, waits=waits)
        first = start // self.page_bytes + 1
        whole = struct.unpack(f">{pages + 1}I", links) == (*range(first, first + pages), 0)
        return payload if whole else None


def _fill(handle: int, pieces: Sequence[memoryview], at: int, *, waits: bool) -> None:
    """Read what follows each other in the file; raises OSError when it does not come.

    In one request only what is in memory: of a large one the system reads from the disk what it
    asks for and no more, of small ones also what is to follow (a model of twice the memory limit:
    520 ms instead of 700).
    """
    if not waits:
        _read_all(handle, pieces, at, _NOWAIT)
        return
    with contextlib.suppress(OSError):
        _read_all(handle, pieces[:2], at, _NOWAIT)
        _read_all(handle, pieces, at, _NOWAIT)
        return
    for number in range(0, len(pieces), 2):
        some = pieces[number : number + 2]
        _read_all(handle, some, at, 0)
        at += sum(map(len, some))


def _read_all(handle: int, pieces: Sequence[memoryview], at: int, flags: int) -> None:
    if len(pieces) > _MOST_PIECES or os.preadv(handle, pieces, at, flags) != sum(map(len, pieces)):
        raise BlockingIOError


class PagePlaces:
    """Where the rows of the table ``pages`` lie in the file at ``path``. Safe between threads.

    ``root`` returns the number of the table's first page in the file, ``checksums`` those of the
    pages that there are.
    """

    def __init__(
        self,
        path: str,
        root: Callable[[], int],
        checksums: Callable[[Sequence[int]], Iterable[tuple[int, bytes]]],
    ) -> None:
        self._path = path
        self._root = root
        self._checksums = checksums
        self._known: dict[int, StoredPage | None] = {}  # None: met once, not looked for
        self._tree: Tree | None = None
        self._size = 0
        self._handle = -1

    def find(self, ids: Sequence[int]) -> tuple[int, list[StoredPage]]:
        """Return a handle of the file, and those of the pages that are found.

        Raises NotFoundInFileError, and OSError and PydedupError where the file cannot be read.
        """
        handle, size = self._open_handle()
        known = self._known
        if size != self._size:  # rows move when a file shrinks, which then may grow again
            known.clear()
            self._tree = None
        self._size = size
        unknown = [page_id for page_id in ids if known.get(page_id) is None]
        if unknown:
            if len(known) + sum(page_id not in known for page_id in unknown) > _MOST_KNOWN:
                known.clear()
            tree = self._tree
            if tree is None or tree.file != (handle, size):
                self._tree = tree = Tree(handle, size)
            places = tree.find(self._root(), sorted(unknown))
            if len(places) < len(unknown):
                self._tree = None  # the file may have changed within its size
            page_bytes = tree.page_bytes if tree.usable == tree.page_bytes else 0
            known.update((n, StoredPage(n, place, page_bytes)) for n, place in places.items())
        # Another thread may have forgotten some meanwhile.
        pages = [known.get(page_id) for page_id in ids]
        return handle, [page for page in pages if page is not None]

    def read(self, ids: Sequence[int], memory: Memory) -> Iterator[tuple[StoredPage, memoryview]]:
        """Yield pages and payloads, as far as they are found in one piece.

        Of a few at a time first those that are in memory: to look for others has the system read
        them. But for stretches, where it reads ahead by itself, which is faster. To find a page
        takes a while, so what was not met before is left to SQLite once.
        """
        apart = {ids[number] for number in pages_apart(ids)}
        known = self._known
        met = [page_id for page_id in ids if page_id in known]
        if len(known) + len(ids) - len(met) > _MOST_KNOWN:
            known.clear()
        known.update((page_id, None) for page_id in ids[:_MOST_KNOWN] if page_id not in known)
        for some in _few_at_a_time(met, apart):
            waits = some[0] not in apart
            try:
                handle, pages = self.find(some)
                pages = self._that_are(pages)
            except (NotFoundInFileError, PydedupError, OSError):
                return
            absent = []
            for page in pages:
                try:
                    yield from self._read(handle, page, memory, waits=waits)
                except OSError:
                    absent.append(page)
            for page in absent:
                with contextlib.suppress(OSError):
                    yield from self._read(handle, page, memory, waits=True)

    def look_again(self, page_id: int) -> None:
        """Take note that SQLite is asked for a page: where it was found, something else may be."""
        page = self._known.get(page_id)
        if page is not None and page.page_bytes != 0:
            self._known[page_id] = None

    def begin_writeback(self) -> None:
        """Let the system begin to write what was changed, for which a sync has to wait else."""
        with contextlib.suppress(NotFoundInFileError):
            begin_writeback(self._open_handle()[0])

    # ---- inside -------------------------------------------------------------------------------

    def _that_are(self, pages: Sequence[StoredPage]) -> list[StoredPage]:
        """Return those of the pages that SQLite knows, with their checksums."""
        unsure = [page.id for page in pages if not page.checksum]
        checksums = dict(self._checksums(unsure)) if unsure else {}
        sure = []
        for page in pages:
            if not page.checksum:
                page = page._replace(checksum=checksums.get(page.id, b""))
                self._known[page.id] = page if page.checksum else None
            if page.checksum:
                sure.append(page)
        return sure

    def _read(
        self, handle: int, page: StoredPage, memory: Memory, *, waits: bool
    ) -> Iterator[tuple[StoredPage, memoryview]]:
        payload = page.read(handle, memory, waits=waits)
        if payload is not None:
            yield page, payload
        else:
            self._known[page.id] = page._replace(page_bytes=0)

    def _open_handle(self) -> tuple[int, int]:
        """Return a handle of the file that SQLite has open, and the file's size."""
        try:
            file = os.stat(self._path)  # noqa: PTH116 (a third of the time, and asked for each page)
            handle = self._handle
            if not _is_of(handle, file):
                handle = _handle_of(self._path, file)
                if handle < 0:
                    self._root()  # has it opened where it is not, as after a fork
                    handle = _handle_of(self._path, file)
                self._handle = handle
        except OSError as error:
            raise NotFoundInFileError from error
        if handle < 0:
            raise NotFoundInFileError
        return handle, file.st_size


def pages_apart(ids: Sequence[int]) -> list[int]:
    """Return the numbers of those of which few others are wanted of the pages around them."""
    others = min(_NEIGHBOURS, max(len(ids) - 1, _NEIGHBOURS - 1))
    apart = bytearray(b"\1" * len(ids))
    for number, (first, last) in enumerate(zip(ids, ids[others:], strict=False)):
        if 0 < last - first <= 2 * others:
            apart[number : number + others + 1] = bytes(others + 1)
    return [number for number, is_apart in enumerate(apart) if is_apart]


def _few_at_a_time(ids: Sequence[int], apart: AbstractSet[int]) -> Iterator[list[int]]:
    """Yield those that lie apart together, up to a window, others by themselves."""
    some: list[int] = []
    for page_id in ids:
        if some and (page_id not in apart or len(some) == _AT_ONCE):
            yield some
            some = []
        some.append(page_id)
        if page_id not in apart:
            yield some
            some = []
    if some:
        yield some


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
