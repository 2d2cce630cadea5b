# SPDX-License-Identifier: Apache-2.0
"""Blocks of several tensors, stacked, whose tensors are each asked about their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import MatrixView
from pydedup.ingest.aligned import Kinship, Neighbours, Relation, Relative
from pydedup.ingest.asked import ByTransposition, GiveBlock
from pydedup.ingest.spool import NO_BASE

__all__ = ["Asked", "Together", "Transposes", "transposed_of"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked about a tensor in a bundle, and whether an adapter may be looked for."""

    neighbours: Neighbours
    transposed: ByTransposition | None
    can_be_adapted: bool


@dataclass(frozen=True, slots=True)
class Together:
    """Candidates for stacked blocks (`ByPosition`, and `Related` of aligned.py).

    ``owners`` says which tensor each block of the stack is of, ``numbers`` which block of that.
    """

    of_tensors: Sequence[Asked]
    owners: NDArray[np.int64]
    numbers: NDArray[np.int64]
    asked: list[tuple[Neighbours, slice]] = field(default_factory=list)

    @property
    def kinship(self) -> Kinship:
        """What is known of the relatives of all of these."""
        return self.of_tensors[0].neighbours.kinship  # they are of one model

    def relatives(self, rows: NDArray[np.int64], most: int) -> list[Relative]:
        """Return models of which every tensor has something there."""
        parts = self._parts(rows)
        found: dict[Relation, list[NDArray[np.int64]]] = {}
        for neighbours, at in parts:
            for one in neighbours.relatives(self.numbers[rows[at]], most):
                found.setdefault(one.relation, []).append(one.blocks)
        return [
            Relative(np.concatenate(blocks), relation)
            for relation, blocks in found.items()
            if len(blocks) == len(parts)
        ]

    def _parts(self, rows: NDArray[np.int64]) -> list[tuple[Neighbours, slice]]:
        return [(self.of_tensors[owner].neighbours, at) for owner, at in _parts(self.owners[rows])]

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the candidates that each tensor's own gives."""
        self.asked[:] = self._parts(rows)
        return np.concatenate(
            [neighbours(self.numbers[rows[at]]) for neighbours, at in self.asked], axis=1
        )

    def note(self, helped: NDArray[np.bool_]) -> None:
        """Say which of these were of help."""
        # Only now is known who is a relative: the tensors were asked about together.
        for neighbours, at in self.asked:
            neighbours.note(helped[:, at])


@dataclass(frozen=True, slots=True)
class Transposes:
    """Bases to transpose for stacked blocks, likewise (a `ByTransposition`)."""

    of_tensors: Sequence[Asked]
    owners: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @property
    def is_likely(self) -> bool:
        """Whether another tensor of the model is the transpose of something."""
        return any(one.transposed and one.transposed.is_likely for one in self.of_tensors)

    def __call__(self, numbers: NDArray[np.int64], block: GiveBlock) -> NDArray[np.int64]:
        """Return what each tensor's own gives."""
        found = np.full(len(numbers), NO_BASE, np.int64)
        for owner, at in _parts(self.owners[numbers]):
            transposed = self.of_tensors[owner].transposed
            if transposed is not None:
                within = partial(_within, block, at.start)
                found[at] = transposed(self.numbers[numbers[at]], within)
        return found


def transposed_of(
    by: ByTransposition | None, number: NDArray[np.int64], block: MatrixView
) -> NDArray[np.int64]:
    """Return what a block is like if it is transposed, or `NO_BASE`; (1,)."""
    if by is None:
        return np.full(1, NO_BASE, np.int64)
    return by(number, lambda _: block)


def _within(block: GiveBlock, start: int, index: int) -> MatrixView:
    return block(start + index)


def _parts(owners: NDArray[np.int64]) -> list[tuple[int, slice]]:
    """Return the tensors that blocks are of, and which these are; each's follow one another."""
    edges = np.flatnonzero(np.diff(owners, prepend=-1, append=-1)).tolist()
    return [(int(owners[start]), slice(start, stop)) for start, stop in pairwise(edges)]
