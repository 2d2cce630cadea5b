# SPDX-License-Identifier: Apache-2.0
"""Pairs of a block and a candidate to share or to be a delta on: measured, and the best chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.arguments import as_dtype
from pydedup.blocks import MatrixView
from pydedup.ingest.deltas import delta_limits
from pydedup.ingest.places import BlockReader, values_of
from pydedup.similarity import distances, upper_bounds

__all__ = [
    "Columns",
    "Pairs",
    "best_pairs",
    "deltas_of",
    "distinct_pairs",
    "exact_distances",
    "farthest_base",
    "measured",
    "near_as_pruned",
    "near_in_part",
    "pairs_of",
    "pairs_on",
]

# A block seems to be pruned where so much of a sample is 0: one element of so many, a prime, since
# rows, columns and patterns of weights are pruned at regular distances.
_SAMPLED = 13
_PRUNED_SHARE = 1 / 16
# Where so much of it has the bits of the base, a delta of the rest pays, whatever that is.
_SAME_SHARE = 1 / 4

#: Rows, references and estimates of pairs.
Columns: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


@dataclass(slots=True)
class Pairs:
    """Pairs of a stacked block and a candidate for it, all of one dtype.

    Attributes
    ----------
    rows
        The number of the block in its stack, ascending.
    references
        Of the candidate.
    estimates
        Of the relative L2 distance between the two.
    bases
        The distinct candidates, stacked.
    base_index
        Which of ``bases`` the candidate is.
    is_transposed
        Whether the blocks are compared with their candidates transposed.
    factors
        What moves the candidates, if anything does (low_rank.py): then all pairs are chosen.
    shared
        Bytes of each delta that others on its page have too, int64 (n,): of its factors.
    """

    rows: NDArray[np.int64]
    references: NDArray[np.int64]
    estimates: NDArray[np.float64]
    bases: MatrixView
    base_index: NDArray[np.int64]
    is_transposed: bool = False
    factors: codec.LowRankFactors | None = None
    shared: NDArray[np.int64] | int = 0

    def select(self, entries: NDArray[np.int64]) -> Pairs:
        """Return some of the pairs, whose candidates nothing moves."""
        assert self.factors is None
        return Pairs(
            self.rows[entries],
            self.references[entries],
            self.estimates[entries],
            self.bases,
            self.base_index[entries],
            self.is_transposed,
        )


def farthest_base(max_rel_error: float) -> float:
    """Return the relative L2 distance up to which a block may be the base of a delta.

    An exact delta on a base half the block's norm away saves about 5 %. A quantised one saves more
    the larger its error may be: any base will do that is clearly nearer than a block of zeros.
    """
    return 0.95 if max_rel_error > 0 else 0.5


def pairs_on(
    reader: BlockReader,
    rows: NDArray[np.int64],
    references: NDArray[np.int64],
    shape: tuple[int, int],
    *,
    is_transposed: bool = False,
) -> Iterator[Pairs]:
    """Yield rows of a stack of blocks of that shape with those of these candidates that fit.

    They are not measured, and of one dtype each.
    """
    if is_transposed:
        shape = shape[::-1]
    for dtype, alike in reader.by_dtype(references, *shape).items():
        bases, base_index = np.unique(references[alike], return_inverse=True)
        stacked = reader.read(bases, dtype, shape)
        unknown = np.full(len(alike), np.nan)
        yield Pairs(rows[alike], bases[base_index], unknown, stacked, base_index, is_transposed)


def pairs_of(pairs: Sequence[Pairs], wanted: NDArray[np.bool_]) -> list[Pairs]:
    """Return the pairs of blocks that are wanted, by row; none without any."""
    chosen = (some.select(np.flatnonzero(wanted[some.rows])) for some in pairs)
    return [some for some in chosen if len(some.rows)]


def best_pairs(
    pairs: Sequence[Pairs], costs: Sequence[NDArray[Any]], count: int
) -> tuple[NDArray[np.float64], list[Pairs]]:
    """Return the least cost of each of ``count`` rows, and of all pairs those that have it.

    Infinity for rows without a pair that costs less; of several, the first.
    """
    least = np.full(count, np.inf)
    choice = np.full((count, 2), -1, np.int64)  # which of pairs, which entry of it
    for number, (some, cost) in enumerate(zip(pairs, costs, strict=True)):
        for entry, row in enumerate(some.rows.tolist()):
            if cost[entry] < least[row]:
                least[row] = cost[entry]
                choice[row] = number, entry
    best = [some.select(choice[choice[:, 0] == number, 1]) for number, some in enumerate(pairs)]
    return least, [some for some in best if len(some.rows)]


def deltas_of(
    blocks: MatrixView, pairs: Pairs, costs: NDArray[np.int64], bound: float | None
) -> tuple[codec.EncodedBlocks, NDArray[np.int64]]:
    """Return the deltas of pairs that take less than their blocks do, and what each takes.

    ``costs`` are those of all blocks of the stack.
    """
    deltas = codec.encode_deltas(
        blocks,
        pairs.rows,
        pairs.bases,
        pairs.base_index,
        limits=delta_limits(costs[pairs.rows]) + pairs.shared,
        max_rel_error=bound,
        factors=pairs.factors,
        is_transposed=pairs.is_transposed,
    )
    return deltas, deltas.lengths - pairs.shared


def distinct_pairs(columns: Sequence[Columns]) -> Columns:
    """Return pairs without repeats, by row; of repeats the first."""
    rows, references, estimates = (
        np.concatenate([column[i] for column in columns]) for i in range(3)
    )
    order = np.lexsort((references, rows))  # stable, so the first of repeats stays the first
    rows, references = rows[order], references[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (np.diff(rows) != 0) | (np.diff(references) != 0)
    return rows[is_first], references[is_first], estimates[order][is_first]


def measured(blocks: MatrixView, pairs: Pairs, entries: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the distances of some pairs; bases of another dtype are rounded to the block's.

    Of dtypes without distances each is 0: what its delta would take decides about a pair.
    """
    if not len(entries) or not blocks.dtype.has_distances:
        return np.zeros(len(entries))
    chosen = pairs.select(entries)
    bases = as_dtype(values_of(pairs.bases), blocks.dtype.numpy)
    pair = chosen.rows, chosen.base_index
    return distances(values_of(blocks), bases, pairs=pair).relative_l2


