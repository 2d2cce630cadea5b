# SPDX-License-Identifier: Apache-2.0
"""Blocks as stored bytes, and pages of them (docs/format.md, "Block encodings" and "Page").

Here: encoding the blocks of a matrix view, by themselves or as deltas on base blocks, building a
page, parsing one, reading blocks back into a matrix and comparing them with one. All of it runs
without the GIL and gives the same bytes on every machine. Deliberately not here: which block is
whose base, which goes on which page (`pydedup.packing`), and where pages come from
(`pydedup.pool`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core
from pydedup._core import Page
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError

__all__ = [
    "BLOCK_ALIGNMENT",
    "DELTA_PAGE_VERSION",
    "PAGE_HEADER_BYTES",
    "PAGE_OVERHEAD_BYTES",
    "PAGE_VERSION",
    "SLOT_BYTES",
    "SLOT_DTYPE",
    "EncodedBlocks",
    "Encoding",
    "Page",
    "StoredBases",
    "base_tags",
    "bases_for_core",
    "block_digests",
    "blocks_equal",
    "build_page",
    "encode_blocks",
    "encode_deltas",
    "estimate_deltas",
    "page_checksum",
    "page_cost",
    "page_digests",
    "read_blocks",
    "same_block",
]

#: Newest version of the page format that this pydedup reads and writes.
PAGE_VERSION: int = _core.PAGE_VERSION
#: Version of pages that hold deltas; all others are written with version 1.
DELTA_PAGE_VERSION: int = _core.DELTA_PAGE_VERSION
#: Bytes of a page before its slot table.
PAGE_HEADER_BYTES: int = _core.PAGE_HEADER_BYTES
#: Most bytes of a page beyond the `page_cost` of its blocks: the header, and what is left free
#: behind a slot table so that the first block is aligned.
PAGE_OVERHEAD_BYTES: int = _core.PAGE_HEADER_BYTES + _core.BLOCK_ALIGNMENT - _core.SLOT_BYTES
#: Bytes that each slot takes in the slot table.
SLOT_BYTES: int = _core.SLOT_BYTES
#: Blocks begin at multiples of this many bytes.
BLOCK_ALIGNMENT: int = _core.BLOCK_ALIGNMENT
#: dtype of `Page.slots`, with the fields encoding, dtype, rows, cols, length, offset and base.
SLOT_DTYPE: np.dtype[np.void] = _core.SLOT_DTYPE


class Encoding(enum.IntEnum):
    """How a block is kept. Codes are persisted in pages: never renumber."""

    RAW = 0
    """The elements, row-major, without gaps."""
    PLANES = 1
    """Byte planes, each raw, constant or Huffman-coded."""
    DELTA = 2
    """The exact difference to a base block."""
    QUANTISED = 3
    """The difference to a base block, within an error bound."""

    @property
    def is_delta(self) -> bool:
        """Whether a block of this encoding says nothing without its base."""
        return self in (Encoding.DELTA, Encoding.QUANTISED)


@dataclass(frozen=True, slots=True)
class EncodedBlocks:
    """Encoded blocks, one after another without gaps.

    Attributes
    ----------
    arena
        uint8 (n_bytes,), all encoded bytes.
    offsets, lengths
        int64 (n_blocks,): where in ``arena`` each block lies.
    encodings
        uint8 (n_blocks,): an `Encoding` each.
    """

    arena: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    encodings: NDArray[np.uint8]

    def select(self, which: NDArray[np.int64]) -> EncodedBlocks:
        """Return some of the blocks, ``which`` ascending, one after another without gaps."""
        if len(which) == len(self.lengths):
            return self
        lengths = self.lengths[which]
        spans = zip(self.offsets[which].tolist(), lengths.tolist(), strict=True)
        pieces = [self.arena[start : start + length] for start, length in spans]
        arena = np.concatenate(pieces) if pieces else self.arena[:0]
        return EncodedBlocks(arena, np.cumsum(lengths) - lengths, lengths, self.encodings[which])


@dataclass(frozen=True, slots=True)
class StoredBases:
    """Where the bases of stored blocks are.

    Attributes
    ----------
    pages
        The pages that hold them.
    page_index
        Per block: which of ``pages``, or -1 where the block is no delta, shape (n_blocks,).
    slots
        Per block: the slot on it, shape (n_blocks,).
    """

    pages: Sequence[Page]
    page_index: ArrayLike
    slots: ArrayLike


def encode_blocks(
    view: MatrixView, indices: ArrayLike, *, planes: bool, threads: int = 0
) -> EncodedBlocks:
    """Encode blocks of a matrix view.

    Parameters
    ----------
    view
        The matrix; its memory is borrowed for the call.
    indices
        Numbers of the blocks, row-major over the grid, shape (n_blocks,).
    planes
        Whether to store a block as compressed byte planes where that saves at least 5 % of its
        bytes. False stores all blocks raw.
    threads
        0 chooses by size.

    Returns
    -------
    EncodedBlocks
        In the order of ``indices``; the same bytes on every machine.

    Raises
    ------
    ArgumentError
        When an index is outside of the grid or a block has 4 GiB or more.
    """
    grid = view.grid
    arena, offsets, lengths, encodings = _core.encode_blocks(
        view.data,
        view.dtype.code,
        grid.block_rows,
        grid.block_cols,
        _column(indices, np.int64, "indices"),
        planes,
        threads,
    )
    return EncodedBlocks(arena, offsets, lengths, encodings)


def encode_deltas(
    view: MatrixView,
    indices: ArrayLike,
    base_view: MatrixView,
    base_indices: ArrayLike,
    *,
    limits: ArrayLike | None = None,
    max_rel_error: float | None = None,
    threads: int = 0,
) -> EncodedBlocks:
    """Encode blocks of a matrix view as deltas on blocks of another.

    Parameters
    ----------
    view
        The matrix; its memory is borrowed for the call, as is that of ``base_view``.
    indices
        Numbers of the blocks, row-major over the grid, shape (n_blocks,).
    base_view
        A matrix that holds the bases. A base has the shape of its block, and its dtype, or another
        where both are among f64, f32, f16 and bf16: it is then rounded to that of the block.
    base_indices
        The number of each block's base in the grid of ``base_view``, shape (n_blocks,).
    limits
        The most bytes that each delta may take, shape (n_blocks,): what the block would take
        without a base, for instance. By default one byte less than the raw block.
    max_rel_error
        ``None`` for exact deltas. Otherwise what is read back differs from the block by at most
        this share of its Euclidean norm (checked on each block), and elements that are 0 stay 0.
        Blocks that cannot be quantised so, or would not be smaller, become exact deltas.
    threads
        0 chooses by size.

    Returns
    -------
    EncodedBlocks
        In the order of ``indices``, each `Encoding.DELTA` or `Encoding.QUANTISED`; the same bytes
        on every machine. ``lengths`` is 0 where the limit is not enough.

    Raises
    ------
    ArgumentError
        When an index is outside of its grid, a base has another shape or a dtype that is not
        converted, a limit is negative, or ``max_rel_error`` is not within 0 and 1.
    """
    chosen = _column(indices, np.int64, "indices")
    if limits is None:
        item = view.dtype.itemsize
        cells = np.asarray(view.grid.heights(), np.int64) * np.asarray(view.grid.widths(), np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= cells.size):
            raise ArgumentError(
                f"indices has blocks outside of a grid of {cells.size} blocks; "
                f"it goes from {chosen.min()} to {chosen.max()}"
            )
        most = cells[chosen] * item - 1
    else:
        most = _column(limits, np.int64, "limits")
    arena, offsets, lengths, encodings = _core.encode_deltas(
        *_blocks(view),
        chosen,
        *_blocks(base_view),
        _column(base_indices, np.int64, "base_indices"),
        most,
        _error_bound(max_rel_error),
        threads,
    )
    return EncodedBlocks(arena, offsets, lengths, encodings)


def estimate_deltas(
    view: MatrixView,
    indices: ArrayLike,
    base_view: MatrixView,
    base_indices: ArrayLike,
    *,
    max_rel_error: float | None = None,
    threads: int = 0,
) -> NDArray[np.int64]:
    """Estimate what `encode_deltas` would need, for choosing among several bases.

    Parameters are those of `encode_deltas`. A quarter of the elements is looked at, so that this
    is several times faster.

    Returns
    -------
    numpy.ndarray
        int64 (n_blocks,): bytes, at most those of the raw block.
    """
    return _core.estimate_deltas(
        *_blocks(view),
        _column(indices, np.int64, "indices"),
        *_blocks(base_view),
        _column(base_indices, np.int64, "base_indices"),
        _error_bound(max_rel_error),
        threads,
    )


def base_tags(digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return what the slots of deltas carry for bases with these digests (docs/format.md, "Page").

    ``digests`` and the result are uint64, of shapes (n, 2) and (n,).
    """
    return np.maximum(digests[:, 0], np.uint64(1))


