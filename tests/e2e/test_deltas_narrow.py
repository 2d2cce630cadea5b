# SPDX-License-Identifier: Apache-2.0
"""Families of quantised models: integers, 8-bit floats, masks, as deltas."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node
from pydedup.signatures import group_of
from pydedup.types import DType

SHAPE = (256, 320)
GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))


def base_of(dtype: Any, seed: int = 0) -> NDArray[Any]:
    """Elements of all bits, so that a block takes as many bytes as it has."""
    drawn = np.random.default_rng(seed).integers(0, 256, (*SHAPE, np.dtype(dtype).itemsize))
    bits = drawn.astype(np.uint8)
    return (bits & 1 if dtype is np.bool_ else bits).view(dtype)[..., 0]


def moved(base: NDArray[Any], seed: int) -> NDArray[Any]:
    """A hundredth of the elements with another last bit, or one more: beyond the last the first."""
    rng = np.random.default_rng(seed)
    words = base.view(f"u{base.itemsize}").copy()
    words[rng.random(base.shape) < 0.005] ^= 1
    if base.dtype != np.bool_:
        words[rng.random(base.shape) < 0.005] += 1
    return words.view(base.dtype)


def quantised(dtype: Any, shape: tuple[int, int] = SHAPE, seed: int = 0) -> NDArray[Any]:
    """Weights around a zero point, which is the middle of what is unsigned."""
    weights = np.random.default_rng(seed).standard_normal(shape)
    if np.dtype(dtype).kind not in "iu":
        return weights.astype(dtype)
    middle = 1 << 8 * np.dtype(dtype).itemsize - 1 if np.dtype(dtype).kind == "u" else 0
    return (np.rint(weights * 10) + middle).astype(dtype)


def same(got: NDArray[Any], want: NDArray[Any]) -> bool:
    return got.dtype == want.dtype and got.tobytes() == want.tobytes()


DTYPES = (
    *(np.dtype(f"{sign}{size}").type for sign in "iu" for size in (1, 2, 4, 8)),
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.bool_,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_family_is_deltas_on_its_first_model(
    store: pydedup.Store, dtype: Any, at_once: bool
) -> None:
    base = base_of(dtype)
    family = {"base": base, **{f"tenant-{i}": moved(base, i) for i in range(1, 5)}}
    models = {name: {"w": w} for name, w in family.items()}
    reports = store.add_many(models) if at_once else [store.add(*model) for model in models.items()]
    assert [r.delta_blocks for r in reports] == [0, *[r.blocks for r in reports[1:]]]
    # A mask takes an eighth of its bytes by itself.
    most = 0.06 if dtype == np.bool_ else 0.16 / base.itemsize
    assert all(r.stored_bytes < most * r.logical_bytes for r in reports[1:])
    for name, w in family.items():
        assert same(store.load(name)["w"], w), name
    told = store.explain("tenant-1")
    assert {other.model for other in told.shared_with} >= {"base@1"}
    assert told.tensors[0].delta_blocks == told.tensors[0].blocks
    assert store.verify().ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_near_is_no_delta(store: pydedup.Store, dtype: Any) -> None:
    first, second = (base_of(dtype, seed) for seed in (1, 2))
    for name, w in (("first", first), ("second", second)):
        assert store.add(name, {"w": w}).delta_blocks == 0
        assert same(store.load(name)["w"], w)


def test_floats_and_integers_do_not_hide_each_other(store: pydedup.Store) -> None:
    """A model and what was quantised of it have the same names; two are looked at, no more."""
    rng = np.random.default_rng(3)
    floats = rng.standard_normal(SHAPE).astype(np.float32)
    numbers = np.rint(floats * 32).astype(np.int8)
    # Too far for the similarity index: only the place in the model tells what it is near to.
    far = floats + 0.25 * rng.standard_normal(SHAPE).astype(np.float32)
    models = {"floats": floats, "numbers": numbers, "second": moved(numbers, 1), "far": far}
    models |= {"farther": far * np.float32(1.01), "third": moved(numbers, 2)}
    blocks = 64, 64
    reports = [store.add(name, {"w": w}, block_shape=blocks) for name, w in models.items()]
    assert [report.delta_blocks for report in reports] == [0, 0, 20, 20, 20, 20]
    for name, w in models.items():
        assert same(store.load(name)["w"], w), name


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize(
    "policy",
    [policies.Bounded(0.2), policies.Accuracy(lambda _: 1.0, 0.1, max_rel_error=0.2)],
)
def test_a_bound_is_of_no_integers(
    store: pydedup.Store, policy: policies.Policy, dtype: Any
) -> None:
    """What they stand for is known to their model alone: whatever is allowed, they keep bits."""
    base = base_of(dtype)
    near = moved(base, 1)
    store.add("base", {"w": base}, policy=policies.Exact())
    report = store.add("near", {"w": near}, policy=policy)
    assert (report.delta_blocks, report.shared_blocks) == (report.blocks, 0)
    assert same(store.load("near")["w"], near)
    assert report.certificate.get("largest_block_error", 0) == 0


def test_exact_models_hold_no_deltas(store: pydedup.Store) -> None:
    base = base_of(np.int8)
    store.add("base", {"w": base})
    assert store.add("near", {"w": moved(base, 1)}, policy=policies.Exact()).delta_blocks == 0


def test_bases_live_as_long_as_deltas_need_them(store: pydedup.Store) -> None:
    base = base_of(np.int8)
    one, two = moved(base, 1), moved(base, 2)
    store.add("base", {"w": base})
    store.add("one", {"w": one})
    store.remove("base")
    store.vacuum()
    assert same(store.load("one")["w"], one)
    report = store.add("two", {"w": two})  # on what is left of the base
    assert report.delta_blocks == report.blocks
    store.remove("one")
    store.vacuum()
    assert same(store.load("two")["w"], two)
    assert store.verify().ok
    store.remove("two")
    assert store.vacuum().pages_after == 0


INDEXED = (np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32, ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", INDEXED)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_family_is_found_under_other_names(
    store: pydedup.Store, dtype: Any, at_once: bool
) -> None:
    base = quantised(dtype)
    near = moved(base, 1)
    models = {"base": {"w": base}, "near": {"other.name": near}}
    reports = store.add_many(models) if at_once else [store.add(*model) for model in models.items()]
    assert reports[1].delta_blocks == reports[1].blocks
    assert same(store.load("near")["other.name"], near)
    stranger = quantised(dtype, seed=1)
    assert store.add("stranger", {"its.own": stranger}).delta_blocks == 0
    assert same(store.load("stranger")["its.own"], stranger)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_zero_point_makes_no_blocks_alike(store: pydedup.Store, dtype: Any) -> None:
    """All would be in one bucket of the index, of which the first 256 are looked at."""
    base = quantised(dtype, (32 * 1500, 32)) // 4 + 96
    store.add("base", {"w": base}, block_shape=(32, 32))
    near = base.copy()
    near[::32, 5] += 1
    report = store.add("near", {"other.name": near}, block_shape=(32, 32))
    assert report.delta_blocks == report.blocks == 1500
    assert same(store.load("near")["other.name"], near)


def test_equal_elements_and_sparse_ones(store: pydedup.Store) -> None:
    """Of masks and padding, blocks have no length, or little of it."""
    rng = np.random.default_rng(4)
    w = np.zeros((64 * 80, 64), np.int8)
    w[64 * 20 : 64 * 40] = -128
    w[64 * 40 :] = rng.random((64 * 40, 64)) < 0.02
    near = w.copy()
    near[::7, ::5] += 1
    for name, array in {"base": w, "near": near}.items():
        store.add(name, {name: array}, block_shape=(64, 64))
        assert same(store.load(name)[name], array)
    assert store.verify().ok


def test_what_a_vacuum_repacked_is_indexed_again(store: pydedup.Store) -> None:
    base = quantised(np.int8)
    store.add_many({"base": {"w": base}, "gone": {"v": quantised(np.int8, seed=1)}})
    store.remove("gone")
    store.vacuum()
    report = store.add("near", {"other.name": moved(base, 1)})
    assert report.delta_blocks == report.blocks


@pytest.mark.parametrize("is_covered", [True, False])
def test_an_old_store_is_added_to(store: pydedup.Store, is_covered: bool) -> None:
    """It has no signatures of integers, on pages that were indexed for their floats or were not."""
    base, other = quantised(np.int8), quantised(np.int8, seed=1)
    floats = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    store.add("base", {"w": base, "f": floats})
    adapter = store._adapter
    group = group_of((DType.I8, *store.info("base").tensors[0].block_shape))
    pieces = [number for number, _ in adapter.signatures(group)]
    assert pieces
    if not is_covered:
        pieces += [number for number, _ in adapter.signatures(0)]
    with adapter.transaction():
        adapter.delete_signatures(pieces)
    for name, w in {"near": moved(base, 1), "other": other, "other-near": moved(other, 1)}.items():
        report = store.add(name, {"w": w})
        assert report.delta_blocks == (0 if name == "other" else report.blocks)
        assert same(store.load(name)["w"], w)
    again = store.add("again", {"other.name": moved(base, 2)})
    assert again.delta_blocks == (0 if is_covered else again.blocks)
    assert store.verify().ok


def test_copies_keep_deltas_and_signatures(store: pydedup.Store, tmp_path: Any) -> None:
    base = quantised(np.uint8)
    family = {"base": base, "near": moved(base, 1)}
    for name, w in family.items():
        store.add(name, {"w": w})
    url = f"sqlite:///{tmp_path}/other.db"
    store.copy_to(url)
    with pydedup.open(url) as other:
        for name, w in family.items():
            assert same(other.load(name)["w"], w)
        floats = other.add("floats", {"f": np.ones(SHAPE, np.float32)})
        report = other.add("late", {"other.name": moved(base, 2)})
        assert report.delta_blocks == report.blocks
        assert floats.delta_blocks == 0
        assert other.verify().ok


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32])
def test_computing_with_deltas(store: pydedup.Store, dtype: Any) -> None:
    base = base_of(np.int8).astype(dtype)
    near = moved(base, 1)
    store.add("base", {"w": base})
    report = store.add("near", {"w": near}, graph=GRAPH)
    assert report.delta_blocks == report.blocks
    # Sums of products of such numbers are exact in f32.
    x = np.random.default_rng(5).integers(-3, 4, (7, SHAPE[1])).astype(np.float32)
    table = store.tensor("near", "w")
    ids = np.array([[0, 5, 255], [63, 64, 65]])
    assert same(table.take(ids), near[ids])
    want = x @ near.astype(np.float32).T
    assert np.array_equal(table.matmul(x), want)
    assert np.array_equal(store.predict("near", x), want)