def near_as_pruned(
    blocks: MatrixView, pairs: Pairs, entries: NDArray[np.int64], farthest: float
) -> NDArray[np.int64]:
    """Return those pairs whose bases are near where the block is not 0.

    A block that many elements of its base were pruned from is far from it; a delta has a mask of
    them, and says nothing else of them.
    """
    if not len(entries) or not blocks.dtype.has_distances:
        return entries[:0]
    values = values_of(blocks)
    sample = values.reshape(len(values), -1)[pairs.rows[entries], ::_SAMPLED]
    entries = entries[_are_zero(sample).mean(axis=1) >= _PRUNED_SHARE]
    if not len(entries):
        return entries
    chosen = values[pairs.rows[entries]]
    bases = as_dtype(values_of(pairs.bases)[pairs.base_index[entries]], blocks.dtype.numpy)
    bases = np.where(_are_zero(chosen), chosen, bases)
    return entries[distances(chosen, bases).relative_l2 <= farthest]


def near_in_part(blocks: MatrixView, pairs: Pairs, entries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those pairs of which many elements are the same bits.

    What few others became may be far away, as rows of a table that were 0 are, or have no distance,
    as NaN and infinities; a delta says nothing of those that stayed.
    """
    if not len(entries) or not blocks.dtype.has_distances:
        return entries[:0]
    values, bases = (
        of.reshape(len(of), -1)[:, ::_SAMPLED] for of in map(values_of, (blocks, pairs.bases))
    )
    chosen = values[pairs.rows[entries]]
    rounded = as_dtype(bases[pairs.base_index[entries]], blocks.dtype.numpy)
    bits = f"u{blocks.dtype.itemsize}"
    same: NDArray[np.float64] = (chosen.view(bits) == rounded.view(bits)).mean(axis=1)
    return entries[same >= _SAME_SHARE]


def _are_zero(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which floats are 0; by their bits, since numpy warns of a signalling NaN."""
    bits = values.view(f"u{values.itemsize}") << 1
    zero: NDArray[np.bool_] = bits == 0
    return zero


def exact_distances(blocks: MatrixView, pairs: Pairs, limit: float) -> NDArray[np.float64]:
    """Return an upper bound of the relative L2 distance of each pair, infinity above ``limit``.

    For blocks of another dtype than their candidates it is an estimate.
    """
    if pairs.bases.dtype != blocks.dtype:
        return np.where(pairs.estimates <= limit, pairs.estimates, np.inf)
    values, bases = values_of(blocks), values_of(pairs.bases)
    pair = pairs.rows, pairs.base_index
    away = upper_bounds(distances(values, bases, limit=limit, pairs=pair).relative_l2)
    return np.where(away <= limit, away, np.inf)
