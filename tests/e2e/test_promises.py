# SPDX-License-Identifier: Apache-2.0
"""What policies promise and certificates say, of new versions too.

Synthetic weights: a matrix, and a copy that every weight moved a little of, as a fine-tune does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies, registry
from pydedup.certificates import PAGES, error_of
from pydedup.policies import Policy
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject

from .relatives import Model, moved, same_bits, weights


def good(_: Mapping[str, NDArray[Any]]) -> float:
    return 1.0


def away(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The relative L2 distance of one block, to the last digit, which numpy has by chance."""
    wide = a.astype(np.float64)
    apart, whole = (math.fsum(values.ravel() ** 2) for values in (wide - b, wide))
    return math.sqrt(apart / whole)


# ---- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [policies.Bounded, lambda e: policies.Accuracy(good, 1.0, max_rel_error=e)]
)
def test_what_is_shared_is_within_the_bound_to_the_last_digit(
    store: pydedup.Store, policy: Callable[[float], Policy]
) -> None:
    """Distances are sums in f32, which for these are too small by 8e-7 of themselves."""
    near = np.full((64, 64), 1.2725753, np.float32)
    near[::2] *= -1
    source = (near * np.float32(1.1)).astype(np.float32)
    bound = away(source, near) * (1 - 4e-7)
    store.add("near", {"w": near}, block_shape=(64, 64))
    store.add("m", {"w": source}, policy=policy(bound), block_shape=(64, 64))
    assert away(source, store.load("m")["w"]) <= bound


def test_recorded_errors_are_not_below_the_true_ones(store: pydedup.Store) -> None:
    near = np.full((64, 64), 1.2725753, np.float32)
    near[::2] *= -1
    source = (near * np.float32(1.1)).astype(np.float32)
    store.add("near", {"w": near}, block_shape=(64, 64))
    for policy in (policies.Bounded(0.1), policies.Accuracy(good, 1.0, max_rel_error=0.1)):
        report = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64))
        recorded = report.certificate["largest_block_error"]
        true = away(source, store.load("m")["w"])
        assert true == pytest.approx(1 / 11)
        assert true * (1 - 1e-12) <= recorded <= true * (1 + 1e-5)


def test_recorded_errors_of_deltas_are_not_below_the_true_ones(store: pydedup.Store) -> None:
    """Sums in f32 are below them as often as above."""
    rng = np.random.default_rng(8)
    near = {f"w{n}": rng.standard_normal((64, 64)).astype(np.float32) for n in range(24)}
    source = {name: moved(array, 0.05) for name, array in near.items()}
    store.add("near", near, policy=policies.Exact())
    report = store.add("m", source, policy=policies.Bounded(0.01), block_shape=(64, 64))
    assert report.delta_blocks == len(source)
    got = store.load("m")
    for name, array in source.items():
        recorded = error_of(report.certificate, name)
        true = away(array, got[name])
        assert true * (1 - 1e-12) <= recorded <= true * (1 + 1e-5)


@pytest.mark.parametrize("order", [("near", "far"), ("far", "near")])
@pytest.mark.parametrize(
    "policy",
    [
        policies.Lossless(),
        policies.Bounded(0.1),
        policies.Accuracy(good, 1.0, max_rel_error=0.1),
    ],
)
def test_of_several_stored_blocks_the_nearest_is_taken(
    store: pydedup.Store, policy: Policy, order: tuple[str, str]
) -> None:
    others = {"near": moved(weights(), 0.002), "far": moved(weights(), 0.05)}
    for name in order:
        store.add(name, {"w": others[name]}, policy=policies.Exact(), block_shape=(64, 64))
    store.add("m", {"w": weights()}, policy=policy, block_shape=(64, 64))
    assert [(other.model, other.blocks) for other in store.explain("m").shared_with] == [
        ("near@1", 4)
    ]
    taken = weights() if policy.max_rel_error == 0 else others["near"]
    assert same_bits(store, "m", {"w": taken})


def test_no_block_of_another_dtype_is_shared_within_a_bound(store: pydedup.Store) -> None:
    source = weights().astype(ml_dtypes.bfloat16)
    store.add("near", {"w": weights()}, block_shape=(64, 64))
    store.add("m", {"w": source}, policy=policies.Bounded(0.05), block_shape=(64, 64))
    assert store.verify().errors == []
    loaded = store.load("m")["w"]
    assert loaded.dtype == source.dtype
    assert away(source, loaded.astype(np.float64)) <= 0.05


