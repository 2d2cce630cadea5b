# SPDX-License-Identifier: Apache-2.0
"""Distinct blocks that are recorded anew: once each, of pages that stay, and nowhere else."""

from __future__ import annotations

import pydedup
from pydedup.adapter import Adapter, BlockRow
from pydedup.maintenance.rows import record_blocks

from ..damage import change
from .conftest import assert_sound, family, fill, pages_of


def forget_rows(adapter: Adapter, page_id: int) -> list[BlockRow]:
    """Lose what is recorded of the blocks on a page, and return it."""
    rows = adapter.blocks_on_pages([page_id])
    with adapter.transaction():
        adapter.delete_blocks([row.id for row in rows])
    return rows


def test_two_repairs_at_once_record_a_block_once(store_url: str) -> None:
    """Both had verified before either of them wrote."""
    fill(store_url, ("own",))
    (page,) = pages_of(store_url, "own")
    with pydedup.open(store_url) as store:
        lost = forget_rows(store._adapter, page)
        slots = {page: [row.slot for row in lost]}
        assert record_blocks(store._adapter, store._pool, slots) == len(lost)
        assert record_blocks(store._adapter, store._pool, slots) == 0
        assert store._adapter.count_blocks() == len(lost)
    assert_sound(store_url)


def test_blocks_of_a_page_that_was_given_up_meanwhile_are_not_recorded(store_url: str) -> None:
    """An add would find them by their hash, and share what is about to be deleted."""
    fill(store_url, ("own",))
    (page,) = pages_of(store_url, "own")
    with pydedup.open(store_url) as store:
        lost = forget_rows(store._adapter, page)
        store.remove("own")
        assert record_blocks(store._adapter, store._pool, {page: [r.slot for r in lost]}) == 0
        assert store._adapter.count_blocks() == 0
        store.vacuum(grace_seconds=0)
        assert store.verify().ok


def test_a_row_that_names_a_page_far_away_is_made_anew(store_url: str) -> None:
    """Such a one is not among the ids near those of pages, where rows of no page are looked for."""
    fill(store_url, ("own",))
    (page,) = pages_of(store_url, "own")
    with pydedup.open(store_url) as store:
        count = store._adapter.count_blocks()
        row = store._adapter.blocks_on_pages([page])[0]
    change(store_url, "UPDATE {distinct_blocks} SET page_id = ? WHERE id = ?", 1 << 45, row.id)
    with pydedup.open(store_url) as store:
        assert store.verify().unrecorded_blocks == {page: [row.slot]}
        assert store.verify(repair_from=store_url).errors == []
        assert store._adapter.count_blocks() == count
        assert [found.page_id for found in store._adapter.find_blocks([row.hash128])] == [page]
        assert store.add("own", family()["own"]).stored_bytes == 0
    assert_sound(store_url)
