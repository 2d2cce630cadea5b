# SPDX-License-Identifier: Apache-2.0
"""Predictions as functions of SQL, on any connection of the module ``sqlite3``.

>>> connection = sqlite3.connect("models.db")
>>> functions = pydedup.sql.register(connection)
>>> connection.execute("SELECT id, pydedup_predict('churn@prod', age, visits) FROM customers")

Models are read from the pages of a store, in this process. docs/scoring.md tells of each function.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pydedup import config, registry
from pydedup.errors import (
    ArgumentError,
    BudgetError,
    CorruptStoreError,
    NotFoundError,
    PydedupError,
)
from pydedup.opening import check_store
from pydedup.serving.calls import Calls, StoreState, as_json, state_of
from pydedup.store import Store
from pydedup.store import open as open_store

__all__ = ["PostgresFunctions", "SqlFunctions", "inside_postgres", "register"]

#: Budget of the buffer pool of a PostgreSQL backend, unless ``pydedup.memory`` is set.
POSTGRES_MEMORY = "64MiB"


def register(
    connection: Any,
    store: Store | str | os.PathLike[str] | None = None,
    *,
    memory: str | int = "64MiB",
) -> SqlFunctions:
    """Make ``pydedup_predict`` and its like known to a connection of SQLite.

    Parameters
    ----------
    store
        A store, or the URL of one on any database; by default the one that is in the connection's
        own file.
    memory
        Budget of a store that is opened here.

    Raises
    ------
    ArgumentError
        For what is no connection of ``sqlite3``, or one in memory without a store.
    StoreError
        When there is no store.
    """
    known = registry.sqlite_functions()
    own = store is None
    if store is None:
        store = Path(known.main_file(connection))
    opened = None
    if not isinstance(store, Store):
        store = opened = open_store(store, mode="r", memory=memory)
    try:
        adapter = store._adapter
        state = partial(known.state, connection) if own else partial(state_of, adapter)
        seen = known.as_seen(connection, adapter.url) if own else None
        functions = SqlFunctions(
            Calls(store._catalog, store._pool, store._stored_tensor, state, seen=seen), opened
        )
        known.bind(connection, functions._table())
        return functions
    except BaseException:
        if opened is not None:
            opened.close()
        raise


class SqlFunctions:
    """What `register` made known to one connection; lives as long as that.

    SQLite does not tell what went wrong inside of a function: its message is always "user-defined
    function raised exception". ``last_error`` and ``raising`` do, and in SQL
    ``pydedup_last_error()``.
    """

    def __init__(self, calls: Calls, opened: Store | None) -> None:
        self._calls = calls
        self._opened = opened
        self.last_error: BaseException | None = None
        if opened is not None:
            weakref.finalize(self, opened.close).atexit = False

    def __repr__(self) -> str:
        of = "" if self._opened is None else f" of {self._opened!r}"
        return f"<pydedup.sql.SqlFunctions{of}, last_error={self.last_error!r}>"

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise, for the error that SQLite makes of it, what happened inside of a function."""
        before = self.last_error
        try:
            yield
        except Exception as error:
            if self.last_error is not None and self.last_error is not before:
                raise self.last_error from error
            raise

    def close(self) -> None:
        """Close the store, if it was opened here; the functions are errors from then on."""
        if self._opened is not None:
            self._opened.close()

    # ---- the functions ------------------------------------------------------------------------

    def _table(self) -> list[tuple[str, int, bool, Callable[..., Any]]]:
        return [
            ("pydedup_predict", -1, False, self._noted(self._predict)),
            ("pydedup_predict_blob", 2, False, self._noted(self._predict_blob)),
            ("pydedup_predict_json", 2, False, self._noted(self._predict_json)),
            # SQLite asks once for a constant argument, and so holds one version for a statement.
            ("pydedup_model", 1, True, self._noted(self._calls.address)),
            ("pydedup_last_error", 0, False, self._last_error),
        ]

    def _predict(self, *arguments: Any) -> float | str | None:
        if len(arguments) < 2:
            raise ArgumentError(
                "pydedup_predict takes a model and features: ('name@version', f1, ...)"
            )
        model, *values = arguments
        if None in values:
            return None
        predicted = self._calls.row(model, values)
        if isinstance(predicted, dict) or predicted.size != 1:
            return as_json(predicted)
        return float(predicted.reshape(()))

    def _predict_blob(self, model: Any, features: Any) -> bytes | None:
        return None if features is None else _as_blob(self._calls.one(model, [features]))

    def _predict_json(self, model: Any, features: Any) -> str | None:
        return None if features is None else as_json(self._calls.row(model, [features]))

    def _last_error(self) -> str | None:
        return None if self.last_error is None else str(self.last_error)

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                self.last_error = error
                if isinstance(error, PydedupError):
                    # SQLite would tell a budget, which is a MemoryError, as memory that ran out.
                    raise RuntimeError(str(error)) from error
                raise

        return call


