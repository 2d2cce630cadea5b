# SPDX-License-Identifier: Apache-2.0
"""Predictions of stored models: batches cut to fit the budget, requests put together.

Deliberately not here: what layers compute (:mod:`pydedup.serving.engine`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup.arguments import as_array
from pydedup.catalog import StoredModel
from pydedup.errors import (
    ArgumentError,
    NotFoundError,
    PydedupError,
    UnsupportedFormatError,
    without_frames,
)
from pydedup.graph import Graph
from pydedup.matmul import room_for
from pydedup.pool import PagePool
from pydedup.serving.engine import Tensors, run_graph, run_together
from pydedup.serving.plan import Plan, is_planned_by_shapes, plan_run
from pydedup.serving.stacks import known_stacks, stacks_of
from pydedup.serving.tensor import TensorOf, called
from pydedup.text import listed

__all__ = [
    "Prediction",
    "as_input",
    "as_predicted",
    "by_name",
    "no_graph",
    "predict",
    "predict_together",
]

_Array: TypeAlias = NDArray[Any]
_Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...]

#: Shapes of inputs for which the plan of a model is remembered.
_MOST_SHAPES = 64


@dataclass(slots=True, eq=False)
class Prediction:
    """One request, checked: what a model is asked."""

    model: StoredModel
    graph: Graph
    inputs: dict[str, _Array]
    as_mapping: bool  # the result takes the form of what was given
    #: What it needs, or None when an input is missing.
    plan: Plan | None = field(init=False)
    #: Whether it is one row that was given without an axis for rows, which its result has neither.
    is_row: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.plan = _plan_of(self.model, self.graph, self.inputs)
        if self.graph.shapes and self.plan is not None:
            if all(self.inputs[n].ndim == len(shape) for n, shape in self.graph.shapes.items()):
                self._check_shapes(self.plan)
            else:
                self._check_ranks(self.plan)

    @classmethod
    def of(
        cls, model: StoredModel, graph: Graph, x: ArrayLike | Mapping[str, ArrayLike]
    ) -> Prediction:
        """Check a request. Raises ArgumentError when several inputs are taken and one was given."""
        as_mapping = isinstance(x, Mapping)
        inputs = {
            name: as_input(value, f"input {name!r}" if as_mapping else "x")
            for name, value in by_name(x, graph.inputs, model.address).items()
        }
        return cls(model, graph, inputs, as_mapping)

    def _check_shapes(self, plan: Plan) -> None:
        """Refuse inputs of other sizes than were declared, unless each row is by itself."""
        if plan.rows is not None and self._are_of_one_batch():
            return
        for name, shape in self.graph.shapes.items():
            if not _fit(self.inputs[name].shape, shape):
                raise self._refused(name, "that, or export it with axes of any size (dynamic axes)")

    def _check_ranks(self, plan: Plan) -> None:
        """Take a row that has no axis for rows as one; refuse what would be computed otherwise.

        Also what has more axes, or fewer, may be rows by themselves, unless nodes count axes.
        """
        declared, nodes = self.graph.shapes, self.graph.nodes
        counted = self.graph.counts_axes()
        if self._are_of_one_batch():
            if len(declared) == len(self.inputs) and all(
                _fit(value.shape, declared[name][1:]) for name, value in self.inputs.items()
            ):
                row = {name: value[None] for name, value in self.inputs.items()}
                alone = _plan_of(self.model, self.graph, row)
                if alone is not None and alone.rows is not None:
                    if counted:
                        self.inputs, self.plan, self.is_row = row, alone, True
                    return
            # What a model flattens first may be flat already.
            users = {node.op for node in nodes if not declared.keys().isdisjoint(node.inputs)}
            if plan.rows is not None and (not counted or users <= {"flatten", "reshape"}):
                return
        name = next(n for n, shape in declared.items() if self.inputs[n].ndim != len(shape))
        raise self._refused(name, f"{len(declared[name])} axes")

    def _are_of_one_batch(self) -> bool:
        return len({shape[:1] for shape in self.graph.shapes.values()}) == 1

    def _refused(self, name: str, needed: str) -> ArgumentError:
        sizes = ", ".join("any" if size == -1 else str(size) for size in self.graph.shapes[name])
        return ArgumentError(
            f"input {name!r} has shape {self.inputs[name].shape}, and {self.model.address} was "
            f"exported for ({sizes}), which is part of what it computes: give it {needed}"
        )

    def result(self, outputs: dict[str, _Array]) -> Any:
        """Return outputs in the form of what was given."""
        if self.is_row:
            outputs = {name: value[0] for name, value in outputs.items()}
        if self.as_mapping or len(self.graph.outputs) != 1:
            return outputs
        return outputs[self.graph.outputs[0]]


def _fit(given: Sequence[int], declared: Sequence[int]) -> bool:
    return len(given) == len(declared) and all(
        size in (-1, own) for size, own in zip(declared, given, strict=True)
    )


#: Of a model, its plans for inputs of some shapes, where they depend on nothing else.
_MEMO: Final = "plans"


def _plan_of(model: StoredModel, graph: Graph, inputs: Mapping[str, _Array]) -> Plan | None:
    """Return `plan_run`, which for small models takes a quarter of the time, once per shape."""
    shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
    known: dict[_Shapes, Plan | None] | None = model.memo.get(_MEMO)
    if known is not None and shapes in known:
        return known[shapes]
    plan = plan_run(graph, model.tensor, inputs)
    if is_planned_by_shapes(graph):
        if known is None or len(known) >= _MOST_SHAPES:
            model.memo[_MEMO] = known = {}
        known[shapes] = plan
    return plan


def by_name(
    x: ArrayLike | Mapping[str, ArrayLike], taken: Sequence[str], model: str
) -> Mapping[str, ArrayLike]:
    """Return inputs by name: what is no mapping is the only one, or ArgumentError is raised."""
    if isinstance(x, Mapping):
        return x
    if len(taken) != 1:
        raise ArgumentError(f"{model} takes several inputs: {', '.join(taken)}")
    return {taken[0]: x}


def as_input(x: ArrayLike, name: str) -> _Array:
    """Return an input as an array, a torch tensor's elements too. Raises ArgumentError."""
    try:
        return as_array(x, name)
    except ArgumentError:
        from pydedup.formats import torch_tensors  # of use here alone

        tensor: Any = x
        if not torch_tensors.is_tensor(tensor):
            raise
        try:  # numpy does not read bf16, nor what requires a gradient
            torch_tensors.torch_entry(name, tensor, name)
            return torch_tensors.to_numpy(tensor)
        except UnsupportedFormatError as error:
            raise ArgumentError(str(error)) from error


