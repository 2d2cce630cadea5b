# SPDX-License-Identifier: Apache-2.0
"""Families of quantised models: integers, 8-bit floats, masks, as deltas by their place."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node

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
    words[rng.random(SHAPE) < 0.005] ^= 1
    if base.dtype != np.bool_:
        words[rng.random(SHAPE) < 0.005] += 1
    return words.view(base.dtype)


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


def test_copies_keep_deltas(store: pydedup.Store, tmp_path: Any) -> None:
    base = base_of(np.uint8)
    family = {"base": base, "near": moved(base, 1)}
    for name, w in family.items():
        store.add(name, {"w": w})
    url = f"sqlite:///{tmp_path}/other.db"
    store.copy_to(url)
    with pydedup.open(url) as other:
        for name, w in family.items():
            assert same(other.load(name)["w"], w)
        report = other.add("late", {"w": moved(base, 2)})
        assert report.delta_blocks == report.blocks
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
