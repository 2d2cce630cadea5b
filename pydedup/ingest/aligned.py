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
from pydedup.blocks import NO_PAGE, BlockGrid
from pydedup.catalog import Catalog, StoredModel
from pydedup.formats.base import TensorEntry
from pydedup.ingest.places import BlockReader, StoredTable
from pydedup.ingest.spool import NO_BASE
from pydedup.types import TensorInfo

__all__ = ["Aligned", "Neighbours"]

# Models that are asked, and how many with the tensor are enough.
_ASKED = 32
_ENOUGH = 2


# Name and shape of a tensor.
_Key = tuple[str, tuple[int, ...]]

#: Given numbers of blocks of a tensor, gives references of a candidate for each, none of a delta.
Neighbours = Callable[[NDArray[np.int64]], NDArray[np.int64]]


class Aligned:
    """The newest models of the store, and those of this add that were matched already."""

    def __init__(
        self, adapter: Adapter, catalog: Catalog, stored: StoredTable, reader: BlockReader
    ) -> None:
        self._adapter = adapter
        self._catalog = catalog
        self._stored = stored
        self._reader = reader
        # Models with their tensors by name and shape.
        self._models: list[tuple[StoredModel, dict[_Key, TensorInfo]]] | None = None
        # Of this add: (name, shape) of a tensor -> (grid, references), newest last.
        self._matched: dict[_Key, list[tuple[BlockGrid, NDArray[np.int64]]]] = {}

    def note(self, entry: TensorEntry, grid: BlockGrid, references: NDArray[np.int64]) -> None:
        """Remember a tensor of this add."""
        self._matched.setdefault((entry.name, entry.shape), []).append((grid, references))

    def neighbours(self, entry: TensorEntry, grid: BlockGrid, name: str) -> list[Neighbours]:
        """Return what gives candidates for the blocks of a tensor, per model that has such a one.

        ``name`` is that of the model which the tensor is of; its older versions come first.
        """
        found: list[Neighbours] = []
        key = entry.name, entry.shape
        for other, references in reversed(self._matched.get(key, [])):
            if other == grid:
                found.append(partial(self._matched_blocks, references))
        for model, tensors in sorted(self._newest(), key=lambda pair: pair[0].row.name != name):
            if len(found) >= _ENOUGH:
                break
            info = tensors.get(key)
            if info is not None and info.block_shape == (grid.block_rows, grid.block_cols):
                # The map is read when a block asks: in a new version of a model few do.
                found.append(partial(self._stored_blocks, model, entry.name))
        return found[:_ENOUGH]

    def _matched_blocks(
        self, references: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        chosen = references[numbers]
        bases = self._reader.bases_of(chosen)
        return np.where(bases == NO_BASE, chosen, bases)

    def _stored_blocks(
        self, model: StoredModel, name: str, numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        block_map = model.block_map(name)
        page_ids, slots = block_map.page_ids[numbers], block_map.slots[numbers]
        if block_map.bases is not None:
            base_page_ids, base_slots = (column[numbers] for column in block_map.bases)
            is_delta = base_page_ids != NO_PAGE
            page_ids = np.where(is_delta, base_page_ids, page_ids)
            slots = np.where(is_delta, base_slots, slots)
        else:
            is_delta = np.zeros(len(numbers), np.bool_)
        references = self._stored.references_at(page_ids, slots)
        self._stored.note_dtype(references[~is_delta], block_map.dtype)
        return references

    def _newest(self) -> list[tuple[StoredModel, dict[_Key, TensorInfo]]]:
        if self._models is None:
            rows = sorted(self._adapter.models(), key=lambda row: -row.id)
            models = [self._catalog.of_row(row) for row in rows[:_ASKED]]
            self._models = [
                (model, {(info.name, info.shape): info for info in model.tensors})
                for model in models
            ]
        return self._models
