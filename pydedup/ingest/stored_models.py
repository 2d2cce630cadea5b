# SPDX-License-Identifier: Apache-2.0
"""The models of the store whose tensors those of an add are compared with."""

from __future__ import annotations

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
from pydedup.sets import distinct
from pydedup.types import DType, TensorInfo

__all__ = ["NEWEST", "Kind", "Stored", "StoredModels", "kind_of"]

#: Models, of the store and of an add, that may be looked at.
NEWEST = 32
# Of those who read some pages, the ones that are asked: the first may be who brought them.
_READERS = 8

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
    """These models; each is read once. Not thread-safe."""

    def __init__(self, adapter: Adapter, catalog: Catalog) -> None:
        self._adapter = adapter
        self._catalog = catalog
        self._newest: list[ModelRow] | None = None
        self._readers: dict[int, ModelRow | None] = {}  # by id
        self._known: dict[int, Stored | None] = {}  # by id

    def newest(self) -> list[ModelRow]:
        """Return the newest models, newest first."""
        if self._newest is None:
            with only_sound_rows(self._adapter):  # what is near is only looked for
                self._newest = self._adapter.models(newest=NEWEST)[::-1]
        return self._newest

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
                model = self._catalog.of_row(row)
                cuts = dict.fromkeys((kind_of(info), grid_of(info)) for info in model.tensors)
                known = Stored(model, {}, list(cuts))
                for info in model.tensors:
                    known.tensors.setdefault(kind_of(info), ByName())[info.name] = info
            self._known[row.id] = known
        return self._known[row.id]
