# SPDX-License-Identifier: Apache-2.0
"""A metric that is evaluated again, held against what a certificate promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pydedup.errors import ArgumentError, EvaluationError
from pydedup.maintenance.recheck import Evaluate, recheck
from pydedup.maintenance.verify import VerifyReport

CERTIFICATE = {"policy": "accuracy", "metric_before": 0.9, "metric_after": 0.895, "max_drop": 0.01}


def rechecked(evaluate: Evaluate, **changed: float) -> VerifyReport:
    model: Any = SimpleNamespace(address="m@1", certificate=CERTIFICATE | changed)
    report = VerifyReport()
    recheck(model, {}, evaluate, report)
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
    with pytest.raises(EvaluationError, match=r"^m@1: evaluate raised KeyError: 'w'$"):
        rechecked(lambda weights: weights["w"].mean())
    with pytest.raises(EvaluationError, match=r"^m@1: evaluate returned str, "):
        rechecked(lambda _: "good")

    def refuses(_: object) -> float:
        raise ArgumentError("not with these")

    with pytest.raises(ArgumentError, match=r"^not with these$"):
        rechecked(refuses)
