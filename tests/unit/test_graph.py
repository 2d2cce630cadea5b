# SPDX-License-Identifier: Apache-2.0
"""Graphs: what is refused, the JSON form, and inferred graphs computed against their frameworks.

`compute` is a small numpy reading of the operations' definitions, independent of the engine that
serves graphs. Keras itself is no test dependency: its configs below were shortened from files that
Keras 3.15 and 2 wrote, and the expected values are computed here.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pydedup.errors import ArgumentError
from pydedup.formats.infer_keras import infer_from_keras
from pydedup.formats.infer_onnx import infer_from_onnx
from pydedup.formats.infer_torch import infer_from_torch
from pydedup.graph import Graph, Node
from pydedup.operations import OPS

Array = npt.NDArray[Any]
_erf = np.vectorize(math.erf)


def compute(graph: Graph, tensors: Mapping[str, Array], *inputs: Array) -> list[Array]:
    """Run a graph in numpy, one node after the other."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        weights = {role: tensors[name].astype(np.float64) for role, name in node.weights.items()}
        values[node.output] = _compute(node, [values[name] for name in node.inputs], weights)
    return [values[name] for name in graph.outputs]


def _compute(node: Node, inputs: list[Array], w: dict[str, Array]) -> Any:
    x, attr = inputs[0], node.attr
    match node.op:
        case "linear":
            matrix = w["weight"] if attr("transpose") else w["weight"].T
            return x @ matrix + w.get("bias", np.zeros(1))
        case "embedding":
            return w["weight"][x]
        case "embedding_bag":
            return _bag(node, inputs, w["weight"])
        case "relu":
            return np.maximum(x, 0)
        case "gelu" if attr("approximate") == "none":
            return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
        case "gelu":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "sigmoid":
            return 1 / (1 + np.exp(-x))
        case "silu":
            return x / (1 + np.exp(-x))
        case "tanh":
            return np.tanh(x)
        case "softplus":
            return np.log1p(np.exp(x))
        case "softmax" | "log_softmax":
            shifted = x - x.max(attr("axis"), keepdims=True)
            total = np.exp(shifted).sum(attr("axis"), keepdims=True)
            return np.exp(shifted) / total if node.op == "softmax" else shifted - np.log(total)
        case "leaky_relu":
            return np.where(x > 0, x, attr("alpha") * x)
        case "elu":
            return np.where(x > 0, x, attr("alpha") * np.expm1(x))
        case "identity":
            return x
        case "flatten":
            return x.reshape(*x.shape[: attr("start_axis")], -1)
        case "reshape":
            return x.reshape(attr("shape"))
        case "layer_norm":
            axes = tuple(range(-attr("axes"), 0))
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            return (x - mean) / np.sqrt(var + attr("eps")) * w["weight"] + w["bias"]
        case "batch_norm":
            shape = [1] * x.ndim
            shape[attr("axis")] = -1
            v = {role: value.reshape(shape) for role, value in w.items()}
            return (x - v["mean"]) / np.sqrt(v["var"] + attr("eps")) * v["weight"] + v["bias"]
        case "add":
            return x + inputs[1]
        case "mul":
            return x * inputs[1]
        case "sub":
            return x - inputs[1]
        case "concat":
            return np.concatenate(inputs, attr("axis"))
        case "mean":
            axis = attr("axis")
            axis = tuple(axis) if isinstance(axis, list) else axis
            return x.mean(axis, keepdims=attr("keepdims"))
        case "transpose":
            return x.transpose(attr("perm"))
    raise AssertionError(node.op)


def _bag(node: Node, inputs: list[Array], weight: Array) -> Array:
    ids = inputs[0]
    if len(inputs) == 1:
        bags = list(ids)
    else:
        ends = inputs[1][1:] if node.attr("include_last_offset") else [*inputs[1][1:], len(ids)]
        bags = [ids[a:b] for a, b in zip(inputs[1], ends, strict=False)]
    padding = node.attr("padding_idx")
    rows = []
    for bag in bags:
        kept = weight[[i for i in bag if padding is None or i != padding % len(weight)]]
        mode: str = node.attr("mode")
        empty = np.zeros(weight.shape[1])
        rows.append(getattr(kept, mode)(0) if len(kept) else empty)
    return np.array(rows)


