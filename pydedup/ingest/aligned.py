# SPDX-License-Identifier: Apache-2.0
"""Candidates by position: what other models have in the same place of a tensor of the same name.

The variants of a family are cut alike, so the block at the same place is near even where it is too
far for the similarity index to find it for certain; a prefix that all names of one have makes no
difference (names.py). Where that block is itself a delta, its base is the candidate: so all of a
family come to lie around the blocks of one model. A model that helped none of another's first
blocks is no relative of it, and asked no more: models of one architecture that were trained
separately have all names in common and nothing else. Of names with other prefixes this is settled
for each pair of these: that ``lm_head.weight`` is not ``embed.weight`` says nothing of all others.
The newest models are asked first, or the nearest, once somebody found out (families.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import ModelRow
from pydedup.blocks import BlockGrid
from pydedup.catalog import grid_of
from pydedup.formats.base import TensorEntry
from pydedup.ingest.alike import ByShape, Find, matched_blocks, stored_blocks
from pydedup.ingest.names import ByName, prefixes
from pydedup.ingest.places import BlockReader
from pydedup.ingest.plan import Request
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_models import NEWEST, Kind, StoredModels, kind_of
from pydedup.ingest.stored_table import StoredTable
from pydedup.types import TensorInfo

__all__ = [
    "Aligned",
    "Kinship",
    "Neighbours",
    "Related",
    "Relation",
    "Relative",
]

# How many models are asked at a time.
_ENOUGH = 2
# Blocks of another model that were compared with and no use, after which it is not asked again;
# models of the store, and of the same add, of which that became known, after which no further one
# is tried.
_PATIENCE = 32
_STRANGERS = 8


# A model of the store by its id, one of this add by its address; and the prefixes of the names of
# who asks and of this one (names.py).
_Key = tuple[int | str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Matched:
    """A tensor of a model of this add."""

    name: str
    grid: BlockGrid
    references: NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Relation:
    """What came of asking one model for the blocks of another.

    Attributes
    ----------
    away
        How far its bases are, if that was measured: what a delta takes of the block by itself; 0
        if an adapter seems to be all that there is between them.
    """

    asked: int = 0
    is_near: bool = False
    away: float = np.inf

    def note(self, helped: NDArray[np.bool_]) -> None:
        """Remember which of some blocks it helped."""
        self.asked += len(helped)
        self.is_near |= bool(helped.any())

    @property
    def is_stranger(self) -> bool:
        """Whether it was asked often enough to no avail."""
        return not self.is_near and self.asked >= _PATIENCE


@dataclass(frozen=True, slots=True)
class Relative:
    """What one model has at the places of some blocks.

    Attributes
    ----------
    blocks
        References of its blocks, int64 (n,), deltas among them.
    relation
        That of the two models.
    """

    blocks: NDArray[np.int64]
    relation: Relation


@dataclass(slots=True)
class Kinship:
    """What is known of the relatives of one model (families.py).

    Attributes
    ----------
    measured
        Of how many, newest first, it is known how far they are.
    near
        Those that its blocks are much nearer to than to any base, being deltas.
    times
        How many others each of these stands for, itself included.
    vain
        For how many tensors on end, and for how many stacks of small ones (key: is it a stack?),
        such were looked for in vain. What is small may all have been trained where the rest was
        not, and the other way round.
    """

    measured: int = 0
    near: list[Relation] = field(default_factory=list)
    times: float = 1.0
    vain: Counter[bool] = field(default_factory=Counter)


class Related(Protocol):
    """What knows the relatives of a model."""

    @property
    def kinship(self) -> Kinship:
        """What is known of all of these."""

    def relatives(self, numbers: NDArray[np.int64], most: int, /) -> list[Relative]:
        """Return what models that are no strangers have there; where it can be read, all of it.

        At most so many are asked, newest first.
        """


class Neighbours:
    """Candidates for the blocks of one tensor, from other models (a `ByPosition`, `Related`).

    ``others`` gives what finds them, and what is known of the model that they are of.

    Attributes
    ----------
    kinship
        What is known of all of these.
    """

    def __init__(
        self, others: Callable[[], Iterator[tuple[Find, Relation]]], kinship: Kinship
    ) -> None:
        self._others = others
        self.kinship = kinship
        self._asked: list[Relation] = []

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return candidates from models that are no strangers by now."""
        found = np.full((_ENOUGH, len(numbers)), NO_BASE, np.int64)
        self._asked.clear()
        others: Iterable[tuple[Find, Relation]] = self._others()
        if measured := self.kinship.measured:
            known = islice(others, max(measured, _ENOUGH))
            others = sorted(known, key=lambda other: other[1].away)
        for row, (find, relation) in zip(found, others, strict=False):
            row[:] = find(numbers, False)
            self._asked.append(relation)
        return found

    def relatives(self, numbers: NDArray[np.int64], most: int) -> list[Relative]:
        """Return what models that are no strangers have there; where it can be read, all of it.

        At most so many are asked, newest first.
        """
        found = []
        for find, relation in islice(self._others(), most):
            blocks = find(numbers, True)
            if not (blocks == NO_BASE).any():
                found.append(Relative(blocks, relation))
        return found

    def ask_first(self, number: int, base: int) -> bool:
        """Ask the newest one first whose block there that is, or a delta on it; if there is one."""
        numbers = np.array([number], np.int64)
        for place, (find, relation) in enumerate(self._others(), 1):
            if find(numbers, False).item() == base:
                relation.away = 0.0
                self.kinship.measured = max(self.kinship.measured, place)
                return True
        return False

    def note(self, helped: NDArray[np.bool_]) -> None:
        """Remember whether the models that the candidates are of are relatives."""
        for row, relation in zip(helped, self._asked, strict=False):
            relation.note(row)


