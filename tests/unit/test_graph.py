# SPDX-License-Identifier: Apache-2.0
"""Graphs: what is refused, and the JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.operations import OPS

RELU = Node("relu", ("x",), "y")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Node("conv9d", ("x",), "y"), "unknown operation 'conv9d'"),
        (lambda: Node("linear", ("x",), "y"), "weight 'weight' is missing"),
        (lambda: Node("batch_norm", ("x",), "y", {"weight": "w"}), "weight 'bias' is missing"),
        (lambda: Node("relu", ("x",), "y", {"weight": "w"}), "no weight 'weight'"),
        (lambda: Node("add", ("x",), "y"), "1 inputs"),
        (lambda: Node("relu", (), "y"), "0 inputs"),
        (lambda: Node("reshape", ("x",), "y"), "attribute 'shape' is missing"),
        (lambda: Node("relu", ("x",), "y", {}, {"axis": 1}), "no attribute 'axis'"),
        (
            lambda: Node("gelu", ("x",), "y", {}, {"approximate": "fast"}),
            "choose one of none, tanh",
        ),
        (lambda: Node("softmax", ("x",), "y", {}, {"axis": True}), "integer"),
        (lambda: Node("softmax", ("x",), "y", {}, {"axis": [1]}), "integer"),
        (lambda: Node("elu", ("x",), "y", {}, {"alpha": math.nan}), "finite"),
        (lambda: Node("transpose", ("x",), "y", {}, {"perm": [0, 0]}), "each axis once"),
        (lambda: Node("reshape", ("x",), "y", {}, {"shape": [-1, -1]}), "at most once"),
        (lambda: Node("mean", ("x",), "y", {}, {"axis": [1, 1]}), "at most once"),
        (lambda: Node("mean", ("x",), "y", {}, {"axis": 1, "keepdims": 1}), "true or false"),
        (
            lambda: Node("layer_norm", ("x",), "y", {"weight": "w", "bias": "b"}, {"axes": 0}),
            "at least 1",
        ),
        (lambda: Graph((), ("y",), (RELU,)), "at least one input"),
        (lambda: Graph(("x", "x"), ("y",), (RELU,)), "occurs twice"),
        (lambda: Graph(("z",), ("y",), (RELU,)), "uses 'x'"),
        (lambda: Graph(("x",), ("y",), (RELU, RELU)), "made twice"),
        (lambda: Graph(("x",), ("q",), (RELU,)), "output 'q'"),
    ],
)
def test_invalid_graphs_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda node, _: node(["relu"], ("x",), "y"), "'op' and 'output' of a node must be text"),
        (lambda node, _: node("relu", ("x",), None), "'op' and 'output' of a node must be text"),
        (lambda node, _: node("relu", "input", "y"), "'inputs' of node 'relu' must be a list"),
        (lambda node, _: node("relu", None, "y"), "'inputs' of node 'relu' must be a list"),
        (lambda node, _: node("linear", ("x",), "y", ["w"]), "'weights' of node 'linear'"),
        (lambda node, _: node("linear", ("x",), "y", {"weight": 1}), "'weights' of node 'linear'"),
        (lambda node, _: node("relu", ("x",), "y", {}, []), "'attrs' of node 'relu'"),
        (lambda _, graph: graph("x", ("y",), (RELU,)), "'inputs' of a graph"),
        (lambda _, graph: graph(("x",), "y", (RELU,)), "'outputs' of a graph"),
        (lambda _, graph: graph(("x",), ("y",), (RELU,), "y"), "'halves' of a graph"),
        (lambda _, graph: graph(("x",), ("y",), (RELU,), (), ["x"]), "'shapes' of a graph"),
        (lambda _, graph: graph(("x",), ("y",), RELU), "'nodes' of a graph"),
        (lambda _, graph: graph(("x",), ("y",), [{"op": "relu"}]), "'nodes' of a graph"),
    ],
)
def test_what_has_a_wrong_type_is_named(make: Callable[[Any, Any], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make(Node, Graph)


def test_lists_do_for_tuples() -> None:
    lists: Any = ["x"], ["y"], [Node("relu", ["x"], "y")]  # type: ignore[arg-type]
    assert Graph(*lists) == Graph(("x",), ("y",), (RELU,))


def test_later_nodes_cannot_be_used_by_earlier_ones() -> None:
    first = Node("relu", ("b",), "a")
    second = Node("relu", ("x",), "b")
    with pytest.raises(ArgumentError, match="uses 'b'"):
        Graph(("x",), ("a",), (first, second))
    assert Graph(("x",), ("a",), (second, first)).outputs == ("a",)


def test_every_operation_survives_json() -> None:
    attrs: dict[str, dict[str, Any]] = {
        "reshape": {"shape": [-1, 3]},
        "concat": {"axis": 1},
        "mean": {"axis": [1, 2], "keepdims": True},
        "max": {"axis": -1},
        "conv2d": {"padding": [1, 0, 2, 0], "stride": [2, 1], "groups": 2},
        "max_pool2d": {"kernel": [3, 2], "stride": [1, 2], "ceil_mode": True},
        "avg_pool2d": {"kernel": [2, 2], "stride": [2, 2], "count_include_pad": False},
        "transpose": {"perm": [1, 0]},
        "embedding_bag": {"mode": "max", "padding_idx": -1, "include_last_offset": True},
        "elu": {"alpha": 0.1},
    }
    nodes = []
    for number, (op, spec) in enumerate(OPS.items()):
        weights = {role: f'wörter "{role}"' for role in spec.weights + spec.optional_weights}
        inputs = ("x",) * spec.min_inputs
        nodes.append(Node(op, inputs, f"v{number}", weights, attrs.get(op, {})))
    ends = ("v0", f"v{len(nodes) - 1}")
    graph = Graph(("x",), ends, tuple(nodes), ("v0",), {"x": (-1, 3)})
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph.from_json(graph.to_json().encode()) == graph


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "graph version 2"),
        ({"version": True}, "graph version True"),
        ({"nodes": {}}, "'nodes'"),
        ({"nodes": [1]}, "'nodes'"),
        ({"inputs": "x"}, "'inputs' of a graph"),
        ({"halves": "x"}, "'halves' of a graph"),
        ({"halves": ["x"]}, "'x' of 'halves' is no output"),
        ({"shapes": {"x": [True]}}, "'shapes' of a graph"),
        ({"shapes": {"x": [-2]}}, "'shapes' of a graph"),
        ({"shapes": {"y": [3]}}, "'shapes' of a graph"),
        ({"nodes": [{"op": "relu", "inputs": ["x"], "output": "y", "extra": 1}]}, "'extra'"),
        ({"nodes": [{"op": ["relu"], "inputs": ["x"], "output": "y"}]}, "must be text"),
        ({"nodes": [{"op": "relu", "inputs": [1], "output": "y"}]}, "list of names"),
        ({"nodes": [{"op": "relu", "inputs": ["x"], "output": "y", "attrs": []}]}, "'attrs'"),
        ({"nodes": [{"op": "relu", "inputs": ["x"], "output": "y", "weights": {"w": 1}}]}, "roles"),
    ],
)
def test_wrong_json_is_refused(change: dict[str, Any], says: str) -> None:
    data = json.loads(Graph(("x",), ("y",), (RELU,)).to_json())
    with pytest.raises(ArgumentError, match=says):
        Graph.from_json(json.dumps({**data, **change}))


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "[" * 100_000, b"\xff", None, {}])
def test_what_is_no_json_object_is_refused(text: Any) -> None:
    with pytest.raises(ArgumentError, match="graph must be"):
        Graph.from_json(text)


@pytest.mark.parametrize(
    ("op", "attrs", "shapes", "says"),
    [
        ("linear", {}, {"weight": (3, 4), "bias": (3,)}, None),
        ("linear", {"transpose": True}, {"weight": (3, 4), "bias": (4,)}, None),
        ("linear", {}, {"weight": (3, 4), "bias": (4,)}, "bias has shape"),
        ("linear", {}, {"weight": (3, 4, 1)}, "2 axes"),
        ("embedding", {}, {"weight": (3,)}, "2 axes"),
        ("layer_norm", {"axes": 2}, {"weight": (3, 4), "bias": (3, 4)}, None),
        ("layer_norm", {"axes": 1}, {"weight": (3, 4), "bias": (3, 4)}, "1 axes"),
        ("layer_norm", {}, {"weight": (3,), "bias": (4,)}, "bias has shape"),
        ("batch_norm", {}, {"weight": (3,), "bias": (3,), "mean": (3,), "var": (2,)}, "var has"),
    ],
)
def test_tensors_must_fit(
    op: str, attrs: dict[str, Any], shapes: dict[str, tuple[int, ...]], says: str | None
) -> None:
    graph = Graph(("x",), ("y",), (Node(op, ("x",), "y", {r: r for r in shapes}, attrs),))
    assert graph.tensors() == tuple(shapes)
    if says is None:
        graph.validate(shapes)
    else:
        with pytest.raises(ArgumentError, match=says):
            graph.validate(shapes)
    with pytest.raises(ArgumentError, match="which the model does not have"):
        graph.validate({})


def test_values_that_are_used_up() -> None:
    """Each where it is used last, once; outputs never, nor what nothing uses."""
    nodes = (
        Node("relu", ("x",), "a"),
        Node("add", ("a", "a"), "b"),
        Node("add", ("b", "x"), "c"),
        Node("relu", ("a",), "idle"),
        Node("relu", ("b",), "y"),
    )
    graph = Graph(("x", "z"), ("y", "c"), nodes)
    assert graph.used_up == ((), (), ("x",), ("a",), ("b",))
    assert Graph(("x",), ("b", "y"), (*nodes[:2], nodes[4])).used_up == (("x",), ("a",), ())
    assert Graph(("x", "z"), ("y", "c"), list(nodes)) == graph  # type: ignore[arg-type]
