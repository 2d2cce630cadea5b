# SPDX-License-Identifier: Apache-2.0
"""Rows of a database as inputs of a model, and its outputs as values of columns.

Whoever has rows of SQL predicts through this: `pydedup.serving.score` and ``pydedup.sql``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.catalog import StoredModel
from pydedup.errors import ArgumentError
from pydedup.formats.onnx import GRAPH as ONNX_GRAPH
from pydedup.graph import Graph
from pydedup.serving.predict import no_graph
from pydedup.serving.signature import Weight, inputs_of, weights_of
from pydedup.text import plural

__all__ = [
    "InputKind",
    "Outputs",
    "features_of",
    "graph_of",
    "input_kind",
    "kind_of",
    "plain_rows",
    "predict_rows",
]

Array = NDArray[Any]
Predict = Callable[[Array], Any]

#: A prediction of more numbers than these is one value, not a column for each.
_MOST_COLUMNS: Final = 32
_INT64: Final = (-(2**63), 2**63 - 1)
#: What numpy of any version takes, less the one of the rows.
_MOST_AXES: Final = 31
#: Of a number, a message has so many digits.
_MOST_DIGITS: Final = 25
#: What drivers give for columns of other types; a date with its time is of Python's `date`, too.
_KINDS: Final = (
    (date, "a date"),
    (time, "a time of day"),
    (timedelta, "a span of time"),
    (bytes | bytearray | memoryview, "bytes"),
    (list | tuple, "a list"),
    (dict, "a JSON object"),
)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_IN_SQL: Final = (
    ", which functions of SQL need (ONNX Runtime is not used for them, but by `pydedup score`)"
)


@dataclass(frozen=True, slots=True)
class InputKind:
    """What a model takes for a row: integer ids, or numbers, and how many where it is known.

    Where not even the first is known, as of what ONNX Runtime runs, ``as_given`` leaves a row of
    integers as that.
    """

    ids: bool
    width: int | None
    as_given: bool = False


def graph_of(model: StoredModel, needed: str = _IN_SQL) -> Graph:
    """Return a model's graph. Raises NotFoundError when the store knows none."""
    graph = model.graph()
    if graph is None:
        raise no_graph(model, needed)
    return graph


def kind_of(model: StoredModel, adapter: Adapter) -> InputKind:
    """Return what a model takes for a row. Raises NotFoundError when it cannot predict."""
    if model.graph() is None and ONNX_GRAPH in dict(adapter.artifacts(model.row.id)):
        return InputKind(ids=False, width=None, as_given=True)
    graph = graph_of(model, needed="")
    return input_kind(graph, weights_of(model, graph), model.address)


def input_kind(graph: Graph, weights: Mapping[str, Weight], model: str) -> InputKind:
    """Return what one row of a model's input is, as far as its layers tell.

    Raises ArgumentError when the model takes several inputs.
    """
    if len(graph.inputs) != 1:
        raise ArgumentError(
            f"{model} takes several inputs ({', '.join(graph.inputs)}); a row of SQL is one input, "
            "so predict with it in Python"
        )
    (spec,) = inputs_of(graph, weights)
    return InputKind(spec.ids, None if spec.ids else spec.width)


def features_of(values: Sequence[object], names: Sequence[str], kind: InputKind) -> Array:
    """Return the features of one row, as float32 or, of ids, as int64.

    Parameters
    ----------
    values
        A number each; or one value that holds all: bytes of float32 in little-endian order, the
        text of a JSON array, or a list, nested for an input of several axes.
    names
        What messages call them.

    Raises
    ------
    ArgumentError
        Without saying which row it is.
    """
    if len(values) == 1 and isinstance(values[0], (bytes, bytearray, memoryview, str, list)):
        array = _from_one(values[0], names[0], kind)
        if kind.width is not None and array.ndim == 1 and len(array) != kind.width:
            raise ArgumentError(
                f"{names[0]} holds {len(array)} numbers, and the model takes {kind.width}"
            )
        return array
    if values == [None] or values == (None,):
        raise ArgumentError(f"{names[0]} is NULL")
    if kind.width is not None and len(values) != kind.width:
        are = "is" if len(values) == 1 else "are"
        given = plural(len(values), "feature")
        raise ArgumentError(f"there {are} {given}, and the model takes {kind.width}")
    if not kind.ids and not kind.as_given and _are_plain(values):
        return np.array(values, np.float32)
    return _checked([_number(v, name) for v, name in zip(values, names, strict=True)], kind, names)


