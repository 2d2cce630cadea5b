# SPDX-License-Identifier: Apache-2.0
"""What a new version of a model leaves as it was in the newest one before it.

Each version keeps the hashes of its source's blocks. A block whose 128-bit hash is that of the
block at the same position of the same tensor counts as unchanged and refers to what is stored for
that one, which is not read: hashing the source is all that it costs. Two different blocks with one
hash, which elsewhere are told apart by their bytes, would be met here once in 2**128 pairs.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.blocks import NO_PAGE, BlockGrid
from pydedup.catalog import Catalog, SourceHashes, StoredModel
from pydedup.certificates import largest_error
from pydedup.formats.base import TensorEntry
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_table import StoredTable
from pydedup.policies import Policy

__all__ = ["Previous"]


class Previous:
    """The newest version of a model that is being added again.

    Attributes
    ----------
    largest_error
        Greatest relative L2 difference between its blocks and what is stored for them.
    """

    def __init__(self, adapter: Adapter, stored: StoredTable, model: StoredModel) -> None:
        self._stored = stored
        self._model = model
        self._maps = model.block_maps()
        self._hashes = SourceHashes(adapter, model)
        self._ordinals = {info.name: i for i, info in enumerate(self._model.tensors)}
        # What a block takes on its page is not known without reading that: on average it is this.
        pages = sorted(
            (page_id, size // max(blocks, 1))
            for _, page_id, blocks, size in adapter.model_pages(model.row.id)
        )
        self._pages, self._costs = np.array(pages, np.int64).reshape(-1, 2).T
        self.largest_error = _error_of(model.row)

    @classmethod
    def of(
        cls, adapter: Adapter, stored: StoredTable, catalog: Catalog, name: str, policy: Policy
    ) -> Previous | None:
        """Return the newest version, if there is one and the policy takes what is stored of it."""
        rows = adapter.models(name=name)
        if not rows or _error_of(rows[-1]) > policy.max_rel_error:
            return None
        return cls(adapter, stored, catalog.of_row(rows[-1]))

    def references(
        self, entry: TensorEntry, grid: BlockGrid, digests: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Return references of unchanged blocks, `NO_BASE` for all others."""
        found = np.full(grid.count, NO_BASE, np.int64)
        ordinal = self._ordinals.get(entry.name)
        if ordinal is None:
            return found
        info = self._model.tensors[ordinal]
        if (info.dtype, info.shape) != (entry.dtype, entry.shape):
            return found
        block_map = self._maps[ordinal]
        source = self._hashes.of(ordinal)
        if block_map.grid != grid or len(source) != 16 * grid.count:
            return found
        before = np.frombuffer(source, "<u8").reshape(-1, 2)
        same = np.flatnonzero((before == digests).all(axis=1))
        found[same] = self._refer(block_map.page_ids[same], block_map.slots[same])
        if block_map.bases is not None:
            base_page_ids, base_slots = block_map.bases
            deltas = same[base_page_ids[same] != NO_PAGE]
            bases = self._refer(base_page_ids[deltas], base_slots[deltas])
            self._stored.set_bases(found[deltas], bases)
        return found

    def _refer(self, page_ids: NDArray[np.int64], slots: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return references of places, and note what they cost."""
        costs = np.zeros(len(page_ids), np.int64)
        listed = np.flatnonzero(np.isin(page_ids, self._pages))
        costs[listed] = self._costs[np.searchsorted(self._pages, page_ids[listed])]
        return self._stored.references_at(page_ids, slots, costs)


def _error_of(row: ModelRow) -> float:
    return largest_error(json.loads(row.certificate or "{}"))
