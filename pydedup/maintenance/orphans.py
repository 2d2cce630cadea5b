# SPDX-License-Identifier: Apache-2.0
"""Bases that no model has as a block of its own any more, and deltas that had better do without.

The model that brought a base is gone, and the base lives on for the deltas on it. Where these take
less without it, they are stored anew: the one of the newest model by itself, the others as deltas
on that one, or by themselves as well. What a delta holds stays the same to the bit, also of one
that was within an error bound.
Deliberately not here: where blocks go, and writing them (`pydedup.maintenance.repack`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter, PageRow
from pydedup.blocks import MatrixView
from pydedup.catalog import ModelsAhead, ParsedMaps, StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.hashing import hash_keys, hash_view
from pydedup.ingest.deltas import delta_limits, replaced
from pydedup.ingest.places import stacked
from pydedup.layout import (
    NO_PLACE,
    are_deltas,
    base_places,
    by_kind,
    copy_page,
    joined,
    shape_codes,
    slot_entries,
    split_places,
)
from pydedup.maintenance.in_use import Places, own_places
from pydedup.maintenance.unused import UNUSED_PART
from pydedup.pool import PagePool
from pydedup.quotas import Quotas
from pydedup.sets import distinct, find_among, is_among, union
from pydedup.types import DType
from pydedup.usage import value_of

__all__ = ["may_pay_without", "page_image", "without_orphans"]

#: Pages are read for it where it may save so much of them.
_LEAST_OF_PAGES = 0.1
#: Deltas are stored anew for what may be so much of what they take with their base.
_LEAST_OF_BLOCKS = 0.05
_BYTES_AT_ONCE = 4 << 20


def may_pay_without(adapter: Adapter, live: Sequence[PageRow]) -> bool:
    """Return whether a tenth of the pages concerned may be saved; ``live`` are all live pages.

    Reads all block maps, and no page: what a block takes is estimated by the others on its page.
    Memory: 8 bytes per block in use and per base of a model, and what `ModelsAhead` takes.
    """
    own, deltas, bases, lossy = [], [], [], []
    with adapter.snapshot():
        rows = adapter.models()
        parsed, ahead = ParsedMaps(), ModelsAhead(adapter, rows)
        try:
            for row in rows:
                model = StoredModel(adapter, row, parsed=parsed, ahead=ahead)
                mine = own_places(model)
                its = joined(base_places(block_map) for block_map in model.block_maps())
                own.append(distinct(mine))
                deltas.append(mine[its != NO_PLACE])
                bases.append(its[its != NO_PLACE])
                lossy.append(np.full(len(bases[-1]), not model.keeps_bits, np.int64))
        except CorruptStoreError:
            return False  # of a damaged model, which verify tells
        reads = np.array(adapter.model_pages(), np.int64).reshape(-1, 4)
    all_deltas, first = np.unique(joined(deltas), return_index=True)
    all_bases = joined(bases)[first]
    is_orphan = ~is_among(all_bases, joined(own))
    if not is_orphan.any():
        return False
    pages, at = np.unique(reads[:, 1], return_inverse=True)
    average = np.bincount(at, reads[:, 3]) / np.maximum(np.bincount(at, reads[:, 2]), 1)

    orphans, group = np.unique(all_bases[is_orphan], return_inverse=True)
    page_at, is_there = find_among(
        pages, split_places(np.concatenate([orphans, all_deltas[is_orphan]]))[0]
    )
    costs = np.where(is_there, average[page_at], 0.0)
    of_deltas = np.bincount(group, costs[len(orphans) :])
    # About one of the deltas is saved: another takes the place of the base.
    saved = of_deltas / np.bincount(group)
    wanted = saved >= _LEAST_OF_BLOCKS * (costs[: len(orphans)] + of_deltas)
    # Within a bound, deltas have few bits; those on one another have all, and mostly take more.
    is_lossy = np.bincount(group, joined(lossy)[first][is_orphan]) > 0
    wanted &= ~is_lossy | (np.bincount(group) == 1)
    payloads = {row.id: row.payload_bytes for row in live}
    sizes = np.array([payloads.get(page_id, 0) for page_id in pages.tolist()], np.float64)
    group = np.concatenate([np.arange(len(orphans)), group])
    wanted = _on_pages_that_go(wanted, group, page_at, costs, np.zeros(len(pages)), sizes)
    concerned = sizes[distinct(page_at[wanted[group]])].sum()
    return bool(wanted.any() and saved[wanted].sum() >= _LEAST_OF_PAGES * concerned)


def _on_pages_that_go(
    wanted: NDArray[np.bool_],
    group: NDArray[np.int64],
    page_at: NDArray[np.int64],
    costs: NDArray[Any],
    litter: NDArray[np.float64],
    sizes: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return which of the wanted groups leave no block on a page that stays as it is.

    There it would take as much as before, for nobody. ``group``, ``page_at`` and ``costs`` are of
    the blocks of all groups, bases included, ``litter`` and ``sizes`` of all pages.
    """
    while True:
        left = np.bincount(page_at, np.where(wanted[group], costs, 0), len(sizes))
        stays = litter + left < UNUSED_PART * sizes
        still = wanted & (np.bincount(group, stays[page_at], len(wanted)) == 0)
        if np.array_equal(still, wanted):
            return wanted
        wanted = still


