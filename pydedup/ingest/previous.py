# SPDX-License-Identifier: Apache-2.0
"""What a new version of a model leaves as it was in the newest one before it.

Each version keeps the hashes of its source's blocks. A block whose 128-bit hash is that of the
block at the same position of the same tensor counts as unchanged and refers to what is stored for
that one, which is not read: hashing the source is all that it costs. Two different blocks with one
hash, which elsewhere are told apart by their bytes, are met here by chance once in 2**128 pairs,
and wherever somebody made them so: the hash is not cryptographic (docs/format.md, "Block hash").
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter
from pydedup.blocks import BlockGrid
from pydedup.catalog import Catalog, SourceHashes, StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.formats.base import TensorEntry
from pydedup.hashing import digests_of
from pydedup.ingest.names import ByName
from pydedup.ingest.places import BlockReader
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import (
    NO_PLACE,
    base_places,
    by_page,
    joined,
    places_of,
    split_places,
    used_places,
)
from pydedup.policies import Policy
from pydedup.sets import distinct, find_among

__all__ = ["Previous", "split_sums"]

_UNKNOWN = 1 << 40


class Previous:
    """The newest version of a model that is being added again, and the hashes of its source.

    ``limit`` is how far what is stored of a tensor may be from its source to be taken again.
    """

    def __init__(
        self,
        adapter: Adapter,
        stored: StoredTable,
        model: StoredModel,
        hashes: SourceHashes,
        limit: float,
    ) -> None:
        self._stored = stored
        self._model = model
        self._maps = model.block_maps()
        self._hashes = hashes
        self._ordinals: ByName[int] = ByName()
        for ordinal, info in enumerate(model.tensors):
            self._ordinals[info.name] = ordinal
        self._references = self._all_references()
        pages = [row[1:] for row in adapter.model_pages(model.row.id)]
        #: Page, distinct blocks that this version has of it, and their bytes; int64 (n, 3).
        self._pages = np.array(pages, np.int64).reshape(-1, 3)
        self._limit = limit

    @classmethod
    def of(
        cls, adapter: Adapter, stored: StoredTable, catalog: Catalog, name: str, policy: Policy
    ) -> Previous | None:
        """Return the newest version, if there is one and the policy takes what is stored of it.

        ``None``, too, where what is recorded of its tensors is damaged, or those of another model.
        """
        rows = adapter.models(name=name, newest=1)
        if not rows:
            return None
        try:
            model = catalog.of_row(rows[0])
            model.block_maps()
        except CorruptStoreError:
            return None
        if policy.max_rel_error == 0 and not model.keeps_bits:
            return None
        if all(model.error_of(info.name) > policy.max_rel_error for info in model.tensors):
            return None
        hashes = SourceHashes(adapter, model)
        if not hashes.are_as_added():
            return None
        return cls(adapter, stored, model, hashes, policy.max_rel_error)

    def unchanged(
        self, entry: TensorEntry, grid: BlockGrid, digests: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], float]:
        """Return references of unchanged blocks, `NO_BASE` for all others, and their error.

        That is the greatest relative L2 difference of the tensor's blocks to what is stored.
        """
        found = np.full(grid.count, NO_BASE, np.int64)
        ordinal = self._ordinals.get(entry.name)
        if ordinal is None:
            return found, 0.0
        info = self._model.tensors[ordinal]
        error = self._model.error_of(info.name)
        if error > self._limit or (info.dtype, info.shape) != (entry.dtype, entry.shape):
            return found, 0.0
        block_map = self._maps[ordinal]
        source = self._hashes.of(ordinal)
        if block_map.grid != grid or len(source) != 16 * grid.count:
            return found, 0.0
        same = np.flatnonzero((digests_of(source) == digests).all(axis=1))
        found[same] = self._stored.readable(self._references[ordinal][same])
        return found, error

    def _all_references(self) -> list[NDArray[np.int64]]:
        """Return the references of all blocks, tensor by tensor, and make those of their bases.

        They are looked up together: one by one, a hundred small tensors take longer than hashing
        the blocks.
        """
        maps, refer = self._maps, self._stored.references_at
        places = [places_of(block_map) for block_map in maps]
        every, bases = refer(joined(places)), joined(map(base_places, maps))
        deltas = np.flatnonzero(bases != NO_PLACE)
        self._stored.set_bases(every[deltas], refer(bases[deltas]))
        return np.split(every, np.cumsum(list(map(len, places)), dtype=np.int64))[: len(maps)]

    def settle_costs(self, references: NDArray[np.int64], reader: BlockReader) -> None:
        """See that it is known what a model has of each page, in bytes.

        ``references`` are all of the model, with bases. Nothing need be read of a page of which
        this version has the same blocks, as their sum is known; nor where it has but raw blocks,
        which that sum tells; nor where a block was looked at meanwhile, as those are that changed
        ones might be near to. The rest is read. When all models of an add were settled,
        `split_sums` has to be called.
        """
        stored = distinct(references[references < 0])
        unknown = self._stored.without_cost(stored)
        if not len(unknown):
            return
        pages = distinct(self._stored.pages(unknown))
        page_of, here = find_among(pages, self._stored.pages(stored))
        mine, page_of = stored[here], page_of[here]
        before, raw = self._raw_costs()
        page_before, here = find_among(pages, split_places(before)[0])
        before, raw, page_before = before[here], raw[here], page_before[here]
        place, is_old = find_among(before, self._stored.places(mine))
        blocks, sizes = self._recorded(pages)
        # Pages of which what is recorded is of the blocks that this version has, and no others.
        is_known = np.bincount(page_before, minlength=len(pages)) == blocks
        is_known[page_of[~is_old]] = False
        raw_sizes = np.zeros(len(pages), np.int64)
        np.add.at(raw_sizes, page_before, raw)
        # None takes more than raw, so each takes as much.
        is_raw = is_known & (raw_sizes == sizes)
        at = np.flatnonzero(is_raw[page_of])
        self._stored.set_costs(mine[at], raw[place[at]])
        is_same = is_known & ~is_raw & (np.bincount(page_of, minlength=len(pages)) == blocks)
        at = np.flatnonzero(is_same[page_of])
        for page, some in by_page(page_of[at]):
            self._stored.set_sum(mine[at[some]], int(sizes[page]))
        reader.learn(self._stored.without_cost(mine))

    def _recorded(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many blocks this version has of each page, and their bytes; 0 of others."""
        known, blocks, sizes = self._pages[np.argsort(self._pages[:, 0])].T
        at, is_there = find_among(known, pages)
        found = np.zeros((2, len(pages)), np.int64)
        found[:, is_there] = blocks[at[is_there]], sizes[at[is_there]]
        return found[0], found[1]

    def _raw_costs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places that this version uses, and what each took if it were raw.

        Of bases that are no blocks of it this is not known: more than any sum.
        """
        places, costs = [], []
        for info, block_map in zip(self._model.in_blocks, self._maps, strict=True):
            heights, widths = block_map.grid.shapes(np.arange(block_map.grid.count))
            places.append(places_of(block_map))
            costs.append(codec.page_cost(heights * widths * info.dtype.itemsize))
        used = used_places(self._maps)
        raw = np.full(len(used), _UNKNOWN)
        raw[np.searchsorted(used, joined(places))] = joined(costs)
        return used, raw


def split_sums(
    stored: StoredTable, reader: BlockReader, models: Iterable[NDArray[np.int64]]
) -> None:
    """See to it that sums which `Previous.settle_costs` found are not used for parts of them.

    That is where models of one add share blocks of a page, and differ in others; the page is read.
    ``models`` are the references of each.
    """
    for references in models:
        unknown = stored.parts_apart(distinct(references[references < 0]))
        reader.learn(stored.without_cost(unknown))