def page_cost(lengths: ArrayLike) -> NDArray[np.int64]:
    """Return the bytes that blocks of these encoded lengths take on a page, slots included.

    A page of blocks with these costs has at most ``PAGE_OVERHEAD_BYTES + sum(costs)`` bytes, which
    is what packing by bytes relies on. The result is int64 of the shape of ``lengths``.
    """
    sizes = np.asarray(lengths, np.int64)
    return SLOT_BYTES + (sizes + BLOCK_ALIGNMENT - 1) // BLOCK_ALIGNMENT * BLOCK_ALIGNMENT


def build_page(
    arena: NDArray[np.uint8],
    offsets: ArrayLike,
    lengths: ArrayLike,
    encodings: ArrayLike,
    dtypes: ArrayLike,
    rows: ArrayLike,
    cols: ArrayLike,
    bases: ArrayLike | None = None,
) -> bytes:
    """Return the page that holds these encoded blocks, in this order, one per slot.

    Parameters
    ----------
    arena
        Contiguous uint8 array that holds the encoded bytes.
    offsets, lengths
        Where in ``arena`` each block lies, shape (n_blocks,).
    encodings, dtypes
        Codes of `Encoding` and `pydedup.types.DType` of each block.
    rows, cols
        Shape of each block.
    bases
        Id of the block that each is a delta of; 0 or ``None`` where it is none.

    Raises
    ------
    ArgumentError
        When the columns differ in length, a block lies outside of the arena, or a length does not
        fit dtype, shape and encoding.
    """
    starts = _column(offsets, np.int64, "offsets")
    no_bases = np.zeros(len(starts), np.uint64)
    return _core.build_page(
        arena,
        starts,
        _column(lengths, np.int64, "lengths"),
        _column(encodings, np.uint8, "encodings"),
        _column(dtypes, np.uint8, "dtypes"),
        _column(rows, np.uint32, "rows"),
        _column(cols, np.uint32, "cols"),
        no_bases if bases is None else _column(bases, np.uint64, "bases"),
    )


