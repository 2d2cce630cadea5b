# SPDX-License-Identifier: Apache-2.0
"""Candidates by position: what other models have in the same place of a tensor of the same name.

The variants of a family are cut alike, so the block at the same place is near even where it is too
far for the similarity index to find it for certain. Where that block is itself a delta, its base is
the candidate: so all of a family come to lie around the blocks of one model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.blocks import NO_PAGE, BlockGrid, BlockMap
from pydedup.catalog import StoredModel
from pydedup.formats.base import TensorEntry
from pydedup.ingest.places import BlockReader, StoredTable
from pydedup.ingest.spool import NO_BASE

__all__ = ["Aligned", "Neighbours"]

# Models that are asked, and how many with the tensor are enough.
_ASKED = 32
_ENOUGH = 2


#: Given numbers of blocks of a tensor, gives references of a candidate for each, none of a delta.
Neighbours = Callable[[NDArray[np.int64]], NDArray[np.int64]]


class Aligned:
    """The newest models of the store, and those of this add that were matched already."""

    def __init__(self, adapter: Adapter, stored: StoredTable, reader: BlockReader) -> None:
        self._adapter = adapter
        self._stored = stored
        self._reader = reader
        self._models: list[StoredModel] | None = None
        # Of this add: (name, shape) of a tensor -> (grid, references), newest last.
        self._matched: dict[
            tuple[str, tuple[int, ...]], list[tuple[BlockGrid, NDArray[np.int64]]]
        ] = {}

    def note(self, entry: TensorEntry, grid: BlockGrid, references: NDArray[np.int64]) -> None:
        """Remember a tensor of this add."""
        self._matched.setdefault((entry.name, entry.shape), []).append((grid, references))

    def neighbours(self, entry: TensorEntry, grid: BlockGrid, name: str) -> list[Neighbours]:
        """Return what gives candidates for the blocks of a tensor, per model that has such a one.

        ``name`` is that of the model which the tensor is of; its older versions come first.
        """
        found: list[Neighbours] = []
        for other, references in reversed(self._matched.get((entry.name, entry.shape), [])):
            if other == grid:
                found.append(partial(self._matched_blocks, references))
        for model in sorted(self._newest(), key=lambda model: model.row.name != name):
            if len(found) >= _ENOUGH:
                break
            if (entry.name, entry.shape) in [(info.name, info.shape) for info in model.tensors]:
                block_map = model.block_map(entry.name)
                if block_map.grid == grid:
                    found.append(partial(self._stored_blocks, block_map))
        return found[:_ENOUGH]

    def _matched_blocks(
        self, references: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        chosen = references[numbers]
        bases = self._reader.bases_of(chosen)
        return np.where(bases == NO_BASE, chosen, bases)

    def _stored_blocks(self, block_map: BlockMap, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        page_ids, slots = block_map.page_ids[numbers], block_map.slots[numbers]
        if block_map.bases is not None:
            base_page_ids, base_slots = (column[numbers] for column in block_map.bases)
            is_delta = base_page_ids != NO_PAGE
            page_ids = np.where(is_delta, base_page_ids, page_ids)
            slots = np.where(is_delta, base_slots, slots)
        return self._stored.references_at(page_ids, slots)

    def _newest(self) -> list[StoredModel]:
        if self._models is None:
            rows = sorted(self._adapter.models(), key=lambda row: -row.id)
            self._models = [StoredModel(self._adapter, row) for row in rows[:_ASKED]]
        return self._models
