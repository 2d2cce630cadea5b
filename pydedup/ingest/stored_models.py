# SPDX-License-Identifier: Apache-2.0
"""The models of the store whose tensors those of an add are compared with."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import BlockGrid
from pydedup.catalog import Catalog, StoredModel, grid_of
from pydedup.errors import CorruptStoreError
from pydedup.formats.base import TensorEntry
from pydedup.ingest.names import ByName
from pydedup.pool import PagePool
from pydedup.sets import distinct
from pydedup.types import DType, TensorInfo

__all__ = ["NEWEST", "KeptModels", "Kind", "Stored", "StoredModels", "kind_of"]

#: Models, of the store and of an add, that may be looked at.
NEWEST = 32
# Of those who read some pages, the ones that are asked: the first may be who brought them.
_READERS = 8
# What is kept for the next add takes at most this share of the pool's budget, beside it.
_KEPT_SHARE = 16

#: Shape of a tensor, and the dtypes of its bases.
Kind: TypeAlias = tuple[tuple[int, ...], tuple[DType, ...]]


def kind_of(tensor: TensorEntry | TensorInfo) -> Kind:
    """Return what tensors have in common that may have bases in each other."""
    return tensor.shape, tensor.dtype.base_dtypes


@dataclass(frozen=True, slots=True)
class Stored:
    """A model of the store, its tensors, and how those of each kind are cut."""

    model: StoredModel
    tensors: dict[Kind, ByName[TensorInfo]]
    cuts: list[tuple[Kind, BlockGrid]]


class StoredModels:
    """These models; each is read once. Not thread-safe.

    Attributes
    ----------
    catalog
        Where they, and their block maps, are remembered.
    """

    def __init__(self, adapter: Adapter, pool: PagePool) -> None:
        self.catalog = Catalog(adapter, pool)
        self._adapter = adapter
        self._read: dict[int, Stored] = {}  # by id
        self._begin()

    def _begin(self) -> None:
        self._newest: list[ModelRow] | None = None
        self._readers: dict[int, ModelRow | None] = {}  # by id
        self._known: dict[int, Stored | None] = {}  # by id

    def end(self) -> None:
        """End an add: keep what was read of the tensors that it asked for, for the next one.

        Which models there are is asked anew then. Rows have metadata of any size.
        """
        self._read = {number: known for number, known in self._known.items() if known is not None}
        self.catalog.forget_others(self._read)
        self._begin()

    def newest(self) -> list[ModelRow]:
        """Return the newest models, newest first."""
        if self._newest is None:
            with only_sound_rows(self._adapter):  # what is near is only looked for
                self._newest = self._adapter.models(newest=NEWEST)[::-1]
        return self._newest

    def version_before(self, name: str) -> list[ModelRow]:
        """Return the newest version of the model with that name, if there is one."""
        with only_sound_rows(self._adapter):
            return self._adapter.models(name=name, newest=1)

    def likeliest(self, name: str) -> list[ModelRow]:
        """Return the newest models, the versions of the one with that name first."""
        return sorted(self.newest(), key=lambda row: row.name != name)

    def readers(self, pages: NDArray[np.int64]) -> list[ModelRow]:
        """Return models that read one of these pages, oldest first."""
        with only_sound_rows(self._adapter):
            rows = self._adapter.readers_of(pages.tolist())
            ids = distinct(np.array([model for model, _ in rows], np.int64))[:_READERS].tolist()
            for number in ids:
                if number not in self._readers:
                    self._readers[number] = self._adapter.model(number)
        return [row for row in map(self._readers.get, ids) if row is not None]

    def with_id(self, number: int) -> ModelRow | None:
        """Return one of those that were returned."""
        newest = (row for row in self.newest() if row.id == number)
        return next(newest, self._readers.get(number))

    def tensors_of(self, row: ModelRow) -> Stored | None:
        """Return a model, ``None`` where what is recorded of its tensors is damaged."""
        if row.id not in self._known:
            known = None
            with suppress(CorruptStoreError):
                known = self._stored(self.catalog.of_row(row))
            self._known[row.id] = known
        return self._known[row.id]

    def _stored(self, model: StoredModel) -> Stored:
        known = self._read.get(model.row.id)
        if known is None or known.model is not model:
            cuts = dict.fromkeys((kind_of(info), grid_of(info)) for info in model.tensors)
            known = self._read[model.row.id] = Stored(model, {}, list(cuts))
            for info in model.tensors:
                known.tensors.setdefault(kind_of(info), ByName())[info.name] = info
        return known


class KeptModels:
    """What an add has read of them, for the next one of the same open store.

    As `KeptIndex`: one add has it at a time, and there is no lock. It is right as long as nobody
    changes the store: a vacuum moves blocks.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[int, StoredModels]] = deque(maxlen=1)

    def take(self, adapter: Adapter, pool: PagePool, epoch: int) -> StoredModels:
        """Return what was kept, if the store is at the same epoch, or begin anew."""
        try:
            kept_at, models = self._kept.pop()
        except IndexError:
            return StoredModels(adapter, pool)
        if kept_at != epoch or not models.catalog.is_of_this_store():
            return StoredModels(adapter, pool)
        return models

    def keep(self, models: StoredModels, pool: PagePool, epoch: int) -> None:
        """Keep what an add asked for, all of it as it is at this epoch, unless it is too much."""
        models.end()
        if models.catalog.memory_bytes <= pool.stats()["budget_bytes"] // _KEPT_SHARE:
            self._kept.append((epoch, models))
