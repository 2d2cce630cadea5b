# SPDX-License-Identifier: Apache-2.0
"""By what many blocks of a matrix differ from those that they are near to, seen together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydedup.arguments import as_dtype
from pydedup.blocks import BlockGrid, MatrixView
from pydedup.ingest.factors import Difference, seems_low_rank
from pydedup.ingest.places import BlockReader, by_shape, values_of
from pydedup.ingest.spool import NO_BASE
from pydedup.sets import in_parts, is_among
from pydedup.types import DType

__all__ = ["FACTORED", "OF_ERROR", "difference_of", "sample_of", "seems_moved"]

#: Dtypes of which differences have factors, whose numbers have fewer bits than f64 would need.
FACTORED = DType.F32, DType.F16, DType.BF16
#: Of the error that is allowed: how far a product of factors may be off.
OF_ERROR = 1 / 4
# Blocks of a row of a sample.
_ACROSS = 4
_WIDE = np.dtype(np.float64)
# Blocks whose bases are read in one go.
_AT_ONCE = 32


def sample_of(
    grid: BlockGrid, given: NDArray[np.bool_], edges: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return which blocks of whole rows of a grid are a sample, all of them given; may be none.

    It is a rectangle, since what lies between its blocks would be looked at, too, and in the
    middle, since the first rows of an embedding, for one, are of what is most frequent. At
    ``edges``, rows of the grid, other matrices begin (`MatrixView.edges`).
    """
    across = min(_ACROSS, grid.grid_cols)
    down = np.flatnonzero(given.reshape(-1, grid.grid_cols)[:, :across].all(axis=1))
    pairs = down[:-1][np.diff(down) == 1]
    if edges is not None:
        pairs = pairs[~is_among(pairs + 1, edges)]
    tops, height = (pairs, 2) if len(pairs) else (down, 1)
    rows = tops[len(tops) // 2 :][:1] + np.arange(height)
    return np.asarray((rows[:, np.newaxis] * grid.grid_cols + np.arange(across)).ravel(), np.int64)


def seems_moved(
    reader: BlockReader,
    view: MatrixView,
    numbers: NDArray[np.int64],
    references: NDArray[np.int64],
    dtype: DType,
    bound: float,
    *,
    is_transposed: bool = False,
    twice: bool = False,
) -> bool:
    """Return whether the blocks of a sample differ from others of that dtype by a low rank.

    Or, ``twice``, whether two that differ so from these others would from each other.
    """
    if view.dtype not in FACTORED:
        return False
    part = difference_of(reader, view, numbers, references, dtype, is_transposed=is_transposed)
    return seems_low_rank(part, bound * part.size * OF_ERROR, twice=twice)


def difference_of(
    reader: BlockReader,
    view: MatrixView,
    numbers: NDArray[np.int64],
    references: NDArray[np.int64],
    dtype: DType,
    *,
    is_transposed: bool = False,
) -> Difference:
    """Return a rectangle of blocks minus their bases of that dtype, 0 where there is none."""
    (rows, cols), (last_rows, last_cols) = (
        view.grid.area(number) for number in (int(numbers[0]), int(numbers[-1]))
    )
    top, left = rows.start, cols.start
    values = view.data[top : last_rows.stop].view(view.dtype.numpy)[:, left : last_cols.stop]
    apart = np.zeros(values.shape, np.float32)

    def place(number: int) -> tuple[slice, slice]:
        rows, cols = view.grid.area(number)
        return slice(rows.start - top, rows.stop - top), slice(cols.start - left, cols.stop - left)

    given = np.flatnonzero(references != NO_BASE)
    with np.errstate(all="ignore"):  # of NaN and infinities; whoever asks looks for these
        for shape, at in by_shape(view, numbers[given]):
            for some in in_parts(given[at], _AT_ONCE):
                bases = values_of(
                    reader.read(references[some], dtype, shape, is_transposed=is_transposed)
                )
                bases = as_dtype(bases, view.dtype.numpy)
                for number, base in zip(numbers[some].tolist(), bases, strict=True):
                    apart[place(number)] = base
        for start in range(0, len(apart), view.grid.block_rows):
            strip = slice(start, start + view.grid.block_rows)
            apart[strip] = as_dtype(values[strip], _WIDE) - apart[strip]
    corners = np.divmod(numbers[[0, -1]], view.grid.grid_cols)
    down, across = (np.arange(first, last + 1) for first, last in corners)
    every = (down[:, np.newaxis] * view.grid.grid_cols + across).ravel()
    for number in every[~is_among(every, numbers[given])].tolist():
        apart[place(number)] = 0
    return Difference(values, apart)
