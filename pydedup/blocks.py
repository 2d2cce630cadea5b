# SPDX-License-Identifier: Apache-2.0
"""Tensors as matrices, matrices as blocks, and where each block lies.

Here: the matrix view of a tensor, the default block shape, and the block map with its binary
form (docs/format.md, "Block map"). Deliberately not here: what is inside a block.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.arguments import as_block_shape, no_memory
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.sets import distinct
from pydedup.types import LARGEST_ID, DType

__all__ = [
    "DEFAULT_BLOCK_BYTES",
    "NO_PAGE",
    "PART_BYTES",
    "SLOT_BITS",
    "BlockGrid",
    "BlockMap",
    "MatrixView",
    "default_block_shape",
    "default_grid",
    "matrix_shape",
    "named_pages",
    "row_axes",
]

#: Bytes that a default block has at most, unless it is of a table. 16 KiB keeps rows that a
#: fine-tune did not touch shareable and fits the first-level cache of the streaming kernels.
DEFAULT_BLOCK_BYTES = 16 * 1024
# Elements of a block of f32, f16 or bf16: the same, so that variants of different precision are
# cut alike and a block of one can be the base of the other's.
_FLOAT_BLOCK_ELEMENTS = DEFAULT_BLOCK_BYTES // 4
_ALIKE = (DType.F32, DType.F16, DType.BF16)
_DEFAULT_BLOCK_COLS = 64
# A table, as of words: this many times as long as it is wide, at least. Its rows are read one by
# one and trained so, and hardly anything else has its columns. Wider ones may be turned: the output
# layer of a graph is often the transposed table, and shares only blocks that are square.
_TABLE_ROWS_PER_COL = 16
_WIDEST_TABLE = 384
# Rows and columns of the matrices of a stack, at least.
_LEAST_STACKED = 128

#: In `BlockMap.base_page_ids`: the block is no delta.
NO_PAGE = -1

#: Slots of a page number fewer than 2 to this power: each takes at least 32 bytes.
SLOT_BITS = 20

_MAP_MAGIC = b"PDBM"
_MAP_VERSION = 1
_DELTA_MAP_VERSION = 2  # of parts with a delta
_MAP_HEADER = struct.Struct("<4sHHII")  # magic, version, slot bytes, pages, blocks
#: Blocks in one part, of 4 bytes each and, where blocks have bases, of 8: less than
#: `PART_BYTES`, unless the blocks of a part are on more than 58 pages.
_MAP_PART_BLOCKS, _DELTA_PART_BLOCKS = 880, 440
#: Bytes of a part that is a row of a table without rowids: of more than a quarter of its page,
#: which may have 16 KiB, SQLite keeps the rest on a page of its own.
PART_BYTES = 4000


def row_axes(shape: Sequence[int]) -> int:
    """Return how many of the first axes are the rows of a new tensor's matrix view.

    All but the last where it seems to be a stack of matrices, as the experts of a mixture or the
    gates of a recurrent layer are: each then has blocks of its own, which may be those of a matrix
    that stands alone. Hardly any kernel of a convolution is as long, and a graph tells of those.
    """
    is_stack = len(shape) > 2 and min(shape) > 0 and min(shape[-2:]) >= _LEAST_STACKED
    return len(shape) - 1 if is_stack else 1


def matrix_shape(shape: Sequence[int], axes: int | None = None) -> tuple[int, int]:
    """Return the (rows, cols) of the matrix view of a tensor.

    Scalars and 1-D tensors are one row; of a higher rank the first ``axes`` (by default those of
    `row_axes`) are the rows, and the others columns: so a convolution weight is out x (in*kh*kw).
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    axes = row_axes(shape) if axes is None else axes
    return math.prod(int(n) for n in shape[:axes]), math.prod(int(n) for n in shape[axes:])


