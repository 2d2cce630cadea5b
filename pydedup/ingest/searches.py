# SPDX-License-Identifier: Apache-2.0
"""Orders in which blocks are tried, and searches for how many of them may be replaced.

A search is a function of the blocks, in order, and of ``attempt(batch) -> bool``, which replaces a
batch on top of what was accepted before, evaluates, and either keeps all of the batch or takes all
of it back. It yields the blocks that it refuses, one by one (or, for `step`, with their batch), as
it goes: ``attempt`` may raise to end the search. Nothing here knows weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

__all__ = ["SEARCHES", "Attempt", "Search", "bisect", "halving", "step"]

Blocks: TypeAlias = Sequence[int]
Attempt: TypeAlias = Callable[[Blocks], bool]
#: (blocks, attempt, first, largest) -> refused; ``first`` and ``largest`` are batch sizes.
Search: TypeAlias = Callable[[Blocks, Attempt, int, int], Iterator[int]]


def step(blocks: Blocks, attempt: Attempt, first: int, largest: int) -> Iterator[int]:
    """Evaluate after every ``first`` blocks; the first batch that does too much harm ends it.

    After Zhou et al., *Serving Deep Learning Models with Deduplication from Relational Databases*,
    PVLDB 15(10), 2022.
    """
    size = min(first, largest)
    for start in range(0, len(blocks), size):
        batch = blocks[start : start + size]
        if not attempt(batch):
            yield from batch
            return


def bisect(blocks: Blocks, attempt: Attempt, first: int, largest: int) -> Iterator[int]:
    """Take growing batches; find the first bad block of a bad one by bisection and refuse it alone.

    A bad batch of m blocks costs at most ceil(log2(m)) further evaluations: its longest good prefix
    is narrowed down, each good piece kept as it is found. A block is refused only after it, alone,
    on top of what was accepted, did too much harm; so one that does none is never refused as long
    as harm adds up, wherever it stands in the order. What followed the bad block is tried again,
    in batches of a quarter of the size, or as long as the good prefix was.
    """
    size, start = min(first, largest), 0
    while start < len(blocks):
        batch = blocks[start : start + size]
        if attempt(batch):
            start += len(batch)
            size = min(2 * size, largest)
            continue
        good, bad = 0, len(batch)  # the prefix up to good was kept, the one up to bad refused
        while bad - good > 1:
            middle = (good + bad) // 2
            if attempt(batch[good:middle]):
                good = middle
            else:
                bad = middle
        yield batch[good]
        start += good + 1
        size = min(max(1, good, size // 4), largest)


def halving(blocks: Blocks, attempt: Attempt, first: int, largest: int) -> Iterator[int]:
    """Try the first half; go on with what is left if it may stay, with its first half if not.

    After the search with range expansion of Guan et al., *Privacy and Accuracy-Aware AI/ML Model
    Deduplication*, SIGMOD 2025: about log2(n) evaluations, and the first block that does too much
    harm ends it.
    """
    start, end = 0, len(blocks)
    while start < len(blocks):
        middle = start + max(1, (end - start) // 2)
        if attempt(blocks[start:middle]):
            start, end = middle, len(blocks)
        elif middle - start == 1:
            yield blocks[start]
            return
        else:
            end = middle


SEARCHES: dict[str, Search] = {"step": step, "bisect": bisect, "halving": halving}
