# SPDX-License-Identifier: Apache-2.0
"""Sums of bags have the same bits however the table is stored and wherever its pages are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import lookup, matmul
from pydedup.blocks import BlockMap
from pydedup.testing.memory_pages import MemoryPages, random_weights
from pydedup.types import DType

Array = NDArray[Any]


def added_up(w: Array, ids: Array, offsets: Array) -> Array:
    """What adding rows one by one, by ascending ids, makes in the dtype that sums are in."""
    wide = w.astype(matmul.compute_dtype(DType.of(w.dtype)))
    out = np.zeros((len(offsets), w.shape[1]), wide.dtype)
    for bag, rows in enumerate(np.split(ids, offsets[1:])):
        for row in np.sort(rows):
            out[bag] += wide[row]
    return out


def stored_in_all_ways(pages: MemoryPages, w: Array) -> list[BlockMap]:
    """The same table in blocks of two shapes: raw, encoded, in part, dealt out, and as deltas."""
    base = w.copy()
    base[::2, ::3] = w[:1, :1]
    maps = []
    for shape in ((8, 7), (5, 40)):
        below = pages.add(base, shape, per_page=2)
        maps += [
            pages.add(w, shape, per_page=3),
            pages.add(w, shape, per_page=3, scattered=True),
            pages.add(w, shape, planes=True, per_page=4, scattered=True),
            pages.add_deltas(w, base, below, every=2, per_page=3),
            pages.add_deltas(w, base, below, every=3, per_page=2, scattered=True),
        ]
    return maps


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=9),
    dtype=st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.F16, DType.I8]),
    few=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_sums_do_not_depend_on_storage_memory_or_the_order_of_ids(
    sizes: list[int], dtype: DType, few: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (71, 19), dtype)
    pages = MemoryPages()
    maps = stored_in_all_ways(pages, w)
    ids = rng.integers(0, 5 if few else 71, sum(sizes))
    offsets = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
    want = added_up(w, ids, offsets)
    factors = rng.standard_normal(len(ids))
    shuffled = np.concatenate(
        [start + rng.permutation(size) for start, size in zip(offsets, sizes, strict=True)]
    ).astype(np.int64)
    scaled: list[Array] = []
    largest = max(map(len, pages.payloads.values()))
    for block_map in maps:
        for budget in (2 * largest, 1 << 24):
            pool = pages.pool(budget)
            for given_ids in (ids, ids[shuffled], ids):  # cold, then as warm as the budget allows
                got = lookup.bag(block_map, pool, given_ids, offsets, "sum")
                assert got.tobytes() == want.tobytes()
            scaled += [
                lookup.bag(block_map, pool, ids, offsets, "sum", weights=factors, threads=threads)
                for threads in (1, 3)
            ]
    assert all(one.tobytes() == scaled[0].tobytes() for one in scaled)


def test_ids_of_many_digits() -> None:
    # Rows far beyond 2^16 and bags of hundreds, which are sorted by three bytes of their ids.
    rng = np.random.default_rng(2)
    w = rng.standard_normal((200_000, 1)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (1000, 1), per_page=9, scattered=True)
    ids = rng.integers(0, len(w), 4000)
    ids[:300] = ids[300:600]
    offsets = np.array([0, 23, 47, 1000])
    want = added_up(w, ids, offsets)
    small = pages.pool(12 * max(map(len, pages.payloads.values())))
    for pool in (pages.pool(), small, small):
        assert lookup.bag(block_map, pool, ids, offsets, "sum").tobytes() == want.tobytes()


@settings(max_examples=30)
@given(size=st.integers(2, 700), n_rows=st.sampled_from([2, 40, 70_000]), seed=st.integers(0, 99))
def test_factors_of_one_id_count_in_their_order_and_no_other_order_counts(
    size: int, n_rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n_rows, 3)).astype(np.float32)
    pages = MemoryPages()
    block_map, pool = pages.add(w, (1000, 3), per_page=9), pages.pool()
    ids = rng.choice(rng.integers(0, n_rows, 9), size)
    factors = rng.standard_normal(size).astype(np.float32)
    shuffled = rng.permutation(size)
    for row in np.unique(ids):
        of_row = np.flatnonzero(ids[shuffled] == row)
        shuffled[of_row] = np.sort(shuffled[of_row])
    first, second = (
        lookup.bag(block_map, pool, [ids[at]], mode="sum", weights=[factors[at]])
        for at in (np.arange(size), shuffled)
    )
    assert first.tobytes() == second.tobytes()


def test_factors_stay_with_their_ids() -> None:
    w = np.array([[1.0], [2.0**30], [-(2.0**30)]], np.float32)
    pages = MemoryPages()
    block_map, pool = pages.add(w, (1, 1)), pages.pool()
    for order in ([2, 0, 1, 0], [0, 1, 2, 0], [1, 2, 0, 0]):
        factors = np.array([3.0, 5.0, 5.0])[order]
        got = lookup.bag(block_map, pool, [order], mode="sum", weights=[factors])
        # 3 + 3 first: what is added to 5 * 2^30 in f32 is rounded to 512s.
        assert got.tolist() == [[0.0]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_two_zeros_the_maximum_is_that_of_the_first_row(order: list[int]) -> None:
    pages = MemoryPages()
    block_map = pages.add(np.array([[-0.0], [0.0]], np.float32), (1, 1))
    top = lookup.bag(block_map, pages.pool(), [order], mode="max")
    assert top.tolist() == [[0.0]]
    assert np.signbit(top).all()
