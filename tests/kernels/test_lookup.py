# SPDX-License-Identifier: Apache-2.0
"""Rows and bags of stored matrices against numpy."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import lookup, matmul
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.testing.memory_pages import MemoryPages, random_weights
from pydedup.types import DType


@settings(max_examples=60)
@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 90),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(list(DType)),
    planes=st.booleans(),
    shape=st.sampled_from([(), (0,), (1,), (17,), (3, 5), (2, 0, 3), (2, 3, 4)]),
    seed=st.integers(0, 1 << 30),
)
def test_take_gives_the_stored_rows(
    rows: int,
    cols: int,
    block: tuple[int, int],
    dtype: DType,
    planes: bool,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (rows, cols), dtype)
    pages = MemoryPages()
    block_map = pages.add(w, block, planes=planes, per_page=3, scattered=bool(seed % 2))
    largest = max(map(len, pages.payloads.values()))
    ids = rng.integers(0, rows, shape)
    got = lookup.take(block_map, pages.pool(4 * largest), ids)
    assert got.dtype == w.dtype
    assert np.array_equal(got.view(np.uint8), w[ids].view(np.uint8))
    whole = matmul.read(block_map, pages.pool(4 * largest))
    assert np.array_equal(whole.view(np.uint8), w.view(np.uint8))


def bags_of(w: NDArray[Any], ids: NDArray[Any], sizes_: list[int], mode: str) -> NDArray[Any]:
    wide, at, out = w.astype(np.float64), 0, []
    for size in sizes_:
        rows = wide[ids[at : at + size]]
        at += size
        out.append(getattr(rows, mode)(axis=0) if size else np.zeros(w.shape[1]))
    return np.array(out).reshape(len(sizes_), w.shape[1])


@settings(max_examples=60)
@given(
    bag_sizes=st.lists(st.integers(0, 12), max_size=30),
    dtype=st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.F16, DType.I8, DType.BOOL]),
    planes=st.booleans(),
    mode=st.sampled_from(lookup.BAG_MODES),
    seed=st.integers(0, 1 << 30),
)
def test_bags(bag_sizes: list[int], dtype: DType, planes: bool, mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (61, 19), dtype)
    pages = MemoryPages()
    block_map = pages.add(w, (8, 7), planes=planes, per_page=3, scattered=bool(seed % 2))
    pool = pages.pool(4 * max(map(len, pages.payloads.values())))
    ids = rng.integers(0, 61, sum(bag_sizes))
    offsets = np.cumsum([0, *bag_sizes], dtype=np.int64)[:-1]
    got = lookup.bag(block_map, pool, ids, offsets, mode)
    assert got.dtype == matmul.compute_dtype(dtype)
    want = bags_of(w, ids, bag_sizes, mode)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    if mode == "max":
        assert np.array_equal(got, want)


def test_bags_of_two_axes_and_of_many_threads() -> None:
    rng = np.random.default_rng(4)
    w = rng.standard_normal((500, 64)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (32, 64))
    ids = rng.integers(0, 500, (300, 40))
    one = lookup.bag(block_map, pages.pool(), ids, threads=1)
    assert np.array_equal(one, lookup.bag(block_map, pages.pool(), ids, threads=3))
    np.testing.assert_allclose(one, w[ids].mean(axis=1), rtol=1e-4, atol=1e-6)
    assert (
        lookup.bag(block_map, pages.pool(), np.empty((3, 0), np.int64)).tolist() == [[0.0] * 64] * 3
    )


@settings(max_examples=40)
@given(
    sizes_=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    dtype=st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.F16, DType.I8]),
    planes=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_sums_with_weights(sizes_: list[int], dtype: DType, planes: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (61, 83), dtype)
    pages = MemoryPages()
    block_map = pages.add(w, (8, 70), planes=planes, per_page=3)
    pool = pages.pool(4 * max(map(len, pages.payloads.values())))
    ids = rng.integers(0, 61, sum(sizes_))
    offsets = np.cumsum([0, *sizes_], dtype=np.int64)[:-1]
    factors = rng.standard_normal(len(ids))
    got = lookup.bag(block_map, pool, ids, offsets, "sum", weights=factors)
    want, at = np.zeros((len(sizes_), 83)), 0
    for bag, size in enumerate(sizes_):
        part = slice(at, at + size)
        want[bag] = factors[part].astype(got.dtype) @ w[ids[part]].astype(np.float64)
        at += size
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_weights_of_bags_must_fit() -> None:
    pages = MemoryPages()
    block_map, pool = pages.add(np.ones((3, 4), np.float32)), pages.pool()
    ones = np.ones((1, 2))
    for mode in ("mean", "max"):
        with pytest.raises(ArgumentError, match="mode 'sum' only"):
            lookup.bag(block_map, pool, [[0, 1]], mode=mode, weights=ones)
    with pytest.raises(ArgumentError, match=r"weights have shape \(2,\); that of ids, \(1, 2\)"):
        lookup.bag(block_map, pool, [[0, 1]], mode="sum", weights=ones[0])
    with pytest.raises(ArgumentError, match="weights must hold real numbers"):
        lookup.bag(block_map, pool, [[0, 1]], mode="sum", weights=[["a", "b"]])


def test_rows_of_a_table_whose_pages_come_and_go() -> None:
    rng = np.random.default_rng(8)
    w = rng.standard_normal((300, 40)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 16), per_page=4)
    pool = pages.pool()
    ids = rng.integers(0, 300, 50)
    for _ in range(3):  # cold, resident, and read anew
        for _ in range(2):
            assert np.array_equal(lookup.take(block_map, pool, ids), w[ids])
        assert pool.stats()["pinned_bytes"] == 0
        pool.drop(block_map.page_ids[::3].copy())
    # The same ids now lead to other bytes: noticed, whatever they are.
    other = MemoryPages()
    other.add(-w, (16, 16), per_page=4)
    pool.clear()
    pages.payloads.update(other.payloads)
    with pytest.raises(CorruptStoreError, match="another one than before"):
        lookup.take(block_map, pool, ids)


def test_a_forked_child_has_rows_while_others_of_its_parent_look_some_up() -> None:
    # Where the child had its parent's tables, one in three found the lock of one held for ever.
    pages = MemoryPages()
    w = np.arange(40_000, dtype=np.float32).reshape(-1, 1)
    block_map = pages.add(w, (1, 1), per_page=4000)
    pool = pages.pool()
    ids = np.arange(0, len(w), 4000)
    maps, stop = [block_map], threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            # Nothing is known of it yet, so all its pages are looked at, with the lock.
            maps[:] = [dataclasses.replace(block_map, page_ids=block_map.page_ids.copy())]
            lookup.take(maps[0], pool, ids)

    def look_up() -> None:
        assert np.array_equal(lookup.take(maps[0], pool, ids), w[ids])

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for _ in range(12):
            child = multiprocessing.get_context("fork").Process(target=look_up, daemon=True)
            child.start()
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def test_ids_of_any_layout() -> None:
    w = np.arange(80, dtype=np.float32).reshape(20, 4)
    pages = MemoryPages()
    block_map, pool = pages.add(w, (4, 4)), pages.pool()
    ids = np.arange(20)
    odd = np.frombuffer(b"\0" + ids.tobytes(), np.uint8)[1:].view(np.int64)
    for other in (ids[::-1], odd, ids.astype(">i8"), ids.astype(np.uint8), ids.reshape(4, 5).T):
        assert np.array_equal(lookup.take(block_map, pool, other), w[np.asarray(other)])
    with pytest.raises(ArgumentError, match="out of range"):
        lookup.take(block_map, pool, np.array([1 << 63], np.uint64))


def test_the_maximum_keeps_nan_in_any_order() -> None:
    w = np.array([[1.0], [np.nan], [3.0], [-np.inf]], np.float32)
    pages = MemoryPages()
    block_map, pool = pages.add(w, (1, 1)), pages.pool()
    for ids in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        assert np.isnan(lookup.bag(block_map, pool, [ids], mode="max")).all()
    assert lookup.bag(block_map, pool, [[3, 3]], mode="max") == -np.inf
    assert lookup.bag(block_map, pool, [[0, 2]], mode="max") == 3.0


def test_encoded_blocks_are_decoded_a_part_at_a_time() -> None:
    # 19 MiB of blocks that take next to nothing on their pages; parts have 16 MiB at most.
    rows = 1_200_000
    w = np.repeat(np.arange(rows, dtype=np.float32)[:, None] // 4096, 4, axis=1)
    pages = MemoryPages()
    block_map = pages.add(w, (4096, 4), planes=True, per_page=1000)
    assert sum(map(len, pages.payloads.values())) < w.nbytes // 20
    ids = np.random.default_rng(2).integers(0, rows, (60, 30))
    assert np.array_equal(lookup.take(block_map, pages.pool(), ids), w[ids])
    got = lookup.bag(block_map, pages.pool(), ids, mode="sum")
    assert np.array_equal(got, w[ids].sum(axis=1))  # small whole numbers: exact in any order
    assert np.array_equal(lookup.bag(block_map, pages.pool(), ids, mode="max"), w[ids].max(axis=1))


def test_only_the_pages_of_the_rows_are_read() -> None:
    w = np.arange(6400, dtype=np.float32).reshape(400, 16)
    pages = MemoryPages()
    block_map = pages.add(w, (10, 16), per_page=2)
    lookup.take(block_map, pages.pool(), [0, 19, 395])
    assert pages.fetches == [[1, 20]]
    lookup.bag(block_map, pages.pool(), [[25], [30]])
    assert pages.fetches[1:] == [[2]]


def test_wrong_rows_and_bags_are_refused() -> None:
    pages = MemoryPages()
    block_map, pool = pages.add(np.ones((3, 4), np.float32)), pages.pool()
    for ids, message in (
        ([3], "id 3 is out of range"),
        ([0, -1], "id -1 is out of range"),
        ([0.5], "integers"),
        ([True], "integers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            lookup.take(block_map, pool, ids)
        with pytest.raises(ArgumentError, match=message):
            lookup.bag(block_map, pool, ids, [0])
    cases: list[tuple[Any, Any, str]] = [
        ([0, 1], None, "rank 1 without offsets"),
        ([[0, 1]], [0], "rank 2 with offsets"),
        ([0, 1], [1], "begin with 0"),
        ([0, 1], [0, 2, 1], "ascend"),
        ([0, 1], [0, 3], "stay within the 2 ids"),
        ([0, 1], [], "no bag for 2 ids"),
        ([0, 1], [[0]], "1-D array of integers"),
        ([0, 1], [0.0], "1-D array of integers"),
    ]
    for ids_, offsets, message in cases:
        with pytest.raises(ArgumentError, match=message):
            lookup.bag(block_map, pool, ids_, offsets)
    with pytest.raises(ArgumentError, match="unknown mode 'min'"):
        lookup.bag(block_map, pool, [[0]], mode="min")
    assert lookup.take(block_map, pool, []).shape == (0, 4)
