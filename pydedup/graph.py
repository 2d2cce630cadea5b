# SPDX-License-Identifier: Apache-2.0
"""The layers of a model as plain data, for predictions without the framework it came from.

A graph is a list of nodes in an order in which they can be computed. A node has one operation,
input values by name, one output value, tensors of the model by role (``weights``), and
attributes; :mod:`pydedup.operations` says which there are and what they compute.

Deliberately not here: computing anything (:mod:`pydedup.serving`), and inferring a graph from a
framework's model (``pydedup/formats/infer_*.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydedup.errors import ArgumentError
from pydedup.operations import OPS, attr_problem, counts_axes, shape_problem, window_problem

__all__ = [
    "GRAPH_VERSION",
    "AttrValue",
    "Graph",
    "Node",
]

#: Version of the JSON form. Newer ones are refused.
GRAPH_VERSION = 1

AttrValue: TypeAlias = bool | int | float | str | list[int] | None


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. Checked on creation, so that no invalid node exists.

    Raises
    ------
    ArgumentError
        For an unknown operation, missing or unexpected weights, a wrong number of inputs or a
        wrong attribute, and for what has another type than the fields say.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    weights: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, AttrValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_types()
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
            problem = attr_problem(self.op, name, value)
            if problem:
                raise ArgumentError(f"{self._where}: attribute {name!r} is {value!r}; {problem}")
        problem = window_problem(self.op, self.attr)
        if problem:
            raise ArgumentError(f"{self._where}: {problem}")

    def _check_types(self) -> None:
        """Refuse what is of a wrong type, and make a tuple of the inputs."""
        op, output, weights = self.op, self.output, self.weights  # type: object, object, object
        attrs: object = self.attrs
        if not isinstance(op, str) or not isinstance(output, str):
            raise ArgumentError("'op' and 'output' of a node must be text")
        if not isinstance(weights, Mapping) or not all(
            isinstance(v, str) for v in weights.values()
        ):
            raise ArgumentError(f"'weights' of node {op!r} must map roles to tensor names")
        if not isinstance(attrs, Mapping):
            raise ArgumentError(f"'attrs' of node {op!r} must be an object")
        object.__setattr__(self, "inputs", _names(self.inputs, f"'inputs' of node {op!r}"))

    def attr(self, name: str) -> Any:
        """Return an attribute, or its default when the node does not give it."""
        if name in self.attrs:
            return self.attrs[name]
        return OPS[self.op].attrs[name]

    @property
    def _where(self) -> str:
        return f"node {self.op!r} that makes {self.output!r}"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Graph:
    """Nodes in computable order between named inputs and outputs. Checked on creation.

    ``halves`` are the outputs that are given as float16; others are float32 or float64. ``shapes``
    are those that inputs were declared with where results may depend on them, or on how many axes
    there are; -1 is any size.

    Raises
    ------
    ArgumentError
        When a value is used before it is made, made twice, or an output is never made, and for
        what has another type than the fields say.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    halves: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: For each node the values, outputs aside, that no node behind it uses.
    used_up: tuple[tuple[str, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field_name in ("inputs", "outputs", "halves"):
            names = _names(getattr(self, field_name), f"{field_name!r} of a graph")
            object.__setattr__(self, field_name, names)
        object.__setattr__(self, "shapes", _shapes(self.shapes, self.inputs))
        nodes: object = self.nodes
        if not isinstance(nodes, list | tuple) or not all(isinstance(n, Node) for n in nodes):
            raise ArgumentError("'nodes' of a graph must be a list of nodes")
        object.__setattr__(self, "nodes", tuple(nodes))
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
        last_use = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        used_up = tuple(
            tuple(
                name
                for name in dict.fromkeys(node.inputs)
                if last_use[name] == i and name not in self.outputs
            )
            for i, node in enumerate(self.nodes)
        )
        object.__setattr__(self, "used_up", used_up)

    def tensors(self) -> tuple[str, ...]:
        """Return the names of all tensors that the nodes use, each once, in order of use."""
        return tuple(dict.fromkeys(name for node in self.nodes for name in node.weights.values()))

    def counts_axes(self) -> bool:
        """Return whether inputs with another number of axes would be computed along other ones."""
        return any(counts_axes(node.op, node.attr) for node in self.nodes)

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
            problem = shape_problem(node.op, node.weights, node.attr, found)
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
                **({"shapes": dict(self.shapes)} if self.shapes else {}),
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
        except (ValueError, TypeError, RecursionError) as exc:
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
        made = tuple(_node(node) for node in nodes)
        inputs, outputs, halves = (data.get(n, ()) for n in ("inputs", "outputs", "halves"))
        return cls(inputs, outputs, made, halves, data.get("shapes", {}))


def _node(data: Mapping[str, Any]) -> Node:
    unknown = set(data) - {"op", "inputs", "output", "weights", "attrs"}
    if unknown:
        raise ArgumentError(f"unknown key {sorted(unknown)[0]!r} in a node")
    op, inputs, output = (data.get(name) for name in ("op", "inputs", "output"))
    weights, attrs = data.get("weights", {}), data.get("attrs", {})
    return Node(op, inputs, output, weights, attrs)  # type: ignore[arg-type]  # it looks itself


def _shapes(value: object, inputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping) or not all(
        name in inputs
        and isinstance(shape, list | tuple)
        and all(type(size) is int and size >= -1 for size in shape)
        for name, shape in value.items()
    ):
        raise ArgumentError("'shapes' of a graph must map inputs to lists of sizes, -1 for any")
    return {name: tuple(shape) for name, shape in value.items()}


def _names(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ArgumentError(f"{what} must be a list of names")
    return tuple(value)
