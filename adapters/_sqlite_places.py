# SPDX-License-Identifier: Apache-2.0
"""Payloads of pages where they lie in the file: found, and read without a copy.

SQLite reads a payload 16 or 64 KiB at a time, and then it is copied twice: into `bytes`, and to
where the pool keeps it. Here it goes there at once. Which pages there are, and their checksums,
SQLite says; what was read is held against those, so where a row lies is a guess that may be wrong.
A payload that is in pieces, or still in the log, is left to SQLite.

A page never changes, and its id is never given again: so its checksum is asked for once.

The handle is one that SQLite has open; to close one of our own would release its locks.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from pydedup._pages import begin_writeback, is_in_memory
from pydedup.errors import PydedupError

from ._sqlite_reads import Fill, SystemCache, close_gone, out_of_cache, reads_past_cache
from ._sqlite_tree import NotFoundInFileError, Place, Tree

__all__ = ["PagePlaces", "StoredPage", "pages_apart"]

#: Pages that are remembered: 8 MiB.
_MOST_KNOWN: Final = 16384
#: Pages looked for before the first of them is read, by each thread that reads.
_AT_ONCE: Final = 16
#: A page is one of a stretch with so many others that lie among twice as many. One less will do
#: where there are no more: what several readers share is as little as four pages for each.
_NEIGHBOURS: Final = 4
#: A page of the file begins with the number of the one after it.
_LINK_BYTES: Final = 4

#: Gives so many bytes for a payload.
Memory: TypeAlias = Callable[[int], memoryview]


class StoredPage(NamedTuple):
    """A page of the store in the file, of which a page has ``page_bytes``; 0 for one in pieces.

    ``checksum`` is empty until SQLite was asked for it; ``cached`` is whether the system's
    cache had it after it was last read.
    """

    id: int
    place: Place
    page_bytes: int
    checksum: bytes = b""
    cached: bool = True

    def is_in_memory(self, handle: int) -> bool:
        """Whether the system has it in memory, as far as its ends tell."""
        start, stop, _, here, nbytes = self.place
        links = (stop - start) // self.page_bytes * _LINK_BYTES if self.page_bytes else 0
        used = start + links + nbytes - max(here, 0)  # behind that the last page may be empty
        return is_in_memory(handle, start, min(max(used, start + 1), stop))

    def read(self, handle: int, memory: Memory, fill: Fill) -> memoryview | None:
        """Return the payload, ``None`` when it is not in one piece; raises OSError as ``fill``."""
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
            fill(handle, [*pieces, last, *beginning], start)
        else:
            fill(handle, pieces, start)
            fill(handle, beginning, value)
        first = start // self.page_bytes + 1
        whole = struct.unpack(f">{pages + 1}I", links) == (*range(first, first + pages), 0)
        return payload if whole else None


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
        self._cache = SystemCache()
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

        Of a few at a time first those that are in memory. To find a page takes a while, so what
        was not met before is left to SQLite once.
        """
        apart = {ids[number] for number in pages_apart(ids)}
        known = self._known
        met = [page_id for page_id in ids if page_id in known]
        if len(known) + len(ids) - len(met) > _MOST_KNOWN:
            known.clear()
        known.update((page_id, None) for page_id in ids[:_MOST_KNOWN] if page_id not in known)
        for some in _few_at_a_time(met, apart):
            try:
                handle, pages = self.find(some)
                pages = self._that_are(pages)
            except (NotFoundInFileError, PydedupError, OSError):
                return
            absent = []
            for page in pages:
                try:
                    yield from self._read_here(handle, page, memory)
                except OSError:
                    absent.append(page)
            for page in absent:
                with contextlib.suppress(OSError):
                    yield from self._read_absent(handle, page, memory)

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

    def _read_here(
        self, handle: int, page: StoredPage, memory: Memory
    ) -> Iterator[tuple[StoredPage, memoryview]]:
        """Yield a page that is in memory; else raise OSError."""
        if page.page_bytes and not self._cache.is_roomy and not page.is_in_memory(handle):
            raise BlockingIOError
        whole = yield from self._read(handle, page, memory, out_of_cache)
        if page.cached:
            self._cache.kept()
        elif whole:
            self._known[page.id] = page._replace(cached=True)

    def _read_absent(
        self, handle: int, page: StoredPage, memory: Memory
    ) -> Iterator[tuple[StoredPage, memoryview]]:
        if page.cached:
            self._cache.lost()
        fill, cached = self._cache.fill()
        if cached != page.cached:
            page = page._replace(cached=cached)
            self._known[page.id] = page
        yield from self._read(handle, page, memory, fill)

    def _read(
        self, handle: int, page: StoredPage, memory: Memory, fill: Fill
    ) -> Generator[tuple[StoredPage, memoryview], None, bool]:
        """Yield a page if it is in one piece; return whether it is."""
        payload = page.read(handle, memory, fill)
        if payload is None:
            self._known[page.id] = page._replace(page_bytes=0)
            return False
        yield page, payload
        return True

    def _open_handle(self) -> tuple[int, int]:
        """Return a handle of the file that SQLite has open, and the file's size."""
        try:
            file = os.stat(self._path)  # noqa: PTH116 (a third of the time, and asked for each page)
            handle = self._handle
            if not _is_of(handle, file):
                close_gone()
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
            handle = int(entry.name)
            is_named_so = str(entry.readlink()) == name
            if is_named_so and not reads_past_cache(handle) and _is_of(handle, file):
                return handle
    return -1


def _is_of(handle: int, file: os.stat_result) -> bool:
    """Whether a handle is of that file; none is -1, or one that was closed."""
    try:
        return os.path.samestat(os.fstat(handle), file)
    except OSError:
        return False
