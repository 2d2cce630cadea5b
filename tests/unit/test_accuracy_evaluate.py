# SPDX-License-Identifier: Apache-2.0
"""What users' callables may do wrong, and the policy's own arguments."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.certificates import describe, guards_nothing
from pydedup.errors import ArgumentError, EvaluationError, PydedupError, UnavailableError
from pydedup.ingest import trial
from pydedup.ingest.accuracy import Choice, Replacement, choose
from pydedup.policies import Bounded

Arrays = Mapping[str, NDArray[Any]]


def model(n: int = 4) -> tuple[dict[str, NDArray[Any]], list[Replacement]]:
    weights: dict[str, NDArray[Any]] = {
        "w": np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        "b": np.zeros(3, np.float32),
    }
    replacements = [
        Replacement(
            "w",
            slice(i, i + 1),
            slice(0, 2),
            (lambda: np.full((1, 2), -1, np.float32),),
            (8,),
            float(i),
            8 * n,
        )
        for i in range(n)
    ]
    return weights, replacements


def run(evaluate: Callable[[Arrays], Any], max_drop: float = 0.1, **options: Any) -> Choice:
    return choose(*model(), Accuracy(evaluate, max_drop, **options))


def after(calls: int, value: Any, usual: Any = 0.5) -> Callable[[Arrays], Any]:
    """An evaluate that returns, or raises, something else from its so-many-th call on."""
    counter = itertools.count()

    def evaluate(_: Arrays) -> Any:
        if next(counter) < calls:
            return usual
        if isinstance(value, BaseException):
            raise value
        return value

    return evaluate


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_what_evaluate_raises_is_the_cause(calls: int) -> None:
    mistake = KeyError("labels")
    with pytest.raises(EvaluationError, match="evaluate raised KeyError: 'labels'") as caught:
        run(after(calls, mistake), every=1)
    assert caught.value.__cause__ is mistake
    assert isinstance(caught.value, PydedupError)


def test_an_error_of_the_store_within_evaluate_arrives_as_it_is() -> None:
    """Such as of a model of it that evaluate loads."""
    mistake = UnavailableError("the server is gone")
    with pytest.raises(UnavailableError) as caught:
        run(after(2, mistake))
    assert caught.value is mistake


def test_an_interrupt_is_no_mistake_of_evaluate() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(after(2, KeyboardInterrupt()))


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "returned nan; scores must be finite"),
        (-np.inf, "returned -inf"),
        (None, "NoneType, which is neither a number nor an array of numbers; it must return"),
        ("0.9", "neither a number"),
        (0.5 + 0.5j, "neither a number"),
        (np.zeros((2, 2)), r"shape \(2, 2\)"),
        ([], r"shape \(0,\)"),
        ([0.5, [0.5, 1.0]], "list, which is neither a number"),
        ([0.1, np.nan, 0.2], "nan for example 1"),
        (np.ma.masked, "masked scores"),
        (np.ma.array([0.1, 0.2], mask=[False, True]), "masked scores"),
        (np.full(4, 1.7e308), "too large to have a mean"),
    ],
)
def test_what_is_no_metric(calls: int, value: Any, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        run(after(calls, value))


@pytest.mark.parametrize(
    ("usual", "value"), [([1.0, 0.0], [1.0]), (0.5, [0.5]), ([0.5], 0.5), ([1, 0], [1, 0, 1])]
)
def test_scores_keep_their_number(usual: Any, value: Any) -> None:
    with pytest.raises(EvaluationError, match="the first time; it must score the same"):
        run(after(2, value, usual))


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.array(2), True, [True, False], [3, 4]])
def test_numbers_and_flags_of_any_kind_are_metrics(value: Any) -> None:
    assert run(after(0, value)).certificate["replaced"] == 4


def test_an_evaluate_with_chance_in_it_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(EvaluationError, match=r"for the same weights.*training mode.*determin"):
        run(lambda _: 0.5 + rng.normal() * 1e-9)
    with pytest.raises(EvaluationError, match="for the same weights"):
        run(lambda _: rng.permutation([0.0, 1.0, 1.0, 0.0, 1.0]))  # the same mean


def test_chance_that_is_allowed_for_counts_as_drop() -> None:
    answers = iter([0.50, 0.52])

    def evaluate(weights: Arrays) -> float:
        return next(answers, 0.51 - 0.01 * float((weights["w"] == -1).all(1).sum()))

    choice = run(evaluate, 0.035, every=1, deterministic=False)
    assert choice.certificate["noise"] == pytest.approx(0.02)
    assert choice.certificate["metric_before"] == pytest.approx(0.51)
    assert choice.certificate["replaced"] == 1  # a drop of 0.01, plus 0.02
    assert any("varied" in line for line in describe(choice.certificate))


def test_chance_in_scores_counts_as_much_as_their_mean_may_move() -> None:
    calls = iter(range(100))

    def evaluate(_: Arrays) -> NDArray[np.float64]:
        scores = np.ones(100)
        scores[next(calls) % 100] = 0  # each time another example is got wrong
        return scores

    choice = run(evaluate, 0.03, deterministic=False)
    assert choice.certificate["noise"] == pytest.approx(0.02)
    assert choice.certificate["replaced"] == 4


def test_weights_are_read_only() -> None:
    def evaluate(weights: Arrays) -> float:
        weights["w"][0, 0] = 5
        return 0.5

    with pytest.raises(EvaluationError, match="read-only"):
        run(evaluate)


def test_weights_that_were_changed_all_the_same_are_noticed() -> None:
    def evaluate(weights: Arrays) -> float:
        weights["w"].base[0] += 1  # type: ignore[index]
        return 0.5

    with pytest.raises(EvaluationError, match=r"changed the tensor 'w'.*copy"):
        run(evaluate)


def test_one_row_is_enough_without_confidence() -> None:
    choice = run(lambda weights: [float(weights["w"].sum() > -5)], 0.5, every=1)
    assert choice.certificate["rows"]["all"] == 1
    assert 0 < choice.certificate["replaced"] < 4


def test_rounding_of_the_metric_is_no_drop() -> None:
    assert 0.885 - 0.875 > 0.01
    assert run(after(2, 0.875, 0.885), 0.01).certificate["replaced"] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": -0.1}, "max_drop must be 0 or more"),
        ({"max_drop": float("nan")}, "finite"),
        ({"max_drop": "much"}, "must be a number"),
        ({"max_drop": "0.1"}, "must be a number"),
        ({"max_drop": True}, "must be a number"),
        ({"max_rel_error": "0.1"}, "must be a number"),
        ({"confidence": "0.95"}, "must be a number"),
        ({"score_range": ("0", "1")}, "lowest, highest"),
        ({"confidence": 0.95, "deterministic": False}, "same scores for the same weights"),
        ({"evaluate": 3}, "evaluate must be callable"),
        ({"finetune": 3}, "finetune must be callable"),
        ({"order": "size"}, "one of: magnitude, saliency"),
        ({"search": "random"}, "one of: step, bisect, halving"),
        ({"order": "saliency"}, "go together"),
        ({"saliency": {}}, "go together"),
        ({"every": 0}, "every must be an integer from 1"),
        ({"every": 1.5}, "must be an integer"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": None}, "seed must be an integer, not None"),
        ({"max_evaluations": 2}, "an integer from 3"),
        ({"max_evaluations": None}, "max_evaluations must be an integer, not None"),
        ({"deterministic": "no"}, "deterministic must be True or False, not 'no'"),
        ({"max_rel_error": -1}, "max_rel_error must be 0 or more"),
        ({"confidence": 95}, "between 0 and 1"),
        ({"confidence": 0.95, "max_drop": 0}, "does not fall at all"),
        ({"score_range": (1, 0)}, "lowest, highest"),
        ({"score_range": 7}, "lowest, highest"),
    ],
)
def test_arguments_of_the_policy(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Accuracy(**{"evaluate": len, "max_drop": 0.1, **options})


def test_numbers_of_any_kind_are_arguments() -> None:
    policy = Accuracy(
        len,  # type: ignore[arg-type]
        Decimal("0.1"),  # type: ignore[arg-type]
        confidence=np.float32(0.5),  # type: ignore[arg-type]
        every=np.int64(3),
        deterministic=np.True_,  # type: ignore[arg-type]
        score_range=(Fraction(0), np.float16(2)),  # type: ignore[arg-type]
    )
    parameters = policy.parameters()
    assert json.loads(json.dumps(parameters)) == parameters
    assert (parameters["max_drop"], parameters["every"]) == (0.1, 3)
    assert (parameters["confidence"], parameters["score_range"]) == (0.5, [0.0, 2.0])
    assert Bounded(np.float32(0.5)).parameters() == {"max_rel_error": 0.5}  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_rel_error must be a number"):
        Bounded("0.5")  # type: ignore[arg-type]


def test_the_policy_says_what_it_is() -> None:
    policy = Accuracy(len, 0.01, confidence=0.9)  # type: ignore[arg-type]
    assert (policy.name, policy.compresses, policy.uses_deltas) == ("accuracy", True, True)
    assert policy.parameters()["confidence"] == 0.9


# ---- fine-tuning --------------------------------------------------------------------------------


def closeness(weights: Arrays) -> float:
    """A metric that shared rows make worse, and that free elements of b can make better."""
    shared = float((weights["w"] == -1).all(1).sum())
    return 1 - 0.1 * max(0.0, shared - float(weights["b"].sum()))


def test_finetuning_makes_room_for_what_was_refused() -> None:
    seen: list[tuple[Arrays, Arrays]] = []

    def finetune(weights: Arrays, frozen: Arrays) -> Arrays:
        seen.append((dict(weights), dict(frozen)))
        assert not weights["w"].flags.writeable
        return {**weights, "b": np.ones(3, np.float32)}

    weights, replacements = model()
    shared = {"b": [(slice(0, 1), slice(0, 0))], "w": [(slice(3, 4), slice(0, 1))]}
    choice = choose(
        weights,
        replacements[:3],
        Accuracy(closeness, 0.1, every=1, finetune=finetune),
        shared=shared,
    )
    assert len(seen) == 1
    # One block could be shared before: frozen are it, and the one that was stored already.
    assert seen[0][1]["w"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]
    assert not seen[0][1]["b"].any()
    assert choice.levels.tolist() == [0, 0, 0]
    assert choice.finetuned == {"b"}
    assert choice.certificate["finetuned"]
    assert weights["b"].tolist() == [1, 1, 1]
    assert any("trained" in line for line in describe(choice.certificate))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_finetuning_that_does_not_help_is_dropped(value: float) -> None:
    weights, replacements = model()

    def finetune(arrays: Arrays, _: Arrays) -> Arrays:
        changed = arrays["w"].copy()
        changed[3] += 1
        return {"w": changed, "b": np.full(3, value, np.float32)}

    choice = choose(weights, replacements, Accuracy(closeness, 0.1, every=1, finetune=finetune))
    assert not choice.finetuned
    assert not choice.certificate["finetuned"]
    assert weights["b"].tolist() == [0, 0, 0]
    assert weights["w"].tolist() == [[-1, -1], [2, 3], [4, 5], [6, 7]]


def test_a_block_refused_after_finetuning_keeps_what_it_was_trained_to() -> None:
    weights, replacements = model()

    def finetune(arrays: Arrays, frozen: Arrays) -> Arrays:
        return {
            "w": np.where(frozen["w"], arrays["w"], np.float32(9)),
            "b": np.array([1, 0, 0], np.float32),
        }

    choice = choose(weights, replacements, Accuracy(closeness, 0.1, every=1, finetune=finetune))
    assert choice.levels.tolist() == [0, 0, -1, -1]
    assert weights["w"].tolist() == [[-1, -1], [-1, -1], [9, 9], [9, 9]]
    assert choice.finetuned == {"w", "b"}


def test_frozen_elements_are_compared_by_their_bits() -> None:
    weights, replacements = model()
    weights["w"][0] = [np.nan, 0]
    where = {"w": [(slice(0, 1), slice(0, 2))]}

    def tuned(change: Callable[[NDArray[Any]], None]) -> Choice:
        def finetune(arrays: Arrays, _: Arrays) -> Arrays:
            array = arrays["w"].copy()
            change(array)
            return {"w": array, "b": np.ones(3, np.float32)}

        policy = Accuracy(closeness, 0.1, every=1, finetune=finetune)
        copies = {name: array.copy() for name, array in weights.items()}
        return choose(copies, replacements[1:], policy, shared=where)

    assert tuned(lambda array: None).finetuned == {"b"}  # NaN is what it was
    with pytest.raises(EvaluationError, match="changed 1 frozen"):
        tuned(lambda array: array.__setitem__((0, 1), -0.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {"w": w["w"] + 1}, "changed 2 frozen elements of 'w'"),
        (lambda w: {"w": np.where(w["w"] == -1, np.nan, w["w"]).astype("f4")}, "frozen"),
        (lambda w: {"w": w["w"].astype(np.float64)}, "float64"),
        (lambda w: {"w": w["w"][:2]}, r"\(2, 2\) for 'w'"),
        (lambda w: {"w": w["w"].reshape(2, 4)}, r"\(2, 4\) for 'w'"),
        (lambda w: {"other": w["w"]}, "'other', which the model does not have"),
        (lambda w: {3: w["w"], "other": w["w"]}, "'other', which the model does not have"),
        (lambda w: {"w": [[1.0], [2.0, 3.0]]}, "for 'w' does not make an array"),
        (lambda w: {"w": np.ma.masked_equal(w["w"], -1)}, "for 'w' has masked elements"),
        (
            lambda w: {"w": torch.ones(4, 2, requires_grad=True)},
            "for 'w' does not make an array: .* requires grad",
        ),
        (lambda w: {"w": torch.ones(4, 2).bfloat16()}, "not make an array: .* BFloat16"),
        (lambda w: None, "NoneType"),
        (lambda w: 1 / 0, "finetune raised ZeroDivisionError"),
    ],
)
def test_what_finetuning_may_not_do(change: Callable[[Arrays], Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        run(closeness, finetune=lambda weights, _: change(weights), every=1)


def test_saliency_that_raises_is_said_so() -> None:
    with pytest.raises(EvaluationError, match="saliency raised ZeroDivisionError"):
        run(closeness, order="saliency", saliency=lambda _: 1 / 0)


@pytest.mark.parametrize(
    ("saliency", "said"),
    [
        (5, "saliency is int, not arrays by name"),
        (lambda _: None, "saliency is NoneType, not arrays by name"),
        ({"w": np.full((4, 2), "x")}, "saliency of 'w' is <U1, not numbers"),
        ({"w": np.full((4, 2), 1j)}, "saliency of 'w' is complex128, not numbers"),
        ({"w": [[1.0], [2.0, 3.0]]}, "saliency of 'w' does not make an array"),
        ({"w": torch.ones(4, 2, requires_grad=True)}, "saliency of 'w' .* requires grad"),
        (lambda _: {"w": torch.ones(4, 2).bfloat16()}, "saliency of 'w' .* BFloat16"),
    ],
)
def test_what_is_no_saliency(saliency: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        run(closeness, order="saliency", saliency=saliency)


# ---- tied weights -------------------------------------------------------------------------------


def test_tied_weights_are_one_array_under_two_names() -> None:
    weights, replacements = model()
    weights["again"] = weights["w"]

    def finetune(arrays: Arrays, frozen: Arrays) -> Arrays:
        assert frozen["again"].tolist() == frozen["w"].tolist()
        assert frozen["again"].any()
        free = np.where(frozen["w"], arrays["w"], np.float32(9))
        return {"w": free, "again": free, "b": np.ones(3, np.float32)}

    choice = choose(weights, replacements, Accuracy(closeness, 0.1, every=1, finetune=finetune))
    assert choice.finetuned == {"w", "again", "b"}
    assert np.array_equal(weights["again"], weights["w"])

    def parting(arrays: Arrays, _: Arrays) -> Arrays:
        return {"w": arrays["w"], "again": -arrays["w"]}

    with pytest.raises(EvaluationError, match="'again' and 'w' differ, which are tied"):
        choose(weights, replacements, Accuracy(closeness, 0.1, every=1, finetune=parting))


def norm(weights: Arrays) -> float:
    return float(np.linalg.norm(weights["w"]))


@pytest.mark.parametrize(
    ("evaluate", "max_drop", "expected"),
    [
        (lambda _: 0.0, 0.0, (0.0, 0.0)),  # labels of other data
        (lambda _: [0.7, 0.9], 0.01, (0.8, 0.8)),  # a module that nobody gave the weights
        (lambda w: 0.1 * (norm(w) == 0), 0.5, (0.0, 0.1)),
        (lambda w: 0.51 if norm(w) else 0.5, 0.01, (0.51, 0.5)),
    ],
)
def test_a_metric_that_zeros_meet_too_guards_nothing(
    evaluate: Callable[[Arrays], Any], max_drop: float, expected: tuple[float, float]
) -> None:
    choice = run(evaluate, max_drop)
    assert choice.certificate["replaced"] == 4
    why = guards_nothing(choice.certificate)
    assert why is not None
    assert why in describe({**choice.certificate, "tensor_errors": {}})
    assert f"is {expected[0]:g} for the model, and {expected[1]:g} with zeros" in why


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda w: -float(norm(w) == 0),  # a loss, of which 0 is the best
        lambda w: 1.0 if norm(w) else np.nan,
        lambda w: 1 if norm(w) else 1 // 0,
        lambda w: np.ones(4 if norm(w) else 3),
    ],
)
def test_a_metric_that_falls_for_zeros_may_guard(evaluate: Callable[[Arrays], Any]) -> None:
    weights, replacements = model()
    choice = choose(weights, replacements, Accuracy(evaluate, 0.1))
    assert choice.certificate["replaced"] == 4
    assert guards_nothing(choice.certificate) is None
    assert (weights["w"] == -1).all()  # what was chosen, and not zeros


@pytest.mark.parametrize("error", [ArgumentError("a row of zeros"), SystemExit("no such model")])
def test_what_evaluate_raises_for_zeros_ends_nothing(error: BaseException) -> None:
    def evaluate(arrays: Arrays) -> float:
        if not norm(arrays):
            raise error
        return 1.0

    certificate = run(evaluate, 0.1).certificate
    assert certificate["replaced"] == 4
    assert "metric_of_zeros" not in certificate


def test_an_evaluate_that_does_not_end_for_zeros_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as text that is generated until the model says so. It hung behind the whole search."""
    monkeypatch.setattr(trial, "_PATIENCE", 0)
    monkeypatch.setattr(trial, "_LEAST_PATIENCE_SECONDS", 0.01)

    def evaluate(arrays: Arrays) -> float:
        while not norm(arrays):
            with contextlib.suppress(Exception):
                time.sleep(0.01)
        return 1.0

    weights, replacements = model()
    choice = choose(weights, replacements, Accuracy(evaluate, 0.1))
    assert choice.certificate["replaced"] == 4
    assert (weights["w"] == -1).all()
    why = guards_nothing(choice.certificate)
    assert why is not None
    assert why.startswith("whether the metric guards anything is not known: with zeros")
    assert why in describe({**choice.certificate, "tensor_errors": {}})


