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
from typing import Any

import numpy as np

from pydedup import registry
from pydedup.errors import ArgumentError, PydedupError
from pydedup.serving.calls import Calls, as_json, one_output
from pydedup.store import Store
from pydedup.store import open as open_store

__all__ = ["SqlFunctions", "register"]


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
        store = known.main_file(connection)
    opened = None
    if not isinstance(store, Store):
        store = opened = open_store(store, mode="r", memory=memory)
    try:
        epoch = (lambda: known.epoch(connection)) if own else store._adapter.epoch
        functions = SqlFunctions(Calls(store._catalog, store._stored_tensor, epoch), opened)
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
        if features is None:
            return None
        predicted = one_output(self._calls.row(model, [features]), model)
        return np.ascontiguousarray(predicted, dtype="<f4").tobytes()

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
