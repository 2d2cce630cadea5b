# SPDX-License-Identifier: Apache-2.0
"""The layers of a model as plain data, for predictions without the framework it came from.

A graph is a list of nodes in an order in which they can be computed. A node has one operation,
input values by name, one output value, tensors of the model by role (``weights``), and
attributes. What the operations compute (``x`` is the first input, ``y`` the second; numpy terms):

=================  =============================================================================
``linear``         ``x @ W.T + bias`` with weight (out, in); with ``transpose`` the tensor is
                   stored as (in, out) and the result is ``x @ W + bias``
``embedding``      ``weight[ids]``; negative ids, counted from the end, only with ``from_end``
``embedding_bag``  rows of ``weight`` per bag, reduced by ``mode`` (sum, mean, max). Inputs: ids
                   2-D, a bag per row; or ids 1-D and offsets 1-D, with the end of the last bag
                   as one more offset when ``include_last_offset``. Entries equal to
                   ``padding_idx`` (negative: counted from the end) do not count. An empty bag
                   is zero
``conv2d``         cross-correlation of images (batch, channels, height, width)
                   with weight (out, channels / ``groups``, kernel_h, kernel_w), ``+ bias``;
                   ``stride`` and ``dilation`` are [vertical, horizontal], ``padding`` [top, left,
                   bottom, right] of zeros
``max_pool2d`` ``avg_pool2d``   over windows of ``kernel``, with ``stride``, ``dilation`` (max only)
                   and ``padding`` as above, which is smaller than the window; with ``ceil_mode``
                   also over windows that begin in the image and end behind it. Padding is never
                   the maximum; it counts in means when ``count_include_pad``
``relu`` ``sigmoid`` ``tanh`` ``silu`` ``identity``   as named
``gelu``           exact (``approximate="none"``) or the tanh form (``"tanh"``)
``leaky_relu``     ``x`` where positive, else ``alpha * x``
``elu``            ``x`` where positive, else ``alpha * (exp(x) - 1)``
``softplus``       ``log(1 + exp(x))``
``softmax`` ``log_softmax``   over ``axis``
``flatten``        all axes from ``start_axis`` on become one
``reshape``        to ``shape``, in which one entry may be -1
``layer_norm``     over the last ``axes`` axes, then ``* weight + bias``
``batch_norm``     ``(x - mean) / sqrt(var + eps) * weight + bias`` along ``axis``
``add`` ``mul`` ``sub``       with broadcasting
``concat``         all inputs along ``axis``
``mean`` ``max``     over ``axis`` (one or several), kept as size 1 when ``keepdims``
``transpose``      axes in the order ``perm``
=================  =============================================================================

Deliberately not here: computing anything (:mod:`pydedup.serving`), and inferring a graph from a
framework's model (``pydedup/formats/infer_*.py``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from pydedup.errors import ArgumentError

__all__ = [
    "GRAPH_VERSION",
    "OPS",
    "AttrValue",
    "Graph",
    "Node",
    "OpSpec",
]

#: Version of the JSON form. Newer ones are refused.
GRAPH_VERSION = 1

AttrValue: TypeAlias = bool | int | float | str | list[int] | None


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What a node of one operation must and may have; ``attrs`` maps names to defaults.

    A default of ``...`` marks an attribute that must be given.
    """

    min_inputs: int = 1
    max_inputs: int = 1
    weights: tuple[str, ...] = ()
    optional_weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


_TWO = OpSpec(2, 2)
_POOL: Mapping[str, Any] = {
    "kernel": ...,
    "stride": ...,
    "padding": [0, 0, 0, 0],
    "ceil_mode": False,
}

