# SPDX-License-Identifier: Apache-2.0
"""Relatives with a merged adapter: blocks that differ from their bases by a product of low rank.

What blocks of a row, and of a column, of a matrix have in common no block can tell alone. So the
difference of many blocks to what is at their place in a relative is looked at together, and if it
has a low rank (factors.py) each block has its part of the factors; a page keeps a part that several
of its blocks have only once (docs/format.md, "Version 3").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import BlockGrid, MatrixView
from pydedup.ingest.asked import ByPosition, ByTransposition
from pydedup.ingest.differences import FACTORED, OF_ERROR, difference_of, sample_of, seems_moved
from pydedup.ingest.factors import Factors, factor_bytes, find_factors, refit
from pydedup.ingest.pairs import Pairs, farthest_base, pairs_on
from pydedup.ingest.places import BlockReader, block_of, stack_blocks
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Policy
from pydedup.sets import distinct, find_among
from pydedup.types import DType

__all__ = [
    "LEAST_SIDE",
    "Adapted",
    "Looks",
    "LowRankRelatives",
    "Moved",
    "edges_together",
]

# Elements whose difference is looked at together, in float32 2 MiB; more where there are so many
# columns that it would be few rows, up to 16 MiB.
_TOGETHER, _MOST_TOGETHER = 512 * 1024, 4 * 1024 * 1024
_ROWS = 512
# The part of all these blocks that must be new, at least.
_FRESH = 0.5
# Parts of a matrix that seemed to have a low rank and had none, after which it is not looked at
# again.
_PATIENCE = 2
# Looks in vain, on end, after which a tensor, and its model, is looked at no more: who trained all
# weights of some tensors did so with most. Small ones have less to save.
_LOOKS_AT_TENSOR, _LOOKS, _LOOKS_AT_SMALL = 2, 6, 4
#: Rows and columns of a small tensor that factors may be worth their bytes for.
LEAST_SIDE = 32
# Blocks of a page that have a factor in common, at most, when it is weighed whether one pays.
_USERS = 8
_NOTHING: Mapping[int, Moved] = MappingProxyType({})

_Near = Callable[
    [MatrixView, NDArray[np.int64], float, NDArray[np.int64]],
    Sequence[Pairs],
]


class Looks:
    """Looks for adapters that were merged into the tensors, small ones or others, of one model.

    After ``most`` in vain, on end, they are over.
    """

    def __init__(self, most: int = _LOOKS) -> None:
        self._most = most
        self._vain = 0

    @property
    def are_over(self) -> bool:
        """Whether it was looked for them in vain often enough."""
        return self._vain >= self._most

    def note(self, found: bool) -> None:
        """Remember what came of one."""
        self._vain = 0 if found else self._vain + 1


@dataclass(frozen=True, slots=True)
class Moved:
    """Rows of blocks of a matrix whose bases, moved by factors, they are near to.

    Attributes
    ----------
    grid
        Of the matrix.
    first_row
        Of the matrix, where the factors begin.
    references
        Of the bases of all blocks from there on.
    factors
        Of all these blocks.
    is_transposed
        Whether the bases are transposed first.
    """

    grid: BlockGrid
    first_row: int
    references: NDArray[np.int64]
    factors: Factors
    is_transposed: bool = False

    def bases_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return references of the bases of some blocks, by their numbers in the matrix."""
        return self.references[numbers - self.first_row * self.grid.grid_cols]

    def _factors_of(
        self, numbers: NDArray[np.int64], shape: tuple[int, int]
    ) -> codec.LowRankFactors:
        """Return the factors of some blocks of one shape."""
        down, across = np.divmod(numbers, self.grid.grid_cols)
        tall, wide = self.grid.block_shape
        rows, row_of = _parts(self.factors.of_rows, down - self.first_row, tall, shape[0])
        cols, col_of = _parts(self.factors.of_cols, across, wide, shape[1])
        return codec.LowRankFactors(self.factors.exponent, rows, cols, row_of, col_of)

    def pairs(
        self,
        reader: BlockReader,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        shape: tuple[int, int],
    ) -> Pairs:
        """Return rows of a stack with their bases, which are moved; ``numbers`` are theirs."""
        bases, is_transposed = self.bases_of(numbers), self.is_transposed
        (pairs,) = pairs_on(reader, rows, bases, shape, is_transposed=is_transposed)
        factors = self._factors_of(numbers, shape)
        return replace(pairs, factors=factors, shared=self._shared_bytes(factors))

    def _shared_bytes(self, factors: codec.LowRankFactors) -> NDArray[np.int64]:
        """Return what a page saves of each block's factors, which others on it have too, about."""
        across = self.grid.grid_cols
        down = len(self.references) // across
        of_rows = factor_bytes(factors.of_rows)[factors.row_of]
        of_cols = factor_bytes(factors.of_cols)[factors.col_of]
        alone = of_rows // min(across, _USERS) + of_cols // min(down, _USERS)
        return np.asarray(of_rows + of_cols - alone, np.int64)


