# SPDX-License-Identifier: Apache-2.0
"""What the demo claims about numbers, as functions that can say no.

No torch and no store here: arrays in, verdicts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "accuracy", "compare_outputs", "differing_tensors"]

#: Two correct f32 programs add in different orders. With 64 terms of size 10 that moves a sum by
#: some 1e-5; a wrong weight moves it by far more than this.
_LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the outputs of two programs for the same texts differ."""

    texts: int
    max_difference: float
    same_class: int
    ties: int
    """Texts with another class whose two best outputs are equal but for rounding."""

    @property
    def agrees(self) -> bool:
        """Whether both programs computed the same function."""
        return self.max_difference <= _LOGIT_TOLERANCE and self.same_class + self.ties == self.texts


def accuracy(outputs: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Return the share of texts whose largest output is that of their class."""
    return float(np.mean(outputs.argmax(axis=1) == labels))


def compare_outputs(expected: NDArray[np.floating], actual: NDArray[np.floating]) -> Comparison:
    """Compare outputs of shape (texts, classes); NaN and another shape never agree."""
    if expected.shape != actual.shape:
        return Comparison(len(expected), float("inf"), 0, 0)
    difference = np.abs(expected.astype(np.float64) - actual)
    largest = float(difference.max(initial=0.0)) if not np.isnan(difference).any() else np.inf
    same = expected.argmax(axis=1) == actual.argmax(axis=1)
    best = np.sort(expected[~same], axis=1)
    ties = int(np.sum(best[:, -1] - best[:, -2] <= 2 * _LOGIT_TOLERANCE)) if len(best) else 0
    return Comparison(len(expected), largest, int(same.sum()), ties)


def differing_tensors(
    original: Mapping[str, NDArray[Any]], loaded: Mapping[str, NDArray[Any]]
) -> list[str]:
    """Return names of tensors that are missing, unasked for, or not the same bit for bit."""
    names = sorted(original.keys() | loaded.keys())
    return [
        name
        for name in names
        if name not in original or name not in loaded or not _same(original[name], loaded[name])
    ]


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # As bytes, so that NaN equals itself and -0.0 is not 0.0.
    flat, others = (np.ascontiguousarray(array).reshape(-1) for array in (one, other))
    return bool(np.array_equal(flat.view(np.uint8), others.view(np.uint8)))
