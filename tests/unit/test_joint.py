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
from pydedup.errors import ArgumentError
from pydedup.joint import Factor, matmul_together
from pydedup.matmul import Among, matmul, read
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


def test_matrices_of_two_dtypes_are_not_multiplied_together() -> None:
    pages, rng = MemoryPages(), np.random.default_rng(3)
    arrays = [rng.standard_normal((16, 16)).astype(dtype) for dtype in (np.float32, np.float16)]
    x = rng.standard_normal((2, 16)).astype(np.float32)
    factors = [Factor(pages.add(array, (8, 8)), x, None) for array in arrays]
    for array, y in zip(arrays, matmul_together(factors, pages.pool()), strict=True):
        np.testing.assert_allclose(y, x @ array.astype(np.float32).T, rtol=2e-4, atol=2e-4)


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
        st.lists(st.integers(0, len(maps) - 1), min_size=1, max_size=20), label="requests"
    ):
        length = data.draw(st.integers(0, 4) | st.just(30), label="rows")
        x = rng.standard_normal((length, inner)).astype(dtype)
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
        walked.append(len(block_map.page_ids))
        return alone(block_map, *args, **options)

    monkeypatch.setattr(joint, "matmul", counted)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    matmul_together([Factor(one, x, None) for one in maps], pages.pool())
    assert walked == [64 + 4]  # at each place one that most have, and four that one has alone


def test_what_others_have_does_not_get_into_a_result() -> None:
    pages = MemoryPages()
    base = np.ones((64, 64), np.float32)
    base[3, 3] = np.nan  # in block 0, which the third has otherwise
    maps = variants_of(pages, base, [set(), set(), {0}], (8, 8))
    pool = pages.pool()
    for rows in (1, 2, 4):
        factors = [Factor(one, np.ones((rows, 64), np.float32), None) for one in maps]
        first, _, third = matmul_together(factors, pool)
        assert np.isnan(first[:, 3]).all()
        assert np.isfinite(third).all()
        back = matmul_together(factors, pool, transpose=True)
        assert np.isnan(back[0][:, 3]).all()
        assert np.isfinite(back[2]).all()


def test_columns_that_do_not_fit_are_refused() -> None:
    pages = MemoryPages()
    whole = pages.add(np.ones((4, 4), np.float32), (2, 2))
    x = np.ones((3, 4), np.float32)
    own, everyone = np.zeros(3, np.uint8), np.ones(4, np.uint64)
    for variants, places, members, said in (
        (own, [0, 2, 3, 3], everyone, "place 2 follows on 0"),
        (own, [0, 1, 2, 2], everyone, "places end at 2 of 4"),
        (own[:2], [0, 1, 2, 3], everyone, "variants must be 3 numbers below 64"),
        (own + 64, [0, 1, 2, 3], everyone, "variants must be 3 numbers below 64"),
        (own, [0, 1, 2, 3], everyone[:3], "members of 3 blocks came with 4"),
    ):
        among = Among(variants.astype(np.uint8), np.array(places, np.uint32), members)
        with pytest.raises(ArgumentError, match=said):
            matmul(whole, pages.pool(), x, among=among)
