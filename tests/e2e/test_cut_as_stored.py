# SPDX-License-Identifier: Apache-2.0
"""A model is cut into blocks as the one of the store that it follows from, whoever cut that."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies

_Model = dict[str, NDArray[np.float32]]


def a_model(seed: int = 0, prefix: str = "") -> _Model:
    """A table of words of 3,000 x 128, a layer and its bias, as a small text classifier has."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}words.weight": rng.standard_normal((3000, 128), np.float32),
        f"{prefix}dense.weight": rng.standard_normal((128, 128), np.float32),
        f"{prefix}dense.bias": rng.standard_normal(128, np.float32),
    }


def tuned(model: Mapping[str, NDArray[np.float32]]) -> _Model:
    """The model with a number of its table changed."""
    changed = {name: tensor.copy() for name, tensor in model.items()}
    next(iter(changed.values()))[7, 7] += 1
    return changed


def cuts_of(store: pydedup.Store, address: str) -> dict[str, tuple[int, int]]:
    return {tensor.name: tensor.block_shape for tensor in store.info(address).tensors}


def assert_same(
    store: pydedup.Store, address: str, model: Mapping[str, NDArray[np.float32]]
) -> None:
    loaded = store.load(address)
    assert list(loaded) == list(model)
    for name, tensor in model.items():
        np.testing.assert_array_equal(loaded[name], tensor)


@pytest.fixture(name="before")
def _before(store: pydedup.Store) -> _Model:
    """Add a model as releases cut it that knew no tables."""
    before = a_model()
    store.add("shop", before, block_shape=(64, 64), policy=policies.Exact())
    return before


@pytest.mark.parametrize("name", ["shop", "another"])
def test_a_relative_shares_blocks(store: pydedup.Store, before: _Model, name: str) -> None:
    report = store.add(name, after := tuned(before), policy=policies.Exact())
    assert report.shared_blocks == report.blocks - 1
    assert cuts_of(store, report.model) == cuts_of(store, "shop@1")
    assert_same(store, report.model, after)


def test_the_version_before_comes_first(store: pydedup.Store, before: _Model) -> None:
    for number in range(12):  # strangers that are cut otherwise
        store.add(f"other-{number}", a_model(1 + number), block_shape=(32, 32))
    store.add("newcomer", a_model(99))
    assert cuts_of(store, "newcomer@1")["words.weight"] == (32, 32)
    report = store.add("shop", tuned(before))
    assert cuts_of(store, "shop@2")["words.weight"] == (64, 64)
    assert report.shared_blocks == report.blocks - 1


def test_one_that_is_cut_otherwise_splits_no_family(store: pydedup.Store) -> None:
    base = a_model()
    for number in range(3):
        store.add(f"tenant-{number}", base)
    store.add("stranger", a_model(1), block_shape=(16, 128))
    report = store.add("tenant-3", tuned(base), policy=policies.Exact())
    assert report.shared_blocks == report.blocks - 1
    assert cuts_of(store, "tenant-3@1") == cuts_of(store, "tenant-0@1")


@pytest.mark.parametrize("in_one_add", [False, True])
def test_versions_of_others_hide_no_relative(
    store: pydedup.Store, before: _Model, in_one_add: bool
) -> None:
    """Nor do strangers, where the relative's next version comes in the same add."""
    small = {"dense.bias": np.ones(128, np.float32), "x": np.ones((1500, 100), np.float32)}
    for number in range(10):
        store.add(f"else-{number}" if in_one_add else "else", small)
    models = {"tenant": tuned(before)} | ({"shop": before} if in_one_add else {})
    for report in store.add_many(models, policy=policies.Exact()):
        assert report.shared_blocks >= report.blocks - 1
        assert cuts_of(store, report.model) == cuts_of(store, "shop@1")


def test_blocks_too_small_for_deltas_are_nobodys_but_the_models_own(store: pydedup.Store) -> None:
    store.add("shop", a_model(), block_shape=(8, 8))
    store.add("tenant", a_model())
    assert cuts_of(store, "tenant@1")["words.weight"] == (64, 128)
    store.add("shop", a_model())
    assert cuts_of(store, "shop@2")["words.weight"] == (8, 8)