class Aligned:
    """The newest models of the store, and those of this add that were matched already.

    Attributes
    ----------
    by_shape
        The tensors of all of these by their shapes instead of their names.
    """

    def __init__(self, models: StoredModels, stored: StoredTable, reader: BlockReader) -> None:
        self._models = models
        self.by_shape = ByShape(self._models, stored)
        self._stored = stored
        self._reader = reader
        # Of this add, by address, newest last.
        self._matched: dict[Kind, dict[str, ByName[_Matched]]] = {}
        # Of the model that asks now.
        self._relations: dict[_Key, Relation] = {}
        self._kinship = Kinship()
        self._asker = ""

    def note(
        self, request: Request, entry: TensorEntry, grid: BlockGrid, references: NDArray[np.int64]
    ) -> None:
        """Remember a tensor of a model of this add."""
        tensors = self._matched.setdefault(kind_of(entry), {})
        of_model = tensors.setdefault(request.address, ByName())
        of_model[entry.name] = _Matched(entry.name, grid, references)
        find = partial(matched_blocks, self._reader, references)
        self.by_shape.note(request.address, entry, grid, find)

    def neighbours(
        self, request: Request | ModelRow, entry: TensorEntry | TensorInfo, grid: BlockGrid
    ) -> Neighbours:
        """Return what gives candidates for the blocks of a tensor.

        They are of models of the same add first, then of older versions of the model that is asked
        for.
        """
        if request.address != self._asker:
            self._relations.clear()
            self._kinship = Kinship()
            self._asker = request.address

        def others() -> Iterator[tuple[Find, Relation]]:
            yield from self._but_strangers(self._in_this_add(request, entry, grid))
            yield from self._but_strangers(self._in_the_store(request, entry, grid))

        return Neighbours(others, self._kinship)

    def _in_this_add(
        self, request: Request | ModelRow, entry: TensorEntry | TensorInfo, grid: BlockGrid
    ) -> Iterator[tuple[_Key, Find]]:
        models = self._matched.get(kind_of(entry), {})
        newest = (one for one in reversed(models.items()) if one[0] != request.address)
        for address, tensors in islice(newest, NEWEST):
            other = tensors.get(entry.name)
            if other is not None and other.grid == grid:
                key = address, prefixes(entry.name, other.name)
                yield key, partial(matched_blocks, self._reader, other.references)

    def _in_the_store(
        self, request: Request | ModelRow, entry: TensorEntry | TensorInfo, grid: BlockGrid
    ) -> Iterator[tuple[_Key, Find]]:
        kind = kind_of(entry)
        for row in self._models.likeliest(request.name):
            other = self._models.tensors_of(row)
            if other is None or kind not in other.tensors:
                continue
            info = other.tensors[kind].get(entry.name)
            if info is not None and grid_of(info) == grid:
                key = row.id, prefixes(entry.name, info.name)
                # The map is read when a block asks: in a new version of a model few do.
                yield key, partial(stored_blocks, self._stored, other.model, info.name)

    def _but_strangers(
        self, others: Iterable[tuple[_Key, Find]]
    ) -> Iterator[tuple[Find, Relation]]:
        """Leave out who is known to be no relative, and all others after some of these."""
        strangers = 0
        for key, find in others:
            relation = self._relations.setdefault(key, Relation())
            if not relation.is_stranger:
                yield find, relation
                continue
            strangers += 1
            if strangers == _STRANGERS:
                return
