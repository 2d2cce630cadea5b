# SPDX-License-Identifier: Apache-2.0
"""The blocks that live models use, and what they take where they lie.

Deliberately not here: where they had better lie (`pydedup.maintenance.repack`), and which of them
had better be stored otherwise (`pydedup.maintenance.orphans`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter
from pydedup.catalog import StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.layout import (
    NO_PLACE,
    block_forms,
    costs_of_owned,
    joined,
    places_of,
    split_place,
    split_places,
    used_places,
)
from pydedup.maintenance.rows import wrong_reads
from pydedup.maintenance.survey import recorded_blocks
from pydedup.pool import PagePool
from pydedup.sets import distinct, is_among

__all__ = ["Places", "own_places", "places_in_use"]


@dataclass(frozen=True, slots=True)
class Places:
    """All blocks that live models use, those that are only bases of others included.

    They are numbered 0 to n - 1 by ascending place (`block_places`). ``pages`` are the ids of the
    pages they are on, in ascending order.

    Attributes
    ----------
    lengths, encodings
        Of each block, as it is to be stored.
    factored
        Whether it is a delta with factors.
    bases
        The number of each one's base, `NO_PLACE` for blocks that are no deltas.
    origins
        Of blocks that are to be stored anew, the place of the base that they are deltas on now;
        `NO_PLACE` for all others, which are copied.
    is_own
        Which of them are blocks of a model; all others are only bases.
    page_at
        Which of the pages each block is on.
    litter, sizes
        What blocks that nobody uses any more take of each page, and what all on it do.
    owners
        The numbers that each model uses, ascending.
    anew_saves
        How many bytes fewer are taken by what is stored anew, with the bases that go for it.
    """

    places: NDArray[np.int64]
    lengths: NDArray[np.int64]
    encodings: NDArray[np.uint8]
    factored: NDArray[np.bool_]
    hashes: list[bytes]
    bases: NDArray[np.int64]
    origins: NDArray[np.int64]
    is_own: NDArray[np.bool_]
    pages: NDArray[np.int64]
    page_at: NDArray[np.int64]
    litter: NDArray[np.float64]
    sizes: NDArray[np.float64]
    owners: list[NDArray[np.int64]]
    anew_saves: int = 0

    @property
    def anew(self) -> NDArray[np.bool_]:
        """Which blocks are to be stored anew: these always move."""
        anew: NDArray[np.bool_] = self.origins != NO_PLACE
        return anew

    @property
    def costs(self) -> NDArray[np.int64]:
        """What each block takes of its page, with factors as of the newest model that has it."""
        newest = np.zeros(len(self.lengths), np.int64)
        for number, owned in enumerate(self.owners if self.factored.any() else ()):
            newest[owned] = number
        return costs_of_owned(self.lengths, self.factored, self.page_at, newest)

    @property
    def unused(self) -> NDArray[np.float64]:
        """Which part of each page is blocks that nobody uses any more."""
        return self.litter / self.sizes

    def at(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Return the page ids and slots of these blocks."""
        return split_places(self.places[numbers])

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of blocks at these places, all of which exist."""
        return np.searchsorted(self.places, places)


def own_places(model: StoredModel) -> NDArray[np.int64]:
    """Return the places of a model's blocks, without those of bases; with repeats."""
    return joined(places_of(m) for m in model.block_maps())


def places_in_use(adapter: Adapter, pool: PagePool, models: Sequence[StoredModel]) -> Places:
    """Return the blocks that these models use, all that there are.

    Reads the pages that they are on. Raises CorruptStoreError where models read other blocks than
    are recorded.
    """
    keys = [used_places(model.block_maps()) for model in models]
    used = distinct(joined(keys))
    recorded = recorded_blocks(adapter, distinct(split_places(used)[0]))
    lost = next((place for place in used.tolist() if place not in recorded), None)
    if lost is not None:
        page_id, slot = split_place(lost)
        raise CorruptStoreError(
            f"a block map names slot {slot} of page {page_id}, for which no distinct block is "
            "recorded; run verify on the store"
        )
    for model, key in zip(models, keys, strict=True):
        # If the block map is what is wrong, nobody would know any more that it is.
        if wrong_reads(adapter.model_pages(model.row.id), key, {}):
            raise CorruptStoreError(
                f"{model.address} reads other blocks than are recorded, so all pages stay as they "
                "are; run verify on the store"
            )
    rows = [recorded[place] for place in used.tolist()]
    bases = np.array([NO_PLACE if row.base_id is None else row.base_id for row in rows], np.int64)
    is_delta = bases != NO_PLACE
    if not is_among(bases[is_delta], used).all():
        raise CorruptStoreError(
            "a block that is in use is a delta on one that no block map names; "
            "run verify on the store"
        )
    bases[is_delta] = np.searchsorted(used, bases[is_delta])
    there = np.array(sorted(recorded), np.int64)
    lengths, encodings, factored = block_forms(pool, there)
    costs, in_use = codec.page_cost(lengths), is_among(there, used)
    pages, at = np.unique(split_places(there)[0], return_inverse=True)
    return Places(
        places=used,
        lengths=lengths[in_use],
        encodings=encodings[in_use],
        factored=factored[in_use],
        hashes=[row.hash128 for row in rows],
        bases=bases,
        origins=np.full(len(used), NO_PLACE, np.int64),
        is_own=is_among(used, joined(map(own_places, models))),
        pages=pages,
        page_at=at[in_use],
        litter=np.bincount(at, np.where(in_use, 0, costs)).astype(np.float64),
        sizes=np.bincount(at, costs).astype(np.float64),
        owners=[np.searchsorted(used, key) for key in keys],
    )
