# SPDX-License-Identifier: Apache-2.0
"""Pages in memory, under one hard budget per store.

Here: fetching what is missing (once, in one batch, outside of any lock), pinning, and walking over
many blocks in windows that a small budget can hold. The pool itself is native; which unpinned page
is evicted, :mod:`pydedup.replacement` says. Deliberately not here: what is done with the blocks of
a page.

A `Page` is pinned for as long as anything refers to it. Pages are counted with their payload bytes;
the tables around them (about 200 bytes per page) and a payload on its way in are not.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup._core import Page, Reservation
from pydedup.codec import StoredBases
from pydedup.errors import ArgumentError, BudgetError, CorruptStoreError, PageNotFoundError
from pydedup.replacement import DEFAULT_POLICY, Trace, check_policy
from pydedup.windows import (
    Cut,
    Window,
    by_page,
    by_pages,
    has_pair,
    in_order,
    in_order_with_bases,
    within,
)

__all__ = ["Fetch", "Page", "PagePool", "Reservation", "Window"]

#: Reads pages: given ids, gives (id, payload) for those that exist, in any order.
Fetch: TypeAlias = Callable[[Sequence[int]], Iterable[tuple[int, bytes]]]

#: Says of a damaged page who reads it and what to do.
Explain: TypeAlias = Callable[[int], str]

#: Pages and slots of the bases of blocks, page -1 for none.
Bases: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint32]]

# Part of the budget that one walk pins at a time: four threads can walk at once before one waits.
_WINDOW_PARTS = 4
# Bytes of a page before one was seen: the default capacity.
_USUAL_PAGE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the arrays of a walk in order are cut, as long as they live."""

    page_ids: weakref.ref[NDArray[np.int64]]
    base_page_ids: NDArray[np.int64] | None
    limit: int
    windows: list[Window]


