# SPDX-License-Identifier: Apache-2.0
"""Blocks that the store has twice are restored from its own sound pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup

from ..damage import flip_last
from .conftest import assert_holds, assert_holds_as, family, fill, pages_of

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "mysql"])
@pytest.mark.parametrize("name", ["own", "near"])  # by itself, and a delta
def test_what_was_added_again_while_its_page_was_damaged(
    new_store: Callable[[str], str], change_page: Change, tmp_path: Path, backend: str, name: str
) -> None:
    """It was asked for of the source alone, which had nothing of it."""
    url = new_store(backend)
    fill(url)
    page = max(pages_of(url, name))
    change_page(url, page, flip_last)
    np.savez(tmp_path / "stranger.npz", w=np.zeros((3, 3), np.float32))
    with pydedup.open(url) as store:
        assert store.add("again", family()[name]).damaged_pages == (page,)
        report = store.verify(repair_from=tmp_path / "stranger.npz")
        assert report.repair is not None
        assert (report.repair.missing, report.errors) == ((), [])
        assert report.repair.found_blocks > 0
        for info in store.models():
            if info.name != "again":
                assert_holds(store, info.name)
        assert_holds_as(store, "again", name)
        assert store.verify().errors == []


def test_the_source_is_asked_for_what_is_damaged_twice(
    new_store: Callable[[str], str], change_page: Change, healthy: str
) -> None:
    url = new_store("sqlite")
    fill(url)
    (first,) = pages_of(url, "own")
    change_page(url, first, flip_last)
    with pydedup.open(url) as store:
        store.add("again", family()["own"])
    (second,) = pages_of(url, "again")
    change_page(url, second, flip_last)
    with pydedup.open(url) as store:
        report = store.verify(repair_from=healthy)
        assert report.repair is not None
        assert (report.repair.damaged_pages, report.repair.missing) == (2, ())
        assert_holds(store, "own")
        assert_holds_as(store, "again", "own")


def test_a_delta_that_is_here_once_more_on_a_base_that_was_damaged_too(
    new_store: Callable[[str], str], change_page: Change, tmp_path: Path
) -> None:
    """Its base came back, and was still looked for where it had been."""
    url = new_store("sqlite")
    fill(url)
    first = max(pages_of(url, "near"))
    change_page(url, first, flip_last)
    with pydedup.open(url) as store:
        assert store.add("again", family()["near"]).delta_blocks > 0
    for page in pages_of(url, "base"):
        if page != first:
            change_page(url, page, flip_last)
    np.savez(tmp_path / "base.npz", **family()["base"])
    with pydedup.open(url) as store:
        report = store.verify(repair_from=tmp_path / "base.npz")
        assert report.repair is not None
        assert report.repair.damaged_pages > 1
        assert not [gone for gone in report.repair.missing if "near@1" in gone.models]
        assert_holds(store, "near")
        assert_holds_as(store, "again", "near")
