# SPDX-License-Identifier: Apache-2.0
"""One model as its store has it: what is recorded of it, and where its blocks are.

Of the pages themselves nothing is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import BlockMap
from pydedup.catalog import ModelsAhead, SourceHashes, StoredModel, check_row
from pydedup.errors import CorruptStoreError
from pydedup.hashing import digests_of
from pydedup.layout import (
    NO_PLACE,
    base_places,
    block_place,
    joined,
    places_of,
    split_places,
    used_places,
)
from pydedup.pool import PagePool
from pydedup.sets import distinct, find_among, in_parts

__all__ = ["End", "Recorded", "SourceModel", "read_models", "recorded"]

_PAGES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class End:
    """The store at one end of a copy."""

    adapter: Adapter
    pool: PagePool


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that is to be copied.

    Attributes
    ----------
    digests
        Per tensor, what the blocks of its source hashed to, uint64 (n, 2).
    places
        Where its blocks and the bases of these are, ascending and distinct (`block_places`).
    bases
        The place of each one's base, `NO_PLACE` for blocks that are no deltas.
    """

    stored: StoredModel
    maps: Sequence[BlockMap]
    digests: Sequence[NDArray[np.uint64]]
    places: NDArray[np.int64]
    bases: NDArray[np.int64]

    @property
    def page_ids(self) -> NDArray[np.int64]:
        """The pages that it reads, ascending."""
        return distinct(split_places(self.places)[0])


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a store recorded of the blocks on some pages, by ascending place."""

    places: NDArray[np.int64]
    digests: NDArray[np.uint64]
    bases: NDArray[np.int64]

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which entries are of these places.

        Raises CorruptStoreError when one is missing.
        """
        entries, found = find_among(self.places, places)
        if not found.all():
            page_ids, slots = split_places(places[~found])
            raise CorruptStoreError(
                f"no distinct block is recorded for slot {slots[0]} of page {page_ids[0]}; run "
                "verify on the store"
            )
        return entries


def read_models(source: End, rows: Sequence[ModelRow]) -> list[SourceModel]:
    """Read what is recorded of models, and let the pool expect their pages.

    Raises NotFoundError when one was removed, CorruptStoreError when it does not fit together, and
    UnavailableError when the pool has pages of an earlier state of the database.
    """
    for row in rows:
        check_row(row)  # else a backup that replaces another would have what is damaged for good
    with source.adapter.snapshot():
        ahead = ModelsAhead(source.adapter, rows)
        return [_read_model(source, row, ahead) for row in rows]


def _read_model(source: End, row: ModelRow, ahead: ModelsAhead) -> SourceModel:
    model = StoredModel(source.adapter, row, source.pool, ahead=ahead)
    maps = model.block_maps()
    hashes = SourceHashes(source.adapter, model)
    if not hashes.are_as_added():
        raise CorruptStoreError(
            f"{model.address}: its tensors are not those that it was added with; run verify on "
            "the store"
        )
    digests = [digests_of(hashes.of(ordinal)) for ordinal in range(len(maps))]
    places = used_places(maps)
    bases = np.full(len(places), NO_PLACE, np.int64)
    for block_map in maps:
        needed = base_places(block_map)
        is_delta = needed != NO_PLACE
        own = places_of(block_map, is_delta)
        bases[np.searchsorted(places, own)] = needed[is_delta]
    return SourceModel(model, maps, digests, places, bases)


def recorded(adapter: Adapter, page_ids: NDArray[np.int64]) -> Recorded:
    """Read what is recorded of all blocks on these pages."""
    places: list[NDArray[np.int64]] = []
    bases: list[NDArray[np.int64]] = []
    hashes: list[bytes] = []
    for some in in_parts(page_ids, _PAGES_AT_ONCE):
        with only_sound_rows(adapter):  # of a block that is not seen so `Recorded.at` tells
            rows = adapter.blocks_on_pages(some.tolist())
        places.append(np.array([block_place(row.page_id, row.slot) for row in rows], np.int64))
        needed = [NO_PLACE if row.base_id is None else row.base_id for row in rows]
        bases.append(np.array(needed, np.int64))
        hashes.append(b"".join(row.hash128 for row in rows))
    all_places = joined(places)
    order = np.argsort(all_places)
    return Recorded(all_places[order], digests_of(b"".join(hashes))[order], joined(bases)[order])
