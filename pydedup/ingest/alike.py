# SPDX-License-Identifier: Apache-2.0
"""Candidates by shape: what other models have in tensors of one shape, whatever they are called.

Those of one model that are cut alike are asked about one place together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import ModelRow
from pydedup.blocks import BlockGrid
from pydedup.catalog import StoredModel, grid_of
from pydedup.errors import CorruptStoreError
from pydedup.formats.base import TensorEntry
from pydedup.ingest.places import BlockReader
from pydedup.ingest.plan import Request
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_models import Kind, StoredModels, kind_of
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import NO_PLACE, base_places, joined, places_of, shape_codes
from pydedup.types import TensorInfo

__all__ = ["Alike", "ByShape", "Find", "matched_blocks", "stored_blocks"]

#: References at the places of some blocks: of what the deltas among them are of, or of these too.
Find: TypeAlias = Callable[[NDArray[np.int64], bool], NDArray[np.int64]]


class Alike:
    """Tensors of one model that have one shape and are cut alike; more may be added.

    Of each it knows what it is called, and what finds its blocks.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Find]] = []
        # By the number of a block: that of all tensors there were when somebody asked. Of a mixture
        # of experts there may be thousands, each of which is looked for among all others.
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, which: int) -> tuple[str, Find]:
        return self._tensors[which]

    def __iter__(self) -> Iterator[tuple[str, Find]]:
        return iter(self._tensors)

    def add(self, name: str, find: Find) -> None:
        """Add a tensor."""
        self._tensors.append((name, find))

    def blocks(self, number: int) -> NDArray[np.int64]:
        """Return references of what each tensor has at that block, or of its base, int64 (n,)."""
        known = self._blocks.get(number, np.empty(0, np.int64))
        if len(known) < len(self._tensors):
            at = np.array([number], np.int64)
            known = joined([known, *(find(at, False) for _, find in self._tensors[len(known) :])])
            self._blocks[number] = known
        return known


