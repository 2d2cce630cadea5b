# SPDX-License-Identifier: Apache-2.0
"""Relatives whose tensors have other names or numbers, too far for the index to find all blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies

from .relatives import added_beside

LOSSLESS = policies.Lossless()
SHAPES = [(512, 1024), (192, 160), (192, 256), (512, 1024)]


def layers(dtype: Any = np.float32) -> list[NDArray[Any]]:
    rng = np.random.default_rng(11)
    found = [rng.standard_normal(shape) for shape in SHAPES]
    if np.dtype(dtype).kind == "i":
        found = [np.rint(30 * w) for w in found]
    return [w.astype(dtype) for w in found]


def moved(weights: list[NDArray[Any]], share: float) -> list[NDArray[Any]]:
    """Each moved by a share of its spread."""
    rng = np.random.default_rng(12)
    others = [w + share * w.std() * rng.standard_normal(w.shape) for w in weights]
    is_whole = weights[0].dtype.kind == "i"
    return [
        (np.rint(o) if is_whole else o).astype(w.dtype)
        for o, w in zip(others, weights, strict=True)
    ]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.01)])
def test_a_relative_whose_tensors_have_other_names(
    store: pydedup.Store, policy: policies.Policy, joint: bool
) -> None:
    """Another framework names all of them otherwise; a third of the blocks was found."""
    weights = layers()
    base = {f"model.layers.{i}.up_proj.weight": w for i, w in enumerate(weights)}
    model = {f"h_{i}/kernel": w for i, w in enumerate(moved(weights, 0.2))}
    report = added_beside(store, base, model, policy, joint=joint, before=LOSSLESS)
    assert report.delta_blocks == report.blocks
    for name, got in store.load("m").items():
        apart = np.linalg.norm(got - model[name]) / np.linalg.norm(model[name])
        assert apart <= policy.max_rel_error
    assert store.verify().ok


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_relative_that_lost_a_layer(store: pydedup.Store, dtype: Any, joint: bool) -> None:
    """Those behind it have the names of the layers before them."""
    weights = [*layers(dtype)[:1], *layers(dtype)]
    weights[0] = weights[0][::-1].copy()
    base = {f"layers.{i}.weight": w for i, w in enumerate(weights)}
    model = {f"layers.{i}.weight": w for i, w in enumerate(moved(weights, 0.2)[1:])}
    report = added_beside(store, base, model, LOSSLESS, joint=joint, before=LOSSLESS)
    assert report.delta_blocks == report.blocks
    loaded = store.load("m")
    assert all(loaded[name].tobytes() == w.tobytes() for name, w in model.items())
    assert store.verify().ok


def test_under_accuracy_what_lies_beside_is_shared(store: pydedup.Store) -> None:
    weights = layers()[:1]
    store.add("base", {"layers.0.weight": weights[0]})
    model = {"h_0/kernel": moved(weights, 0.2)[0]}
    report = store.add("m", model, policy=policies.Accuracy(lambda _: 1.0, 0.1))
    assert report.shared_blocks == report.blocks


def test_what_lies_beside_a_relative_may_be_of_another_model(store: pydedup.Store) -> None:
    """Only the middle of a tensor is near to one that is stored; the rest is stored by itself."""
    rng = np.random.default_rng(13)
    base = {"a": rng.standard_normal((64, 192)).astype("f4")}
    base |= {"b": rng.standard_normal((64, 128)).astype("f4")}
    store.add("base", base)
    middle = base["b"] + np.float32(0.01) * rng.standard_normal((64, 128)).astype("f4")
    sides = rng.standard_normal((64, 256)).astype("f4")
    model = {"w": np.concatenate([sides[:, :128], middle, sides[:, 128:]], axis=1)}
    report = store.add("m", model)
    assert report.delta_blocks == 2
    assert store.load("m")["w"].tobytes() == model["w"].tobytes()
