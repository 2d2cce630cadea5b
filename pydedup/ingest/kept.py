# SPDX-License-Identifier: Apache-2.0
"""What becomes of some blocks of a matrix, from by themselves on to what takes less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.deltas import Delta, decode_deltas, encoded_blocks, replaced
from pydedup.ingest.pairs import Pairs, deltas_of
from pydedup.ingest.places import as_stack, values_of
from pydedup.ingest.spool import NO_BASE
from pydedup.sets import is_among
from pydedup.similarity import distances, upper_bounds

__all__ = ["Kept", "rows_of"]


@dataclass(slots=True)
class Kept:
    """What becomes of some blocks of a matrix.

    Attributes
    ----------
    shared
        References of blocks to take instead, `NO_BASE` where the block itself is stored; all
        that follows has an entry for these too, which says nothing.
    encoded
        The blocks as they are stored.
    source
        Digests of the blocks, uint64 (n, 2).
    digests
        Of what they hold; that of the source where it is stored bit by bit.
    bases, base_tags
        References of the bases of deltas, `NO_BASE` for others; what their slots carry.
    errors
        Relative L2 difference to the source, float64 (n,); shared blocks included.
    costs
        About what the encoded blocks take, int64 (n,): less than their bytes where a page has some
        of these for several.
    stacks
        Those that can be candidates of others, stacked: which they are, and what they hold.
    lossy
        Deltas that give back other bytes than the block's: which they are, and what they hold.
    """

    shared: NDArray[np.int64]
    encoded: codec.EncodedBlocks
    source: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    bases: NDArray[np.int64]
    base_tags: NDArray[np.uint64]
    errors: NDArray[np.float64]
    costs: NDArray[np.int64]
    stacks: list[tuple[NDArray[np.int64], MatrixView]] = field(default_factory=list)
    lossy: list[tuple[NDArray[np.int64], MatrixView]] = field(default_factory=list)

    def encode(
        self, blocks: MatrixView, pairs: Pairs, at: NDArray[np.int64], bound: float | None
    ) -> None:
        """Keep the blocks of these pairs, one each, as deltas where that saves enough."""
        rows, base_index = pairs.rows, pairs.base_index
        deltas, costs = deltas_of(blocks, pairs, self.costs[at], bound)
        good = np.flatnonzero(deltas.lengths > 0)
        if not len(good):
            return
        tags = codec.base_tags(hash_view(pairs.bases))
        places = at[rows[good]]
        self.lossy = _without(self.lossy, places)
        self.digests[places], self.errors[places] = self.source[places], 0
        self.bases[places] = pairs.references[good]
        self.costs[places] = costs[good]
        self.base_tags[places] = tags[base_index[good]]
        lossy = good[deltas.encodings[good] == codec.Encoding.QUANTISED]
        if len(lossy):
            content = decode_deltas(deltas, lossy, blocks, pairs.bases, base_index[lossy])
            where = at[rows[lossy]]
            self.digests[where] = hash_view(content)
            self.lossy.append((where, content))
            away = distances(values_of(blocks)[rows[lossy]], values_of(content)).relative_l2
            self.errors[where] = np.minimum(upper_bounds(away), bound or np.inf)
        self.encoded = replaced(self.encoded, places, deltas, good)

    def take(self, indices: NDArray[np.int64], deltas: Mapping[int, Delta]) -> None:
        """Keep some blocks as these deltas, by number, whatever was decided about them."""
        chosen = [(row, deltas[n]) for row, n in enumerate(indices.tolist()) if n in deltas]
        if not chosen:
            return
        rows = np.array([row for row, _ in chosen], np.int64)
        self.shared[rows] = NO_BASE
        self.bases[rows] = [delta.base for _, delta in chosen]
        self.base_tags[rows] = np.array([delta.base_tag for _, delta in chosen], np.uint64)
        by = encoded_blocks([delta for _, delta in chosen])
        self.encoded = replaced(self.encoded, rows, by, np.arange(len(rows)))


def _without(
    lossy: Sequence[tuple[NDArray[np.int64], MatrixView]], rows: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], MatrixView]]:
    """Leave out blocks that become something else."""
    left = []
    for at, content in lossy:
        stay = np.flatnonzero(~is_among(at, rows))
        if len(stay):
            left.append((at[stay], rows_of(content, stay)))
    return left


def rows_of(blocks: MatrixView, rows: NDArray[np.int64]) -> MatrixView:
    """Return some of the stacked blocks, all of them without a copy."""
    if len(rows) == blocks.grid.count:
        return blocks
    data = blocks.data.reshape(blocks.grid.count, -1)[rows].reshape(-1, blocks.data.shape[1])
    return as_stack(data, blocks.dtype, blocks.grid.block_shape)
