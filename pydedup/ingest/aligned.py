# SPDX-License-Identifier: Apache-2.0
"""Candidates by position: what other models have in the same place of a tensor of the same name.

The variants of a family are cut alike, so the block at the same place is near even where it is too
far for the similarity index to find it for certain. Where that block is itself a delta, its base is
the candidate: so all of a family come to lie around the blocks of one model. A model that helped
none of another's first blocks is no relative of it, and asked no more: models of one architecture
that were trained separately have all names in common and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import NO_PAGE, BlockGrid
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.formats.base import TensorEntry
from pydedup.ingest.candidates import can_be_delta
from pydedup.ingest.places import BlockReader
from pydedup.ingest.plan import Request
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import block_places
from pydedup.types import DType, TensorInfo

__all__ = ["Aligned", "ByPosition", "Neighbours"]

# Models that may be looked at, and how many with the tensor are enough.
_NEWEST = 32
_ENOUGH = 2
# Blocks of another model that were compared with and no use, after which it is not asked again;
# models of the store, and of the same add, of which that became known, after which no further one
# is tried.
_PATIENCE = 32
_STRANGERS = 8


# Name, shape and dtypes of bases of a tensor.
_Key = tuple[str, tuple[int, ...], tuple[DType, ...]]
_Other = TypeVar("_Other")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A model of the store, and its tensors."""

    model: StoredModel
    tensors: dict[_Key, TensorInfo]


@dataclass(frozen=True, slots=True)
class _Matched:
    """A tensor of a model of this add, which has this address."""

    address: str
    grid: BlockGrid
    references: NDArray[np.int64]


@dataclass(slots=True)
class _Relation:
    """What came of asking one model for the blocks of another."""

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
    _relation: _Relation

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a candidate for each of these blocks."""
        if self._relation.is_stranger:
            return np.full(len(numbers), NO_BASE, np.int64)
        return self._find(numbers)

    def note(self, numbers: NDArray[np.int64], helped: NDArray[np.bool_]) -> None:
        """Remember whether the model that the candidates are of is a relative."""
        # Not before: blocks of several tensors are asked about together (tensors.py).
        self._relation.asked += len(numbers)
        self._relation.is_near |= bool(helped.any())


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
        self._stored_models: dict[int, _Stored | None] = {}  # by model id
        self._matched: dict[_Key, list[_Matched]] = {}  # of this add, newest last
        # Of the model that asks now: by model id, those of this add by address.
        self._relations: dict[int | str, _Relation] = {}
        self._asker = ""

    def note(
        self, request: Request, entry: TensorEntry, grid: BlockGrid, references: NDArray[np.int64]
    ) -> None:
        """Remember a tensor of a model of this add."""
        matched = _Matched(request.address, grid, references)
        self._matched.setdefault(_key_of(entry), []).append(matched)

    def neighbours(self, request: Request, entry: TensorEntry, grid: BlockGrid) -> list[Neighbours]:
        """Return what gives candidates for the blocks of a tensor, per model that has such a one.

        Models of the same add come first, then older versions of the model that is asked for. None
        where the policy takes no deltas, or such blocks can be none.
        """
        if not request.policy.uses_deltas or not can_be_delta(grid.block_shape):
            return []
        if request.address != self._asker:
            self._relations.clear()
            self._asker = request.address
        key = _key_of(entry)
        found = list(islice(self._in_this_add(key, grid), _ENOUGH))
        return found + list(islice(self._in_the_store(request, key, grid), _ENOUGH - len(found)))

    def _in_this_add(self, key: _Key, grid: BlockGrid) -> Iterator[Neighbours]:
        matched = reversed(self._matched.get(key, []))
        for other, relation in self._but_strangers((one.address, one) for one in matched):
            if other.grid == grid:
                yield Neighbours(partial(self._matched_blocks, other.references), relation)

    def _in_the_store(self, request: Request, key: _Key, grid: BlockGrid) -> Iterator[Neighbours]:
        newest = sorted(self._newest(), key=lambda row: row.name != request.name)
        for row, relation in self._but_strangers((row.id, row) for row in newest):
            other = self._stored_model(row)
            info = None if other is None else other.tensors.get(key)
            if other is not None and info is not None and info.block_shape == grid.block_shape:
                # The map is read when a block asks: in a new version of a model few do.
                yield Neighbours(partial(self._stored_blocks, other.model, key[0]), relation)

    def _but_strangers(
        self, others: Iterable[tuple[int | str, _Other]]
    ) -> Iterator[tuple[_Other, _Relation]]:
        """Leave out who is known to be no relative, and all others after some of these."""
        strangers = 0
        for key, other in others:
            relation = self._relations.setdefault(key, _Relation())
            if not relation.is_stranger:
                yield other, relation
                continue
            strangers += 1
            if strangers == _STRANGERS:
                return

    def _matched_blocks(
        self, references: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        chosen = references[numbers]
        bases = self._reader.bases_of(chosen)
        return np.where(bases == NO_BASE, chosen, bases)

    def _stored_blocks(
        self, model: StoredModel, name: str, numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        try:
            block_map = model.block_map(name)
        except CorruptStoreError:
            return np.full(len(numbers), NO_BASE, np.int64)
        page_ids, slots = block_map.page_ids[numbers], block_map.slots[numbers]
        if block_map.bases is not None:
            base_page_ids, base_slots = (column[numbers] for column in block_map.bases)
            is_delta = base_page_ids != NO_PAGE
            page_ids = np.where(is_delta, base_page_ids, page_ids)
            slots = np.where(is_delta, base_slots, slots)
        else:
            is_delta = np.zeros(len(numbers), np.bool_)
        references = self._stored.references_at(block_places(page_ids, slots))
        self._stored.note_dtype(references[~is_delta], block_map.dtype)
        return self._stored.readable(references)

    def _newest(self) -> list[ModelRow]:
        if self._rows is None:
            with only_sound_rows(self._adapter):  # what is near is only looked for
                self._rows = self._adapter.models(newest=_NEWEST)[::-1]
        return self._rows

    def _stored_model(self, row: ModelRow) -> _Stored | None:
        """Return a model, ``None`` where what is recorded of its tensors is damaged."""
        if row.id not in self._stored_models:
            known = None
            with suppress(CorruptStoreError):
                model = self._catalog.of_row(row)
                tensors = {_key_of(info): info for info in model.tensors}
                known = _Stored(model, tensors)
            self._stored_models[row.id] = known
        return self._stored_models[row.id]


def _key_of(tensor: TensorEntry | TensorInfo) -> _Key:
    return tensor.name, tensor.shape, tensor.dtype.base_dtypes
