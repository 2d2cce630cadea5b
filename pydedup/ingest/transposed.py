# SPDX-License-Identifier: Apache-2.0
"""Matrices that others are the transpose of: what one framework keeps as (outputs, inputs).

PyTorch has the weights of a layer as (outputs, inputs), Keras and most nodes of an ONNX graph as
(inputs, outputs). So a model that was exported holds the same numbers, but no block of it is one of
what it came from. Where nothing else is very near to a block, it is looked for transposed; where
it is found tells which tensor the matrix is the transpose of, and its other blocks are compared
with those of that one, too. They become deltas on them (docs/format.md, "Version 4").

A graph that was optimised may have packed several matrices into one, as those of an attention layer
are, or a module has them so and the graph apart: of such a matrix each part is found like that, and
so is each matrix of a stack.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import ModelRow
from pydedup.blocks import BlockGrid, MatrixView, matrix_shape
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_view
from pydedup.ingest.alike import Find
from pydedup.ingest.asked import ByTransposition, GiveBlock
from pydedup.ingest.low_rank import Looks
from pydedup.ingest.match import Matcher
from pydedup.ingest.pairs import farthest_base
from pydedup.ingest.places import transposed_stack
from pydedup.ingest.plan import Request
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Policy
from pydedup.sets import distinct
from pydedup.types import TensorInfo

__all__ = ["Transposed"]

# Looks in vain after which a tensor is looked at no more, and, until one was found, all of a model;
# tensors that one is compared with, about.
_LOOKS_AT_TENSOR, _LOOKS_AT_MODEL = 2, 16
_MOST = 4096
# Parts of one matrix that are found.
_MOST_PARTS = 256

#: A model, of this add by its address, the name of one of its tensors, and what that gives.
_Found: TypeAlias = "tuple[int | str, str, _Bases]"


class Transposed:
    """Finds what the matrices of one model are the transpose of. Not thread-safe.

    ``asker`` is that model; ``policy`` says how far the base of a delta may be.
    """

    def __init__(self, matcher: Matcher, asker: Request | ModelRow, policy: Policy) -> None:
        self._matcher = matcher
        self._asker = asker
        self._takes = policy.uses_deltas
        self._farthest = farthest_base(policy.max_rel_error)
        # By shape, and at all, until one was found: then the model is an export. Of some shape all
        # may be kept as they were, as the projections in PyTorch's encoders are that end attention.
        self._looks: defaultdict[tuple[int, ...], Looks] = defaultdict(Looks)
        self._all_looks = Looks(_LOOKS_AT_MODEL)
        # Of which model the last one was, one of this add by its address, and all that were found.
        self._last: int | str | None = None
        self._found: set[tuple[int | str, str]] = set()

    def of(self, entry: TensorEntry | TensorInfo, grid: BlockGrid) -> ByTransposition | None:
        """Return what finds the bases of blocks of a tensor; ``None`` if it can have none."""
        is_stack = grid.rows != matrix_shape(entry.shape, 1)[0]
        if not self._takes or not (len(entry.shape) == 2 or is_stack):
            return None
        return _Transpose(self, entry, grid)

    @property
    def has_found(self) -> bool:
        """Whether some matrix of the model is the transpose of another."""
        return self._last is not None

    def look(
        self, entry: TensorEntry | TensorInfo, grid: BlockGrid, block: MatrixView, number: int
    ) -> _Bases | None:
        """Return what finds the bases of a tensor whose block of that number, transposed, is given.

        A tensor of the transposed shape has them in the mirrored places. Once there is none, one of
        this shape that was a delta on that still has them, in the same places. Else one that is a
        part of the transposed, or of which it is one.
        """
        looks = self._looks[entry.shape]
        if (looks.are_over or self._all_looks.are_over) and not self.has_found:
            return None
        near = self._near(block)
        if not near:
            self._note(looks, False)
            return None
        stored = np.array([base for base in near if base < 0], np.int64)
        pages = distinct(self._matcher.stored.pages(stored))
        best = self._whole(entry, grid, near, number, pages)
        if best is None:
            best = self._part(entry, grid, near, number, pages)
        self._note(looks, best is not None)
        if best is None:
            return None
        self._last, name, bases = best
        self._found.add((self._last, name))
        return bases

    def _whole(
        self,
        entry: TensorEntry | TensorInfo,
        grid: BlockGrid,
        near: list[int],
        number: int,
        pages: NDArray[np.int64],
    ) -> _Found | None:
        """Return the tensor, as long on both sides, that has the nearest of these at the place."""
        down, across = divmod(number, grid.grid_cols)
        asked = 0
        best: _Found | None = None
        for is_transposed in (True, False):
            at = across * grid.grid_rows + down if is_transposed else number
            for model, tensors in self._matcher.aligned.by_shape.alike(
                self._asker, entry, grid, self._last, pages, is_transposed=is_transposed
            ):
                if not near or asked > _MOST:
                    break
                asked += len(tensors)
                near, where = _nearest(near, tensors.blocks(at))
                if where:
                    # Layers come in one order: the next one is likely that after the last.
                    found = (tensors[i] for i in where)
                    name, find = min(found, key=lambda one: (model, one[0]) in self._found)
                    cut = grid.transposed if is_transposed else None
                    best = model, name, _Bases(find, grid, cut)
        return best

    def _part(
        self,
        entry: TensorEntry | TensorInfo,
        grid: BlockGrid,
        near: list[int],
        number: int,
        pages: NDArray[np.int64],
    ) -> _Found | None:
        """Return the tensor, as long on one side, that has the nearest of these where it may be."""
        down, across = divmod(number, grid.grid_cols)
        asked = 0
        best: _Found | None = None
        for model, cut, tensors in self._matcher.aligned.by_shape.parts(
            self._asker, entry, grid, self._last, pages
        ):
            if not near or asked > _MOST:
                break
            if cut.cols == grid.rows:  # it begins further up or down
                at = np.arange(cut.grid_rows) * cut.grid_cols + down
            else:
                at = across * cut.grid_cols + np.arange(cut.grid_cols)
            # As of layers, the next one is likely that after the last.
            for name, find in sorted(tensors, key=lambda one: (model, one[0]) in self._found):
                if not near:
                    break
                asked += 1
                near, where = _nearest(near, find(at, False))
                if where:
                    row, col = divmod(int(at[where[0]]), cut.grid_cols)
                    best = model, name, _Bases(find, grid, cut, row - across, col - down)
        return best

    def _note(self, looks: Looks, found: bool) -> None:
        looks.note(found)
        self._all_looks.note(found)

    def _near(self, block: MatrixView) -> list[int]:
        """Return references of blocks that are no deltas and like this one, nearest first."""
        matcher = self._matcher
        same = matcher.find(block, hash_view(block))
        if same[0] != NO_BASE:
            return [int(matcher.reader.plain(same)[0])]
        nothing = np.empty((0, 1), np.int64)
        pairs = matcher.similar.pairs(block, np.zeros(1, np.int64), self._farthest, nothing)
        near = [
            (away, base)
            for some in pairs
            for away, base in zip(some.estimates.tolist(), some.references.tolist(), strict=True)
        ]
        return [base for _, base in sorted(near)]


def _nearest(near: list[int], there: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Return where the first of ``near`` is among others that any is, behind those before it.

    What somebody else has may be one of these, which are nearer: all are, where there is none.
    """
    for place, base in enumerate(near):
        where = np.flatnonzero(there == base).tolist()
        if where:
            return near[:place], where
    return near, []


