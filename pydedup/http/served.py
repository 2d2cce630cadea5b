# SPDX-License-Identifier: Apache-2.0
"""A store as a server needs it: an address resolved once, metadata, the cache by model.

Everything here may wait for the database, so it is called from threads, never from the event loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import StoredModel, another_store
from pydedup.errors import BudgetError, PydedupError, UnavailableError, UnsupportedFormatError
from pydedup.formats.onnx import GRAPH as ONNX_GRAPH
from pydedup.graph import Graph
from pydedup.http.datatypes import answer_bytes
from pydedup.http.onnx_signature import onnx_signature
from pydedup.registry import place_of
from pydedup.replacement import DEFAULT_POLICY
from pydedup.serving.predict import Prediction, as_predicted, no_graph
from pydedup.serving.signature import Signature, signature_of, weights_of
from pydedup.store import Store
from pydedup.types import GRAPH_ARTIFACT
from pydedup.words import Replacement

__all__ = ["NO_GRAPH", "Admit", "Arrays", "IndexEntry", "Outcome", "Served", "ServedStore"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
#: Counts what a request takes beside the budget, or raises why it may not: bytes of its outputs,
#: and those that activations take more than the budget lets them.
Admit: TypeAlias = Callable[[int, int], None]
#: Outputs by name, or what was raised.
Outcome: TypeAlias = dict[str, NDArray[Any]] | Exception

#: The hindrance of a model whose layers are not known.
NO_GRAPH = "it has no graph to predict with"
#: Models whose signature is remembered.
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One version of a model, with what it takes to predict with it.

    Without ``graph`` it is run by ONNX Runtime.
    """

    row: ModelRow
    graph: Graph | None
    signature: Signature

    @property
    def name(self) -> str:
        """The model's name."""
        return self.row.name

    @property
    def version(self) -> str:
        """The version that an address meant."""
        return self.row.version

    @property
    def address(self) -> str:
        """``name@version``."""
        return self.row.address


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository's index; ``hindrance``, if any, says why it cannot predict."""

    name: str
    version: str
    hindrance: str


