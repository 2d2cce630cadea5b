# SPDX-License-Identifier: Apache-2.0
"""Plans of predictions: what a row of a batch takes, and how batches are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.serving.plan import plan_run
from pydedup.types import DType, TensorInfo

_DTYPES = {"d": DType.F64, "v": DType.F64}
_SHAPES = {"d": (8, 6), "v": (6,), "w": (8, 6), "e": (50, 6), "c": (4, 3, 3, 3), "g": (6,)}


def _norm(name: str) -> dict[str, str]:
    return {"weight": name, "bias": name}


def planned(nodes: list[Node], *shapes: tuple[int, ...]) -> Any:
    names = ("x", "y")[: len(shapes)]
    graph = Graph(names, (nodes[-1].output,), tuple(nodes))
    inputs = {n: np.zeros(s, np.float32) for n, s in zip(names, shapes, strict=True)}
    return plan_run(
        graph,
        lambda name: TensorInfo(name, _DTYPES.get(name, DType.F32), _SHAPES[name], (8, 8)),
        inputs,
    )


@pytest.mark.parametrize(
    ("node", "shape", "rows", "elements"),
    [
        (Node("linear", ("x",), "o", weights={"weight": "w"}), (5, 6), 5, 5 * (8 + 9)),
        (Node("linear", ("x",), "o", weights={"weight": "w"}), (6,), None, 8 + 9),
        (Node("embedding", ("x",), "o", weights={"weight": "e"}), (5, 7), 5, 5 * 7 * (6 + 2)),
        (
            Node("embedding_bag", ("x",), "o", weights={"weight": "e"}),
            (5, 7),
            5,
            5 * (6 + 7 * 2 + 8),
        ),
        (
            Node(
                "conv2d",
                ("x",),
                "o",
                weights={"weight": "c"},
                attrs={"stride": [2, 1], "padding": [1, 0, 1, 0]},
            ),
            (2, 3, 9, 8),
            2,
            2 * 4 * 5 * 6 + 2 * 3 * 9 * 8,
        ),
        (Node("conv2d", ("x",), "o", weights={"weight": "c"}), (3, 9, 8), None, 4 * 42 + 3 * 72),
        (Node("layer_norm", ("x",), "o", weights=_norm("g")), (5, 6), 5, 3 * 30),
        (Node("layer_norm", ("x",), "o", _norm("w"), {"axes": 2}), (8, 6), None, 3 * 48),
        (Node("concat", ("x",), "o", attrs={"axis": 0}), (5, 6), None, 30),
        (Node("softmax", ("x",), "o", attrs={"axis": 0}), (5, 6), None, 3 * 30),
        (Node("softmax", ("x",), "o", attrs={"axis": -1}), (5, 6), 5, 3 * 30),
        (Node("reshape", ("x",), "o", attrs={"shape": [-1, 3]}), (5, 6), None, 0),
        (Node("reshape", ("x",), "o", attrs={"shape": [-1, 2, 3]}), (5, 6), 5, 0),
        (Node("reshape", ("x",), "o", attrs={"shape": [5, -1]}), (5, 6), None, 0),
        (Node("flatten", ("x",), "o"), (5, 6, 2), 5, 0),
        (Node("flatten", ("x",), "o", attrs={"start_axis": 0}), (5, 6), None, 0),
        (Node("flatten", ("x",), "o", attrs={"start_axis": -2}), (5, 6), None, 0),
        (Node("flatten", ("x",), "o", attrs={"start_axis": -1}), (5, 6), 5, 0),
        (Node("flatten", ("x",), "o"), (5,), 5, 0),
        (Node("mean", ("x",), "o", attrs={"axis": [1]}), (5, 6), 5, 5),
        (Node("mean", ("x",), "o", attrs={"axis": 0}), (5, 6), None, 6),
        (Node("mean", ("x",), "o", attrs={"axis": [0, 1]}), (5, 6, 2), None, 2),
        (Node("transpose", ("x",), "o", attrs={"perm": [1, 0]}), (5, 6), None, 0),
        (Node("transpose", ("x",), "o", attrs={"perm": [0, 2, 1]}), (5, 6, 2), 5, 0),
    ],
)
def test_plans(node: Node, shape: tuple[int, ...], rows: int | None, elements: int) -> None:
    plan = planned([node], shape)
    assert (plan.rows, plan.nbytes) == (rows, 4 * elements)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (Node("transpose", ("x",), "o", attrs={"perm": []}), (5,)),
        (Node("transpose", ("x",), "o", attrs={"perm": []}), ()),
        (Node("softmax", ("x",), "o", attrs={"axis": 0}), ()),
        (Node("add", ("x", "x"), "o"), ()),
    ],
)
def test_a_single_number_has_no_rows(node: Node, shape: tuple[int, ...]) -> None:
    assert planned([node], shape).rows is None


def test_a_permutation_that_does_not_fit_is_told(tmp_path: Path) -> None:
    graph = Graph(("x",), ("o",), (Node("transpose", ("x",), "o", attrs={"perm": []}),))
    with pydedup.open(tmp_path / "m.db") as opened:
        opened.add("m", {"w": np.ones(3, np.float32)}, graph=graph)
        with pytest.raises(ArgumentError, match="node 'transpose' that makes 'o' does not fit"):
            opened.predict("m", np.ones(5, np.float32))


def test_inputs_of_different_lengths_are_not_rows() -> None:
    nodes = [Node("add", ("x", "y"), "o")]
    assert planned(nodes, (5, 6), (5, 6)).rows == 5
    assert planned(nodes, (5, 6), (1, 6)).rows is None
    assert planned(nodes, (5, 6), (6,)).rows is None
    assert planned(nodes, (5, 5), (5,)).rows is None  # those of y are columns


def _bag(ids: str, offsets: str, output: str, **attrs: Any) -> Node:
    return Node("embedding_bag", (ids, offsets), output, {"weight": "e"}, attrs)


@pytest.mark.parametrize(
    ("nodes", "offsets", "rows"),
    [
        ([_bag("a", "b", "o")], [0, 3, 5], 3),
        ([_bag("a", "b", "p"), _bag("a", "b", "o", mode="max")], [0, 3, 5], 3),
        ([_bag("a", "b", "o")], [0, 5, 3], None),
        ([_bag("a", "b", "p"), Node("embedding", ("a",), "o", {"weight": "e"})], [0, 3, 5], None),
        ([_bag("a", "b", "p"), _bag("a", "c", "o")], [0, 3, 5], None),
        ([_bag("a", "b", "p"), Node("linear", ("c",), "o", {"weight": "w"})], [0, 3, 5], None),
        ([_bag("a", "b", "o"), Node("relu", ("b",), "r")], [0, 3, 5], None),
    ],
)
def test_bags_are_cut_where_nothing_else_looks_at_them(
    nodes: list[Node], offsets: list[int], rows: int | None
) -> None:
    names = [name for name in "abc" if any(name in node.inputs for node in nodes)]
    inputs = {"a": np.arange(8), "b": np.array(offsets), "c": np.array([0, 1, 2])}
    if nodes[-1].op == "linear":
        inputs["c"] = np.ones((4, 6))  # a row more than there are bags
    plan = plan_run(
        Graph(tuple(names), (nodes[-1].output,), tuple(nodes)),
        lambda name: TensorInfo(name, DType.F32, _SHAPES[name], (8, 8)),
        {name: inputs[name] for name in names},
    )
    assert plan is not None
    assert (plan.fits, plan.rows) == (True, rows)


def test_wide_weights_make_wide_activations() -> None:
    node = Node("linear", ("x",), "o", weights={"weight": "d"})
    assert planned([node], (5, 6)).nbytes == 8 * 5 * (8 + 6)


def test_one_wide_vector_of_a_norm_makes_a_wide_result_and_a_bias_of_a_product_does_not() -> None:
    norm = dict.fromkeys(("weight", "bias", "mean", "var"), "g")
    for role in norm:
        node = Node("batch_norm", ("x",), "o", {**norm, role: "v"})
        assert planned([node], (5, 6)).out_nbytes == 8 * 30
    assert planned([Node("batch_norm", ("x",), "o", norm)], (5, 6)).out_nbytes == 4 * 30
    node = Node("linear", ("x",), "o", {"weight": "w", "bias": "v"})
    assert planned([node], (5, 6)).out_nbytes == 4 * 5 * 8


def test_outputs_that_are_halves_take_two_bytes_beside_what_they_were_made_of() -> None:
    nodes = (Node("relu", ("x",), "o"), Node("tanh", ("o",), "p"))
    inputs = {"x": np.zeros((5, 6), np.float32)}
    plan = plan_run(Graph(("x",), ("o", "p"), nodes, halves=("p",)), lambda name: None, inputs)
    assert (plan.out_nbytes, plan.nbytes) == ((4 + 2) * 30, (4 + 4) * 30 + (4 + 2) * 30)


def test_wide_inputs_make_wide_activations() -> None:
    graph = Graph(("x",), ("o",), (Node("relu", ("x",), "o"),))
    for dtype, width in ((np.float64, 8), (np.float32, 4), (np.int64, 4)):
        plan = plan_run(graph, lambda name: pytest.fail(name), {"x": np.zeros((5, 6), dtype)})
        assert plan is not None
        assert plan.nbytes == width * 30


def test_memory_lives_as_long_as_any_view_of_it() -> None:
    nodes = [
        Node("relu", ("x",), "a"),
        Node("flatten", ("a",), "b"),
        Node("softmax", ("b",), "c"),
        Node("add", ("a", "a"), "o"),
    ]
    assert planned(nodes, (5, 6, 2)).nbytes == 4 * 60 * (1 + 1 + 2)
    turned = [
        Node("transpose", ("x",), "a", attrs={"perm": [0, 2, 1]}),
        Node("flatten", ("a",), "o"),
    ]
    assert planned(turned, (5, 6, 2)).nbytes == 4 * 60  # flattening what is turned copies


def test_memory_is_that_of_values_that_are_still_needed() -> None:
    nodes = [Node("relu", (a,), b) for a, b in ("xa", "ab", "bc", "co")]
    assert planned(nodes, (5, 6)).nbytes == 4 * 30 * 2
    assert planned([*nodes[:3], Node("add", ("a", "c"), "o")], (5, 6)).nbytes == 4 * 30 * 3


def test_the_smallest_piece_of_a_batch_is_a_row() -> None:
    plan = planned([Node("relu", ("x",), "o")], (5, 6))  # of 24 bytes each
    assert [plan.beyond(nbytes) for nbytes in (0, 20, 24, 120)] == [24, 4, 0, 0]
    whole = planned([Node("softmax", ("x",), "o", attrs={"axis": 0})], (5, 6))
    assert whole.beyond(100) == 4 * 30 * 3 - 100 - 4 * 30  # its result is counted elsewhere


def test_what_does_not_fit_is_planned_up_to_there() -> None:
    assert not planned([Node("transpose", ("x",), "o", attrs={"perm": [2, 0, 1]})], (5, 6)).fits
    before = Node("relu", ("x",), "h")
    plan = planned([before, Node("reshape", ("h",), "o", attrs={"shape": [4, 7]})], (5, 6))
    assert (plan.fits, plan.rows, plan.nbytes) == (False, None, 4 * 30)