def without_orphans(
    adapter: Adapter, pool: PagePool, models: Sequence[StoredModel], places: Places
) -> Places | None:
    """Return the blocks in use without bases that they had better do without, if there are such.

    Reads and encodes deltas on bases of nobody. Memory: some MiB, and some 100 bytes for each.
    """
    groups = _Groups.of(places, _values(adapter, models))
    if not len(groups.deltas):
        return None
    entries = _entries(pool, places.places[groups.deltas])
    first = groups.starts[groups.group]
    # Of one group, nearly always.
    kinds = entries["dtype"], shape_codes(entries["rows"], entries["cols"])
    on_first = np.logical_and.reduce([kind == kind[first] for kind in kinds])
    on_first[groups.starts] = False
    its = places.places[groups.deltas]
    origins = places.places[places.bases[groups.deltas]]
    firsts = np.where(on_first, its[first], NO_PLACE)
    lengths = np.empty(len(its), np.int64)
    encodings = np.empty(len(its), np.uint8)
    try:
        for dtype, shape, chosen in by_kind(entries):
            for at in _some_at_once(chosen, dtype, shape):
                encoded, _, digests = _encoded(pool, dtype, shape, its[at], origins[at], firsts[at])
                hashes = [places.hashes[number] for number in groups.deltas[at].tolist()]
                if hash_keys(digests) != hashes:
                    return None
                lengths[at], encodings[at] = encoded.lengths, encoded.encodings
    except CorruptStoreError:
        return None  # verify tells what is damaged
    after = np.bincount(groups.group, codec.page_cost(lengths)).astype(np.int64)
    is_better = groups.on_pages_that_go(places, after < groups.before)
    if not is_better.any():
        return None
    chosen = np.flatnonzero(is_better[groups.group])
    numbers = groups.deltas[chosen]
    bases = np.full(len(places.places), NO_PLACE)
    is_delta = are_deltas(encodings[chosen])
    bases[numbers[is_delta]] = groups.deltas[first[chosen[is_delta]]]
    anew = _Anew(numbers, lengths[chosen], encodings[chosen], bases[numbers])
    saved = int((groups.before - after)[is_better].sum())
    return _changed(places, anew, distinct(places.bases[numbers]), saved)


