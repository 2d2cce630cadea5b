# SPDX-License-Identifier: Apache-2.0
"""Which models have how many blocks in common, and which of them belong together.

Counted from block maps alone; no page is read. Not here: how that looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup.layout import joined
from pydedup.sets import distinct, find_among, union
from pydedup.usage import Readers

__all__ = ["Common", "common_blocks", "families"]

#: Models that are compared with each other at most.
MOST_MODELS = 1000
#: Blocks of all models together that are looked at, at most: about 350 MB while it is done.
MOST_BLOCKS = 8_000_000
# Classes that are multiplied at a time.
_CLASSES = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """Blocks that models have in common, bases of deltas included, as `Store.explain` counts them.

    Attributes
    ----------
    readers
        The models that were looked at, as numbers, ascending.
    blocks
        ``blocks[i, j]``: how many distinct blocks models ``readers[i]`` and ``readers[j]`` both
        use, int64 (n, n); the diagonal has what each one uses.
    places, counts
        The distinct blocks, ascending (`pydedup.layout.block_places`), and how many of these models
        use each, int64.
    """

    readers: tuple[int, ...]
    blocks: NDArray[np.int64]
    places: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """``[i, j]``: the part of model i's blocks that j uses too; 0 for a model without any."""
        own = np.maximum(np.diagonal(self.blocks), 1)
        return np.asarray(self.blocks / own[:, None], np.float64)

    def others(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many models beside one of them use each of its blocks at these places."""
        at, is_used = find_among(self.places, places)
        others = np.zeros(len(places), np.int64)
        others[is_used] = self.counts[at[is_used]] - 1
        return others


def common_blocks(readers: Readers, candidates: Sequence[int]) -> Common:
    """Compare models with each other, the first of the candidates first.

    The later ones are left out once there are `MOST_MODELS` or `MOST_BLOCKS` of them.
    """
    chosen: list[int] = []
    used: list[NDArray[np.int64]] = []
    total = 0
    for number in candidates[:MOST_MODELS]:
        mine = distinct(readers.places(number))
        if chosen and total + len(mine) > MOST_BLOCKS:
            break
        total += len(mine)
        chosen.append(number)
        used.append(mine)
    order = np.argsort(chosen, kind="stable")
    chosen = [chosen[i] for i in order]
    used = [used[i] for i in order]
    count = len(chosen)
    places = joined(used)
    model = np.repeat(np.arange(count), [len(mine) for mine in used])
    if not len(places):
        return Common(tuple(chosen), np.zeros((count, count), np.int64), places, places)
    by_place = np.argsort(places, kind="stable")
    places, model = places[by_place], model[by_place]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    counts = np.diff(starts, append=len(places))
    return Common(tuple(chosen), _pairs(model, starts, counts, count), places[starts], counts)


def _pairs(
    model: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    n_models: int,
) -> NDArray[np.int64]:
    """Count blocks by pairs of their owners, blocks of the same owners at once.

    Which owners a block has is told by the sum of random numbers of its owners: that two sets
    among a million have the same sum has a chance of 1 in 10 million.
    """
    tags = np.random.default_rng(0).integers(0, 2**64, n_models, np.uint64)
    sums = np.add.reduceat(tags[model], starts)
    _, first, class_blocks = np.unique(sums, return_index=True, return_counts=True)
    pairs = np.zeros((n_models, n_models))
    for begin in range(0, len(first), _CLASSES):
        some = first[begin : begin + _CLASSES]
        lengths = counts[some]
        row = np.repeat(np.arange(len(some)), lengths)
        within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        uses = np.zeros((len(some), n_models))
        uses[row, model[np.repeat(starts[some], lengths) + within]] = 1.0
        pairs += (uses * class_blocks[begin : begin + _CLASSES, None]).T @ uses
    return np.rint(pairs).astype(np.int64)


def families(blocks: NDArray[np.int64], most: int) -> list[list[int]]:
    """Group models by what they have in common; returns the groups, similar ones side by side.

    Average linkage on the blocks that two models share, as part of all that either uses, until
    ``most`` groups are left, or more that have nothing in common. With as many models or fewer each
    is a group of its own.

    Parameters
    ----------
    blocks
        `Common.blocks`, int64 (n, n).
    """
    count = len(blocks)
    own = np.diagonal(blocks).astype(np.float64)
    either = np.maximum(own[:, None] + own[None, :] - blocks, 1.0)
    near = (blocks / either).astype(np.float64)
    np.fill_diagonal(near, -1.0)
    order = {i: [i] for i in range(count)}
    groups = {i: [[i]] for i in range(count)}
    best, best_at = near.max(axis=1, initial=-1.0), _argmax(near)
    while len(order) > 1:
        i = int(np.argmax(best))
        j = int(best_at[i])
        i, j = min(i, j), max(i, j)
        together = len(order) > most and best[i] > 0
        members_i, members_j = order[i], order.pop(j)
        order[i] = members_i + members_j
        groups[i] = [order[i]] if together else groups[i] + groups[j]
        groups.pop(j)
        a, b = len(members_i), len(members_j)
        merged = (a * near[i] + b * near[j]) / (a + b)
        merged[[i, *np.flatnonzero(near[i] < 0), *np.flatnonzero(near[j] < 0)]] = -1.0
        near[i], near[:, i] = merged, merged
        near[j], near[:, j] = -1.0, -1.0
        stale = np.flatnonzero((best_at == i) | (best_at == j))
        stale = union(stale, np.array([i]))
        best[stale], best_at[stale] = near[stale].max(axis=1), near[stale].argmax(axis=1)
        best[j] = -2.0
        nearer = merged > best
        nearer[j] = False
        best[nearer], best_at[nearer] = merged[nearer], i
    return next(iter(groups.values()), [])


def _argmax(near: NDArray[np.float64]) -> NDArray[np.int64]:
    return near.argmax(axis=1) if near.size else np.empty(0, np.int64)
