# SPDX-License-Identifier: Apache-2.0
"""Products with several matrices at once against one product after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import joint
from pydedup.blocks import NO_PAGE, BlockMap
from pydedup.joint import Factor, matmul_together
from pydedup.matmul import matmul, read
from pydedup.testing.memory_pages import MemoryPages


def variants_of(
    pages: MemoryPages, base: NDArray[Any], changes: list[set[int]], block: tuple[int, int]
) -> list[BlockMap]:
    """Return maps of matrices that are ``base`` but for the blocks named, each on pages of its own.

    Variants that name the same block have it in common.
    """
    rng = np.random.default_rng(5)
    origin = pages.add(base, block)
    other = pages.add(rng.standard_normal(base.shape).astype(base.dtype), block)
    maps = []
    for numbers in changes:
        own = pages.add(rng.standard_normal(base.shape).astype(base.dtype), block)
        page_ids, slots = origin.page_ids.copy(), origin.slots.copy()
        for number in numbers:
            chosen = other if number % 3 == 0 else own  # every third change is made by all alike
            page_ids[number], slots[number] = chosen.page_ids[number], chosen.slots[number]
        maps.append(replace(origin, page_ids=page_ids, slots=slots))
    return maps


@settings(max_examples=60)
@given(data=st.data())
def test_products_together_are_those_of_each_alone(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = (data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12)))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    count = -(-rows // block[0]) * -(-cols // block[1])
    changes = data.draw(
        st.lists(st.sets(st.integers(0, count - 1), max_size=count), min_size=1, max_size=6)
    )
    transpose = data.draw(st.booleans())
    activation = data.draw(st.sampled_from([None, "relu", "gelu"]))
    pages = MemoryPages()
    maps = variants_of(pages, rng.standard_normal((rows, cols)).astype(dtype), changes, block)
    pool = pages.pool()
    inner, outer = (rows, cols) if transpose else (cols, rows)
    factors = []
    for number in data.draw(
        st.lists(st.integers(0, len(maps) - 1), min_size=1, max_size=8), label="requests"
    ):
        x = rng.standard_normal((data.draw(st.integers(0, 70)), inner)).astype(dtype)
        bias = rng.standard_normal(outer).astype(dtype) if data.draw(st.booleans()) else None
        factors.append(Factor(maps[number], x, bias))
    got = matmul_together(factors, pool, activation=activation, transpose=transpose)
    for factor, y in zip(factors, got, strict=True):
        want = matmul(
            factor.block_map,
            pool,
            factor.x,
            bias=factor.bias,
            activation=activation,
            transpose=transpose,
        )
        assert y.dtype == want.dtype
        np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)


def test_deltas_are_shared_like_any_block() -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((32, 48)).astype(np.float32)
    pages = MemoryPages()
    base_map = pages.add(base, (8, 8))
    near = base + rng.standard_normal(base.shape).astype(np.float32) * 1e-4
    delta = pages.add_deltas(near, base, base_map)
    mixed = replace(
        delta,
        page_ids=np.where(np.arange(24) % 4 == 0, base_map.page_ids, delta.page_ids),
        slots=np.where(np.arange(24) % 4 == 0, base_map.slots, delta.slots),
        base_page_ids=np.where(np.arange(24) % 4 == 0, NO_PAGE, delta.base_page_ids),
        base_slots=np.where(np.arange(24) % 4 == 0, 0, delta.base_slots).astype(np.uint32),
    )
    x = rng.standard_normal((5, 48)).astype(np.float32)
    pool = pages.pool()
    factors = [Factor(one, x, None) for one in (delta, mixed, base_map)]
    for factor, y in zip(factors, matmul_together(factors, pool), strict=True):
        np.testing.assert_allclose(y, x @ read(factor.block_map, pool).T, rtol=1e-4, atol=1e-4)


def test_each_shared_block_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    pages = MemoryPages()
    base = rng.standard_normal((64, 64)).astype(np.float32)
    maps = variants_of(pages, base, [{1}, {2}, {4}, {5}], (8, 8))
    walked: list[int] = []
    alone = joint.matmul

    def counted(block_map: BlockMap, *args: Any, **options: Any) -> NDArray[Any]:
        walked.append(int(np.count_nonzero(block_map.page_ids != NO_PAGE)))
        return alone(block_map, *args, **options)

    monkeypatch.setattr(joint, "matmul", counted)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    matmul_together([Factor(one, x, None) for one in maps], pages.pool())
    # 60 blocks of all four, and each of the four places of three and of one.
    assert sum(walked) <= 60 + 4 * 4
    assert max(walked) == 60


def test_absent_blocks_are_zeros() -> None:
    rng = np.random.default_rng(6)
    weights = rng.standard_normal((20, 30)).astype(np.float32)
    pages = MemoryPages()
    whole = pages.add(weights, (6, 7))
    kept = rng.random(len(whole.page_ids)) < 0.5
    part = replace(whole, page_ids=np.where(kept, whole.page_ids, NO_PAGE))
    dense = weights.copy()
    for number in np.flatnonzero(~kept).tolist():
        row, col = number // 5 * 6, number % 5 * 7
        dense[row : row + 6, col : col + 7] = 0
    pool = pages.pool()
    for rows in (1, 3, 40):
        x = rng.standard_normal((rows, 30)).astype(np.float32)
        np.testing.assert_allclose(matmul(part, pool, x), x @ dense.T, rtol=1e-4, atol=1e-4)
        z = rng.standard_normal((rows, 20)).astype(np.float32)
        got = matmul(part, pool, z, transpose=True)
        np.testing.assert_allclose(got, z @ dense, rtol=1e-4, atol=1e-4)
    none = replace(whole, page_ids=np.full_like(whole.page_ids, NO_PAGE))
    assert not matmul(none, pool, np.ones((4, 30), np.float32)).any()
