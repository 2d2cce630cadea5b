# SPDX-License-Identifier: Apache-2.0
"""The blocks of one model, tensor by tensor: how many others use each, and which are deltas."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import BlockMap
from pydedup.layout import base_places, places_of
from pydedup.report.families import Common
from pydedup.types import TensorInfo

__all__ = ["NOTHING", "Kind", "TensorBlocks", "blocks_of", "picture"]


class Kind(enum.IntEnum):
    """What a block is to other models; the order is that of the legend."""

    OWN = 0
    DELTA = 1
    ONE = 2
    FEW = 3
    SOME = 4
    MANY = 5

    @property
    def words(self) -> str:
        """Its name in a legend."""
        return _WORDS[self]


_WORDS = {
    Kind.OWN: "used by this model alone",
    Kind.DELTA: "a delta, used by this model alone",
    Kind.ONE: "shared with 1 other model",
    Kind.FEW: "with 2 or 3",
    Kind.SOME: "with 4 to 9",
    Kind.MANY: "with 10 or more",
}
#: Of a picture's cell that stands for no block.
NOTHING = 255
# From so many other models on, a block is of the kinds ONE to MANY.
_STEPS = (1, 2, 4, 10)


@dataclass(frozen=True, slots=True, eq=False)
class TensorBlocks:
    """The blocks of one tensor.

    Attributes
    ----------
    kinds
        The `Kind` of each block where it lies in the tensor, uint8 (rows, cols).
    shared, deltas
        How many blocks other models use too, and how many are deltas.
    most_others
        The most other models that use one block.
    """

    tensor: TensorInfo
    kinds: NDArray[np.uint8]
    shared: int
    deltas: int
    most_others: int

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.kinds.size


def blocks_of(
    tensors: Sequence[TensorInfo], maps: Sequence[BlockMap], common: Common
) -> list[TensorBlocks]:
    """Return the blocks of a model's tensors, in order."""
    found = []
    for info, block_map in zip(tensors, maps, strict=True):
        others = common.others(places_of(block_map))
        kinds = np.zeros(len(others), np.uint8)
        for step, kind in zip(_STEPS, (Kind.ONE, Kind.FEW, Kind.SOME, Kind.MANY), strict=True):
            kinds[others >= step] = kind
        delta = base_places(block_map) >= 0
        kinds[delta & (others == 0)] = Kind.DELTA
        grid = block_map.grid
        found.append(
            TensorBlocks(
                tensor=info,
                kinds=kinds.reshape(grid.grid_rows, grid.grid_cols),
                shared=int((others > 0).sum()),
                deltas=int(delta.sum()),
                most_others=int(others.max(initial=0)),
            )
        )
    return found


def picture(kinds: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return at most ``height`` x ``width`` cells, each of the kind that most of its blocks are.

    A long, narrow tensor is laid in columns, from top to bottom and then from left to right, as
    text in a newspaper: its blocks would be too small to see otherwise. Cells of the last column
    that no block is left for are `NOTHING`.
    """
    rows, cols = kinds.shape
    if not kinds.size:
        return np.zeros((0, 0), np.uint8)
    if rows > height and cols < width // 2:
        folds = min(-(-rows // height), max(width // cols, 1))
        tall = -(-rows // folds)
        padded = np.full((tall * folds, cols), NOTHING, np.uint8)
        padded[:rows] = kinds
        kinds = np.concatenate(np.split(padded, folds), axis=1)
    return _most_frequent(_most_frequent(kinds, height).T, width).T


def _most_frequent(kinds: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Put rows together until there are at most so many."""
    rows = len(kinds)
    if rows <= most:
        return kinds
    edges = np.linspace(0, rows, most + 1).astype(np.int64)[:-1]
    counts = np.stack(
        [np.add.reduceat(kinds == kind, edges, axis=0, dtype=np.int64) for kind in Kind]
    )
    merged: NDArray[np.uint8] = counts.argmax(axis=0).astype(np.uint8)
    merged[counts.sum(axis=0) == 0] = NOTHING
    return merged
