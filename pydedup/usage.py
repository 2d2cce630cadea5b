# SPDX-License-Identifier: Apache-2.0
"""Bytes of models by a key of their metadata: what is shared, and what removing some would free.

Bytes are those of distinct blocks with their slots, deltas together with the bases that they need,
as `Store.explain` counts them. So they do not depend on where a block lies, and a vacuum changes
none. They are exact, and yet few pages are read: the tables say what a model uses of a page, and
only where nobody uses just the blocks in question is the page itself asked for their sizes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import telling_rows, told_damage
from pydedup.blocks import SLOT_BITS
from pydedup.catalog import ModelsAhead, ParsedMaps, StoredModel, recorded_object
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.layout import block_costs, block_places, joined, map_places, split_places
from pydedup.pool import PagePool
from pydedup.sets import distinct, is_among

__all__ = [
    "Readers",
    "Usage",
    "ValueUsage",
    "beside_damage",
    "bytes_by_group",
    "marginal_bytes",
    "text_of",
    "usage_by",
    "value_of",
]

R = TypeVar("R")

_NOBODY, _SEVERAL = -1, -2
# No page is so large: its blocks fit 1 MiB, or it has a single one, whose length is a u32.
_SIZE_BITS = 40
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class ValueUsage:
    """The models whose metadata has one value of a key; ``None``: those without the key.

    Attributes
    ----------
    logical_bytes
        The size of their tensors.
    shared_bytes
        Stored blocks that they use, and models of other values too.
    marginal_bytes
        Stored blocks that nobody else uses: what removing these models would free. Pages that hold
        nothing else are freed at once, blocks on pages of others when `vacuum` packs these anew:
        those of which nobody uses a quarter, at least.
    """

    value: str | None
    models: int
    logical_bytes: int
    shared_bytes: int
    marginal_bytes: int

    @property
    def used_bytes(self) -> int:
        """All stored blocks that they use, each counted once."""
        return self.shared_bytes + self.marginal_bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes by the values of a key; every live model counts for exactly one value.

    What adds up: ``logical_bytes``, and ``used_bytes`` of the store, which is the sum of all
    ``marginal_bytes`` plus ``shared_bytes`` here, where a block that several values use counts
    once. What does not: ``shared_bytes`` of the values, as such a block counts for each of them;
    and what removing several values frees, which is their ``marginal_bytes`` and what only they
    share. ``keys`` are all that the metadata have. Models that are damaged are in no figure, as if
    they were not there; ``damaged`` tells of them.
    """

    key: str
    values: tuple[ValueUsage, ...]
    shared_bytes: int
    keys: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    @property
    def used_bytes(self) -> int:
        """All stored blocks that models use, each counted once."""
        return self.shared_bytes + sum(value.marginal_bytes for value in self.values)


@dataclass(frozen=True, slots=True)
class Readers:
    """Who reads which blocks; readers (models) are numbered from 0.

    Attributes
    ----------
    rows
        int64 (n, 4): a reader, a page, how many distinct blocks it uses of it, and their bytes.
    places
        Returns the places (`pydedup.layout.block_places`) that a reader uses, with repeats.
    costs
        Returns what the blocks at places take.
    """

    rows: NDArray[np.int64]
    places: Callable[[int], NDArray[np.int64]]
    costs: Callable[[NDArray[np.int64]], NDArray[np.int64]]

    @classmethod
    def of_store(
        cls,
        adapter: Adapter,
        pool: PagePool,
        models: Sequence[ModelRow],
        order: Sequence[int] | None = None,
    ) -> Readers:
        """Return models of a store as readers, in this order (ascending ids); in a snapshot.

        With ``order``, in which all their places will be asked for, those of several are read
        together.
        Memory: 260 bytes per row of ``model_pages`` (one for each page of each model) while they
        are read, 32 then. Raises CorruptStoreError where a row cannot be right.
        """
        parsed = ParsedMaps()
        ahead = None if order is None else ModelsAhead(adapter, [models[at] for at in order])

        def places(number: int) -> NDArray[np.int64]:
            model = StoredModel(adapter, models[number], parsed=parsed, ahead=ahead)
            return joined([map_places(block_map) for block_map in model.block_maps()])

        ids = np.array([model.id for model in models], np.int64)
        rows = np.array(adapter.model_pages(), np.int64).reshape(-1, 4)
        rows = rows[is_among(rows[:, 0], ids)]
        # Shifted, negative numbers are not 0 either.
        wrong = np.flatnonzero((rows[:, 2] >> SLOT_BITS != 0) | (rows[:, 3] >> _SIZE_BITS != 0))
        if len(wrong):
            model_id, page_id, blocks, size = rows[wrong[0]].tolist()
            raise CorruptStoreError(
                f"the model with id {model_id} is recorded as using {blocks:,} blocks of page "
                f"{page_id}, {size:,} bytes, which cannot be; run verify, with --repair-from "
                "anything to make the record anew"
            )
        rows[:, 0] = np.searchsorted(ids, rows[:, 0])
        return cls(rows, places, lambda asked: block_costs(pool, asked))