class LowRankRelatives:
    """Finds what moves the bases of blocks of one matrix. Not thread-safe.

    ``fresh`` are the blocks that are to be kept, ascending; ``aligned`` gives what is at their
    places, ``transposed`` what may be if one of the two is transposed. ``looks`` is of the model,
    ``known`` what another one found. What was found of the parts of a large matrix takes memory, so
    only the last is kept unless ``keeps`` says that all of `found` will be wanted.
    """

    def __init__(
        self,
        reader: BlockReader,
        view: MatrixView,
        fresh: NDArray[np.int64],
        policy: Policy,
        aligned: ByPosition,
        known: Mapping[int, Moved] = _NOTHING,
        looks: Looks | None = None,
        transposed: ByTransposition | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        self._reader = reader
        self._view = view
        self._fresh = fresh
        self._bound = policy.max_rel_error
        self._aligned = aligned
        self._transposed = transposed
        self._patience = _PATIENCE if view.dtype in FACTORED else 0
        self._looks = Looks() if looks is None else looks
        self._left = {False: _LOOKS_AT_TENSOR, True: _LOOKS_AT_TENSOR}  # is it transposed?
        self._edges = _edges_of_parts(view)
        self._given = known
        self._keeps = keeps
        self._known: dict[int, Moved | None] = dict(known)
        self._factors: Factors | None = None  # of the rows before

    @property
    def found(self) -> Mapping[int, Moved]:
        """What moves the bases of parts of the matrix, of those that were looked at."""
        return {part: moved for part, moved in self._known.items() if moved is not None}

    def turn_to(self, fresh: NDArray[np.int64]) -> None:
        """Go on with other blocks that are to be kept, ascending, with what is known of factors."""
        self._fresh = fresh
        self._known = dict(self._given)

    def of(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Moved]]:
        """Yield which of some blocks, ascending, have bases that were moved, and by what."""
        rows_of_grid = numbers // max(self._view.grid.grid_cols, 1)
        parts = np.searchsorted(self._edges, rows_of_grid, side="right") - 1
        for part in distinct(parts).tolist():
            if part not in self._known:
                if not self._keeps:
                    self._known = dict(self._given)
                self._known[part] = self._find(part)
            moved = self._known[part]
            if moved is not None:
                rows = np.flatnonzero(parts == part)
                rows = rows[moved.bases_of(numbers[rows]) != NO_BASE]
                if len(rows):
                    yield rows, moved

    def _find(self, part: int) -> Moved | None:
        first, stop = self._edges[part : part + 2].tolist()
        across = self._view.grid.grid_cols
        numbers = np.arange(first * across, stop * across)
        _, is_fresh = find_among(self._fresh, numbers)
        if self._patience == 0 or is_fresh.mean() < _FRESH:
            return None
        looked_at: list[tuple[bytes, bool]] = []
        for references, is_transposed in self._candidates(numbers, is_fresh):
            key = references.tobytes(), is_transposed
            if key not in looked_at and not (references[is_fresh] == NO_BASE).any():
                looked_at.append(key)
                chosen = np.where(is_fresh, references, NO_BASE)
                moved = self._moved(first, numbers, chosen, is_transposed)
                if moved is not None:
                    return moved
        return None

    def _candidates(
        self, numbers: NDArray[np.int64], is_fresh: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], bool]]:
        """Yield what may be the bases of blocks, as far as it pays, and whether transposed."""
        by_transposition = self._transposed
        is_likely = by_transposition is not None and by_transposition.is_likely
        if not is_likely:
            yield from self._at_their_places(numbers)
        if by_transposition is not None and self._is_worth_a_look(True):
            fresh = numbers[is_fresh]
            references = np.full(len(numbers), NO_BASE, np.int64)
            references[is_fresh] = by_transposition(fresh, partial(block_of, self._view, fresh))
            yield references, True
        if is_likely:
            yield from self._at_their_places(numbers)

    def _at_their_places(
        self, numbers: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], bool]]:
        for references in self._aligned(numbers):
            if not self._is_worth_a_look(False):
                return
            yield references, False

    def _is_worth_a_look(self, is_transposed: bool) -> bool:
        return self._left[is_transposed] > 0 and not self._looks.are_over

    def _moved(
        self,
        first: int,
        numbers: NDArray[np.int64],
        references: NDArray[np.int64],
        is_transposed: bool,
    ) -> Moved | None:
        """Return what moves these bases of blocks, which are whole rows of the grid.

        Blocks with `NO_BASE` are known already: as if nothing moved them.
        """
        grid = self._view.grid
        given = np.flatnonzero(references != NO_BASE)
        rows, cols = grid.shapes(numbers[given])
        sides = (cols, rows) if is_transposed else (rows, cols)
        dtype = self._reader.dtype_of_all(references[given], *sides)
        if dtype is None:
            return None
        sample = sample_of(grid, references != NO_BASE)
        if not len(sample):
            return None
        seems = seems_moved(
            self._reader,
            self._view,
            numbers[sample],
            references[sample],
            dtype,
            self._bound,
            is_transposed=is_transposed,
        )
        self._looks.note(seems)
        self._left[is_transposed] = _LOOKS_AT_TENSOR if seems else self._left[is_transposed] - 1
        if not seems:
            return None
        self._patience -= 1
        difference = difference_of(
            self._reader, self._view, numbers, references, dtype, is_transposed=is_transposed
        )
        if not np.isfinite(difference.apart).all():
            return None
        error = self._bound * difference.size * OF_ERROR
        factors = None if self._factors is None else refit(difference, self._factors, error)
        if factors is None:
            factors = find_factors(difference, error)
        if factors is None:
            return None
        self._patience += 1
        self._factors = factors
        return Moved(grid, first, references, factors, is_transposed)


