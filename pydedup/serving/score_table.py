# SPDX-License-Identifier: Apache-2.0
"""The table that predictions go to: the columns that it has or gets, and writing rows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final, TypeAlias

import numpy as np

from pydedup.adapter_options import RowAdapter, RowColumn
from pydedup.errors import ArgumentError, PydedupError, UnavailableError
from pydedup.serving.features import Outputs
from pydedup.text import it_has, listed

__all__ = ["Line", "PredictionTable", "Repeated", "comparable", "key_of"]

#: What is written of one prediction: a value for each of its columns.
Line: TypeAlias = Sequence[object]

_MODEL_COLUMN: Final = "model"


class Repeated:
    """A key that another row of its batch has, where keys need not tell rows apart."""

    __slots__ = ("key",)

    def __init__(self, key: object) -> None:
        self.key = key


class PredictionTable:
    """One table, which may be missing until the first prediction is made.

    Attributes
    ----------
    outputs
        What its predictions look like, once that is known.
    may_have_written
        Whether a row may be in it that is from here.
    """

    def __init__(self, rows: RowAdapter, name: str, key: RowColumn, model: str) -> None:
        self._rows, self._name, self._key, self._model = rows, name, key, model
        self._columns: tuple[str, ...] | None = None
        self.outputs: Outputs | None = None
        self.may_have_written = False

    @property
    def is_there(self) -> bool:
        """Whether it is known to exist."""
        return self._columns is not None

    def look(self) -> None:
        """Look at it. Raises ArgumentError when it has not what is needed."""
        self._columns = self._rows.table_columns(self._name, self._key.name)
        if self._columns is None:
            return
        if self._key.name not in self._columns:
            raise ArgumentError(
                f"table {self._name} has no column {self._key.name!r} for the key"
                f"{it_has(self._key.name, self._columns)}"
            )
        # Of another table, the query's own say, all keys may be there, and nothing be written.
        if not {"prediction", "prediction_0"} & set(self._columns):
            raise ArgumentError(
                f"table {self._name} has no column 'prediction' or 'prediction_0', ...; it has: "
                f"{listed(self._columns)}; name another table, it is created when it is missing"
            )

    def present(self, keys: Sequence[object]) -> set[object]:
        """Return those of the keys that have a row."""
        return set(map(comparable, self._rows.present_keys(self._name, self._key.name, keys)))

    def takes(self, outputs: Outputs) -> bool:
        """Whether it is there and has the columns of such predictions, and of no longer ones."""
        if self._missing(outputs):
            return False
        return outputs == (self.numbers() or outputs) if outputs.kind == "few" else True

    def numbers(self) -> Outputs | None:
        """Return of how many numbers it has the columns, ``None`` unless they are numbered."""
        columns = self._columns or ()
        width = next(n for n in count() if f"prediction_{n}" not in columns)
        found = Outputs.of(np.zeros(width))  # of one, and of many, there is one column
        numbered = found.kind == "few" and width and "prediction" not in columns
        return found if numbered else None

    def prepare(self, outputs: Outputs) -> None:
        """See that it fits predictions; create it when it is missing."""
        if outputs == self.outputs:
            return
        names = _names_of(outputs)
        if self._key.name in (*names, _MODEL_COLUMN):
            raise ArgumentError(
                f"the key cannot be called {self._key.name!r}, as a column of the predictions is; "
                "give it another name with AS"
            )
        if self._columns is None:
            kinds = {"one": "float", "few": "float", "vector": "vector"}
            columns = [(name, kinds.get(outputs.kind, "text")) for name in names]
            self._rows.create_predictions(
                self._name, self._key, [*columns, (_MODEL_COLUMN, "text")]
            )
            self._columns = self._rows.table_columns(self._name, self._key.name) or ()
        missing = self._missing(outputs)
        if missing:
            raise ArgumentError(
                f"table {self._name} has no column {missing[0]!r}, which predictions of "
                f"{self._model} need{it_has(missing[0], self._columns)}"
            )
        self.outputs = outputs

    def line(self, result: Any) -> Line:
        """Return the values of one prediction."""
        if isinstance(result, Mapping):
            return [
                json.dumps({name: np.asarray(value).tolist() for name, value in result.items()})
            ]
        outputs = Outputs.of(result)
        if outputs.kind == "texts":
            texts = np.asarray(result).reshape(-1).tolist()
            return texts if outputs.width == 1 else [json.dumps(texts)]
        if outputs.kind == "vector":
            return [self._rows.vector(np.ascontiguousarray(result, dtype="<f4").tobytes())]
        return [float(value) for value in np.asarray(result).reshape(-1)]

    def insert(self, made: Mapping[object, Line]) -> bool:
        """Insert rows by key; ``False``, and none, when a key is taken."""
        assert self.outputs is not None
        columns = [self._key.name, *_names_of(self.outputs)]
        tail: list[object] = []
        if _MODEL_COLUMN in (self._columns or ()):
            columns.append(_MODEL_COLUMN)
            tail.append(self._model)
        lines = [(key_of(key), *line, *tail) for key, line in made.items()]
        wrote, self.may_have_written = self.may_have_written, True
        try:
            done = self._rows.insert_predictions(self._name, columns, lines)
        except UnavailableError:  # it may hide a commit, as an interrupt may
            raise
        except PydedupError:
            self.may_have_written = wrote
            raise
        self.may_have_written = wrote or done
        return done

    def _missing(self, outputs: Outputs) -> list[str]:
        names = (self._key.name, *_names_of(outputs))
        return [name for name in names if name not in (self._columns or ())]


def key_of(key: object) -> object:
    """Return what a key is for others."""
    return key.key if isinstance(key, Repeated) else key


def comparable(key: object) -> object:
    """Return a key as Python tells it from others.

    Instants of one time zone are compared by its clock, which shows an hour twice when summer ends.
    """
    if isinstance(key, datetime) and key.tzinfo is not None:
        return key.astimezone(UTC)
    return key


def _names_of(outputs: Outputs) -> list[str]:
    """Return the names of the columns of predictions."""
    if outputs.kind == "few":
        return [f"prediction_{number}" for number in range(outputs.width)]
    return ["prediction"]
