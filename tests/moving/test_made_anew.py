# SPDX-License-Identifier: Apache-2.0
"""Deltas whose base the destination has as a delta: encoded anew, as an add of them would be.

And those whose base it lacks, while it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.types import DType

New = Callable[[str], str]
Model = dict[str, np.ndarray]


def adapted(model: Model, seed: int) -> Model:
    """Return weights with a merged adapter of rank 8."""
    rng = np.random.default_rng(seed)
    return {
        name: weight
        + (rng.normal(size=(len(weight), 8)) @ rng.normal(size=(8, weight.shape[1])) * 7e-5).astype(
            weight.dtype
        )
        for name, weight in model.items()
    }


def moved(model: Model) -> Model:
    """Return weights that all moved by a hundredth of their spread, as a fine-tune leaves them."""
    rng = np.random.default_rng(9)
    return {
        name: (weight + rng.normal(0, 2e-4, weight.shape)).astype(weight.dtype)
        for name, weight in model.items()
    }


@pytest.mark.parametrize("tuned", ["adapter", "all"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_adapters_on_a_base_that_is_a_delta_there_take_what_an_add_takes(
    new_store: New, assert_same: Callable[..., None], dtype: DType, tuned: str
) -> None:
    """They were deltas without factors, and no base of others: seven times what an add took."""
    rng = np.random.default_rng(8)
    root = {
        f"l{n}.weight": rng.normal(0, 0.02, (512, 400)).astype("f4").astype(dtype.numpy)
        for n in range(2)
    }
    tune = adapted(root, 1) if tuned == "adapter" else moved(root)
    tenants = {f"tenant{n}": adapted(tune, 10 + n) for n in range(4)}
    source_url, url, other_url = (new_store("sqlite") for _ in range(3))
    for place in (url, other_url):
        with pydedup.open(place) as store:
            store.add("root@1", root)
            assert store.add("tune@1", tune).delta_blocks
    with pydedup.open(other_url) as store:
        added = sum(store.add(f"{name}@1", model).stored_bytes for name, model in tenants.items())
    with pydedup.open(source_url) as store:
        store.add("tune@1", tune)
        for name, model in tenants.items():
            store.add(f"{name}@1", model)
        report = store.copy_to(url, list(tenants))
    assert sum(model.stored_bytes for model in report.models) < 1.02 * added
    assert_same(source_url, url, names={f"{name}@1" for name in tenants})


def test_tensors_of_other_names_within_a_bound(
    new_store: New, assert_same: Callable[..., None]
) -> None:
    """What their base is a delta on is known, whatever models are called whose blocks that has."""
    rng = np.random.default_rng(8)
    root: dict[str, Any] = {"w": rng.normal(0, 0.02, (500, 300)).astype("f4")}
    tune = adapted(root, 1)
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(url) as store:
        store.add("root@1", root)
        store.add("tune@1", tune)
    with pydedup.open(source_url) as store:
        store.add("tune@1", {"other.weight": tune["w"]})
        mine = {"other.weight": adapted(tune, 2)["w"]}
        store.add("mine@1", mine, policy=policies.Bounded(0.01))
        (copied,) = store.copy_to(url, ["mine"]).models
    assert copied.delta_blocks == copied.blocks
    assert copied.stored_bytes < 0.3 * copied.logical_bytes
    assert_same(source_url, url, names={"mine@1"})


def test_a_base_that_one_model_did_not_need_there_comes_with_the_next(
    new_store: New, assert_same: Callable[..., None]
) -> None:
    """It was taken to have come with the first, whose deltas were there under another name."""
    rng = np.random.default_rng(8)
    base = {"w": rng.normal(0, 0.02, (512, 300)).astype("f4")}
    models = {name: adapted(base, seed) for name, seed in (("first", 1), ("second", 2))}
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(url) as store:
        store.add("other@1", models["first"])
    with pydedup.open(source_url) as store:
        store.add("base@1", base)
        for name, model in models.items():
            assert store.add(f"{name}@1", model).delta_blocks
        first, second = store.copy_to(url, list(models)).models
    assert first.stored_bytes == 0 < second.delta_blocks
    assert_same(source_url, url, names={"first@1", "second@1"})