def plain_rows(rows: Sequence[Sequence[object]], kind: InputKind) -> Array | None:
    """Return the features of many rows at once, where all are numbers that nothing is wrong with.

    Parameters
    ----------
    rows
        As `features_of` takes each of them.

    Returns
    -------
    One row each of what `features_of` gives, float32 or, of ids, int64. ``None`` where rows have to
    be looked at one by one.
    """
    width = len(rows[0]) if rows else 0
    types = set[type]().union(*(set(map(type, column)) for column in zip(*rows, strict=True)))
    if width == 1 and types == {bytes} and not kind.ids:
        return _plain_vectors([row[0] for row in rows], kind)  # type: ignore[misc]
    if not types or not types <= {int, float} or kind.width not in (None, width):
        return None
    if kind.ids or (kind.as_given and int in types):
        if types != {int}:
            return None
        dtype: type[np.generic] = np.int64
    else:
        dtype = np.float64
    try:
        numbers = np.array(rows, dtype=dtype)
    except OverflowError:  # beyond 64 bits, or what a double holds
        return None
    if dtype is np.int64:
        return numbers
    # NaN is no smaller than anything.
    return numbers.astype(np.float32) if (np.abs(numbers) <= _FLOAT32_MAX).all() else None


def _are_plain(values: Sequence[Any]) -> bool:
    """Whether nothing is wrong with some numbers; False also where each has to be looked at."""
    if not values or not {int, float}.issuperset(map(type, values)):
        return False
    # Of NaN, comparisons say anything, and a sum of such numbers is finite only without.
    fit = min(values) >= -_FLOAT32_MAX and max(values) <= _FLOAT32_MAX
    return fit and math.isfinite(sum(values))


def _plain_vectors(values: Sequence[bytes], kind: InputKind) -> Array | None:
    size = len(values[0])
    if not size or size % 4 or kind.width not in (None, size // 4):
        return None
    if any(len(value) != size for value in values):
        return None
    numbers = np.frombuffer(b"".join(values), dtype="<f4").reshape(len(values), -1)
    return numbers.astype(np.float32) if np.isfinite(numbers).all() else None


def _from_one(value: Any, name: str, kind: InputKind) -> Array:
    if isinstance(value, (bytes, bytearray, memoryview)):
        if kind.ids:
            raise ArgumentError(
                f"{name} holds bytes, which stand for float32, and the model takes ids; give "
                "integers or a JSON array of them"
            )
        if len(value) % 4 or not len(value):
            raise ArgumentError(f"{name} has {len(value)} bytes, which is no number of float32")
        array = np.frombuffer(value, dtype="<f4").astype(np.float32)
        _refuse_infinite(array, name)
        return array
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ArgumentError(f"{name} is a text that is no JSON array of numbers") from None
        if not isinstance(value, list):
            raise ArgumentError(f"{name} is JSON, and no array of numbers")
    shape: list[int] = []
    level: Any = value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    if len(shape) > _MOST_AXES:
        raise ArgumentError(f"{name} is nested {len(shape)} deep; {_MOST_AXES} is the most")
    flat = list(_flat(value, shape, name))
    if not flat:
        raise ArgumentError(f"{name} is an empty array")
    return _checked([_number(item, name) for item in flat], kind, [name]).reshape(shape)


def _flat(value: Any, shape: Sequence[int], name: str) -> Iterable[object]:
    if not shape:
        if isinstance(value, list):
            raise ArgumentError(f"the lists in {name} differ in length")
        yield value
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        raise ArgumentError(f"the lists in {name} differ in length")
    for item in value:
        yield from _flat(item, shape[1:], name)


def _number(value: object, name: str) -> int | float:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Decimal):
        # Whole numbers beyond 64 bits are no ids, and may have more digits than Python writes.
        whole = value.is_finite() and abs(value) < 2**64 and value == value.to_integral_value()
        return int(value) if whole else float(value)
    if value is None:
        raise ArgumentError(f"{name} is NULL")
    raise ArgumentError(f"{name} is no number but {_kind(value)}")


