# SPDX-License-Identifier: Apache-2.0
"""Calling the user's ``evaluate``, and deciding whether what it says meets the tolerance.

`Scorer` calls and mistrusts: the arrays it hands out are read-only and their bytes are compared
afterwards, and what comes back is checked. `Judge` decides. Neither knows blocks or searches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.certificates import rounding_of
from pydedup.errors import ArgumentError, EvaluationError, PydedupError
from pydedup.hashing import hash_buffer
from pydedup.ingest.confidence import Bets, rows_needed, split_rows
from pydedup.ingest.overtime import ended_after

__all__ = ["Evaluate", "Judge", "Measure", "Scorer", "Verdict", "read_only"]

#: What `Accuracy` calls ``evaluate``.
Evaluate: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Any]


class Verdict(Enum):
    """What becomes of a state."""

    ACCEPTED = 1
    REFUSED = 2
    #: Refused by the judging rows, which will not be asked again.
    CLOSED = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """What ``evaluate`` said: the metric, and the scores that it is the mean of, if it gave any."""

    metric: float
    scores: NDArray[np.float64] | None


class Scorer:
    """Evaluates arrays that its owner changes in between.

    Parameters
    ----------
    evaluate
        What `Accuracy` takes by that name.
    weights
        C-contiguous arrays by name; tied ones are one array. Whoever writes to one calls `touched`.
    tell
        Told, before each evaluation, which one it is.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        weights: Mapping[str, NDArray[Any]],
        tell: Callable[[str, int], None] | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._tell = tell
        self._weights = weights
        self._prints: dict[int, bytes] = {}  # by id of the array, which lives as long as weights
        self._like: Measure | None = None
        self.evaluations = 0
        self.longest_seconds = 0.0

    def touched(self, name: str) -> None:
        """Take notice that a tensor was changed on purpose."""
        self._prints.pop(id(self._weights[name]), None)

    def measure(
        self, others: Mapping[str, NDArray[Any]] | None = None, seconds: float | None = None
    ) -> Measure:
        """Evaluate the arrays as they are, or others in their place for so long at most.

        Raises
        ------
        Overtime
            When it took longer and was ended.
        EvaluationError
            When ``evaluate`` raises, changes the arrays, or returns what is no metric, or one of
            another kind than the first time.
        """
        for array in self._weights.values():
            if id(array) not in self._prints:
                self._prints[id(array)] = _fingerprint(array)
        self.evaluations += 1
        if self._tell is not None:
            self._tell("evaluating", self.evaluations)
        arrays = read_only(self._weights if others is None else others)
        began = time.monotonic()
        try:
            if seconds is None:
                result = self._evaluate(arrays)
            else:
                result = ended_after(seconds, lambda: self._evaluate(arrays), "evaluate")
        except (Exception, SystemExit) as error:
            # Of others it may say whatever it likes.
            if others is None and isinstance(error, PydedupError | SystemExit):
                raise
            raise EvaluationError(f"evaluate raised {type(error).__name__}: {error}") from error
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        self.check_unchanged()
        measure = _measured(result)
        if self._like is None:
            self._like = measure
        elif _kind(measure) != _kind(self._like):
            raise EvaluationError(
                f"evaluate returned {_kind(measure)}, but {_kind(self._like)} the first time; it "
                "must score the same validation examples in the same order each time"
            )
        return measure

    def check_unchanged(self) -> None:
        """Raise EvaluationError when ``evaluate`` changed an array since it was last called."""
        for name, array in self._weights.items():
            if _fingerprint(array) != self._prints[id(array)]:
                raise EvaluationError(
                    f"evaluate changed the tensor {name!r} that it was given; let it work on a copy"
                )


