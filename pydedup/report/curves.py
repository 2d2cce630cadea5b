# SPDX-License-Identifier: Apache-2.0
"""A recorded trace as curves: what each replacement policy would have missed, by memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pydedup.errors import ArgumentError
from pydedup.replacement import POLICIES, Trace, replay
from pydedup.sets import distinct
from pydedup.words import ReplayPolicy

__all__ = ["OPTIMUM", "Curves", "miss_curves"]

#: Belady's: the page whose next use is farthest away goes first.
OPTIMUM: Final = "optimum"
_POINTS = 12
# Uses that are replayed at first; as long as that took less than so many seconds, more follow.
_FIRST_USES, _MORE, _SECONDS = 4000, 4, 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Miss ratios by memory.

    Attributes
    ----------
    memory
        The sizes of memory, in bytes, ascending; the last one holds all pages of the trace.
    ratios
        Per policy, misses by uses at each size.
    uses, pages, calls
        Of the trace: its uses of pages, the distinct pages that were replayed, its calls.
    page_bytes
        Size of these pages.
    replayed
        How many uses, from the beginning, the curves are about.
    """

    memory: tuple[int, ...]
    ratios: Mapping[ReplayPolicy, tuple[float, ...]]
    uses: int
    pages: int
    calls: int
    page_bytes: int
    replayed: int


def miss_curves(trace: Trace) -> Curves:
    """Replay a trace through each policy and the optimum; of a long one what takes a few seconds.

    Raises
    ------
    ArgumentError
        When the trace does not fit together.
    """
    if not len(trace.pages) == len(trace.nbytes) == len(trace.calls):
        raise ArgumentError(
            f"the trace has {len(trace.pages)} uses of pages, {len(trace.nbytes)} sizes and "
            f"{len(trace.calls)} calls; there must be as many of each"
        )
    kept = min(len(trace), _FIRST_USES)
    while True:
        began = time.perf_counter()
        curves = _replayed(trace, kept)
        if kept == len(trace) or time.perf_counter() - began > _SECONDS:
            return curves
        kept = min(len(trace), _MORE * kept)


def _replayed(trace: Trace, kept: int) -> Curves:
    head = Trace(trace.pages[:kept], trace.nbytes[:kept], trace.calls[:kept], trace.owners)
    ids, first = np.unique(head.pages, return_index=True)
    sizes = head.nbytes[first].astype(np.int64)
    memory: tuple[int, ...] = ()
    ratios: dict[ReplayPolicy, tuple[float, ...]] = dict.fromkeys((*POLICIES, OPTIMUM), ())
    if kept:
        least, total = max(int(sizes.max()), 1), max(int(sizes.sum()), 1)
        steps = np.geomspace(least, total, _POINTS).round().astype(np.int64)
        memory = tuple(int(step) for step in distinct(np.clip(steps, least, total)))
        ratios = {
            policy: tuple(1.0 - replay(head, size, policy).hit_ratio for size in memory)
            for policy in ratios
        }
    return Curves(
        memory=memory,
        ratios=ratios,
        uses=len(trace),
        pages=len(ids),
        calls=len(trace.owners),
        page_bytes=int(sizes.sum()),
        replayed=kept,
    )