@dataclass(frozen=True, slots=True)
class _Anew:
    """Blocks that are to be stored anew: as what, and the numbers of their bases or `NO_PLACE`."""

    numbers: NDArray[np.int64]
    lengths: NDArray[np.int64]
    encodings: NDArray[np.uint8]
    bases: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Deltas on bases that are nobody's own, those on one behind each other.

    Attributes
    ----------
    deltas
        Their numbers, in each group that of the newest model first.
    group, starts
        Which group each is in, and where each group begins.
    before
        What each group takes together with its base.
    """

    deltas: NDArray[np.int64]
    group: NDArray[np.int64]
    starts: NDArray[np.int64]
    before: NDArray[np.int64]

    def on_pages_that_go(self, places: Places, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return what `_on_pages_that_go` does of these."""
        bases = places.bases[self.deltas[self.starts]]
        numbers = np.concatenate([bases, self.deltas])
        group = np.concatenate([np.arange(len(bases)), self.group])
        costs, page_at = codec.page_cost(places.lengths[numbers]), places.page_at[numbers]
        return _on_pages_that_go(wanted, group, page_at, costs, places.litter, places.sizes)

    @classmethod
    def of(cls, places: Places, values: Sequence[int]) -> _Groups:
        """Return the groups that may be worth it; ``values`` as `_values` gives them."""
        deltas = np.flatnonzero(places.bases != NO_PLACE)
        deltas = deltas[~places.is_own[places.bases[deltas]]]
        newest = np.zeros(len(places.places), np.int64)
        highest = newest.copy()
        lowest = np.full(len(newest), len(values))
        for number, (value, owned) in enumerate(zip(values, places.owners, strict=True)):
            newest[owned] = number  # models are in the order of their ids
            lowest[owned] = np.minimum(lowest[owned], value)
            highest[owned] = np.maximum(highest[owned], value)
        deltas = deltas[np.lexsort((-deltas, -newest[deltas], places.bases[deltas]))]
        for _ in range(2):  # all, and those that are left
            bases, starts, group = np.unique(
                places.bases[deltas], return_index=True, return_inverse=True
            )
            costs, counts = codec.page_cost(places.lengths), np.bincount(group)
            of_deltas = np.bincount(group, costs[deltas]).astype(np.int64)
            groups = cls(deltas, group, starts, costs[bases] + of_deltas)
            if not len(deltas):
                break
            may_pay = of_deltas >= _LEAST_OF_BLOCKS * counts * groups.before
            # Each of several may take more: that is not for others to pay.
            of_one = np.minimum.reduceat(lowest[deltas], starts) == np.maximum.reduceat(
                highest[deltas], starts
            )
            wanted = groups.on_pages_that_go(places, may_pay & (of_one | (counts == 1)))
            deltas = deltas[wanted[group]]
        return groups


def _values(adapter: Adapter, models: Sequence[StoredModel]) -> list[int]:
    """Return a number for each model, the same for those whose blocks all quotas count together.

    Where that is damaged, each has its own.
    """
    numbers: dict[object, int] = {}
    found = []
    try:
        keys = sorted({quota.key for quota in Quotas(adapter) if quota.measure == "marginal"})
        for model in models:
            row = model.row
            value = tuple(value_of(row.metadata, key, model.address) for key in keys)
            found.append(numbers.setdefault(value, len(numbers)))
    except CorruptStoreError:
        return list(range(len(models)))
    return found


def _entries(pool: PagePool, places: NDArray[np.int64]) -> NDArray[np.void]:
    """Return the slots of blocks."""
    entries = np.empty(len(places), codec.SLOT_DTYPE)
    page_ids, slots = split_places(places)
    for rows, pages, page_index in pool.windows(page_ids):
        entries[rows] = slot_entries(pages, page_index, slots[rows])
    return entries