def page_checksum(payload: bytes) -> bytes:
    """Return the 16-byte checksum that a page carries, without computing it again.

    Raises
    ------
    CorruptStoreError
        When the bytes are not a page.
    SchemaVersionError
        When the page has a newer format version.
    """
    return _core.page_checksum(payload)


def page_digests(page: Page, *, threads: int = 0) -> NDArray[np.uint64]:
    """Return the digest of the content of each slot, as `pydedup.hashing.hash_blocks` would.

    The result is uint64 of shape (n_slots, 2). Raises CorruptStoreError when a block does not
    decode, which deltas never do here: `block_digests` takes their bases.
    """
    return _core.page_digests(page, threads)


def block_digests(
    pages: Sequence[Page],
    page_index: ArrayLike,
    slots: ArrayLike,
    *,
    bases: StoredBases | None = None,
    threads: int = 0,
) -> NDArray[np.uint64]:
    """Return the digests of the content of stored blocks, uint64 of shape (n_blocks, 2).

    Parameters are those of `read_blocks`. Raises ArgumentError for an index outside of ``pages``
    and CorruptStoreError when a block does not decode.
    """
    return _core.block_digests(
        pages,
        _column(page_index, np.uint32, "page_index"),
        _column(slots, np.uint32, "slots"),
        bases_for_core(bases),
        threads,
    )