#: The operations a graph may use.
OPS: Mapping[str, OpSpec] = MappingProxyType(
    {
        "linear": OpSpec(
            weights=("weight",), optional_weights=("bias",), attrs={"transpose": False}
        ),
        "embedding": OpSpec(weights=("weight",), attrs={"from_end": False}),
        "embedding_bag": OpSpec(
            1,
            2,
            weights=("weight",),
            attrs={"mode": "mean", "padding_idx": None, "include_last_offset": False},
        ),
        "conv2d": OpSpec(
            weights=("weight",),
            optional_weights=("bias",),
            attrs={"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1},
        ),
        "max_pool2d": OpSpec(attrs={**_POOL, "dilation": [1, 1]}),
        "avg_pool2d": OpSpec(attrs={**_POOL, "count_include_pad": True}),
        "relu": OpSpec(),
        "gelu": OpSpec(attrs={"approximate": "none"}),
        "sigmoid": OpSpec(),
        "tanh": OpSpec(),
        "softmax": OpSpec(attrs={"axis": -1}),
        "log_softmax": OpSpec(attrs={"axis": -1}),
        "leaky_relu": OpSpec(attrs={"alpha": 0.01}),
        "elu": OpSpec(attrs={"alpha": 1.0}),
        "silu": OpSpec(),
        "softplus": OpSpec(),
        "identity": OpSpec(),
        "flatten": OpSpec(attrs={"start_axis": 1}),
        "reshape": OpSpec(attrs={"shape": ...}),
        "layer_norm": OpSpec(weights=("weight", "bias"), attrs={"axes": 1, "eps": 1e-5}),
        "batch_norm": OpSpec(
            weights=("weight", "bias", "mean", "var"), attrs={"eps": 1e-5, "axis": 1}
        ),
        "add": _TWO,
        "mul": _TWO,
        "sub": _TWO,
        "concat": OpSpec(1, 1 << 16, attrs={"axis": ...}),
        "mean": OpSpec(attrs={"axis": ..., "keepdims": False}),
        "max": OpSpec(attrs={"axis": ..., "keepdims": False}),
        "transpose": OpSpec(attrs={"perm": ...}),
    }
)

_INT_ATTRS = {"start_axis", "axes", "axis", "padding_idx", "groups"}
_FLOAT_ATTRS = {"alpha", "eps"}
_BOOL_ATTRS = {
    "transpose",
    "from_end",
    "include_last_offset",
    "keepdims",
    "ceil_mode",
    "count_include_pad",
}
#: Lists of sizes: how many, and the least each may be.
_SIZES = {"kernel": (2, 1), "stride": (2, 1), "dilation": (2, 1), "padding": (4, 0)}
#: What the kernels count with.
_LARGEST_SIZE = 2**31 - 1
_CHOICES = {"mode": ("sum", "mean", "max"), "approximate": ("none", "tanh")}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. Checked on creation, so that no invalid node exists.

    Raises
    ------
    ArgumentError
        For an unknown operation, missing or unexpected weights, a wrong number of inputs or a
        wrong attribute.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    weights: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, AttrValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = OPS.get(self.op)
        if spec is None:
            raise ArgumentError(f"unknown operation {self.op!r}; known are: {', '.join(OPS)}")
        if not spec.min_inputs <= len(self.inputs) <= spec.max_inputs:
            raise ArgumentError(
                f"{self._where}: {len(self.inputs)} inputs; {self.op} takes "
                f"{spec.min_inputs}" + (" or more" if spec.max_inputs > spec.min_inputs else "")
            )
        for role in spec.weights:
            if role not in self.weights:
                raise ArgumentError(f"{self._where}: weight {role!r} is missing")
        for role in self.weights:
            if role not in spec.weights + spec.optional_weights:
                raise ArgumentError(f"{self._where}: {self.op} has no weight {role!r}")
        for name, default in spec.attrs.items():
            if default is ... and name not in self.attrs:
                raise ArgumentError(f"{self._where}: attribute {name!r} is missing")
        for name, value in self.attrs.items():
            if name not in spec.attrs:
                raise ArgumentError(f"{self._where}: {self.op} has no attribute {name!r}")
            problem = _attr_problem(self.op, name, value)
            if problem:
                raise ArgumentError(f"{self._where}: attribute {name!r} is {value!r}; {problem}")
        problem = _window_problem(self)
        if problem:
            raise ArgumentError(f"{self._where}: {problem}")

    def attr(self, name: str) -> Any:
        """Return an attribute, or its default when the node does not give it."""
        if name in self.attrs:
            return self.attrs[name]
        return OPS[self.op].attrs[name]

    @property
    def _where(self) -> str:
        return f"node {self.op!r} that makes {self.output!r}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in computable order between named inputs and outputs. Checked on creation.

    ``halves`` are the outputs that are given as float16; others are float32 or float64.

    Raises
    ------
    ArgumentError
        When a value is used before it is made, made twice, or an output is never made.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    halves: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs:
            raise ArgumentError("a graph needs at least one input and one output")
        known: set[str] = set()
        for name in self.inputs:
            if name in known:
                raise ArgumentError(f"graph input {name!r} occurs twice")
            known.add(name)
        for node in self.nodes:
            for name in node.inputs:
                if name not in known:
                    raise ArgumentError(
                        f"node {node.op!r} that makes {node.output!r} uses {name!r}, which no "
                        "input and no earlier node makes"
                    )
            if node.output in known:
                raise ArgumentError(f"value {node.output!r} is made twice")
            known.add(node.output)
        for name in self.outputs:
            if name not in known:
                raise ArgumentError(f"graph output {name!r} is made by no node")
        for name in self.halves:
            if name not in self.outputs:
                raise ArgumentError(f"{name!r} of 'halves' is no output of the graph")

    def tensors(self) -> tuple[str, ...]:
        """Return the names of all tensors that the nodes use, each once, in order of use."""
        return tuple(dict.fromkeys(name for node in self.nodes for name in node.weights.values()))

    def validate(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check the graph against a model's tensors.

        Parameters
        ----------
        shapes
            Shape of every tensor of the model by name.

        Raises
        ------
        ArgumentError
            When a tensor is missing or its shape does not fit its role.
        """
        for node in self.nodes:
            found: dict[str, tuple[int, ...]] = {}
            for role, tensor in node.weights.items():
                if tensor not in shapes:
                    raise ArgumentError(
                        f"node {node.op!r} that makes {node.output!r} uses tensor {tensor!r}, "
                        "which the model does not have"
                    )
                found[role] = tuple(shapes[tensor])
            problem = _shape_problem(node, found)
            if problem:
                raise ArgumentError(f"node {node.op!r} that makes {node.output!r}: {problem}")

    def to_json(self) -> str:
        """Return the graph as JSON text."""
        return json.dumps(
            {
                "version": GRAPH_VERSION,
                "inputs": list(self.inputs),
                "outputs": list(self.outputs),
                **({"halves": list(self.halves)} if self.halves else {}),
                "nodes": [
                    {
                        "op": node.op,
                        "inputs": list(node.inputs),
                        "output": node.output,
                        "weights": dict(node.weights),
                        "attrs": dict(node.attrs),
                    }
                    for node in self.nodes
                ],
            },
            ensure_ascii=False,
            separators=(",", ":"),
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Graph:
        """Return the graph that `to_json` wrote (or a person).

        Raises
        ------
        ArgumentError
            When the text is no JSON, of a newer version, or no valid graph.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise ArgumentError(f"a graph must be JSON: {exc}") from exc
        if not isinstance(data, dict):
            raise ArgumentError("a graph must be a JSON object with inputs, outputs and nodes")
        version = data.get("version")
        if version != GRAPH_VERSION or isinstance(version, bool):
            raise ArgumentError(
                f"graph version {version!r} cannot be read; this pydedup knows {GRAPH_VERSION}"
            )
        nodes = data.get("nodes")
        if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
            raise ArgumentError("'nodes' of a graph must be a list of objects")
        return cls(
            _names(data.get("inputs"), "'inputs' of a graph"),
            _names(data.get("outputs"), "'outputs' of a graph"),
            tuple(_node(node) for node in nodes),
            _names(data.get("halves", []), "'halves' of a graph"),
        )


def _node(data: Mapping[str, Any]) -> Node:
    unknown = set(data) - {"op", "inputs", "output", "weights", "attrs"}
    if unknown:
        raise ArgumentError(f"unknown key {sorted(unknown)[0]!r} in a node")
    op, output = data.get("op"), data.get("output")
    if not isinstance(op, str) or not isinstance(output, str):
        raise ArgumentError("'op' and 'output' of a node must be text")
    weights, attrs = data.get("weights", {}), data.get("attrs", {})
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise ArgumentError(f"'weights' of node {op!r} must map roles to tensor names")
    if not isinstance(attrs, dict):
        raise ArgumentError(f"'attrs' of node {op!r} must be an object")
    return Node(op, _names(data.get("inputs"), f"'inputs' of node {op!r}"), output, weights, attrs)


def _names(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArgumentError(f"{what} must be a list of names")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _attr_problem(op: str, name: str, value: object) -> str | None:
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"choose one of {', '.join(_CHOICES[name])}"
    if name in _BOOL_ATTRS:
        return None if isinstance(value, bool) else "it must be true or false"
    if name in _FLOAT_ATTRS:
        good = isinstance(value, float) or _is_int(value)
        # Not isfinite(): an integer beyond all floats is an OverflowError there.
        finite = good and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
        return None if finite else "it must be a finite number"
    if name == "padding_idx" and value is None:
        return None
    listed = isinstance(value, list) and all(_is_int(item) for item in value)
    if name in _SIZES:
        length, least = _SIZES[name]
        sizes = value if isinstance(value, list) and listed else []
        if len(sizes) == length and all(least <= size <= _LARGEST_SIZE for size in sizes):
            return None
        return f"it must be {length} integers of at least {least}, below 2**31"
    if name in ("perm", "shape") or (op in ("mean", "max") and listed):
        if not listed:
            return "it must be a list of integers"
        return _list_problem(name, value)  # type: ignore[arg-type]
    assert name in _INT_ATTRS
    if not _is_int(value):
        return "it must be an integer"
    if name in ("axes", "groups") and value < 1:  # type: ignore[operator]
        return "it must be at least 1"
    return None


def _window_problem(node: Node) -> str | None:
    """Say when a pool may have windows of nothing but padding."""
    if node.op not in ("max_pool2d", "avg_pool2d"):
        return None
    kernel, padding = node.attr("kernel"), node.attr("padding")
    dilation = node.attr("dilation") if node.op == "max_pool2d" else [1, 1]
    for axis, name in enumerate(("vertical", "horizontal")):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        most = max(padding[axis], padding[axis + 2])
        if 2 * most > reach:
            return f"{name} padding of {most} is more than half of a window of {reach}"
    return None


def _list_problem(name: str, value: list[int]) -> str | None:
    if name == "perm" and sorted(value) != list(range(len(value))):
        return "it must name each axis once"
    if name == "shape" and (value.count(-1) > 1 or any(item < -1 for item in value)):
        return "it must hold sizes, and -1 at most once"
    if name == "axis" and len(set(value)) != len(value):
        return "it must name an axis at most once"
    return None


def _shape_problem(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    weight = shapes.get("weight")
    if weight is None:
        return None
    named = f"tensor {node.weights['weight']!r} has shape {weight}"
    if node.op in ("linear", "embedding", "embedding_bag"):
        if len(weight) != 2:
            return f"{named}; 2 axes are needed"
        if "bias" in shapes:
            out = weight[1] if node.attr("transpose") else weight[0]
            if shapes["bias"] != (out,):
                return f"bias has shape {shapes['bias']}; ({out},) is needed"
        return None
    if node.op == "conv2d":
        if len(weight) != 4 or 0 in weight:
            return f"{named}; 4 axes are needed (out, in / groups, kernel_h, kernel_w), none of 0"
        if weight[0] % node.attr("groups"):
            return f"{named}; {node.attr('groups')} groups do not divide its {weight[0]} outputs"
        if "bias" in shapes and shapes["bias"] != (weight[0],):
            return f"bias has shape {shapes['bias']}; ({weight[0]},) is needed"
        return None
    if node.op == "layer_norm" and len(weight) != node.attr("axes"):
        return f"{named}; {node.attr('axes')} axes are needed"
    if node.op == "batch_norm" and len(weight) != 1:
        return f"{named}; 1 axis is needed"
    for role, shape in shapes.items():
        if shape != weight:
            return f"{role} has shape {shape}; that of weight, {weight}, is needed"
    return None
