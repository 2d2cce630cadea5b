# SPDX-License-Identifier: Apache-2.0
"""What users' metrics and trainings do while a model is added, and what certificates then say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.errors import ConflictError

from .relatives import moved, same_bits, weights
from .test_promises import good


def test_an_evaluate_that_loads_into_the_model_that_is_added(store: pydedup.Store) -> None:
    torch = pytest.importorskip("torch")
    base = weights()
    store.add("base", {"weight": base}, policy=policies.Exact())
    module = torch.nn.Linear(64, 256, bias=False)
    original = moved(base)
    module.load_state_dict({"weight": torch.from_numpy(original.copy())})

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        module.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in arrays.items()})
        return 1.0

    report = store.add("m", module, policy=policies.Accuracy(evaluate, 0.1))
    stored = store.load("m")["weight"]
    error = np.linalg.norm(stored - original) / np.linalg.norm(original)
    assert report.certificate["replaced"] > 0
    assert report.certificate["largest_block_error"] >= 0.9 * error > 0
    store.add("m", {"weight": original}, policy=policies.Exact())
    assert same_bits(store, "m@2", {"weight": original})
    assert store.verify().errors == []


def test_a_source_that_finetuning_changed_is_noticed(store: pydedup.Store) -> None:
    base = weights()
    store.add("base", {"w": base}, policy=policies.Exact())
    source = {"w": moved(base), "free": np.zeros((8, 8), np.float32)}

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        source["free"] += 1
        return {**arrays, "free": arrays["free"] + 1}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return 1.0 + float(arrays["free"].sum())

    with pytest.raises(ConflictError, match=r"'free' of the source of m@1 changed"):
        store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    assert [info.name for info in store.models()] == ["base"]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(ml_dtypes.bfloat16, 0x7F81), (np.float32, 0x7F800001)]
)
def test_signalling_nans_are_searched_and_compared(
    store: pydedup.Store, dtype: Any, bits: int
) -> None:
    """Numpy warned of them."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        trained = arrays["w"].copy()
        trained[0, 1] = 0  # in the block that has one, which is not replaced
        return {"w": trained, "n": arrays["n"] + 1}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["n"].sum())

    weight = weights().astype(dtype)
    odd = moved(weights()).astype(dtype)
    odd.view(f"u{odd.itemsize}")[0, 0] = bits
    store.add("near", {"w": weight})
    policy = policies.Accuracy(evaluate, 0.1, finetune=finetune)
    report = store.add("m", {"w": odd, "n": np.zeros(2)}, policy=policy, block_shape=(64, 64))
    assert report.certificate["tensor_errors"]["w"] == 1.0  # of a NaN, which is no number away
    assert not store.diff("m", "near").same


@pytest.mark.parametrize("trained", [False, True])
def test_tied_tensors_have_the_same_error(store: pydedup.Store, trained: bool) -> None:
    def finetune(
        arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        more = np.where(masks["w"], arrays["w"], arrays["w"] + 1)
        return {"w": more}  # tied, too, which is the same array

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["w"][200:].mean())  # blocks that nothing is near to

    source = moved(weights())
    source[128:] = np.random.default_rng(7).standard_normal((128, 64))
    policy = policies.Accuracy(evaluate, 0.1, finetune=finetune if trained else None)
    store.add("near", {"w": weights()})
    tied = {"w": source, "tied": source}
    certificate = store.add("m", tied, policy=policy, block_shape=(64, 64)).certificate
    assert certificate["finetuned"] == trained
    errors = certificate["tensor_errors"]
    assert errors["w"] == errors["tied"] > (0.5 if trained else 0.005)


def test_what_is_refused_after_training_stays_as_it_was_trained(store: pydedup.Store) -> None:
    """It was refused before, too: what is put back is not what it was then."""
    near = weights()[:128]
    source = moved(near, 1e-4)
    trained = source.copy()
    trained[64:] += 1

    def finetune(
        arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        assert masks["w"][:64].all()  # shared
        return {"w": np.where(masks["w"], arrays["w"], trained)}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        block = arrays["w"][64:]
        return 2.0 * np.array_equal(block, trained[64:]) + np.array_equal(block, source[64:])

    store.add("near", {"w": near}, block_shape=(64, 64))
    policy = policies.Accuracy(evaluate, 0.5, finetune=finetune)
    report = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64))
    assert (report.certificate["refused"], report.certificate["metric_after"]) == (1, 2.0)
    loaded = store.load("m")
    assert np.array_equal(loaded["w"][:64], near[:64])
    assert np.array_equal(loaded["w"][64:], trained[64:])


