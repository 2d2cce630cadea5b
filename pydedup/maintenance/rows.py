# SPDX-License-Identifier: Apache-2.0
"""Rows that follow from others: what models read (`model_pages`), and which block is where.

The block maps and the pages are what loads and serves a model. The table of who reads what is
derived from them, for whoever asks whether anybody reads a page; of distinct blocks, their hashes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter, BlockRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import named_pages
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import CorruptStoreError, NotFoundError, PageNotFoundError, UnavailableError
from pydedup.hashing import digest_bytes
from pydedup.layout import (
    NO_PLACE,
    are_deltas,
    base_places,
    block_at,
    block_costs,
    block_place,
    by_page,
    places_of,
    split_places,
    used_places,
)
from pydedup.maintenance.blocks_from import read_block
from pydedup.maintenance.damage import VerifyReport, sound_rows
from pydedup.maintenance.survey import stored_model
from pydedup.pool import PagePool
from pydedup.sets import common, is_among
from pydedup.text import listed, plural

__all__ = [
    "blocks_of_no_page",
    "forget_blocks",
    "lost_models",
    "record_blocks",
    "record_reads",
    "refuse_pages_in_use",
    "rows_by_slot",
    "wrong_reads",
]

_IDS_AT_ONCE, _IDS_BEYOND = 8192, 1 << 20
_UNREADABLE = (CorruptStoreError, PageNotFoundError, UnavailableError)


def refuse_pages_in_use(adapter: Adapter, page_ids: Collection[int]) -> None:
    """Raise CorruptStoreError when the block map of a live model names one of these pages.

    For pages that are about to be deleted since nobody is recorded as reading them. Models that are
    published later name no page that is not live. Where there are such pages, it reads of all block
    maps the lists of pages: for 3,000 models of 21 tensors in a quarter of a second.
    """
    doomed = np.array(sorted(page_ids), np.int64)
    if not len(doomed):
        return
    with adapter.snapshot():
        for row in adapter.models():
            try:
                named = named_pages(part for _, part in adapter.block_maps(row.id))
            except CorruptStoreError as exc:
                raise CorruptStoreError(
                    f"{row.address}: {exc}, so nobody knows which pages it uses, and none is "
                    "deleted; remove that model and add it again, or restore a backup"
                ) from exc
            used = common(named, doomed).tolist()
            if used:
                pages = f"{plural(len(used), 'page')} ({listed([str(page) for page in used])})"
                raise CorruptStoreError(
                    f"{row.address} uses {pages} that were to be deleted as unused, so nothing is "
                    "deleted; run verify --repair-from on the store"
                )


def lost_models(adapter: Adapter) -> set[int]:
    """Return the ids of models that are recorded as reading pages, and neither live nor staged."""
    with adapter.snapshot():  # else one that was added in between would have none
        known = {row.id for row in adapter.models(state=None) if row.state in (LIVE, STAGING)}
        return {model_id for model_id, _, _, _ in adapter.model_pages()} - known


def wrong_reads(
    recorded: Sequence[tuple[int, int, int, int]],
    places: NDArray[np.int64],
    lengths: Mapping[int, NDArray[np.uint32]],
) -> list[int]:
    """Return the pages of which it is recorded wrongly what a model reads of them, ascending.

    Parameters
    ----------
    recorded
        Its rows of ``model_pages``.
    places
        What it uses, ascending and distinct (`used_places`).
    lengths
        The bytes of each block of a page; of other pages only the number of blocks is looked at.
    """
    left = {page_id: (blocks, size) for _, page_id, blocks, size in recorded}
    page_ids, slots = split_places(places)
    wrong = []
    for page_id, some in by_page(page_ids):
        blocks, size = left.pop(page_id, (0, 0))
        mine, there = slots[some], lengths.get(page_id)
        if blocks != len(mine):
            wrong.append(page_id)
        elif there is not None and mine[-1] < len(there):
            cost = codec.page_cost(there[mine].astype(np.int64)).sum()
            if size != cost:
                wrong.append(page_id)
    return sorted([*wrong, *left])  # of what is left it reads nothing


def record_reads(adapter: Adapter, pool: PagePool, addresses: Collection[str]) -> int:
    """Record anew what models read; returns of how many.

    Pages of theirs that were given up live on. What one takes of a page that cannot be read stays
    as it is recorded.
    """
    done = 0
    for address in addresses:
        with adapter.transaction():
            adapter.bump_epoch()  # nobody moves its blocks meanwhile
            try:
                model = stored_model(adapter, Catalog(adapter).resolve(address))
            except NotFoundError:
                continue  # it was removed
            if model is None:
                continue
            rows = _reads(adapter, pool, model)
            adapter.delete_model_pages(model.row.id)
            adapter.insert_model_pages(rows)
            retired = adapter.page_rows(ids=[row[1] for row in rows], state=RETIRED)
            adapter.set_page_state([row.id for row in retired], LIVE)
            done += 1
    return done


def _reads(adapter: Adapter, pool: PagePool, model: StoredModel) -> list[tuple[int, int, int, int]]:
    """Return the rows of ``model_pages`` that a model must have."""
    with only_sound_rows(adapter):
        recorded = {page_id: size for _, page_id, _, size in adapter.model_pages(model.row.id)}
    places = used_places(model.block_maps())
    rows = []
    for page_id, blocks in by_page(split_places(places)[0]):
        try:
            size = int(block_costs(pool, places[blocks]).sum())
        except _UNREADABLE:
            size = recorded.get(page_id, 0)
        rows.append((model.row.id, page_id, len(blocks), size))
    return rows


def rows_by_slot(
    page: codec.Page, rows: Sequence[BlockRow]
) -> tuple[dict[int, BlockRow], list[BlockRow]]:
    """Return the row of each slot of a page, and the rows that are of no block on it.

    Those are of slots that it does not have, and, where a slot has several, all but the one that
    says what is there, as far as that is seen without bases.
    """
    of: dict[int, list[BlockRow]] = {}
    surplus: list[BlockRow] = []
    for row in rows:
        if 0 <= row.slot < page.n_slots:
            of.setdefault(row.slot, []).append(row)
        else:
            surplus.append(row)
    for some in of.values():
        if len(some) > 1:
            some.sort(key=lambda row: _says_what_is_there(page, row))
            surplus += some[:-1]
    return {slot: some[-1] for slot, some in of.items()}, surplus


def _says_what_is_there(page: codec.Page, row: BlockRow) -> bool:
    if are_deltas(page.slots["encoding"][row.slot]):
        return row.base_id is not None
    digests = codec.block_digests([page], np.zeros(1, np.int64), np.array([row.slot], np.int64))
    return row.base_id is None and digest_bytes(digests) == row.hash128


def blocks_of_no_page(adapter: Adapter, known: int) -> list[BlockRow]:
    """Return distinct blocks on pages that are not there; ``known`` is how many live pages have.

    An add that finds one by its hash fails for it. They are looked for only where there are more
    blocks than are known, among the ids behind those of pages, of each at most so many.
    """
    left = adapter.count_blocks() - known
    found: list[BlockRow] = []
    ids = _ids_of_no_page(adapter) if left > 0 else iter(())
    while len(found) < left and (some := list(itertools.islice(ids, _IDS_AT_ONCE))):
        found += adapter.blocks_on_pages(some)
    return found


def _ids_of_no_page(adapter: Adapter) -> Iterator[int]:
    there = sorted({0, *(row.id for row in adapter.page_rows() if row.id > 0)})
    for page_id, following in itertools.pairwise([*there, 1 << 63]):
        yield from range(page_id + 1, min(following, page_id + _IDS_BEYOND))


def forget_blocks(adapter: Adapter, block_ids: Sequence[int]) -> int:
    """Forget distinct blocks that are on no page, or whose row is damaged; returns how many."""
    if block_ids:
        with adapter.transaction():
            adapter.bump_epoch()  # who found one meanwhile looks again
            adapter.delete_blocks(block_ids)
    return len(block_ids)


def record_blocks(adapter: Adapter, pool: PagePool, slots: Mapping[int, Sequence[int]]) -> int:
    """Record blocks of which no distinct block is; returns how many.

    A delta is only when a model uses it, whose block map knows its base.
    """
    found = list(_contents(pool, slots, _bases_on(adapter, slots))) if slots else []
    if not found:
        return 0
    with adapter.transaction():
        adapter.bump_epoch()  # nobody deletes these pages, or does the same, meanwhile
        there = {(row.page_id, row.slot) for row in adapter.blocks_on_pages(list(slots))}
        live = {row.id for row in adapter.page_rows(ids=list(slots), state=LIVE)}
        rows = [row for row in found if row[1] in live and row[1:3] not in there]
        # A row of the same block on no page may be the one that is missing here, damaged.
        damaged = VerifyReport()
        with sound_rows(adapter, damaged):
            same = adapter.find_blocks([row[0] for row in rows])
        pages = {row.id for row in adapter.page_rows(ids=list({row.page_id for row in same}))}
        nowhere = [row.id for row in same if row.page_id not in pages]
        adapter.delete_blocks([*nowhere, *damaged.surplus_blocks])
        adapter.insert_blocks(rows)
    return len(rows)


def _bases_on(adapter: Adapter, page_ids: Collection[int]) -> dict[int, int]:
    """Return by place the base of each block that a model uses on some pages, or `NO_PLACE`."""
    bases: dict[int, int] = {}
    pages = np.array(list(page_ids), np.int64)
    with adapter.snapshot(), only_sound_rows(adapter):
        for row in adapter.models():
            model = stored_model(adapter, row)
            for block_map in () if model is None else model.block_maps():
                here = is_among(block_map.page_ids, pages)
                own = places_of(block_map, here)
                bases.update(zip(own.tolist(), base_places(block_map)[here].tolist(), strict=True))
    return bases


def _contents(
    pool: PagePool, slots: Mapping[int, Sequence[int]], bases: Mapping[int, int]
) -> Iterator[tuple[bytes, int, int, int | None]]:
    """Yield rows of distinct blocks: what is in these slots, as far as it can be read."""
    for page_id, wanted in slots.items():
        for slot in wanted:
            base_place = bases.get(block_place(page_id, slot), NO_PLACE)
            is_delta = base_place != NO_PLACE
            try:
                (page,) = pool.pages([page_id])
                base = block_at(pool, base_place) if is_delta else None
                block = read_block(page, slot, base, keep_delta=True)
            except _UNREADABLE:
                continue
            yield block.content.digest, page_id, slot, base_place if is_delta else None
