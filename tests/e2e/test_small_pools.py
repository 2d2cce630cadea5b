# SPDX-License-Identifier: Apache-2.0
"""Products within a budget of few pages, of models whose blocks lie on shared and own pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
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
