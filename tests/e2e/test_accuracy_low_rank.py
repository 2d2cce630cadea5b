# SPDX-License-Identifier: Apache-2.0
"""The policy `Accuracy` and models with a merged low-rank adapter: what a metric leaves of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.hashing import hash_buffer
from pydedup.types import DType

from .relatives import Model, adapted, added_beside, dense, same_bits

Weights = Mapping[str, NDArray[Any]]
LOSSLESS = policies.Lossless()


def away(weights: NDArray[Any], from_: NDArray[Any]) -> float:
    one, other = weights.astype("f8"), from_.astype("f8")
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


class Tolerant:
    """1 if no tensor of a model is farther than that from what it was; knows what it has seen."""

    def __init__(self, model: Model, error: float) -> None:
        self._model = {name: weight.copy() for name, weight in model.items()}
        self._error = error
        self.seen: set[bytes] = set()

    def __call__(self, weights: Weights) -> float:
        self.seen.add(bits_of(weights))
        far = (away(weights[name], weight) for name, weight in self._model.items())
        return float(max(far) <= self._error)


def bits_of(weights: Weights) -> bytes:
    return b"".join(hash_buffer(weight.tobytes()) for _, weight in sorted(weights.items()))


def accuracy(evaluate: Tolerant, **more: Any) -> policies.Accuracy:
    return policies.Accuracy(evaluate, 0, **{"max_evaluations": 24, **more})


def stored_as(policy: policies.Policy, base: Model, model: Model) -> int:
    """Return the bytes of a model under a policy, in a store of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        pydedup.open(f"sqlite:///{folder}/store.db") as store,
    ):
        return added_beside(store, base, model, policy, joint=False, before=LOSSLESS).stored_bytes


def check_stored(store: pydedup.Store, evaluate: Tolerant) -> None:
    """Compare a model with what was evaluated, its promise, and its pages."""
    loaded = store.load("m")
    assert bits_of(loaded) in evaluate.seen
    assert evaluate(loaded) == store.info("m").certificate["metric_after"]
    assert store.verify(evaluate={"m": evaluate}).ok


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_tolerant_metric_leaves_little_more_than_the_factors(
    store: pydedup.Store, dtype: DType, share: float
) -> None:
    """They were dense deltas: of f32, 12 % of the model where `Bounded(0.001)` takes 1."""
    base = dense(dtype=dtype)
    model = adapted(base, 8, share=share)
    evaluate = Tolerant(model, 0.004)
    policy = accuracy(evaluate)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.delta_blocks > 0.9 * report.blocks
    assert report.stored_bytes <= 1.02 * stored_as(policies.Bounded(0.001), base, model)
    check_stored(store, evaluate)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_metric_that_tolerates_anything(store: pydedup.Store, dtype: DType, joint: bool) -> None:
    base = dense(dtype=dtype)
    model = adapted(base, 8, share=0.5)  # farther than what is shared
    evaluate = Tolerant(model, np.inf)
    report = added_beside(store, base, model, accuracy(evaluate), joint=joint)
    assert report.stored_bytes <= 1.01 * stored_as(policies.Bounded(0.001), base, model)
    assert report.certificate["replaced"] == report.blocks == report.delta_blocks
    assert 0 < report.certificate["largest_block_error"] <= 0.03
    check_stored(store, evaluate)


@pytest.mark.parametrize("share", [0.01, 4.0])  # that far, it is found by place alone
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_metric_that_tolerates_nothing_takes_what_lossless_does(
    store: pydedup.Store, dtype: DType, share: float
) -> None:
    base = dense(dtype=dtype)
    model = adapted(base, 8, share=share)
    evaluate = Tolerant(model, 0)
    policy = accuracy(evaluate)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.certificate["replaced"] == 0
    assert report.stored_bytes == stored_as(LOSSLESS, base, model)
    assert same_bits(store, "m", model)
    check_stored(store, evaluate)