class Adapted:
    """Says into which small tensors of one model an adapter seems to have been merged.

    ``near`` says what stacked blocks are near to (`Similar.pairs`).
    """

    def __init__(self, reader: BlockReader, near: _Near, policy: Policy) -> None:
        self._reader = reader
        self._near = near
        self._takes = policy.uses_deltas
        self._bound = policy.max_rel_error
        self._farthest = farthest_base(self._bound)
        self._looks = Looks(_LOOKS_AT_SMALL)

    def can_be(self, grid: BlockGrid, dtype: DType) -> bool:
        """Return whether a tensor is worth a look."""
        return self._takes and min(grid.rows, grid.cols) >= LEAST_SIDE and dtype in FACTORED

    def __call__(
        self,
        view: MatrixView,
        number: int,
        aligned: Callable[[], NDArray[np.int64]],
        transposed: Callable[[MatrixView], NDArray[np.int64]],
    ) -> tuple[int, bool] | None:
        """Return what one of stacked blocks differs from by a low rank, and whether transposed.

        ``aligned`` gives candidates, int64 (k, 1), ``transposed`` one for the block, or `NO_BASE`.
        """
        if self._looks.are_over:
            return None
        numbers = np.array([number], np.int64)
        block = stack_blocks(view, numbers, view.grid.block_shape)
        for some in self._near(block, numbers, self._farthest, aligned()):
            for reference in distinct(some.references):
                if self._seems_moved(view, numbers, np.array([reference]), False):
                    return int(reference), False
        found = transposed(block)
        if found[0] != NO_BASE and self._seems_moved(view, numbers, found, True):
            return int(found[0]), True
        self._looks.note(False)
        return None

    def _seems_moved(
        self,
        view: MatrixView,
        numbers: NDArray[np.int64],
        references: NDArray[np.int64],
        is_transposed: bool,
    ) -> bool:
        shape = view.grid.block_shape
        dtype = self._reader.dtype_of_all(references, *(shape[::-1] if is_transposed else shape))
        seems = dtype is not None and seems_moved(
            self._reader, view, numbers, references, dtype, self._bound, is_transposed=is_transposed
        )
        if seems:
            self._looks.note(True)
        return seems


def edges_together(view: MatrixView) -> NDArray[np.int64]:
    """Return at which blocks those begin whose difference is looked at together, and the end."""
    return _edges_of_parts(view) * view.grid.grid_cols


def _edges_of_parts(view: MatrixView) -> NDArray[np.int64]:
    """Return the same in rows of the grid; of a stack, no part is of several matrices."""
    grid = view.grid
    together = max(_TOGETHER, min(_ROWS * grid.cols, _MOST_TOGETHER))
    height = max(together // max(grid.block_rows * grid.cols, 1), 1)
    edges = view.edges
    tops = [np.arange(top, end, height) for top, end in pairwise(edges.tolist())]
    return np.concatenate([*tops, edges[-1:]])


def _parts(
    factor: NDArray[np.int32], which: NDArray[np.int64], step: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the parts of a factor that some blocks of one length have, and of each block its."""
    chosen, index = np.unique(which, return_inverse=True)
    parts = [factor[:, i * step : i * step + length] for i in chosen.tolist()]
    return np.stack(parts), index.astype(np.int64)
