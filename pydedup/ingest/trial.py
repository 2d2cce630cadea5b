# SPDX-License-Identifier: Apache-2.0
"""The state of an accuracy search: arrays in which blocks are replaced, and put back.

A `Trial` owns the working arrays and always knows the last state that was accepted. `attempt` is
what the searches call. Which blocks, in which order and to which level is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.blocks import matrix_shape
from pydedup.errors import ArgumentError, EvaluationError
from pydedup.ingest.judging import Judge, Measure, Scorer, Verdict
from pydedup.ingest.overtime import Overtime
from pydedup.similarity import distances
from pydedup.types import DType

__all__ = ["KEPT", "Replacement", "RoundOver", "Trial", "changes"]

#: Level of a block that stays as it is.
KEPT = -1
#: For zeros ``evaluate`` may take so many times as long as ever before, and this long anyway.
_PATIENCE, _LEAST_PATIENCE_SECONDS = 10, 60.0


@dataclass(frozen=True, slots=True)
class Replacement:
    """A block, and what might be stored in its place.

    Attributes
    ----------
    tensor
        Its name.
    rows, cols
        Where the block lies in the tensor's matrix view.
    levels
        Contents to try, the most saving first; each returns the block's new content, a 2-D array
        of the block's shape in the tensor's dtype. Called once per attempt.
    saved
        Bytes that each level saves, about: a page has some of several deltas once.
    magnitude
        Third quartile of the block's absolute weights, normalised by its layer.
    layer_bytes
        Size of its tensor.
    shares
        Whether the first level is a stored block as it is; all others are deltas.
    errors
        Relative L2 change of the block at each level, as far as it is known; infinity where it is
        not. Without any, the last of several levels counts as near, and no other.
    """

    tensor: str
    rows: slice
    cols: slice
    levels: tuple[Callable[[], NDArray[Any]], ...]
    saved: tuple[int, ...]
    magnitude: float
    layer_bytes: int
    shares: bool = True
    errors: tuple[float, ...] = ()

    def within(self, error: float) -> int | None:
        """Return the most saving level that changes the block by no more than that."""
        last = len(self.levels) - 1
        if not self.errors:
            return last or None
        return next((level for level, known in enumerate(self.errors) if known <= error), None)


class RoundOver(Exception):  # noqa: N818  (a signal, never seen outside of a search)
    """No further evaluation is to be had in this round."""


class Trial:
    """Working arrays, what was accepted in them, and how often they were evaluated.

    Attributes
    ----------
    levels
        int64, the accepted level of each replacement.
    accepted
        What ``evaluate`` said of the accepted state.
    refused
        Replacements that a search refused, whatever became of them at other levels.
    closed
        The judging rows refused a state: nothing can be accepted any more.
    quota
        Number of evaluations at which the round ends.
    ended
        Why no more was replaced.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[Any]],
        replacements: Sequence[Replacement],
        policy: Accuracy,
        row_axes: Mapping[str, int],
        tell: Callable[[str, int], None] | None = None,
    ) -> None:
        self.weights = weights
        self.policy = policy
        self._replacements = replacements
        self._matrices = {
            name: _matrix(name, array, row_axes.get(name)) for name, array in weights.items()
        }
        self._spots = [self._spot(replacement) for replacement in replacements]
        self._originals: dict[int, NDArray[Any]] = {}
        self._scorer = Scorer(policy.evaluate, weights, tell)
        self.judge = Judge(policy, self._scorer)
        self.accepted = self.judge.before
        self.levels = np.full(len(replacements), KEPT, np.int64)
        self.refused: set[int] = set()
        self.closed = False
        self.quota = policy.max_evaluations
        self.ended = "every candidate was tried"

    @property
    def evaluations(self) -> int:
        """How often ``evaluate`` was called."""
        return self._scorer.evaluations

    def attempt(self, batch: Sequence[int], wanted: Mapping[int, int]) -> bool:
        """Bring a batch to the wanted levels, evaluate, and keep all of it or put it all back.

        Raises
        ------
        RoundOver
            When the quota is used up, before anything is done; or when the judging rows refused.
        """
        if self.evaluations >= self.quota:
            if self.evaluations >= self.policy.max_evaluations:
                self.ended = "the evaluations ran out"
            raise RoundOver
        for index in batch:
            self._write(index, wanted[index])
        verdict, measure = self._evaluated()
        if verdict is Verdict.ACCEPTED:
            self.accepted = measure
            self.levels[list(batch)] = [wanted[index] for index in batch]
            return True
        for index in batch:
            self._write(index, int(self.levels[index]))
        if verdict is Verdict.CLOSED:
            raise RoundOver
        return False

    def adopt(self, changed: Mapping[str, NDArray[Any]]) -> bool:
        """Take other arrays if the metric is better with them and the tolerance still met."""
        before = {name: self.weights[name].copy() for name in changed}
        self._copy(changed)
        verdict, measure = self._evaluated(better_than=self.accepted)
        if verdict is not Verdict.ACCEPTED:
            self._copy(before)
            return False
        self.accepted = measure
        # What is not replaced has other content now, to be kept when it is touched again.
        for index in [i for i in self._originals if self.levels[i] == KEPT]:
            del self._originals[index]
        return True

    @property
    def patience_seconds(self) -> float:
        """How long ``evaluate`` may take for zeros, of which it may never have been meant to end.

        Such as where text is generated until the model says that it ends.
        """
        return max(_LEAST_PATIENCE_SECONDS, _PATIENCE * self._scorer.longest_seconds)

    def metric_of_zeros(self) -> float | None:
        """Return the metric of the model with zeros in place of all its floats.

        None where ``evaluate`` cannot make anything of these, which it does not have to, whatever
        it raises to say so. Raises EvaluationError when it changes the arrays, and Overtime when
        it takes longer than `patience_seconds`.
        """
        # By array, so that tied weights are one. Memory that nobody wrote to takes none.
        zeros = {
            id(array): np.zeros(array.shape, array.dtype)
            for array in self.weights.values()
            if DType.of(array.dtype).is_float
        }
        weights = {name: zeros.get(id(array), array) for name, array in self.weights.items()}
        with np.errstate(all="ignore"):
            try:
                return self._scorer.measure(weights, self.patience_seconds).metric
            except EvaluationError:
                self._scorer.check_unchanged()
                return None
            except Overtime:
                self._scorer.check_unchanged()
                raise

    def frozen(
        self, shared: Mapping[str, Sequence[tuple[slice, slice]]]
    ) -> dict[str, NDArray[np.bool_]]:
        """Return masks, by name, of the elements of replaced and of shared blocks."""
        arrays = {id(array): array for array in self.weights.values()}
        by_array = {key: np.zeros(array.shape, np.bool_) for key, array in arrays.items()}
        masks = {name: by_array[id(array)] for name, array in self.weights.items()}
        areas = [(name, area) for name, where in shared.items() for area in where]
        for replacement, level in zip(self._replacements, self.levels, strict=True):
            if level != KEPT:
                areas.append((replacement.tensor, (replacement.rows, replacement.cols)))
        for name, area in areas:
            masks[name].reshape(self._matrices[name].shape)[area] = True
        return masks

    def errors(self) -> dict[str, float]:
        """Return the largest relative L2 change of a replaced block, by tensor."""
        largest: dict[str, float] = {}
        for index in np.flatnonzero(self.levels != KEPT).tolist():
            name = self._replacements[index].tensor
            old, new = self._originals[index], self._spots[index].copy()
            change = float(changes(old[np.newaxis], new[np.newaxis])[0])
            if change > 0:
                largest[name] = max(largest.get(name, 0.0), change)
        return largest

    def _evaluated(self, better_than: Measure | None = None) -> tuple[Verdict, Measure]:
        measure = self._scorer.measure()
        metric = self.judge.steering_metric
        if better_than is not None and metric(measure) <= metric(better_than):
            return Verdict.REFUSED, measure
        verdict = self.judge.verdict(measure)
        if verdict is Verdict.CLOSED:
            self.closed, self.ended = True, "the judging examples refused a state"
        return verdict, measure

    def _write(self, index: int, level: int) -> None:
        replacement, spot = self._replacements[index], self._spots[index]
        if index not in self._originals:
            self._originals[index] = spot.copy()
        content = self._originals[index] if level == KEPT else replacement.levels[level]()
        if content.shape != spot.shape or content.dtype != spot.dtype:
            raise ArgumentError(
                f"level {level} of a block of {replacement.tensor!r} is {content.dtype} "
                f"{content.shape}; the block is {spot.dtype} {spot.shape}"
            )
        spot[...] = content
        self._scorer.touched(replacement.tensor)

    def _copy(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            self.weights[name][...] = array
            self._scorer.touched(name)

    def _spot(self, replacement: Replacement) -> NDArray[Any]:
        name = replacement.tensor
        if name not in self._matrices:
            raise ArgumentError(f"a replacement names the tensor {name!r}, which is not there")
        spot = self._matrices[name][replacement.rows, replacement.cols]
        if spot.size == 0 or not replacement.levels:
            raise ArgumentError(f"a replacement of {name!r} is an empty block or has no level")
        return spot


def changes(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    """Return the relative L2 change of blocks (n, rows, cols).

    1, as of a block of which nothing is left, where that is infinite (of zeros, or to a NaN), and
    for what is no float: JSON has no infinity, and `Bounded` takes neither for near.
    """
    dtype = DType.of(before.dtype)
    if not dtype.is_float:
        differ: NDArray[np.bool_] = (before != after).any(axis=(1, 2))
        return differ.astype(np.float64)
    # In f64, whose sums are as good as exact; of 1 byte, distances takes none.
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = before.astype(np.float64), after.astype(np.float64)
    found = distances(*wide).relative_l2
    return np.where(np.isfinite(found), found, 1.0)


def _matrix(name: str, array: NDArray[Any], row_axes: int | None) -> NDArray[Any]:
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ArgumentError(f"the working copy of {name!r} must be C-contiguous and writeable")
    return array.reshape(matrix_shape(array.shape, row_axes))