@pytest.mark.parametrize("bound", [1e-5, 1e-4, 3e-4])
def test_no_delta_takes_the_place_of_a_smaller_one_that_keeps_the_bits(
    store: pydedup.Store, bound: float
) -> None:
    """Dense ones within a tight bound take three times as much of bf16."""
    base = dense(dtype=DType.BF16)
    model = adapted(base, 8)
    policy = accuracy(Tolerant(model, np.inf), max_rel_error=bound)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.stored_bytes <= 1.01 * stored_as(LOSSLESS, base, model)
    assert report.certificate["largest_block_error"] <= bound
    assert store.verify().ok


def test_blocks_that_stay_as_they_are_beside_others_have_their_factors(
    store: pydedup.Store,
) -> None:
    """What is replaced moves their matrix away from a low rank: they were dense deltas."""
    base = dense()
    model = adapted(base, 8)

    def evaluate(weights: Weights) -> float:
        """Count changed blocks of one colour of a chessboard."""
        total = 0
        for name, weight in model.items():
            for row, col in np.ndindex(8, 6):
                block = np.s_[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64]
                if (row + col) % 2:
                    total -= not np.array_equal(weights[name][block], weight[block])
        return float(total)

    policy = policies.Accuracy(evaluate, 0, max_rel_error=0.005, max_evaluations=500)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.certificate["replaced"] == report.blocks / 2
    assert report.delta_blocks == report.blocks
    lossless = stored_as(LOSSLESS, base, model)
    assert report.stored_bytes < lossless
    loaded = store.load("m")
    assert evaluate(loaded) == 0
    assert all(0 < away(loaded[name], weight) <= 0.005 for name, weight in model.items())
    assert store.verify(evaluate={"m": evaluate}).ok


def test_what_is_nearer_than_the_base_but_by_no_low_rank(store: pydedup.Store) -> None:
    """Deltas on it take more, and its blocks in memory are not those that factors move."""
    base = dense()
    model = adapted(base, 8, share=0.3)
    noise = np.random.default_rng(36)
    sibling = {
        name: weight + noise.normal(0, 2e-4, weight.shape).astype("f4")
        for name, weight in model.items()
    }
    store.add("base", base, policy=policies.Exact())
    store.add("sibling", sibling, policy=policies.Exact())
    evaluate = Tolerant(model, 0.002)
    report = store.add("m", model, policy=accuracy(evaluate, max_rel_error=0.005))
    assert report.stored_bytes <= 1.02 * stored_as(policies.Bounded(0.001), base, model)
    check_stored(store, evaluate)


def test_what_is_said_to_be_saved_is_about_what_is(store: pydedup.Store) -> None:
    """A page has the factors of its blocks once, or blocks would seem to save little."""
    base = dense(4)
    model = adapted(base, 32, share=0.1)
    policy = accuracy(Tolerant(model, 0.003), max_rel_error=0.001)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.certificate["replaced"] == report.blocks
    alone = stored_as(LOSSLESS, {"other": np.zeros((64, 64), np.float32)}, model)
    saved = alone - report.stored_bytes
    assert 0.97 * saved < report.certificate["saved"] < 1.03 * saved


def test_the_same_store_whoever_helps_and_as_the_dry_run_said(tmp_path: Path) -> None:
    base = dense()
    model = adapted(base, 8, share=0.1)
    checksums = []
    for number, workers in enumerate((1, 1, 3)):
        with pydedup.open(f"sqlite:///{tmp_path / str(number)}.db") as store:
            store.add("base", base)
            policy = accuracy(Tolerant(model, 0.0002), max_evaluations=12)
            planned = store.add("m", model, policy=policy, dry_run=True, workers=workers)
            report = store.add("m", model, policy=policy, workers=workers)
            assert (planned.stored_bytes, planned.pages) == (report.stored_bytes, report.pages)
            assert planned.certificate["levels"] == report.certificate["levels"]
            checksums.append([row.checksum for row in store._adapter.page_rows()])
    assert checksums[0] == checksums[1] == checksums[2]