def read_blocks(
    view: MatrixView,
    indices: ArrayLike,
    pages: Sequence[Page],
    page_index: ArrayLike,
    slots: ArrayLike,
    *,
    bases: StoredBases | None = None,
    threads: int = 0,
) -> None:
    """Decode stored blocks into their places in a matrix view.

    Parameters
    ----------
    view
        The matrix; its memory must be writable.
    indices
        Numbers of the blocks to fill in, shape (n_blocks,), without repeats.
    pages
        The pages that hold them.
    page_index, slots
        Per block: which of ``pages``, and the slot on it.
    bases
        Where the bases of the deltas among the blocks are; needed when there are any.
    threads
        0 chooses by size.

    Raises
    ------
    ArgumentError
        When an index is outside of the grid or of ``pages``, or the matrix is read-only.
    CorruptStoreError
        When a slot does not exist, holds a block of another dtype or shape, or does not decode; or
        when a delta comes without its base, with another block than it was made from, or with a
        base that is a delta itself.
    """
    if not view.data.flags.writeable:
        raise ArgumentError("read_blocks needs a writable matrix; this one is read-only")
    grid = view.grid
    _core.read_blocks(
        pages,
        _column(page_index, np.uint32, "page_index"),
        _column(slots, np.uint32, "slots"),
        _column(indices, np.int64, "indices"),
        view.data,
        view.dtype.code,
        grid.block_rows,
        grid.block_cols,
        bases_for_core(bases),
        threads,
    )


def blocks_equal(
    view: MatrixView,
    indices: ArrayLike,
    pages: Sequence[Page],
    page_index: ArrayLike,
    slots: ArrayLike,
    *,
    bases: StoredBases | None = None,
    threads: int = 0,
) -> NDArray[np.bool_]:
    """Compare blocks of a matrix view with stored blocks, byte by byte.

    Parameters are those of `read_blocks`; the matrix may be read-only and indices may repeat.

    Returns
    -------
    numpy.ndarray
        bool (n_blocks,): whether dtype, shape and all bytes are the same. So NaN equals itself
        and 0.0 differs from -0.0.
    """
    grid = view.grid
    return _core.blocks_equal(
        view.data,
        view.dtype.code,
        grid.block_rows,
        grid.block_cols,
        _column(indices, np.int64, "indices"),
        pages,
        _column(page_index, np.uint32, "page_index"),
        _column(slots, np.uint32, "slots"),
        bases_for_core(bases),
        threads,
    )


def same_block(
    page_a: Page,
    slot_a: int,
    page_b: Page,
    slot_b: int,
    *,
    base_a: tuple[Page, int] | None = None,
    base_b: tuple[Page, int] | None = None,
) -> bool:
    """Return whether two stored blocks have the same dtype, shape and content.

    A delta comes with the page and slot of its base.
    """
    return _core.same_block(page_a, slot_a, page_b, slot_b, base_a, base_b)


def bases_for_core(bases: StoredBases | None) -> _core.Bases | None:
    """Return bases as the functions of the core take them; for the other facades."""
    if bases is None:
        return None
    return (
        bases.pages,
        _column(bases.page_index, np.int64, "bases.page_index"),
        _column(bases.slots, np.uint32, "bases.slots"),
    )


def _blocks(view: MatrixView) -> tuple[NDArray[np.uint8], int, int, int]:
    """Return a view as the first arguments of the core's functions."""
    return view.data, view.dtype.code, view.grid.block_rows, view.grid.block_cols


def _error_bound(max_rel_error: object) -> float | None:
    if max_rel_error is None:
        return None
    if isinstance(max_rel_error, bool) or not isinstance(max_rel_error, int | float | np.floating):
        raise ArgumentError(
            f"max_rel_error must be a number above 0 and below 1, got {max_rel_error!r}"
        )
    return float(max_rel_error)


def _column(values: ArrayLike, dtype: type[np.integer[Any]], name: str) -> NDArray[Any]:
    """Return a contiguous 1-D array of that dtype with exactly these values."""
    given = np.asarray(values)
    if given.ndim == 1 and given.size == 0:
        return np.empty(0, dtype)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ArgumentError(
            f"{name} must be a 1-D array of integers, got {given.dtype} of shape {given.shape}"
        )
    limits = np.iinfo(dtype)
    if int(given.min()) < limits.min or int(given.max()) > limits.max:
        raise ArgumentError(f"{name} has values that do not fit {limits.dtype}")
    return np.ascontiguousarray(given, dtype)
