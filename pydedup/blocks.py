# SPDX-License-Identifier: Apache-2.0
"""Tensors as matrices, matrices as blocks, and where each block lies.

Here: the matrix view of a tensor, the default block shape, and the block map with its binary
form (docs/format.md, "Block map"). Deliberately not here: what is inside a block.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.types import DType

__all__ = [
    "DEFAULT_BLOCK_BYTES",
    "BlockGrid",
    "BlockMap",
    "MatrixView",
    "default_block_shape",
    "matrix_shape",
]

#: Bytes that a default block has at most. 16 KiB keeps rows that a fine-tune did not touch
#: shareable and fits the first-level cache of the streaming kernels.
DEFAULT_BLOCK_BYTES = 16 * 1024
_DEFAULT_BLOCK_COLS = 64

_MAP_MAGIC = b"PDBM"
_MAP_VERSION = 1
_MAP_HEADER = struct.Struct("<4sHHII")  # magic, version, slot bytes, pages, blocks
#: Blocks in one part: 12 bytes each in the worst case keep a part below 1 MiB.
_MAP_PART_BLOCKS = 65536


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the (rows, cols) of the matrix view of a tensor.

    Scalars and 1-D tensors are one row; a higher rank keeps its first axis as rows and folds
    the others, so a convolution weight is out x (in*kh*kw).
    """
    if len(shape) == 0:
        return 1, 1
    if len(shape) == 1:
        return 1, int(shape[0])
    return int(shape[0]), math.prod(int(n) for n in shape[1:])


def default_block_shape(rows: int, cols: int, itemsize: int) -> tuple[int, int]:
    """Return the block shape used when the caller names none.

    Near-square blocks of at most `DEFAULT_BLOCK_BYTES`: 64 columns wide, or as wide as a
    narrow matrix, or wider where there are few rows.
    """
    rows, cols = max(rows, 1), max(cols, 1)
    elements = DEFAULT_BLOCK_BYTES // itemsize
    height = min(rows, elements // _DEFAULT_BLOCK_COLS)
    width = elements // height
    if width > _DEFAULT_BLOCK_COLS:
        width -= width % _DEFAULT_BLOCK_COLS
    width = min(cols, width)
    height = min(rows, elements // width)
    if 8 < height < rows:
        height -= height % 8
    return height, width


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
    def grid_rows(self) -> int:
        """Blocks from top to bottom."""
        return -(-self.rows // self.block_rows) if self.cols else 0

    @property
    def grid_cols(self) -> int:
        """Blocks from left to right."""
        return -(-self.cols // self.block_cols) if self.rows else 0

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.grid_rows * self.grid_cols

    def shapes(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the columns of these blocks."""
        grid_row, grid_col = np.divmod(indices, max(self.grid_cols, 1))
        heights = np.minimum(self.block_rows, self.rows - grid_row * self.block_rows)
        widths = np.minimum(self.block_cols, self.cols - grid_col * self.block_cols)
        return heights, widths

    def heights(self) -> NDArray[np.int64]:
        """Rows of each block, in block order."""
        return self.shapes(np.arange(self.count, dtype=np.int64))[0]

    def widths(self) -> NDArray[np.int64]:
        """Columns of each block, in block order."""
        return self.shapes(np.arange(self.count, dtype=np.int64))[1]


@dataclass(frozen=True, slots=True)
class MatrixView:
    """The bytes of one tensor as a matrix with its block grid.

    ``data`` is a C-contiguous uint8 array of shape (rows, cols * itemsize) that borrows the
    tensor's memory.
    """

    data: NDArray[np.uint8]
    dtype: DType
    grid: BlockGrid

    @classmethod
    def of(
        cls, array: NDArray[np.generic], block_shape: tuple[int, int] | None = None
    ) -> MatrixView:
        """Return the view of an array of any rank and byte order; copies only when it must."""
        dtype = DType.of(array.dtype)
        rows, cols = matrix_shape(array.shape)
        block = block_shape or default_block_shape(rows, cols, dtype.itemsize)
        native = np.ascontiguousarray(array, dtype=dtype.numpy).reshape(rows, cols)
        if native.size == 0:
            data = np.empty((rows, cols * dtype.itemsize), np.uint8)
        else:
            data = native.view(np.uint8).reshape(rows, cols * dtype.itemsize)
        return cls(data, dtype, BlockGrid(rows, cols, *block))

    def block_bytes(self) -> NDArray[np.int64]:
        """Logical bytes of each block, in block order."""
        return self.grid.heights() * self.grid.widths() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Where the blocks of one tensor lie: per block, row-major, a page id and a slot on it."""

    grid: BlockGrid
    dtype: DType
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint32]

    def parts(self) -> Iterator[bytes]:
        """Yield the binary form in parts of at most 1 MiB; none for an empty tensor."""
        for start in range(0, len(self.page_ids), _MAP_PART_BLOCKS):
            stop = start + _MAP_PART_BLOCKS
            pages, index = np.unique(self.page_ids[start:stop], return_inverse=True)
            slots = self.slots[start:stop]
            wide = 4 if slots.max(initial=0) > 0xFFFF or len(pages) > 0xFFFF else 2
            kind = f"<u{wide}"
            yield b"".join(
                (
                    _MAP_HEADER.pack(_MAP_MAGIC, _MAP_VERSION, wide, len(pages), len(slots)),
                    pages.astype("<i8").tobytes(),
                    index.astype(kind).tobytes(),
                    slots.astype(kind).tobytes(),
                )
            )

    @classmethod
    def from_parts(cls, parts: Sequence[bytes], grid: BlockGrid, dtype: DType) -> BlockMap:
        """Parse what `parts` wrote.

        Raises
        ------
        CorruptStoreError
            When a part does not parse or the number of blocks is not that of the grid.
        """
        page_ids: list[NDArray[np.int64]] = []
        slots: list[NDArray[np.uint32]] = []
        for part in parts:
            try:
                magic, version, wide, n_pages, n_blocks = _MAP_HEADER.unpack_from(part)
            except struct.error as exc:
                raise CorruptStoreError("a block map is shorter than its header") from exc
            size = _MAP_HEADER.size + 8 * n_pages + 2 * wide * n_blocks
            if (
                magic != _MAP_MAGIC
                or version != _MAP_VERSION
                or wide not in (2, 4)
                or size != len(part)
            ):
                raise CorruptStoreError(f"a block map of {len(part)} bytes does not parse")
            kind = f"<u{wide}"
            pages = np.frombuffer(part, "<i8", n_pages, _MAP_HEADER.size)
            at = _MAP_HEADER.size + 8 * n_pages
            index = np.frombuffer(part, kind, n_blocks, at)
            if n_blocks and int(index.max()) >= n_pages:
                raise CorruptStoreError("a block map names a page outside of its own list")
            page_ids.append(pages[index].astype(np.int64, copy=False))
            slots.append(
                np.frombuffer(part, kind, n_blocks, at + wide * n_blocks).astype(np.uint32)
            )
        all_pages = np.concatenate(page_ids) if page_ids else np.empty(0, np.int64)
        all_slots = np.concatenate(slots) if slots else np.empty(0, np.uint32)
        if len(all_pages) != grid.count:
            raise CorruptStoreError(
                f"a block map holds {len(all_pages)} blocks where its tensor has {grid.count}"
            )
        return cls(grid, dtype, all_pages, all_slots)
