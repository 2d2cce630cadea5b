# SPDX-License-Identifier: Apache-2.0
"""Scoring: each row that a query finds, predicted and written to a table of the same database.

What is done is known by the table alone: its key is unique, rows that are in it are skipped, and a
batch is written in one transaction. So a row is written once, whatever ends the work and wherever,
in whatever order the query gives its rows, and also when two do the same work at once. What the
table cannot tell is the version that an alias meant when the work began: as long as it has not
ended, a row of ``jobs`` in the store says so.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.adapter_options import RowAdapter, RowColumn
from pydedup.arguments import as_count
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import ArgumentError, ConflictError, NotFoundError, PydedupError
from pydedup.serving.features import (
    InputKind,
    Outputs,
    features_of,
    kind_of,
    plain_rows,
    predict_rows,
)
from pydedup.serving.pin import Pin
from pydedup.serving.score_table import Line, PredictionTable, Repeated, comparable, key_of
from pydedup.text import listed, row_key
from pydedup.types import Progress, RowFailure, ScoreReport
from pydedup.words import OnError, check_word

__all__ = ["MOST_FAILURES", "Scoring", "key_place", "removed", "score_rows"]

Array = NDArray[Any]
#: Returns what a stored model predicts, as `Store.predict` does.
Predict = Callable[[StoredModel, Array], Any]

#: Rows that failed are all counted, and so many are kept with their reasons.
MOST_FAILURES: Final = 20
#: How often a batch is written that is refused, and of which no row is there.
_TRIES: Final = 5
#: Of keys that a table may take for one, so many are named.
_ALIKE: Final = 6
#: Bytes of a text that are no UTF-8, which SQLite keeps, stand in Python's for halves of pairs.
_NO_UNICODE: Final = re.compile("[\ud800-\udfff]")


class _Made(NamedTuple):
    """Predictions by key, and what they look like if that is known."""

    lines: dict[object, Line]
    outputs: Outputs | None


def removed(address: str, table: str, *, files: bool) -> NotFoundError:
    """Return the error of a version that is not there any more while rows are scored with it.

    ``files`` says that the table is a folder of files, which are of one version.
    """
    others = "and a new folder" if files else "rows that are there stay as they are"
    return NotFoundError(
        f"{address} was removed while rows were scored with it; what was scored stays in {table}. "
        f"Name another version to score the rest ({others})"
    )


def score_rows(
    adapter: Adapter,
    catalog: Catalog,
    rows: RowAdapter,
    predict: Predict,
    query: str,
    model: str,
    *,
    into: str,
    key: str | None,
    batch: int,
    on_error: OnError,
    progress: Progress | None,
) -> ScoreReport:
    """Do what `Store.score` promises.

    Parameters
    ----------
    adapter, catalog
        Of the store that the model is in.
    rows
        The database that the query is run in and predictions are written to.
    """
    check_word("on_error", on_error, get_args(OnError))
    batch = as_count("batch", batch, least=1, most=1 << 20)
    for name, text in (("query", query), ("model", model), ("into", into)):
        if not isinstance(text, str):
            raise ArgumentError(f"{name} must be a string, not {type(text).__name__}")
    table = rows.full_table_name(into)
    pin = Pin(adapter, catalog, rows, table, query, model)
    stored = pin.take()
    work: Scoring | None = None
    try:
        kind = kind_of(stored, adapter)
        with rows.read_rows(query, batch) as stream:
            columns = stream.columns
            work = Scoring(rows, table, columns, key, stored, catalog, kind, predict, on_error)
            work.begin()
            for found in stream:
                work.score(found)
                if progress is not None:
                    progress("scoring", work.seen, 0)
            work.end()
    except BaseException:
        if work is None or not work.target.may_have_written:
            with contextlib.suppress(PydedupError):
                pin.take_back()
        raise
    pin.end()
    return work.report(resumed=pin.resumed)


class Scoring:
    """One scoring under way."""

    def __init__(
        self,
        rows: RowAdapter,
        table: str,
        columns: Sequence[RowColumn],
        key: str | None,
        model: StoredModel,
        catalog: Catalog,
        kind: InputKind,
        predict: Predict,
        on_error: OnError,
        *,
        is_part: bool = False,
        to_files: bool = False,
        keys_repeat: bool = False,
    ) -> None:
        self._table, self._model = table, model
        self._is_part, self._to_files, self._keys_repeat = is_part, to_files, keys_repeat
        self._catalog, self._answer = catalog, predict
        self._skips = on_error == "skip"
        self._place = key_place(columns, key)
        self._key = columns[self._place]
        self._names = [c.name for i, c in enumerate(columns) if i != self._place]
        if not self._names:
            raise ArgumentError(
                f"there is no column but the key {self._key.name!r}; name the features after "
                "it, as in SELECT id, f1, f2 ..."
            )
        self._kind = kind
        self.target = PredictionTable(rows, table, self._key, model.address)
        self._is_plain = True  # as far as is known, an array with a row for each
        self._started = time.monotonic()
        self._failures: list[RowFailure] = []
        self.last_key: object = None  # of a row that is in the table
        self.seen = self._written = self._skipped = self._failed = 0

    def _predict(self, x: Array) -> Any:
        """Predict with the version of the work, and with none that took its name meanwhile."""
        self._check_model()
        try:
            return self._answer(self._model, x)
        except PydedupError:
            self._check_model()  # its pages may have gone
            raise

    def _check_model(self) -> None:
        try:
            there = self._catalog.resolve(self._model.address).id == self._model.row.id
        except NotFoundError:
            there = False
        if not there:
            raise removed(self._model.address, self._table, files=self._to_files)

    def begin(self) -> None:
        """Look at the table, which may be missing, and at what is known before any row."""
        width = self._kind.width
        if len(self._names) > 1 and width not in (None, len(self._names)):
            raise ArgumentError(
                f"{self._model.address} takes {width} features, and there are "
                f"{len(self._names)} columns beside the key {self._key.name!r}: "
                f"{listed(self._names)}"
            )
        self.target.look()

    def score(self, found: Sequence[Sequence[object]]) -> None:
        """Predict and write one batch."""
        self.seen += len(found)
        failures: list[RowFailure] = []
        wanted = self._new_rows(found, failures)
        made = self._at_once(wanted) or self._one_by_one(wanted, failures)
        if failures and not self._skips:
            raise ArgumentError(self._refusal(failures))
        self._failed += len(failures)
        self._failures += failures[: MOST_FAILURES - len(self._failures)]
        if made.outputs is not None:
            self.target.prepare(made.outputs)
        self._write(made.lines)

    def _at_once(self, wanted: Mapping[object, Sequence[object]]) -> _Made | None:
        """Return predictions of a batch of numbers, ``None`` where rows need a look by themselves.

        Most batches are numbers and give numbers, and Python's time for each row is what they cost.
        """
        inputs = plain_rows(list(wanted.values()), self._kind) if self._is_plain else None
        if inputs is None:
            return None
        try:
            found = self._predict(inputs)
        except ArgumentError:
            return None
        is_plain = isinstance(found, np.ndarray) and found.dtype.kind != "O"
        if not is_plain or found.shape[:1] != (len(wanted),):
            self._is_plain = False  # several, or texts: another try would predict all twice again
            return None
        if not np.isfinite(found).all():
            return None
        outputs = Outputs.of(found[0])
        if outputs != (self.target.outputs or self._expected(outputs)):
            return None
        if outputs.kind == "vector":
            lines: Sequence[Line] = [self.target.line(row) for row in found]
        else:
            lines = found.reshape(len(wanted), outputs.width).astype(np.float64).tolist()
        return _Made(dict(zip(wanted, lines, strict=True)), outputs)

    def _one_by_one(
        self, wanted: Mapping[object, Sequence[object]], failures: list[RowFailure]
    ) -> _Made:
        """Return predictions, and add what fails to ``failures``."""
        keys, inputs = [], []
        for key, values in wanted.items():
            try:
                inputs.append(features_of(values, self._names, self._kind))
                keys.append(key)
            except ArgumentError as error:
                failures.append(RowFailure(key_of(key), str(error)))
        results = predict_rows(self._predict, inputs)
        made = _Made({}, self._settled(inputs, results))
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, ArgumentError):
                failures.append(RowFailure(key_of(key), str(result)))
            elif (outputs := Outputs.of(result)) == made.outputs:
                made.lines[key] = self.target.line(result)
            else:
                assert made.outputs is not None
                reason = (
                    f"the model gives {outputs.width} numbers for it, and the table takes "
                    f"{made.outputs.width} of each row"
                )
                failures.append(RowFailure(key_of(key), reason))
        return made

    def _settled(self, inputs: Sequence[Array], results: Sequence[Any]) -> Outputs | None:
        """Return what all predictions are to look like, once one was made.

        That is as of a plain row, where the model tells how many features that has, so that it is
        the same whichever row comes first. What a table of the user's does not take is passed over.
        """
        if self.target.outputs is not None:
            return self.target.outputs
        made = [
            (x.ndim, Outputs.of(result))
            for x, result in zip(inputs, results, strict=True)
            if not isinstance(result, ArgumentError)
        ]
        if not made:
            return None
        known = [outputs for _, outputs in made]
        if self._kind.width is not None:
            plain = next((outputs for axes, outputs in made if axes == 1), None) or self._of_zeros()
            known[:0] = [plain] if isinstance(plain, Outputs) else []
        return next(filter(self.target.takes, known), self._expected(known[0]))

    def _expected(self, outputs: Outputs) -> Outputs:
        """Return what predictions such as one row's are to look like, as far as a table says.

        Where the model tells no width, rows may give more or fewer numbers than it has columns.
        """
        if self._kind.width is None and outputs.kind in ("one", "few", "vector"):
            return self.target.numbers() or outputs
        return outputs

    def _of_zeros(self) -> Outputs | ArgumentError:
        """Return what the prediction of a row of zeros looks like."""
        shape = (self._kind.width or len(self._names),)
        dtype = np.int64 if self._kind.ids else np.float32
        (result,) = predict_rows(self._predict, [np.zeros(shape, dtype)])
        return result if isinstance(result, ArgumentError) else Outputs.of(result)

    def end(self) -> None:
        """Make the table also where there was nothing to write."""
        if not self.target.is_there:
            outputs = self._of_zeros()
            if isinstance(outputs, ArgumentError):
                raise ArgumentError(
                    f"no row was predicted, and so table {self._table} was not created: what a "
                    f"prediction looks like cannot be told without one ({outputs})"
                )
            self.target.prepare(outputs)

    def report(self, *, resumed: bool) -> ScoreReport:
        """Return what was done."""
        return ScoreReport(
            model=self._model.address,
            table=self._table,
            rows=self._written,
            skipped=self._skipped,
            failed=self._failed,
            failures=tuple(self._failures),
            resumed=resumed,
            seconds=time.monotonic() - self._started,
        )

    def _new_rows(
        self, found: Sequence[Sequence[object]], failures: list[RowFailure]
    ) -> dict[object, Sequence[object]]:
        """Return the features of rows that the table does not have, by key."""
        wanted: dict[object, Sequence[object]] = {}
        place = self._place
        for row in found:
            key = row[place]
            key = bytes(key) if isinstance(key, (bytearray, memoryview)) else comparable(key)
            if key is None:
                failures.append(RowFailure(key, f"the key {self._key.name!r} is NULL"))
            elif isinstance(key, (list, dict, set)):
                reason = f"the key {self._key.name!r} is a list, a set or JSON, which is no key"
                failures.append(RowFailure(key, reason))
            elif key in wanted and self._keys_repeat:
                wanted[Repeated(key)] = (*row[:place], *row[place + 1 :])
            elif key in wanted:
                failures.append(RowFailure(key, f"the key {self._key.name!r} occurs twice"))
            elif isinstance(key, str) and not key.isascii() and _NO_UNICODE.search(key):
                failures.append(RowFailure(key, f"the key {self._key.name!r} is no UTF-8"))
            else:
                wanted[key] = (*row[:place], *row[place + 1 :])
        if self.target.is_there:
            for key in self.target.present(list(wanted)):
                if wanted.pop(key, None) is not None:
                    self._skipped += 1
                    self.last_key = key
        return wanted

    def _write(self, made: dict[object, Line]) -> None:
        """Write predictions, without those that others wrote meanwhile."""
        tries = _TRIES
        while tries:
            if not made or self.target.insert(made):
                self._written += len(made)
                self.last_key = next(reversed(made), self.last_key)
                return
            there = self.target.present(list(made))
            self._skipped += len(there)
            left = {key: line for key, line in made.items() if key not in there}
            tries -= len(left) == len(made)
            made = left
        if self._skips and len(made) > 1:  # the second of two that are one is there after the first
            lines, half = list(made.items()), len(made) // 2
            self._write(dict(lines[:half]))
            self._write(dict(lines[half:]))
            return
        keys = ", ".join(map(row_key, _alike(made)[:_ALIKE]))
        raise ConflictError(
            f"other writers write the same rows to {self._table}, or it takes some of these keys "
            f"for the same: {keys}; try again, or leave all but one of them out of the query. Or "
            "what is written breaks a unique index of another column: drop that, or name another "
            "table. Or row-level security hides rows that are there: score as who sees them"
        )

    def _refusal(self, failures: Sequence[RowFailure]) -> str:
        first = failures[0]
        more = f", and {len(failures) - 1} more of its batch" if len(failures) > 1 else ""
        if self._to_files:
            kept = "nothing of its part was kept, what is of other parts is"
        elif self._is_part:
            kept = "nothing of this batch was written, what is of others stays"
        else:
            kept = f"nothing of this batch was written, {self._written:,} rows before it were"
        return (
            f"row with {self._key.name} {row_key(first.key)}{more}: {first.reason}; {kept}; leave "
            "such rows out, or go on without them with on_error='skip' (--on-error skip)"
        )


def _alike(keys: Iterable[object]) -> list[object]:
    """Return those that differ in case, or blanks at the end, alone; all where there are none."""
    alike: dict[str, list[object]] = {}
    for key in map(key_of, keys):
        alike.setdefault(str(key).casefold().rstrip(), []).append(key)
    return [key for one in alike.values() if len(one) > 1 for key in one] or list(keys)


def key_place(columns: Sequence[RowColumn], key: str | None) -> int:
    """Return which column of the query is the key."""
    if not columns:
        raise ArgumentError("the query has no columns; name a key and the features")
    if key is None:
        return 0
    places = [i for i, column in enumerate(columns) if column.name == key]
    if len(places) != 1:
        raise ArgumentError(
            f"there {'are several columns' if places else 'is no column'} {key!r} for the key; "
            f"there is: {listed([column.name for column in columns])}"
        )
    return places[0]
