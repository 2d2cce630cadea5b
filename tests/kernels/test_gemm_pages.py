# SPDX-License-Identifier: Apache-2.0
"""Products whose pages come into the pool and go, and what is remembered of where they lie."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pydedup import matmul
from pydedup.blocks import BlockMap
from pydedup.pool import Fetched, PagePool
from pydedup.testing.memory_pages import MemoryPages


@pytest.mark.parametrize("planes", [False, True])
def test_products_with_pages_that_come_and_go(planes: bool) -> None:
    rng = np.random.default_rng(9)
    w = rng.integers(-3, 3, (300, 40)).astype(np.float32)  # sums are exact in any order
    x = rng.integers(-3, 3, (3, 40)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 16), planes=planes, per_page=4)
    pool = pages.pool()
    for round_ in range(3):  # cold, resident, and read anew
        for _ in range(3):
            for m in (1, 3):
                assert np.array_equal(matmul.matmul(block_map, pool, x[:m]), x[:m] @ w.T)
        assert pool.stats()["pinned_bytes"] == 0
        if round_ < 2:
            pool.drop(block_map.page_ids[:: 3 + round_].copy())
    # What was where is forgotten with the pages: another page of an id is seen as it is.
    other = MemoryPages()
    other.add(-w, (16, 16), planes=planes, per_page=4)
    pages.payloads.update(other.payloads)
    assert np.array_equal(matmul.matmul(block_map, pool, x), x @ w.T)
    pool.clear()
    for _ in range(3):
        assert np.array_equal(matmul.matmul(block_map, pool, x), x @ -w.T)


def remembered(pool: PagePool) -> list[bool]:
    """Return of each window of a pool whether it is remembered where its blocks lie."""
    windows = [window for plan in pool._plans._plans.values() for window in plan.windows]
    return [window.kept[0][2].remembers for window in windows]


@pytest.mark.parametrize("planes", [False, True])
def test_where_raw_blocks_lie_is_remembered(planes: bool) -> None:
    w = np.random.default_rng(3).integers(-3, 3, (64, 64)).astype(np.float32)
    x = np.ones((1, 64), np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 16), planes=planes)
    pool = pages.pool()
    for _ in range(3):
        assert np.array_equal(matmul.matmul(block_map, pool, x), x @ w.T)
    assert remembered(pool) == [not planes]


def test_what_is_remembered_is_bounded_and_given_up() -> None:
    gc.collect()  # windows of other pools
    rng = np.random.default_rng(4)
    w = rng.integers(-3, 3, (100, 1000)).astype(np.float32)
    x = np.ones((1, 1000), np.float32)
    pages = MemoryPages()
    maps = [pages.add(w, (1, 1), per_page=4096) for _ in range(2)]  # 4.8 MB each of 8
    pool = pages.pool()

    def multiply(block_map: BlockMap) -> None:
        for _ in range(2):  # from pages that are read, then from those that are here
            assert np.array_equal(matmul.matmul(block_map, pool, x), x @ w.T)

    multiply(maps[0])
    multiply(maps[1])
    assert remembered(pool) == [True, False]
    pool.drop(np.unique(maps[0].page_ids))
    multiply(maps[0])  # whose pages are others now: there is no room yet to remember both
    multiply(maps[1])
    assert remembered(pool)[1]


def test_products_of_many_threads_with_pages_that_come_and_go() -> None:
    rng = np.random.default_rng(10)
    w = rng.integers(-3, 3, (256, 64)).astype(np.float32)
    x = rng.integers(-3, 3, (1, 64)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 16), per_page=4)

    def fetch(ids: Sequence[int]) -> Iterator[Fetched]:
        # In other memory each time: what is remembered of pages that went leads nowhere.
        return (
            (number, None, bytes(bytearray(payload))) for number, _, payload in pages.fetch(ids)
        )

    pool = PagePool(fetch, 1 << 30)
    wanted = x @ w.T

    def multiply(seed: int) -> bool:
        chance = np.random.default_rng(seed)
        right = True
        for _ in range(200):
            right &= np.array_equal(matmul.matmul(block_map, pool, x), wanted)
            if chance.random() < 0.2:
                pool.drop(chance.choice(block_map.page_ids, 2))
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(multiply, range(4)))
