# SPDX-License-Identifier: Apache-2.0
"""The blocks of the store that an add has met, numbered, and what is known of each.

An update of a large model refers to hundreds of thousands of them, so all is in columns of numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import codec
from pydedup.adapter import BlockRow
from pydedup.blocks import SLOT_BITS
from pydedup.errors import CorruptStoreError
from pydedup.ingest.spool import NO_BASE, with_room
from pydedup.layout import block_places, by_page, shape_codes, slot_entries, split_places
from pydedup.sets import distinct, is_among
from pydedup.types import LARGEST_ID, DType

__all__ = ["StoredTable"]

_NONE = -1
_LEAST_ROOM = 64


class StoredTable:
    """Blocks of the store that an add shares or builds deltas on.

    A reference is -(n + 1) for the block with number n; numbers are given out in the order in which
    blocks are met first.

    Attributes
    ----------
    unreadable
        Pages that cannot be read, on which no block is referred to.
    """

    def __init__(self, unreadable: Collection[int] = ()) -> None:
        self.unreadable = np.array(sorted(unreadable), np.int64)
        self._count = 0
        self._places = np.empty(0, np.int64)
        #: What each takes on its page; 0 until somebody looked.
        self._costs = np.empty(0, np.int64)
        #: Of which sum the cost is a part that was made up, 0 where it is what the block takes.
        self._sums = np.empty(0, np.int32)
        #: How many blocks have a part of each sum.
        self._parts = [0]
        #: References to what each is a delta of, or `NO_BASE`.
        self._bases = np.empty(0, np.int64)
        #: Dtype codes, and those of shapes; 0 until somebody looked.
        self._dtypes = np.empty(0, np.uint8)
        self._shapes = np.empty(0, np.uint64)
        # The number of slot s of a page is at its start + s.
        self._number_at = np.empty(0, np.int64)
        self._used = 0
        self._rooms: dict[int, tuple[int, int]] = {}  # start and length, by page
        #: What the blocks of pages take that somebody looked at, by slot.
        self._costs_on: dict[int, NDArray[np.int32]] = {}

    @property
    def page_ids(self) -> NDArray[np.int64]:
        """The pages of all blocks that were met, ascending."""
        return distinct(split_places(self._places[: self._count])[0])

    # ---- numbers ------------------------------------------------------------------------------

    def references(self, rows: Sequence[BlockRow]) -> list[int]:
        """Return the (negative) references of stored blocks, and make those of their bases."""
        page_ids = np.array([row.page_id for row in rows], np.int64)
        slots = np.array([row.slot for row in rows], np.int64)
        # In one place with a page, it would be of another.
        wrong = np.flatnonzero(
            (page_ids < 1) | (page_ids > LARGEST_ID) | (slots < 0) | (slots >= 1 << SLOT_BITS)
        )
        if len(wrong):
            row = rows[wrong[0]]
            error = CorruptStoreError(
                f"a slot is recorded of a block that no page has (slot {row.slot} of page "
                f"{row.page_id}); run verify on the store"
            )
            error.page_ids = tuple(distinct(page_ids[wrong]).tolist())
            raise error
        references = self.references_at(block_places(page_ids, slots))
        deltas = [number for number, row in enumerate(rows) if row.base_id is not None]
        bases = np.array([rows[number].base_id for number in deltas], np.int64)
        self.set_bases(references[deltas], self.references_at(bases))
        found: list[int] = references.tolist()
        return found

    def references_at(self, places: NDArray[np.int64], costs: ArrayLike = 0) -> NDArray[np.int64]:
        """Return the references of the blocks at places (n,); ``costs`` where known, else 0."""
        if not len(places):
            return np.empty(0, np.int64)
        at = self._room_of(*split_places(places))
        numbers = self._number_at[at]
        missing = np.flatnonzero(numbers == _NONE)
        if len(missing):
            _, first = np.unique(at[missing], return_index=True)
            fresh = missing[np.sort(first)]
            chosen = np.broadcast_to(np.asarray(costs, np.int64), len(places))[fresh]
            self._number_at[at[fresh]] = self._append(places[fresh], chosen)
            numbers = self._number_at[at]
        references: NDArray[np.int64] = -1 - numbers
        return references

    def _room_of(self, page_ids: NDArray[np.int64], slots: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return where the number of each block is."""
        if (page_ids == page_ids[0]).all():  # as of most tensors: in a fraction of the time
            return self._room(int(page_ids[0]), int(slots.max()) + 1) + slots.astype(np.int64)
        pages, page_of = np.unique(page_ids, return_inverse=True)
        slots_needed = np.zeros(len(pages), np.int64)
        np.maximum.at(slots_needed, page_of, slots.astype(np.int64) + 1)
        starts = [
            self._room(page_id, needed)
            for page_id, needed in zip(pages.tolist(), slots_needed.tolist(), strict=True)
        ]
        return np.asarray(np.array(starts, np.int64)[page_of] + slots, np.int64)

    def _room(self, page_id: int, needed: int) -> int:
        """Return where the numbers of a page begin, with room for so many slots."""
        start, length = self._rooms.get(page_id, (0, 0))
        if length >= needed:
            return start
        wider = max(_LEAST_ROOM, 1 << (needed - 1).bit_length())
        end = self._used + wider
        self._number_at = with_room(self._number_at, end)
        self._number_at[self._used : end] = _NONE
        self._number_at[self._used : self._used + length] = self._number_at[start : start + length]
        start, self._used = self._used, end
        self._rooms[page_id] = start, wider
        return start

    def _append(self, places: NDArray[np.int64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add blocks, and return their numbers."""
        start, end = self._count, self._count + len(places)
        self._places = with_room(self._places, end)
        self._costs = with_room(self._costs, end)
        self._sums = with_room(self._sums, end)
        self._bases = with_room(self._bases, end)
        self._dtypes = with_room(self._dtypes, end)
        self._shapes = with_room(self._shapes, end)
        new = slice(start, end)
        self._places[new], self._costs[new] = places, costs
        self._bases[new], self._sums[new] = NO_BASE, 0
        self._dtypes[new], self._shapes[new] = 0, 0
        self._count = end
        return np.arange(start, end)

    # ---- what is known --------------------------------------------------------------------------

    def places(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of (negative) references."""
        return self._places[-1 - references]

    def pages(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the page ids of (negative) references."""
        return split_places(self.places(references))[0]

    def readable(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (negative) references, `NO_BASE` for blocks that cannot be read, or their base."""
        if not len(self.unreadable):
            return references
        lost = is_among(self.pages(references), self.unreadable)
        bases = self.bases_of(references)
        deltas = np.flatnonzero(bases != NO_BASE)
        lost[deltas] |= is_among(self.pages(bases[deltas]), self.unreadable)
        return np.where(lost, NO_BASE, references)

    def costs_of(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the blocks of (negative) references take on their pages, 0 if unknown."""
        return self._costs[-1 - references]

    def set_costs(self, references: NDArray[np.int64], costs: ArrayLike) -> None:
        """Say what blocks take on their pages."""
        self._costs[-1 - references] = costs
        self._sums[-1 - references] = 0

    def set_sum(self, references: NDArray[np.int64], total: int) -> None:
        """Say what blocks take together, where it matters to nobody which of them takes what."""
        costs = np.full(len(references), total // len(references))
        costs[0] += total % len(references)
        self.set_costs(references, costs)
        self._sums[-1 - references] = len(self._parts)
        self._parts.append(len(references))

    def parts_apart(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the blocks of sums of which these distinct (negative) references are but a part.

        What each of them takes is unknown from then on.
        """
        sums = self._sums[-1 - references]
        found, counts = np.unique(sums[sums > 0], return_counts=True)
        apart = found[counts < np.array(self._parts)[found]]
        numbers = np.flatnonzero(is_among(self._sums[: self._count], apart))
        blocks: NDArray[np.int64] = -1 - numbers
        if len(blocks):
            self.set_costs(blocks, 0)
        return blocks

    def bases_of(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the references of their bases, `NO_BASE` for blocks that are no deltas."""
        return self._bases[-1 - references]

    def set_bases(self, references: NDArray[np.int64], bases: NDArray[np.int64]) -> None:
        """Say that blocks are deltas of others."""
        self._bases[-1 - references] = bases

    def dtypes_of(self, references: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the codes of their dtypes, 0 if unknown."""
        return self._dtypes[-1 - references]

    def shapes_of(self, references: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the codes of their shapes (`layout.shape_codes`), 0 if unknown."""
        return self._shapes[-1 - references]

    def note_kinds(
        self, references: NDArray[np.int64], dtype: DType, shapes: NDArray[np.uint64]
    ) -> None:
        """Say what dtype and shapes (negative) references have: then nobody need look."""
        self._dtypes[-1 - references] = dtype.code
        self._shapes[-1 - references] = shapes

    def note(
        self,
        references: NDArray[np.int64],
        pages: Sequence[codec.Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
    ) -> None:
        """Remember what pages say of blocks, while they are at hand."""
        try:
            entries = slot_entries(pages, page_index, slots)
        except CorruptStoreError as exc:
            counts = np.array([page.n_slots for page in pages], np.int64)[page_index]
            page_ids = self.pages(references[slots >= counts])
            exc.page_ids = tuple(distinct(page_ids).tolist())
            raise
        self.set_costs(references, codec.page_cost(entries["length"]))
        self._dtypes[-1 - references] = entries["dtype"]
        self._shapes[-1 - references] = shape_codes(entries["rows"], entries["cols"])
        numbers, first = np.unique(page_index, return_index=True)
        page_ids = self.pages(references[first])
        for page_id, number in zip(page_ids.tolist(), numbers.tolist(), strict=True):
            if page_id not in self._costs_on:
                costs = codec.page_cost(pages[number].slots["length"])
                self._costs_on[page_id] = costs.astype(np.int32)

    def without_cost(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of (negative) references on whose page nobody looked, and cost the others.

        A page that was looked at for one block tells of those that are met later, too.
        """
        unknown: NDArray[np.int64] = references[self.costs_of(references) == 0]
        page_ids, slots = split_places(self.places(unknown))
        for page_id, at in by_page(page_ids):
            costs = self._costs_on.get(page_id)
            if costs is not None:
                there = at[slots[at] < len(costs)]  # a damaged block map may name any slot
                self.set_costs(unknown[there], costs[slots[there]])
        left: NDArray[np.int64] = unknown[self.costs_of(unknown) == 0]
        return left
