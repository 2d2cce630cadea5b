# SPDX-License-Identifier: Apache-2.0
"""Whether much of a page is blocks that no model uses, where that takes the block maps to know.

Deliberately not here: what becomes of such pages (`pydedup.maintenance.repack`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.catalog import ModelsAhead, StoredModel
from pydedup.layout import block_costs, block_place, joined, split_places, used_places
from pydedup.pool import PagePool
from pydedup.sets import distinct, find_among, in_parts, is_among

__all__ = ["UNUSED_PART", "is_much_unused"]

#: A page is written anew for itself when nobody uses so much of it.
UNUSED_PART = 0.25
_PAGES_AT_ONCE = 64


def is_much_unused(adapter: Adapter, pool: PagePool, page_ids: Sequence[int]) -> bool:
    """Return whether live models leave `UNUSED_PART` of one of these pages, or more, to nobody.

    Reads the block maps of the models that read them, and those of the pages that have a block
    which no model uses. Memory: 9 bytes per block on these pages, and what `ModelsAhead` takes.
    Raises CorruptStoreError.
    """
    if not page_ids:
        return False
    with adapter.snapshot():
        places = _recorded(adapter, sorted(page_ids))
        is_used = np.zeros(len(places), np.bool_)
        readers = {model_id for model_id, _ in adapter.readers_of(page_ids)}
        rows = [row for row in adapter.models() if row.id in readers]
        ahead = ModelsAhead(adapter, rows)
        for row in rows:
            model = StoredModel(adapter, row, ahead=ahead)
            at, there = find_among(places, used_places(model.block_maps()))
            is_used[at[there]] = True
        if is_used.all():
            return False
        gaps = distinct(split_places(places[~is_used])[0])
        asked = is_among(split_places(places)[0], gaps)
        costs = block_costs(pool, places[asked])
    _, at = np.unique(split_places(places[asked])[0], return_inverse=True)
    unused = np.bincount(at, np.where(is_used[asked], 0, costs)) / np.bincount(at, costs)
    return bool((unused >= UNUSED_PART).any())


def _recorded(adapter: Adapter, page_ids: Sequence[int]) -> NDArray[np.int64]:
    """Return the places of all blocks that are recorded on these pages, ascending."""
    parts = []
    for some in in_parts(page_ids, _PAGES_AT_ONCE):
        rows = adapter.blocks_on_pages(some)
        parts.append(np.array([block_place(row.page_id, row.slot) for row in rows], np.int64))
    return distinct(joined(parts))
