# SPDX-License-Identifier: Apache-2.0
"""Blocks on the pages of a store: capacity, and what a model reads of them.

The packer itself is `pydedup.packing`; here is what the way in and the upkeep both need to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import codec
from pydedup.blocks import NO_PAGE, SLOT_BITS, BlockGrid, BlockMap
from pydedup.errors import CorruptStoreError
from pydedup.pool import PagePool
from pydedup.sets import distinct, is_among
from pydedup.types import DType

__all__ = [
    "MOST_BLOCK_BYTES",
    "NO_PLACE",
    "PAGE_BYTES",
    "PAGE_CAPACITY",
    "are_deltas",
    "base_places",
    "block_at",
    "block_costs",
    "block_forms",
    "block_place",
    "block_places",
    "by_kind",
    "by_page",
    "copy_page",
    "costs_of_owned",
    "even_shares",
    "filled_capacity",
    "fitting",
    "joined",
    "least_pages",
    "map_at",
    "map_places",
    "page_bytes",
    "pages_read",
    "places_of",
    "shape_codes",
    "slot_entries",
    "split_place",
    "split_places",
    "used_places",
]

#: Bytes of a full page, its header included.
PAGE_BYTES = 1024 * 1024
#: Bytes of blocks and slots that a page holds: less its header, and what aligns the first block.
PAGE_CAPACITY = PAGE_BYTES - codec.PAGE_HEADER_BYTES - codec.BLOCK_ALIGNMENT
#: Bytes of the largest block that a page holds raw.
MOST_BLOCK_BYTES = PAGE_CAPACITY - codec.SLOT_BYTES
MOST_BLOCK_BYTES -= MOST_BLOCK_BYTES % codec.BLOCK_ALIGNMENT
#: Instead of a place: a block that is no delta has no base, or nobody knows where it is.
NO_PLACE = -1

# How much of a page is filled where what blocks take is known only when they are on it.
_FILLED_PART = 0.97
_DELTA_ENCODINGS = tuple(int(code) for code in codec.Encoding if code.is_delta)
_SLOTS = (1 << SLOT_BITS) - 1


def are_deltas(encodings: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return which of these codes of `codec.Encoding` are those of deltas."""
    return is_among(encodings, _DELTA_ENCODINGS)


