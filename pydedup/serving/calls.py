# SPDX-License-Identifier: Apache-2.0
"""What functions of SQL call: one row predicted, at the cost of little more than the product.

An address is looked up once per state of the store: its epoch grows with every change of an alias.
What is known of a model is kept from call to call. Where both are read as the statement under way
sees them, all rows of the statement are predicted by one version, also when it names more models
than are kept.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import ArgumentError
from pydedup.pool import PagePool
from pydedup.serving.features import features_of, graph_of, input_kind
from pydedup.serving.predict import Prediction, predict
from pydedup.serving.signature import weights_of
from pydedup.serving.tensor import TensorOf, stored_tensor

__all__ = ["Calls", "StoreState", "as_json", "state_of"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
Array = NDArray[Any]
#: The id of a store, which is another when its tables were made anew, its epoch, and who asks
#: where that may change.
StoreState = tuple[str, ...]
#: Addresses, and models, that are kept ready.
_KEPT: Final = 64


class _Ready:
    """A model with all that a prediction needs of it."""

    def __init__(
        self, model: StoredModel, tensor_of: TensorOf, pool: PagePool, ahead: bool
    ) -> None:
        self.model = model
        self.address = model.address
        self.graph = graph_of(model)
        self.kind = input_kind(self.graph, weights_of(model, self.graph), self.address)
        self._tensors = {name: tensor_of(model, name) for name in self.graph.tensors()}
        self._pool, self._ahead = pool, ahead

    def run(self, rows: Array) -> Any:
        """Predict rows: one output as it is, several by name."""
        request = Prediction(self.model, self.graph, {self.graph.inputs[0]: rows}, False)
        return predict(
            request, lambda model, name: self._tensors[name], self._pool, ahead=self._ahead
        )


class Calls:
    """Predictions from one store, asked for a row at a time.

    Parameters
    ----------
    tensor_of
        Returns a tensor of a model.
    state
        Returns which store it is, and its epoch, as the statement under way sees it.
    seen
        The store as that statement sees it, where the one of the catalog may be newer.
    ahead
        Whether pages may be read ahead, on a thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        pool: PagePool,
        tensor_of: TensorOf,
        state: Callable[[], StoreState],
        *,
        seen: Adapter | None = None,
        ahead: bool = True,
    ) -> None:
        self._catalog, self._state = catalog, state
        self._resolve = (catalog if seen is None else Catalog(seen)).resolve
        if not ahead:  # with tensors that are no prediction of a model
            tensor_of = partial(stored_tensor, pool=pool)
        self._make = partial(_Ready, tensor_of=tensor_of, pool=pool, ahead=ahead)
        self._addresses: OrderedDict[str, tuple[StoreState, _Ready]] = OrderedDict()
        self._models: OrderedDict[int, _Ready] = OrderedDict()

    def address(self, model: str) -> str:
        """Return ``name@version`` of what an address means. Raises NotFoundError."""
        return self._ready(model).address

    def row(self, model: str, values: Sequence[object]) -> Any:
        """Return what a model predicts for a row: an array, or arrays by name.

        Raises ArgumentError for features that do not fit, NotFoundError.
        """
        ready = self._ready(model)
        predicted = ready.run(features_of(values, _names(len(values)), ready.kind)[None])
        if isinstance(predicted, Mapping):
            return {name: _only(array) for name, array in predicted.items()}
        return _only(predicted)

    def one(self, model: str, values: Sequence[object]) -> Array:
        """Return what a model of one output predicts for a row, as `row` does."""
        return _one_output(self.row(model, values), model)

    def rows(self, model: str, rows: Sequence[Sequence[object]]) -> Array:
        """Return what a model of one output predicts for rows of one length each, flat per row."""
        ready = self._ready(model)
        if not rows:
            return np.zeros((0, 0), np.float32)
        names, made = _names(len(rows[0])), []
        for number, values in enumerate(rows, 1):
            try:
                made.append(features_of(values, names, ready.kind))
            except ArgumentError as error:
                raise ArgumentError(f"row {number}: {error}") from error
        predicted = _one_output(ready.run(np.stack(made)), model)
        if predicted.ndim == 0 or len(predicted) != len(rows):
            raise ArgumentError(
                f"{ready.address} gives an output of shape {predicted.shape} for {len(rows)} rows"
            )
        return predicted.reshape(len(rows), -1)

    def _ready(self, address: str) -> _Ready:
        if not isinstance(address, str):
            raise ArgumentError(
                "the model must be a text, name@version, not "
                f"{'NULL' if address is None else repr(address)}"
            )
        state = self._state()
        known = self._addresses.get(address)
        if known is not None and known[0] == state:
            return known[1]
        row = self._resolve(address)
        model = self._catalog.of_row(row)  # raises where another store has taken the place
        ready = self._models.get(row.id)
        if ready is None:
            ready = self._make(model)
            _keep(self._models, row.id, ready)
        _keep(self._addresses, address, (state, ready))
        return ready


@lru_cache(maxsize=_KEPT)
def _names(count: int) -> tuple[str, ...]:
    """Return what messages call the features of a row."""
    return tuple(f"feature {number}" for number in range(1, count + 1))


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Put a value in the last place, and leave out what has been there for longest."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > _KEPT:
        kept.popitem(last=False)


def state_of(adapter: Adapter) -> StoreState:
    """Return the state of a store."""
    meta = adapter.meta()
    return meta.get("store_id", ""), meta.get("epoch", "")


def _only(predicted: Array) -> Array:
    array = np.asarray(predicted)
    if array.ndim == 0 or len(array) != 1:
        raise ArgumentError(f"the model gives an output of shape {array.shape} for one row")
    return np.asarray(array[0])


def _one_output(predicted: Any, model: str) -> Array:
    """Return the output of a model that has one. Raises ArgumentError."""
    if isinstance(predicted, Mapping):
        raise ArgumentError(
            f"{model} has several outputs ({', '.join(predicted)}); ask for JSON, which names them"
        )
    return np.asarray(predicted)


def as_json(predicted: Any) -> str:
    """Return a prediction as JSON: a list, or lists by name; NaN and infinities are ``null``."""
    if isinstance(predicted, Mapping):
        return json.dumps({name: _plain(array) for name, array in predicted.items()})
    return json.dumps(_plain(np.asarray(predicted)))


def _plain(array: Array) -> list[float | None]:
    """Return the numbers of an array, as JSON has them."""
    numbers = np.asarray(array, dtype=np.float64).reshape(-1).tolist()
    return [number if math.isfinite(number) else None for number in numbers]
