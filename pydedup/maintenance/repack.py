# SPDX-License-Identifier: Apache-2.0
"""A new layout for live blocks, published in one transaction.

Pages that are full of what their owners all read stay where they are, and others, too, unless what
is saved is worth writing them: pages stored, pages read, and bytes that nobody uses. Blocks are
copied as they are encoded, but for deltas that had better do without their base
(`pydedup.maintenance.orphans`); of pages that are written anew, blocks that no model uses any more
are left behind. A base is in use as long as a delta on it is, and deltas follow it to its new
place. Old pages are retired and not deleted: readers under way still find them. `plan_repack` says
what it would be, to the byte, and changes nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, Adapter, ModelRow
from pydedup.catalog import Catalog, ModelsAhead, StoredModel, tags_of
from pydedup.errors import CorruptStoreError, PydedupError
from pydedup.jobs import PAGES_PER_TRANSACTION, Job
from pydedup.layout import (
    NO_PLACE,
    PAGE_CAPACITY,
    base_places,
    block_place,
    filled_capacity,
    fitting,
    joined,
    least_pages,
    map_at,
    page_bytes,
    pages_read,
    places_of,
    split_place,
)
from pydedup.maintenance.anew import page_image
from pydedup.maintenance.in_use import Places, places_in_use
from pydedup.maintenance.maps import replace_maps
from pydedup.maintenance.orphans import without_orphans
from pydedup.maintenance.rows import lost_models
from pydedup.maintenance.unused import UNUSED_PART
from pydedup.packing import Layout, pack
from pydedup.pool import PagePool
from pydedup.sets import distinct, in_parts
from pydedup.types import Progress

__all__ = ["RepackPlan", "Repacked", "plan_repack", "repack"]

_ROWS_PER_TRANSACTION = 20_000
#: A page is left alone when so much of it is in use, and nothing else on it, and each of its owners
#: reads as much.
_GOOD_PART = 0.9
#: A new page is written for so many that are no longer stored, or no longer read, at least; what
#: nobody uses counts as a part of its page.
_LEAST_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class RepackPlan:
    """A layout that is better than the one there is, and the state of the store it is for.

    ``stays`` says which of ``places.pages`` stay.
    """

    epoch: int
    models: list[StoredModel]
    places: Places
    layout: Layout
    stays: NDArray[np.bool_]

    @property
    def kept(self) -> list[int]:
        """The ids of the pages that stay, in ascending order."""
        ids: list[int] = self.places.pages[self.stays].tolist()
        return ids

    @property
    def orphans_move(self) -> bool:
        """Whether deltas on bases of nobody are copied to new pages as they are."""
        bases = self.places.bases
        deltas = np.flatnonzero((bases != NO_PLACE) & ~self.stays[self.places.page_at])
        return not self.places.is_own[bases[deltas]].all()

    @property
    def pages(self) -> int:
        """How many pages will be new."""
        return len(self.layout.pages)

    @property
    def page_bytes(self) -> int:
        """What the new pages will have, in bytes."""
        lengths, encodings = self.places.lengths, self.places.encodings
        return sum(page_bytes(lengths[n], encodings[n]) for n in self.layout.pages)

    @property
    def reads(self) -> dict[int, tuple[int, int]]:
        """How many pages each model will read, and the fewest that could hold its blocks."""
        ids = [model.row.id for model in self.models]
        costs = codec.page_cost(self.places.lengths)
        least = [least_pages(int(costs[owned].sum())) for owned in self.places.owners]
        return dict(zip(ids, zip(self.layout.page_reads.tolist(), least, strict=True), strict=True))


class Repacked(NamedTuple):
    """How many pages were given up, how many new ones there are for them, and their bytes.

    And how many deltas were stored anew, and what that saved.
    """

    old_pages: int = 0
    new_pages: int = 0
    new_bytes: int = 0
    anew_blocks: int = 0
    anew_saves: int = 0


@dataclass(frozen=True, slots=True)
class _Move:
    """What a new layout changes for one model: parts of its block maps, and what it reads."""

    row: ModelRow
    maps: dict[int, list[bytes]]
    reads: list[tuple[int, int, int]]


def plan_repack(adapter: Adapter, pool: PagePool, *, live_pages: int) -> RepackPlan | None:
    """Return a layout that is better than the ``live_pages`` pages there are, if there is one.

    Reads every page in use once, for the sizes of the blocks on it.
    """
    epoch = adapter.epoch()
    with adapter.snapshot():
        lost = lost_models(adapter)
        if lost:
            raise CorruptStoreError(
                f"the row of the model with id {min(lost)} is damaged or lost, so its pages stay "
                "as they are; run verify on the store"
            )
        rows = adapter.models()
        ahead = ModelsAhead(adapter, rows)
        models = [StoredModel(adapter, row, pool, ahead=ahead) for row in rows]
        as_stored = places_in_use(adapter, pool, models)
        anew = without_orphans(adapter, pool, models, as_stored)
    if not len(as_stored.places):
        return None
    pages_now = live_pages + sum(len(distinct(as_stored.page_at[o])) for o in as_stored.owners)

    def worth(plan: RepackPlan) -> float:
        return _gain(plan, pages_now) if plan.layout.stored_pages <= live_pages else 0.0

    tried = [as_stored] if anew is None else [anew, as_stored]
    plan = max(chain.from_iterable(_plans(epoch, models, some) for some in tried), key=worth)
    if worth(plan) <= 0:
        return None
    if plan.orphans_move:
        # That their pages are written anew was not known before.
        with adapter.snapshot():
            more = without_orphans(adapter, pool, models, as_stored, ~plan.stays)
        if more is not None and (anew is None or more.anew_saves > anew.anew_saves):
            plan = max(chain([plan], _plans(epoch, models, more)), key=worth)
    plan = replace(plan, layout=_settled(pool, plan.places, plan.layout, plan.stays))
    return plan if worth(plan) > 0 else None


def _plans(epoch: int, models: list[StoredModel], places: Places) -> Iterator[RepackPlan]:
    """Yield the layouts that are tried: beside the pages that had better stay, and of all."""
    choices = [_good_pages(places), _staying(places, places.unused < UNUSED_PART)]
    for stays in (*(stays for stays in choices if stays.any()), np.zeros_like(choices[0])):
        yield RepackPlan(epoch, models, places, _layout_beside(places, stays), stays)


def _gain(plan: RepackPlan, pages_now: int) -> float:
    """Return how many pages fewer are stored and read, less what it costs to write new ones."""
    places, layout = plan.places, plan.layout
    saved = pages_now - layout.stored_pages - int(layout.page_reads.sum())
    # What is stored anew is new, while what it was before is litter.
    anew = int(codec.page_cost(places.lengths[places.anew]).sum()) / PAGE_CAPACITY
    unused = float(places.unused[~plan.stays].sum()) - anew
    return saved + unused - _LEAST_GAIN * len(layout.pages)


def repack(
    adapter: Adapter, catalog: Catalog, pool: PagePool, *, progress: Progress | None = None
) -> Repacked | None:
    """Write a better layout if there is one.

    Gives way when another writer publishes meanwhile: it has done nothing then, and returns None,
    or raises PageNotFoundError where that one is a vacuum, which deletes what it gives up.
    """
    plan = plan_repack(adapter, pool, live_pages=len(adapter.page_ids(LIVE)))
    if plan is None:
        return Repacked()
    places, layout = plan.places, plan.layout
    new_places = places.places.copy()
    moved = ~plan.stays[places.page_at] | places.anew
    new_ids: list[int] = []
    job = Job(adapter, "repack")
    try:
        for group in in_parts(layout.pages, PAGES_PER_TRANSACTION):
            new_ids.extend(_stage(pool, places, group, new_places, job))
            if progress is not None:
                progress("repacking", len(new_ids), len(layout.pages))
        _stage_blocks(places, new_places, moved, job)
        moves = [
            _move(model, places, new_places, moved)
            for model, owned in zip(plan.models, places.owners, strict=True)
            if moved[owned].any()
        ]
        old_pages = _publish(adapter, moves, new_ids, plan, job)
    except BaseException:
        # What cannot be removed now (a full disk, a lost connection) goes with the next vacuum.
        with contextlib.suppress(PydedupError):
            job.discard(new_ids)
        catalog.refresh()
        raise
    if old_pages is None:
        job.discard(new_ids)
        return None
    catalog.refresh()
    anew_blocks, anew_saves = int(places.anew.sum()), places.anew_saves
    return Repacked(old_pages, len(new_ids), plan.page_bytes, anew_blocks, anew_saves)


def _good_pages(places: Places) -> NDArray[np.bool_]:
    """Return which pages stay for being such that no layout would make them much better."""
    index, costs = places.page_at, codec.page_cost(places.lengths)
    in_use = np.bincount(index, costs, len(places.pages))
    good = (in_use >= _GOOD_PART * PAGE_CAPACITY) & (places.unused == 0)
    for owned in places.owners:
        read = np.bincount(index[owned], costs[owned], len(in_use))
        good &= (read == 0) | (read >= _GOOD_PART * in_use)
    return _staying(places, good)


def _staying(places: Places, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which of these pages can stay when all others go."""
    index, stays = places.page_at, wanted.copy()
    # What is written of a delta names its base's place: it moves when that does.
    deltas = np.flatnonzero((places.bases != NO_PLACE) & ~places.anew)
    bases = places.bases[deltas]
    while (alone := stays[index[deltas]] & ~stays[index[bases]]).any():
        stays[index[deltas[alone]]] = False
    return stays


