# SPDX-License-Identifier: Apache-2.0
"""Bases that no model has as a block of its own any more, and deltas that had better do without.

The model that brought a base is gone, and the base lives on for the deltas on it. Where these take
less without it, they are stored anew: the one of the newest model by itself, the others as deltas
on that one, or by themselves as well. What a delta holds stays the same to the bit, also of one
that was within an error bound.
Deliberately not here: their new bytes (`pydedup.maintenance.anew`), where blocks go, and writing
them (`pydedup.maintenance.repack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter, PageRow
from pydedup.catalog import ModelsAhead, StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.hashing import hash_keys
from pydedup.layout import (
    NO_PLACE,
    are_deltas,
    base_places,
    block_forms,
    costs_of_owned,
    joined,
    split_places,
)
from pydedup.maintenance.anew import slots_of, stored_anew
from pydedup.maintenance.in_use import Places, own_places
from pydedup.maintenance.unused import UNUSED_PART
from pydedup.pool import PagePool
from pydedup.quotas import Quotas
from pydedup.sets import distinct, find_among, is_among, union
from pydedup.usage import value_of

__all__ = ["may_pay_without", "without_orphans"]

#: Pages are read for it where it may save so much of them.
_LEAST_OF_PAGES = 0.1
#: Deltas are stored anew for what may be so much of what they take with their base.
_LEAST_OF_BLOCKS = 0.05
#: So many bases are looked at before all are.
_GROUPS_ASKED = 16


def may_pay_without(adapter: Adapter, pool: PagePool, live: Sequence[PageRow]) -> bool:
    """Return whether a tenth of the pages concerned may be saved; ``live`` are all live pages.

    Reads all block maps: what a block takes is estimated by the others on its page. Where that
    promises enough, some of the blocks are looked at.
    Memory: 8 bytes per block in use and per base of a model, and what `ModelsAhead` takes.
    """
    own, deltas, bases = [], [], []
    with adapter.snapshot():
        rows = adapter.models()
        ahead = ModelsAhead(adapter, rows)
        try:
            for row in rows:
                model = StoredModel(adapter, row, ahead=ahead)
                mine = own_places(model)
                its = joined(base_places(block_map) for block_map in model.block_maps())
                own.append(distinct(mine))
                deltas.append(mine[its != NO_PLACE])
                bases.append(its[its != NO_PLACE])
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
    payloads = {row.id: row.payload_bytes for row in live}
    sizes = np.array([payloads.get(page_id, 0) for page_id in pages.tolist()], np.float64)
    both = np.concatenate([np.arange(len(orphans)), group])
    wanted = _on_pages_that_go(wanted, both, page_at, costs, np.zeros(len(pages)), sizes)
    concerned = sizes[distinct(page_at[wanted[both]])].sum()
    if not wanted.any() or saved[wanted].sum() < _LEAST_OF_PAGES * concerned:
        return False
    owners = np.repeat(np.arange(len(deltas)), [len(of) for of in deltas])[first][is_orphan]
    chosen = all_deltas[is_orphan]
    return _pays(adapter, pool, orphans, chosen, owners, group, np.flatnonzero(wanted))


def _pays(
    adapter: Adapter,
    pool: PagePool,
    orphans: NDArray[np.int64],
    deltas: NDArray[np.int64],
    owners: NDArray[np.int64],
    group: NDArray[np.int64],
    wanted: NDArray[np.int64],
) -> bool:
    """Return whether deltas on some of the wanted bases take less without these.

    ``owners`` are the models that deltas are of, ``group`` is which of the ``orphans`` each is on.
    These, and ``deltas``, are places.
    """
    some = distinct(wanted[np.linspace(0, len(wanted) - 1, _GROUPS_ASKED).astype(np.int64)])
    chosen = np.flatnonzero(is_among(group, some))
    chosen = chosen[np.lexsort((-deltas[chosen], group[chosen]))]
    _, starts, of = np.unique(group[chosen], return_index=True, return_inverse=True)
    try:
        with adapter.snapshot():
            before = codec.page_cost(slots_of(pool, orphans[some])["length"])
            # Those of other groups may have the factors.
            on_page = split_places(deltas)[0]
            beside = np.flatnonzero(is_among(on_page, on_page[chosen]))
            own = np.zeros(len(deltas), np.int64)
            sizes, _, factored = block_forms(pool, deltas[beside])
            own[beside] = costs_of_owned(sizes, factored, on_page[beside], owners[beside])
            lengths, _, _ = stored_anew(pool, deltas[chosen], orphans[some][of], starts[of])
    except CorruptStoreError:
        return False  # verify tells what is damaged
    before += np.bincount(of, own[chosen]).astype(np.int64)
    after = np.bincount(of, codec.page_cost(lengths))
    return bool(np.minimum(after, before).sum() <= (1 - _LEAST_OF_BLOCKS) * before.sum())


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
    adapter: Adapter,
    pool: PagePool,
    models: Sequence[StoredModel],
    places: Places,
    goes: NDArray[np.bool_] | None = None,
) -> Places | None:
    """Return the blocks in use without bases that they had better do without, if there are such.

    ``goes`` says which pages are written anew whatever becomes of these. In a snapshot: reads and
    encodes deltas on bases of nobody. Memory: some MiB, and some 100 bytes for each.
    """
    if goes is None:
        goes = np.zeros(len(places.pages), np.bool_)
    groups = _Groups.of(places, _values(adapter, models), goes)
    if not len(groups.deltas):
        return None
    first = groups.starts[groups.group]
    origins = places.places[places.bases[groups.deltas]]
    try:
        found = stored_anew(pool, places.places[groups.deltas], origins, first)
    except CorruptStoreError:
        return None  # verify tells what is damaged
    lengths, encodings, digests = found
    if hash_keys(digests) != [places.hashes[number] for number in groups.deltas.tolist()]:
        return None
    after = np.bincount(groups.group, codec.page_cost(lengths)).astype(np.int64)
    is_better = groups.on_pages_that_go(places, after < groups.before, goes)
    if not is_better.any():
        return None
    chosen = np.flatnonzero(is_better[groups.group])
    numbers = groups.deltas[chosen]
    bases = np.full(len(places.places), NO_PLACE)
    is_delta = are_deltas(encodings[chosen])
    bases[numbers[is_delta]] = groups.deltas[first[chosen[is_delta]]]
    anew = _StoredAnew(numbers, lengths[chosen], encodings[chosen], bases[numbers])
    saved = int((groups.before - after)[is_better].sum())
    return _changed(places, anew, distinct(places.bases[numbers]), saved)


@dataclass(frozen=True, slots=True)
class _StoredAnew:
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

    def on_pages_that_go(
        self, places: Places, wanted: NDArray[np.bool_], goes: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return what `_on_pages_that_go` does of these."""
        # Nothing is left of a page that is written anew.
        litter = np.where(goes, places.sizes, places.litter)
        bases = places.bases[self.deltas[self.starts]]
        numbers = np.concatenate([bases, self.deltas])
        group = np.concatenate([np.arange(len(bases)), self.group])
        costs, page_at = places.costs[numbers], places.page_at[numbers]
        return _on_pages_that_go(wanted, group, page_at, costs, litter, places.sizes)

    @classmethod
    def of(cls, places: Places, values: Sequence[int], goes: NDArray[np.bool_]) -> _Groups:
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
        costs = places.costs
        for _ in range(2):  # all, and those that are left
            bases, starts, group = np.unique(
                places.bases[deltas], return_index=True, return_inverse=True
            )
            counts = np.bincount(group)
            of_deltas = np.bincount(group, costs[deltas]).astype(np.int64)
            groups = cls(deltas, group, starts, costs[bases] + of_deltas)
            if not len(deltas):
                break
            may_pay = of_deltas >= _LEAST_OF_BLOCKS * counts * groups.before
            # Each of several may take more: that is not for others to pay.
            of_one = np.minimum.reduceat(lowest[deltas], starts) == np.maximum.reduceat(
                highest[deltas], starts
            )
            wanted = groups.on_pages_that_go(places, may_pay & (of_one | (counts == 1)), goes)
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


def _changed(places: Places, anew: _StoredAnew, dropped: NDArray[np.int64], saved: int) -> Places:
    """Return the blocks in use as they are when these are stored anew, without those bases."""
    costs = places.costs
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