def _some_at_once(
    numbers: NDArray[np.int64], dtype: DType, shape: tuple[int, int]
) -> Iterator[NDArray[np.int64]]:
    """Yield blocks of one dtype and shape, some MiB of them at a time."""
    count = max(_BYTES_AT_ONCE // (dtype.itemsize * shape[0] * shape[1]), 1)
    for start in range(0, len(numbers), count):
        yield numbers[start : start + count]


def _encoded(
    pool: PagePool,
    dtype: DType,
    shape: tuple[int, int],
    places: NDArray[np.int64],
    origins: NDArray[np.int64],
    firsts: NDArray[np.int64],
) -> tuple[codec.EncodedBlocks, NDArray[np.uint64], NDArray[np.uint64]]:
    """Return deltas of one dtype and shape as they are stored without their bases.

    ``origins`` are the places of these, ``firsts`` those of the deltas on the same ones that they
    are deltas on from now on where that takes less, or `NO_PLACE`. Also returns what their slots
    are to carry, and the digests of what they hold.
    """
    blocks = _decoded(pool, dtype, shape, places, origins)
    encoded = codec.encode_blocks(blocks, np.arange(len(places)), planes=True)
    tags = np.zeros(len(places), np.uint64)
    at = np.flatnonzero(firsts != NO_PLACE)
    if len(at):
        bases = _decoded(pool, dtype, shape, firsts[at], origins[at])
        limits = delta_limits(encoded.lengths[at])
        # Each alone: of several in one call the bytes depend on those before, and the call that
        # writes them has others.
        made = [
            codec.encode_deltas(blocks, at[i : i + 1], bases, [i], limits=limits[i : i + 1])
            for i in range(len(at))
        ]
        kinds = np.array([one.encodings[0] for one in made], np.uint8)
        deltas = codec.EncodedBlocks.of([one.arena for one in made], kinds)
        is_smaller = np.flatnonzero(deltas.lengths)
        encoded = replaced(encoded, at[is_smaller], deltas, is_smaller)
        tags[at[is_smaller]] = codec.base_tags(hash_view(bases))[is_smaller]
    return encoded, tags, hash_view(blocks)


def _decoded(
    pool: PagePool,
    dtype: DType,
    shape: tuple[int, int],
    places: NDArray[np.int64],
    origins: NDArray[np.int64],
) -> MatrixView:
    """Return what deltas of one dtype and shape hold, one below the other."""
    view = stacked(len(places), dtype, shape)
    page_ids, slots = split_places(places)
    walk = pool.windows_with_bases(page_ids, split_places(origins))
    for rows, pages, page_index, bases in walk:
        codec.read_blocks(view, rows, pages, page_index, slots[rows], bases=bases)
    return view


def _changed(places: Places, anew: _Anew, dropped: NDArray[np.int64], saved: int) -> Places:
    """Return the blocks in use as they are when these are stored anew, without those bases."""
    costs = codec.page_cost(places.lengths)
    lengths, encodings = places.lengths.copy(), places.encodings.copy()
    factored, bases, origins = places.factored.copy(), places.bases.copy(), places.origins.copy()
    lengths[anew.numbers], encodings[anew.numbers] = anew.lengths, anew.encodings
    factored[anew.numbers] = False
    origins[anew.numbers] = places.places[bases[anew.numbers]]
    bases[anew.numbers] = anew.bases
    gone = joined([anew.numbers, dropped])
    litter = places.litter + np.bincount(places.page_at[gone], costs[gone], len(places.pages))
    stays = np.ones(len(places.places), np.bool_)
    stays[dropped] = False
    renumbered = np.cumsum(stays) - 1
    owners = []
    for owned in places.owners:
        mine = owned[stays[owned]]
        its = bases[mine[origins[mine] != NO_PLACE]]
        owners.append(renumbered[union(mine, its[its != NO_PLACE])])
    is_delta = bases != NO_PLACE
    bases[is_delta] = renumbered[bases[is_delta]]
    return replace(
        places,
        places=places.places[stays],
        lengths=lengths[stays],
        encodings=encodings[stays],
        factored=factored[stays],
        hashes=[places.hashes[number] for number in np.flatnonzero(stays).tolist()],
        bases=bases[stays],
        origins=origins[stays],
        is_own=places.is_own[stays],
        page_at=places.page_at[stays],
        litter=litter,
        owners=owners,
        anew_saves=saved,
    )


def page_image(pool: PagePool, places: Places, numbers: NDArray[np.int64]) -> bytes:
    """Return a new page of these blocks in this order, as they are to be stored."""
    is_anew = places.anew[numbers]
    if not is_anew.any():
        return copy_page(pool, *places.at(numbers))
    pages = []
    page_index, slots = np.zeros((2, len(numbers)), np.int64)
    copied, made = np.flatnonzero(~is_anew), np.flatnonzero(is_anew)
    if len(copied):
        pages.append(codec.Page(copy_page(pool, *places.at(numbers[copied]))))
        slots[copied] = np.arange(len(copied))
    entries = _entries(pool, places.places[numbers[made]])
    for dtype, shape, chosen in by_kind(entries):
        for some in _some_at_once(made[chosen], dtype, shape):
            page_index[some], slots[some] = len(pages), np.arange(len(some))
            pages.append(codec.Page(_page_anew(pool, places, numbers[some], dtype, shape)))
    return codec.gather_page(pages, page_index, slots)


def _page_anew(
    pool: PagePool,
    places: Places,
    numbers: NDArray[np.int64],
    dtype: DType,
    shape: tuple[int, int],
) -> bytes:
    """Return a page of blocks of one dtype and shape that are stored anew."""
    bases = places.bases[numbers]
    firsts = np.where(bases == NO_PLACE, NO_PLACE, places.places[bases])
    encoded, tags, _ = _encoded(
        pool, dtype, shape, places.places[numbers], places.origins[numbers], firsts
    )
    count = len(numbers)
    return codec.build_page(
        encoded.arena,
        encoded.offsets,
        encoded.lengths,
        encoded.encodings,
        np.full(count, dtype.code),
        np.full(count, shape[0]),
        np.full(count, shape[1]),
        tags,
    )