def no_graph(model: StoredModel, needed: str = "") -> NotFoundError:
    """Return the error of a model that has no graph, or raise that it was removed."""
    from pydedup.formats.infer_keras import unknown_layers  # of use here alone
    from pydedup.formats.keras import CONFIG

    model.check_live()
    layers = unknown_layers(model.artifact(CONFIG) or b"")
    if layers:
        return NotFoundError(
            f"{model.address} has no graph to predict with{needed}, as pydedup does not run its "
            f"Keras layers {listed(layers)}; export it with model.export('model.onnx', "
            "format='onnx'), and add that"
        )
    return NotFoundError(
        f"{model.address} has no graph to predict with{needed}; add it from an ONNX file, or from "
        "Keras or a torch.nn.Sequential of layers that pydedup knows, describe its layers by "
        "add(graph=...), or give store.attach() a torch module of its architecture"
    )


def predict(request: Prediction, tensor_of: TensorOf, pool: PagePool, *, ahead: bool = True) -> Any:
    """Predict, in pieces of as many rows as the budget for activations lets in.

    Without ``ahead`` nothing is read ahead on a thread, where a process must have one alone.

    Raises what `pydedup.serving.engine.run_graph` does.
    """
    made = _at_once(request, pool)
    if made is None:
        with pool.call(called(request.model)) if ahead else contextlib.nullcontext():
            made = _run(request, tensor_of, pool)
    elif ahead:
        pool.count_call(called(request.model))
    return request.result(made)


def _at_once(request: Prediction, pool: PagePool) -> dict[str, _Array] | None:
    """Return what a model gives that is one chain whose pages are all in memory, else None.

    For a small one, all else takes longer than its products.
    """
    plan, stacks = request.plan, known_stacks(request.model)
    if plan is None or stacks is None or not plan.fits_in(_most(pool)):
        return None
    with pool.activations(plan.nbytes):
        return stacks.run_whole(request.inputs)


def _most(pool: PagePool) -> int:
    """Return how many bytes the activations of one prediction take: two can predict at a time."""
    return pool.activation_bytes // 2