@pytest.mark.parametrize("bound", [0.0, 0.0005, 0.002, 0.02])
def test_what_a_search_puts_in_a_blocks_place_is_within_the_bound(
    store: pydedup.Store, bound: float
) -> None:
    """Deltas as well as stored blocks, which are farther away: whatever the metric would allow."""
    store.add("near", {"w": weights()}, policy=policies.Exact(), block_shape=(64, 64))
    source = moved(weights(), 0.05)
    policy = policies.Accuracy(good, 1.0, max_rel_error=bound)
    said = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64)).certificate
    assert said["replaced"] == (4 if bound else 0)
    got = store.load("m")["w"]
    found = [away(source[at : at + 64], got[at : at + 64]) for at in range(0, 256, 64)]
    assert max(found) <= bound
    assert max(found) <= said["largest_block_error"] <= bound


def test_a_search_offers_deltas_on_blocks_of_another_dtype_and_never_these(
    store: pydedup.Store,
) -> None:
    """What is put in a block's place is of its dtype: the block of another one is not."""
    source = moved(weights(), 0.002).astype(ml_dtypes.bfloat16)
    store.add("wide", {"w": weights()}, policy=policies.Exact(), block_shape=(64, 64))
    policy = policies.Accuracy(good, 1.0, max_rel_error=0.1)
    report = store.add("narrow", {"w": source}, policy=policy, block_shape=(64, 64))
    said = report.certificate
    assert (said["blocks"], said["replaced"], said["shared"]) == (4, 4, 0)
    assert report.delta_blocks == 4
    got = store.load("narrow")["w"]
    assert got.dtype == source.dtype
    assert 0 < away(source, got) <= 0.1


def test_a_model_that_shares_pages_records_what_they_are(url: str) -> None:
    """Whoever adds it has read none of them as another model's."""
    recorded = []
    for name in ("first", "second"):
        with pydedup.open(url) as store:
            store.add(name, {"w": weights()}, policy=policies.Exact())
            (row,) = store._adapter.models(name=name)
            recorded.append(json.loads(row.certificate)[PAGES])
    assert recorded[0] == recorded[1] != ""


def test_versions_that_are_alike_read_as_many_bytes_of_each_page(url: str) -> None:
    read = []
    for _ in range(2):
        with pydedup.open(url) as store:  # which has looked at no page
            store.add("m", {"w": weights()}, block_shape=(64, 64))
            (row,) = store._adapter.models(name="m", newest=1)
            read.append([found[1:] for found in store._adapter.model_pages(row.id)])
    assert read[0] == read[1] != []


def test_versions_added_together_record_their_own_bytes_of_a_page_they_share(url: str) -> None:
    """Of a page that none of them reads only the sum is known, which one uses a part of."""
    whole = weights()
    whole[:128] = np.round(whole[:128])  # takes far less than the rest, on the same page
    models = {"whole": {"w": whole}, "part": {"w": whole[:128]}}

    def read(store: pydedup.Store, name: str) -> list[tuple[int, ...]]:
        (row,) = store._adapter.models(name=name, newest=1)
        return [found[1:] for found in store._adapter.model_pages(row.id)]

    with pydedup.open(url) as store:
        for name, arrays in models.items():
            store.add(name, arrays, block_shape=(64, 64))
        before = {name: read(store, name) for name in models}
    looks: list[None] = []
    fault = Fault("read_pages", lambda: looks.append(None), 0)
    adapter, _ = inject(registry.connect(url, mode="a"), fault)
    with Store(adapter, 1 << 26) as store:  # which has looked at no page
        store.add("whole", models["whole"], block_shape=(64, 64))
        assert not looks
        store.add_many(models, block_shape=(64, 64))
        assert looks
        assert {name: read(store, name) for name in models} == before
        assert store.verify().errors == []


def test_errors_of_tensors_that_were_not_recorded_one_by_one() -> None:
    """As in certificates of early stores."""
    assert error_of({"policy": "bounded", "largest_block_error": 0.002}, "w") == 0.002
    assert error_of({"policy": "bounded"}, "w") == 0.0