class Judge:
    """Measures the unchanged weights, and compares others with them.

    Raises
    ------
    EvaluationError
        When two evaluations of the unchanged weights differ and the policy does not allow it, or
        scores do not fit what ``confidence`` needs.
    ArgumentError
        When there are too few validation examples to ever show what ``confidence`` asks for.
    """

    def __init__(self, policy: Accuracy, scorer: Scorer) -> None:
        self._policy = policy
        first, second = scorer.measure(), scorer.measure()
        apart = _apart(first, second)
        # Of scores the mean, as the metric is; differences that cancel out count all the same.
        self.noise = float(apart.mean())
        if apart.any() and policy.deterministic:
            raise EvaluationError(
                f"evaluate gave {first.metric!r} and then {second.metric!r} for the same weights, "
                f"values that differ by up to {apart.max():.3g}: is there chance in it (dropout, "
                "sampling, shuffled rows), or a module in training mode? Fix that, or allow for it "
                "with deterministic=False"
            )
        scores = None
        if first.scores is not None and second.scores is not None:
            scores = (first.scores + second.scores) / 2
        self.before = Measure((first.metric + second.metric) / 2, scores)
        self.steering: NDArray[np.int64] | None = None
        self.judging: NDArray[np.int64] | None = None
        if policy.confidence is not None:
            self._prepare(policy.confidence)

    def steering_metric(self, measure: Measure) -> float:
        """Return the metric as far as decisions of the search may depend on it."""
        if measure.scores is None or self.steering is None:
            return measure.metric
        return float(measure.scores[self.steering].mean())

    def verdict(self, measure: Measure) -> Verdict:
        """Say what becomes of a state. After `Verdict.CLOSED` no other may be asked for."""
        policy = self._policy
        if policy.confidence is None:
            drop = self.before.metric - measure.metric + self.noise
            allowed = policy.max_drop + rounding_of(self.before.metric)
            return Verdict.ACCEPTED if drop <= allowed else Verdict.REFUSED
        steering, judging = self._drops(measure)
        if not self._promising(steering, len(judging), policy.confidence):
            return Verdict.REFUSED
        bets = Bets.of(steering, len(judging), policy.max_drop, self._span)
        if bets.refutes(judging, policy.max_drop, policy.confidence):
            return Verdict.ACCEPTED
        return Verdict.CLOSED

    def bound(self, measure: Measure) -> float | None:
        """Return the upper confidence bound of the drop, None without ``confidence``.

        As if this state were the only one ever looked at: what holds whatever was searched, and
        is promised, is ``max_drop``.
        """
        policy = self._policy
        if policy.confidence is None:
            return None
        steering, judging = self._drops(measure)
        bets = Bets.of(steering, len(judging), policy.max_drop, self._span)
        return bets.upper_bound(judging, policy.confidence)

    @property
    def _span(self) -> float:
        lowest, highest = self._policy.score_range
        return float(highest) - float(lowest)

    def _prepare(self, confidence: float) -> None:
        policy = self._policy
        if self.before.scores is None:
            raise EvaluationError(
                "confidence needs a score per validation example: let evaluate return a 1-D array, "
                "such as 1 for each right answer and 0 for each wrong one"
            )
        n_rows = len(self.before.scores)
        needed = rows_needed(policy.max_drop, self._span, confidence)
        if n_rows < needed:
            raise ArgumentError(
                f"max_drop={policy.max_drop:g} with confidence {confidence:g} needs at least "
                f"{needed:,} validation examples, even if none got worse; evaluate scored "
                f"{n_rows:,}: take more examples, a larger max_drop, or no confidence"
            )
        self.steering, self.judging = split_rows(n_rows, policy.seed)
        self._drops(self.before)

    def _drops(self, measure: Measure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the drops of the steering and of the judging rows."""
        before, after = self.before.scores, measure.scores
        assert before is not None
        assert after is not None
        lowest, highest = self._policy.score_range
        low, high = float(after.min()), float(after.max())
        if not lowest <= low <= high <= highest:
            raise EvaluationError(
                f"evaluate returned scores from {low:g} to {high:g}, outside of "
                f"score_range={self._policy.score_range!r}; the confidence bound rests on it"
            )
        drops = before - after
        assert self.steering is not None
        return drops[self.steering], drops[self.judging]

    def _promising(self, steering: NDArray[np.float64], judging: int, confidence: float) -> bool:
        """Whether rows like the steering ones would pass, after Bernstein's inequality.

        A rule of thumb, on which no guarantee rests: it spares the judging rows states that they
        would refuse.
        """
        mean, variance = float(steering.mean()), float(steering.var())
        nats = -np.log(1.0 - confidence)
        if not steering.any():
            return True
        width = np.sqrt(2 * variance * nats / judging) + nats * self._span / (3 * judging)
        return bool(mean + width <= self._policy.max_drop)


def read_only(weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return views that cannot be written to."""
    views = {name: array.view() for name, array in weights.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def _fingerprint(array: NDArray[Any]) -> bytes:
    return hash_buffer(array.reshape(-1).view(np.uint8).data)


def _measured(result: Any) -> Measure:
    """Return what ``evaluate`` gave. Raises EvaluationError when it is no metric."""
    if np.ma.is_masked(result):
        raise EvaluationError("evaluate returned masked scores; leave those examples out each time")
    no_metric = (
        f"evaluate returned {type(result).__name__}, which is neither a number nor an array of "
        "numbers"
    )
    try:
        given = np.asarray(result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"{no_metric}: {error}") from error
    if not np.can_cast(given.dtype, np.float64, "same_kind"):
        raise EvaluationError(f"{no_metric}; it must return its metric, higher is better")
    values = given.astype(np.float64)
    if values.ndim > 1 or values.size == 0:
        raise EvaluationError(
            f"evaluate returned an array of shape {values.shape}; it must be a number, or a 1-D "
            "array of one score per validation example"
        )
    wrong = ~np.isfinite(values)
    if wrong.any():
        where = "" if values.ndim == 0 else f" for example {int(np.argmax(wrong))}"
        value = values[wrong].flat[0]
        raise EvaluationError(f"evaluate returned {value}{where}; scores must be finite")
    with np.errstate(over="ignore"):
        metric = float(values.mean())
    if not np.isfinite(metric):
        raise EvaluationError("evaluate returned scores too large to have a mean; scale them down")
    return Measure(metric, values if values.ndim else None)


def _kind(measure: Measure) -> str:
    return "a number" if measure.scores is None else f"{len(measure.scores):,} scores"


def _apart(first: Measure, second: Measure) -> NDArray[np.float64]:
    if first.scores is not None and second.scores is not None:
        apart = first.scores - second.scores
    else:
        apart = np.array([first.metric - second.metric])
    return np.absolute(apart, out=apart)
