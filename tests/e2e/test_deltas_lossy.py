# SPDX-License-Identifier: Apache-2.0
"""Families of nearly equal models under policies that change bits: bounded and accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.errors import ArgumentError

from .relatives import Model, added_beside
from .test_deltas import base_model, fine_tuned, rel, same

# ---- bounded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 0.01, 0.001])
def test_bounded_keeps_every_block_within_its_error(store: pydedup.Store, bound: float) -> None:
    base = base_model()
    base["hidden"][:, 7] = 0.0
    store.add("base", base)
    variant = fine_tuned(base, 1, 0.02)
    variant["hidden"][:, 7] = 0.0
    report = store.add("variant", variant, policy=policies.Bounded(bound))
    assert report.stored_bytes < {0.1: 0.02, 0.01: 0.08, 0.001: 0.25}[bound] * report.logical_bytes
    loaded = store.load("variant")
    worst = 0.0
    for name, (rows, cols) in (("embedding", (600, 64)), ("hidden", (256, 320))):
        for top in range(0, rows, 64):
            for left in range(0, cols, 64):
                part = np.s_[top : top + 64, left : left + 64]
                worst = max(worst, rel(loaded[name][part], variant[name][part]))
    assert 0 < worst <= bound
    assert report.certificate["max_rel_error"] == bound
    assert worst == pytest.approx(report.certificate["largest_block_error"], rel=1e-3)
    if bound < 0.02:
        assert not loaded["hidden"][:, 7].any()
    assert loaded["bias"].tobytes() == variant["bias"].tobytes()
    assert store.verify().ok
    assert same(store.load("base"), base)


@pytest.mark.parametrize("joint", [False, True])
def test_all_small_tensors_of_a_relative_are_compared(store: pydedup.Store, joint: bool) -> None:
    """They are matched together; those behind the first 32 blocks had no candidate by their place.

    It is too far for the similarity index to find all of them.
    """
    rng = np.random.default_rng(5)
    base = {f"w{i}": rng.standard_normal((192, 256)).astype(np.float32) for i in range(8)}
    noise = {name: rng.standard_normal(w.shape).astype(np.float32) for name, w in base.items()}
    model = {name: w + np.float32(0.4) * noise[name] for name, w in base.items()}
    report = added_beside(store, base, model, policies.Bounded(0.03), joint=joint)
    assert report.delta_blocks == report.blocks == 96


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", [(192, 256), (512, 1024)])
@pytest.mark.parametrize("prefixes", [("", "bert."), ("bert.", ""), ("model.bert.", "encoder.")])
def test_a_relative_under_another_prefix_is_compared_by_position(
    store: pydedup.Store, joint: bool, shape: tuple[int, int], prefixes: tuple[str, str]
) -> None:
    """A head on top puts a prefix before all names; only the index was asked then."""
    rng = np.random.default_rng(6)
    layers = {f"layer.{i}.weight": rng.standard_normal(shape).astype("f4") for i in range(3)}
    base = {prefixes[0] + name: w for name, w in layers.items()}
    model = {
        prefixes[1] + name: w + 0.4 * rng.standard_normal(shape).astype("f4")
        for name, w in layers.items()
    }
    report = added_beside(store, base, model, policies.Bounded(0.03), joint=joint)
    assert report.delta_blocks == report.blocks


@pytest.mark.parametrize("joint", [False, True])
def test_a_tensor_that_a_relative_has_not_makes_it_no_stranger(
    store: pydedup.Store, joint: bool
) -> None:
    """The head met the only tensor of its shape, whose name ends alike, and no other was asked."""
    rng = np.random.default_rng(8)
    shapes = {"model.embed.weight": (768, 512), "model.layer.weight": (512, 512)}
    base = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    head = {"lm_head.weight": rng.standard_normal((768, 512)).astype("f4")}
    rest = {n: w + 0.4 * rng.standard_normal(w.shape).astype("f4") for n, w in base.items()}
    model = {**head, **rest}
    report = added_beside(store, base, model, policies.Bounded(0.03), joint=joint)
    assert report.delta_blocks == 160
    assert report.blocks == 256


def test_strangers_do_not_hide_a_relative_of_small_tensors(store: pydedup.Store) -> None:
    """Who was asked was settled for all that are matched together before anybody answered."""
    rng = np.random.default_rng(7)

    def drawn() -> Model:
        return {f"w{i}": rng.standard_normal((192, 256)).astype("f4") for i in range(20)}

    base = drawn()
    store.add("base", base)
    for number in range(3):
        store.add(f"stranger{number}", drawn())
    model = {k: w + 0.4 * rng.standard_normal(w.shape).astype("f4") for k, w in base.items()}
    report = store.add("m", model, policy=policies.Bounded(0.03))
    assert report.blocks == 240
    # The first 128 are looked at in one go, and meet strangers.
    assert report.delta_blocks >= 112


@pytest.mark.parametrize("bound", [0.03, 0.001])
def test_what_is_hardly_near_becomes_quantised_deltas(store: pydedup.Store, bound: float) -> None:
    """Only bases that make an exact delta pay were looked for, half as far away."""
    base = {"w": base_model()["hidden"]}
    store.add("base", base)
    model = fine_tuned(base, 1, 0.8)
    exact = store.add("exact", model, policy=policies.Lossless(), dry_run=True)
    assert exact.delta_blocks == 0
    report = store.add("m", model, policy=policies.Bounded(bound))
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < {0.03: 0.2, 0.001: 0.4}[bound] * report.logical_bytes
    assert bound / 2 < rel(store.load("m")["w"], model["w"]) <= bound
    others = {"w": base_model(7)["hidden"]}  # farther away than zeros are
    assert store.add("o", others, policy=policies.Bounded(bound)).delta_blocks == 0
    assert same(store.load("o"), others)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bounded_model_that_is_added_again_takes_no_more(
    store: pydedup.Store, renamed: bool, workers: int
) -> None:
    """Quantised deltas are found by what they hold, as all blocks are: each was stored again."""
    near, bounded = fine_tuned(base_model(), 1), policies.Bounded(0.001)
    again = {f"model.{name}": array for name, array in near.items()} if renamed else near
    store.add("base", base_model())
    assert store.add("x", near, policy=bounded).delta_blocks > 0
    other = fine_tuned(base_model(), 2)
    for name in ("y", "z"):
        models = {name: again, f"{name}-2": other}
        report, *_ = store.add_many(models, policy=bounded, workers=workers)
        assert (report.stored_bytes, report.shared_blocks) == (0, report.blocks)
    assert [note for note in store.verify().notes if "same block" in note] == []
    for kept, now in zip(store.load("x").values(), store.load("z").values(), strict=True):
        assert kept.tobytes() == now.tobytes()


def test_blocks_that_are_rounded_to_the_same_are_stored_once(store: pydedup.Store) -> None:
    """Those of small tensors are looked at together, and each of them knew nothing of the other."""
    rng = np.random.default_rng(21)
    base = rng.standard_normal((192, 256)).astype("f4")
    near = base + np.float32(0.1) * rng.standard_normal(base.shape).astype("f4")
    nearer = near.copy()
    nearer[::64, ::64] *= np.float32(1.00001)
    store.add("base", {"w": base})
    report = store.add("m", {"a": near, "b": nearer}, policy=policies.Bounded(0.01))
    assert report.delta_blocks == report.blocks == 24
    assert report.shared_blocks > 0
    for name, source in (("a", near), ("b", nearer)):
        assert rel(store.load("m")[name], source) <= 0.01
    verified = store.verify()
    assert verified.ok
    assert not verified.notes, "nothing is stored twice"


def test_what_a_bounded_model_holds_can_be_added_again(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    store.add("variant", fine_tuned(base, 1), policy=policies.Bounded(0.002))
    held = store.load("variant")
    report = store.add("copy", held)
    assert report.shared_blocks == report.blocks
    assert same(store.load("copy"), held)


@pytest.mark.parametrize("bound", [0, -1, 1, 1.5, float("nan"), "0.1", True, None])
def test_bad_bounds_are_refused(bound: Any) -> None:
    with pytest.raises(ArgumentError, match="max_rel_error"):
        policies.Bounded(bound)


# ---- accuracy ----------------------------------------------------------------------------------


def accuracy_of(model: Model, x: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    hidden = np.maximum(x @ model["hidden"].T + model["bias"], 0)
    return (np.argmax(hidden @ model["head"].T, axis=1) == labels).astype(np.float64)


def test_accuracy_shares_what_the_metric_allows(store: pydedup.Store) -> None:
    rng = np.random.default_rng(1)
    base = base_model()
    store.add("base", base)
    model = fine_tuned(base, 1, 0.1)
    x = rng.standard_normal((500, 320)).astype(np.float32)
    labels = np.argmax(np.maximum(x @ model["hidden"].T + model["bias"], 0) @ model["head"].T, 1)

    def evaluate(weights: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        return accuracy_of(dict(weights), x, labels)

    exact = store.add("plain", model, dry_run=True).stored_bytes
    before = {name: w.copy() for name, w in model.items()}
    report = store.add("m", model, policy=policies.Accuracy(evaluate, 0.02))
    assert all(np.array_equal(model[name], w) for name, w in before.items())
    assert report.stored_bytes < 0.5 * exact
    loaded = store.load("m")
    now = float(evaluate(loaded).mean())
    certificate = report.certificate
    assert certificate["policy"] == "accuracy"
    assert certificate["metric_before"] == 1.0
    assert now == certificate["metric_after"] >= 0.98
    assert 0 < certificate["shared"] <= certificate["replaced"]
    hidden = {t.tensor.name: t.largest_error for t in store.explain("m").tensors}["hidden"]
    assert 0.05 < hidden <= certificate["largest_block_error"] < 0.25
    assert json.loads(json.dumps(certificate)) == dict(store.info("m").certificate)
    assert store.verify().ok
    # Quantised deltas are content like any other: what is stored can be shared.
    assert store.add("copy", loaded).shared_blocks == report.blocks


def test_accuracy_replaces_by_nothing_beyond_max_rel_error(store: pydedup.Store) -> None:
    """Whatever the metric would allow: here all."""
    store.add("base", base_model())
    near, far = fine_tuned(base_model(), 1, 0.02), fine_tuned(base_model(), 2, 0.1)
    model = {**near, "hidden": far["hidden"]}
    policy = policies.Accuracy(lambda _: 1.0, 0.0, max_rel_error=0.05)
    report = store.add("m", model, policy=policy)
    loaded = store.load("m")
    assert 0.01 < rel(loaded["embedding"], model["embedding"]) < 0.025  # shared
    assert 0.025 < rel(loaded["hidden"], model["hidden"]) <= 0.03  # deltas
    assert 0.025 < report.certificate["largest_block_error"] <= 0.03


@pytest.mark.parametrize("bound", [0.0005, 0.002, 0.03])
@pytest.mark.parametrize("away", [0.3, 0.8])
def test_accuracy_makes_deltas_on_bases_beyond_max_rel_error(
    store: pydedup.Store, bound: float, away: float
) -> None:
    """No base was looked for that is farther than what may be shared, 0.25 by default."""
    base = {"w": base_model()["hidden"]}
    store.add("base", base)
    model = fine_tuned(base, 1, away)
    bounded = store.add("m", model, policy=policies.Bounded(bound), dry_run=True)
    policy = policies.Accuracy(lambda _: 1.0, 0.0, max_rel_error=bound)
    report = store.add("m", model, policy=policy)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes == pytest.approx(bounded.stored_bytes, rel=0.01)
    assert 0 < rel(store.load("m")["w"], model["w"]) <= bound


def test_accuracy_orders_blocks_by_magnitude_over_the_range_of_their_layer(
    store: pydedup.Store,
) -> None:
    rng = np.random.default_rng(3)
    rows = np.repeat(np.float32([[1], [3], [2], [4]]), 64, axis=0)
    one = np.clip(rng.standard_normal((256, 64)), -1, 1).astype(np.float32) * rows
    base = {"narrow": one[:128] * np.float32(0.01), "wide": one[128:] * np.float32(0.75)}
    store.add("base", base)
    model = {name: w * np.float32(1.1) for name, w in base.items()}
    order: list[tuple[str, int]] = []

    def evaluate(weights: Mapping[str, NDArray[Any]]) -> float:
        for name, w in base.items():
            for top in (0, 64):
                part = np.s_[top : top + 64]
                if (name, top) not in order and np.array_equal(weights[name][part], w[part]):
                    order.append((name, top))
        return 1.0

    store.add("m", model, policy=policies.Accuracy(evaluate, 0.0, search="step", every=1))
    assert order[:2] == [("narrow", 0), ("wide", 0)]
    assert len(order) == 4


def test_quantised_deltas_on_bases_that_are_too_far_for_lossless_ones(
    store: pydedup.Store,
) -> None:
    base = {"w": base_model()["hidden"]}
    store.add("base", base)
    model = fine_tuned(base, 1, 0.8)

    def evaluate(weights: Mapping[str, NDArray[Any]]) -> float:
        return -float(rel(weights["w"], model["w"]) > 0.05)

    report = store.add("m", model, policy=policies.Accuracy(evaluate, 0.5, max_rel_error=1.0))
    assert report.delta_blocks == report.blocks
    assert 0.01 < rel(store.load("m")["w"], model["w"]) <= 0.03
    assert store.verify().ok


def test_a_model_that_is_stored_already_needs_no_search(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    report = store.add("copy", base, policy=policies.Accuracy(lambda _: 1.0, 0.1))
    assert report.shared_blocks == report.blocks
    assert report.certificate["replaced"] == 0
    assert same(store.load("copy"), base)


def test_an_update_under_accuracy_keeps_what_was_replaced(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    model = fine_tuned(base, 1, 0.1)
    policy = policies.Accuracy(lambda _: 1.0, 0.1)
    first = store.add("m", model, policy=policy)
    newer = {**model, "head": model["head"] * 1.5}
    second = store.add("m", newer, policy=policy)
    assert second.stored_bytes < 0.2 * first.stored_bytes + 8192
    assert np.array_equal(store.load("m@2")["hidden"], store.load("m@1")["hidden"])
    assert store.verify().ok


def test_verify_evaluates_again(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    policy = policies.Accuracy(lambda w: float(np.abs(w["hidden"]).mean()), 0.01)
    store.add("m", fine_tuned(base, 1, 0.1), policy=policy)
    report = store.verify(evaluate={"m": policy.evaluate})
    assert report.ok
    assert any("as certified" in note for note in report.notes)
    worse = store.verify(evaluate={"m@1": lambda w: float(np.abs(w["hidden"]).mean()) - 0.5})
    assert not worse.ok
    assert worse.errors == []  # nothing is damaged
    (broken,) = worse.broken_promises
    assert "m@1" in broken
    assert "was promised" in broken
    with pytest.raises(ArgumentError, match="lossless"):
        store.verify(evaluate={"base": lambda _: 1.0})


def test_no_drop_allowed_stores_the_bits_or_no_worse(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    model = fine_tuned(base, 1, 0.1)

    def identical(weights: Mapping[str, NDArray[Any]]) -> float:
        return float(all(np.array_equal(weights[name], w) for name, w in model.items()))

    report = store.add("m", model, policy=policies.Accuracy(identical, 0.0))
    assert report.certificate["replaced"] == 0
    assert same(store.load("m"), model)


def test_fine_tuning_costs_no_delta(store: pydedup.Store) -> None:
    base = {"w": base_model()["embedding"]}
    store.add("base", base)
    model, half = fine_tuned(base, 1, 0.1), 256
    model["w"][half:] = base_model(7)["embedding"][half:]  # near to nothing: free to be trained

    def evaluate(weights: Mapping[str, NDArray[Any]]) -> float:
        w = weights["w"]
        return float(1 - rel(w[:half], model["w"][:half]) + 0.1 * w[half:].mean())

    def train(
        weights: Mapping[str, NDArray[Any]], frozen: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        return {"w": np.where(frozen["w"], weights["w"], weights["w"] + np.float32(0.01))}

    plain, tuned = (
        store.add(
            "m", model, policy=policies.Accuracy(evaluate, 0.04, finetune=finetune), dry_run=dry
        )
        for finetune, dry in ((None, True), (train, False))
    )
    assert tuned.certificate["finetuned"]
    assert tuned.delta_blocks > 0
    assert tuned.stored_bytes < 1.02 * plain.stored_bytes
    assert evaluate(store.load("m")) == tuned.certificate["metric_after"]
    assert store.verify().ok


def test_an_evaluate_that_fails_leaves_the_store_as_it_was(store: pydedup.Store) -> None:
    from pydedup.errors import EvaluationError

    base = base_model()
    store.add("base", base)

    def broken(_: Mapping[str, NDArray[Any]]) -> float:
        raise RuntimeError("no such data set")

    with pytest.raises(EvaluationError, match="no such data set"):
        store.add("m", fine_tuned(base, 1), policy=policies.Accuracy(broken, 0.1))
    with pytest.raises(EvaluationError, match=r"NaN|finite"):
        store.add("m", fine_tuned(base, 1), policy=policies.Accuracy(lambda _: np.nan, 0.1))
    assert [m.name for m in store.models()] == ["base"]
    assert store.verify().ok
