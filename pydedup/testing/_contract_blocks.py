# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for what is known of pages: distinct blocks, who reads them, views."""

from __future__ import annotations

import random

import pytest

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter, BlockRow
from pydedup.errors import ArgumentError
from pydedup.testing._contract_base import ContractBase, add_pages, checksum_of, model_row

__all__ = ["BlocksContract"]


class BlocksContract(ContractBase):
    """Blocks are found by hash or page; views add up what models read."""

    # ---- blocks -------------------------------------------------------------------------------

    def test_blocks_are_found_on_live_pages(self, adapter: Adapter) -> None:
        """Hashes are not unique; staged and retired pages are invisible to a search."""
        ids = add_pages(adapter, 3)
        with adapter.transaction():
            adapter.insert_blocks([(checksum_of(0), ids[1], 9, 5)])
        found = sorted(adapter.find_blocks([checksum_of(0), checksum_of(77)]), key=lambda b: b.id)
        assert [(b.page_id, b.slot, b.base_id) for b in found] == [
            (ids[0], 1, None),
            (ids[0], 0, None),
            (ids[1], 9, 5),
        ]
        assert len({b.id for b in found}) == 3
        assert adapter.count_blocks() == 7
        for state in (STAGING, RETIRED):
            with adapter.transaction():
                adapter.set_page_state([ids[0]], state)
            assert [b.page_id for b in adapter.find_blocks([checksum_of(0)])] == [ids[1]]
            assert adapter.count_blocks() == 5
        assert adapter.find_blocks([]) == []

    def test_blocks_are_listed_by_page_and_slot(self, adapter: Adapter) -> None:
        """Whatever the order of insertion and the state of the page."""
        ids = add_pages(adapter, 3, state=STAGING)
        listed = adapter.blocks_on_pages([ids[2], ids[0], ids[2]])
        assert [(b.page_id, b.slot) for b in listed] == [
            (ids[0], 0), (ids[0], 1), (ids[2], 0), (ids[2], 1)
        ]  # fmt: skip
        assert all(isinstance(b, BlockRow) for b in listed)
        assert adapter.blocks_on_pages([]) == []

    def test_blocks_are_deleted_one_by_one(self, adapter: Adapter) -> None:
        """Their pages stay, and so do the other blocks."""
        ids = add_pages(adapter, 2)
        first, _, _, last = adapter.blocks_on_pages(ids)
        with adapter.transaction():
            adapter.delete_blocks([last.id, first.id, last.id, last.id + 1000])
            adapter.delete_blocks([])
        left = [(block.page_id, block.slot) for block in adapter.blocks_on_pages(ids)]
        assert left == [(ids[0], 1), (ids[1], 0)]
        assert len(adapter.page_rows()) == 2

    def test_many_values_at_once(self, adapter: Adapter) -> None:
        """More ids and hashes than fit into one statement."""
        count = min(10_000, 2 * adapter.capabilities.max_parameters)
        ids = add_pages(adapter, count, size=1)
        hashes = [checksum_of(i) for i in range(-5 + 5, count + 5)]
        random.Random(0).shuffle(hashes)
        assert len(adapter.find_blocks(hashes)) == 2 * count
        assert len(adapter.blocks_on_pages(ids)) == 2 * count
        assert [row.id for row in adapter.page_rows(ids=ids)] == ids
        assert sum(1 for _ in adapter.read_pages(ids[::10])) == count // 10
        with adapter.transaction():
            adapter.set_page_state(ids[: count // 2], RETIRED, 2.0)
            adapter.delete_pages(ids[count - 100 :])
        assert adapter.count_blocks() == count - 200
        assert len(adapter.page_rows(state=RETIRED)) == count // 2

    # ---- who reads what -----------------------------------------------------------------------

    def test_readers_are_listed_by_model_and_page(self, adapter: Adapter) -> None:
        """Rows are returned in order, of one model or of all, and deleted by model."""
        rows = [(2, 1, 5, 50), (1, 9, 2, 2**40), (1, 3, 1, 0)]
        with adapter.transaction():
            adapter.insert_model_pages(iter(rows))
        assert adapter.model_pages() == sorted(rows)
        assert adapter.model_pages(1) == sorted(rows[1:])
        with adapter.transaction():
            adapter.delete_model_pages(1)
        assert adapter.model_pages() == rows[:1]

    def test_readers_of_pages_are_live_models(self, adapter: Adapter) -> None:
        """Only of the pages that are asked for, each pair once, and none that is staged."""
        with adapter.transaction():
            a, b, c = (
                adapter.insert_model(model_row(name, "1", state))
                for name, state in (("a", LIVE), ("b", STAGING), ("c", LIVE))
            )
            adapter.insert_model_pages(
                [(a, 1, 1, 1), (a, 2, 1, 1), (b, 1, 1, 1), (c, 2, 1, 1), (c, 3, 1, 1)]
            )
        assert adapter.readers_of([2, 1, 2]) == [(a, 1), (a, 2), (c, 2)]
        assert adapter.readers_of([3, 9]) == [(c, 3)]
        assert adapter.readers_of([]) == []
        assert adapter.readers_of(list(range(2, 20_000))) == [(a, 2), (c, 2), (c, 3)]

    def test_views_show_sizes_and_sharing(self, adapter: Adapter) -> None:
        """Only live models count; figures are those of the pages."""
        ids = add_pages(adapter, 3)
        with adapter.transaction():
            a, b, c = (
                adapter.insert_model(model_row(name, "1", state, logical_bytes=1000))
                for name, state in (("a", LIVE), ("b", LIVE), ("c", STAGING))
            )
            adapter.insert_model(model_row("none", "1", LIVE, logical_bytes=0))
            adapter.insert_model_pages(
                [(a, ids[0], 2, 60), (a, ids[1], 1, 40), (b, ids[1], 2, 30), (c, ids[2], 2, 9)]
            )
        assert adapter.view("model_sizes") == [
            {
                "name": name,
                "version": "1",
                "logical_bytes": logical,
                "pages": pages,
                "page_bytes": 100 * pages,
                "exclusive_bytes": exclusive,
                "shared_bytes": shared,
            }
            for name, logical, pages, exclusive, shared in (
                ("a", 1000, 2, 100, 100),
                ("b", 1000, 1, 0, 100),
                ("none", 0, 0, 0, 0),
            )
        ]
        assert adapter.view("sharing") == [
            {
                "name": "a",
                "version": "1",
                "other_name": "b",
                "other_version": "1",
                "shared_pages": 1,
                "shared_blocks": 1,
                "shared_bytes": 30,
            }
        ]
        assert adapter.view("page_owners") == [
            {"page_id": ids[0], "owners": 1, "models": "a@1"},
            {"page_id": ids[1], "owners": 2, "models": "a@1, b@1"},
        ]
        with pytest.raises(ArgumentError, match="models; DROP"):
            adapter.view("models; DROP")

    def test_pairs_of_models_come_in_order(self, adapter: Adapter) -> None:
        """Versions of one name that share a page, whatever the order they were stored in."""
        with adapter.transaction():
            (page_id,) = adapter.insert_pages([(checksum_of(0), bytes(100))], state=LIVE)
            for version in ("1", "4", "3", "2"):
                model_id = adapter.insert_model(model_row("a", version, state=LIVE))
                adapter.insert_model_pages([(model_id, page_id, 1, 100)])
        pairs = [(row["version"], row["other_version"]) for row in adapter.view("sharing")]
        assert pairs == [("1", "2"), ("1", "3"), ("1", "4"), ("3", "2"), ("4", "2"), ("4", "3")]