@dataclass(frozen=True, slots=True)
class _Bases:
    """The bases of blocks of a matrix: what another tensor has at their places.

    With ``cut``, how that one is cut, these are mirrored, and then so many blocks further down and
    to the right.
    """

    find: Find
    grid: BlockGrid
    cut: BlockGrid | None
    down: int = 0
    across: int = 0

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.cut is None:
            return self.find(numbers, False)
        places, are_there = self._places(numbers, self.cut)
        found = np.full(len(numbers), NO_BASE, np.int64)
        found[are_there] = self.find(places[are_there], False)
        return found

    def are_there(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of these blocks it has places for."""
        if self.cut is None:
            return np.ones(len(numbers), np.bool_)
        return self._places(numbers, self.cut)[1]

    def _places(
        self, numbers: NDArray[np.int64], cut: BlockGrid
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        down, across = np.divmod(numbers, self.grid.grid_cols)
        rows, cols = across + self.down, down + self.across
        are_there = (rows >= 0) & (rows < cut.grid_rows) & (cols >= 0) & (cols < cut.grid_cols)
        places = np.where(are_there, rows * cut.grid_cols + cols, 0)
        heights, widths = self.grid.shapes(numbers)
        its_heights, its_widths = cut.shapes(places)
        return places, are_there & (its_heights == widths) & (its_widths == heights)


class _Transpose:
    """The bases of blocks of one matrix (a `ByTransposition`)."""

    def __init__(self, of: Transposed, entry: TensorEntry | TensorInfo, grid: BlockGrid) -> None:
        self._of = of
        self._entry = entry
        self._grid = grid
        self._is_square = grid.rows == grid.cols and grid.count > 1
        self._left = _LOOKS_AT_TENSOR
        #: Of the whole matrix, or of its parts.
        self._bases: list[_Bases] = []

    @property
    def is_likely(self) -> bool:
        return self._of.has_found

    def __call__(self, numbers: NDArray[np.int64], block: GiveBlock) -> NDArray[np.int64]:
        found = np.full(len(numbers), NO_BASE, np.int64)
        missing = np.arange(len(numbers))
        known = list(self._bases)
        for _ in range(_MOST_PARTS):
            if not len(missing):
                break
            bases = known.pop(0) if known else self._look(numbers, missing, block)
            if bases is None:
                break
            found[missing] = bases(numbers[missing])
            missing = missing[~bases.are_there(numbers[missing])]
        return found

    def _look(
        self, numbers: NDArray[np.int64], missing: NDArray[np.int64], block: GiveBlock
    ) -> _Bases | None:
        """Return what gives the bases of one of the missing blocks, and of others."""
        if not self._left:
            return None
        # One whose place is another's in a square matrix that is not transposed: on the
        # diagonal, what is a delta on the same transpose has the same base.
        down, across = np.divmod(numbers[missing], self._grid.grid_cols)
        apart = missing[down != across] if self._is_square else missing
        rows = apart if len(apart) else missing
        sizes = np.prod(self._grid.shapes(numbers[rows]), axis=0)
        rows = rows[sizes == sizes.max()]  # at the edges too little may be left to be found
        chosen = int(rows[len(rows) // 2])
        turned = transposed_stack(block(chosen))
        bases = self._of.look(self._entry, self._grid, turned, int(numbers[chosen]))
        if bases is None:
            self._left -= 1
        elif len(apart):
            self._bases.append(bases)
        return bases