def _layout_beside(places: Places, stays: NDArray[np.bool_]) -> Layout:
    """Return a layout of all blocks, of which those on pages that stay are where they are."""
    there = np.flatnonzero(stays[places.page_at] & ~places.anew)
    ends = np.cumsum(np.bincount(places.page_at[there], minlength=len(stays))[stays])
    existing = (np.concatenate([[0], ends]), there)  # places ascend by page
    sizes, capacity = places.costs, PAGE_CAPACITY
    if places.factored.any():
        capacity = filled_capacity(sizes)
    return pack(places.owners, capacity, sizes=sizes, existing=existing)


def _settled(pool: PagePool, places: Places, layout: Layout, stays: NDArray[np.bool_]) -> Layout:
    """Return the layout with pages that fit, and take note of what blocks have on them.

    Of several blocks with the same factors only the first on a page has these.
    """

    def size_of(numbers: NDArray[np.int64]) -> int:
        if places.factored[numbers].any():
            page = codec.Page(page_image(pool, places, numbers))
            places.lengths[numbers] = page.slots["length"]
        return int(codec.page_cost(places.lengths[numbers]).sum())

    pages = fitting(layout.pages, size_of)
    page_at = (np.cumsum(stays) - 1)[places.page_at]
    for number, numbers in enumerate(pages, layout.existing_pages):
        page_at[numbers] = number
    reads = [distinct(page_at[owned]) for owned in places.owners]
    page_reads = np.array([len(read) for read in reads], np.int64)
    return replace(layout, pages=pages, reads=reads, page_reads=page_reads)