class ServedStore(Store):
    """A store that is being served; for reading only."""

    def __init__(
        self, adapter: Adapter, memory_bytes: int, replacement: Replacement = DEFAULT_POLICY
    ) -> None:
        super().__init__(adapter, memory_bytes, replacement)
        # By row, since the same name@version may be another model later.
        self._known: dict[int, Served] = {}
        self._hindrances: dict[int, str] = {}

    @classmethod
    def connect(
        cls, url: str, memory: str | int, replacement: Replacement = DEFAULT_POLICY
    ) -> Self:
        """Open a store that is there. Raises what `pydedup.open` does."""
        url = place_of(url)
        return cls._connect(url, "r", memory, None, replacement)

    def limit_loops(self, seconds: float) -> None:
        """End predictions of ONNX graphs with loops that take longer; nobody waits any more."""
        self._loop_seconds = seconds

    def served(self, address: str) -> Served:
        """Return what an address means now.

        Raises NotFoundError when there is no such model, or it has no graph to predict with,
        UnsupportedFormatError where what runs it is not installed.
        """
        row = self._catalog.resolve(address)
        found = self._known.get(row.id)
        if found is None:
            found = self._look_at(self._catalog.of_row(row))
            self._known[row.id] = found
            for oldest in list(self._known)[:-_REMEMBERED]:
                self._known.pop(oldest, None)
        return found

    def ready(self, address: str) -> Served:
        """Do what `served` does, for a model that can be predicted with.

        Raises BudgetError where its weights are more than the memory ever has room for,
        UnsupportedFormatError where what runs it does not take its graph.
        """
        found = self.served(address)
        if found.graph is None:
            self._prepare(found.row)
        return found

    def _prepare(self, row: ModelRow) -> None:
        """Make a model of ONNX Runtime ready; what it is refused for, the index tells from then."""
        from pydedup.serving.onnx_session import prepare_onnx

        model = self._catalog.of_row(row)
        try:
            prepare_onnx(model, *self._onnx_parts(model), self._pool)
        except UnsupportedFormatError as error:
            self._hindrances[row.id] = str(error)
            raise

    def _look_at(self, model: StoredModel) -> Served:
        row, graph = model.row, model.graph()
        if graph is not None:
            return Served(row, graph, signature_of(graph, weights_of(model, graph)))
        payload = model.artifact(ONNX_GRAPH)
        if payload is None:
            raise no_graph(model)
        return Served(row, None, onnx_signature(payload, row.address))

    def predict_served(
        self, asks: Sequence[tuple[Served, Arrays, Admit]]
    ) -> Iterator[tuple[int, Outcome]]:
        """Do what `predict_many` does, of models that are resolved already.

        What a request takes beside the budget is known, and admitted, before anything runs; of one
        that ONNX Runtime runs, when it is there.

        Yields
        ------
        number, outcome
            Of each request, as soon as it is there: its outputs by name, or what was raised. Those
            of ONNX Runtime, which are run one by one, come last.
        """
        ready: list[tuple[int, Prediction]] = []
        others: list[tuple[int, StoredModel, Arrays, Admit]] = []
        for number, (served, inputs, admit) in enumerate(asks):
            try:
                model = self._catalog.of_row(served.row)
                if served.graph is None:
                    others.append((number, model, inputs, admit))
                    continue
                prediction = Prediction.of(model, served.graph, inputs)
                plan = prediction.plan
                if plan is not None:
                    admit(plan.out_nbytes, plan.beyond(self._pool.activation_bytes))
                ready.append((number, prediction))
            except Exception as error:  # told to this one alone
                yield number, error
        yield from self._together(ready)
        for number, model, inputs, admit in others:
            try:
                outcome = self._predict_onnx(model, inputs)
                admit(sum(map(answer_bytes, outcome.values())), 0)
            except Exception as error:
                outcome = error
                known = self._hindrances.get(model.row.id)
                if isinstance(error, UnsupportedFormatError) and not known:
                    with contextlib.suppress(PydedupError):  # of these inputs, or of all?
                        self._prepare(model.row)
            yield number, outcome

    def _together(self, ready: list[tuple[int, Prediction]]) -> Iterator[tuple[int, Outcome]]:
        left = dict(ready)
        try:
            made = as_predicted([one for _, one in ready], self._stored_tensor, self._pool)
            for place, outcome in made:
                number = ready[place][0]
                del left[number]
                yield number, outcome
        except Exception as error:
            # No error of ours, such as MemoryError: smaller parts may do.
            if len(left) <= 1:
                yield from ((number, error) for number in left)
                return
            rest = list(left.items())
            yield from self._together(rest[: len(rest) // 2])
            yield from self._together(rest[len(rest) // 2 :])

    def version_names(self, name: str) -> list[str]:
        """Return the versions of a model, oldest first."""
        return [row.version for row in self._adapter.models(name=name)]

    def index(self) -> list[IndexEntry]:
        """Return all models, ordered by name, then age, but for those whose row is damaged."""
        with only_sound_rows(self._adapter):
            rows = sorted(self._adapter.models(), key=lambda row: (row.name, row.id))
        entries = [IndexEntry(row.name, row.version, self._hindrance(row)) for row in rows]
        for gone in self._hindrances.keys() - {row.id for row in rows}:
            self._hindrances.pop(gone, None)
        return entries

    def _hindrance(self, row: ModelRow) -> str:
        known = self._hindrances.get(row.id)
        if known is None:
            try:
                known = self._lasting_hindrance(row)
            except UnavailableError:  # a shard with a graph: all else is listed and served
                return ""
            except PydedupError as error:  # what is damaged may be mended
                return str(error)
            known = self._hindrances.setdefault(row.id, known)
        return known

    def _lasting_hindrance(self, row: ModelRow) -> str:
        """Return what a model is refused for as long as it is there, as far as its graph tells."""
        from pydedup.serving.onnx_session import check_that_it_may_fit
        from pydedup.serving.onnx_values import is_installed

        names = {name for name, _ in self._adapter.artifacts(row.id)}
        if GRAPH_ARTIFACT in names:  # not read: large ones lie on pages, which take time to come
            return ""
        if ONNX_GRAPH not in names:
            return NO_GRAPH
        if not is_installed():
            return "the extra onnx is not installed here"
        model = self._catalog.of_row(row)
        try:
            self._look_at(model)
            check_that_it_may_fit(model, self._pool)
        except UnsupportedFormatError as error:
            return str(error)
        except BudgetError as error:
            if not error.never:
                raise
            return str(error)
        return ""

    def ping(self) -> None:
        """Ask the database something small.

        Raises UnavailableError when it does not answer, and once it was found to be another store
        than the one that was opened, or one that was restored since.
        """
        self._adapter.epoch()
        if self._pool.outdated:
            raise another_store(self._adapter, self._pool)

    def cool(self, address: str) -> int:
        """Forget the pages that only this model reads; returns how many there are."""
        row = self._catalog.resolve(address)
        mine = {page for _, page, _, _ in self._adapter.model_pages(row.id)}
        others = {page for owner, page in self._adapter.readers_of([*mine]) if owner != row.id}
        alone = sorted(mine - others)
        self._catalog.forget(row.id)
        self._known.pop(row.id, None)
        self._pool.drop(alone)
        return len(alone)

    def pool_stats(self) -> dict[str, int]:
        """Return what the buffer pool counts; asks no database."""
        return self._pool.stats()
