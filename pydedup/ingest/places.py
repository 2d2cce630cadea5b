# SPDX-License-Identifier: Apache-2.0
"""Where blocks are that an add refers to: on its spool, or on pages of the store.

References are int64: n >= 0 is block n of the spool, n < 0 is entry -(n+1) of the stored table.
Blocks of both kinds are read here alike, deltas included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import codec
from pydedup.blocks import BlockGrid, MatrixView
from pydedup.errors import CorruptStoreError
from pydedup.ingest.scan import PageScan
from pydedup.ingest.spool import NO_BASE, Spool, Window
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import are_deltas, by_page, joined, shape_codes, slot_entries, split_places
from pydedup.sets import distinct, in_parts
from pydedup.types import DType

__all__ = [
    "BlockReader",
    "as_stack",
    "block_of",
    "by_shape",
    "in_pieces",
    "stack_blocks",
    "stacked",
    "transposed_stack",
    "values_of",
]

# Bytes and number of blocks that are encoded in one go: candidates for each, and what is encoded,
# lie beside them in memory.
_PIECE_BYTES = 2 * 1024 * 1024
_PIECE_BLOCKS = 128

_Value = TypeVar("_Value", bound=np.generic)


class BlockReader:
    """Reads blocks by reference."""

    def __init__(self, scan: PageScan, spool: Spool, stored: StoredTable) -> None:
        self._scan = scan
        self._spool = spool
        self._stored = stored

    def bases_of(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the references of bases, `NO_BASE` where a block is no delta."""
        return _of_each(references, self._spool.bases, self._stored.bases_of)

    def plain(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the references of blocks that are no deltas: of each itself, or of its base."""
        bases = self.bases_of(references)
        return np.where(bases == NO_BASE, references, bases)

    def costs_of(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what blocks take on their pages, in bytes."""
        return _of_each(references, self._spool.costs, self._stored.costs_of)

    def windows(self, references: NDArray[np.int64]) -> Iterator[Window]:
        """Walk over blocks as `PagePool.windows` does; also yields the slots."""
        if not len(references):
            return
        spooled = np.flatnonzero(references >= 0)
        for rows, pages, page_index, slots in self._spool.windows(references[spooled]):
            yield spooled[rows], pages, page_index, slots
        stored = np.flatnonzero(references < 0)
        if not len(stored):
            return
        page_ids, slots = split_places(self._stored.places(references[stored]))
        for rows, pages, page_index in self._scan.windows(page_ids):
            self._stored.note(references[stored[rows]], pages, page_index, slots[rows])
            yield stored[rows], pages, page_index, slots[rows]

    def learn(self, references: NDArray[np.int64]) -> None:
        """Look at blocks, so that the stored table knows what they take and their dtypes."""
        for _ in self.windows(references):
            pass  # noted on the way

    def beside(self, references: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return references of the blocks that come so many behind these: on the page, or spool.

        `NO_BASE` where there is none, one of another dtype or shape, or a delta.
        """
        found = np.full(len(references), NO_BASE, np.int64)
        new = np.flatnonzero(references >= 0)
        numbers = references[new] + steps[new]
        there = (numbers >= 0) & (numbers < self._spool.count)
        found[new[there]] = numbers[there]
        stored = np.flatnonzero(references < 0)
        for rows, pages, page_index, slots in self.windows(references[stored]):
            at = stored[rows]
            counts = np.array([page.n_slots for page in pages], np.int64)[page_index]
            inside = (slots + steps[at] >= 0) & (slots + steps[at] < counts)
            at = at[inside]
            places = self._stored.places(references[at]) + steps[at]
            found[at] = self._stored.references_at(places)
        given = np.flatnonzero(found != NO_BASE)
        both = self._entries(np.concatenate([references[given], found[given]]))
        mine, its = both[: len(given)], both[len(given) :]
        alike = ~are_deltas(its["encoding"])
        for column in ("dtype", "rows", "cols"):
            alike &= its[column] == mine[column]
        found[given[~alike]] = NO_BASE
        return found

    def _entries(self, references: NDArray[np.int64]) -> NDArray[np.void]:
        """Return the slot of each block."""
        entries = np.empty(len(references), codec.SLOT_DTYPE)
        for rows, pages, page_index, slots in self.windows(references):
            entries[rows] = slot_entries(pages, page_index, slots)
        return entries

    def by_dtype(
        self, references: NDArray[np.int64], rows: ArrayLike, cols: ArrayLike
    ) -> dict[DType, NDArray[np.int64]]:
        """Return per dtype which blocks have it, but those of other rows or columns than that.

        A block is a delta on what has its own shape, or that transposed (transposed.py).
        """
        stored = distinct(references[references < 0])
        self.learn(stored[self._stored.dtypes_of(stored) == 0])
        codes = _of_each(references, self._spool.dtypes, self._stored.dtypes_of)
        shapes = _of_each(references, self._spool.shapes, self._stored.shapes_of)
        codes[shapes != shape_codes(rows, cols)] = 0
        found = [code for code in dict.fromkeys(codes.tolist()) if code]
        return {DType.of_code(code): np.flatnonzero(codes == code) for code in found}

    def dtype_of_all(
        self, references: NDArray[np.int64], rows: ArrayLike, cols: ArrayLike
    ) -> DType | None:
        """Return the dtype of these blocks; ``None`` if some differ in it, or from that shape."""
        by_dtype = self.by_dtype(references, rows, cols)
        return next((t for t, which in by_dtype.items() if len(which) == len(references)), None)

    def read(
        self,
        references: NDArray[np.int64],
        dtype: DType,
        shape: tuple[int, int],
        *,
        is_transposed: bool = False,
    ) -> MatrixView:
        """Return blocks of one dtype and shape, stacked: block i is block i of the result.

        With ``is_transposed``, that is the shape that they have when transposed, as they then are.
        """
        if is_transposed:
            return transposed_stack(self.read(references, dtype, shape[::-1]))
        with self._blamed(references, lambda at: self._read(references[at], dtype, shape)):
            return self._read(references, dtype, shape)

    def _read(
        self, references: NDArray[np.int64], dtype: DType, shape: tuple[int, int]
    ) -> MatrixView:
        out = stacked(len(references), dtype, shape)
        bases = self.bases_of(references)
        for rows, pages, page_index, slots in self.windows(references):
            plain = bases[rows] == NO_BASE
            codec.read_blocks(out, rows[plain], pages, page_index[plain], slots[plain])
            deltas = np.flatnonzero(~plain)
            for at, base_pages, base_index, base_slots in self.windows(bases[rows[deltas]]):
                some = deltas[at]
                codec.read_blocks(
                    out,
                    rows[some],
                    pages,
                    page_index[some],
                    slots[some],
                    bases=codec.StoredBases(base_pages, base_index.astype(np.int64), base_slots),
                )
        return out

    def equal(
        self, view: MatrixView, indices: NDArray[np.int64], references: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Compare blocks of a matrix with stored ones: dtype, shape and all bytes."""
        with self._blamed(references, lambda at: self._equal(view, indices[at], references[at])):
            return self._equal(view, indices, references)

    @contextmanager
    def _blamed(
        self, references: NDArray[np.int64], look: Callable[[NDArray[np.int64]], object]
    ) -> Iterator[None]:
        """Make an error name the pages whose blocks are not as recorded; ``look`` reads some."""
        try:
            yield
        except CorruptStoreError as exc:
            stored = np.flatnonzero(references < 0)
            for page_id, at in by_page(self._stored.pages(references[stored])):
                if exc.page_ids:
                    raise
                try:
                    look(stored[at])
                except CorruptStoreError:
                    exc.page_ids = (page_id,)
            raise

    def _equal(
        self, view: MatrixView, indices: NDArray[np.int64], references: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        equal = np.zeros(len(indices), np.bool_)
        if not len(indices):
            return equal
        bases = self.bases_of(references)
        heights, widths = view.grid.shapes(indices)
        deltas: list[NDArray[np.int64]] = []
        for rows, pages, page_index, slots in self.windows(references):
            is_delta = bases[rows] != NO_BASE
            plain = rows[~is_delta]
            equal[plain] = codec.blocks_equal(
                view, indices[plain], pages, page_index[~is_delta], slots[~is_delta]
            )
            if is_delta.any():
                fits = _have_shape(
                    pages, page_index, slots, view.dtype, heights[rows], widths[rows]
                )
                deltas.append(rows[is_delta & fits])
        rest = joined(deltas)
        for shape, some in by_shape(view, indices[rest]):
            at = rest[some]
            found = self.read(references[at], view.dtype, shape).data
            given = stack_blocks(view, indices[at], shape).data
            equal[at] = (found == given).reshape(len(at), -1).all(axis=1)
        return equal


def _of_each(
    references: NDArray[np.int64],
    spooled: NDArray[_Value],
    stored: Callable[[NDArray[np.int64]], NDArray[Any]],
) -> NDArray[_Value]:
    """Return what is known of each block: of the spool's by number, of the store's by reference."""
    found = np.empty(len(references), spooled.dtype)
    new = references >= 0
    found[new] = spooled[references[new]]
    found[~new] = stored(references[~new])
    return found


def by_shape(
    view: MatrixView, indices: NDArray[np.int64]
) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
    """Yield ((height, width), which of these blocks have it); at most four times."""
    heights, widths = view.grid.shapes(indices)
    for height in _distinct(heights):
        of_height = heights == height
        for width in _distinct(widths[of_height]):
            yield (height, width), np.flatnonzero(of_height & (widths == width))


def _distinct(sides: NDArray[np.int64]) -> list[int]:
    """Return the distinct ones of these heights or widths, of which a grid has at most two."""
    return sorted({int(sides.min()), int(sides.max())}) if len(sides) else []


def in_pieces(
    numbers: NDArray[np.int64], dtype: DType, shape: tuple[int, int]
) -> Iterator[NDArray[np.int64]]:
    """Cut a list of blocks, of that shape at most, into what is decoded or encoded in one go."""
    block_bytes = max(shape[0] * shape[1] * dtype.itemsize, 1)
    step = max(1, min(_PIECE_BLOCKS, _PIECE_BYTES // block_bytes))
    return in_parts(numbers, step)


def as_stack(data: NDArray[np.uint8], dtype: DType, shape: tuple[int, int]) -> MatrixView:
    """Return rows of bytes as a matrix that is blocks one below the other."""
    height, width = shape
    return MatrixView(data, dtype, BlockGrid(len(data), width, height, width))


def stacked(count: int, dtype: DType, shape: tuple[int, int]) -> MatrixView:
    """Return room for so many stacked blocks, not filled."""
    height, width = shape
    return as_stack(np.empty((count * height, width * dtype.itemsize), np.uint8), dtype, shape)


def values_of(blocks: MatrixView) -> NDArray[Any]:
    """Return stacked blocks as numbers of shape (n, rows, cols)."""
    return blocks.data.view(blocks.dtype.numpy).reshape(-1, *blocks.grid.block_shape)


def transposed_stack(blocks: MatrixView) -> MatrixView:
    """Return stacked blocks, each of them transposed."""
    height, width = blocks.grid.block_shape
    item = blocks.dtype.itemsize
    bits = blocks.data.reshape(-1, height, width, item).swapaxes(1, 2)
    data = np.ascontiguousarray(bits).reshape(-1, height * item)
    return as_stack(data, blocks.dtype, (width, height))


def stack_blocks(
    view: MatrixView, indices: NDArray[np.int64], shape: tuple[int, int]
) -> MatrixView:
    """Copy blocks of one shape out of a matrix, one below the other."""
    grid = view.grid
    height, width = shape[0], shape[1] * view.dtype.itemsize
    if shape == grid.block_shape:
        down, across = grid.rows // height, grid.cols // shape[1]
        whole = view.data[: down * height, : across * width]
        rows, cols = np.divmod(indices, grid.grid_cols)
        blocks = whole.reshape(down, height, across, width).swapaxes(1, 2)[rows, cols]
        return as_stack(blocks.reshape(-1, width), view.dtype, shape)
    out = stacked(len(indices), view.dtype, shape)
    for i, index in enumerate(indices.tolist()):
        out.data[i * height : (i + 1) * height] = view.block(index)
    return out


def block_of(view: MatrixView, numbers: NDArray[np.int64], index: int) -> MatrixView:
    """Copy one of some blocks out of a matrix, stacked alone."""
    number = numbers[index : index + 1]
    (height,), (width,) = view.grid.shapes(number)
    return stack_blocks(view, number, (int(height), int(width)))


def _have_shape(
    pages: Sequence[codec.Page],
    page_index: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    dtype: DType,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.bool_]:
    entries = slot_entries(pages, page_index, slots)
    same = (entries["dtype"] == dtype.code) & (entries["rows"] == heights)
    return np.asarray(same & (entries["cols"] == widths), np.bool_)