def test_a_dry_run_says_what_the_add_does(store: pydedup.Store, before: _Model) -> None:
    dry, wet = (store.add("shop", tuned(before), dry_run=dry) for dry in (True, False))
    assert (dry.shared_blocks, dry.stored_bytes) == (wet.shared_blocks, wet.stored_bytes)


def test_one_that_begins_anew_is_cut_alike(store: pydedup.Store, before: _Model, url: str) -> None:
    """Somebody removes the version before while its successor is matched."""
    gone = iter([True])

    def remove(stage: str, done: int, total: int) -> None:
        if next(gone, False):
            with pydedup.open(url) as another:
                another.remove("shop@1")
                another.add("stranger", a_model(1), block_shape=(16, 128))

    report = store.add("shop", tuned(before), progress=remove)
    assert cuts_of(store, report.model)["words.weight"] == (64, 64)
    assert store.verify().ok


def test_with_another_prefix(store: pydedup.Store, before: _Model) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in before.items()}
    report = store.add("wrapped", wrapped)
    assert report.shared_blocks == report.blocks


def test_what_is_asked_for_goes_first(store: pydedup.Store, before: _Model) -> None:
    report = store.add("shop", before, block_shape=(16, 128))
    assert cuts_of(store, report.model)["words.weight"] == (16, 128)
    assert_same(store, report.model, before)


def test_others_are_cut_by_default(store: pydedup.Store, before: _Model) -> None:
    """Another shape, or another name of all."""
    longer = before | {"words.weight": np.ones((3200, 128), np.float32)}
    store.add("shop", longer)
    assert cuts_of(store, "shop@2")["words.weight"] == (64, 128)
    assert cuts_of(store, "shop@2")["dense.weight"] == (64, 64)
    store.add("else", {"vectors": before["words.weight"]})
    assert cuts_of(store, "else@1")["vectors"] == (64, 128)


def test_tied_tensors_are_cut_alike(store: pydedup.Store, before: _Model) -> None:
    """By whichever name the other has them."""
    for name, key in (("shop", "head.weight"), ("tenant", "a.first")):
        tied = {key: before["words.weight"]} | before
        report = store.add(name, tied)
        cuts = cuts_of(store, report.model)
        assert cuts[key] == cuts["words.weight"] == (64, 64)
        assert_same(store, report.model, tied)


def test_stacks_and_what_is_empty(store: pydedup.Store) -> None:
    rng = np.random.default_rng(0)
    shapes = [(4, 2100, 128), (0, 128), (128, 0), (), (7,), (300, 200, 3, 3), (3001, 131)]
    model = {f"t{n}": rng.standard_normal(shape, np.float32) for n, shape in enumerate(shapes)}
    first = store.add("m", model, block_shape=(37, 53))
    second = store.add("m", model)
    assert cuts_of(store, first.model) == cuts_of(store, second.model)
    assert second.shared_blocks == second.blocks
    assert_same(store, second.model, model)


def test_several_at_once(store: pydedup.Store, before: _Model) -> None:
    models = {"shop": tuned(before), "tenant": before}
    for report in store.add_many(models):
        assert report.shared_blocks >= report.blocks - 1
        assert cuts_of(store, report.model) == cuts_of(store, "shop@1")


def test_other_bytes_of_an_element(store: pydedup.Store) -> None:
    """Blocks of which f32 fills more than a page are none for it; others are."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((700, 1400), np.float32)
    table = rng.standard_normal((3000, 128), np.float32)
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in [("w", wide), ("t", table)]}
    store.add("half", halves, block_shape=(700, 700))
    assert cuts_of(store, "half@1") == {"w": (700, 700), "t": (700, 700)}
    store.add("full", {"w": wide, "t": table})
    assert cuts_of(store, "full@1") == {"w": (64, 64), "t": (700, 700)}
    assert_same(store, "full@1", {"w": wide, "t": table})


def test_accuracy_cuts_so_too(store: pydedup.Store, before: _Model) -> None:
    policy = policies.Accuracy(evaluate=lambda model: 1.0, max_drop=0.5)
    report = store.add("shop", tuned(before), policy=policy)
    assert cuts_of(store, report.model) == cuts_of(store, "shop@1")
    assert report.shared_blocks >= report.blocks - 1