class ByShape:
    """Models of the store, and those of this add that were matched: their tensors, by shape."""

    def __init__(self, models: StoredModels, stored: StoredTable) -> None:
        self._models = models
        self._stored = stored
        # Of this add, by address, newest last; and those of the store that were asked for, by id.
        self._matched: dict[tuple[Kind, BlockGrid], dict[str, Alike]] = {}
        self._of_store: dict[tuple[Kind, BlockGrid, int], Alike] = {}

    def note(self, address: str, entry: TensorEntry, grid: BlockGrid, find: Find) -> None:
        """Remember a tensor of a model of this add."""
        of_kind = self._matched.setdefault((kind_of(entry), grid), {})
        of_kind.setdefault(address, Alike()).add(entry.name, find)

    def alike(
        self,
        request: Request | ModelRow,
        entry: TensorEntry | TensorInfo,
        grid: BlockGrid,
        likely: int | str | None,
        pages: NDArray[np.int64],
        *,
        is_transposed: bool,
    ) -> Iterator[tuple[int | str, Alike]]:
        """Yield models that have tensors of one shape which are cut alike, and these.

        The shape is that of the tensor, or its transpose. The likely model comes first, then those
        of the same add, the one that asks among them, those who read these pages, and the newest.
        """
        kind, cut = kind_of(entry), grid
        if is_transposed:
            kind, cut = (entry.shape[::-1], entry.dtype.base_dtypes), grid.transposed
        added = self._matched.get((kind, cut), {})
        for key, model in _each_once(self._likeliest(request, added, likely, pages)):
            alike = added[model] if isinstance(model, str) else self._in_store(model, kind, cut)
            if len(alike):
                yield key, alike

    def parts(
        self,
        request: Request | ModelRow,
        entry: TensorEntry | TensorInfo,
        grid: BlockGrid,
        likely: int | str | None,
        pages: NDArray[np.int64],
    ) -> Iterator[tuple[int | str, BlockGrid, Alike]]:
        """Yield models that have tensors as long as the transpose of this one on one side alone.

        So are the parts of a tensor that packs several, and what packs it. They are cut into blocks
        of its shape, and the grid says how many. Models come in the order of `alike`.
        """
        turned, dtypes = grid.transposed, entry.dtype.base_dtypes

        def may_be(cut: BlockGrid) -> bool:
            is_one_alike = (cut.rows == turned.rows) != (cut.cols == turned.cols)
            return is_one_alike and cut.block_shape == turned.block_shape

        added: dict[str, list[tuple[BlockGrid, Alike]]] = {}
        for (kind, cut), of_kind in self._matched.items():
            if kind[1] == dtypes and may_be(cut):
                for address, alike in of_kind.items():
                    added.setdefault(address, []).append((cut, alike))
        for key, model in _each_once(self._likeliest(request, added, likely, pages)):
            if isinstance(model, str):
                found = added[model]
            elif (known := self._models.tensors_of(model)) is not None:
                found = [
                    (cut, self._in_store(model, kind, cut))
                    for kind, cut in known.cuts
                    if kind[1] == dtypes and may_be(cut)
                ]
            else:
                continue
            for cut, alike in found:
                yield key, cut, alike

    def _likeliest(
        self,
        request: Request | ModelRow,
        added: Collection[str],
        likely: int | str | None,
        pages: NDArray[np.int64],
    ) -> Iterator[str | ModelRow]:
        """Yield models in the order of `alike`; who reads the pages is asked when it is needed."""
        if isinstance(likely, str) and likely in added:
            yield likely
        if isinstance(likely, int):
            row = self._models.with_id(likely)
            if row is not None:
                yield row
        yield from reversed(list(added))
        if len(pages):
            yield from self._models.readers(pages)
        yield from self._models.likeliest(request.name)

    def _in_store(self, row: ModelRow, kind: Kind, cut: BlockGrid) -> Alike:
        key = kind, cut, row.id
        if key not in self._of_store:
            alike = self._of_store[key] = Alike()
            known = self._models.tensors_of(row)
            if known is not None and kind in known.tensors:
                for info in known.tensors[kind].values():
                    if grid_of(info) == cut:
                        alike.add(
                            info.name, partial(stored_blocks, self._stored, known.model, info.name)
                        )
        return self._of_store[key]


def _each_once(models: Iterable[str | ModelRow]) -> Iterator[tuple[int | str, str | ModelRow]]:
    """Yield models with what they are known by, also where they are given more than once."""
    known: set[int | str] = set()
    for model in models:
        key = model if isinstance(model, str) else model.id
        if key not in known:
            known.add(key)
            yield key, model


# No methods: what is kept of these would keep its owner until the garbage collector comes.
def matched_blocks(
    reader: BlockReader,
    references: NDArray[np.int64],
    numbers: NDArray[np.int64],
    with_deltas: bool,
) -> NDArray[np.int64]:
    """Return references of blocks of a tensor of this add, of their bases without deltas."""
    chosen = references[numbers]
    if with_deltas:
        return chosen
    return reader.plain(chosen)


def stored_blocks(
    stored: StoredTable,
    model: StoredModel,
    name: str,
    numbers: NDArray[np.int64],
    with_deltas: bool,
) -> NDArray[np.int64]:
    """Return the same of a stored tensor; `NO_BASE` where it cannot be read."""
    try:
        block_map = model.block_map(name)
    except CorruptStoreError:
        return np.full(len(numbers), NO_BASE, np.int64)
    places = places_of(block_map, numbers)
    bases = base_places(block_map, numbers)
    is_delta = bases != NO_PLACE
    shapes = shape_codes(*block_map.grid.shapes(numbers))
    if with_deltas:
        references = stored.references_at(places)
        on = stored.references_at(bases[is_delta])
        stored.set_bases(references[is_delta], on)
        stored.note_kinds(references, block_map.dtype, shapes)
    else:
        references = stored.references_at(np.where(is_delta, bases, places))
        plain = np.flatnonzero(~is_delta)
        stored.note_kinds(references[plain], block_map.dtype, shapes[plain])
    return stored.readable(references)
