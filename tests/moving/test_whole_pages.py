# SPDX-License-Identifier: Apache-2.0
"""Pages that must not go whole into an empty store, though all of their blocks are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import CorruptStoreError
from pydedup.moving import whole
from pydedup.policies import Exact

New = Callable[[str], str]

RNG = np.random.default_rng(3)
BASE = RNG.standard_normal((96, 64, 64)).astype(np.float32)
NEAR = (BASE * (1 + 1e-4 * RNG.standard_normal(BASE.shape))).astype(np.float32)


def rows_of(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {"w": blocks.reshape(-1, 64)}


def hashes(url: str) -> list[bytes]:
    adapter = registry.connect(url, mode="r")
    try:
        pages = [row.id for row in adapter.page_rows()]
        return sorted(row.hash128 for row in adapter.blocks_on_pages(pages))
    finally:
        adapter.close()


def test_a_page_of_which_a_block_came_by_itself_does_not_come_whole(
    new_store: New, assert_same: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bases of its other blocks were on too many pages, when an earlier model was copied."""
    monkeypatch.setattr(whole, "_MORE_PAGES", 0)
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("base@1", rows_of(BASE), block_shape=(64, 64))
        models = {"few@1": rows_of(NEAR[:4]), "wide@1": rows_of(NEAR[4::8])}
        reports = store.add_many(models, block_shape=(64, 64))
        assert [report.delta_blocks for report in reports] == [4, 12]
        assert [store.info(name).pages for name in models] == [2, 6], "they share one"
        store.add("again@1", rows_of(BASE), block_shape=(64, 64))
        store.copy_to(url, ["few", "wide", "again"])
    found = hashes(url)
    assert len(set(found)) == len(found) == 96 + 16
    assert_same(source_url, url, names={"few@1", "wide@1", "again@1"})


def test_a_page_with_a_block_that_is_not_recorded_does_not_come_whole(
    new_store: New, assert_same: Callable[..., None]
) -> None:
    """No model misses it, so that none is kept from being copied."""
    source_url, url = new_store("sqlite"), new_store("sqlite")
    models = {"gone@1": rows_of(BASE[:8]), "left@1": rows_of(BASE[8:12])}
    with pydedup.open(source_url) as store:
        store.add_many(models, policy=Exact(), block_shape=(64, 64))
        adapter = store._adapter
        (page,) = adapter.page_rows()
        first = [row.id for row in adapter.blocks_on_pages([page.id]) if row.slot < 8]
        store.remove("gone")
        with adapter.transaction():
            adapter.delete_blocks(first)
        report = store.copy_to(url)
    assert report.models[0].whole_pages == 0
    assert_same(source_url, url)


def test_what_both_ends_have_in_place_of_a_page_is_not_relied_upon(
    new_store: New, change_page: Any
) -> None:
    """A page that is a sound one, but another: both stores were copied from a damaged one."""
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("other@1", rows_of(BASE[:4]), policy=Exact(), block_shape=(64, 64))
        store.add("one@1", rows_of(BASE[4:8]), policy=Exact(), block_shape=(64, 64))
        store.add("two@1", rows_of(BASE[4:8]), policy=Exact(), block_shape=(64, 64))
        store.copy_to(url, ["other", "one"])
        ((_, payload),) = store._adapter.read_pages([1])
    for place in (source_url, url):
        change_page(place, 2, lambda page: page.__setitem__(slice(None), payload))
    with pydedup.open(source_url) as store, pytest.raises(CorruptStoreError, match="page 2"):
        store.copy_to(url, ["two"])
    with pydedup.open(url) as target:
        assert [info.address for info in target.models()] == ["one@1", "other@1"]
