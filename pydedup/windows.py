# SPDX-License-Identifier: Apache-2.0
"""Cutting a walk over many blocks into windows whose pages are pinned together.

Only arrays of page ids go in here; what is done with a window, `pydedup.pool` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import NO_PAGE

__all__ = [
    "Cut",
    "Plans",
    "Window",
    "by_page",
    "by_pages",
    "has_pair",
    "in_order",
    "in_order_with_bases",
    "within",
]

#: Cuts blocks with these pages, and these of bases, into windows of so many pages.
Cut: TypeAlias = Callable[[NDArray[np.int64], "NDArray[np.int64] | None", int], "list[Window]"]


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks of a walk whose pages are pinned together, with those of their bases.

    ``rows`` selects them from the walk's ``page_ids``; block ``rows[i]`` is on page
    ``ids[page_index[i]]``, its base on ``ids[base_index[i]]``, or there is none where that is -1.
    ``kept`` is for what its user wants to find again in the next walk.
    """

    rows: slice | NDArray[np.int64]
    ids: NDArray[np.int64]
    page_index: NDArray[np.uint32]
    base_index: NDArray[np.int64] | None = None
    kept: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)


def within(window: Window, part: Window) -> Window:
    """Return a window that was cut from the blocks of another, as one of the whole walk."""
    if isinstance(window.rows, slice):
        assert isinstance(part.rows, slice)
        start = window.rows.start
        rows: Any = slice(start + part.rows.start, start + part.rows.stop)
    else:
        rows = window.rows[part.rows]
    return Window(rows, part.ids, part.page_index, part.base_index)


def has_pair(window: Window) -> bool:
    """Whether a block needs two pages."""
    base_index = window.base_index
    return base_index is not None and bool(
        ((base_index >= 0) & (base_index != window.page_index)).any()
    )


def by_page(page_ids: NDArray[np.int64], _: object, limit: int) -> list[Window]:
    """Cut blocks in the order of their pages."""
    ids, index = np.unique(page_ids, return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(0, len(ids) + limit, limit))
    windows = []
    for number, first in enumerate(range(0, len(ids), limit)):
        rows = order[starts[number] : starts[number + 1]]
        page_index = (index[rows] - first).astype(np.uint32)
        windows.append(Window(rows, ids[first : first + limit], page_index))
    return windows


def by_pages(
    page_ids: NDArray[np.int64], base_page_ids: NDArray[np.int64] | None, limit: int
) -> list[Window]:
    """Cut blocks, in the order of their pages and of their bases' within these."""
    assert base_page_ids is not None
    order = np.lexsort((base_page_ids, page_ids))
    windows = in_order_with_bases(page_ids[order], base_page_ids[order], limit)
    return [replace(window, rows=order[window.rows]) for window in windows]


def in_order_with_bases(
    page_ids: NDArray[np.int64], base_page_ids: NDArray[np.int64] | None, limit: int
) -> list[Window]:
    """Cut blocks in their order; a window has more than ``limit`` pages where one block has."""
    assert base_page_ids is not None
    if len(page_ids) == 0:
        return []
    changes = (page_ids[1:] != page_ids[:-1]) | (base_page_ids[1:] != base_page_ids[:-1])
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    ends = np.append(starts[1:], len(page_ids)).tolist()
    windows: list[Window] = []
    first, known = 0, {NO_PAGE: -1}
    pairs = zip(page_ids[starts].tolist(), base_page_ids[starts].tolist(), strict=True)
    for run, (page, base) in enumerate(pairs):
        needed = {page, base} - known.keys()
        if len(known) > 1 and len(known) - 1 + len(needed) > limit:
            windows.append(_with_bases(page_ids, base_page_ids, ends, first, run, known))
            first, known = run, {NO_PAGE: -1}
        for number in (page, base):
            known.setdefault(number, len(known) - 1)
    windows.append(_with_bases(page_ids, base_page_ids, ends, first, len(ends), known))
    return windows


def _with_bases(
    page_ids: NDArray[np.int64],
    base_page_ids: NDArray[np.int64],
    ends: list[int],
    first: int,
    end: int,
    known: dict[int, int],
) -> Window:
    rows = slice(ends[first - 1] if first else 0, ends[end - 1])
    numbers = np.fromiter(known, np.int64, len(known))
    order = np.argsort(numbers)  # NO_PAGE, whose number in the window is -1, first
    index = order - 1
    page_index = index[np.searchsorted(numbers[order], page_ids[rows])]
    base_index = index[np.searchsorted(numbers[order], base_page_ids[rows])]
    return Window(rows, numbers[1:], page_index.astype(np.uint32), base_index)


def in_order(page_ids: NDArray[np.int64], _: object, limit: int) -> list[Window]:
    """Cut blocks in their order."""
    if len(page_ids) == 0:
        return []
    # Runs of blocks on one page, which are long where blocks lie in the order of their tensor.
    starts = np.concatenate(([0], np.flatnonzero(page_ids[1:] != page_ids[:-1]) + 1))
    lengths = np.diff(starts, append=len(page_ids))
    windows: list[Window] = []
    first, known, numbers = 0, {}, []  # type: int, dict[int, int], list[int]
    for run, page in enumerate(page_ids[starts].tolist()):
        if page not in known and len(known) == limit:
            windows.append(_run_in_order(starts, lengths, first, run, known, numbers))
            first, known, numbers = run, {}, []
        numbers.append(known.setdefault(page, len(known)))
    windows.append(_run_in_order(starts, lengths, first, len(starts), known, numbers))
    return windows


def _run_in_order(
    starts: NDArray[np.intp],
    lengths: NDArray[np.intp],
    first: int,
    end: int,
    known: dict[int, int],
    numbers: list[int],
) -> Window:
    start = int(starts[first])
    stop = int(starts[end - 1] + lengths[end - 1])
    page_index = np.repeat(np.array(numbers, np.uint32), lengths[first:end])
    return Window(slice(start, stop), np.fromiter(known, np.int64, len(known)), page_index)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the arrays of a walk in order are cut."""

    page_ids: weakref.ref[NDArray[np.int64]]
    base_page_ids: NDArray[np.int64] | None
    limit: int
    windows: list[Window]


class Plans:
    """Windows of arrays that are walked over again and again, as long as the arrays live."""

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}  # by the id of the array of pages

    def __len__(self) -> int:
        return len(self._plans)

    def of(
        self,
        page_ids: NDArray[np.int64],
        base_page_ids: NDArray[np.int64] | None,
        cut: Cut,
        limit: int,
    ) -> list[Window]:
        """Return the windows of these arrays, which must not change: the same list each time."""
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
