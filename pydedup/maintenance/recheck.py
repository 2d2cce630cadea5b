# SPDX-License-Identifier: Apache-2.0
"""Whether models still do what their certificates say, by the metric that these were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from pydedup.catalog import StoredModel
from pydedup.certificates import number_in
from pydedup.errors import ArgumentError, EvaluationError
from pydedup.ingest.judging import Evaluate, Scorer
from pydedup.maintenance.verify import VerifyReport

__all__ = ["Evaluate", "check_promise", "recheck"]

# Metrics of the same weights on another machine differ by rounding.
_ROUNDING = 1e-6


def check_promise(model: StoredModel) -> None:
    """Raise ArgumentError unless a model was added under the policy `Accuracy`."""
    if model.certificate.get("policy") != "accuracy":
        raise ArgumentError(
            f"{model.address} was added with the policy {model.row.policy!r}, which promises "
            "nothing about a metric; evaluate models that were added with 'accuracy'"
        )


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
        When ``evaluate`` does what it may not do while a model is added: raises, returns what is
        no metric, changes the arrays. Or it scores another number of examples than were scored
        then, or gives another metric when a broken promise is looked at again, unless that was
        said of it when the model was added: then the better one counts.
    """
    check_promise(model)
    certificate = model.certificate
    before, after, most, noise = (
        number_in({"noise": 0.0, **certificate}, name)
        for name in ("metric_before", "metric_after", "max_drop", "noise")
    )
    slack = _ROUNDING * max(1.0, abs(before)) + noise
    varies = certificate.get("deterministic") is False
    scorer = Scorer(evaluate, arrays)
    try:
        found = _metric(scorer, certificate)
        drop = before - found
        again = _metric(scorer, certificate) if drop > most + slack else found
        if abs(again - found) > slack and not varies:
            raise EvaluationError(
                f"evaluate gave {found!r} and then {again!r} for the same weights, so it says "
                "nothing about what was promised; is there chance in it, or a module in training "
                "mode?"
            )
    except EvaluationError as error:
        raise EvaluationError(f"{model.address}: {error}") from error
    found = max(found, again)
    drop = before - found
    if drop > most + slack:
        chance = ", twice; it may be chance, as evaluate varies: verify again" if varies else ""
        report.broken_promises.append(
            f"{model.address}: the metric is {found:.6g}, {drop:.3g} below the {before:.6g} of "
            f"the source, where {most:g} was promised{chance}"
        )
    elif abs(found - after) > slack:
        report.notes.append(
            f"{model.address}: the metric is {found:.6g}; the certificate says {after:.6g}"
        )
    else:
        report.notes.append(f"{model.address}: the metric is {found:.6g}, as certified")


def _metric(scorer: Scorer, certificate: Mapping[str, Any]) -> float:
    measure, rows = scorer.measure(), certificate.get("rows")
    scored = rows.get("all") if isinstance(rows, Mapping) else None
    if scored is not None and measure.scores is not None and len(measure.scores) != scored:
        raise EvaluationError(
            f"evaluate scored {len(measure.scores):,} examples, and {scored} when the model was "
            "added; metrics of other examples say nothing about what was promised"
        )
    return measure.metric
