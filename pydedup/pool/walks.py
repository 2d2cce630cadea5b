# SPDX-License-Identifier: Apache-2.0
"""Walking over many blocks in windows that a small budget can hold: a part of `PagePool`.

Pages of a window are pinned together; how blocks are cut into windows, :mod:`pydedup.windows` says.
A walk within a call is read ahead of (:mod:`pydedup.pool.prefetch`).
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup._core import BufferPool, Page
from pydedup.codec import StoredBases
from pydedup.errors import BudgetError
from pydedup.pool.admission import Shares
from pydedup.pool.loading import PageLoader
from pydedup.pool.prefetch import Call, Lane
from pydedup.windows import (
    Cut,
    Plans,
    Window,
    by_page,
    by_pages,
    has_pair,
    in_order,
    in_order_with_bases,
    within,
)

__all__ = ["Walks"]

#: Pages and slots of the bases of blocks, page -1 for none.
Bases: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint32]]

# Part of the budget that one walk pins at a time, and that is read ahead of it, at most: two walks
# can be made at once before one waits for another. Of large pools it is less: what is pinned is
# not there for others, and so many pages are enough for readers side by side; there two windows are
# read ahead, so that readers go on while the last pages of one are on their way.
_WINDOW_PARTS = 8
_ENOUGH_PAGES, _LARGE_PARTS = 16, 16
# What is all in the pool is used as one window up to this part of the budget: with each window, all
# threads start and end (4096 x 4096 by one row: 1.25 ms, as three windows 1.34). Another walk finds
# room beside it.
_WHOLE_PARTS = 6
# Small pools have walks pin two, where two fit: blocks that models share and a model's own, which
# take turns in a walk, lie on different pages, and each would go for the other. Not while others
# walk: these would wait, and pages be read one walk after the other.
_FEWEST_PAGES = 2


class Walks(abc.ABC):
    """What walks over the blocks on the pages of a pool."""

    _budget: int
    _core: BufferPool
    _loader: PageLoader
    _plans: Plans
    _wholes: Plans
    _shares: Shares

    @abc.abstractmethod
    def pages(self, ids: Sequence[int] | NDArray[np.int64]) -> list[Page]:
        """Return these pages, pinned, in order."""

    @abc.abstractmethod
    def _calling(self) -> Call | None:
        """Return the call that this thread is in, if it is in one."""

    @property
    def window_pages(self) -> int:
        """How many pages a walk pins at once."""
        pages = self._pages
        few = min(_FEWEST_PAGES, pages // 2)
        return max(1, few, min(pages // _WINDOW_PARTS, max(_ENOUGH_PAGES, pages // _LARGE_PARTS)))

    @property
    def _ahead_pages(self) -> int:
        """How many pages are read ahead of a walk."""
        return min(self._pages // _WINDOW_PARTS, 2 * self.window_pages)

    @property
    def _pages(self) -> int:
        """How many pages the budget holds."""
        return self._budget // self._loader.largest

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
        cut = by_page if bases is None else by_pages
        for window, pages in self._walk(page_ids, bases, cut, None):
            assert isinstance(window.rows, np.ndarray)
            yield window.rows, pages, window.page_index, _bases_in(window, pages, bases)

    def planned(self, page_ids: NDArray[np.int64], bases: Bases | None) -> list[Window]:
        """Return the windows of a walk over blocks in order, the same list each time."""
        return self._plans.of(page_ids, _pages_of(bases), _in_order(bases), self.window_pages)

    def hold(self, count: int) -> AbstractContextManager[object]:
        """Keep room for so many pages that are used out of the pool, as a walk does."""
        return self._shares.walks.hold(count * self._loader.largest)

    def stream(
        self,
        page_ids: NDArray[np.int64],
        bases: Bases | None,
        at_once: Callable[[Window], bool] | None = None,
        *,
        once: bool = False,
    ) -> Iterator[tuple[slice, list[Page], NDArray[np.uint32], StoredBases | None]]:
        """Walk over blocks in their order, the page of each pinned together with its base's.

        As `windows_with_bases`, but ``rows`` is a slice, each beginning where the one before ended.
        How an array is cut is remembered for as long as the array lives, so it must not change,
        unless it is walked over ``once``: then the next call of a model, which looks up others, is
        not read ahead along it. A window for which ``at_once`` returns true is not yielded: it was
        used out of the pool.
        """
        cut = _in_order(bases)
        if once:
            plan = cut(page_ids, _pages_of(bases), self.window_pages)
        else:
            plan = self.planned(page_ids, bases)
            if at_once is not None and self._used_as_one(plan, page_ids, bases, at_once):
                return
        for window, pages in self._walk(page_ids, bases, cut, plan, at_once, once=once):
            assert isinstance(window.rows, slice)
            yield window.rows, pages, window.page_index, _bases_in(window, pages, bases)

    # ---- inside -------------------------------------------------------------------------------

    def _walk(
        self,
        page_ids: NDArray[np.int64],
        bases: Bases | None,
        cut: Cut,
        plan: list[Window] | None,
        at_once: Callable[[Window], bool] | None = None,
        *,
        once: bool = False,
    ) -> Iterator[tuple[Window, list[Page]]]:
        call, base_page_ids = self._calling(), _pages_of(bases)
        if plan is None:
            windows, lane = cut(page_ids, base_page_ids, self.window_pages), None
        else:
            windows, lane = plan, None if call is None else call.enter(plan, once=once)
        ahead = [*enumerate(windows)][::-1]  # parts of a window have no number
        while ahead:
            number, window = ahead.pop()
            if lane is not None and number >= 0:
                self._reach(lane, number, window)
            if self._is_too_large_now(window):
                parts = self._parts_of(window, page_ids, base_page_ids, cut)
                # The last one has the number: until then what was read ahead stays pinned.
                numbers = [-1] * (len(parts) - 1) + [number]
                ahead.extend(reversed([*zip(numbers, parts, strict=True)]))
                continue
            with self._shares.walks.hold(len(window.ids) * self._loader.largest):
                used = at_once is not None and at_once(window)
                pages = None if used else self._pages_if_fit(window)
                if lane is not None and number >= 0:
                    lane.pass_by(number)
                if pages is not None:
                    try:
                        yield window, pages
                    finally:
                        # The caller's variable, or a traceback, still refers to the list.
                        pages.clear()
                if used or pages is not None:
                    continue
            # Pages are larger than those before made believe, or others pin without a walk.
            parts = self._parts_of(window, page_ids, base_page_ids, cut)
            ahead.extend((-1, part) for part in reversed(parts))

    def _used_as_one(
        self,
        plan: list[Window],
        page_ids: NDArray[np.int64],
        bases: Bases | None,
        at_once: Callable[[Window], bool],
    ) -> bool:
        """Whether several windows were used as one, since all of their pages are here."""
        most = self._pages // _WHOLE_PARTS
        if len(plan) < 2 or sum(len(window.ids) for window in plan) > most:
            return False
        (whole,) = self._wholes.of(page_ids, _pages_of(bases), _in_order(bases), most)
        count, gate = len(whole.ids), self._shares.walks
        held = count * self._loader.largest
        if self._core.count_resident(whole.ids) < count or gate.is_crowded(held):
            return False
        with gate.hold(held):
            return at_once(whole)

    def _is_too_large_now(self, window: Window) -> bool:
        """Whether others walk in a small pool, who could go on beside a part of this window."""
        count, gate, page_bytes = len(window.ids), self._shares.walks, self._loader.largest
        if count != _FEWEST_PAGES or not _FEWEST_PAGES <= gate.limit // page_bytes < 2 * count:
            return False
        return gate.is_crowded(count * page_bytes) and not has_pair(window)

    def _parts_of(
        self,
        window: Window,
        page_ids: NDArray[np.int64],
        base_page_ids: NDArray[np.int64] | None,
        cut: Cut,
    ) -> list[Window]:
        bases = None if base_page_ids is None else base_page_ids[window.rows]
        parts = cut(page_ids[window.rows], bases, max(1, len(window.ids) // 2))
        return [within(window, part) for part in parts]

    def _reach(self, lane: Lane, number: int, window: Window) -> None:
        """Wait for what is being read of a window; if pages miss, let what follows be read."""
        began = time.perf_counter()
        if lane.reach(number):
            self._loader.count_wait(time.perf_counter() - began)
        if self._core.count_resident(window.ids) < len(window.ids):
            lane.missed(number)

    def _pages_if_fit(self, window: Window) -> list[Page] | None:
        """Return the pages, or None when they do not fit but fewer might."""
        try:
            return self.pages(window.ids)
        except BudgetError:
            # Two pages may be those of one block and its base; more never are.
            if len(window.ids) == 1 or (len(window.ids) == 2 and has_pair(window)):
                raise
        return None


def _pages_of(bases: Bases | None) -> NDArray[np.int64] | None:
    return None if bases is None else bases[0]


def _in_order(bases: Bases | None) -> Cut:
    return in_order if bases is None else in_order_with_bases


def _bases_in(window: Window, pages: list[Page], bases: Bases | None) -> StoredBases | None:
    if bases is None or window.base_index is None:
        return None
    return StoredBases(pages, window.base_index, bases[1][window.rows])
