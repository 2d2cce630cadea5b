# SPDX-License-Identifier: Apache-2.0
"""What predicts with the models of a store: a part of `Store`.

As in `pydedup.store`, what opening and predicting do not need is imported where it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from numpy.typing import ArrayLike

from pydedup.adapter import Adapter
from pydedup.adapter_options import tell_hidden, tells_hidden
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import ArgumentError, CorruptStoreError, PageNotFoundError, PydedupError
from pydedup.graph import Graph
from pydedup.opening import open_rows
from pydedup.pool import PagePool
from pydedup.registry import place_of
from pydedup.replacement import Trace
from pydedup.serving.predict import Prediction, no_graph, predict, predict_together
from pydedup.serving.tensor import StoredTensor, called, stored_tensor
from pydedup.types import Progress, ScoreReport, check_progress
from pydedup.words import OnError

if TYPE_CHECKING:
    import torch

__all__ = ["StorePredictions"]

#: A torch.nn.Module; named so that no torch is needed to import this file.
Module = TypeVar("Module", bound="torch.nn.Module")

# Rows that are scored at a time.
_BATCH: Final = 1024


def _wrong_width(request: Prediction) -> ArgumentError | None:
    """Return a better error for a request that a layer refused, if its features are miscounted."""
    from pydedup.serving.signature import inputs_of, weights_of

    inputs = request.graph.inputs
    if len(inputs) != 1 or inputs[0] not in request.inputs:
        return None
    (spec,) = inputs_of(request.graph, weights_of(request.model, request.graph))
    width = spec.width
    x = request.inputs[inputs[0]]
    if x.ndim not in (1, 2) or width in (None, x.shape[-1]):  # a row may come without an axis
        return None
    return ArgumentError(f"{request.model.address} takes {width} features, and x has {x.shape[-1]}")


def _told(request: Prediction, result: Any) -> Any:
    """Return the result of a request; for a wrong number of features, the error that says so."""
    if isinstance(result, ArgumentError):
        return _wrong_width(request) or result
    return result


def _pair(request: object) -> tuple[str, Any]:
    """Return a request of `StorePredictions.predict_many`; a text of two letters is no pair."""
    if not isinstance(request, tuple | list) or len(request) != 2:
        raise ArgumentError(f"a request must be a pair of a model and its input, not {request!r}")
    return request[0], request[1]


class StorePredictions:
    """Predictions with models whose weights stay in the store."""

    _adapter: Adapter
    _catalog: Catalog
    _pool: PagePool
    #: How long a prediction may take whose graph has loops, for ONNX Runtime.
    _loop_seconds: float | None = None

    @tells_hidden
    def tensor(self, name: str, tensor: str) -> StoredTensor:
        """Return one tensor to compute with where it lies. Raises NotFoundError."""
        return self._stored_tensor(self._catalog.model(name), tensor)

    @tells_hidden
    def predict(self, name: str, x: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Predict with a model whose graph the store knows, streaming its weights.

        ``x`` is an array, or a mapping of input names to arrays, and the result has the same form.
        It is float32 or float64 (docs/serving.md says which), of the shape that the layers give:
        for linear layers, (rows, features) become (rows, outputs).

        Raises NotFoundError (also when the model has no graph) and ArgumentError for inputs that
        do not fit. An ONNX model that has loops computes for as long as these go on, which may be
        for ever; in the main thread Ctrl-C ends it.
        """
        model = self._catalog.model(name)
        graph = model.graph()
        if graph is None:
            return self._predict_onnx(model, x)
        request = Prediction.of(model, graph, x)
        try:
            return predict(request, self._stored_tensor, self._pool)
        except ArgumentError as error:
            told = _told(request, error)
            if told is error:
                raise
            raise told from None

    def predict_many(
        self, requests: Sequence[tuple[str, ArrayLike | Mapping[str, ArrayLike]]]
    ) -> list[Any]:
        """Predict for several models at once.

        Requests for models with the same layers share the work: a block that several of them have
        is read and multiplied once for all their rows. Sums are added up in another order, so
        results may differ from those of `predict` in the last bits.

        Parameters
        ----------
        requests
            Pairs of a model and what `predict` takes for it; each name is resolved once.

        Returns
        -------
        list
            For each request what `predict` returns, or the `PydedupError` that it would raise.

        Raises
        ------
        ArgumentError
            When a request is no such pair.
        """
        results: list[Any] = []
        if not isinstance(requests, Iterable):
            raise ArgumentError(
                f"requests must be pairs of a model and its input, not {requests!r}"
            )
        for name, x in map(_pair, requests):
            try:
                model = self._catalog.model(name)
                graph = model.graph()
                if graph is None:
                    results.append(self._predict_onnx(model, x))
                else:
                    results.append(Prediction.of(model, graph, x))
            except PydedupError as error:
                results.append(error)
        ready = [one for one in results if isinstance(one, Prediction)]
        made = iter(predict_together(ready, self._stored_tensor, self._pool))
        results = [
            _told(one, next(made)) if isinstance(one, Prediction) else one for one in results
        ]
        for result in results:
            if isinstance(result, CorruptStoreError):
                self._tell_hidden(result)
        return results

    @tells_hidden
    def attach(self, module: Module, name: str, *, prefix: str = "") -> Module:
        """Make a torch module compute with a model's weights where they lie, and return it.

        In place, for predictions only; its own weights are freed. ``prefix`` is what names in the
        store have in front of those in the module. See docs/attach.md. Raises NotFoundError, and
        ArgumentError when module and model do not fit; the module is then unchanged.
        """
        from pydedup.formats.torch_tensors import require_torch

        require_torch("attach")
        from pydedup.serving import layers

        layers.attach(module, name, self._catalog, self._pool, self._adapter.epoch, prefix)
        return module

    @tells_hidden
    def detach(self, module: Module) -> Module:
        """Make an attached module a plain one, with the weights loaded, and return it.

        Raises ArgumentError for a module that is not attached to this store as a whole, or that the
        version which its address means now does not fit, and NotFoundError when the model was
        removed; the module then stays attached.
        """
        from pydedup.formats.torch_tensors import require_torch

        require_torch("detach")
        from pydedup.serving import layers

        layers.detach(module, self._catalog)
        return module

    @tells_hidden
    def score(
        self,
        query: str,
        model: str,
        *,
        into: str,
        key: str | None = None,
        batch: int = _BATCH,
        source: str | os.PathLike[str] | None = None,
        on_error: OnError = "fail",
        progress: Progress | None = None,
    ) -> ScoreReport:
        """Predict each row of a query, and write the predictions to a table of the same database.

        After an interruption, running it again continues: rows whose key is in the table are
        skipped, and an alias stays the version that it was. See docs/scoring.md.

        Parameters
        ----------
        query
            One SELECT: a key that is unique, then the features, a column each, or one column of
            bytes (float32 in little-endian order), JSON or an array.
        model
            ``name`` (its newest version), ``name@version`` or ``name@alias``.
        into
            The table; created with the key, the prediction and the model when it is missing.
        key
            Column of the query that is the key; the first by default.
        batch
            Rows that are predicted and written at a time.
        source
            URL of the database to read and write, if it is not that of the store.
        on_error
            What to do with a row that cannot be predicted: ``"fail"`` ends the work, with nothing
            of its batch written; ``"skip"`` leaves it out and counts it.
        progress
            Called as ``progress("scoring", done, 0)``, in rows.

        Raises
        ------
        ArgumentError, NotFoundError, ReadOnlyError, ConflictError, UnavailableError
        """
        from pydedup.serving.score import score_rows

        source = None if source is None else place_of(source)
        check_progress(progress)
        with open_rows(self._adapter, source) as rows:
            return score_rows(
                self._adapter,
                self._catalog,
                rows,
                lambda stored, x: self.predict(stored.address, x),
                query,
                model,
                into=into,
                key=key,
                batch=batch,
                on_error=on_error,
                progress=progress,
            )

    @tells_hidden
    def graph(self, name: str) -> Graph | None:
        """Return the graph that `predict` runs, if the store knows one. Raises NotFoundError."""
        return self._catalog.model(name).graph()

    @tells_hidden
    def warm(self, name: str) -> int:
        """Read a model's pages into the pool, as many as fit; returns how many it holds.

        Raises NotFoundError, CorruptStoreError.
        """
        with contextlib.suppress(PageNotFoundError):
            return self._pool.warm(self._catalog.model(name).page_ids())
        # A vacuum moved its blocks to other pages, or it was removed.
        return self._pool.warm(self._catalog.model(name).page_ids())

    def record(self, max_uses: int = 1_000_000) -> None:
        """Record the uses of pages from now on, 16 bytes each; ``max_uses=0`` ends it."""
        self._pool.record(max_uses)

    def recorded(self) -> Trace:
        """Return the recorded uses so far, to save, to replay, or for `report`."""
        return self._pool.recorded()

    # ---- inside -------------------------------------------------------------------------------

    def _predict_onnx(self, model: StoredModel, x: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Predict with a model that was ONNX and has operations that we do not run ourselves."""
        from pydedup.serving.onnx_session import run_onnx

        outputs = run_onnx(model, *self._onnx_parts(model), self._pool, x, self._loop_seconds)
        return outputs if isinstance(x, Mapping) or len(outputs) > 1 else outputs.popitem()[1]

    def _onnx_parts(
        self, model: StoredModel
    ) -> tuple[Callable[[], bytes], Callable[[str], StoredTensor]]:
        """Return how the graph of such a model is read, and how its tensors are."""
        from pydedup.formats.onnx import GRAPH

        def payload() -> bytes:
            found = model.artifact(GRAPH)
            if found is None:
                raise no_graph(model)
            return found

        return payload, lambda tensor: self._stored_tensor(model, tensor)

    def _tell_hidden(self, error: CorruptStoreError) -> None:
        """Do what `tells_hidden` does of a method, for an error that is no method's."""
        tell_hidden(self._adapter, error)

    def _stored_tensor(self, model: StoredModel, name: str) -> StoredTensor:
        return stored_tensor(model, name, self._pool, lambda: self._pool.call(called(model)))
