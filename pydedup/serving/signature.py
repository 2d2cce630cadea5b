# SPDX-License-Identifier: Apache-2.0
"""Which inputs a graph takes and what it returns, as far as its weights tell.

A stored graph names its inputs and says nothing of their shapes. What a weight is multiplied with
has one of its sizes, ids are integers, images have four axes; the rest is -1. Deliberately not
here: computing, and what rows of a batch have to do with each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydedup.catalog import StoredModel
from pydedup.graph import Graph, Node
from pydedup.matmul import compute_dtype
from pydedup.operations import KEEPING_SHAPE, axes_of
from pydedup.serving.plan import Shape, shape_after, widening
from pydedup.types import DType

__all__ = ["Signature", "TensorSpec", "Weight", "inputs_of", "signature_of", "weights_of"]

#: Shape and dtype of a stored tensor.
Weight = tuple[Shape, DType]

_TWO = frozenset(("add", "mul", "sub"))
#: What has the dtype of its weight, whatever it is given.
_PRODUCTS = frozenset(("linear", "conv2d", "embedding", "embedding_bag"))
_MOVES = frozenset(("identity", "flatten", "reshape", "transpose"))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output; sizes that any number may have are -1.

    ``features`` is whether the last axis must have its size, ``flat`` whether it must have it
    where there is one axis beside that of the rows; ``ids`` whether it must be integers.
    """

    name: str
    datatype: str
    shape: Shape
    features: bool = False
    flat: bool = False
    ids: bool = False

    @property
    def width(self) -> int | None:
        """The numbers that a row of one axis must have, ``None`` where any will do."""
        told = len(self.shape) == 2 and (self.features or self.flat)
        return self.shape[1] if told and self.shape[1] > 0 else None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and returns."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def weights_of(model: StoredModel, graph: Graph) -> dict[str, Weight]:
    """Return what is known of a model's tensors that its graph names.

    Raises NotFoundError when there is no such tensor.
    """
    tensors = map(model.tensor, graph.tensors())
    return {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}


def inputs_of(graph: Graph, weights: Mapping[str, Weight]) -> tuple[TensorSpec, ...]:
    """Return what a graph takes."""
    hints = _hints(graph, weights)
    return tuple(_input(name, list(hints.get(name, ()))) for name in graph.inputs)


def signature_of(graph: Graph, weights: Mapping[str, Weight]) -> Signature:
    """Return what a graph takes and returns."""
    inputs = inputs_of(graph, weights)
    shapes: dict[str, Shape | None] = {spec.name: spec.shape for spec in inputs}
    types = {spec.name: spec.datatype for spec in inputs}
    for node in graph.nodes:
        given = [shapes[name] for name in node.inputs]
        known = [shape for shape in given if shape is not None]
        shapes[node.output] = None
        if len(known) == len(given):
            shapes[node.output] = _forward(node, known, weights)
        types[node.output] = _datatype(node, [types[name] for name in node.inputs], weights)
    outputs = []
    for name in graph.outputs:
        shape = shapes[name]
        datatype = "FP16" if name in graph.halves else types[name]
        outputs.append(TensorSpec(name, datatype, (-1,) if shape is None else shape))
    return Signature(inputs, tuple(outputs))


# ---- inputs -------------------------------------------------------------------------------------


def _input(name: str, hints: Sequence[TensorSpec]) -> TensorSpec:
    if not hints:
        return TensorSpec(name, "FP32", (-1, -1))
    # Images and sequences have more axes than a look at what follows a sum over some of them shows.
    best = max(hints, key=lambda hint: (len(hint.shape), hint.features, hint.flat))
    ids = any(hint.ids for hint in hints)
    wide = any(hint.datatype == "FP64" for hint in hints)
    datatype = "INT64" if ids else "FP64" if wide else "FP32"
    return TensorSpec(name, datatype, best.shape, best.features, best.flat, ids)


def _hints(graph: Graph, weights: Mapping[str, Weight]) -> dict[str, dict[TensorSpec, None]]:
    """Return what the users of each value ask of it, each once, in the order of the nodes.

    One pass from the last node to the first: the ways from a value to a weight may be very many.
    """
    found: dict[str, dict[TensorSpec, None]] = {}
    for node in reversed(graph.nodes):
        direct = _asks(node, weights)
        asked = [] if direct is None else [direct]
        if direct is None or node.op == "batch_norm":  # which says nothing of how many axes
            behind = (_before(node, hint) for hint in found.get(node.output, ()))
            asked += [hint for hint in behind if hint is not None]
        for name in node.inputs:
            found[name] = dict.fromkeys(asked) | found.get(name, {})
    return found