def least_pages(block_bytes: int) -> int:
    """Return the fewest pages that can hold blocks of so many bytes, slots included."""
    return -(-block_bytes // PAGE_CAPACITY)


def block_places(page_ids: NDArray[np.int64], slots: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return one sortable int64 per block: its page id and slot."""
    return (page_ids << SLOT_BITS) | slots.astype(np.int64)


def split_places(places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Return the page ids and slots of places: `block_places` undone."""
    return places >> SLOT_BITS, (places & _SLOTS).astype(np.uint32)


def block_place(page_id: int, slot: int) -> int:
    """Return the place of one block; see `block_places`."""
    return (page_id << SLOT_BITS) | slot


def split_place(place: int) -> tuple[int, int]:
    """Return the page id and slot of one place."""
    return place >> SLOT_BITS, place & _SLOTS


def block_at(pool: PagePool, place: int) -> tuple[codec.Page, int]:
    """Return the page and slot of the block at a place; raises what `PagePool.pages` does."""
    page_id, slot = split_place(place)
    (page,) = pool.pages([page_id])
    return page, slot


def slot_entries(
    pages: Sequence[codec.Page], page_index: NDArray[np.uint32], slots: NDArray[np.uint32]
) -> NDArray[np.void]:
    """Return the slot of each block, ``slots[i]`` of ``pages[page_index[i]]``.

    Raises CorruptStoreError when a page does not have the slot: block maps may be damaged.
    """
    # As rows of bytes: numpy takes long to see that records have the same fields.
    none = np.empty((0, codec.SLOT_BYTES), np.uint8)
    tables = [page.slots.view(np.uint8).reshape(-1, codec.SLOT_BYTES) for page in pages]
    counts = np.array([len(table) for table in tables], np.int64)
    beyond = np.flatnonzero(slots >= counts[page_index])
    if len(beyond):
        first = beyond[0]
        raise CorruptStoreError(
            f"slot {slots[first]} was asked of a page with {counts[page_index[first]]} slots; "
            "run verify on the store"
        )
    starts = np.cumsum(counts) - counts
    chosen = np.concatenate([none, *tables])[starts[page_index] + slots]
    entries: NDArray[np.void] = chosen.view(codec.SLOT_DTYPE).reshape(-1)
    return entries


def shape_codes(rows: ArrayLike, cols: ArrayLike) -> NDArray[np.uint64]:
    """Return a number for the rows and columns of each block that no other shape has."""
    below = np.asarray(cols).astype(np.uint64)
    return (np.asarray(rows).astype(np.uint64) << np.uint64(32)) | below


def by_kind(
    entries: NDArray[np.void],
) -> Iterator[tuple[DType, tuple[int, int], NDArray[np.int64]]]:
    """Yield (dtype, (rows, cols), which of these slots hold such blocks), in this order.

    Not by numpy's `unique` along an axis, which turns a KeyboardInterrupt into a TypeError.
    """
    shapes = shape_codes(entries["rows"], entries["cols"])
    for code in distinct(entries["dtype"]).tolist():
        of_dtype = np.flatnonzero(entries["dtype"] == code)
        for shape in distinct(shapes[of_dtype]).tolist():
            sides = shape >> 32, shape & 0xFFFFFFFF
            yield DType.of_code(code), sides, of_dtype[shapes[of_dtype] == shape]


def block_forms(
    pool: PagePool, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Return how many bytes each of these blocks has on its page, and its encoding.

    Also whether it is a delta with factors: then it may have others on another page.
    """
    lengths = np.empty(len(places), np.int64)
    encodings = np.empty(len(places), np.uint8)
    factored = np.zeros(len(places), np.bool_)
    page_ids, slots = split_places(places)
    for rows, pages, page_index in pool.windows(page_ids):
        entries = slot_entries(pages, page_index, slots[rows])
        lengths[rows] = entries["length"]
        encodings[rows] = entries["encoding"]
        for number, page in enumerate(pages):
            if page.has_factors:
                here = rows[page_index == number]
                factored[here] = _have_factors(page)[slots[here]]
    return lengths, encodings, factored


def _have_factors(page: codec.Page) -> NDArray[np.bool_]:
    """Return which blocks on a page are deltas with factors."""
    slots, arena = page.slots, np.frombuffer(page.payload, np.uint8)
    offsets, lengths = (slots[field].astype(np.int64) for field in ("offset", "length"))
    return codec.EncodedBlocks(arena, offsets, lengths, slots["encoding"].copy()).have_factors()


def block_costs(pool: PagePool, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what each of these blocks takes on its page, its slot included, in bytes."""
    return codec.page_cost(block_forms(pool, places)[0])


def page_bytes(lengths: NDArray[np.int64], encodings: NDArray[np.integer[Any]]) -> int:
    """Return the bytes of a page of blocks with these lengths and encodings, in this order."""
    aligned = np.ones(len(lengths), np.bool_)
    if are_deltas(encodings).any():  # docs/format.md, "Page"
        aligned = encodings == codec.Encoding.RAW
    end = codec.PAGE_HEADER_BYTES + codec.SLOT_BYTES * len(lengths)
    for length, is_aligned in zip(lengths.tolist(), aligned.tolist(), strict=True):
        end += (-end % codec.BLOCK_ALIGNMENT if is_aligned else 0) + length
    return end


def even_shares(
    costs: NDArray[np.int64], chosen: NDArray[np.int64], page_at: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return what blocks take where some of a page share evenly what they take together.

    As those should that have factors, which the first of them has for all. ``chosen`` are these
    blocks, and ``page_at`` is which page each of them is on, or with which it shares, numbers
    from 0.
    """
    shares = costs.copy()
    totals, counts = np.bincount(page_at, costs[chosen]), np.bincount(page_at)
    shares[chosen] = np.ceil(totals / np.maximum(counts, 1)).astype(np.int64)[page_at]
    return shares


def costs_of_owned(
    lengths: NDArray[np.int64],
    factored: NDArray[np.bool_],
    page_ids: NDArray[np.int64],
    owners: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return what blocks of these lengths take of their pages.

    Factors, which the first on a page that needs them has for all, count evenly for all of the same
    model. ``owners`` are numbers of models from 0.
    """
    costs, shared = codec.page_cost(lengths), np.flatnonzero(factored)
    if not len(shared):
        return costs
    return even_shares(costs, shared, _numbered(page_ids[shared], owners[shared]))


def _numbered(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number from 0 for each pair, the same for the same ones; ``second`` are from 0."""
    # Not unique(axis=1), which takes 20 times as long.
    ranks = np.unique(first, return_inverse=True)[1]
    return np.unique(ranks * (second.max(initial=0) + 1) + second, return_inverse=True)[1]


def filled_capacity(sizes: NDArray[np.int64]) -> int:
    """Return what a page is filled with of blocks that take so much about (`even_shares`).

    That is a little less than it holds, unless there is a block that takes more.
    """
    return max(int(PAGE_CAPACITY * _FILLED_PART), min(int(sizes.max()), PAGE_CAPACITY))


def fitting(
    pages: Iterable[NDArray[np.int64]], size_of: Callable[[NDArray[np.int64]], int]
) -> list[NDArray[np.int64]]:
    """Return pages, lists of blocks, of which those that turn out too large are halved.

    ``size_of`` says what the blocks of one take together.
    """
    fit: list[NDArray[np.int64]] = []
    rest = list(pages)[::-1]
    while rest:
        numbers = rest.pop()
        if size_of(numbers) <= PAGE_CAPACITY or len(numbers) == 1:
            fit.append(numbers)
        else:
            half = len(numbers) // 2
            rest += [numbers[half:], numbers[:half]]
    return fit


def joined(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return arrays one after another, also when there is none."""
    return np.concatenate([np.empty(0, np.int64), *parts])


def by_page(page_ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (page id, positions with that id, ascending), by ascending page id."""
    if len(page_ids) == 0:
        return
    order = np.argsort(page_ids, kind="stable")
    ids, starts = np.unique(page_ids[order], return_index=True)
    yield from zip(ids.tolist(), np.split(order, starts[1:]), strict=True)


def map_places(block_map: BlockMap) -> NDArray[np.int64]:
    """Return the places that reading a tensor takes: of its blocks, then of the deltas' bases."""
    places = places_of(block_map)
    if block_map.bases is None:
        return places
    page_ids, slots = block_map.bases
    needed = page_ids != NO_PAGE
    return np.concatenate([places, block_places(page_ids[needed], slots[needed])])


def used_places(maps: Iterable[BlockMap]) -> NDArray[np.int64]:
    """Return the places of blocks and bases that these maps name, ascending and distinct."""
    return distinct(joined(map(map_places, maps)))


def places_of(
    block_map: BlockMap, numbers: NDArray[Any] | slice = slice(None)
) -> NDArray[np.int64]:
    """Return the place of each block, or of some by their numbers or a mask."""
    return block_places(block_map.page_ids[numbers], block_map.slots[numbers])


def base_places(
    block_map: BlockMap, numbers: NDArray[np.int64] | slice = slice(None)
) -> NDArray[np.int64]:
    """Return the place of the base of each block, or some, `NO_PLACE` for those without."""
    if block_map.bases is None:
        return np.full(len(block_map.slots[numbers]), NO_PLACE, np.int64)
    page_ids, slots = block_map.bases[0][numbers], block_map.bases[1][numbers]
    return np.where(page_ids == NO_PAGE, NO_PLACE, block_places(page_ids, slots))


def map_at(
    grid: BlockGrid, dtype: DType, places: NDArray[np.int64], bases: NDArray[np.int64]
) -> BlockMap:
    """Return the block map of blocks at these places; ``bases`` are as `base_places` gives them."""
    is_delta = bases != NO_PLACE
    if not is_delta.any():
        return BlockMap(grid, dtype, *split_places(places))
    base_page_ids, base_slots = split_places(bases)
    base_page_ids[~is_delta], base_slots[~is_delta] = NO_PAGE, 0
    return BlockMap(grid, dtype, *split_places(places), base_page_ids, base_slots)


def pages_read(
    places: NDArray[np.int64], costs: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """Yield (page id, distinct blocks, their bytes on the page), by page id.

    ``places`` are those that a model reads (`map_places` of its maps), with repeats; ``costs`` what
    each takes on its page (`codec.page_cost`).
    """
    if not len(places):
        return
    each, first = np.unique(places, return_index=True)
    page_ids, _ = split_places(each)
    pages, starts, counts = np.unique(page_ids, return_index=True, return_counts=True)
    totals = np.add.reduceat(costs[first], starts)
    yield from zip(pages.tolist(), counts.tolist(), totals.tolist(), strict=True)


def copy_page(pool: PagePool, page_ids: NDArray[np.int64], slots: NDArray[np.uint32]) -> bytes:
    """Return a new page of these blocks in this order, copied as they are encoded."""
    parts: list[bytes] = []
    part_of = np.zeros(len(page_ids), np.uint32)
    slot_of = np.zeros(len(page_ids), np.uint32)
    for rows, pages, page_index in pool.windows(page_ids):
        order = np.argsort(rows)
        mine = rows[order]
        part_of[mine], slot_of[mine] = len(parts), np.arange(len(mine))
        parts.append(codec.gather_page(pages, page_index[order], slots[mine]))
    if len(parts) == 1:
        return parts[0]
    return codec.gather_page([codec.Page(part) for part in parts], part_of, slot_of)