# ---- inside of PostgreSQL -----------------------------------------------------------------------


def inside_postgres(gd: dict[str, Any], plpy: Any, schema: str) -> PostgresFunctions:
    """Return what the functions that `pydedup sql install` makes call, one per backend and schema.

    Parameters
    ----------
    gd, plpy
        The dictionary ``GD`` and the module ``plpy`` of PL/Python.
    schema
        Where the store is.
    """
    known: dict[str, PostgresFunctions] = gd.setdefault("pydedup", {})
    if schema not in known:
        known[schema] = PostgresFunctions(plpy, schema)
    return known[schema]


class PostgresFunctions:
    """Predictions inside of a PostgreSQL backend; errors are those of the server."""

    def __init__(self, plpy: Any, schema: str) -> None:
        self._plpy = plpy
        self._schema = schema
        self._store: Store | None = None
        self._state: StoreState = ("", "")
        self._viewer: Callable[[], str] = str
        self._ready: Calls | None = None

    def version(self) -> str:
        """Return the version of pydedup; nothing of a store is needed."""
        from importlib.metadata import version

        return version("pydedup")

    def model(self, model: str) -> str:
        """Return ``name@version`` of what an address means."""
        with self._errors():
            return self._calls().address(model)

    def predict(self, model: str, features: list[float | None]) -> float | None:
        """Return the one number that a model predicts for a row; ``None`` for a NULL feature."""
        if None in features:
            return None
        with self._errors():
            predicted = self._calls().one(model, features)
            if predicted.size != 1:
                raise ArgumentError(
                    f"{model} gives {predicted.size} numbers for a row; pydedup_predict_array "
                    "returns them"
                )
            return float(predicted.reshape(()))

    def predict_array(self, model: str, features: list[float | None]) -> list[float] | None:
        """Return all numbers that a model predicts for a row."""
        if None in features:
            return None
        with self._errors():
            return _numbers(self._calls().one(model, features))

    def predict_many(self, model: str, features: list[Any]) -> list[list[float]]:
        """Return what a model predicts for each row of an array of two axes, in one batch.

        Raises ArgumentError for an array of one axis.
        """
        with self._errors():
            if features and not isinstance(features[0], list):
                raise ArgumentError(
                    "pydedup_predict_many takes an array of rows: ARRAY[[1, 2], ...]"
                )
            rows = self._calls().rows(model, features)
            return [_numbers(row) for row in rows]

    def predict_blob(self, model: str, features: bytes) -> bytes:
        """Return a prediction as bytes of float32, from such bytes."""
        with self._errors():
            return _as_blob(self._calls().one(model, [features]))

    def predict_json(self, model: str, features: str) -> str:
        """Return a prediction as JSON, from a JSON array."""
        with self._errors():
            return as_json(self._calls().row(model, [features]))

    def _calls(self) -> Calls:
        if self._store is not None:
            before, self._state = self._state, (*state_of(self._store._adapter), self._viewer())
            if before[0] != self._state[0]:  # another store: its tables were made anew
                self._ready = None
        if self._ready is None:
            adapter, memory, self._viewer = registry.inside_postgres(self._plpy, self._schema)
            store = Store(check_store(adapter), config.parse_memory(memory or POSTGRES_MEMORY))
            self._store, self._state = store, (*state_of(adapter), self._viewer())
            # Nothing is read ahead: that takes a thread, and a backend must have one alone.
            self._ready = Calls(
                store._catalog,
                store._pool,
                store._stored_tensor,
                lambda: self._state,
                ahead=False,
            )
        return self._ready

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise errors of ours as errors of the server, with a code that clients know."""
        try:
            yield
        except PydedupError as error:
            if self._store is not None and isinstance(error, CorruptStoreError):
                self._store._tell_hidden(error)
            code = next((code for kind, code in _CODES if isinstance(error, kind)), "XX000")
            self._plpy.error(str(error), sqlstate=code)


def _as_blob(array: Any) -> bytes:
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def _numbers(array: Any) -> list[float]:
    numbers: list[float] = np.asarray(array, dtype=np.float64).reshape(-1).tolist()
    return numbers


_CODES: tuple[tuple[type[PydedupError], str], ...] = (
    (ArgumentError, "22023"),  # invalid_parameter_value
    (NotFoundError, "42704"),  # undefined_object
    (BudgetError, "53200"),  # out_of_memory
    (CorruptStoreError, "XX001"),  # data_corrupted
)