class PagePool:
    """The pages of one store. Safe between threads; empty in a forked child.

    Parameters
    ----------
    fetch
        Reads pages; called without any lock held, by several threads at once.
    memory_bytes
        Bytes of pages to hold at most.
    explain
        Called with the id of a damaged page; what it returns follows on what the error says.
    policy
        Which page goes when room is needed: a name of `pydedup.replacement.POLICIES`.

    Raises
    ------
    ArgumentError
        When the budget is not positive, or for an unknown policy.
    """

    def __init__(
        self,
        fetch: Fetch,
        memory_bytes: int,
        explain: Explain | None = None,
        *,
        policy: str = DEFAULT_POLICY,
    ) -> None:
        if memory_bytes <= 0:
            raise ArgumentError(f"memory_bytes is {memory_bytes}; a pool needs a positive budget")
        self._fetch = fetch
        self._budget = memory_bytes
        self._policy = check_policy(policy)
        self._explain = explain
        self._largest = _USUAL_PAGE_BYTES
        self._plans: dict[int, _Plan] = {}  # by the id of the array of pages
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        """Begin with nothing in memory and nobody at work: at first, and in a forked child."""
        self._core = _core.BufferPool(self._budget, self._policy)
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Event] = {}
        self._gate = _Gate(self._budget)

    @property
    def memory_bytes(self) -> int:
        """The budget."""
        return self._budget

    @property
    def native(self) -> _core.BufferPool:
        """The pool itself, for kernels that pin pages on their own."""
        return self._core

    @property
    def window_pages(self) -> int:
        """How many pages a walk pins at once."""
        return max(1, self._budget // (_WINDOW_PARTS * self._largest))

    def pages(self, ids: Sequence[int] | NDArray[np.int64]) -> list[Page]:
        """Return these pages, pinned, in order.

        Parameters
        ----------
        ids
            Page ids, shape (n,); repeats are allowed.

        Raises
        ------
        PageNotFoundError
            When pages do not exist; the message lists them.
        BudgetError
            When the pages, with what is pinned otherwise, exceed the budget.
        CorruptStoreError
            When the bytes of a page are damaged.
        """
        wanted = np.ascontiguousarray(ids, np.int64)
        pages = self._core.pin(wanted)
        missing = {int(wanted[i]) for i, page in enumerate(pages) if page is None}
        if missing:
            loaded = self._load_missing(sorted(missing))
            pages = [
                loaded[number] if page is None else page
                for number, page in zip(wanted.tolist(), pages, strict=True)
            ]
        return pages  # type: ignore[return-value]  # no None is left

    def windows(
        self, page_ids: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], list[Page], NDArray[np.uint32]]]:
        """Walk over blocks in any order, reading each page once.

        Parameters
        ----------
        page_ids
            The page of each block, int64 (n,).

        Yields
        ------
        rows
            Which of the blocks, int64; over all windows each block once.
        pages
            Pages that hold them, pinned until the walk goes on: the list is emptied then.
        page_index
            uint32: block ``rows[i]`` is on ``pages[page_index[i]]``.

        Raises
        ------
        PageNotFoundError, BudgetError, CorruptStoreError
            As `pages` does; BudgetError only when a single page does not fit.
        """
        for rows, pages, page_index, _ in self.windows_with_bases(page_ids, None):
            yield rows, pages, page_index

    def windows_with_bases(
        self, page_ids: NDArray[np.int64], bases: Bases | None
    ) -> Iterator[tuple[NDArray[np.int64], list[Page], NDArray[np.uint32], StoredBases | None]]:
        """Walk over blocks in any order, the page of each pinned together with its base's.

        As `windows`, which it is without ``bases``. A page may then be in several windows, since
        what lies on it may need bases on more pages than fit.

        Parameters
        ----------
        bases
            Page and slot of each block's base, page -1 where it is no delta: `BlockMap.bases`.

        Yields
        ------
        rows, pages, page_index
            As `windows` does; ``pages`` holds those of bases too.
        bases
            Where the bases of blocks ``rows`` are among ``pages``; None without ``bases``.

        Raises
        ------
        PageNotFoundError, BudgetError, CorruptStoreError
            As `pages` does; BudgetError only when the two pages of one block do not fit.
        """
        base_page_ids = None if bases is None else bases[0]
        cut = by_page if bases is None else by_pages
        for window, pages in self._walk(page_ids, base_page_ids, cut, None):
            assert isinstance(window.rows, np.ndarray)
            yield window.rows, pages, window.page_index, _bases_in(window, pages, bases)

    def stream(
        self, page_ids: NDArray[np.int64]
    ) -> Iterator[tuple[slice, list[Page], NDArray[np.uint32]]]:
        """Walk over blocks in their order; a page may be needed by several windows.

        As `windows`, but ``rows`` is a slice, each beginning where the one before ended. How an
        array is cut is remembered for as long as the array lives, so it must not change.
        """
        for rows, pages, page_index, _ in self.stream_with_bases(page_ids, None):
            yield rows, pages, page_index

    def stream_with_bases(
        self,
        page_ids: NDArray[np.int64],
        bases: Bases | None,
        at_once: Callable[[Window], bool] | None = None,
    ) -> Iterator[tuple[slice, list[Page], NDArray[np.uint32], StoredBases | None]]:
        """Walk over blocks in their order, the page of each pinned together with its base's.

        `stream` with what `windows_with_bases` adds to `windows`. A window for which ``at_once``
        returns true is not yielded: it was used out of the pool.
        """
        base_page_ids = None if bases is None else bases[0]
        cut = in_order if bases is None else in_order_with_bases
        plan = self._plan(page_ids, base_page_ids, cut)
        for window, pages in self._walk(page_ids, base_page_ids, cut, plan, at_once):
            assert isinstance(window.rows, slice)
            yield window.rows, pages, window.page_index, _bases_in(window, pages, bases)

    def warm(self, ids: Sequence[int] | NDArray[np.int64]) -> int:
        """Bring pages in, in order, as many as the budget holds; return how many are here."""
        wanted = np.unique(np.ascontiguousarray(ids, np.int64))
        at, total = 0, 0
        while at < len(wanted):
            count = min(self.window_pages, (self._budget - total) // self._largest)
            if count < 1:
                break
            with self._gate.hold(count * self._largest):
                total += sum(page.nbytes for page in self.pages(wanted[at : at + count]))
            at += count
        return self._core.count_resident(wanted)

    def damaged(self, page_id: int, error: CorruptStoreError) -> CorruptStoreError:
        """Return the error that says of a damaged page who reads it, and what to do."""
        advice = "; run verify on the store" if self._explain is None else self._explain(page_id)
        return CorruptStoreError(f"page {page_id}: {error}{advice}")

    def owns(self, owner: int, page_ids: NDArray[np.int64]) -> None:
        """Tell the policy that a model reads these pages."""
        self._core.owns(owner, page_ids)

    def call(self, owner: int) -> None:
        """Tell the policy that a prediction of a model begins."""
        self._core.call(owner)

    def reserve(self, nbytes: int) -> Reservation:
        """Take bytes off the budget, for something else than pages that lives long.

        They come back with ``release()``, or when the result is gone. Evicts what it must; raises
        BudgetError when that much is not to be had.
        """
        return self._core.reserve(nbytes)

    def record(self, max_uses: int) -> None:
        """Record uses of pages from now on, at 16 bytes each; 0 ends that."""
        self._core.record(max_uses)

    def recorded(self) -> Trace:
        """Return what was recorded so far."""
        return Trace(*self._core.recorded())

    def stats(self) -> dict[str, int]:
        """Return the pool in numbers.

        These are hits, misses, inserts, evictions, pages, bytes, pinned_bytes, reserved_bytes and
        budget_bytes.
        """
        return self._core.stats()

    def drop(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Forget these pages; those in use go when their last user is done."""
        self._core.drop(np.ascontiguousarray(ids, np.int64))

    def clear(self) -> None:
        """Forget all pages; those in use go when their last user is done."""
        self._core.clear()

    # ---- inside -------------------------------------------------------------------------------

    def _plan(
        self, page_ids: NDArray[np.int64], base_page_ids: NDArray[np.int64] | None, cut: Cut
    ) -> list[Window]:
        limit = self.window_pages
        key = id(page_ids)
        known = self._plans.get(key)
        if (
            known is not None
            and known.page_ids() is page_ids
            and known.base_page_ids is base_page_ids
            and known.limit == limit
        ):
            return known.windows
        windows = cut(page_ids, base_page_ids, limit)
        plans = self._plans
        gone = weakref.ref(page_ids, lambda _: plans.pop(key, None))
        plans[key] = _Plan(gone, base_page_ids, limit, windows)
        return windows

    def _walk(
        self,
        page_ids: NDArray[np.int64],
        base_page_ids: NDArray[np.int64] | None,
        cut: Cut,
        plan: list[Window] | None,
        at_once: Callable[[Window], bool] | None = None,
    ) -> Iterator[tuple[Window, list[Page]]]:
        windows = cut(page_ids, base_page_ids, self.window_pages) if plan is None else plan
        ahead = windows[::-1]
        while ahead:
            window = ahead.pop()
            with self._gate.hold(len(window.ids) * self._largest):
                if at_once is not None and at_once(window):
                    continue
                pages = self._pages_if_fit(window)
                if pages is not None:
                    yield window, pages
                    # The caller's variable still refers to the list: unpin before the next window.
                    pages.clear()
                    continue
            # Pages are larger than those before made believe, or others pin without a walk.
            bases = None if base_page_ids is None else base_page_ids[window.rows]
            parts = cut(page_ids[window.rows], bases, max(1, len(window.ids) // 2))
            ahead.extend(within(window, part) for part in reversed(parts))

    def _pages_if_fit(self, window: Window) -> list[Page] | None:
        """Return the pages, or None when they do not fit but fewer might."""
        try:
            return self.pages(window.ids)
        except BudgetError:
            # Two pages may be those of one block and its base; more never are.
            if len(window.ids) == 1 or (len(window.ids) == 2 and has_pair(window)):
                raise
        return None

    def _load_missing(self, ids: list[int]) -> dict[int, Page]:
        """Fetch pages, leaving to other threads what they are fetching already."""
        pages: dict[int, Page] = {}
        while ids:
            done = threading.Event()
            # Within the try from the first entry on: an interrupt must leave no event unset.
            try:
                with self._lock:
                    waits = {n: self._loading[n] for n in ids if n in self._loading}
                    mine = [number for number in ids if number not in waits]
                    self._loading.update(dict.fromkeys(mine, done))
                if mine:
                    pages.update(self._load(mine))
            finally:
                done.set()
                with self._lock:
                    for number in ids:
                        if self._loading.get(number) is done:
                            del self._loading[number]
            for event in waits.values():
                event.wait()
            # Not there after all when its fetch failed, or it was evicted again: then it is ours.
            others = list(waits)
            found = self._core.pin(np.array(others, np.int64))
            pages.update(
                (n, page) for n, page in zip(others, found, strict=True) if page is not None
            )
            ids = [number for number in others if number not in pages]
        return pages

    def _load(self, ids: list[int]) -> dict[int, Page]:
        pages: dict[int, Page] = {}
        for number, payload in self._fetched(ids):
            self._largest = max(self._largest, len(payload))
            try:
                pages[number] = self._core.insert(number, payload)
            except CorruptStoreError as exc:
                raise self.damaged(number, exc) from exc
        missing = [number for number in ids if number not in pages]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise PageNotFoundError(
                f"{len(missing)} pages do not exist: {shown}; "
                "if this stays so after reopening the store, run verify on it"
            )
        return pages

    def _fetched(self, ids: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield pages; where the database itself says that one is damaged, find out which."""
        try:
            yield from self._fetch(ids)
        except CorruptStoreError as exc:
            if len(ids) == 1:
                raise self.damaged(ids[0], exc) from exc
            for number in ids:
                yield from self._fetched([number])


class _Gate:
    """Lets walks in as far as the sum of what they pin fits the budget.

    A thread that is inside already is always let in: making it wait for others, who may wait for
    it, could go on forever. Then the budget itself decides.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._inside: dict[int, int] = {}  # thread -> how often
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        amount = min(amount, self._limit)
        thread = threading.get_ident()
        held = False
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: thread in self._inside or self._used + amount <= self._limit
                )
                self._inside[thread] = self._inside.get(thread, 0) + 1
                self._used, held = self._used + amount, True
            yield
        finally:
            if held:
                with self._changed:
                    self._used -= amount
                    self._inside[thread] -= 1
                    if not self._inside[thread]:
                        del self._inside[thread]
                    self._changed.notify_all()


def _bases_in(window: Window, pages: list[Page], bases: Bases | None) -> StoredBases | None:
    if bases is None or window.base_index is None:
        return None
    return StoredBases(pages, window.base_index, bases[1][window.rows])


# ---- fork ---------------------------------------------------------------------------------------
# A child starts with new, empty pools: the threads that were filling the old ones, or waiting at
# their gates, do not exist there. Pages that the forking thread itself holds stay valid.

_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _restart_pools() -> None:
    for pool in list(_pools):
        pool._start()


os.register_at_fork(after_in_child=_restart_pools)
