# SPDX-License-Identifier: Apache-2.0
"""A metric that is evaluated again, held against what a certificate promises."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.errors import ArgumentError, EvaluationError
from pydedup.maintenance.recheck import Evaluate, recheck
from pydedup.maintenance.verify import VerifyReport

CERTIFICATE = {"policy": "accuracy", "metric_before": 0.9, "metric_after": 0.895, "max_drop": 0.01}


def rechecked(evaluate: Evaluate, **changed: Any) -> VerifyReport:
    model: Any = SimpleNamespace(address="m@1", certificate=CERTIFICATE | changed)
    report = VerifyReport()
    recheck(model, {"w": np.ones(3)}, evaluate, report)
    return report


@pytest.mark.parametrize(
    ("found", "changed"),
    [
        (0.895, {}),
        (0.8950009, {}),  # on another machine
        (0.8949991, {}),
        (0.875, {"noise": 0.02}),  # by chance
        (999.9991, {"metric_before": 1000, "metric_after": 1000}),
    ],
)
def test_a_metric_is_as_certified(found: float, changed: dict[str, float]) -> None:
    report = rechecked(lambda _: found, **changed)
    assert report.notes == [f"m@1: the metric is {found:.6g}, as certified"]
    assert report.broken_promises == []


@pytest.mark.parametrize(
    ("found", "changed"),
    [
        (0.8950011, {}),
        (0.8949989, {}),
        (0.8899995, {}),
        (0.8700, {"noise": 0.02}),
        (1.2, {}),  # better is none either
        (999.9895, {"metric_before": 1000, "metric_after": 1000}),
    ],
)
def test_another_metric_that_keeps_the_promise(found: float, changed: dict[str, float]) -> None:
    report = rechecked(lambda _: found, **changed)
    after = changed.get("metric_after", 0.895)
    assert report.notes == [f"m@1: the metric is {found:.6g}; the certificate says {after:.6g}"]
    assert report.broken_promises == []


@pytest.mark.parametrize(
    ("found", "changed"),
    [
        (0.8899985, {}),
        (0.8699985, {"noise": 0.02}),
        (999.9885, {"metric_before": 1000, "metric_after": 1000}),
    ],
)
def test_a_promise_is_broken(found: float, changed: dict[str, float]) -> None:
    report = rechecked(lambda _: found, **changed)
    (broken,) = report.broken_promises
    assert "0.01 was promised" in broken
    assert report.notes == []


def test_errors_name_the_model() -> None:
    with pytest.raises(EvaluationError, match=r"^m@1: evaluate raised KeyError: 'x'$"):
        rechecked(lambda weights: weights["x"].mean())
    with pytest.raises(EvaluationError, match=r"^m@1: evaluate returned str, "):
        rechecked(lambda _: "good")

    def refuses(_: object) -> float:
        raise ArgumentError("not with these")

    with pytest.raises(ArgumentError, match=r"^not with these$"):
        rechecked(refuses)


def test_a_promise_is_not_broken_by_chance() -> None:
    said = r"^m@1: evaluate gave 0\.5 and then 0\.9 for the same weights, so it says nothing"
    found = iter((0.5, 0.9))
    with pytest.raises(EvaluationError, match=said):
        rechecked(lambda _: next(found))


def test_what_was_said_to_vary_is_asked_twice() -> None:
    """It ended the whole verify, or broke a promise that the second answer kept."""
    for first, second, noise in ((0.5, 0.9, 0.0), (0.88984, 0.8899, 0.00015)):
        found = iter((first, second))
        report = rechecked(lambda _, found=found: next(found), deterministic=False, noise=noise)
        assert report.broken_promises == []
        assert report.notes == [f"m@1: the metric is {second:.6g}; the certificate says 0.895"]
    (broken,) = rechecked(lambda _: 0.5, deterministic=False).broken_promises
    assert broken.endswith("promised, twice; it may be chance, as evaluate varies: verify again")


@pytest.mark.parametrize("wrong", [5, 50])
def test_other_examples_say_nothing_about_a_promise(wrong: int) -> None:
    rows = {"all": 20, "steering": None, "judging": None}
    said = rf"^m@1: evaluate scored {wrong} examples, and 20 when the model was added"
    with pytest.raises(EvaluationError, match=said):
        rechecked(lambda _: np.full(wrong, 0.895), rows=rows)
    for same in (np.full(20, 0.895), 0.895):
        (note,) = rechecked(lambda _, same=same: same, rows=rows).notes
        assert "as certified" in note


def test_weights_are_no_more_to_be_changed_than_in_an_add() -> None:
    def changes(weights: Mapping[str, NDArray[Any]]) -> float:
        weights["w"][0] = 0
        return 0.895

    with pytest.raises(EvaluationError, match=r"^m@1: evaluate raised ValueError: .* read-only$"):
        rechecked(changes)
