# SPDX-License-Identifier: Apache-2.0
"""Deltas of a lost page, which another store has as deltas, too, on bases of the same content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies

from ..relatives import adapted, dense, same_bits
from .conftest import check_reads, pages_of, ruin

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


@pytest.mark.parametrize("source", ["backup", "whole", "other base"])
def test_deltas_are_deltas_again_where_the_base_is_the_same(
    store_url: str, change_page: Change, tmp_path: Path, source: str
) -> None:
    """A page of adapters has many blocks: by themselves they took 17 times what they had."""
    base = dense()
    model = adapted(base, 8)
    healthy = str(tmp_path / "healthy.db")
    with pydedup.open(store_url) as store:
        store.add("base", base)
        report = store.add("m", model)
        assert report.delta_blocks == report.blocks
        before = store.stats().page_bytes
        if source == "backup":
            store.backup(healthy)
        elif source == "whole":
            with pydedup.open(healthy) as other:
                other.add("m", model)
        else:
            with pydedup.open(healthy) as other:
                other.add("other", adapted(base, 2, seed=50))
                assert other.add("m", model).delta_blocks
    (page,) = set(pages_of(store_url, "m")).difference(pages_of(store_url, "base"))
    change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        repaired = store.verify(repair_from=healthy)
        assert repaired.ok
        assert repaired.repair is not None
        assert repaired.repair.found_blocks == report.blocks
        assert same_bits(store, "m", model)
        check_reads(store)
        taken = store.stats().page_bytes - before
        if source == "backup":
            assert taken < 0.1 * report.stored_bytes
        else:
            assert taken > 5 * report.stored_bytes


def test_what_was_promised_raw_is_raw(store_url: str, change_page: Change, tmp_path: Path) -> None:
    """Although another model has the same blocks, and a backup has them as deltas."""
    base = dense(1)
    model = adapted(base, 8)
    healthy = str(tmp_path / "healthy.db")
    with pydedup.open(healthy) as other:
        other.add("base", base)
        assert other.add("m", model).delta_blocks
    with pydedup.open(store_url) as store:
        store.add("base", base)
        store.add("m", model, policy=policies.Exact())
    for page in set(pages_of(store_url, "m")).difference(pages_of(store_url, "base")):
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        assert store.verify(repair_from=healthy).ok
        assert same_bits(store, "m", model)
        raw = sum(np.asarray(weight).nbytes for weight in model.values())
        assert store.explain("m").used_bytes >= raw