def test_no_recorded_error_is_beyond_the_bound(store: pydedup.Store) -> None:
    """Of 400 quantised deltas one is so close to it that rounding its error up goes beyond."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((400 * 32, 32)).astype(np.float32)
    near = (base * (1 + 0.02 * rng.standard_normal(base.shape))).astype(np.float32)
    store.add("base", {"w": base}, block_shape=(32, 32))
    report = store.add("m", {"w": near}, policy=policies.Bounded(0.001), block_shape=(32, 32))
    assert report.delta_blocks == 400
    assert 0.001 * (1 - 1e-6) < report.certificate["largest_block_error"] <= 0.001


def test_equal_blocks_of_two_tensors_have_one_error(store: pydedup.Store) -> None:
    """Only one of them is compared; a stricter version must not take the other for exact."""
    source = moved(weights())
    longer = np.concatenate([source, weights()[::-1]])
    models = {"a": source, "b": longer}
    store.add("near", {"w": weights()}, block_shape=(64, 64))
    report = store.add("m", models, policy=policies.Bounded(0.1), block_shape=(64, 64))
    errors = report.certificate["tensor_errors"]
    assert errors["a"] == errors["b"] > 0.005
    store.add("m", models, policy=policies.Bounded(0.001), block_shape=(64, 64))
    for name, array in store.load("m").items():
        for top in range(0, len(array), 64):
            assert away(models[name][top : top + 64], array[top : top + 64]) <= 0.001


def test_weights_that_span_all_of_f64_can_be_searched(store: pydedup.Store) -> None:
    """Their range is infinite: numpy warned of it."""
    wide = weights().astype(np.float64) * 1e307
    wide[:2] = [[1.7e308], [-1.7e308]]
    store.add("m", {"w": wide})
    report = store.add("m", {"w": wide * 0.999}, policy=policies.Accuracy(good, 1.0))
    assert report.certificate["replaced"] > 0
    assert away(wide / 1e300, store.load("m")["w"] / 1e300) < 0.002


# ---- bits ---------------------------------------------------------------------------------------


def other_zeros() -> tuple[Model, Model]:
    base = weights()[:64]
    base[3] = 0.0
    pruned = base.copy()
    pruned[3] = -0.0  # as weights times a mask become
    return {"w": base}, {"w": pruned}


def underflow() -> tuple[Model, Model]:
    base = weights()[:64].astype(np.float64)
    base[0, 0] = 5e-324
    other = base.copy()
    other[0, 0] = 0.0
    return {"w": base}, {"w": other}


@pytest.mark.parametrize("models", [other_zeros, underflow])
@pytest.mark.parametrize("before", [policies.Bounded(0.01), policies.Accuracy(good, 0.1)])
@pytest.mark.parametrize("after", [policies.Exact(), policies.Lossless()])
def test_a_version_keeps_its_bits_after_one_that_did_not(
    store: pydedup.Store, models: Any, before: Policy, after: Policy
) -> None:
    base, model = models()
    store.add("base", base, policy=policies.Exact())
    lossy = store.add("m", model, policy=before)
    assert lossy.certificate["largest_block_error"] == 0  # which is not to say the same bits
    assert not same_bits(store, "m@1", model)
    store.add("m", model, policy=after)
    assert same_bits(store, "m@2", model)
    assert store.verify().errors == []


def test_a_version_after_a_lossy_one_takes_what_its_bound_allows(store: pydedup.Store) -> None:
    """Tensor by tensor: one that was near enough says nothing of the others."""
    base, exact = weights(), weights()[:64] * 3
    store.add("base", {"a": base, "b": exact}, policy=policies.Exact())
    model = {"a": moved(base, 0.04), "b": exact}
    for bound in (0.05, 0.05, 0.01):
        store.add("m", model, policy=policies.Bounded(bound))
    for version in (1, 2):
        errors = store.info(f"m@{version}").certificate["tensor_errors"]
        assert list(errors) == ["a"]
        assert 0.03 < errors["a"] <= 0.05
    assert store.info("m@3").certificate["largest_block_error"] <= 0.01
    assert np.linalg.norm(store.load("m@3")["a"] - model["a"]) <= 0.01 * np.linalg.norm(model["a"])


@pytest.mark.parametrize("rows", [512, 4096])
def test_a_version_that_changed_in_part_records_the_errors_of_what_it_takes_over(
    store: pydedup.Store, rows: int
) -> None:
    """Of large tensors, which are matched by themselves, as of small ones."""
    rng = np.random.default_rng(2)
    base = rng.standard_normal((rows, 64)).astype(np.float32)
    store.add("base", {"w": base}, policy=policies.Exact(), block_shape=(64, 64))
    source = moved(base, 0.04)
    for part in (0, rows // 2):  # at the second time the other half is new, and stored to the bit
        source[rows - part :] = rng.standard_normal((part, 64))
        policy = policies.Bounded(0.01)
        report = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64))
        got = store.load(report.model)["w"]
        found = [away(source[at : at + 64], got[at : at + 64]) for at in range(0, rows, 64)]
        assert 0 < max(found) <= report.certificate["largest_block_error"] <= 0.01
    assert max(found[rows // 128 :]) == 0
