# SPDX-License-Identifier: Apache-2.0
"""What a row of a model's input is, as its layers tell."""

from __future__ import annotations

from typing import Any

import pytest

from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.serving.features import InputKind, input_kind
from pydedup.types import DType

SHAPES = {
    "w": (5, 3),
    "v": (2, 5),
    "ids": (9, 4),
    "images": (6, 3, 2, 2),
    "norm": (7,),
    "none": (5, 0),
    "scalar": (),
}
WEIGHTS = {name: (shape, DType.F32) for name, shape in SHAPES.items()}
NUMBERS, IDS = InputKind(ids=False, width=None), InputKind(ids=True, width=None)


def linear(x: str, y: str, weight: str = "w", **attributes: Any) -> Node:
    return Node("linear", (x,), y, {"weight": weight}, attributes)


def plain(op: str, x: str, y: str, **attributes: Any) -> Node:
    return Node(op, (x,), y, {}, attributes)


def norm(op: str, weight: str = "norm", **attributes: Any) -> Node:
    roles = ("bias", "mean", "var") if op == "batch_norm" else ("bias",)
    return Node(op, ("x",), "y", {"weight": weight, **dict.fromkeys(roles, weight)}, attributes)


LOOKED_UP = Node("embedding", ("a",), "y", {"weight": "ids"})
KINDS: dict[str, tuple[tuple[Node, ...], InputKind]] = {
    "linear": ((linear("x", "y"),), InputKind(False, 3)),
    "transposed": ((linear("x", "y", transpose=True),), InputKind(False, 5)),
    "the first of two": ((linear("x", "a"), linear("a", "y", "v")), InputKind(False, 3)),
    "behind an activation": ((plain("relu", "x", "a"), linear("a", "y")), InputKind(False, 3)),
    "behind a flattening": ((plain("flatten", "x", "a"), linear("a", "y")), InputKind(False, 3)),
    # Of these the row may have any number; what comes behind a convolution tells nothing of it.
    "reshaped": ((plain("reshape", "x", "a", shape=[-1, 3]), linear("a", "y")), NUMBERS),
    "linear, and reshaped": (
        (linear("x", "a"), plain("reshape", "x", "b", shape=[-1, 3]), plain("relu", "a", "y")),
        InputKind(False, 3),
    ),
    "added to, and linear": (
        (linear("x", "a"), Node("add", ("x", "a"), "y")),
        InputKind(False, 3),
    ),
    "stretched": ((Node("add", ("x", "x"), "a"), linear("a", "y")), NUMBERS),
    "turned": ((plain("transpose", "x", "a", perm=[1, 0]), linear("a", "y")), NUMBERS),
    "sequences": ((plain("mean", "x", "a", axis=1), linear("a", "y")), NUMBERS),
    "behind a convolution": (
        (
            Node("conv2d", ("x",), "a", {"weight": "images"}),
            plain("flatten", "a", "b"),
            linear("b", "y"),
        ),
        NUMBERS,
    ),
    # As in a damaged store.
    "of four axes": ((linear("x", "y", "images"),), NUMBERS),
    "of a scalar": ((linear("x", "y", "scalar"),), NUMBERS),
    "of no features": ((linear("x", "y", "none"),), NUMBERS),
    "ids": ((Node("embedding", ("x",), "y", {"weight": "ids"}),), IDS),
    "bags": ((Node("embedding_bag", ("x",), "y", {"weight": "ids"}),), IDS),
    "ids, reshaped": ((plain("reshape", "x", "a", shape=[-1, 3]), LOOKED_UP), IDS),
    "ids, turned": ((plain("transpose", "x", "a", perm=[1, 0]), LOOKED_UP), IDS),
    "ids, flattened": ((plain("flatten", "x", "a"), LOOKED_UP), IDS),
    "batch norm": ((norm("batch_norm"),), InputKind(False, 7)),
    "batch norm of the last axis": ((norm("batch_norm", axis=-1),), InputKind(False, 7)),
    "batch norm of another": ((norm("batch_norm", axis=2),), NUMBERS),
    "layer norm": ((norm("layer_norm"),), InputKind(False, 7)),
    "layer norm of two axes": ((norm("layer_norm", "w"),), NUMBERS),
    "layer norm of a scalar": ((norm("layer_norm", "scalar"),), NUMBERS),
    "batch norm of a scalar": ((norm("batch_norm", "scalar"),), NUMBERS),
    "convolution of a scalar": ((Node("conv2d", ("x",), "y", {"weight": "scalar"}),), NUMBERS),
}


@pytest.mark.parametrize("what", KINDS)
def test_what_layers_tell(what: str) -> None:
    nodes, kind = KINDS[what]
    assert input_kind(Graph(("x",), ("y",), nodes), WEIGHTS, "m@1") == kind


def test_several_inputs_are_no_row() -> None:
    graph = Graph(("p", "q"), ("y",), (Node("concat", ("p", "q"), "y", {}, {"axis": 1}),))
    with pytest.raises(ArgumentError, match=r"m@1 takes several inputs \(p, q\); a row of SQL is"):
        input_kind(graph, WEIGHTS, "m@1")
