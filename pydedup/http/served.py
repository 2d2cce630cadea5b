# SPDX-License-Identifier: Apache-2.0
"""A store as a server needs it: resolving an address once, metadata, the cache by model.

Everything here may wait for the database, so it is called from threads, never from the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pydedup import config
from pydedup.adapter import Adapter
from pydedup.catalog import StoredModel
from pydedup.errors import NotFoundError
from pydedup.formats.onnx import GRAPH as ONNX_GRAPH
from pydedup.graph import Graph
from pydedup.http.onnx_signature import onnx_signature
from pydedup.http.shapes import Signature, Weight, signature_of
from pydedup.opening import connect_store
from pydedup.store import Store
from pydedup.types import GRAPH_ARTIFACT

__all__ = ["IndexEntry", "Served", "ServedStore"]

#: Models whose signature is remembered.
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One version of a model, with what it takes to predict with it.

    Without ``graph`` it is run by ONNX Runtime, and its weights are not told.
    """

    id: int
    name: str
    version: str
    graph: Graph | None
    weights: Mapping[str, Weight]
    signature: Signature

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository's index."""

    name: str
    version: str
    has_graph: bool


class ServedStore(Store):
    """A store that is being served; for reading only."""

    def __init__(self, adapter: Adapter, memory_bytes: int) -> None:
        super().__init__(adapter, memory_bytes)
        # By row, since the same name@version may be another model later.
        self._known: dict[int, Served] = {}
        self._graphs: dict[int, bool] = {}

    @classmethod
    def connect(cls, url: str, memory: str | int) -> Self:
        """Open a store that is there. Raises what `pydedup.open` does."""
        budget = config.parse_bytes(memory)
        adapter = connect_store(url, mode="r")
        try:
            return cls(adapter, budget)
        except BaseException:
            adapter.close()
            raise

    def served(self, address: str) -> Served:
        """Return what an address means now.

        Raises
        ------
        NotFoundError
            When there is no such model, or it has no graph to predict with.
        """
        row = self._catalog.resolve(address)
        found = self._known.get(row.id)
        if found is None:
            found = self._look_at(self._catalog.of_row(row))
            self._known[row.id] = found
            for oldest in list(self._known)[:-_REMEMBERED]:
                self._known.pop(oldest, None)
        return found

    def _look_at(self, model: StoredModel) -> Served:
        row, graph = model.row, model.graph()
        if graph is not None:
            tensors = {name: model.tensor(name) for name in graph.tensors()}
            weights = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            signature = signature_of(graph, weights)
            return Served(row.id, row.name, row.version, graph, weights, signature)
        payload = self._adapter.artifact(row.id, ONNX_GRAPH)
        if payload is None:
            raise NotFoundError(
                f"{model.address} has no graph to predict with; add it with graph=..., or from "
                "a torch.nn.Sequential, Keras or ONNX model"
            )
        return Served(row.id, row.name, row.version, None, {}, onnx_signature(payload))

    def version_names(self, name: str) -> list[str]:
        """Return the versions of a model, oldest first."""
        return [row.version for row in self._adapter.models(name=name)]

    def index(self) -> list[IndexEntry]:
        """Return all models, ordered by name, then age."""
        rows = sorted(self._adapter.models(), key=lambda row: (row.name, row.id))
        for row in rows:
            if row.id not in self._graphs:  # a published model's artifacts never change
                names = {name for name, _ in self._adapter.artifacts(row.id)}
                self._graphs[row.id] = bool(names & {GRAPH_ARTIFACT, ONNX_GRAPH})
        live = {row.id for row in rows}
        for gone in [number for number in list(self._graphs) if number not in live]:
            self._graphs.pop(gone, None)
        return [IndexEntry(row.name, row.version, self._graphs[row.id]) for row in rows]

    def ping(self) -> None:
        """Ask the database something small. Raises UnavailableError when it does not answer."""
        self._adapter.epoch()

    def cool(self, address: str) -> int:
        """Forget the pages that only this model reads; returns how many there are."""
        row = self._catalog.resolve(address)
        mine = {page for _, page, _, _ in self._adapter.model_pages(row.id)}
        live = {other.id for other in self._adapter.models()} - {row.id}
        others = {page for owner, page, _, _ in self._adapter.model_pages() if owner in live}
        alone = sorted(mine - others)
        self._catalog.forget(row.id)
        self._known.pop(row.id, None)
        self._pool.drop(alone)
        return len(alone)

    def pool_stats(self) -> dict[str, int]:
        """Return what the buffer pool counts; asks no database."""
        return self._pool.stats()