def _run(request: Prediction, tensor_of: TensorOf, pool: PagePool) -> dict[str, _Array]:
    model, graph, plan = request.model, request.graph, request.plan
    tensors = _tensors(model, tensor_of)
    stacks = stacks_of(model, graph, tensor_of, pool)
    most = _most(pool)
    if plan is None or plan.rows is None or plan.fits_in(most):
        with pool.activations(0 if plan is None else plan.nbytes):
            return run_graph(graph, tensors, request.inputs, stacks)
    outputs: dict[str, _Array] = {}
    stop = 0
    while stop < plan.rows:
        at, stop = stop, plan.end(stop, most)
        with pool.activations(plan.share(at, stop)):
            part = run_graph(graph, tensors, plan.part(request.inputs, at, stop), stacks)
        for name, value in part.items():
            if name not in outputs:
                outputs[name] = room_for((plan.rows, *value.shape[1:]), value.dtype)
            outputs[name][at:stop] = value
    return outputs


def predict_together(
    requests: Sequence[Prediction], tensor_of: TensorOf, pool: PagePool
) -> list[Any]:
    """Return the result of each request, or the `PydedupError` that it met.

    Requests of models with the same layers go through them together, where the budget for
    activations lets them.
    """
    made = dict(as_predicted(requests, tensor_of, pool))
    return [made[place] for place in range(len(requests))]


def as_predicted(
    requests: Sequence[Prediction], tensor_of: TensorOf, pool: PagePool
) -> Iterator[tuple[int, Any]]:
    """Do what `predict_together` does; yield each request's number and result once it is there."""
    for places in _groups(requests, _most(pool)):
        group = [requests[place] for place in places]
        try:
            made = _run_group(group, tensor_of, pool) if len(group) > 1 else None
        except Exception:  # a MemoryError, too, may be that of one
            made = None  # whose fault it is shows when each is alone
        for number, place in enumerate(places):
            try:
                result = (
                    predict(group[number], tensor_of, pool)
                    if made is None
                    else group[number].result(made[number])
                )
            except PydedupError as error:
                result = without_frames(error)  # it may be kept while others are predicted
            yield place, result


def _groups(requests: Sequence[Prediction], limit: int) -> list[list[int]]:
    """Return which requests run together: same layers, and activations that fit."""
    groups: list[list[int]] = []
    begun: dict[object, tuple[list[int], int]] = {}
    for place, request in enumerate(requests):
        plan = request.plan
        if plan is None or not plan.fits or plan.nbytes > limit:
            groups.append([place])
            continue
        key = request.model.layers_key
        group, nbytes = begun.get(key, ([], limit + 1))
        if nbytes + plan.nbytes > limit:
            group, nbytes = [], 0
            groups.append(group)
        group.append(place)
        begun[key] = group, nbytes + plan.nbytes
    return groups


def _run_group(
    group: Sequence[Prediction], tensor_of: TensorOf, pool: PagePool
) -> list[dict[str, _Array]]:
    """Run requests of one kind: those of one model as one batch, models side by side."""
    plans = [request.plan for request in group]
    batches: dict[object, list[int]] = {}
    for number, (request, plan) in enumerate(zip(group, plans, strict=True)):
        shapes = tuple(
            (name, value.dtype.str, value.shape[1:]) for name, value in request.inputs.items()
        )
        apart = plan is not None and plan.rows is not None and not plan.bags
        batches.setdefault((request.model.row.id, shapes) if apart else number, []).append(number)
    runs = []
    for numbers in batches.values():
        first = group[numbers[0]]
        inputs = {
            name: np.concatenate([group[number].inputs[name] for number in numbers])
            if len(numbers) > 1
            else first.inputs[name]
            for name in first.inputs
        }
        runs.append((_tensors(first.model, tensor_of), inputs))
    models = {request.model.row.id: request.model for request in group}
    nbytes = sum(plan.nbytes for plan in plans if plan is not None)
    if len(runs) > 1:
        # Rows of several models are put together, and packed once more for what one alone has.
        nbytes *= 2
    with pool.call(*map(called, models.values())), pool.activations(nbytes):
        model, graph = group[0].model, group[0].graph
        stacks = stacks_of(model, graph, tensor_of, pool) if len(runs) == 1 else None
        made = run_together(graph, runs, stacks)
    outputs: list[dict[str, _Array]] = [{} for _ in group]
    for numbers, batch in zip(batches.values(), made, strict=True):
        at = 0
        for number in numbers:
            rows = plans[number].rows if len(numbers) > 1 else None  # type: ignore[union-attr]
            for name, value in batch.items():
                # A copy: a result does not keep those of others in memory.
                outputs[number][name] = value if rows is None else value[at : at + rows].copy()
            at += rows or 0
    return outputs


def _tensors(model: StoredModel, tensor_of: TensorOf) -> Tensors:
    return lambda name: tensor_of(model, name)