# ---- validity ----------------------------------------------------------------------------------

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
    graph = Graph(("x",), ("v0", f"v{len(nodes) - 1}"), tuple(nodes), ("v0",))
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


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "[" * 100_000, b"\xff"])
def test_what_is_no_json_object_is_refused(text: str | bytes) -> None:
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


# ---- torch -------------------------------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)  # type: ignore[no-any-return,no-untyped-call]


class PlainSubclass(nn.Sequential):
    """Without a forward of its own: still a chain."""


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _trained_norm(module: nn.Module) -> nn.Module:
    """Give a batch norm statistics that differ from the initial ones."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.dtype == torch.float32:
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
    return module


IDS = torch.tensor([[1, 2, 0], [4, 0, 0], [3, 3, 1], [0, 0, 0], [3, 3, 3]])

CHAINS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 2, bias=False)
        ),
        torch.randn(3, 5),
    ),
    "nested": (
        lambda: PlainSubclass(
            nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Sequential(nn.Softmax(-1))
        ),
        torch.randn(3, 5),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3), nn.LogSoftmax(1)),
        IDS,
    ),
    "bag-mean": (lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 2)), IDS),
    "bag-sum-padded": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum", padding_idx=0), nn.SiLU()),
        IDS,
    ),
    "bag-max-padded-from-the-end": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="max", padding_idx=-3)),
        IDS,
    ),
    "norms": (
        lambda: nn.Sequential(nn.BatchNorm1d(5, eps=0.01), nn.GELU(), nn.LayerNorm(5), nn.ELU(0.7)),
        torch.randn(3, 5),
    ),
    "norms-of-rank-3": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm((4, 6)), nn.LeakyReLU(0.2)),
        torch.randn(3, 4, 6),
    ),
    "activations": (
        lambda: nn.Sequential(nn.GELU("tanh"), nn.Softplus(), nn.Sigmoid(), nn.Identity()),
        torch.randn(3, 5) * 10,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_torch_chains_compute_the_same(name: str) -> None:
    torch.manual_seed(1)
    module = _trained_norm(CHAINS[name][0]()).eval()
    x = CHAINS[name][1]
    graph = infer_from_torch(module)
    assert graph is not None
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    graph.validate({key: value.shape for key, value in tensors.items()})
    (result,) = compute(graph, tensors, x.numpy())
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_may_be_called_as_the_input_is() -> None:
    module = nn.Sequential(OrderedDict(input=nn.Linear(3, 3), output=nn.Linear(3, 2)))
    for chain in (module, module[:1]):
        graph = infer_from_torch(chain)
        assert graph is not None
        assert graph.inputs == ("input",)
        tensors = {key: value.numpy() for key, value in chain.state_dict().items()}
        x = torch.randn(2, 3)
        (result,) = compute(graph, tensors, x.numpy())
        np.testing.assert_allclose(result, chain(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_appears_twice() -> None:
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.ReLU(), shared).eval()
    graph = infer_from_torch(module)
    assert graph is not None
    assert [node.op for node in graph.nodes] == ["linear", "relu", "linear"]
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    x = torch.randn(2, 4)
    (result,) = compute(graph, tensors, x.numpy())
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def _with_hook() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda layer, args, output: output * 2)
    return module


def _with_outer_hook() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    return module


def _with_patched_forward() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _without_layer() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module.add_module("none", None)
    return module


def _with_patched_layer() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module[0].forward = lambda x: x
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnForward(nn.Linear(2, 2)),
        lambda: nn.Sequential(Doubling(2, 2)),
        lambda: nn.Sequential(nn.Linear(2, 2), OwnForward(nn.ReLU())),
        _with_hook,
        _with_outer_hook,
        _with_patched_forward,
        _with_patched_layer,
        _without_layer,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1)),
        lambda: nn.Sequential(nn.LSTM(2, 2)),
        lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)),
        lambda: nn.Sequential(nn.EmbeddingBag(3, 2, max_norm=1.0)),
        lambda: nn.Sequential(nn.Flatten(0, 1)),
        lambda: nn.Sequential(nn.Softmax(None)),
        lambda: nn.Sequential(nn.Softplus(beta=2)),
        lambda: nn.Sequential(nn.LayerNorm(3, elementwise_affine=False)),
        lambda: nn.Sequential(nn.LayerNorm(3, bias=False)),
        lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False)),
        lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
        nn.Sequential,
        lambda: nn.Linear(2, 2),
        lambda: nn.ModuleList([nn.Linear(2, 2)]),
        lambda: object(),
    ],
)
def test_uncertain_torch_modules_have_no_graph(make: Callable[[], object]) -> None:
    assert infer_from_torch(make()) is None


# ---- ONNX --------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)


def _tensor(name: str, *shape: int) -> onnx.TensorProto:
    values = RNG.standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(np.abs(values) + 0.5 if name == "var" else values, name)


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _grid(name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.arange(24).reshape(6, 4), name)


def _model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    shape: tuple[Any, ...] = ("n", 6),
    *,
    kind: int = TensorProto.FLOAT,
    opset: int = 20,
    rank: int = 2,
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _n(op: str, inputs: str, output: str = "y", **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attrs)


ONNX: dict[str, onnx.ModelProto] = {
    "gemm": _model([_n("Gemm", "x w b", transB=1)], [_tensor("w", 4, 6), _tensor("b", 4)]),
    "gemm-untransposed": _model([_n("Gemm", "x w b")], [_tensor("w", 6, 4), _tensor("b", 4)]),
    "matmul-add": _model(
        [_n("MatMul", "x w", "h"), _n("Add", "b h", "z"), _n("Relu", "z")],
        [_tensor("w", 6, 4), _tensor("b", 4)],
    ),
    "matmul-used-twice": _model(
        [_n("MatMul", "x w", "h"), _n("Sigmoid", "h", "s"), _n("Mul", "h s")], [_tensor("w", 6, 4)]
    ),
    "two-branches": _model(
        [
            _n("Gemm", "x w b", "h", transB=1),
            _n("Tanh", "h", "t"),
            _n("Sub", "t h", "s"),
            _n("Concat", "s x", "c", axis=-1),
            _n("LogSoftmax", "c", axis=-1),
        ],
        [_tensor("w", 4, 6), _tensor("b", 4)],
    ),
    "text": _model(
        [
            _n("Gather", "table x", "e"),
            _n("ReduceMean", "e axes", "m", keepdims=0),
            _n("Dropout", "m", "d"),
            _n("Gemm", "d w b", transB=1),
        ],
        [_tensor("table", 9, 4), _ints("axes", 1), _tensor("w", 3, 4), _tensor("b", 3)],
        kind=TensorProto.INT64,
    ),
    "flat-text": _model(
        [_n("Reshape", "x to", "r"), _n("Gather", "table r", "e"), _n("MatMul", "e w")],
        [_tensor("table", 9, 4), _ints("to", -1), _tensor("w", 4, 3)],
        kind=TensorProto.INT64,
    ),
    "old-mean": _model([_n("ReduceMean", "x", axes=[1], keepdims=1)], [], opset=11),
    "norms": _model(
        [
            _n("BatchNormalization", "x s b mean var", "h", epsilon=0.01),
            _n("LayerNormalization", "h s b", "l", axis=-1),
            _n("Elu", "l", alpha=0.5),
        ],
        [_tensor("s", 6), _tensor("b", 6), _tensor("mean", 6), _tensor("var", 6)],
    ),
    "layer-norm-from-the-front": _model(
        [_n("LayerNormalization", "x s b", axis=1)], [_tensor("s", 6), _tensor("b", 6)]
    ),
    "shapes": _model(
        [
            helper.make_node("Constant", [], ["to"], value=_ints("", 0, 2, 3)),
            _n("Reshape", "x to", "r"),
            _n("Transpose", "r", "t", perm=[0, 2, 1]),
            _n("Flatten", "t", "f"),
            _n("LeakyRelu", "f", "a", alpha=0.3),
            _n("Softplus", "a", "p"),
            _n("Gelu", "p", "g", approximate="tanh"),
            _n("Identity", "g"),
        ],
        [],
    ),
    "flatten-by-reshape": _model([_n("Reshape", "x to")], [_ints("to", 0, -1)], ("n", 2, 3)),
    "old-softmax": _model([_n("Softmax", "x", axis=1)], [], opset=11),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnx_models_compute_the_same(name: str) -> None:
    model = ONNX[name]
    graph = infer_from_onnx(model)
    assert graph is not None
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    graph.validate({key: value.shape for key, value in tensors.items()})
    shape = [d.dim_value or 5 for d in model.graph.input[0].type.tensor_type.shape.dim]
    if model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT64:
        x: Array = RNG.integers(0, 9, shape)
    else:
        x = RNG.standard_normal(shape).astype(np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    (result,) = compute(graph, tensors, x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        _model([_n("Gemm", "x w", alpha=2.0)], [_tensor("w", 6, 4)]),
        _model([_n("Gemm", "x w b", beta=2.0)], [_tensor("w", 6, 4), _tensor("b", 4)]),
        _model([_n("Gemm", "x w b")], [_tensor("w", 6, 4), _tensor("b", 1)]),
        _model([_n("Gemm", "x w", transA=1)], [_tensor("w", 6, 4)]),
        _model([_n("MatMul", "w x")], [_tensor("w", 2, 3)], (3, 6)),
        _model([_n("MatMul", "x w")], [_tensor("w", 2, 6, 4)], rank=3),
        _model([_n("Add", "x b")], [_tensor("b", 6)]),
        _model(
            [_n("MatMul", "x w", "h"), _n("Add", "h b")], [_tensor("w", 6, 4), _tensor("b", 1, 4)]
        ),
        _model([_n("Gather", "table x", axis=1)], [_tensor("table", 3, 9)], kind=7, rank=3),
        _model([_n("Softmax", "x", axis=1)], [], ("n", 2, 3), opset=11, rank=3),
        _model([_n("Flatten", "x", axis=0)], []),
        _model([_n("Reshape", "x to")], [_ints("to", 2, 0)], (3, 6)),
        _model([_n("LayerNormalization", "x s")], [_tensor("s", 6)]),
        _model([_n("LayerNormalization", "x s b")], [_tensor("s", 1), _tensor("b", 1)]),
        _model([_n("LayerNormalization", "x s b")], [_tensor("s", 6), _tensor("b", 1)]),
        _model([_n("Erf", "x")], []),
        _model([_n("ReduceMean", "x")], []),
        _model([_n("ReduceMean", "x axes", keepdims=0)], [_ints("axes")], rank=0),
        _model([_n("ReduceMax", "x axes", keepdims=0)], [_ints("axes")], rank=0),
        _model([_n("Add", "x x")], [], kind=TensorProto.INT32),
        _model([_n("ReduceMax", "x", axes=[1])], [], kind=TensorProto.INT64, opset=11),
        _model([_n("MatMul", "x w")], [_grid("w")], kind=TensorProto.INT64),
        _model([_n("Gather", "w x")], [_grid("w")], kind=TensorProto.INT64),
        _model(
            [_n("Add", "x x", "i"), _n("Gather", "table i")],
            [_tensor("table", 9, 4)],
            kind=TensorProto.INT64,
        ),
    ],
)
def test_inexact_onnx_models_have_no_graph(model: onnx.ModelProto) -> None:
    assert infer_from_onnx(model) is None


@pytest.mark.parametrize(
    "node",
    [
        _n("Reshape", "x", shape=[-1, 4]),  # before opset 5
        _n("Gemm", "x"),
        _n("Gather", ""),
        _n("Relu", ""),
        _n("BatchNormalization", "x w w"),
        _n("Conv", "x w", auto_pad="SAME_UPPER", dilations=[1]),
        _n("Gelu", "x", approximate=b"\xff\xfe"),
    ],
    ids=lambda node: node.op_type,
)
def test_damaged_onnx_nodes_have_no_graph(node: onnx.NodeProto) -> None:
    model = _model([_n("Relu", "x")], [])
    model.graph.node[0].CopyFrom(node)
    shape = [4] * (4 if node.op_type == "Conv" else 1)
    model.graph.initializer.append(_tensor("w", *shape))
    assert infer_from_onnx(model) is None


def test_own_operator_domains_have_no_graph() -> None:
    model = _model([_n("Relu", "x")], [])
    model.graph.node[0].domain = "com.example"
    assert infer_from_onnx(model) is None


# ---- Keras -------------------------------------------------------------------------------------


def _dense(name: str, units: int, activation: str = "linear", **more: Any) -> dict[str, Any]:
    config = {"name": name, "units": units, "activation": activation, "use_bias": True, **more}
    return {"class_name": "Dense", "config": config}


def _layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, **config}}


def _sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": list(layers)}}


KERAS_TENSORS: dict[str, Array] = {
    "e": RNG.standard_normal((9, 4)),
    "k": RNG.standard_normal((4, 3)),
    "b": RNG.standard_normal(3),
    "k2": RNG.standard_normal((3, 3)),
    "gamma": RNG.standard_normal(3),
    "beta": RNG.standard_normal(3),
    "mean": RNG.standard_normal(3),
    "var": RNG.random(3) + 0.5,
}
WEIGHTS = {
    "embedding": ["e"],
    "dense": ["k", "b"],
    "second": ["k2", "b"],
    "bn": ["gamma", "beta", "mean", "var"],
    "ln": ["gamma", "beta"],
}


@pytest.mark.parametrize("style", ["keras-2", "keras-3"])
def test_keras_sequential(style: str) -> None:
    if style == "keras-3":
        start = [_layer("InputLayer", "in", batch_shape=[None, 5])]
        leaky = _layer("LeakyReLU", "leaky", negative_slope=0.25)
        axis: Any = -1
    else:
        start = [_layer("InputLayer", "in", batch_input_shape=[None, 5])]
        leaky = _layer("LeakyReLU", "leaky", alpha=0.25)
        axis = [1]
    config = _sequential(
        *start,
        _layer("Embedding", "embedding", input_dim=9, output_dim=4, mask_zero=False),
        _layer("GlobalAveragePooling1D", "pool", data_format="channels_last", keepdims=False),
        _dense("dense", 3, "relu"),
        _layer("Dropout", "dropout", rate=0.5),
        _layer("BatchNormalization", "bn", axis=axis, epsilon=0.001, scale=True, center=True),
        leaky,
        _layer("LayerNormalization", "ln", axis=axis, epsilon=0.01, scale=True, center=True),
        _dense("second", 3, "softmax"),
    )
    graph = infer_from_keras(config, WEIGHTS)
    assert graph is not None
    graph.validate({name: array.shape for name, array in KERAS_TENSORS.items()})
    t, x = KERAS_TENSORS, RNG.integers(0, 9, (2, 5))
    h = np.maximum(t["e"][x].mean(1) @ t["k"] + t["b"], 0)
    h = (h - t["mean"]) / np.sqrt(t["var"] + 0.001) * t["gamma"] + t["beta"]
    h = np.where(h > 0, h, 0.25 * h)
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 0.01)
    h = (h * t["gamma"] + t["beta"]) @ t["k2"] + t["b"]
    expected = np.exp(h) / np.exp(h).sum(1, keepdims=True)
    np.testing.assert_allclose(compute(graph, t, x)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("style", ["keras-2", "keras-3"])
def test_keras_functional_with_two_branches(style: str) -> None:
    def called(*sources: str) -> list[Any]:
        if style == "keras-2":
            return [[[source, 0, 0, {}] for source in sources]]
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
            for source in sources
        ]
        return [{"args": tensors if len(tensors) == 1 else [tensors], "kwargs": {}}]

    layers = [
        {**_layer("InputLayer", "in", batch_shape=[None, 4]), "name": "in", "inbound_nodes": []},
        {**_dense("dense", 3, "tanh"), "name": "dense", "inbound_nodes": called("in")},
        {**_dense("second", 3), "name": "second", "inbound_nodes": called("dense")},
        {**_layer("Subtract", "sub"), "name": "sub", "inbound_nodes": called("dense", "second")},
        {
            **_layer("Concatenate", "cat", axis=-1),
            "name": "cat",
            "inbound_nodes": called("sub", "in"),
        },
    ]
    ends: tuple[Any, Any] = ([["in", 0, 0]], [["cat", 0, 0]])
    if style == "keras-3":
        ends = (["in", 0, 0], ["cat", 0, 0])
    inner = {"name": "m", "layers": layers, "input_layers": ends[0], "output_layers": ends[1]}
    graph = infer_from_keras({"class_name": "Functional", "config": inner}, WEIGHTS)
    assert graph is not None
    t, x = KERAS_TENSORS, RNG.standard_normal((2, 4))
    h = np.tanh(x @ t["k"] + t["b"])
    expected = np.concatenate([h - (h @ t["k2"] + t["b"]), x], 1)
    np.testing.assert_allclose(compute(graph, t, x)[0], expected, rtol=1e-9)
    layers[1]["inbound_nodes"] *= 2  # a layer that is called twice
    assert infer_from_keras({"class_name": "Functional", "config": inner}, WEIGHTS) is None


IN = _layer("InputLayer", "in", batch_shape=[None, 4])


@pytest.mark.parametrize(
    "config",
    [
        _sequential(IN, _layer("LSTM", "lstm", units=3)),
        _sequential(IN, _dense("dense", 3, "mish")),
        _sequential(IN, _dense("dense", 3, {"class_name": "Custom"})),  # type: ignore[arg-type]
        _sequential(IN, _dense("dense", 3, lora_rank=4)),
        _sequential(IN, _dense("unnamed", 3)),
        _sequential(IN, _layer("Embedding", "embedding", mask_zero=True)),
        _sequential(IN, _layer("GlobalAveragePooling1D", "p", data_format="channels_first")),
        _sequential(IN, _layer("ReLU", "r", max_value=6.0)),
        _sequential(IN, _layer("BatchNormalization", "bn", axis=-1, epsilon=1.0, scale=False)),
        _sequential(
            IN, _layer("LayerNormalization", "ln", axis=0, epsilon=1.0, scale=True, center=True)
        ),
        _sequential(IN),
        _sequential(IN, _sequential(_dense("dense", 3))),
        _sequential(IN, _layer("Softmax", "s", axis=[1, 2])),
        _sequential(IN, _layer("Softmax", "s", axis=float("inf"))),
        _sequential(
            IN, _layer("BatchNormalization", "bn", axis=[1, 2], epsilon=1, scale=True, center=True)
        ),
        _sequential(
            IN, _layer("LayerNormalization", "ln", axis=[1, 2], epsilon=1, scale=True, center=True)
        ),
        {"class_name": "MyModel", "config": {}},
        {"class_name": "Sequential"},
        {},
    ],
)
def test_unknown_keras_models_have_no_graph(config: dict[str, Any]) -> None:
    assert infer_from_keras(config, WEIGHTS) is None


@pytest.mark.parametrize("kind", ["Add", "Multiply", "Subtract"])
@pytest.mark.parametrize("other", [(None, 4), None])
def test_keras_merges_of_unequal_or_unknown_ranks_have_no_graph(
    kind: str, other: tuple[int | None, ...] | None
) -> None:
    def layer(kind: str, name: str, *sources: str, **config: Any) -> dict[str, Any]:
        calls = [[[source, 0, 0, {}] for source in sources]] if sources else []
        return {**_layer(kind, name, **config), "name": name, "inbound_nodes": calls}

    def infer(shape: tuple[int | None, ...] | None) -> Graph | None:
        more = {} if shape is None else {"batch_shape": list(shape)}
        layers = [
            layer("InputLayer", "a", batch_shape=[None, 4, 4]),
            layer("InputLayer", "b", **more),
            layer(kind, "merge", "a", "b"),
        ]
        ends = {"input_layers": [["a", 0, 0], ["b", 0, 0]], "output_layers": [["merge", 0, 0]]}
        inner = {"name": "m", "layers": layers, **ends}
        return infer_from_keras({"class_name": "Functional", "config": inner}, {})

    assert infer((None, 4, 4)) is not None
    assert infer(other) is None
