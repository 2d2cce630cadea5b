# SPDX-License-Identifier: Apache-2.0
"""What the policy `Accuracy` may put in the place of single blocks: stored ones, and deltas.

A block that stays as it is will be stored as `Lossless` stores it, so only what takes clearly less
is offered; and of several contents none that is no smaller than one that is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.asked import ByPosition, ByTransposition
from pydedup.ingest.deltas import Delta, decode_deltas, delta_limits, encoded_blocks
from pydedup.ingest.low_rank import LowRankRelatives, Moved
from pydedup.ingest.pairs import Pairs, deltas_of
from pydedup.ingest.places import BlockReader, values_of
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Bounded, Lossless, Policy

__all__ = ["Level", "Levels", "MovedBases"]


@dataclass(frozen=True, slots=True)
class Level:
    """What a block may become.

    Attributes
    ----------
    content
        Returns it.
    saved
        Bytes less than the block takes by itself, about: a page has some of several deltas once.
    delta
        What is stored for it, `None` where that is a stored block.
    error
        Relative L2 change at most; infinity where that is not known.
    """

    content: Callable[[], NDArray[Any]]
    saved: int
    delta: Delta | None
    error: float


class Levels:
    """What some blocks of one shape may become.

    Attributes
    ----------
    blocks
        These blocks, stacked.
    kept
        Bytes that each takes if it stays as it is, int64 (n,), as far as that is known.
    """

    def __init__(self, blocks: MatrixView) -> None:
        numbers = np.arange(blocks.grid.count)
        self.blocks = blocks
        self._plain = codec.encode_blocks(blocks, numbers, planes=True).lengths
        self.kept = self._plain.copy()
        self._offered: list[list[Level]] = [[] for _ in numbers]

    def best(self) -> Iterator[tuple[int, list[Level]]]:
        """Yield the contents to try for each row, the most saving first, each nearer than those."""
        limits = delta_limits(self.kept)
        for row, offered in enumerate(self._offered):
            best: list[Level] = []
            for level in sorted(offered, key=lambda level: (-level.saved, level.error)):
                if self._plain[row] - level.saved > limits[row]:
                    break
                if not best or level.error < best[-1].error:
                    best.append(level)
            if best:
                yield row, best

    def add_stored(self, row: int, content: NDArray[Any], error: float) -> None:
        """Offer a stored block."""
        level = Level(partial(_same, content), int(self._plain[row]), None, error)
        self._offered[row].append(level)

    def settle(self, pairs: Pairs) -> None:
        """Let it be known what blocks take that stay as they are: deltas that give their bits."""
        encoded, costs = deltas_of(self.blocks, pairs, self.kept, None)
        good = np.flatnonzero(encoded.lengths > 0)
        self.kept[pairs.rows[good]] = costs[good]

    def add_deltas(self, pairs: Pairs, bound: float) -> None:
        """Offer deltas within a bound."""
        encoded, costs = deltas_of(self.blocks, pairs, self.kept, bound)
        tags = codec.base_tags(hash_view(pairs.bases))
        for i, (row, payload) in enumerate(zip(pairs.rows.tolist(), encoded.pieces(), strict=True)):
            # An exact one is what a block has that stays as it is.
            if not len(payload) or encoded.encodings[i] != codec.Encoding.QUANTISED:
                continue
            base = int(pairs.base_index[i])
            delta = Delta(
                int(pairs.references[i]),
                int(tags[base]),
                payload.copy(),
                int(codec.Encoding.QUANTISED),
            )
            content = partial(_decoded, delta, self.blocks, pairs.bases, base)
            level = Level(content, int(self._plain[row] - costs[i]), delta, bound)
            self._offered[row].append(level)


class MovedBases:
    """Deltas of blocks of one tensor on bases that factors move (low_rank.py).

    ``fresh``, ``aligned`` and ``transposed`` are as `LowRankRelatives` takes them. ``bounds`` are
    the errors of the deltas that are offered.
    """

    def __init__(
        self,
        reader: BlockReader,
        view: MatrixView,
        fresh: NDArray[np.int64],
        bounds: list[float],
        aligned: ByPosition,
        transposed: ByTransposition | None,
    ) -> None:
        def relatives(policy: Policy) -> LowRankRelatives:
            return LowRankRelatives(
                reader, view, fresh, policy, aligned, transposed=transposed, keeps=True
            )

        self._reader = reader
        self._bounds = bounds
        self._exact = relatives(Lossless())
        # The same factors for each bound: blocks on a page that differ in theirs share none.
        self._near = None
        if bounds:
            # Kept as well: blocks at the edge of all parts come after the others.
            self._near = relatives(Bounded(min(bounds)))

    @property
    def exact(self) -> Mapping[int, Moved]:
        """What moves the bases of blocks that stay as they are; see `LowRankRelatives`."""
        return self._exact.found

    def settle(self, levels: Levels, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Let it be known what blocks take that stay as they are.

        Returns the bases that are moved, `NO_BASE` of blocks that have none.
        """
        bases = np.full(len(numbers), NO_BASE, np.int64)
        shape = levels.blocks.grid.block_shape
        for rows, moved in self._exact.of(numbers):
            pairs = moved.pairs(self._reader, rows, numbers[rows], shape)
            levels.settle(pairs)
            bases[rows] = pairs.references
        return bases

    def add_to(
        self,
        levels: Levels,
        numbers: NDArray[np.int64],
        least: NDArray[np.float64],
        known: Sequence[Pairs],
    ) -> None:
        """Offer deltas for blocks whose nearest stored one is not within all bounds.

        ``known`` are pairs whose bases are in memory.
        """
        if self._near is None:
            return
        shape = levels.blocks.grid.block_shape
        far = np.flatnonzero(least > min(self._bounds))
        for at, moved in self._near.of(numbers[far]):
            rows = far[at]
            pairs = moved.pairs(self._reader, rows, numbers[rows], shape)
            pairs = _with_bases_of(known, pairs)
            for bound in self._bounds:
                levels.add_deltas(pairs, bound)


def _with_bases_of(others: Sequence[Pairs], pairs: Pairs) -> Pairs:
    """Return pairs with the same bases where these are in memory, which levels stay in."""
    for other in others:
        there = dict(zip(other.references.tolist(), other.base_index.tolist(), strict=True))
        index = [there.get(reference, -1) for reference in pairs.references.tolist()]
        if -1 not in index and other.bases.dtype == pairs.bases.dtype:
            return replace(pairs, bases=other.bases, base_index=np.array(index, np.int64))
    return pairs


def _same(content: NDArray[Any]) -> NDArray[Any]:
    return content


def _decoded(delta: Delta, blocks: MatrixView, bases: MatrixView, base: int) -> NDArray[Any]:
    which = np.zeros(1, np.int64)
    one = decode_deltas(encoded_blocks([delta]), which, blocks, bases, which + base)
    content: NDArray[Any] = values_of(one)[0]
    return content