def default_block_shape(
    rows: int, cols: int, dtype: DType, *, matrices: int = 1
) -> tuple[int, int]:
    """Return the block shape used when the caller names none.

    Near-square blocks of at most `DEFAULT_BLOCK_BYTES`: 64 columns wide, or as wide as a
    narrow matrix, or wider where there are few rows. A table of words has as many rows, whole.
    ``matrices`` says how many lie in it, one below the other: a stack of them is no table.
    """
    rows, cols = max(rows, 1), max(cols, 1)
    elements = _FLOAT_BLOCK_ELEMENTS if dtype in _ALIKE else DEFAULT_BLOCK_BYTES // dtype.itemsize
    height = min(rows, elements // _DEFAULT_BLOCK_COLS)
    is_table = rows // max(matrices, 1) >= _TABLE_ROWS_PER_COL * cols
    if is_table and _DEFAULT_BLOCK_COLS < cols <= _WIDEST_TABLE:
        return height, cols
    width = elements // height
    if width > _DEFAULT_BLOCK_COLS:
        width -= width % _DEFAULT_BLOCK_COLS
    width = min(cols, width)
    height = min(rows, elements // width)
    if height < rows:  # then it is 16 at least
        height -= height % 8
    return height, width


def default_grid(shape: Sequence[int], dtype: DType, axes: int) -> BlockGrid:
    """Return how the matrix of a tensor, its first ``axes`` the rows, is cut by default."""
    rows, cols = matrix_shape(shape, axes)
    matrices = math.prod(shape[: axes - 1])
    return BlockGrid(rows, cols, *default_block_shape(rows, cols, dtype, matrices=matrices))


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """How a matrix is cut: blocks row-major, edge blocks of their true size."""

    rows: int
    cols: int
    block_rows: int
    block_cols: int

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.block_cols < 1:
            raise ArgumentError(
                f"block shape ({self.block_rows}, {self.block_cols}) must be at least (1, 1)"
            )

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block that is not at an edge."""
        return self.block_rows, self.block_cols

    @property
    def grid_rows(self) -> int:
        """Blocks from top to bottom."""
        return -(-self.rows // self.block_rows) if self.cols else 0

    @property
    def middle(self) -> int:
        """Number of a block in the middle, of the full size unless all blocks at an edge are."""
        return (self.grid_rows - 1) // 2 * self.grid_cols + (self.grid_cols - 1) // 2

    @property
    def grid_cols(self) -> int:
        """Blocks from left to right."""
        return -(-self.cols // self.block_cols) if self.rows else 0

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.grid_rows * self.grid_cols

    @property
    def transposed(self) -> BlockGrid:
        """The grid of the transposed matrix with transposed blocks."""
        return BlockGrid(self.cols, self.rows, self.block_cols, self.block_rows)

    def shapes(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the columns of these blocks."""
        grid_row, grid_col = np.divmod(indices, max(self.grid_cols, 1))
        heights = np.minimum(self.block_rows, self.rows - grid_row * self.block_rows)
        widths = np.minimum(self.block_cols, self.cols - grid_col * self.block_cols)
        return heights, widths

    def area(self, index: int) -> tuple[slice, slice]:
        """Return where a block lies in the matrix: its rows and columns."""
        grid_row, grid_col = divmod(index, self.grid_cols)
        top, left = grid_row * self.block_rows, grid_col * self.block_cols
        return (
            slice(top, min(top + self.block_rows, self.rows)),
            slice(left, min(left + self.block_cols, self.cols)),
        )

    def all_shapes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the columns of each block, in block order."""
        return self.shapes(np.arange(self.count, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class MatrixView:
    """The bytes of one tensor as a matrix with its block grid.

    ``data`` is a C-contiguous uint8 array of shape (rows, cols * itemsize) that borrows the
    tensor's memory; ``matrices`` says how many lie in it, one below the other.
    """

    data: NDArray[np.uint8]
    dtype: DType
    grid: BlockGrid
    matrices: int = 1

    @classmethod
    def of(
        cls,
        array: NDArray[np.generic],
        block_shape: tuple[int, int] | None = None,
        axes: int | None = None,
    ) -> MatrixView:
        """Return the view of an array of any rank and byte order; copies only when it must.

        ``axes`` as `matrix_shape` takes them.
        """
        dtype = DType.of(array.dtype)
        axes = row_axes(array.shape) if axes is None else axes
        rows, cols = matrix_shape(array.shape, axes)
        if block_shape is None:
            grid = default_grid(array.shape, dtype, axes)
        else:
            grid = BlockGrid(rows, cols, *as_block_shape(block_shape))
        try:
            native = np.ascontiguousarray(array, dtype=dtype.numpy).reshape(rows, cols)
        except MemoryError as exc:
            raise no_memory("a copy of the matrix", array.shape, dtype.numpy) from exc
        if native.size == 0:
            data = np.empty((rows, cols * dtype.itemsize), np.uint8)
        else:
            data = native.view(np.uint8).reshape(rows, cols * dtype.itemsize)
        return cls(data, dtype, grid, math.prod(array.shape[: axes - 1]))

    @property
    def edges(self) -> NDArray[np.int64]:
        """The rows of the grid in which a matrix begins, and the end; ascending."""
        grid = self.grid
        tops = np.arange(self.matrices) * (grid.rows // self.matrices) // grid.block_rows
        return distinct(np.append(tops, grid.grid_rows))

    @property
    def for_core(self) -> tuple[NDArray[np.uint8], int, int, int]:
        """The matrix as functions of the core take it: bytes, dtype code, rows and columns."""
        return self.data, self.dtype.code, *self.grid.block_shape

    def block(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of one block, of shape (rows, cols * itemsize), without a copy."""
        rows, cols = self.grid.area(index)
        item = self.dtype.itemsize
        return self.data[rows, cols.start * item : cols.stop * item]

    def block_bytes(self) -> NDArray[np.int64]:
        """Logical bytes of each block, in block order."""
        heights, widths = self.grid.all_shapes()
        return heights * widths * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Where the blocks of one tensor lie: per block, row-major, a page id and a slot on it.

    ``base_page_ids`` and ``base_slots`` say the same of each block's base, with page -1 and slot 0
    where the block is no delta; both are ``None`` where no block of the tensor is one.
    """

    grid: BlockGrid
    dtype: DType
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint32]
    base_page_ids: NDArray[np.int64] | None = None
    base_slots: NDArray[np.uint32] | None = None

    @property
    def bases(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]] | None:
        """Pages and slots of the bases, or ``None`` where no block is a delta."""
        if self.base_page_ids is None or self.base_slots is None:
            return None
        return self.base_page_ids, self.base_slots

    def covering(self, rows: slice, cols: slice) -> BlockMap:
        """Return the map of the blocks that hold these rows and columns, or some of them."""
        grid = self.grid
        down, across = (
            slice(part.start // side, -(-part.stop // side))
            for part, side in ((rows, grid.block_rows), (cols, grid.block_cols))
        )

        def cut(values: NDArray[Any]) -> NDArray[Any]:
            return values.reshape(grid.grid_rows, grid.grid_cols)[down, across].reshape(-1)

        top, left = down.start * grid.block_rows, across.start * grid.block_cols
        return BlockMap(
            BlockGrid(
                min(down.stop * grid.block_rows, grid.rows) - top,
                min(across.stop * grid.block_cols, grid.cols) - left,
                *grid.block_shape,
            ),
            self.dtype,
            cut(self.page_ids),
            cut(self.slots),
            None if self.base_page_ids is None else cut(self.base_page_ids),
            None if self.base_slots is None else cut(self.base_slots),
        )

    def parts(self) -> Iterator[bytes]:
        """Yield the binary form in parts, each a row of a table; none for an empty tensor."""
        step = _MAP_PART_BLOCKS if self.bases is None else _DELTA_PART_BLOCKS
        for start in range(0, len(self.page_ids), step):
            yield _pack_part(self, slice(start, start + step))

    @classmethod
    def from_parts(cls, parts: Sequence[bytes], grid: BlockGrid, dtype: DType) -> BlockMap:
        """Parse what `parts` wrote.

        Raises
        ------
        CorruptStoreError
            When a part does not parse or the number of blocks is not that of the grid.
        """
        columns = [_unpack_part(part) for part in parts]
        count = sum(len(part.slots) for part in columns)
        if count != grid.count:
            raise CorruptStoreError(
                f"a block map holds {count} blocks where its tensor has {grid.count}"
            )
        if len(columns) == 1 and columns[0].bases is None:  # most, of which there may be millions
            return cls(grid, dtype, columns[0].page_ids, columns[0].slots)
        page_ids = np.concatenate([part.page_ids for part in columns] or [np.empty(0, np.int64)])
        slots = np.concatenate([part.slots for part in columns] or [np.empty(0, np.uint32)])
        if all(part.bases is None for part in columns):
            return cls(grid, dtype, page_ids, slots)
        bases = [part.bases or part.no_bases() for part in columns]
        base_page_ids, base_slots = (np.concatenate(column) for column in zip(*bases, strict=True))
        return cls(grid, dtype, page_ids, slots, base_page_ids, base_slots)


@dataclass(frozen=True, slots=True)
class _Part:
    """The columns of one part of a block map."""

    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint32]
    bases: tuple[NDArray[np.int64], NDArray[np.uint32]] | None = None

    def no_bases(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Return the columns of bases where no block has one."""
        return np.full_like(self.page_ids, NO_PAGE), np.zeros_like(self.slots)


def _pack_part(block_map: BlockMap, rows: slice) -> bytes:
    page_ids, slots = block_map.page_ids[rows], block_map.slots[rows]
    bases = block_map.bases
    is_delta = np.zeros(len(slots), np.bool_) if bases is None else bases[0][rows] != NO_PAGE
    if bases is None or not is_delta.any():
        version = _MAP_VERSION
        pages, index = np.unique(page_ids, return_inverse=True)
        columns: list[NDArray[Any]] = [index, slots]
    else:
        version = _DELTA_MAP_VERSION
        named = np.concatenate((page_ids, bases[0][rows][is_delta]))
        pages, index = np.unique(named, return_inverse=True)
        base_index = np.full(len(slots), len(pages))
        base_index[is_delta] = index[len(slots) :]
        base_slots = np.where(is_delta, bases[1][rows], 0)
        columns = [index[: len(slots)], slots, base_index, base_slots]
    wide = 4 if max(int(column.max(initial=0)) for column in columns) > 0xFFFF else 2
    return b"".join(
        (
            _MAP_HEADER.pack(_MAP_MAGIC, version, wide, len(pages), len(slots)),
            pages.astype("<i8").tobytes(),
            *(column.astype(f"<u{wide}").tobytes() for column in columns),
        )
    )


def named_pages(parts: Iterable[bytes]) -> NDArray[np.int64]:
    """Return the pages that parts of block maps name, those of bases included, without repeats.

    Far cheaper than parsing them. Raises CorruptStoreError for a part that does not parse.
    """
    lists = [_unpack_pages(part)[0] for part in parts]
    return distinct(np.concatenate([np.empty(0, np.int64), *lists]))


def _unpack_pages(part: bytes) -> tuple[NDArray[np.int64], int, int, int]:
    """Return the pages that a part names, its columns, their width in bytes, and its blocks."""
    try:
        magic, version, wide, n_pages, n_blocks = _MAP_HEADER.unpack_from(part)
    except struct.error as exc:
        raise CorruptStoreError("a block map is shorter than its header") from exc
    n_columns = {_MAP_VERSION: 2, _DELTA_MAP_VERSION: 4}.get(version, 0)
    size = _MAP_HEADER.size + 8 * n_pages + n_columns * wide * n_blocks
    if magic != _MAP_MAGIC or not n_columns or wide not in (2, 4) or size != len(part):
        raise CorruptStoreError(f"a block map of {len(part)} bytes does not parse")
    pages = np.frombuffer(part, "<i8", n_pages, _MAP_HEADER.size).astype(np.int64, copy=False)
    # As unsigned, negative ids are beyond all others. One too large would be another page's place.
    if n_pages and (highest := int(pages.view(np.uint64).max())) > LARGEST_ID:
        raise CorruptStoreError(f"a block map names page {highest}, which no store has")
    return pages, n_columns, wide, n_blocks


def _unpack_part(part: bytes) -> _Part:
    pages, n_columns, wide, n_blocks = _unpack_pages(part)
    n_pages = len(pages)
    table = np.frombuffer(part, f"<u{wide}", n_columns * n_blocks, _MAP_HEADER.size + 8 * n_pages)
    index, slots, *bases = table.reshape(n_columns, n_blocks)
    if n_blocks and int(index.max()) >= n_pages:
        raise CorruptStoreError("a block map names a page outside of its own list")
    # Whoever has an entry for each slot up to the last would ask for 32 GiB otherwise.
    for column in (slots, *bases[1:]) if n_blocks and wide > 2 else ():
        if (highest := int(column.max())) >= 1 << SLOT_BITS:
            raise CorruptStoreError(f"a block map names slot {highest}, and no page has so many")
    if not bases:
        return _Part(pages[index], slots.astype(np.uint32))
    base_index, base_slots = bases
    if n_blocks and int(base_index.max()) > n_pages:
        raise CorruptStoreError("a block map names a base's page outside of its own list")
    if base_slots[base_index == n_pages].any():
        raise CorruptStoreError("a block map names the slot of a base on no page")
    # A block without a base has the index behind the list.
    listed = np.append(pages, NO_PAGE)
    base_columns = listed[base_index], base_slots.astype(np.uint32)
    return _Part(pages[index], slots.astype(np.uint32), base_columns)
