# SPDX-License-Identifier: Apache-2.0
"""Whether models still do what their certificates say, by the metric that these were made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from pydedup.catalog import StoredModel
from pydedup.certificates import number_in
from pydedup.errors import ArgumentError, EvaluationError, PydedupError
from pydedup.ingest.judging import measured
from pydedup.maintenance.verify import VerifyReport

__all__ = ["Evaluate", "recheck"]

#: What `pydedup.policies.Accuracy` calls ``evaluate``.
Evaluate = Callable[[Mapping[str, NDArray[Any]]], Any]

# Metrics of the same weights on another machine differ by rounding.
_ROUNDING = 1e-6


def recheck(
    model: StoredModel,
    arrays: Mapping[str, NDArray[Any]],
    evaluate: Evaluate,
    report: VerifyReport,
) -> None:
    """Evaluate a stored model; a drop beyond what was promised is a broken promise.

    Parameters
    ----------
    arrays
        The model's tensors, as they are loaded.

    Raises
    ------
    ArgumentError
        When the model was added under another policy than `Accuracy`.
    EvaluationError
        When ``evaluate`` raises, or returns what is no metric.
    """
    certificate = model.certificate
    if certificate.get("policy") != "accuracy":
        raise ArgumentError(
            f"{model.address} was added with the policy {model.row.policy!r}, which promises "
            "nothing about a metric; evaluate models that were added with 'accuracy'"
        )
    try:
        found = measured(evaluate(arrays)).metric
    except EvaluationError as error:
        raise EvaluationError(f"{model.address}: {error}") from error
    except PydedupError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise EvaluationError(f"{model.address}: evaluate raised {said}") from error
    before, after, most, noise = (
        number_in({"noise": 0.0, **certificate}, name)
        for name in ("metric_before", "metric_after", "max_drop", "noise")
    )
    slack = _ROUNDING * max(1.0, abs(before)) + noise
    drop = before - found
    if drop > most + slack:
        report.broken_promises.append(
            f"{model.address}: the metric is {found:.6g}, {drop:.3g} below the {before:.6g} of "
            f"the source, where {most:g} was promised"
        )
    elif abs(found - after) > slack:
        report.notes.append(
            f"{model.address}: the metric is {found:.6g}; the certificate says {after:.6g}"
        )
    else:
        report.notes.append(f"{model.address}: the metric is {found:.6g}, as certified")
