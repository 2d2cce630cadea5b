# SPDX-License-Identifier: Apache-2.0
"""A new layout for all live blocks, published in one transaction.

Blocks are copied as they are encoded; blocks that no model uses any more are left behind. Old
pages are retired, not deleted: readers under way still find them.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.blocks import BlockMap
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import PageNotFoundError, PydedupError
from pydedup.jobs import job_spec
from pydedup.layout import (
    PAGE_CAPACITY,
    SLOT_BITS,
    block_costs,
    block_places,
    copy_page,
    pages_read,
)
from pydedup.packing import Layout, pack
from pydedup.pool import PagePool
from pydedup.types import Progress

__all__ = ["repack"]

_PAGES_PER_TRANSACTION = 16


@dataclass(slots=True)
class _Places:
    """All blocks that live models use: sorted by (page, slot), numbered 0 to n - 1."""

    page_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    costs: NDArray[np.int64]
    hashes: list[bytes]
    owners: list[NDArray[np.int64]]

    def numbers(self, page_ids: NDArray[np.int64], slots: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the numbers of blocks at these places, all of which exist."""
        return np.searchsorted(
            block_places(self.page_ids, self.slots), block_places(page_ids, slots)
        )


def repack(
    adapter: Adapter, catalog: Catalog, pool: PagePool, *, progress: Progress | None = None
) -> int:
    """Write a better layout if there is one; returns the number of new pages.

    Gives way (returns 0) when another writer publishes meanwhile: the next vacuum tries again.
    """
    epoch = adapter.epoch()
    with adapter.snapshot():
        models = [StoredModel(adapter, row) for row in adapter.models()]
        places = _places(adapter, pool, models)
    if not len(places.page_ids):
        return 0
    layout = pack(places.owners, PAGE_CAPACITY, sizes=places.costs)
    if not _better(layout, places, len(adapter.page_rows(state=LIVE))):
        return 0
    page_of = np.empty(len(places.page_ids), np.int64)
    slot_of = np.empty(len(places.page_ids), np.uint32)
    new_ids: list[int] = []
    job_id = uuid.uuid4().hex
    try:
        for start in range(0, len(layout.pages), _PAGES_PER_TRANSACTION):
            group = layout.pages[start : start + _PAGES_PER_TRANSACTION]
            new_ids.extend(_stage(adapter, pool, places, group, page_of, slot_of, job_id))
            if progress is not None:
                progress("repacking", len(new_ids), len(layout.pages))
        published = _publish(adapter, models, places, page_of, slot_of, new_ids, epoch)
    except PageNotFoundError:
        _discard(adapter, new_ids, job_id)
        if adapter.epoch() == epoch:
            raise
        return 0
    except BaseException:
        # What cannot be removed now (a full disk, a lost connection) goes with the next vacuum.
        with contextlib.suppress(PydedupError):
            _discard(adapter, new_ids, job_id)
        catalog.refresh()
        raise
    if not published:
        _discard(adapter, new_ids, job_id)
        return 0
    with adapter.transaction():
        adapter.delete_job(job_id)
    catalog.refresh()
    return len(new_ids)


def _places(adapter: Adapter, pool: PagePool, models: Sequence[StoredModel]) -> _Places:
    keys = [
        np.unique(np.concatenate([block_places(m.page_ids, m.slots) for m in maps]))
        if (maps := model.block_maps())
        else np.empty(0, np.int64)
        for model in models
    ]
    used = np.unique(np.concatenate(keys)) if keys else np.empty(0, np.int64)
    page_ids, slots = used >> SLOT_BITS, used & ((1 << SLOT_BITS) - 1)
    costs = block_costs(pool, used)
    recorded = {
        (block.page_id, block.slot): block.hash128
        for block in adapter.blocks_on_pages(np.unique(page_ids).tolist())
    }
    hashes = [recorded[place] for place in zip(page_ids.tolist(), slots.tolist(), strict=True)]
    owners = [np.searchsorted(used, key) for key in keys]
    return _Places(page_ids, slots, costs, hashes, owners)


def _better(layout: Layout, places: _Places, live_pages: int) -> bool:
    """Whether fewer pages are stored, or fewer read at no more stored."""
    reads_now = sum(len(np.unique(places.page_ids[owned])) for owned in places.owners)
    reads_then = int(layout.page_reads.sum())
    if layout.stored_pages > live_pages:
        return False
    return layout.stored_pages < live_pages or reads_then < reads_now


def _stage(
    adapter: Adapter,
    pool: PagePool,
    places: _Places,
    group: Sequence[NDArray[np.int64]],
    page_of: NDArray[np.int64],
    slot_of: NDArray[np.uint32],
    job_id: str,
) -> list[int]:
    images = []
    for numbers in group:
        slots = places.slots[numbers].astype(np.uint32)
        images.append(copy_page(pool, places.page_ids[numbers], slots))
    with adapter.transaction():
        payloads = [(codec.page_checksum(image), image) for image in images]
        page_ids = adapter.insert_pages(payloads, state=STAGING)
        adapter.insert_blocks(
            (places.hashes[number], page_id, slot, None)
            for page_id, numbers in zip(page_ids, group, strict=True)
            for slot, number in enumerate(numbers.tolist())
        )
        adapter.put_job(job_id, job_spec("repack"), repr(time.time()), "running")
    for page_id, numbers in zip(page_ids, group, strict=True):
        page_of[numbers] = page_id
        slot_of[numbers] = np.arange(len(numbers), dtype=np.uint32)
    return page_ids


def _publish(
    adapter: Adapter,
    models: Sequence[StoredModel],
    places: _Places,
    page_of: NDArray[np.int64],
    slot_of: NDArray[np.uint32],
    new_ids: Sequence[int],
    epoch: int,
) -> bool:
    with adapter.transaction():
        if not adapter.bump_epoch(epoch):
            return False
        for model in models:
            maps, costs = [], []
            for ordinal, old in enumerate(model.block_maps()):
                numbers = places.numbers(old.page_ids, old.slots)
                new = BlockMap(old.grid, old.dtype, page_of[numbers], slot_of[numbers])
                adapter.replace_block_map(model.row.id, ordinal, list(new.parts()))
                maps.append(new)
                costs.append(places.costs[numbers])
            adapter.delete_model_pages(model.row.id)
            adapter.insert_model_pages(
                (model.row.id, page_id, blocks, size)
                for page_id, blocks, size in pages_read(maps, costs)
            )
        old_ids = [row.id for row in adapter.page_rows(state=LIVE)]
        adapter.set_page_state(old_ids, RETIRED, time.time())
        adapter.set_page_state(new_ids, LIVE)
    return True


def _discard(adapter: Adapter, page_ids: Sequence[int], job_id: str) -> None:
    """Remove what was staged; never what an interrupt hid the publishing of."""
    for start in range(0, len(page_ids), _PAGES_PER_TRANSACTION):
        with adapter.transaction():
            group = page_ids[start : start + _PAGES_PER_TRANSACTION]
            staged = adapter.page_rows(ids=group, state=STAGING)
            adapter.delete_pages([row.id for row in staged])
    with adapter.transaction():
        adapter.delete_job(job_id)
