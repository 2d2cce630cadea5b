# SPDX-License-Identifier: Apache-2.0
"""Tensors and block maps of models, those of several read together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pydedup.adapter import Adapter, ModelRow, TensorRow
from pydedup.catalog.parsed import ParsedMaps
from pydedup.errors import CorruptStoreError
from pydedup.types import ModelInfo

__all__ = ["ModelsAhead"]

#: So many at once, of so many bytes of weights together: of these their block maps take little.
_MODELS: Final = 64
_LOGICAL_BYTES: Final = 256 << 20


class ModelsAhead:
    """What is recorded of models that are asked for in an order that is known before.

    A statement for each would wait for the server as often. For a snapshot, whose state all of it
    is then of. Memory: the rows of up to 64 models.

    Parameters
    ----------
    rows
        The models, in the order in which they are asked for; some may be left out.
    """

    def __init__(self, adapter: Adapter, rows: Sequence[ModelRow | ModelInfo]) -> None:
        self._adapter = adapter
        self._rows = rows
        self._at = {row.id: at for at, row in enumerate(rows)}
        self._tensors: dict[int, list[TensorRow]] = {}
        self._maps: dict[int, list[tuple[int, bytes]]] = {}
        #: For the block maps of these models.
        self.parsed = ParsedMaps()

    def tensors(self, model_id: int) -> list[TensorRow]:
        """Return what `Adapter.tensors` does. Raises CorruptStoreError."""
        if model_id not in self._tensors:
            ids = self._from(model_id)
            try:
                rows = self._adapter.tensors_of(ids)
            except CorruptStoreError:  # perhaps of another, which says so in its turn
                return self._adapter.tensors(model_id)
            self._tensors = {number: [] for number in ids}
            for row in rows:
                self._tensors[row.model_id].append(row)
        return self._tensors.pop(model_id)

    def block_maps(self, model_id: int) -> list[tuple[int, bytes]]:
        """Return what `Adapter.block_maps` does. Raises CorruptStoreError."""
        if model_id not in self._maps:
            ids = self._from(model_id)
            try:
                rows = self._adapter.block_maps_of(ids)
            except CorruptStoreError:
                return self._adapter.block_maps(model_id)
            self._maps = {number: [] for number in ids}
            for owner, ordinal, payload in rows:
                self._maps[owner].append((ordinal, payload))
        return self._maps.pop(model_id)

    def _from(self, model_id: int) -> list[int]:
        """Return which models are read together with this one, the first of them."""
        start = self._at[model_id]
        ids, left = [model_id], _LOGICAL_BYTES - self._rows[start].logical_bytes
        for row in self._rows[start + 1 : start + _MODELS]:
            left -= row.logical_bytes
            if left < 0:
                break
            ids.append(row.id)
        return ids
