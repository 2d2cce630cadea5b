# SPDX-License-Identifier: Apache-2.0
"""Deltas as they are stored without their bases: by themselves, or on another of the same base.

Deliberately not here: which of them had better be (`pydedup.maintenance.orphans`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.deltas import delta_limits, replaced
from pydedup.ingest.places import in_pieces, stacked
from pydedup.layout import NO_PLACE, by_kind, copy_page, shape_codes, slot_entries, split_places
from pydedup.maintenance.in_use import Places
from pydedup.pool import PagePool
from pydedup.types import DType

__all__ = ["page_image", "slots_of", "stored_anew"]


def slots_of(pool: PagePool, places: NDArray[np.int64]) -> NDArray[np.void]:
    """Return the slots of blocks."""
    entries = np.empty(len(places), codec.SLOT_DTYPE)
    page_ids, slots = split_places(places)
    for rows, pages, page_index in pool.windows(page_ids):
        entries[rows] = slot_entries(pages, page_index, slots[rows])
    return entries


def stored_anew(
    pool: PagePool,
    places: NDArray[np.int64],
    origins: NDArray[np.int64],
    first: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint64]]:
    """Return what deltas are without the bases at ``origins``: lengths, encodings and digests.

    ``first`` is which of them each may be a delta on instead, or be itself.
    """
    entries = slots_of(pool, places)
    # Of one group, nearly always.
    kinds = entries["dtype"], shape_codes(entries["rows"], entries["cols"])
    on_first = np.logical_and.reduce([kind == kind[first] for kind in kinds])
    on_first &= first != np.arange(len(first))
    firsts = np.where(on_first, places[first], NO_PLACE)
    lengths = np.empty(len(places), np.int64)
    encodings, digests = np.empty(len(places), np.uint8), np.empty((len(places), 2), np.uint64)
    for dtype, shape, chosen in by_kind(entries):
        for at in in_pieces(chosen, dtype, shape):
            encoded, _, found = _encoded(pool, dtype, shape, places[at], origins[at], firsts[at])
            lengths[at], encodings[at], digests[at] = encoded.lengths, encoded.encodings, found
    return lengths, encodings, digests


def _encoded(
    pool: PagePool,
    dtype: DType,
    shape: tuple[int, int],
    places: NDArray[np.int64],
    origins: NDArray[np.int64],
    firsts: NDArray[np.int64],
) -> tuple[codec.EncodedBlocks, NDArray[np.uint64], NDArray[np.uint64]]:
    """Return deltas of one dtype and shape as they are stored without their bases.

    ``origins`` are the places of these, ``firsts`` those of the deltas on the same ones that they
    are deltas on from now on where that takes less, or `NO_PLACE`. Also returns what their slots
    are to carry, and the digests of what they hold.
    """
    blocks = _decoded(pool, dtype, shape, places, origins)
    encoded = codec.encode_blocks(blocks, np.arange(len(places)), planes=True)
    tags = np.zeros(len(places), np.uint64)
    at = np.flatnonzero(firsts != NO_PLACE)
    if len(at):
        bases = _decoded(pool, dtype, shape, firsts[at], origins[at])
        limits = delta_limits(encoded.lengths[at])
        # Each alone: of several in one call the bytes depend on those before, and the call that
        # writes them has others.
        made = [
            codec.encode_deltas(blocks, at[i : i + 1], bases, [i], limits=limits[i : i + 1])
            for i in range(len(at))
        ]
        kinds = np.array([one.encodings[0] for one in made], np.uint8)
        deltas = codec.EncodedBlocks.of([one.arena for one in made], kinds)
        is_smaller = np.flatnonzero(deltas.lengths)
        encoded = replaced(encoded, at[is_smaller], deltas, is_smaller)
        tags[at[is_smaller]] = codec.base_tags(hash_view(bases))[is_smaller]
    return encoded, tags, hash_view(blocks)


def _decoded(
    pool: PagePool,
    dtype: DType,
    shape: tuple[int, int],
    places: NDArray[np.int64],
    origins: NDArray[np.int64],
) -> MatrixView:
    """Return what deltas of one dtype and shape hold, one below the other."""
    view = stacked(len(places), dtype, shape)
    page_ids, slots = split_places(places)
    walk = pool.windows_with_bases(page_ids, split_places(origins))
    for rows, pages, page_index, bases in walk:
        codec.read_blocks(view, rows, pages, page_index, slots[rows], bases=bases)
    return view


def page_image(pool: PagePool, places: Places, numbers: NDArray[np.int64]) -> bytes:
    """Return a new page of these blocks in this order, as they are to be stored."""
    is_anew = places.anew[numbers]
    if not is_anew.any():
        return copy_page(pool, *places.at(numbers))
    pages = []
    page_index, slots = np.zeros((2, len(numbers)), np.int64)
    copied, made = np.flatnonzero(~is_anew), np.flatnonzero(is_anew)
    if len(copied):
        pages.append(codec.Page(copy_page(pool, *places.at(numbers[copied]))))
        slots[copied] = np.arange(len(copied))
    entries = slots_of(pool, places.places[numbers[made]])
    for dtype, shape, chosen in by_kind(entries):
        for some in in_pieces(made[chosen], dtype, shape):
            page_index[some], slots[some] = len(pages), np.arange(len(some))
            pages.append(codec.Page(_page_anew(pool, places, numbers[some], dtype, shape)))
    return codec.gather_page(pages, page_index, slots)


def _page_anew(
    pool: PagePool,
    places: Places,
    numbers: NDArray[np.int64],
    dtype: DType,
    shape: tuple[int, int],
) -> bytes:
    """Return a page of blocks of one dtype and shape that are stored anew."""
    bases = places.bases[numbers]
    firsts = np.where(bases == NO_PLACE, NO_PLACE, places.places[bases])
    encoded, tags, _ = _encoded(
        pool, dtype, shape, places.places[numbers], places.origins[numbers], firsts
    )
    count = len(numbers)
    return codec.build_page(
        encoded.arena,
        encoded.offsets,
        encoded.lengths,
        encoded.encodings,
        np.full(count, dtype.code),
        np.full(count, shape[0]),
        np.full(count, shape[1]),
        tags,
    )