def _kind(value: object) -> str:
    """Return what people call a value of SQL that is no number."""
    if isinstance(value, str):
        return f"the text {value[:_MOST_DIGITS]!r}{'...' if len(value) > _MOST_DIGITS else ''}"
    words = (words for kind, words in _KINDS if isinstance(value, kind))
    return next(words, f"of type {type(value).__name__}")


def _checked(numbers: Sequence[int | float], kind: InputKind, names: Sequence[str]) -> Array:
    many = len(names) > 1
    for i, number in enumerate(numbers):
        name = names[i] if many else names[0]
        if isinstance(number, float) and not math.isfinite(number):
            raise ArgumentError(f"{name} is {number}")
        if kind.ids:
            if number != int(number) or not _INT64[0] <= number <= _INT64[1]:
                raise ArgumentError(f"{name} is {_shown(number)}, and the model takes integer ids")
        elif abs(number) > _FLOAT32_MAX:
            raise ArgumentError(f"{name} is {_shown(number)}, beyond what float32 holds")
    whole = kind.as_given and all(isinstance(number, int) for number in numbers)
    if kind.ids or (whole and all(_INT64[0] <= number <= _INT64[1] for number in numbers)):
        return np.array([int(number) for number in numbers], dtype=np.int64)
    return np.array(numbers, dtype=np.float32)


def _shown(number: float) -> str:
    """Return a number for a message; an integer of JSON may have thousands of digits."""
    text = str(number)
    return text if len(text) <= _MOST_DIGITS else f"{text[:_MOST_DIGITS]}... ({len(text)} digits)"


def _refuse_infinite(array: Array, name: str) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        at = int(bad.argmax())
        raise ArgumentError(f"{name} holds {array[at]} at place {at}")


# ---- predicting ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outputs:
    """What predictions of one model look like: the same for all of its rows, or it is refused.

    Attributes
    ----------
    kind
        ``"one"``: a number; ``"few"``: up to _MOST_COLUMNS; ``"vector"``: more; ``"texts"``: such
        as the label of a class; ``"named"``: several outputs by name.
    width
        How many numbers or texts, of one output.
    """

    kind: Literal["one", "few", "vector", "texts", "named"]
    width: int

    @classmethod
    def of(cls, prediction: Array | Mapping[str, Array]) -> Outputs:
        """Return what the prediction of one row looks like."""
        if isinstance(prediction, Mapping):
            return cls("named", 0)
        if prediction.dtype.kind == "O":
            return cls("texts", prediction.size)
        if prediction.size == 1:
            return cls("one", 1)
        return cls("few" if prediction.size <= _MOST_COLUMNS else "vector", prediction.size)


def predict_rows(
    predict: Predict, rows: Sequence[Array]
) -> list[Array | Mapping[str, Array] | ArgumentError]:
    """Predict rows of whatever shapes; one that the model refuses gets the error instead.

    Rows of one shape are one batch. Where the model refuses a batch, halves of it are tried.
    """
    found: list[Any] = [None] * len(rows)
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for place, row in enumerate(rows):
        by_shape.setdefault((row.dtype, *row.shape), []).append(place)
    pending = list(by_shape.values())
    while pending:
        places = pending.pop()
        try:
            results = _split(predict(np.stack([rows[place] for place in places])), len(places))
        except ArgumentError as error:
            if len(places) > 1:
                half = len(places) // 2
                pending += [places[:half], places[half:]]
                continue
            results = [error]
        for place, result in zip(places, results, strict=True):
            found[place] = result
    return found


def _split(predicted: Any, count: int) -> list[Any]:
    """Return the prediction of each row."""
    if isinstance(predicted, Mapping):
        parts = {name: _split(value, count) for name, value in predicted.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(count)]
    array = np.asarray(predicted)
    if array.ndim == 0 or len(array) != count:
        raise ArgumentError(
            f"the model gives an output of shape {array.shape} for {count} rows, and not one "
            "prediction for each"
        )
    results: list[Any] = []
    for row in array:
        if array.dtype.kind != "O" and not np.isfinite(row).all():
            results.append(ArgumentError("the prediction is not finite"))
        else:
            results.append(np.asarray(row, array.dtype))
    return results
