# SPDX-License-Identifier: Apache-2.0
"""Relatives most of whose weights are the same, and the others far away or without a distance."""

from __future__ import annotations

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.types import DType

from .relatives import Model, added_beside, dense, same_bits, share_of

LOSSLESS = policies.Lossless()
# Every model is good enough for it.
ACCURACY = policies.Accuracy(lambda weights: 1.0, 0)
POLICIES = [LOSSLESS, policies.Bounded(0.001), ACCURACY]


def in_part(how: str) -> tuple[Model, Model]:
    """Return a model and one of which a twentieth of the weights became something else."""
    base, model = dense(), dense()
    rng = np.random.default_rng(61)
    for name, weight in model.items():
        chosen = rng.random(weight.shape) < 0.05
        if how == "filled":  # as those of a table whose other rows wait for their first example
            empty = rng.random(len(weight)) < 0.95
            later = empty & (rng.random(len(weight)) < 0.05)
            weight[empty & ~later] = 0
            base[name][empty] = 0
        elif how == "outliers":
            weight[:, chosen[0]] *= 100
        elif how == "infinite in both":
            hidden = rng.random(weight.shape) < 0.2
            base[name][hidden] = weight[hidden] = -np.inf
            weight[chosen] *= 2
        else:
            weight[chosen] = {"nan": np.nan, "infinite": np.inf}[how]
    return base, model


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("how", ["filled", "outliers", "infinite", "infinite in both", "nan"])
def test_what_stayed_takes_next_to_nothing(
    store: pydedup.Store, how: str, policy: policies.Policy, joint: bool
) -> None:
    """They were kept whole: so far from their bases, a delta does not pay where all has changed."""
    base, model = in_part(how)
    report = added_beside(store, base, model, policy, joint=joint, before=LOSSLESS)
    assert share_of(report) < 0.1
    if policy is LOSSLESS or how in {"infinite", "infinite in both", "nan"}:
        assert same_bits(store, "m", model)
    elif policy.name == "bounded":
        for name, got in store.load("m").items():
            apart = np.linalg.norm(got - model[name]) / np.linalg.norm(model[name])
            assert apart <= policy.max_rel_error
    assert store.verify().ok


def test_what_was_pruned_within_a_metric(store: pydedup.Store) -> None:
    """A tenth of the weights is left, as after a mask: far from its base, which was forgotten."""
    base = dense()
    rng = np.random.default_rng(62)
    model = {name: weight * (rng.random(weight.shape) < 0.1) for name, weight in base.items()}
    report = added_beside(store, base, model, ACCURACY, joint=False)
    assert share_of(report) < 0.04
    assert store.verify().ok


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_a_bound_that_saves_nothing_costs_no_bits(store: pydedup.Store, dtype: DType) -> None:
    """Quantised differences have more values than steps of a narrow float, and took more."""
    base = dense(dtype=dtype)
    rng = np.random.default_rng(63)
    model = {name: weight.copy() for name, weight in base.items()}
    for weight in model.values():
        weight.view("u2")[rng.random(weight.shape) < 0.3] ^= 1
    store.add("base", base)
    exact = store.add("m", model, dry_run=True)
    report = store.add("m", model, policy=policies.Bounded(1e-5))
    assert share_of(report) <= share_of(exact) < 0.1
    assert same_bits(store, "m", model)
