# SPDX-License-Identifier: Apache-2.0
"""Reading and products within a budget of few pages: of shared blocks and own ones, of deltas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import config, policies
from pydedup.sets import distinct

SIDE, BLOCK = 2048, 64


@pytest.mark.parametrize("memory", ["8MiB", "12MiB", "16MiB"])
def test_pages_are_read_about_once_where_shared_and_own_blocks_take_turns(
    tmp_path: Path, memory: str
) -> None:
    """A tenth of the blocks is the variant's own, anywhere; a pool has 4, 6 or 8 pages.

    In windows of one page, each went for the other: 5 or 6 reads of a page with 4, 4 with 6.
    """
    rng = np.random.default_rng(0)
    base = rng.standard_normal((SIDE, SIDE), np.float32)
    variant = base.copy()
    for row, col in rng.integers(0, SIDE // BLOCK, (100, 2)) * BLOCK:
        variant[row : row + BLOCK, col : col + BLOCK] += np.float32(0.01)
    x = rng.standard_normal((8, SIDE)).astype(np.float32)
    with pydedup.open(tmp_path / "m.db", memory=memory) as store:
        store.add("base", {"w": base}, policy=policies.Exact())
        store.add("variant", {"w": variant}, policy=policies.Exact())
        w = store.tensor("variant", "w")
        pages = len(distinct(w._block_map().page_ids))
        assert pages > 17
        for _ in range(3):
            before = store.stats().pool["misses"]
            y = w.matmul(x)
            assert store.stats().pool["misses"] - before <= 2 * pages
        np.testing.assert_allclose(y, x @ variant.T, rtol=1e-3, atol=1e-3)


def test_deltas_are_read_within_the_least_budget(tmp_path: Path) -> None:
    """Of which half was for pages, one: a block and its base were said not to fit."""
    rng = np.random.default_rng(0)
    base = {name: rng.integers(0, 2**60, (640, 512)) for name in "ab"}
    near = {name: w + rng.integers(-(2**40), 2**40, w.shape) for name, w in base.items()}
    layer = {"w": rng.standard_normal((2048, 1024), np.float32)}
    tuned = {"w": layer["w"] * (1 + rng.standard_normal((2048, 1024), np.float32) * 1e-3)}
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("base", base)
        store.add("layer", layer)
        assert store.add("near", near).delta_blocks
        assert store.add("tuned", tuned).delta_blocks
    with pydedup.open(tmp_path / "m.db", mode="r", memory=config.LEAST_MEMORY) as store:
        got = store.load("near")
        assert all(np.array_equal(got[name], w) for name, w in near.items())
        w = store.tensor("tuned", "w")
        # So large that one of each does not fit beside the other in a pool of half as much.
        sizes = [
            store._pool.pages([page])[0].nbytes for page in (1, int(w._block_map().page_ids[0]))
        ]
        assert sum(sizes) > config.LEAST_MEMORY * 3 // 4
        x = rng.standard_normal((4, 1024)).astype(np.float32)
        np.testing.assert_allclose(w.matmul(x), x @ tuned["w"].T, rtol=1e-3, atol=1e-3)
        assert np.array_equal(w.take([5, 2000]), tuned["w"][[5, 2000]])
        assert not store.verify().errors