def test_what_is_stored_outlives_its_base_and_a_vacuum(
    store: pydedup.Store, tmp_path: Path
) -> None:
    base = dense(4)
    models = {f"t{n}": adapted(base, 8, seed=50 + n, share=0.1) for n in range(3)}
    store.add("base", base)
    for name, model in models.items():
        store.add(name, model, policy=accuracy(Tolerant(model, 0.004)))
    before = {name: store.load(name) for name in models}
    store.remove("base")
    store.remove("t1")
    store.vacuum()
    assert store.verify().ok
    copy = f"sqlite:///{tmp_path / 'copy.db'}"
    store.copy_to(copy, ["t2"])
    with pydedup.open(copy) as other:
        assert other.verify().ok
        assert same_bits(other, "t2", before["t2"])
    assert same_bits(store, "t0", before["t0"])
    assert same_bits(store, "t2", before["t2"])


def test_versions_of_a_model(store: pydedup.Store) -> None:
    """Another adapter, then one of a tensor alone: what did not change is not stored again."""
    base = dense(4)
    store.add("m", base)
    one = adapted(base, 8, share=0.1)
    two = adapted(base, 4, seed=90, share=0.1)
    three = {**two, "l1.weight": adapted(two, 2, seed=91, share=0.1)["l1.weight"]}
    reports = []
    for model in (one, two, three):
        evaluate = Tolerant(model, 0.008)
        reports.append(store.add("m", model, policy=accuracy(evaluate)))
        check_stored(store, evaluate)
    assert reports[0].stored_bytes < 0.03 * reports[0].logical_bytes
    assert reports[1].stored_bytes < 0.03 * reports[1].logical_bytes
    assert reports[2].shared_blocks == reports[2].blocks * 3 / 4
    assert reports[2].stored_bytes < 0.5 * reports[1].stored_bytes


@pytest.mark.parametrize("unchanged", [512, 192])  # rows of each tensor
def test_a_version_whose_metric_takes_nothing_of_the_one_before(
    store: pydedup.Store, unchanged: int
) -> None:
    """What that one has of its unchanged blocks is refused: they are stored as they are."""
    base = dense()
    model = adapted(base, 8)
    store.add("base", base)
    store.add("m", model, policy=accuracy(Tolerant(model, 0.004)))
    for name, weight in adapted(base, 8, seed=92).items():
        model[name][unchanged:] = weight[unchanged:]
    report = store.add("m", model, policy=accuracy(Tolerant(model, 0)))
    assert same_bits(store, "m", model)
    assert store.verify().ok
    if unchanged == 512:
        assert report.stored_bytes < 1.05 * stored_as(LOSSLESS, base, model)


def test_tied_weights_stay_tied(store: pydedup.Store) -> None:
    base = dense(1)["l0.weight"]
    model = adapted({"w": base}, 8, share=0.1)["w"]
    store.add("base", {"w": base, "head": base})
    evaluate = Tolerant({"w": model, "head": model}, 0.004)
    report = store.add("m", {"w": model, "head": model}, policy=accuracy(evaluate))
    assert report.stored_bytes < 0.02 * report.logical_bytes
    check_stored(store, evaluate)
    errors = report.certificate["tensor_errors"]
    assert errors["w"] == errors["head"] > 0


def test_blocks_that_were_trained_further(store: pydedup.Store) -> None:
    """Those that the metric keeps are trained; the others keep their factors, and their bits."""
    base = dense(2)
    model = adapted(base, 8, share=0.1)
    frozen: list[Model] = []

    def evaluate(weights: Weights) -> float:
        w = weights["l1.weight"]
        return 1.0 + float(w[0, 0]) if away(w, model["l1.weight"]) < 0.05 else 0.0

    def finetune(weights: Weights, masks: Weights) -> Model:
        frozen.append({name: np.where(masks[name], w, 0) for name, w in weights.items()})
        frozen.append(dict(masks))
        return {name: np.where(masks[name], w, w * 1.0001) for name, w in weights.items()}

    policy = policies.Accuracy(evaluate, 1e-9, finetune=finetune)
    report = added_beside(store, base, model, policy, joint=False, before=LOSSLESS)
    assert report.certificate["metric_after"] == evaluate(store.load("m"))
    loaded = store.load("m")
    for name, mask in frozen[1].items():
        np.testing.assert_array_equal(np.where(mask, loaded[name], 0), frozen[0][name])
    assert store.verify(evaluate={"m": evaluate}).ok
