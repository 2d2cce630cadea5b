# SPDX-License-Identifier: Apache-2.0
"""Which stored or spooled blocks are nearly equal to a new one: the similarity index of a store.

One `pydedup.similarity.L2LSH` per (dtype, rows, cols), made of the segments that earlier adds left
(`pydedup.ingest.stored_index`). Pages that no segment covers, those that a vacuum wrote for
instance, are read and indexed here, and covered by the segment of this add. Blocks that are deltas
are in no index: a base is never itself one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, Adapter
from pydedup.adapter_options import only_sound_rows
from pydedup.arguments import as_dtype
from pydedup.blocks import MatrixView
from pydedup.codec import Page, read_blocks
from pydedup.ingest.places import stacked, values_of
from pydedup.ingest.stored_index import KeptIndex, StoredIndex
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import are_deltas, block_places, by_kind
from pydedup.pool import PagePool
from pydedup.sets import without
from pydedup.signatures import SIDE_BITS, BlockKind, new_index, segment_rows
from pydedup.similarity import L2LSH
from pydedup.types import LARGEST_ID, DType

__all__ = ["Candidates", "can_be_delta", "cut_pieces", "index_pages"]

# Smaller blocks are not looked for: what a delta could save, its place on a page takes.
_MIN_ELEMENTS = 1024
_PIECE_BLOCKS = 4096
# What is kept for the next add takes at most this share of the pool's budget, beside it.
_KEPT_SHARE = 8
# Ids of blocks that have no place yet: above all places.
_SPOOLED = 1 << 62


def can_be_delta(shape: tuple[int, int]) -> bool:
    """Whether blocks of this shape may be kept as deltas."""
    return shape[0] * shape[1] >= _MIN_ELEMENTS and max(shape) < 1 << SIDE_BITS


class Candidates:
    """The index of one add. Not thread-safe.

    Memory: about 250 bytes for each block of the kinds that were asked for; `keep` leaves them to
    the next add of the same open store, unless they are too many.
    """

    def __init__(
        self, adapter: Adapter, pool: PagePool, stored: StoredTable, kept: KeptIndex | None = None
    ) -> None:
        self._adapter = adapter
        self._pool = pool
        self._stored = stored
        self._kept = KeptIndex() if kept is None else kept
        self._read = StoredIndex(None)
        self._own: dict[BlockKind, list[int]] = {}  # places of found blocks that were not read
        self._indexes: dict[BlockKind, L2LSH] = {}
        self._fresh: dict[BlockKind, list[NDArray[np.int64]]] = {}  # spooled ids, by kind
        self._live: NDArray[np.int64] | None = None
        self._uncovered: list[int] = []
        self._found: dict[BlockKind, L2LSH] = {}  # of pages that no segment covers

    @staticmethod
    def takes(dtype: DType, shape: tuple[int, int]) -> bool:
        """Whether blocks of this kind can be in an index."""
        return (dtype.has_distances or dtype.itemsize < 8) and can_be_delta(shape)

    def query(
        self, blocks: MatrixView, k: int
    ) -> Iterator[tuple[DType, NDArray[np.int64], NDArray[np.float64]]]:
        """Yield, per dtype of possible bases, ids and estimated distances, both (n, k).

        ``blocks`` are stacked (places.stacked). Distances are relative L2, infinity where there
        is no candidate; the id says nothing then. `references` says what the others mean.
        """
        if not self.takes(blocks.dtype, blocks.grid.block_shape):
            return
        values = _indexed_values(blocks)
        for dtype in blocks.dtype.base_dtypes:
            index = self._index((dtype, *values.shape[1:]))
            if not len(index):
                continue
            ids, distances = index.query(as_dtype(values, index.dtype), k)
            yield dtype, ids, distances

    def references(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the references of candidates with these ids (n,)."""
        references = ids ^ _SPOOLED
        stored = np.flatnonzero(ids < _SPOOLED)
        references[stored] = self._stored.references_at(ids[stored])
        return references

    def add(self, blocks: MatrixView, numbers: NDArray[np.int64]) -> None:
        """Add stacked blocks that have these numbers on the spool, if their kind is indexed."""
        if not self.takes(blocks.dtype, blocks.grid.block_shape):
            return
        kind = (blocks.dtype, *blocks.grid.block_shape)
        self._index(kind).add(_indexed_values(blocks), _SPOOLED | numbers)
        self._fresh.setdefault(kind, []).append(numbers)

    def segments(
        self,
        number: int,
        page_of: NDArray[np.int64],
        slot_of: NDArray[np.uint32],
        page_ids: list[int],
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield rows of ``signatures`` for what is new: spooled blocks, and pages not covered.

        ``number`` is unique to this add; ``page_of`` (0: not written) and ``slot_of`` are the
        places of the spool's blocks, ``page_ids`` the new pages. Without anything indexed, as
        under a policy without deltas, nothing is covered.
        """
        if not self._fresh and not self._uncovered:
            return iter(())
        return segment_rows(number, {*page_ids, *self._uncovered}, self._pieces(page_of, slot_of))

    def keep(self) -> None:
        """Leave what was read of the index to the next add; nothing may be asked for then."""
        if self._live is None:
            return
        for kind, index in self._indexes.items():
            fresh = [_SPOOLED | numbers for numbers in self._fresh.get(kind, ())]
            index.remove(np.concatenate([*fresh, np.array(self._own.get(kind, ()), np.int64)]))
        self._indexes.clear()
        self._kept.keep(self._read, self._pool.stats()["budget_bytes"] // _KEPT_SHARE)

    # ---- inside -------------------------------------------------------------------------------

    def _pieces(
        self, page_of: NDArray[np.int64], slot_of: NDArray[np.uint32]
    ) -> Iterator[tuple[BlockKind, L2LSH]]:
        for kind, parts in self._fresh.items():
            numbers = np.sort(np.concatenate(parts))
            numbers = numbers[page_of[numbers] > 0]
            places = block_places(page_of[numbers], slot_of[numbers])
            yield from cut_pieces(self._indexes[kind], kind, _SPOOLED | numbers, places)
        for kind, index in self._found.items():
            yield from cut_pieces(index, kind, index.ids, index.ids)

    def _index(self, kind: BlockKind) -> L2LSH:
        index = self._indexes.get(kind)
        if index is None:
            live = self._live_pages()
            index = self._read.of_kind(self._adapter, kind, live)
            if kind in self._found:
                found = self._found[kind]
                self._own[kind] = [place for place in found.ids.tolist() if place not in index]
                index.merge(found)
            self._indexes[kind] = index
        return index

    def _live_pages(self) -> NDArray[np.int64]:
        """Find out, once, which pages are live, and index those that no segment covers."""
        if self._live is not None:
            return self._live
        with only_sound_rows(self._adapter):
            ids = self._adapter.page_ids(LIVE)
            self._read = self._kept.take(self._adapter.meta().get("store_id"))
        # No block has a place on a page with a damaged id.
        live = np.array([number for number in ids if number <= LARGEST_ID], np.int64)
        live = self._live = without(live, self._stored.unreadable)
        self._uncovered = without(live, self._read.covered(self._adapter)).tolist()
        if self._uncovered:
            self._found = index_pages(self._pool, self._uncovered)
        return live


def index_pages(pool: PagePool, page_ids: list[int]) -> dict[BlockKind, L2LSH]:
    """Return indexes, by place, of the blocks on these pages that can be bases."""
    found: dict[BlockKind, L2LSH] = {}
    for rows, pages, page_index in pool.windows(np.array(page_ids, np.int64)):
        for row, number in zip(rows.tolist(), page_index.tolist(), strict=True):
            _index_page(found, page_ids[row], pages[number])
    return found


def _index_page(found: dict[BlockKind, L2LSH], page_id: int, page: Page) -> None:
    table = page.slots
    plain = ~are_deltas(table["encoding"])
    for dtype, shape, at in by_kind(table[plain]):
        if not Candidates.takes(dtype, shape):
            continue
        slots = np.flatnonzero(plain)[at]
        blocks = stacked(len(slots), dtype, shape)
        read_blocks(blocks, np.arange(len(slots)), [page], np.zeros_like(slots), slots)
        index = found.setdefault((dtype, *shape), new_index((dtype, *shape)))
        index.add(
            _indexed_values(blocks),
            block_places(np.full(len(slots), page_id, np.int64), slots),
        )


def _indexed_values(blocks: MatrixView) -> NDArray[Any]:
    """Return stacked blocks as the index has them (docs/format.md, "Signatures")."""
    values = values_of(blocks)
    if blocks.dtype.has_distances:
        return values
    if blocks.dtype.is_float:
        table = np.arange(256, dtype=np.uint8).view(blocks.dtype.numpy).astype(np.float32)
        return np.take(table, values.view(np.uint8))
    # Distances are relative to a block's length, which a zero point is no part of.
    means = values.sum(axis=(1, 2), dtype=np.int64) / values[0].size
    wide = np.float32 if values.itemsize < 4 else np.float64
    centred: NDArray[Any] = values.astype(wide) - means.astype(wide)[:, None, None]
    return as_dtype(centred, np.dtype(np.float32))


def cut_pieces(
    index: L2LSH, kind: BlockKind, ids: NDArray[np.int64], places: NDArray[np.int64]
) -> Iterator[tuple[BlockKind, L2LSH]]:
    """Yield some blocks of an index, by their places, in pieces for a segment."""
    for start in range(0, len(ids), _PIECE_BLOCKS):
        part = slice(start, start + _PIECE_BLOCKS)
        yield kind, index.select(ids[part], places[part])
