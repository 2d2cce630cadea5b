# SPDX-License-Identifier: Apache-2.0
"""Several requests as few predictions: rows of the same model go through it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import PydedupError
from pydedup.http.served import Served, ServedStore
from pydedup.http.shapes import is_rowwise

__all__ = ["Ask", "Outcome", "predict_many", "rows_of"]

Arrays = Mapping[str, NDArray[Any]]
#: Outputs by name, or what was raised.
Outcome = dict[str, NDArray[Any]] | Exception


@dataclass(frozen=True, slots=True)
class Ask:
    """A prediction that is wanted."""

    model: Served
    inputs: Arrays


def rows_of(inputs: Arrays) -> int:
    """Return how many rows a request counts for: the first axis of its first input."""
    first = next(iter(inputs.values()))
    return max(int(first.shape[0]), 1) if first.ndim else 1


def predict_many(store: ServedStore, asks: Sequence[Ask]) -> list[Outcome]:
    """Return what each of several predictions gives, in order."""
    if len(asks) == 1:
        return [_alone(store, asks[0])]
    groups: dict[object, list[int]] = {}
    for number, ask in enumerate(asks):
        groups.setdefault(_together(ask, number), []).append(number)
    outcomes: list[Outcome] = [{} for _ in asks]
    for numbers in groups.values():
        found = _joined(store, [asks[number] for number in numbers])
        if found is None:
            found = [_alone(store, asks[number]) for number in numbers]
        for number, outcome in zip(numbers, found, strict=True):
            outcomes[number] = outcome
    return outcomes


def _together(ask: Ask, number: int) -> object:
    """Return the same for requests that may share a prediction."""
    inputs = sorted(ask.inputs.items())
    rows = {array.shape[0] if array.ndim else 0 for _, array in inputs}
    if len(rows) != 1 or rows == {0}:
        return number
    if not _is_rowwise(ask.model, tuple((name, array.shape[1:]) for name, array in inputs)):
        return number
    kinds = [(name, array.dtype, array.shape[1:]) for name, array in inputs]
    return (ask.model.id, tuple(kinds))


@lru_cache(maxsize=4096)
def _is_rowwise(model: Served, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> bool:
    """`is_rowwise` for inputs whose rows have these shapes."""
    if model.graph is None:
        return False
    return is_rowwise(model.graph, model.weights, {name: (1, *rest) for name, rest in shapes})


def _joined(store: ServedStore, asks: Sequence[Ask]) -> list[Outcome] | None:
    """Return the outcomes of one prediction for all, None when there must be one for each."""
    if len(asks) == 1:
        return None
    inputs = {name: np.concatenate([ask.inputs[name] for ask in asks]) for name in asks[0].inputs}
    ends = np.cumsum([rows_of(ask.inputs) for ask in asks])
    try:
        outputs: dict[str, NDArray[Any]] = store.predict(asks[0].model.address, inputs)
    except (PydedupError, MemoryError):
        return None  # maybe by one of them alone
    if any(array.shape[:1] != (ends[-1],) for array in outputs.values()):
        return None
    starts = [0, *ends[:-1].tolist()]
    return [
        {name: array[start:end] for name, array in outputs.items()}
        for start, end in zip(starts, ends.tolist(), strict=True)
    ]


def _alone(store: ServedStore, ask: Ask) -> Outcome:
    # The native kernels want aligned arrays; those in a body lie where they lie.
    inputs = {
        name: np.require(array, requirements=["C", "A"]) for name, array in ask.inputs.items()
    }
    try:
        found: dict[str, NDArray[Any]] = store.predict(ask.model.address, inputs)
        return found
    except Exception as error:  # told to this one alone
        return error