def test_the_certificate_of_trained_zeros_is_json(store: pydedup.Store) -> None:
    """Biases begin as zeros, and what training made of them is infinitely far by their norm."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        return {**arrays, "bias": arrays["bias"] + 0.5}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["bias"].sum())

    source = {"w": weights(), "bias": np.zeros(2048, np.float32)}
    store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    certificate = store.info("m").certificate
    assert certificate["finetuned"]
    assert certificate["tensor_errors"] == {"bias": 1.0}
    json.dumps(dict(certificate), allow_nan=False)
    store.add("m", source, policy=policies.Bounded(0.9))
    assert not store.load("m")["bias"].any()


@pytest.mark.parametrize("dtype", ["i8", "u1", "?", "f2", "f8", ml_dtypes.float8_e4m3fn])
def test_whatever_training_changed_is_stored(store: pydedup.Store, dtype: Any) -> None:
    """Batch normalisation counts its batches in an integer."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        return {**arrays, "n": np.zeros_like(arrays["n"])}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return -float(arrays["n"].astype(np.float64).sum())

    source = {"w": weights(), "n": np.ones((3, 5), dtype)}
    store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    assert store.info("m").certificate["tensor_errors"] == {"n": 1.0}
    assert not store.load("m")["n"].any()
    store.add("m", source, policy=policies.Bounded(0.9))
    assert same_bits(store, "m", source)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_version_after_one_whose_squares_leave_the_range(
    store: pydedup.Store, scale: float
) -> None:
    base = weights().astype(np.float64)
    model = {"w": moved(weights(), 0.05).astype(np.float64) * scale}
    store.add("base", {"w": base * scale})
    lossy = store.add("m", model, policy=policies.Accuracy(lambda _: 1.0, 0.1))
    assert 0.04 < lossy.certificate["largest_block_error"] < 0.06
    store.add("m", model, policy=policies.Bounded(0.01))
    away = np.linalg.norm((store.load("m")["w"] - model["w"]) / scale)
    assert away <= 0.01 * np.linalg.norm(model["w"] / scale)


def test_a_source_that_changed_before_a_second_attempt_is_noticed(store: pydedup.Store) -> None:
    """Another writer removes what the add is compared with, so it reads its source once more."""
    base = weights()
    store.add("base", {"w": base}, policy=policies.Exact())
    source = {"w": moved(base)}
    attempts = 0

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        nonlocal attempts
        attempts += 1
        if attempts == 4:
            source["w"][:] = arrays["w"]
            store.remove("base")
            store.vacuum()
        return 1.0

    with pytest.raises(ConflictError, match=r"'w' of the source of m@1 changed"):
        store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, every=1))
    assert store.models() == []


def test_what_progress_raises_is_not_laid_to_evaluate(store: pydedup.Store) -> None:
    class StopNowError(Exception):
        pass

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "evaluating":
            raise StopNowError

    with pytest.raises(StopNowError):
        store.add("m", {"w": weights()}, policy=policies.Accuracy(good, 0.1), progress=progress)
    assert store.models() == []


def test_an_add_says_that_it_is_fine_tuned(store: pydedup.Store) -> None:
    """It said for hours that it was evaluated."""
    told: list[str] = []
    seen: list[str] = []

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        seen.append(told[-1])
        return arrays

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        assert told[-1] == "evaluating"
        return good(arrays)

    store.add("near", {"w": weights()})
    policy = policies.Accuracy(evaluate, 0.1, finetune=finetune)
    store.add("m", {"w": moved(weights())}, policy=policy, progress=lambda *at: told.append(at[0]))
    assert seen == ["fine-tuning"]


def test_verify_says_which_model_it_evaluates(store: pydedup.Store) -> None:
    """It said that pages were checked, all of them, for as long as that took."""
    for name in "ab":
        store.add(name, {"w": weights()}, policy=policies.Accuracy(good, 0.1))
    told: list[tuple[str, int, int]] = []
    seen: list[tuple[str, int, int]] = []

    def evaluate(arrays: Mapping[str, np.ndarray]) -> float:
        seen.append(told[-1])
        return good(arrays)

    metrics = dict.fromkeys(("a", "b@1"), evaluate)
    store.verify(evaluate=metrics, progress=lambda *state: told.append(state))
    assert seen == [("evaluating a", 0, 2), ("evaluating b@1", 1, 2)]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_metric_that_guards_nothing_is_warned_of(store: pydedup.Store, dry_run: bool) -> None:
    store.add("base", {"w": weights()})
    policy = policies.Accuracy(lambda _: 0.0, 0.01)
    with pytest.warns(UserWarning, match="^m@1: the metric guards nothing: it is 0 for the model"):
        store.add("m", {"w": moved(weights())}, policy=policy, dry_run=dry_run)