def _stage(
    pool: PagePool,
    places: Places,
    group: Sequence[NDArray[np.int64]],
    new_places: NDArray[np.int64],
    job: Job,
) -> list[int]:
    images = [page_image(pool, places, numbers) for numbers in group]
    with job.staging():
        new_ids = job.stage_pages([(codec.page_checksum(image), image) for image in images])
        job.beat()
    for page_id, numbers in zip(new_ids, group, strict=True):
        new_places[numbers] = block_place(page_id, 0) + np.arange(len(numbers))
    return new_ids


def _stage_blocks(
    places: Places, new_places: NDArray[np.int64], moved: NDArray[np.bool_], job: Job
) -> None:
    """Write the rows of blocks that move: only now do all bases of deltas have a place."""
    numbers = np.flatnonzero(moved)
    numbers = numbers[np.argsort(new_places[numbers])]
    for some in in_parts(numbers, _ROWS_PER_TRANSACTION):
        bases = [None if base == NO_PLACE else int(new_places[base]) for base in places.bases[some]]
        with job.staging():
            job.stage_blocks(
                (places.hashes[number], *split_place(place), base)
                for number, place, base in zip(
                    some.tolist(), new_places[some].tolist(), bases, strict=True
                )
            )
            job.beat()


def _move(
    model: StoredModel,
    places: Places,
    new_places: NDArray[np.int64],
    moved: NDArray[np.bool_],
) -> _Move:
    maps, used = {}, []
    for ordinal, old in enumerate(model.block_maps()):
        own, bases = places.numbers(places_of(old)), base_places(old)
        bases[bases != NO_PLACE] = places.numbers(bases[bases != NO_PLACE])
        anew = places.anew[own]
        bases[anew] = places.bases[own[anew]]
        is_delta = bases != NO_PLACE
        numbers = joined([own, bases[is_delta]])
        used.append(numbers)
        if moved[numbers].any():
            bases[is_delta] = new_places[bases[is_delta]]
            new = map_at(old.grid, old.dtype, new_places[own], bases)
            maps[ordinal] = list(new.parts())  # not while others wait for the transaction
    every = joined(used)
    reads = pages_read(new_places[every], codec.page_cost(places.lengths[every]))
    return _Move(model.row, maps, list(reads))


def _publish(
    adapter: Adapter, moves: Sequence[_Move], new_ids: Sequence[int], plan: RepackPlan, job: Job
) -> int | None:
    """Return how many pages were given up; ``None``, and nothing is done, if others published."""
    with adapter.transaction():
        if not adapter.bump_epoch(plan.epoch):
            return None
        kept = plan.kept
        tags = tags_of(adapter, [*kept, *new_ids])
        for move in moves:
            known = {page_id: tags[page_id] for page_id, _, _ in move.reads if page_id in tags}
            replace_maps(adapter, move.row, move.maps, known)
            adapter.delete_model_pages(move.row.id)
            adapter.insert_model_pages((move.row.id, *read) for read in move.reads)
        old_ids = sorted(set(adapter.page_ids(LIVE)).difference(kept))
        adapter.set_page_state(old_ids, RETIRED, time.time())
        adapter.set_page_state(new_ids, LIVE)
        job.end()
    return len(old_ids)