def _asks(node: Node, weights: Mapping[str, Weight]) -> TensorSpec | None:
    """Return what a node asks of each of its inputs, by itself.

    Nothing where its weight has other axes than it can have, as in a damaged store.
    """
    op = node.op
    if op in ("max_pool2d", "avg_pool2d"):
        return TensorSpec("", "FP32", (-1, -1, -1, -1))
    if op == "embedding":
        return TensorSpec("", "INT64", (-1, -1), ids=True)
    if op == "embedding_bag":
        return TensorSpec("", "INT64", (-1,) * (1 if len(node.inputs) > 1 else 2), ids=True)
    if "weight" not in node.weights:
        return None
    shape, dtype = weights[node.weights["weight"]]
    datatype = "FP64" if compute_dtype(dtype).itemsize == 8 else "FP32"
    if op == "linear" and len(shape) == 2:
        size = shape[0] if node.attr("transpose") else shape[1]
        return TensorSpec("", datatype, (-1, size), features=True)
    if op == "conv2d" and len(shape) >= 2:
        return TensorSpec("", datatype, (-1, shape[1] * node.attr("groups"), -1, -1))
    if op == "layer_norm" and shape:
        return TensorSpec("", datatype, (-1, *shape), features=True)
    if op == "batch_norm" and len(shape) == 1 and node.attr("axis") in (1, -1):
        last = node.attr("axis") == -1
        return TensorSpec("", datatype, (-1, shape[0]), features=last, flat=True)
    return None


def _before(node: Node, hint: TensorSpec) -> TensorSpec | None:
    """Return what a node without wishes asks of its input, for one of its output."""
    shape, op = hint.shape, node.op
    if op in KEEPING_SHAPE or op == "batch_norm":
        return hint
    if op in _TWO:  # may be stretched to it
        return TensorSpec("", hint.datatype, shape, ids=hint.ids)
    if op == "concat":
        axis = node.attr("axis")
        if -len(shape) <= axis < len(shape):
            sizes = [-1 if i == axis % len(shape) else size for i, size in enumerate(shape)]
            return TensorSpec("", hint.datatype, tuple(sizes), ids=hint.ids)
    if op == "flatten" and node.attr("start_axis") == 1 and len(shape) == 2:
        flat = hint.features or hint.flat
        return TensorSpec("", hint.datatype, shape, flat=flat, ids=hint.ids)
    if op == "transpose" and len(node.attr("perm")) == len(shape):
        perm = node.attr("perm")
        turned = tuple(shape[perm.index(i)] for i in range(len(perm)))
        return TensorSpec("", hint.datatype, turned, ids=hint.ids)
    if op in ("mean", "max") and not node.attr("keepdims"):
        axes = axes_of(node.attr("axis"))
        rank = len(shape) + len(axes)
        if all(-rank <= axis < rank for axis in axes):
            sizes = list(shape)
            for axis in sorted(axis % rank for axis in axes):
                sizes.insert(axis, -1)
            last = {axis % rank for axis in axes} & {rank - 1}
            return TensorSpec("", hint.datatype, tuple(sizes), hint.features and not last)
    if op == "reshape":
        sizes = node.attr("shape")
        total = math.prod(sizes[1:])
        return TensorSpec("", hint.datatype, (-1, total if total > 0 else -1), ids=hint.ids)
    return None


# ---- forward ------------------------------------------------------------------------------------


def _forward(node: Node, given: Sequence[Shape], weights: Mapping[str, Weight]) -> Shape | None:
    """Return the shape of a node's output, None where it is not known."""
    weight: Shape = weights[node.weights["weight"]][0] if "weight" in node.weights else ()
    try:
        return shape_after(node, given, weight)
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def _datatype(node: Node, given: Sequence[str], weights: Mapping[str, Weight]) -> str:
    """Return the datatype of a node's output."""
    if node.op in _MOVES or (node.op == "concat" and set(given) == {"INT64"}):
        return given[0]
    if any(compute_dtype(weights[name][1]).itemsize == 8 for name in widening(node)):
        return "FP64"
    return "FP64" if "FP64" in given and node.op not in _PRODUCTS else "FP32"