def value_of(metadata: str, key: str, whose: str) -> str | None:
    """Return the value of a key of metadata (JSON); one that is no text, as JSON writes it."""
    return text_of(_metadata(metadata, whose).get(key))


def _metadata(recorded: str, whose: str) -> Mapping[str, Any]:
    return recorded_object(recorded, f"the metadata of {whose}")


def text_of(value: Any) -> str | None:
    """Return a value of metadata as text, as JSON writes it if it is none; ``None`` for none."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def usage_by(adapter: Adapter, pool: PagePool, key: str) -> Usage:
    """Return the bytes of all live models by the values of a key, most marginal bytes first.

    Reads the block maps of models that share pages, and pages of whose blocks some are shared and
    others not. Memory: 4 bytes per block on shared pages, and what `ModelsAhead` and
    `Readers.of_store` take. Raises ArgumentError for a key that is no string, CorruptStoreError.
    """
    if not isinstance(key, str):
        raise ArgumentError(f"by must be a key of metadata, a string, not {key!r:.100}")
    damaged: list[str] = []
    metadata: dict[int, Mapping[str, Any]] = {}
    with adapter.snapshot(), telling_rows(adapter, damaged):
        rows = adapter.models()
        for row in rows:
            try:
                metadata[row.id] = _metadata(row.metadata, row.address)
            except CorruptStoreError as exc:
                damaged.append(str(exc))
        usage = beside_damage(
            adapter,
            [row for row in rows if row.id in metadata],
            damaged,
            lambda sound: _usage_of(adapter, pool, key, sound, metadata),
        )
    return replace(usage, damaged=told_damage(adapter, damaged))


def beside_damage(
    adapter: Adapter,
    rows: Sequence[ModelRow],
    damaged: list[str],
    work: Callable[[Sequence[ModelRow]], R],
    needed: Collection[int] = (),
) -> R:
    """Return what ``work`` makes of models, without those that turn out to be damaged.

    ``damaged`` gets a sentence about each. Raises CorruptStoreError where one of those with the ids
    that are ``needed`` is, or what is damaged is of no model.
    """
    while True:
        try:
            return work(rows)
        except CorruptStoreError as exc:
            lost = _unreadable(adapter, rows, exc)
            if not lost or not lost.keys().isdisjoint(needed):
                raise
            damaged.extend(dict.fromkeys(lost.values()))
            rows = [row for row in rows if row.id not in lost]


def _unreadable(
    adapter: Adapter, rows: Sequence[ModelRow], error: CorruptStoreError
) -> dict[int, str]:
    """Return by id what is said of models that read a page that an error is about.

    Of no page: of those whose tensors or block maps are damaged.
    """
    if error.page_ids:
        readers = {model_id for model_id, _ in adapter.readers_of(error.page_ids)}
        return {row.id: str(error) for row in rows if row.id in readers}
    lost: dict[int, str] = {}
    ahead = ModelsAhead(adapter, rows)
    for row in rows:
        try:
            StoredModel(adapter, row, ahead=ahead).block_maps()
        except CorruptStoreError as exc:
            lost[row.id] = str(exc)
    return lost


def _usage_of(
    adapter: Adapter,
    pool: PagePool,
    key: str,
    models: Sequence[ModelRow],
    metadata: Mapping[int, Mapping[str, Any]],
) -> Usage:
    found = [text_of(metadata[row.id].get(key)) for row in models]
    values = sorted(set(found), key=lambda value: (value is None, value or ""))
    number = {value: i for i, value in enumerate(values)}
    groups = np.array([number[value] for value in found], np.int64)
    order = np.argsort(groups, kind="stable").tolist()
    readers = Readers.of_store(adapter, pool, models, order)
    used, marginal, shared = bytes_by_group(readers, groups, len(values))
    logical = np.zeros(len(values), np.int64)
    np.add.at(logical, groups, [model.logical_bytes for model in models])
    counts = np.bincount(groups, minlength=len(values))
    usages = [
        ValueUsage(value, *map(int, (counts[i], logical[i], used[i] - marginal[i], marginal[i])))
        for i, value in enumerate(values)
    ]
    usages.sort(key=lambda usage: -usage.marginal_bytes)
    keys = sorted({name for row in models for name in metadata[row.id]})
    return Usage(key, tuple(usages), shared, tuple(keys))


def marginal_bytes(readers: Readers, mine: NDArray[np.bool_]) -> int:
    """Return the bytes of blocks that only some of the readers use; ``mine`` says which ones.

    Of the others, no more block maps are read than it takes to see that they use the rest.
    """
    is_mine = mine[readers.rows[:, 0]]
    own, others = readers.rows[is_mine], readers.rows[~is_mine]
    others = others[is_among(others[:, 1], own[:, 1])]
    pages, page_at, counts = np.unique(own[:, 1], return_inverse=True, return_counts=True)
    contested = is_among(pages, others[:, 1])
    alone = (~contested & (counts == 1))[page_at]
    total = int(own[alone, 3].sum())
    own, page_at = own[~alone], page_at[~alone]
    rest = distinct(joined([readers.places(n) for n in distinct(own[:, 0]).tolist()]))
    rest = rest[is_among(split_places(rest)[0], own[:, 1])]
    # Whoever reads most comes first: little is then left to look for among the others.
    blocks: Counter[int] = Counter()
    pages_of: dict[int, list[int]] = {}
    for number, page, n_blocks, _ in others.tolist():
        blocks[number] += n_blocks
        pages_of.setdefault(number, []).append(page)
    left = set(split_places(rest)[0].tolist())
    for number, _ in blocks.most_common():
        if not left:
            break
        if not left.isdisjoint(pages_of[number]):
            rest = rest[~is_among(rest, readers.places(number))]
            left = set(split_places(rest)[0].tolist())
    # All that is used of a page, or nothing, or else the page has to say how much it is.
    at = np.searchsorted(pages, split_places(rest)[0])
    count = np.bincount(at, minlength=len(pages))
    most, most_bytes = _most(own, page_at, len(pages))
    known = (count == most) & (~contested | (counts == 1))
    total += int(most_bytes[known].sum())
    return total + int(readers.costs(rest[~known[at]]).sum())


def bytes_by_group(
    readers: Readers, groups: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return per group what its readers use and what only they use, and what several use.

    ``groups`` has the group of each reader, from 0. The last number counts each block once.
    """
    rows = readers.rows
    used, marginal = np.zeros(n_groups, np.int64), np.zeros(n_groups, np.int64)
    pages, page_at, counts = np.unique(rows[:, 1], return_inverse=True, return_counts=True)
    alone = counts[page_at] == 1
    for total in (used, marginal):
        np.add.at(total, groups[rows[alone, 0]], rows[alone, 3])
    rows, pages = rows[~alone], pages[counts > 1]
    n_pages = len(pages)
    if not n_pages:
        return used, marginal, 0
    page_at = np.searchsorted(pages, rows[:, 1])
    page_most, page_most_bytes = _most(rows, page_at, n_pages)
    owners = _Owners(page_most)
    # One entry per group and page: a key, and the most that one reader of the group uses of it.
    keys, entry_of = np.unique(groups[rows[:, 0]] * n_pages + page_at, return_inverse=True)
    most, most_bytes = _most(rows, entry_of, len(keys))
    together, together_bytes = np.zeros_like(keys), np.zeros_like(keys)
    odd: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    members = distinct(rows[:, 0])
    members = members[np.argsort(groups[members], kind="stable")]
    for group, start, stop in _runs(groups[members]):
        places = distinct(joined([readers.places(n) for n in members[start:stop].tolist()]))
        page_ids, slots = split_places(places)
        at = np.minimum(np.searchsorted(pages, page_ids), n_pages - 1)
        entry = np.minimum(np.searchsorted(keys, group * n_pages + at), len(keys) - 1)
        here = (pages[at] == page_ids) & (keys[entry] == group * n_pages + at)
        places, at, slots, entry = places[here], at[here], slots[here], entry[here]
        owners.note(group, at, slots.astype(np.int64))
        touched, count = np.unique(entry, return_counts=True)
        together[touched] = count
        whole = count == most[touched]
        together_bytes[touched[whole]] = most_bytes[touched[whole]]
        is_odd = is_among(entry, touched[~whole])
        odd.append((entry[is_odd], places[is_odd]))
    entries, places = (joined([pair[i] for pair in odd]) for i in (0, 1))
    np.add.at(together_bytes, entries, _costs(readers, places))
    np.add.at(used, keys // n_pages, together_bytes)

    # Per entry the blocks that only its group uses, and their bytes; per page those of all groups.
    # Known are a group that shares nothing of a page, and a page of which one reader uses all that
    # anybody does; all others are asked for what their blocks take.
    owner, at, slots_used = owners.all()
    is_sole = owner >= 0
    entry = np.searchsorted(keys, owner * n_pages + at)
    sole = np.bincount(entry[is_sole], minlength=len(keys))
    sole_bytes = np.where(sole == together, together_bytes, 0)
    is_open = page_most != np.bincount(at, minlength=n_pages)
    is_open[keys[(sole > 0) & (sole < together)] % n_pages] = True
    asked = is_open[at]
    costs = _costs(readers, block_places(pages[at[asked]], slots_used[asked]))
    all_bytes = np.where(is_open, 0, page_most_bytes)
    np.add.at(all_bytes, at[asked], costs)
    part = asked & is_sole & (sole < together)[np.minimum(entry, len(keys) - 1)]
    np.add.at(sole_bytes, entry[part], costs[part[asked]])
    np.add.at(marginal, keys // n_pages, sole_bytes)
    return used, marginal, int(all_bytes.sum() - sole_bytes.sum())


class _Owners:
    """Which group uses each block on some pages, numbered from 0, if it is only one."""

    def __init__(self, room: NDArray[np.int64]) -> None:
        self._room = room
        self._of = np.full(int(room.sum()), _NOBODY, np.int32)

    def note(self, group: int, page_at: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Say that a group uses these blocks, each named once; once per group."""
        room = self._room.copy()
        np.maximum.at(room, page_at, slots + 1)
        if (room > self._room).any():
            self._grow(np.where(room > self._room, 2 * room, room))
        at = np.cumsum(self._room)[page_at] - self._room[page_at] + slots
        self._of[at] = np.where(self._of[at] == _NOBODY, group, _SEVERAL)

    def all(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return, for all blocks that somebody uses, the owner (or several), page and slot."""
        at = np.flatnonzero(self._of != _NOBODY)
        page_at = np.repeat(np.arange(len(self._room)), self._room)[at]
        slots = at - (np.cumsum(self._room) - self._room)[page_at]
        return self._of[at].astype(np.int64), page_at, slots

    def _grow(self, room: NDArray[np.int64]) -> None:
        owner, page_at, slots = self.all()
        self._room = room
        self._of = np.full(int(room.sum()), _NOBODY, np.int32)
        self._of[np.cumsum(room)[page_at] - room[page_at] + slots] = owner


def _most(
    rows: NDArray[np.int64], entry_of: NDArray[np.int64], n_entries: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return per entry the most blocks that a row of it has, and their bytes."""
    most, most_bytes = np.zeros(n_entries, np.int64), np.zeros(n_entries, np.int64)
    order = np.argsort(rows[:, 2], kind="stable")  # of several assignments, the last one stays
    most[entry_of[order]] = rows[order, 2]
    most_bytes[entry_of[order]] = rows[order, 3]
    return most, most_bytes


def _costs(readers: Readers, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what blocks take, each looked at once."""
    each, at = np.unique(places, return_inverse=True)
    return readers.costs(each)[at]


def _runs(values: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield (value, start, stop) of ascending values."""
    found, starts, counts = np.unique(values, return_index=True, return_counts=True)
    yield from zip(found.tolist(), starts.tolist(), (starts + counts).tolist(), strict=True)
