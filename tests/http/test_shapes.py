# SPDX-License-Identifier: Apache-2.0
"""What is said of a model's inputs and outputs, from its graph alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.graph import Graph, Node
from pydedup.http.problems import HttpError
from pydedup.http.served import ServedStore
from pydedup.http.service import Answer, run_batch


def make(
    *nodes: Node, inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] = ("y",)
) -> Graph:
    return Graph(inputs, outputs, nodes)


ZEROS: dict[str, Any] = {
    "w": np.zeros((3, 4), np.float32),
    "wide": np.zeros((3, 4), np.float64),
    "table": np.zeros((9, 5), np.float32),
    "kernel": np.zeros((6, 2, 3, 3), np.float32),
    "norm": np.zeros(4, np.float32),
    "six": np.zeros(6, np.float32),
    "after": np.zeros((3, 6), np.float32),
    "three": np.zeros(3, np.float64),
    "ones": np.ones(3, np.float32),
}
NORM = {"weight": "norm", "bias": "norm"}
LAST = {"weight": "ones", "bias": "ones", "mean": "ones", "var": "ones"}
BATCH = {"weight": "six", "bias": "six", "mean": "six", "var": "six"}


def swishes(count: int) -> list[Node]:
    """As exporters write them: each doubles the number of ways from the input to the output."""
    nodes, value = [], "x"
    for i in range(count):
        nodes += [Node("sigmoid", (value,), f"s{i}"), Node("mul", (value, f"s{i}"), f"m{i}")]
        value = f"m{i}"
    return nodes


#: Graph, inputs and outputs as (datatype, shape), an input of which predict makes such an output.
CASES: dict[str, tuple[Graph, list[Any], list[Any]]] = {
    "linear": (
        make(Node("linear", ("x",), "y", {"weight": "w"})),
        [("FP32", [-1, 4])],
        [("FP32", [-1, 3])],
    ),
    "linear, transposed": (
        make(Node("linear", ("x",), "y", {"weight": "w"}, {"transpose": True})),
        [("FP32", [-1, 3])],
        [("FP32", [-1, 4])],
    ),
    "in double": (
        make(Node("linear", ("x",), "y", {"weight": "wide"})),
        [("FP64", [-1, 4])],
        [("FP64", [-1, 3])],
    ),
    "a bias in double": (
        make(Node("linear", ("x",), "y", {"weight": "w", "bias": "three"})),
        [("FP32", [-1, 4])],
        [("FP32", [-1, 3])],
    ),
    "single behind double": (
        make(
            Node("linear", ("x",), "h", {"weight": "wide"}),
            Node("linear", ("h",), "y", {"weight": "w"}, {"transpose": True}),
        ),
        [("FP64", [-1, 4])],
        [("FP32", [-1, 4])],
    ),
    "norms in double but for their weights": (
        make(
            Node("linear", ("x",), "h", {"weight": "w"}),
            Node("layer_norm", ("h",), "y", {"weight": "ones", "bias": "three"}),
            Node("batch_norm", ("h",), "z", {**LAST, "mean": "three"}, {"axis": -1}),
            Node("batch_norm", ("h",), "v", {**LAST, "bias": "three"}, {"axis": -1}),
            outputs=("y", "z", "v"),
        ),
        [("FP32", [-1, 4])],
        [("FP64", [-1, 3])] * 3,
    ),
    "given as halves": (
        Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),), ("y",)),
        [("FP32", [-1, 4])],
        [("FP16", [-1, 3])],
    ),
    "behind others": (
        make(
            Node("relu", ("x",), "r"),
            Node("flatten", ("r",), "f"),
            Node("linear", ("f",), "y", {"weight": "w"}),
        ),
        [("FP32", [-1, 4])],
        [("FP32", [-1, 3])],
    ),
    "a column of one number a row": (
        make(
            Node("linear", ("x",), "h", {"weight": "w"}),
            Node("mean", ("h",), "m", attrs={"axis": -1}),
            Node("flatten", ("m",), "y"),
        ),
        [("FP32", [-1, 4])],
        [("FP32", [-1, 1])],
    ),
    "behind very many ways": (
        make(*swishes(100), Node("linear", ("m99",), "y", {"weight": "w"})),
        [("FP32", [-1, 4])],
        [("FP32", [-1, 3])],
    ),
    "images": (
        make(
            Node("conv2d", ("x",), "c", {"weight": "kernel"}),
            Node("batch_norm", ("c",), "b", BATCH),
            Node("avg_pool2d", ("b",), "p", attrs={"kernel": [2, 2], "stride": [2, 2]}),
            Node("mean", ("p",), "m", attrs={"axis": [2, 3]}),
            Node("linear", ("m",), "y", {"weight": "after"}),
        ),
        [("FP32", [-1, 2, -1, -1])],
        [("FP32", [-1, 3])],
    ),
    "channels first": (
        make(
            Node("batch_norm", ("x",), "b", BATCH),
            Node("max_pool2d", ("b",), "y", attrs={"kernel": [2, 2], "stride": [2, 2]}),
        ),
        [("FP32", [-1, -1, -1, -1])],
        [("FP32", [-1, -1, -1, -1])],
    ),
    "ids": (
        make(
            Node("embedding", ("x",), "e", {"weight": "table"}),
            Node("mean", ("e",), "y", attrs={"axis": 1}),
        ),
        [("INT64", [-1, -1])],
        [("FP32", [-1, 5])],
    ),
    "ids, turned": (
        make(
            Node("transpose", ("x",), "t", attrs={"perm": [1, 0]}),
            Node("embedding", ("t",), "y", {"weight": "table"}),
        ),
        [("INT64", [-1, -1])],
        [("FP32", [-1, -1, 5])],
    ),
    "bags": (
        make(Node("embedding_bag", ("x", "o"), "y", {"weight": "table"}), inputs=("x", "o")),
        [("INT64", [-1]), ("INT64", [-1])],
        [("FP32", [-1, 5])],
    ),
    "norm": (make(Node("layer_norm", ("x",), "y", NORM)), [("FP32", [-1, 4])], [("FP32", [-1, 4])]),
    "sequences": (
        make(
            Node("mean", ("x",), "m", attrs={"axis": 1}),
            Node("linear", ("m",), "y", {"weight": "w"}),
        ),
        [("FP32", [-1, -1, 4])],
        [("FP32", [-1, 3])],
    ),
    "two inputs in one row": (
        make(
            Node("concat", ("x", "z"), "c", attrs={"axis": -1}),
            Node("linear", ("c",), "y", {"weight": "w"}),
            inputs=("x", "z"),
        ),
        [("FP32", [-1, -1]), ("FP32", [-1, -1])],
        [("FP32", [-1, 3])],
    ),
    "turned": (
        make(
            Node("transpose", ("x",), "t", attrs={"perm": [1, 0]}),
            Node("linear", ("t",), "y", {"weight": "w"}),
        ),
        [("FP32", [4, -1])],
        [("FP32", [-1, 3])],
    ),
    "no weights": (make(Node("relu", ("x",), "y")), [("FP32", [-1, -1])], [("FP32", [-1, -1])]),
    "shapes that fit nothing": (
        make(
            Node("linear", ("x",), "h", {"weight": "w"}),
            Node("conv2d", ("h",), "y", {"weight": "kernel"}),
        ),
        [("FP32", [-1, 4])],
        [("FP32", [-1])],
    ),
    "a sum of all": (
        make(Node("mean", ("x",), "y", attrs={"axis": [0, 1]})),
        [("FP32", [-1, -1])],
        [("FP32", [])],
    ),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = f"sqlite:///{tmp_path_factory.mktemp('shapes') / 's.db'}"
    with pydedup.open(url) as made:
        for number, (graph, _, _) in enumerate(CASES.values()):
            made.add(f"m{number}@1", ZEROS, graph=graph)
    with ServedStore.connect(url, "64MiB") as found:
        yield found


@pytest.mark.parametrize("name", CASES)
def test_signature(store: Any, name: str) -> None:
    number = list(CASES).index(name)
    _, inputs, outputs = CASES[name]
    signature = store.served(f"m{number}").signature
    assert [(spec.datatype, list(spec.shape)) for spec in signature.inputs] == inputs
    assert [(spec.datatype, list(spec.shape)) for spec in signature.outputs] == outputs
    if name == "shapes that fit nothing":
        return
    # The model takes what is said, and gives what is said.
    given = {}
    for spec in signature.inputs:
        sizes = [8 if size == -1 else size for size in spec.shape]
        if name == "two inputs in one row":
            sizes[-1] = 2
        dtype = {"INT64": np.int64, "FP32": np.float32, "FP64": np.float64}[spec.datatype]
        given[spec.name] = np.zeros(sizes, dtype)
    if name == "channels first":
        given["x"] = np.zeros((8, 6, 8, 8), np.float32)
    for spec in signature.outputs:
        found = store.predict(f"m{number}", given)[spec.name]
        assert found.ndim == len(spec.shape)
        assert all(a == b for a, b in zip(found.shape, spec.shape, strict=True) if b != -1)
        assert found.dtype == {"FP16": np.float16, "FP64": np.float64}.get(
            spec.datatype, np.float32
        )


def test_rows_that_are_flattened_are_counted(store: Any) -> None:
    (asked,) = (f"m{number}" for number, name in enumerate(CASES) if name == "behind others")

    def answer(*shape: int) -> Any:
        inputs = {"x": np.zeros(shape, np.float32)}
        ((_, found),) = run_batch(store, [(asked, inputs, lambda *nbytes: None)])
        assert isinstance(found, Answer)
        return found.outputs

    assert answer(7, 4)["y"].shape == answer(7, 2, 2)["y"].shape == (7, 3)
    refused = answer(7, 5)
    assert isinstance(refused, HttpError)
    assert "[7, 5] does not fit: the last axis of 'x' has 4 entries" in str(refused)
