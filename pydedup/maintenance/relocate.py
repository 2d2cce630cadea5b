# SPDX-License-Identifier: Apache-2.0
"""Makes models name the new places of blocks that were restored, in one transaction."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.blocks import BlockMap
from pydedup.catalog import tags_of
from pydedup.errors import ConflictError
from pydedup.jobs import NO_SIGN, Job
from pydedup.layout import (
    NO_PLACE,
    base_places,
    block_costs,
    block_place,
    map_at,
    pages_read,
    places_of,
    split_place,
    split_places,
    used_places,
)
from pydedup.maintenance.maps import replace_maps
from pydedup.maintenance.survey import sound_models, stored_model
from pydedup.pool import PagePool
from pydedup.sets import distinct, find_among, is_among, without

__all__ = ["Left", "Moves", "relocate"]


class Moves:
    """Where blocks went that lay on damaged pages, or were deltas on such."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        self._bases: dict[int, int] = {}
        self._costs: dict[int, int] = {}

    def note(self, old: int, new: int, base: int | None, cost: int) -> None:
        """Say that a block lies at a new place, where its base does, and what it takes there."""
        self.places[old] = new
        self._bases[old] = NO_PLACE if base is None else base
        self._costs[new] = cost

    def costs(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the blocks at new places take."""
        return np.array([self._costs[place] for place in places.tolist()], np.int64)

    def table(self) -> _Table:
        """Return all moves as arrays."""
        old = np.array(sorted(self.places), np.int64)
        new, bases = (
            np.array([column[place] for place in old.tolist()], np.int64)
            for column in (self.places, self._bases)
        )
        return _Table(old, new, bases)


@dataclass(frozen=True, slots=True)
class _Table:
    """Moves by ascending old place: the new one, and where the base is now, or `NO_PLACE`."""

    old: NDArray[np.int64]
    new: NDArray[np.int64]
    bases: NDArray[np.int64]

    def find(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which places moved, and their entries here."""
        entries, is_there = find_among(self.old, places)
        moved = np.flatnonzero(is_there)
        return moved, entries[moved]


@dataclass(slots=True)
class Left:
    """What came of it.

    Attributes
    ----------
    used
        Ids of new pages that models read now.
    missing
        Damaged pages that models still read: per place on them, the models.
    """

    used: set[int] = field(default_factory=set)
    missing: dict[int, dict[int, set[str]]] = field(default_factory=dict)

    def keep(self, page_ids: Iterable[int], reader: str) -> None:
        """Note that a model reads these damaged pages, and nobody knows what of them."""
        for page_id in page_ids:
            self._keep(page_id, NO_PLACE, reader)

    def keep_places(self, places: NDArray[np.int64], damaged: Collection[int], reader: str) -> None:
        """Note that a model reads those of these places that are on damaged pages."""
        on_damaged = is_among(split_places(places)[0], list(damaged))
        for place in places[on_damaged].tolist():
            self._keep(split_place(place)[0], place, reader)

    def _keep(self, page_id: int, place: int, reader: str) -> None:
        self.missing.setdefault(page_id, {}).setdefault(place, set()).add(reader)


def relocate(
    adapter: Adapter, pool: PagePool, moves: Moves, damaged: Collection[int], job: Job
) -> Left:
    """Publish restored blocks: one short transaction, which reads all that it changes.

    Damaged pages that nobody reads any more are retired. Of pages the pool must have those of
    deltas that were restored without their base.

    Raises ConflictError, before anything is changed, when a vacuum took the staging for abandoned.
    """
    table, left = moves.table(), Left()
    new_pages = distinct(split_places(table.new)[0]).tolist()
    with adapter.transaction():
        adapter.bump_epoch()  # from here on no vacuum collects
        if len(adapter.page_rows(ids=new_pages, state=STAGING)) < len(new_pages):
            raise ConflictError(
                "restored blocks that were staged were collected by a vacuum: the repair "
                f"{NO_SIGN}; nothing was changed, run it again"
            )
        reads: dict[int, dict[int, tuple[int, int]]] = {}
        for model_id, page_id, blocks, size in adapter.model_pages():
            reads.setdefault(model_id, {})[page_id] = blocks, size
        pages_of_deltas: set[int] = set()
        rows = sound_models(adapter)
        known = {row.id for row in rows if row.state in (LIVE, STAGING)}
        for model_id in reads.keys() - known:  # its row is damaged or lost, and may come back
            left.keep(reads[model_id].keys() & set(damaged), f"the model with id {model_id}")
        for row in rows:
            mine = reads.get(row.id, {})
            if row.state != LIVE or mine.keys().isdisjoint(damaged):
                continue
            model = stored_model(adapter, row)
            if model is None:
                left.keep(mine.keys() & set(damaged), row.address)
                continue
            old_maps = model.block_maps()
            maps = [_moved(block_map, table) for block_map in old_maps]
            changed = {i: new for i, new in enumerate(maps) if new is not old_maps[i]}
            for ordinal in changed:
                pages_of_deltas.update(_pages_of_deltas(old_maps[ordinal], table))
            before, after = used_places(old_maps), used_places(maps)
            used = distinct(split_places(after)[0]).tolist()
            parts = {ordinal: list(new.parts()) for ordinal, new in changed.items()}
            replace_maps(adapter, row, parts, tags_of(adapter, used))
            _change_reads(mine, before, after, moves, damaged, pool)
            adapter.delete_model_pages(row.id)
            adapter.insert_model_pages((row.id, page, *figures) for page, figures in mine.items())
            left.used.update(used)
            left.keep_places(after, damaged, model.address)
        _change_rows(adapter, moves, pages_of_deltas, left.missing)
        adapter.set_page_state(sorted(left.used.intersection(new_pages)), LIVE)
        adapter.set_page_state(sorted(set(damaged) - left.missing.keys()), RETIRED, time.time())
        job.end()
    return left


def _moved(block_map: BlockMap, table: _Table) -> BlockMap:
    """Return a block map that names new places; the same one when it names no other."""
    places = places_of(block_map)
    bases = base_places(block_map)
    moved, entries = table.find(places)
    base_moved, base_entries = table.find(bases)
    if not len(moved) and not len(base_moved):
        return block_map
    bases[base_moved] = table.new[base_entries]
    places[moved], bases[moved] = table.new[entries], table.bases[entries]
    return map_at(block_map.grid, block_map.dtype, places, bases)


def _pages_of_deltas(block_map: BlockMap, table: _Table) -> Iterator[int]:
    """Yield the pages of deltas whose base moved."""
    base_moved, _ = table.find(base_places(block_map))
    yield from distinct(block_map.page_ids[base_moved]).tolist()


def _change_reads(
    reads: dict[int, tuple[int, int]],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    moves: Moves,
    damaged: Collection[int],
    pool: PagePool,
) -> None:
    """Change what a model reads of each page, given the places that it used and uses."""
    gone = without(before, after)
    page_ids = split_places(gone)[0]
    on_damaged = is_among(page_ids, list(damaged))
    costs = np.zeros(len(gone), np.int64)
    costs[~on_damaged] = block_costs(pool, gone[~on_damaged])
    for page_id in distinct(page_ids).tolist():
        if page_id not in reads:
            continue  # it should have been: then there is nothing to change
        blocks, size = reads[page_id]
        some = page_ids == page_id
        rest = blocks - int(some.sum())
        # What each took of a damaged page nobody knows.
        size = size * rest // blocks if page_id in damaged else size - int(costs[some].sum())
        if rest > 0:
            reads[page_id] = rest, size
        else:
            del reads[page_id]
    come = without(after, before)
    for page_id, blocks, size in pages_read(come, moves.costs(come)):
        reads[page_id] = blocks, size


def _change_rows(
    adapter: Adapter,
    moves: Moves,
    pages_of_deltas: Collection[int],
    missing: Mapping[int, object],
) -> None:
    """Change the index of blocks: deltas name the new places of bases, and no block is there twice.

    Rows of damaged pages that go, go with them.
    """
    rows = adapter.blocks_on_pages(sorted(missing.keys() | set(pages_of_deltas)))
    gone, moved = [], []
    for row in rows:
        if block_place(row.page_id, row.slot) in moves.places:
            if row.page_id in missing:
                gone.append(row.id)
        elif row.base_id in moves.places:
            gone.append(row.id)
            moved.append((row.hash128, row.page_id, row.slot, moves.places[row.base_id]))
    adapter.delete_blocks(gone)
    adapter.insert_blocks(moved)
