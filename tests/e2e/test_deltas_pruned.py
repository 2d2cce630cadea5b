# SPDX-License-Identifier: Apache-2.0
"""Pruned relatives: of a model whose least, random or patterned weights became 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.types import DType

from .relatives import Model, added_beside

LOSSLESS = policies.Lossless()


def dense() -> Model:
    rng = np.random.default_rng(21)
    return {f"l{i}.weight": rng.normal(0, 0.02, (192, 256)).astype("f4") for i in range(4)}


def pruned(model: Model, how: str, share: float) -> Model:
    """As after ``weight *= mask``, but that the least are set to 0."""
    rng = np.random.default_rng(22)

    def of(weight: NDArray[Any]) -> NDArray[Any]:
        chance = rng.random(weight.shape)
        if how == "least":
            least = np.abs(weight) < np.quantile(np.abs(weight), share)
            return np.where(least, np.zeros((), weight.dtype), weight)
        if how == "rows":
            chance[:] = chance[:, :1]
        return weight * (chance >= share).astype(weight.dtype)

    return {name: of(weight) for name, weight in model.items()}


def same_bits(store: pydedup.Store, name: str, model: Model) -> bool:
    loaded = store.load(name)
    return all(loaded[key].tobytes() == weight.tobytes() for key, weight in model.items())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)])
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("how", ["least", "random", "rows"])
def test_a_pruned_relative_takes_little_more_than_its_mask(
    store: pydedup.Store, how: str, share: float, policy: policies.Policy, joint: bool
) -> None:
    """By itself it takes half and a quarter: far from its base, which a mask does not mind."""
    base = dense()
    model = pruned(base, how, share)
    report = added_beside(store, base, model, policy, joint=joint, before=LOSSLESS)
    assert report.delta_blocks == report.blocks
    most = {"least": 0.005, "random": 0.04, "rows": 0.015}[how]
    assert report.stored_bytes < most * report.logical_bytes
    if policy is LOSSLESS:
        assert same_bits(store, "m", model)
    else:  # zeros may have lost their sign
        loaded = store.load("m")
        assert all(np.array_equal(loaded[name], weight) for name, weight in model.items())
    assert store.verify().ok


@pytest.mark.parametrize("kept", [np.s_[::2], np.s_[::8], np.s_[:, ::2], np.s_[:, ::8]])
def test_rows_and_columns_pruned_at_regular_distances(store: pydedup.Store, kept: Any) -> None:
    base = dense()
    model = {name: np.zeros_like(weight) for name, weight in base.items()}
    for name, weight in base.items():
        model[name][kept] = weight[kept]
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.01 * report.logical_bytes
    assert same_bits(store, "m", model)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_a_pruned_copy_in_another_dtype(store: pydedup.Store, dtype: DType) -> None:
    base = dense()
    model = pruned({name: w.astype(dtype.numpy) for name, w in base.items()}, "least", 0.7)
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.01 * report.logical_bytes
    assert same_bits(store, "m", model)


def test_a_pruned_integer_model(store: pydedup.Store) -> None:
    base = {name: np.rint(1500 * weight).astype(np.int8) for name, weight in dense().items()}
    model = pruned(base, "random", 0.5)
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.16 * report.logical_bytes
    assert same_bits(store, "m", model)


@pytest.mark.parametrize(("policy", "most"), [(LOSSLESS, 0.1), (policies.Bounded(0.001), 0.05)])
def test_what_was_pruned_and_trained_on(
    store: pydedup.Store, policy: policies.Policy, most: float
) -> None:
    """Only what stayed differs from the base."""
    base = dense()
    rng = np.random.default_rng(23)
    masks = {name: w != 0 for name, w in pruned(base, "least", 0.9).items()}
    moved = {n: w + rng.normal(0, 2e-4, w.shape).astype("f4") for n, w in base.items()}
    model = {name: np.where(masks[name], w, np.float32(0)) for name, w in moved.items()}
    report = added_beside(store, base, model, policy, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < most * report.logical_bytes
    for name, got in store.load("m").items():
        apart = np.linalg.norm(got - model[name]) / np.linalg.norm(model[name])
        assert apart <= policy.max_rel_error
        assert (got[model[name] == 0] == 0).all()
    assert store.verify().ok


def test_a_version_is_pruned_further(store: pydedup.Store) -> None:
    """What is pruned in steps has one base, and each step a mask of its own."""
    base = dense()
    store.add("m", base, policy=LOSSLESS)
    for version, share in enumerate((0.3, 0.6, 0.9), start=2):
        model = pruned(base, "least", share)
        report = store.add("m", model, policy=LOSSLESS)
        assert report.delta_blocks == report.blocks
        assert same_bits(store, f"m@{version}", model)
    store.remove("m@1")
    store.vacuum()
    assert same_bits(store, "m@4", pruned(base, "least", 0.9))
    assert store.verify().ok


def test_answers_of_a_pruned_model(store: pydedup.Store) -> None:
    rng = np.random.default_rng(24)
    module = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    store.add("base", module, policy=LOSSLESS)
    weight = module[0].weight.detach().numpy()
    weight[:] = pruned({"0.weight": weight}, "random", 0.8)["0.weight"]
    assert store.add("m", module, policy=LOSSLESS).delta_blocks > 0
    x = rng.standard_normal((5, 256)).astype("f4")
    np.testing.assert_allclose(store.predict("m", x), x @ weight.T, rtol=0, atol=1e-5)


def test_strangers_with_zeros_share_nothing(store: pydedup.Store) -> None:
    base, model = dense(), {name: w[::-1, ::-1].copy() for name, w in dense().items()}
    report = added_beside(store, base, pruned(model, "random", 0.5), LOSSLESS, joint=False)
    assert report.delta_blocks == 0
    assert same_bits(store, "m", pruned(model, "random", 0.5))