def test_what_takes_its_time_for_zeros_is_not_ended() -> None:
    """The least patience is a minute, however fast the metric was for the model."""

    def evaluate(arrays: Arrays) -> float:
        if not norm(arrays):
            time.sleep(0.2)
        return 1.0

    assert "guards nothing" in str(guards_nothing(run(evaluate, 0.1).certificate))


def test_what_was_chosen_is_not_changed_by_evaluating_zeros() -> None:
    weights, replacements = model()

    def evaluate(arrays: Arrays) -> float:
        if not norm(arrays):
            weights["w"][0] = 7
            raise ValueError
        return 1.0

    with pytest.raises(EvaluationError, match="evaluate changed the tensor 'w'"):
        choose(weights, replacements, Accuracy(evaluate, 0.1))


def test_zeros_are_in_the_place_of_floats_alone_and_ties_are_kept() -> None:
    weights, replacements = model()
    weights |= {"tied": weights["w"], "ids": np.arange(3)}
    last: list[Arrays] = []

    def evaluate(arrays: Arrays) -> float:
        last[:] = [arrays]
        return 1.0

    choice = choose(weights, replacements, Accuracy(evaluate, 0.1))
    assert choice.certificate["metric_of_zeros"] == 1
    assert [name for name, array in last[0].items() if array.any()] == ["ids"]
    assert np.shares_memory(last[0]["w"], last[0]["tied"])
    assert not any(array.flags.writeable for array in last[0].values())


def test_zeros_take_no_evaluation_that_is_not_to_be_had_or_tells_nothing() -> None:
    for most, expected in ((3, False), (6, False), (7, True)):  # 2 before, 4 blocks
        certificate = run(lambda _: 1.0, every=1, search="step", max_evaluations=most).certificate
        assert certificate["evaluations"] == most
        assert ("metric_of_zeros" in certificate) is expected
    assert "metric_of_zeros" not in run(after(2, 0.0), every=1).certificate  # refused
