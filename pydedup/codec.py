# SPDX-License-Identifier: Apache-2.0
"""Blocks as stored bytes, and pages of them (docs/format.md, "Block encodings" and "Page").

Here: building a page, parsing one, reading blocks back into a matrix and comparing them with one;
encoding them, by themselves or as deltas on base blocks, is in `pydedup.encoding`. All of it runs
without the GIL and gives the same bytes on every machine. Deliberately not here: which block is
whose base, which goes on which page (`pydedup.packing`), and where pages come from
(`pydedup.pool`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core
from pydedup._core import Page
from pydedup.arguments import as_count, as_integers
from pydedup.blocks import MatrixView
from pydedup.encoding import (
    EncodedBlocks,
    Encoding,
    LowRankFactors,
    encode_blocks,
    encode_deltas,
    estimate_deltas,
)
from pydedup.errors import ArgumentError, CorruptStoreError

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
    "LowRankFactors",
    "Page",
    "StoredBases",
    "base_tags",
    "bases_for_core",
    "block_digests",
    "blocks_equal",
    "build_page",
    "check_recorded",
    "encode_blocks",
    "encode_deltas",
    "encoded_blocks",
    "estimate_deltas",
    "gather_page",
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
    starts = as_integers("offsets", offsets, np.int64)
    no_bases = np.zeros(len(starts), np.uint64)
    return _core.build_page(
        arena,
        starts,
        as_integers("lengths", lengths, np.int64),
        as_integers("encodings", encodings, np.uint8),
        as_integers("dtypes", dtypes, np.uint8),
        as_integers("rows", rows, np.uint32),
        as_integers("cols", cols, np.uint32),
        no_bases if bases is None else as_integers("bases", bases, np.uint64),
    )


def gather_page(pages: Sequence[Page], page_index: ArrayLike, slots: ArrayLike) -> bytes:
    """Return the page of these blocks in this order, as they are encoded where they are now.

    Parameters
    ----------
    pages
        The pages that they are on.
    page_index, slots
        Of shape (n,): block i is in slot ``slots[i]`` of ``pages[page_index[i]]``.

    Raises
    ------
    ArgumentError
        For an index outside of ``pages``, or arrays that differ in length.
    CorruptStoreError
        When a page does not have the slot: block maps may be damaged.
    """
    return _core.gather_page(*_stored(pages, page_index, slots))


def encoded_blocks(pages: Sequence[Page], page_index: ArrayLike, slots: ArrayLike) -> EncodedBlocks:
    """Return stored blocks as they are encoded, by themselves.

    Parameters are those of `gather_page`. Factors of low-rank deltas that lie elsewhere on a page
    come with each block, which may so be longer than on its page. Raises what `gather_page` does.
    """
    return EncodedBlocks(*_core.encoded_blocks(*_stored(pages, page_index, slots)))


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


def check_recorded(payload: bytes, checksum: bytes) -> None:
    """Refuse a page that is another than its row says, which may be sound by itself.

    Raises
    ------
    CorruptStoreError, SchemaVersionError
        Also as `page_checksum` does.
    """
    if page_checksum(payload) != checksum:
        Page(payload)  # what is wrong with it comes first
        raise CorruptStoreError("its checksum is not the one of its row")


def page_digests(page: Page, *, threads: int = 0) -> NDArray[np.uint64]:
    """Return the digest of the content of each slot, as `pydedup.hashing.hash_blocks` would.

    The result is uint64 of shape (n_slots, 2). Raises CorruptStoreError when a block does not
    decode, which deltas never do here: `block_digests` takes their bases.
    """
    return _core.page_digests(page, as_count("threads", threads))


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
        *_stored(pages, page_index, slots),
        bases_for_core(bases),
        as_count("threads", threads),
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
    stored, at, slot_of = _stored(pages, page_index, slots)
    _core.read_blocks(
        stored,
        at,
        slot_of,
        as_integers("indices", indices, np.int64),
        *view.for_core,
        bases_for_core(bases),
        as_count("threads", threads),
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
    return _core.blocks_equal(
        *view.for_core,
        as_integers("indices", indices, np.int64),
        *_stored(pages, page_index, slots),
        bases_for_core(bases),
        as_count("threads", threads),
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


def _stored(
    pages: Sequence[Page], page_index: ArrayLike, slots: ArrayLike
) -> tuple[Sequence[Page], NDArray[np.uint32], NDArray[np.uint32]]:
    """Return where stored blocks are as the functions of the core take it."""
    return (
        pages,
        as_integers("page_index", page_index, np.uint32),
        as_integers("slots", slots, np.uint32),
    )


def bases_for_core(bases: StoredBases | None) -> _core.Bases | None:
    """Return bases as the functions of the core take them; for the other facades."""
    if bases is None:
        return None
    return (
        bases.pages,
        as_integers("bases.page_index", bases.page_index, np.int64),
        as_integers("bases.slots", bases.slots, np.uint32),
    )
