# SPDX-License-Identifier: Apache-2.0
"""Bringing missing pages into a native pool: each once, whoever asks, outside of any lock."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from pydedup import _core
from pydedup._core import Page
from pydedup.codec import check_recorded, page_checksum
from pydedup.errors import CorruptStoreError, PageNotFoundError, SchemaVersionError
from pydedup.sets import in_parts

__all__ = ["Copies", "Damaged", "Fetch", "Fetched", "Gone", "PageLoader", "ReadInto"]

#: Reads pages: given ids, gives (id, checksum, payload) for those that exist, in any order. The
#: checksum is the one that is recorded of the page, None where none is.
Fetched: TypeAlias = tuple[int, bytes | None, bytes]
Fetch: TypeAlias = Callable[[Sequence[int]], Iterable[Fetched]]

#: Reads pages into memory of the pool, as `pydedup.adapter_options.ReadIntoAdapter` says.
ReadInto: TypeAlias = Callable[
    [Sequence[int], Callable[[int], memoryview]], Iterable[tuple[int, bytes, memoryview]]
]

#: Gives what each place that keeps a page has of it.
Copies: TypeAlias = Callable[[int], Iterable[bytes]]

#: Makes of a page's damage the error that says who reads it, and what to do.
Damaged: TypeAlias = Callable[[int, CorruptStoreError], CorruptStoreError]

#: Makes of the ids of pages that are not there the error that says so.
Gone: TypeAlias = Callable[[Sequence[int]], PageNotFoundError]

# Pages that one of several readers reads at least.
_PIECE_PAGES = 4
# Bytes of a page before one was seen: the default capacity.
_USUAL_PAGE_BYTES = 1024 * 1024


class PageLoader:
    """Loads pages into a native pool. Safe between threads.

    Parameters
    ----------
    core
        The native pool.
    fetch
        Reads pages; called by several threads at once.
    damaged
        Makes the error of a damaged page.
    gone
        Makes the error of pages that are not there.
    readers
        How many threads may fetch side by side for one call of `load`.
    copies
        Where other copies of a page are to be had when the one that was read is damaged.
    read_into
        Reads pages without a copy; called as ``fetch`` is, which is asked for the rest.
    is_expected
        Whether a page may have a checksum; see `PagePool.expect`.
    """

    def __init__(
        self,
        core: _core.BufferPool,
        fetch: Fetch,
        damaged: Damaged,
        gone: Gone,
        readers: int,
        copies: Copies | None,
        read_into: ReadInto | None,
        is_expected: Callable[[int, bytes], bool],
    ) -> None:
        self.largest = _USUAL_PAGE_BYTES  # bytes of the largest page seen, or that of a usual one
        self.waits, self.waited = 0, 0.0  # how often walks had to wait for pages, and seconds
        self._core = core
        self._fetch = fetch
        self._damaged = damaged
        self._gone = gone
        self._copies = copies
        self._read_into = read_into
        self._is_expected = is_expected
        self._readers = readers
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Lock] = {}  # held by who loads it
        self._threads: ThreadPoolExecutor | None = None

    def load(
        self, ids: list[int], *, ahead: bool = False, side_by_side: bool = False
    ) -> dict[int, Page]:
        """Return pages, pinned, leaving to other threads what they are fetching already.

        Parameters
        ----------
        ids
            Pages that the pool was found not to hold, each once.
        ahead
            Whether they are read before their use.
        side_by_side
            Whether several readers may share the work: not within a transaction, of which other
            threads know nothing.

        Raises
        ------
        PageNotFoundError
            When pages do not exist; the message lists them.
        BudgetError, CorruptStoreError
            When they do not fit, or the bytes of a page are damaged.
        """
        began = time.perf_counter()
        pages: dict[int, Page] = {}
        while ids:
            # Locks and no events, whose code is Python's: an interrupt in it would leave them
            # unset. Within the try from the first entry on, for the same reason.
            done = threading.Lock()
            done.acquire()
            try:
                with self._lock:
                    loading = ((n, self._loading.get(n)) for n in ids)
                    waits = {n: one for n, one in loading if one is not None and one.locked()}
                    mine = [number for number in ids if number not in waits]
                    self._loading.update(dict.fromkeys(mine, done))
                if mine:
                    pages.update(self._load_mine(mine, ahead, side_by_side))
            finally:
                done.release()  # what is left in the table after an interrupt is then nothing
                with self._lock:
                    for number in ids:
                        if self._loading.get(number) is done:
                            del self._loading[number]
            for loaded in waits.values():
                with loaded:
                    pass
            # Not there after all when its fetch failed, or it was evicted again: then it is ours.
            others = list(waits)
            found = self._core.pin(np.array(others, np.int64), ahead)
            pages.update(
                (n, page) for n, page in zip(others, found, strict=True) if page is not None
            )
            ids = [number for number in others if number not in pages]
        if not ahead:
            self.count_wait(time.perf_counter() - began)
        return pages

    def count_wait(self, seconds: float) -> None:
        """Count that a walk had to wait for pages."""
        with self._lock:
            self.waits += 1
            self.waited += seconds

    def _load_mine(self, ids: list[int], ahead: bool, side_by_side: bool) -> dict[int, Page]:
        pieces = min(self._readers, len(ids) // _PIECE_PAGES) if side_by_side else 1
        pages: dict[int, Page] = {}
        if pieces <= 1:
            self._load_piece(ids, ahead, pages)
        else:
            parts = list(in_parts(ids, -(-len(ids) // pieces)))
            futures = self._submit(lambda part: self._load_piece(part, ahead, pages), parts)
            errors = [future.exception() for future in futures]  # after all have ended
            for error in errors:
                if error is not None:
                    raise error
        missing = [number for number in ids if number not in pages]
        if missing:
            raise self._gone(missing)
        return pages

    def _load_piece(self, ids: Sequence[int], ahead: bool, pages: dict[int, Page]) -> None:
        if self._read_into is not None:
            # What is wrong with a page is said of what `fetch` gives.
            with contextlib.suppress(CorruptStoreError):
                for number, checksum, view in self._read_into(ids, _memory):
                    self.largest = max(self.largest, len(view))
                    if not self._is_expected(number, checksum):
                        continue
                    with contextlib.suppress(CorruptStoreError, SchemaVersionError):
                        pages[number] = self._core.adopt(number, _behind(view), checksum, ahead)
            ids = [number for number in ids if number not in pages]
        for number, recorded, payload in self._fetched(ids) if ids else ():
            self.largest = max(self.largest, len(payload))
            try:
                pages[number] = self._insert(number, recorded, payload, ahead)
            except CorruptStoreError as exc:
                page = self._from_copy(number, recorded, ahead)
                if page is None:
                    raise self._damaged(number, exc) from exc
                pages[number] = page

    def _insert(self, number: int, recorded: bytes | None, payload: bytes, ahead: bool) -> Page:
        if recorded is not None:
            check_recorded(payload, recorded)
        if not self._is_expected(number, page_checksum(payload)):
            raise CorruptStoreError("its row is that of another page")
        return self._core.insert(number, payload, ahead)

    def _from_copy(self, number: int, recorded: bytes | None, ahead: bool) -> Page | None:
        """Return a page from the first copy that is whole."""
        for payload in self._copies(number) if self._copies is not None else ():
            with contextlib.suppress(CorruptStoreError):
                return self._insert(number, recorded, payload, ahead)
        return None

    def _fetched(self, ids: Sequence[int]) -> Iterator[Fetched]:
        """Yield pages; where the database itself says that one is damaged, find out which."""
        try:
            yield from self._fetch(ids)
        except CorruptStoreError as exc:
            if len(ids) == 1:
                raise self._damaged(ids[0], exc) from exc
            for number in ids:
                yield from self._fetched([number])

    def _submit(
        self, work: Callable[[list[int]], None], parts: Sequence[list[int]]
    ) -> list[Future[None]]:
        """Hand parts of the work to the readers, who begin with the first."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._readers, "pydedup-reader")
            try:
                return [self._threads.submit(work, part) for part in parts]
            except BaseException:
                # A thread that an interrupt came upon as it began is none that Python ends when it
                # exits, while it waits for it.
                self._threads.shutdown(wait=False)
                self._threads = None
                raise


def _memory(nbytes: int) -> memoryview:
    return memoryview(_core.PageMemory(nbytes))


def _behind(view: memoryview) -> _core.PageMemory:
    """Return what `_memory` made a view of."""
    memory = view.obj
    assert isinstance(memory, _core.PageMemory)
    return memory
