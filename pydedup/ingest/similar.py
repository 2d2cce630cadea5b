# SPDX-License-Identifier: Apache-2.0
"""How each new block is kept: shared with a similar one, as a delta on it, or by itself.

Among the nearest candidates that the index has, the block's own policy decides: within its error
bound a stored block is taken as it is; else the delta that needs the fewest bytes, where that saves
at least 5 % of what the block takes by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.asked import ByTransposition
from pydedup.ingest.candidates import Candidates, can_be_delta
from pydedup.ingest.deltas import Delta
from pydedup.ingest.kept import Kept, rows_of
from pydedup.ingest.low_rank import Moved
from pydedup.ingest.pairs import (
    Columns,
    Pairs,
    best_pairs,
    distinct_pairs,
    exact_distances,
    farthest_base,
    measured,
    near_as_pruned,
    near_in_part,
    pairs_of,
    pairs_on,
)
from pydedup.ingest.places import BlockReader, by_shape, stack_blocks, transposed_stack
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Policy
from pydedup.sets import is_among
from pydedup.types import DType

__all__ = ["LookedAt", "Similar", "look_at"]

# A delta that takes one of so many bytes is small.
_SMALL = 4
# One that takes one of so many bytes has as good a base as any.
_GOOD = 16
# Candidates of one dtype that are looked at.
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class LookedAt:
    """What can be said of some blocks of a matrix without knowing any other.

    Attributes
    ----------
    encoded
        The blocks, each by itself.
    stacks
        Those that can be near to others, stacked: which they are, and what they hold.
    """

    encoded: codec.EncodedBlocks
    stacks: Sequence[tuple[NDArray[np.int64], MatrixView]]


def look_at(
    view: MatrixView, indices: NDArray[np.int64], policy: Policy, *, threads: int = 0
) -> LookedAt:
    """Encode blocks by themselves, and stack those whose policy wants to know similar ones."""
    encoded = codec.encode_blocks(view, indices, planes=policy.compresses, threads=threads)
    stacks = []
    if policy.uses_deltas:
        for shape, at in by_shape(view, indices):
            if can_be_delta(shape):
                stacks.append((at, stack_blocks(view, indices[at], shape)))
    return LookedAt(encoded, stacks)


class Similar:
    """Finds what to do with blocks that no other is identical to."""

    def __init__(self, reader: BlockReader, candidates: Candidates) -> None:
        self._reader = reader
        self._candidates = candidates

    def keep(
        self,
        looked: LookedAt,
        indices: NDArray[np.int64],
        digests: NDArray[np.uint64],
        policy: Policy,
        aligned: NDArray[np.int64],
        deltas: Mapping[int, Delta] | None = None,
        moved: Sequence[tuple[NDArray[np.int64], Moved]] = (),
        most: float = 1.0,
        transposed: ByTransposition | None = None,
    ) -> Kept:
        """Decide about blocks of a matrix with these numbers and digests.

        Parameters
        ----------
        looked
            What `look_at` says of them.
        aligned
            References of candidates for these blocks, int64 (k, n) (aligned.py).
        deltas
            What some blocks are to be, by their number in the matrix.
        moved
            Which of the blocks are near to bases that factors move, and by what (low_rank.py).
        most
            What a delta may take of the block by itself, about (families.py).
        transposed
            What finds bases to transpose.
        """
        count = len(indices)
        kept = Kept(
            shared=np.full(count, NO_BASE, np.int64),
            encoded=looked.encoded,
            source=digests,
            digests=digests.copy(),
            bases=np.full(count, NO_BASE, np.int64),
            base_tags=np.zeros(count, np.uint64),
            errors=np.zeros(count),
            costs=looked.encoded.lengths.copy(),
        )
        for at, blocks in looked.stacks:
            every = np.arange(len(at))
            if policy.max_rel_error > 0:  # it may be shared, which is best
                self._improve(kept, blocks, at, indices[at], policy, aligned[:, at], most)
                every = every[:0]
            for rows, by in moved:
                self._move(kept, blocks, at, indices, rows, by, policy)
            # Of those that have become small, nothing else is tried.
            is_small = kept.costs[at] <= blocks.block_bytes() // _SMALL
            rest = every[~is_small[every] | (kept.bases[at[every]] == NO_BASE)]
            if len(rest):
                some = at[rest]
                left = rows_of(blocks, rest)
                self._improve(kept, left, some, indices[some], policy, aligned[:, some], most)
            if transposed is not None and most == 1:
                self._transpose(kept, blocks, at, indices[at], policy, transposed)
            kept.stacks.append((at, blocks))
        if deltas:
            kept.take(indices, deltas)
        return kept

    def add(self, kept: Kept, numbers: NDArray[np.int64]) -> None:
        """Make blocks that are stored by themselves candidates of others.

        ``numbers`` are those of all that was kept on the spool, `NO_BASE` where it is not there.
        """
        for at, blocks in kept.stacks:
            rows = np.flatnonzero((numbers[at] != NO_BASE) & (kept.bases[at] == NO_BASE))
            if len(rows):
                self._candidates.add(rows_of(blocks, rows), numbers[at[rows]])

    def pairs(
        self,
        blocks: MatrixView,
        numbers: NDArray[np.int64],
        farthest: float,
        aligned: NDArray[np.int64],
    ) -> list[Pairs]:
        """Return the candidates of stacked blocks that seem to be at most that far away.

        Those at their places are also there if they are so near where the block is not 0.

        ``numbers`` are those of the blocks in their matrix, ascending. ``aligned`` are references
        of k further candidates (aligned.py), int64 (k, n), or `NO_BASE`.
        """
        found: dict[DType, list[Columns]] = {}
        for dtype, ids, estimates in self._candidates.query(blocks, _NEAREST):
            rows, columns = np.nonzero(estimates <= farthest)
            if len(rows):
                references = self._candidates.references(ids[rows, columns])
                column = (rows, references, estimates[rows, columns])
                found.setdefault(dtype, []).append(column)
        self._add_given(found, blocks, aligned)
        pairs = self._pairs(found, blocks, farthest)
        near = pairs
        if not blocks.dtype.has_distances:
            # What is at their place was not measured, and may be anything.
            near = [some.select(np.flatnonzero(some.estimates > 0)) for some in pairs]
        beside = self._beside(near, numbers)
        beside[(beside[:, None] == aligned).any(axis=1)] = NO_BASE
        found = {}
        self._add_given(found, blocks, beside)
        return [*pairs, *self._pairs(found, blocks, farthest)]

    # ---- inside -------------------------------------------------------------------------------

    def _add_given(
        self,
        found: dict[DType, list[Columns]],
        blocks: MatrixView,
        given: NDArray[np.int64],
    ) -> None:
        """Add candidates that are not measured yet, references int64 (k, n), or `NO_BASE`."""
        for references in given:
            there = np.flatnonzero(references != NO_BASE)
            by_dtype = self._reader.by_dtype(references[there], *blocks.grid.block_shape)
            for dtype in (one for one in blocks.dtype.base_dtypes if one in by_dtype):
                rows = there[by_dtype[dtype]]
                column = (rows, references[rows], np.full(len(rows), np.nan))
                found.setdefault(dtype, []).append(column)

    def _pairs(
        self, found: Mapping[DType, Sequence[Columns]], blocks: MatrixView, farthest: float
    ) -> list[Pairs]:
        """Read candidates, and return those that seem to be at most that far away, zeros aside."""
        pairs = []
        for dtype, columns_of in found.items():
            rows, chosen, estimates = distinct_pairs(columns_of)
            if not len(rows):
                continue
            distinct, base_index = np.unique(chosen, return_inverse=True)
            bases = self._reader.read(distinct, dtype, blocks.grid.block_shape)
            some = Pairs(rows, chosen, estimates, bases, base_index)
            unknown = np.flatnonzero(np.isnan(estimates))
            some.estimates[unknown] = measured(blocks, some, unknown)
            near = some.estimates <= farthest
            near[near_in_part(blocks, some, np.flatnonzero(~near))] = True
            near[near_as_pruned(blocks, some, np.flatnonzero(~near), farthest)] = True
            pairs.append(some.select(np.flatnonzero(near)))
        return pairs

    def _beside(self, pairs: Sequence[Pairs], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return candidates for blocks without any, references int64 (k, n), or `NO_BASE`.

        Blocks of a tensor lie on its pages in their order. So what lies beside the candidate of a
        block near by is the one, under whatever name, where that is too far for the index to find
        it for certain.
        """
        # One that infinities keep from being measured (`near_as_pruned`) is nowhere the nearest.
        nearest = np.full(len(numbers), NO_BASE, np.int64)
        for some in best_pairs(pairs, [one.estimates for one in pairs], len(numbers))[1]:
            nearest[some.rows] = some.references
        known, rest = np.flatnonzero(nearest != NO_BASE), np.flatnonzero(nearest == NO_BASE)
        if not len(known) or not len(rest):
            return np.empty((0, len(numbers)), np.int64)
        found = np.full((2, len(numbers)), NO_BASE, np.int64)
        behind = np.searchsorted(known, rest)
        for row, which in zip(found, (behind - 1, behind), strict=True):
            there = np.flatnonzero((which >= 0) & (which < len(known)))
            at, anchors = rest[there], known[which[there]]
            row[at] = self._reader.beside(nearest[anchors], numbers[at] - numbers[anchors])
        return found

    def _improve(
        self,
        kept: Kept,
        blocks: MatrixView,
        at: NDArray[np.int64],
        numbers: NDArray[np.int64],
        policy: Policy,
        aligned: NDArray[np.int64],
        most: float,
    ) -> None:
        """Replace what ``kept`` says of the blocks ``at`` where a similar block helps."""
        pairs = self.pairs(blocks, numbers, farthest_base(policy.max_rel_error), aligned)
        if policy.max_rel_error > 0 and blocks.dtype.has_distances:
            for some in pairs:
                if some.bases.dtype == blocks.dtype:
                    self._share(kept, blocks, some, at, policy.max_rel_error)
            pairs = pairs_of(pairs, kept.shared[at] == NO_BASE)
        bound = policy.max_rel_error or None
        sizes = [
            codec.estimate_deltas(
                blocks, some.rows, some.bases, some.base_index, max_rel_error=bound
            )
            for some in pairs
        ]
        least, best = best_pairs(pairs, sizes, len(at))
        for some in pairs_of(best, least < most * kept.costs[at]):
            kept.encode(blocks, some, at, bound)

    @staticmethod
    def _share(
        kept: Kept, blocks: MatrixView, pairs: Pairs, at: NDArray[np.int64], bound: float
    ) -> None:
        """Take stored blocks as they are where they are within the bound; the nearest one."""
        away = exact_distances(blocks, pairs, bound)
        for entry in np.argsort(away, kind="stable"):
            if not away[entry] <= bound:
                break
            row = at[pairs.rows[entry]]
            if kept.shared[row] == NO_BASE:
                kept.shared[row] = pairs.references[entry]
                kept.errors[row] = away[entry]

    def _move(
        self,
        kept: Kept,
        blocks: MatrixView,
        at: NDArray[np.int64],
        indices: NDArray[np.int64],
        rows: NDArray[np.int64],
        moved: Moved,
        policy: Policy,
    ) -> None:
        """Keep those of the blocks ``at`` that are among ``rows`` as deltas on moved bases."""
        chosen = np.flatnonzero(is_among(at, rows) & (kept.shared[at] == NO_BASE))
        if not len(chosen):
            return
        numbers = indices[at[chosen]]
        pairs = moved.pairs(self._reader, chosen, numbers, blocks.grid.block_shape)
        kept.encode(blocks, pairs, at, policy.max_rel_error or None)

    def _transpose(
        self,
        kept: Kept,
        blocks: MatrixView,
        at: NDArray[np.int64],
        numbers: NDArray[np.int64],
        policy: Policy,
        transposed: ByTransposition,
    ) -> None:
        """Keep those of the blocks ``at`` that take less so as deltas on transposed bases."""
        is_large = kept.costs[at] > blocks.block_bytes() // _GOOD
        rows = np.flatnonzero((kept.shared[at] == NO_BASE) & is_large)
        if not len(rows):
            return
        references = transposed(numbers[rows], lambda i: rows_of(blocks, rows[i : i + 1]))
        there = references != NO_BASE
        shape = blocks.grid.block_shape
        bound = policy.max_rel_error or None
        some = rows[there], references[there]
        for pairs in pairs_on(self._reader, *some, shape, is_transposed=True):
            wanted = kept.bases[at[pairs.rows]] == NO_BASE
            rest = np.flatnonzero(~wanted)
            if len(rest):
                others, bases = pairs.select(rest), transposed_stack(pairs.bases)
                sizes = codec.estimate_deltas(
                    blocks, others.rows, bases, others.base_index, max_rel_error=bound
                )
                wanted[rest] = sizes < kept.costs[at[others.rows]]
            chosen = np.flatnonzero(wanted)
            if len(chosen):
                kept.encode(blocks, pairs.select(chosen), at, bound)
