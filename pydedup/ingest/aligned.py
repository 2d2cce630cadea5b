# SPDX-License-Identifier: Apache-2.0
"""Candidates by position: what other models have in the same place of a tensor of the same name.

The variants of a family are cut alike, so the block at the same place is near even where it is too
far for the similarity index to find it for certain. Where that block is itself a delta, its base is
the candidate: so all of a family come to lie around the blocks of one model. A model whose first
blocks are near to none of these is no relative, and asked no more: models of one architecture that
were trained separately have all names in common and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.blocks import NO_PAGE, BlockGrid
from pydedup.catalog import Catalog, StoredModel
from pydedup.formats.base import TensorEntry
from pydedup.ingest.places import BlockReader
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_table import StoredTable
from pydedup.types import TensorInfo

__all__ = ["Aligned", "ByPosition", "Neighbours"]

# Models that may be looked at, and how many with the tensor are enough.
_NEWEST = 32
_ENOUGH = 2
# Blocks of another model that were compared with and no use, after which it is not asked again;
# models of which that became known, after which no further one is tried.
_PATIENCE = 32
_STRANGERS = 8


# Name and shape of a tensor.
_Key = tuple[str, tuple[int, ...]]


@dataclass(slots=True)
class _Relative:
    """A model of the store: its tensors by name and shape, and what came of asking it."""

    model: StoredModel
    tensors: dict[_Key, TensorInfo]
    asked: int = 0
    is_near: bool = False

    @property
    def is_stranger(self) -> bool:
        """Whether it was asked often enough to no avail."""
        return not self.is_near and self.asked >= _PATIENCE


class ByPosition(Protocol):
    """What gives candidates for the blocks of a matrix."""

    def __call__(self, numbers: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return references of a candidate for each of these blocks, none of a delta.

        `NO_BASE` for blocks that have none.
        """

    def note(self, numbers: NDArray[np.int64], helped: NDArray[np.bool_], /) -> None:
        """Say which of these blocks, that were asked about, were helped by their candidates."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Candidates for the blocks of one tensor, from one other model (a `ByPosition`)."""

    _find: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    _relative: _Relative | None = None

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a candidate for each of these blocks."""
        if self._relative is None:
            return self._find(numbers)
        if self._relative.is_stranger:
            return np.full(len(numbers), NO_BASE, np.int64)
        self._relative.asked += len(numbers)
        return self._find(numbers)

    def note(self, numbers: NDArray[np.int64], helped: NDArray[np.bool_]) -> None:
        """Remember whether the model that the candidates are of is a relative."""
        if self._relative is not None:
            self._relative.is_near |= bool(helped.any())


class Aligned:
    """The newest models of the store, and those of this add that were matched already."""

    def __init__(
        self, adapter: Adapter, catalog: Catalog, stored: StoredTable, reader: BlockReader
    ) -> None:
        self._adapter = adapter
        self._catalog = catalog
        self._stored = stored
        self._reader = reader
        self._rows: list[ModelRow] | None = None  # newest first
        self._relatives: dict[int, _Relative] = {}  # by model id
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
            if len(found) >= _ENOUGH:
                return found
            if other == grid:
                found.append(Neighbours(partial(self._matched_blocks, references)))
        strangers = 0
        for row in sorted(self._newest(), key=lambda row: row.name != name):
            if len(found) >= _ENOUGH or strangers >= _STRANGERS:
                break
            relative = self._relative(row)
            if relative.is_stranger:
                strangers += 1
                continue
            info = relative.tensors.get(key)
            if info is not None and info.block_shape == (grid.block_rows, grid.block_cols):
                # The map is read when a block asks: in a new version of a model few do.
                blocks = partial(self._stored_blocks, relative.model, entry.name)
                found.append(Neighbours(blocks, relative))
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

    def _newest(self) -> list[ModelRow]:
        if self._rows is None:
            self._rows = self._adapter.models(newest=_NEWEST)[::-1]
        return self._rows

    def _relative(self, row: ModelRow) -> _Relative:
        relative = self._relatives.get(row.id)
        if relative is None:
            model = self._catalog.of_row(row)
            tensors = {(info.name, info.shape): info for info in model.tensors}
            relative = self._relatives[row.id] = _Relative(model, tensors)
        return relative
