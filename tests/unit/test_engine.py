# SPDX-License-Identifier: Apache-2.0
"""Graphs run on stored tensors: every operation against torch, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.operations import OPS
from pydedup.serving.engine import _OPS, run_graph
from pydedup.serving.tensor import StoredTensor
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType, TensorInfo

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Model:
    """Tensors on pages in memory."""

    def __init__(self, **arrays: NDArray[Any]) -> None:
        self.pages = MemoryPages()
        self.pool = self.pages.pool()
        self.arrays = arrays
        self.maps = {name: self.pages.add(array, (8, 8)) for name, array in arrays.items()}
        self.asked: list[str] = []

    def __call__(self, name: str) -> StoredTensor:
        self.asked.append(name)
        array = self.arrays[name]
        info = TensorInfo(name, DType.of(array.dtype), array.shape, (8, 8))
        return StoredTensor(info, lambda: self.maps[name], self.pool, lambda: None)


def run_node(node: Node, model: Model, *inputs: NDArray[Any]) -> NDArray[Any]:
    graph = Graph(node.inputs, (node.output,), (node,))
    return run_graph(graph, model, dict(zip(node.inputs, inputs, strict=True)))[node.output]


def unary(op: str, **attrs: Any) -> Node:
    return Node(op, ("x",), "out", attrs=attrs)


RNG = np.random.default_rng(11)
NOTHING = Model()
#: Values in every region of the functions, but not infinite: see the test of extremes.
REAL = np.concatenate(
    [RNG.standard_normal(90) * 4, [0.0, -0.0, 21.0, -21.0, 100.0, -100.0]]
).astype(np.float32)

ELEMENTWISE: list[tuple[Node, Callable[[Any], Any]]] = [
    (unary("relu"), torch.relu),
    (unary("gelu"), F.gelu),
    (unary("gelu", approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    (unary("sigmoid"), torch.sigmoid),
    (unary("tanh"), torch.tanh),
    (unary("silu"), F.silu),
    (unary("leaky_relu"), F.leaky_relu),
    (unary("leaky_relu", alpha=0.3), lambda x: F.leaky_relu(x, 0.3)),
    (unary("elu"), F.elu),
    (unary("elu", alpha=1.7), lambda x: F.elu(x, 1.7)),
    (unary("softplus"), lambda x: F.softplus(x, threshold=50)),  # no shortcut above 20
    (unary("identity"), lambda x: x),
    (unary("softmax"), lambda x: torch.softmax(x, -1)),
    (unary("softmax", axis=0), lambda x: torch.softmax(x, 0)),
    (unary("log_softmax", axis=1), lambda x: torch.log_softmax(x, 1)),
    (unary("flatten"), lambda x: x.flatten(1)),
    (unary("flatten", start_axis=0), lambda x: x.flatten()),
    (unary("flatten", start_axis=-2), lambda x: x.flatten(-2)),
    (unary("flatten", start_axis=3), lambda x: x[..., None]),
    (unary("reshape", shape=[-1, 4]), lambda x: x.reshape(-1, 4)),
    (unary("transpose", perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)),
    (unary("mean", axis=1), lambda x: x.mean(1)),
    (unary("mean", axis=[0, 2], keepdims=True), lambda x: x.mean((0, 2), keepdim=True)),
    (unary("max", axis=-1), lambda x: x.amax(-1)),
    (unary("max", axis=[0, 2], keepdims=True), lambda x: x.amax((0, 2), keepdim=True)),
]


@pytest.mark.parametrize(
    ("node", "want"), ELEMENTWISE, ids=lambda v: str(dict(v.attrs)) if isinstance(v, Node) else ""
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations_without_weights(node: Node, want: Callable[[Any], Any], dtype: Any) -> None:
    x = REAL.reshape(4, 6, 4).astype(dtype)
    got = run_node(node, NOTHING, x)
    expected = want(torch.from_numpy(x)).numpy()
    assert got.dtype == dtype
    assert got.shape == expected.shape
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axis", [1, [0, 1]])
def test_nothing_has_the_mean_of_torch_and_no_maximum(axis: Any) -> None:
    x = np.ones((2, 0, 3), np.float32)
    with pytest.raises(ArgumentError, match="no maximum over axis"):
        run_node(unary("max", axis=axis), NOTHING, x)
    got = run_node(unary("mean", axis=axis), NOTHING, x)  # warnings are errors here
    np.testing.assert_array_equal(got, torch.from_numpy(x).mean(axis).numpy())


@pytest.mark.parametrize("start_axis", [-1, 0, 1])
def test_one_number_is_flattened_to_a_row(start_axis: int) -> None:
    assert run_node(unary("flatten", start_axis=start_axis), NOTHING, np.float32(3)).tolist() == [3]


def test_numbers_of_the_other_byte_order_keep_their_width() -> None:
    x = REAL.astype(np.float64) / 3
    for width in (4, 8):
        given = x.astype(f"=f{width}")
        got = run_node(unary("relu"), NOTHING, given.astype(given.dtype.newbyteorder()))
        assert got.dtype == given.dtype
        np.testing.assert_array_equal(got, np.maximum(given, 0))


def test_every_operation_is_computed_and_tested() -> None:
    assert set(_OPS) | {"linear", "conv2d"} == set(OPS)
    tested = {node.op for node, _ in ELEMENTWISE}
    assert set(OPS) - tested == {
        *("linear", "embedding", "embedding_bag", "layer_norm", "batch_norm"),
        *("add", "sub", "mul", "concat"),
        *("conv2d", "max_pool2d", "avg_pool2d"),  # in test_images.py
    }


@pytest.mark.parametrize(
    "op", ["relu", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "softmax", "log_softmax"]
)
def test_extremes_are_treated_as_torch_treats_them(op: str) -> None:
    function = {**{name: getattr(torch, name) for name in ("relu", "sigmoid", "tanh")}}.get(
        op, getattr(F, op)
    )
    rows = [
        [np.nan, 1.0, 2.0],
        [np.inf, 1.0, -1.0],
        [-np.inf, 1.0, 0.0],
        [-np.inf, -np.inf, -np.inf],
        [3e38, -3e38, 0.0],
    ]
    x = np.array(rows, np.float32)
    arguments = {"dim": -1} if "softmax" in op else {}
    want = function(torch.from_numpy(x), **arguments).numpy()
    np.testing.assert_allclose(run_node(unary(op), NOTHING, x), want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_two_inputs_broadcast(op: str) -> None:
    x = RNG.standard_normal((4, 1, 3)).astype(np.float32)
    y = RNG.standard_normal((5, 1)).astype(np.float32)
    got = run_node(Node(op, ("x", "y"), "out"), NOTHING, x, y)
    assert np.array_equal(got, getattr(torch, op)(torch.from_numpy(x), torch.from_numpy(y)).numpy())
    with pytest.raises(ArgumentError, match=rf"node '{op}'.*\(4, 1, 3\), \(2, 2\)"):
        run_node(Node(op, ("x", "y"), "out"), NOTHING, x, np.ones((2, 2)))


def test_concat_keeps_ids_and_widens_the_rest() -> None:
    node = Node("concat", ("x", "y"), "out", attrs={"axis": -1})
    ids = np.array([[1, 2]])
    assert run_node(node, NOTHING, ids, ids).dtype == ids.dtype
    mixed = run_node(node, NOTHING, ids, np.array([[0.5]], np.float32))
    assert mixed.dtype == np.float32
    assert mixed.tolist() == [[1.0, 2.0, 0.5]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5, 3)])
def test_linear(dtype: Any, transpose: bool, lead: tuple[int, ...]) -> None:
    w = RNG.standard_normal((21, 13)).astype(dtype)
    bias = RNG.standard_normal(13 if transpose else 21).astype(dtype)
    compute = np.float64 if dtype is np.float64 else np.float32
    x = RNG.standard_normal((*lead, 21 if transpose else 13)).astype(compute)
    model = Model(w=w, bias=bias)
    matrix = torch.from_numpy(w.astype(compute))
    for weights in ({"weight": "w"}, {"weight": "w", "bias": "bias"}):
        node = Node("linear", ("x",), "out", weights, {"transpose": transpose})
        want = F.linear(torch.from_numpy(x), matrix.T if transpose else matrix)
        if "bias" in weights:
            want = want + torch.from_numpy(bias.astype(compute))
        got = run_node(node, model, x)
        assert got.dtype == compute
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def test_nan_and_infinity_pass_through_linear() -> None:
    w = RNG.standard_normal((9, 4)).astype(np.float32)
    w[2, 1] = np.nan
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    x[1, 0] = np.inf
    got = run_node(Node("linear", ("x",), "out", {"weight": "w"}), Model(w=w), x)
    want = F.linear(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_embedding(dtype: Any) -> None:
    w = RNG.standard_normal((40, 6)).astype(dtype)
    node = Node("embedding", ("ids",), "out", {"weight": "w"})
    model = Model(w=w)
    for shape in ((), (5,), (2, 3, 4)):
        for kind in (np.int64, np.int32, np.uint8):
            ids = RNG.integers(0, 40, shape).astype(kind)
            got = run_node(node, model, ids)
            assert np.array_equal(got, w[ids].astype(got.dtype))
            assert got.dtype == (np.float64 if dtype is np.float64 else np.float32)
    for wrong, message in (([40], "id 40 is out of range"), ([-1], "id -1"), ([1.0], "integers")):
        with pytest.raises(ArgumentError, match=f"node 'embedding' that makes 'out': .*{message}"):
            run_node(node, model, np.array(wrong))


def test_ids_counted_from_the_end() -> None:
    w = RNG.standard_normal((200, 6)).astype(np.float32)
    node = Node("embedding", ("ids",), "out", {"weight": "w"}, {"from_end": True})
    for ids in (np.array([[0, -1], [-128, 127]], np.int8), np.array(-200), np.array([3], np.uint8)):
        assert np.array_equal(run_node(node, Model(w=w), ids), w[ids])
    for wrong in (-201, 200):
        with pytest.raises(ArgumentError, match=f"id {wrong} is out of range"):
            run_node(node, Model(w=w), np.array([wrong]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, 7, -3])
def test_embedding_bag(mode: str, padding: int | None) -> None:
    w = RNG.standard_normal((40, 6)).astype(np.float32)
    model = Model(w=w)
    pad = None if padding is None else padding % 40
    attrs: dict[str, Any] = {"mode": mode, "padding_idx": padding}

    def want(ids: NDArray[Any], offsets: NDArray[Any] | None, last: bool = False) -> NDArray[Any]:
        result = F.embedding_bag(
            torch.from_numpy(ids),
            torch.from_numpy(w),
            None if offsets is None else torch.from_numpy(offsets),
            mode=mode,
            padding_idx=pad,
            include_last_offset=last,
        )
        return np.asarray(result.numpy())

    ids = RNG.integers(0, 40, (30, 9))
    ids[:, 5:] = 7  # so that padding occurs, and
    ids[3] = 7 if pad is None else pad  # makes a whole bag
    weights = {"weight": "w"}
    flat = Node("embedding_bag", ("ids",), "out", weights, attrs)
    np.testing.assert_allclose(run_node(flat, model, ids), want(ids, None), rtol=1e-5, atol=1e-6)

    offsets = np.array([0, 0, 4, 9, 9, 200])
    bags = Node("embedding_bag", ("ids", "offsets"), "out", weights, attrs)
    line = ids.reshape(-1)
    got = run_node(bags, model, line, offsets)
    np.testing.assert_allclose(got, want(line, offsets), rtol=1e-5, atol=1e-5)

    ends = np.append(offsets, 260)
    attrs = {**attrs, "include_last_offset": True}
    closed = Node("embedding_bag", ("ids", "offsets"), "out", weights, attrs)
    got = run_node(closed, model, line, ends)
    np.testing.assert_allclose(got, want(line[:260], ends, True), rtol=1e-5, atol=1e-5)


def test_an_empty_table_has_no_rows_even_for_padding() -> None:
    model = Model(w=np.ones((0, 2), np.float32))
    node = Node("embedding_bag", ("ids",), "out", {"weight": "w"}, {"padding_idx": 0})
    assert run_node(node, model, np.zeros((3, 0), np.int64)).tolist() == [[0, 0]] * 3
    with pytest.raises(ArgumentError, match="id 0 is out of range; the matrix has 0 rows"):
        run_node(node, model, np.zeros((3, 1), np.int64))


def test_wrong_bags_are_refused() -> None:
    model = Model(w=np.ones((5, 2), np.float32))
    for padding in (None, 1):
        for last in (False, True):
            node = Node(
                "embedding_bag",
                ("ids", "offsets"),
                "out",
                {"weight": "w"},
                {"padding_idx": padding, "include_last_offset": last},
            )
            for ids, offsets in (
                ([0, 1], [0, 3]),
                ([0, 1], [1, 2]),
                ([0, 1], [0.0, 2.0]),
                ([0.0, 1.0], [0, 2]),
                ([[0, 1]], [0, 2]),
                ([0, 9], [0, 2]),
                ([0, 1], [[0, 2]]),
            ):
                with pytest.raises(ArgumentError, match="node 'embedding_bag'"):
                    run_node(node, model, np.array(ids), np.array(offsets))


@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norm(axes: int) -> None:
    shape = (5, 8)[-axes:]
    w, b = (RNG.standard_normal(shape).astype(np.float32) for _ in range(2))
    x = (RNG.standard_normal((3, 5, 8)) * 3 + 2).astype(np.float32)
    node = Node(
        "layer_norm", ("x",), "out", {"weight": "w", "bias": "b"}, {"axes": axes, "eps": 1e-3}
    )
    want = F.layer_norm(*map(torch.from_numpy, (x,)), shape, *map(torch.from_numpy, (w, b)), 1e-3)
    model = Model(w=w, b=b)
    np.testing.assert_allclose(run_node(node, model, x), want.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="last axes must be"):
        run_node(node, model, np.ones((3, 9)))


@pytest.mark.parametrize("axis", [1, -1])
def test_batch_norm(axis: int) -> None:
    names = ("weight", "bias", "mean", "var")
    vectors = {name: RNG.random(5).astype(np.float32) + 0.1 for name in names}
    x = RNG.standard_normal((4, 5, 5)).astype(np.float32)
    node = Node(
        "batch_norm", ("x",), "out", {name: name for name in names}, {"axis": axis, "eps": 1e-4}
    )
    tensors = {name: torch.from_numpy(vector) for name, vector in vectors.items()}
    swapped = torch.from_numpy(x).transpose(1, axis)
    want = F.batch_norm(
        swapped, tensors["mean"], tensors["var"], tensors["weight"], tensors["bias"], eps=1e-4
    ).transpose(1, axis)
    got = run_node(node, Model(**vectors), x)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="must have 5 entries"):
        run_node(node, Model(**vectors), np.ones((3, 4, 4)))
    for name in names:  # as the plan of a run has it
        one_wide = {**vectors, name: vectors[name].astype(np.float64)}
        assert run_node(node, Model(**one_wide), x).dtype == np.float64


# ---- graphs -------------------------------------------------------------------------------------


def classifier() -> tuple[Graph, Model]:
    model = Model(
        table=RNG.standard_normal((100, 12)).astype(np.float32),
        w1=RNG.standard_normal((16, 12)).astype(np.float32),
        b1=RNG.standard_normal(16).astype(np.float32),
        w2=RNG.standard_normal((3, 16)).astype(np.float32),
        b2=RNG.standard_normal(3).astype(np.float32),
    )
    graph = Graph(
        ("ids",),
        ("scores", "hidden"),
        (
            Node("embedding_bag", ("ids",), "pooled", {"weight": "table"}),
            Node("linear", ("pooled",), "h", {"weight": "w1", "bias": "b1"}),
            Node("relu", ("h",), "hidden"),
            Node("linear", ("hidden",), "logits", {"weight": "w2", "bias": "b2"}),
            Node("softmax", ("logits",), "scores"),
        ),
    )
    return graph, model


def test_a_classifier_predicts_as_in_torch() -> None:
    graph, model = classifier()
    t = {name: torch.from_numpy(array) for name, array in model.arrays.items()}
    ids = RNG.integers(0, 100, (50, 20))
    outputs = run_graph(graph, model, {"ids": ids})
    hidden = F.linear(t["table"][torch.from_numpy(ids)].mean(1), t["w1"], t["b1"]).relu()
    scores = F.linear(hidden, t["w2"], t["b2"]).softmax(-1)
    assert set(outputs) == {"scores", "hidden"}
    np.testing.assert_allclose(outputs["hidden"], hidden.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["scores"], scores.numpy(), rtol=1e-4, atol=1e-5)


def test_an_activation_is_fused_only_where_nobody_else_looks() -> None:
    w = RNG.standard_normal((4, 4)).astype(np.float32)
    x = RNG.standard_normal((6, 4)).astype(np.float32)
    linear = Node("linear", ("x",), "h", {"weight": "w"})
    relu = Node("relu", ("h",), "a")
    both = Graph(("x",), ("a", "b"), (linear, relu, Node("tanh", ("h",), "b")))
    shown = Graph(("x",), ("h", "a"), (linear, relu))
    late = Graph(
        ("x",), ("sum",), (linear, Node("tanh", ("x",), "t"), relu, Node("add", ("a", "t"), "sum"))
    )
    h = F.linear(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    a = np.maximum(h, 0)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    outputs = run_graph(both, Model(w=w), {"x": x})
    np.testing.assert_allclose(outputs["a"], a, **close)
    np.testing.assert_allclose(outputs["b"], np.tanh(h), **close)
    outputs = run_graph(shown, Model(w=w), {"x": x})
    np.testing.assert_allclose(outputs["h"], h, **close)
    np.testing.assert_allclose(outputs["a"], a, **close)
    outputs = run_graph(late, Model(w=w), {"x": x})
    np.testing.assert_allclose(outputs["sum"], a + np.tanh(x), **close)


def test_vectors_are_read_once_per_run() -> None:
    model = Model(w=np.eye(4, dtype=np.float32), b=np.ones(4, np.float32))
    weights = {"weight": "w", "bias": "b"}
    graph = Graph(
        ("x",),
        ("out",),
        (Node("linear", ("x",), "h", weights), Node("linear", ("h",), "out", weights)),
    )
    x = np.zeros((2, 4), np.float32)
    assert run_graph(graph, model, {"x": x})["out"].tolist() == [[2.0] * 4] * 2
    assert model.asked.count("b") == 1
    run_graph(graph, model, {"x": x})
    assert model.asked.count("b") == 2


def test_an_input_may_be_an_output() -> None:
    graph = Graph(("x",), ("x", "y"), (Node("relu", ("x",), "y"),))
    outputs = run_graph(graph, NOTHING, {"x": [-1.0, 2.0]})
    assert outputs["x"].tolist() == [-1.0, 2.0]
    assert outputs["y"].tolist() == [0.0, 2.0]


def test_wrong_inputs_are_refused() -> None:
    graph, model = classifier()
    ids = np.zeros((2, 3), np.int64)
    for inputs, message in (
        ({}, "input 'ids' is missing; the model takes: ids"),
        ({"ids": ids, "mask": ids}, "unknown input 'mask'; the model takes: ids"),
        ({"ids": ids[0]}, "node 'embedding_bag' that makes 'pooled': ids of rank 1"),
        ({"ids": ids + 100}, "id 100 is out of range; the matrix has 100 rows"),
        ({"ids": ids.astype(np.float32)}, "ids must be integers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run_graph(graph, model, inputs)
    linear = Node("linear", ("x",), "out", {"weight": "w1"})
    for x in (np.ones((2, 13)), np.array(["a"] * 12), np.ones((12, 2))):
        with pytest.raises(ArgumentError, match="node 'linear' that makes 'out'"):
            run_node(linear, model, x)
    for node, x in (
        (unary("softmax", axis=2), np.ones((2, 2))),
        (unary("flatten", start_axis=3), np.ones((2, 2))),
        (unary("reshape", shape=[3, -1]), np.ones((2, 2))),
        (unary("transpose", perm=[0, 2, 1]), np.ones((2, 2))),
        (unary("mean", axis=[0, 5]), np.ones((2, 2))),
        (unary("relu"), np.array(["text"])),
        (unary("tanh"), np.ones(3, np.complex128)),
    ):
        with pytest.raises(ArgumentError, match=f"node '{node.op}'"):
            run_node(node, NOTHING, x)
