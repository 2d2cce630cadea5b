# SPDX-License-Identifier: Apache-2.0
"""Layers of images: pools against torch, and whole networks against torch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pydedup.errors import ArgumentError
from pydedup.formats.infer_keras import infer_from_keras
from pydedup.formats.infer_onnx import infer_from_onnx
from pydedup.formats.infer_torch import infer_from_torch
from pydedup.graph import Graph, Node
from pydedup.serving.engine import run_graph
from pydedup.serving.tensor import StoredTensor
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType, TensorInfo

Array = NDArray[Any]
RNG = np.random.default_rng(21)


def run(graph: Graph, tensors: dict[str, Array], *inputs: Array) -> Array:
    """Run a graph of one output on tensors that lie on pages."""
    graph.validate({name: value.shape for name, value in tensors.items()})
    graph = Graph.from_json(graph.to_json())
    pages = MemoryPages()
    maps = {name: pages.add(value, (8, 12)) for name, value in tensors.items()}
    pool = pages.pool()

    def tensor(name: str) -> StoredTensor:
        value = tensors[name]
        info = TensorInfo(name, DType.of(value.dtype), value.shape, (8, 12))
        return StoredTensor(info, lambda: maps[name], pool, lambda: None)

    (result,) = run_graph(graph, tensor, dict(zip(graph.inputs, inputs, strict=True))).values()
    return result


def one(op: str, x: Array, **attrs: Any) -> Array:
    return run(Graph(("x",), ("y",), (Node(op, ("x",), "y", {}, attrs),)), {}, x)


# ---- pools -------------------------------------------------------------------------------------

few = st.integers(1, 3)


@settings(max_examples=150)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), few),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(few, few),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1 << 30),
)
def test_pools_are_those_of_torch(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
    dtype: Any,
    seed: int,
) -> None:
    assume(2 * padding[0] <= kernel[0] and 2 * padding[1] <= kernel[1])
    x = np.random.default_rng(seed).standard_normal((2, 3, *size)).astype(dtype)
    x.reshape(-1)[seed % x.size] = (np.nan, np.inf, -np.inf, 0.0)[seed % 4]
    t = torch.from_numpy(x)
    walk: dict[str, Any] = {
        "kernel": list(kernel),
        "stride": list(stride),
        "padding": list(padding) * 2,
        "ceil_mode": ceil_mode,
    }
    cases: list[tuple[str, dict[str, Any], Callable[[], torch.Tensor]]] = [
        (
            "max_pool2d",
            {"dilation": list(dilation)},
            lambda: nn.functional.max_pool2d(t, kernel, stride, padding, dilation, ceil_mode),
        ),
        (
            "avg_pool2d",
            {"count_include_pad": count_include_pad},
            lambda: nn.functional.avg_pool2d(
                t, kernel, stride, padding, ceil_mode, count_include_pad
            ),
        ),
    ]
    for op, more, theirs in cases:
        try:
            want = theirs().numpy()
        except RuntimeError:  # torch: no window fits
            with pytest.raises(ArgumentError, match=f"node '{op}' .*do not fit"):
                one(op, x, **walk, **more)
            continue
        got = one(op, x, **walk, **more)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert np.array_equal(one(op, x[0], **walk, **more), got[0], equal_nan=True)


def test_no_window_is_of_padding_alone() -> None:
    x = np.zeros((2, 3, 0, 5), np.float32)
    with pytest.raises(RuntimeError):
        nn.functional.max_pool2d(torch.from_numpy(x), (2, 1), 1, (1, 0))
    for op in ("max_pool2d", "avg_pool2d"):
        with pytest.raises(ArgumentError, match="windows of 2 do not fit into the image's height"):
            one(op, x, kernel=[2, 1], stride=[1, 1], padding=[1, 0, 1, 0])


def test_pools_of_the_whole_image() -> None:
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    assert np.array_equal(one("max", x, axis=[2, 3]), x.max((2, 3)))
    assert one("max", x, axis=-1, keepdims=True).shape == (2, 3, 4, 1)
    assert one("max", np.arange(4), axis=0).dtype == np.float32
    with pytest.raises(ArgumentError, match="axis 4 does not exist"):
        one("max", x, axis=4)
    with pytest.raises(ArgumentError, match="node 'max'"):
        one("max", np.empty((0, 3), np.float32), axis=0)


POOL = {"kernel": [2, 2], "stride": [2, 2]}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Node("conv2d", ("x",), "y"), "weight 'weight' is missing"),
        (lambda: Node("max_pool2d", ("x",), "y", {}, {"kernel": [2, 2]}), "'stride' is missing"),
        *[
            (
                lambda change=change: Node(
                    "conv2d", ("x",), "y", {"weight": "w"}, {change[0]: change[1]}
                ),
                f"attribute '{change[0]}'.*{change[2]}",
            )
            for change in (
                ("stride", 1, "2 integers of at least 1"),
                ("stride", [1, 0], "2 integers of at least 1"),
                ("stride", [1, True], "2 integers of at least 1"),
                ("stride", [1.0, 1], "2 integers of at least 1"),
                ("padding", [1, 1], "4 integers of at least 0"),
                ("padding", [0, 0, 0, -1], "4 integers of at least 0"),
                ("padding", [0, 0, 0, 1 << 31], "below"),
                ("dilation", "11", "2 integers of at least 1"),
                ("groups", 0, "at least 1"),
                ("groups", [1], "integer"),
            )
        ],
        (lambda: Node("avg_pool2d", ("x",), "y", {}, {**POOL, "dilation": [1, 1]}), "no attribute"),
        (lambda: Node("max_pool2d", ("x",), "y", {}, {**POOL, "ceil_mode": 1}), "true or false"),
        (
            lambda: Node("max_pool2d", ("x",), "y", {}, {**POOL, "padding": [0, 2, 0, 0]}),
            "horizontal padding of 2 is more than half of a window of 2",
        ),
        (
            lambda: Node("avg_pool2d", ("x",), "y", {}, {**POOL, "padding": [0, 0, 3, 0]}),
            "vertical padding of 3",
        ),
    ],
)
def test_invalid_nodes_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


@pytest.mark.parametrize(
    ("shapes", "groups", "says"),
    [
        ({"weight": (6, 2, 3, 3), "bias": (6,)}, 2, None),
        ({"weight": (6, 2, 3)}, 1, "4 axes are needed"),
        ({"weight": (6, 2, 3, 3, 3)}, 1, "4 axes are needed"),
        ({"weight": (6, 0, 3, 3)}, 1, "none of 0"),
        ({"weight": (6, 2, 3, 3)}, 4, "4 groups do not divide its 6 outputs"),
        ({"weight": (6, 2, 3, 3), "bias": (2,)}, 1, r"bias has shape \(2,\); \(6,\) is needed"),
    ],
)
def test_weights_must_fit(shapes: dict[str, tuple[int, ...]], groups: int, says: str) -> None:
    node = Node("conv2d", ("x",), "y", {role: role for role in shapes}, {"groups": groups})
    graph = Graph(("x",), ("y",), (node,))
    if says is None:
        graph.validate(shapes)
    else:
        with pytest.raises(ArgumentError, match=says):
            graph.validate(shapes)


def test_images_that_do_not_fit_name_the_node() -> None:
    w = RNG.standard_normal((6, 2, 3, 3)).astype(np.float32)
    graph = Graph(("x",), ("y",), (Node("conv2d", ("x",), "y", {"weight": "w"}),))
    for shape, says in (
        ((1, 3, 5, 5), "3 channels"),
        ((1, 2, 2, 5), "covers 3 of the image's height"),
        ((2, 5), "images are"),
        ((1, 2, 5, 5, 5), "3-D convolutions are not supported"),
    ):
        with pytest.raises(ArgumentError, match=f"node 'conv2d' that makes 'y': .*{says}"):
            run(graph, {"w": w}, np.zeros(shape, np.float32))
    with pytest.raises(ArgumentError, match="3-D pools are not supported"):
        one("max_pool2d", np.zeros((1, 2, 5, 5, 5), np.float32), **POOL)


# ---- torch -------------------------------------------------------------------------------------


def trained(module: nn.Module) -> nn.Module:
    """Give norms statistics that differ from the initial ones."""
    torch.manual_seed(4)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, low in ((part.running_var, 0.5), (part.running_mean, -0.5)):
                assert value is not None
                value.uniform_(low, low + 1)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return module.eval()


def block(channels: int, out: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5)),
            *(nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 10), nn.Softmax(1)),
        ),
        (3, 1, 28, 28),
    ),
    "plain": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            *(block(16, 16, 1), block(16, 32, 2), block(32, 32, 1)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 7),
        ),
        (2, 3, 33, 47),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            block(4, 4, 1, groups=4), nn.Conv2d(4, 9, 1), nn.GELU(), nn.AdaptiveMaxPool2d((1, 1))
        ),
        (2, 4, 11, 13),
    ),
    "odd-pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)),
            nn.MaxPool2d((3, 2), (2, 3), (1, 0), (1, 2), ceil_mode=True),
            nn.AvgPool2d((2, 3), 1, 1, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(3, 2, 1, padding="valid"),
            nn.Dropout2d(),
        ),
        (2, 2, 17, 19),
    ),
    "one-image": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), (3, 9, 9)),
}


# torch warns, on some machines, that an even filter with padding 'same' takes a copy of the image.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_networks_compute_the_same(name: str) -> None:
    make, shape = NETWORKS[name]
    module = trained(make())
    graph = infer_from_torch(module)
    assert graph is not None
    x = torch.randn(shape)
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    want = module(x).detach().numpy()
    got = run(graph, tensors, x.numpy())
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        lambda: nn.ConvTranspose2d(2, 2, 3),
        lambda: nn.Conv3d(2, 2, 3),
        lambda: nn.MaxPool2d(2, return_indices=True),
        lambda: nn.AvgPool2d(2, divisor_override=3),
        lambda: nn.AdaptiveAvgPool2d(2),
        lambda: nn.AdaptiveAvgPool2d((1, None)),
        lambda: nn.AdaptiveMaxPool2d(1, return_indices=True),
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.MaxPool1d(2),
    ],
)
def test_uncertain_torch_layers_have_no_graph(make: Callable[[], nn.Module]) -> None:
    assert infer_from_torch(nn.Sequential(make())) is None


# ---- ONNX --------------------------------------------------------------------------------------


def n(op: str, inputs: str, output: str = "y", **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attrs)


def w(name: str, *shape: int) -> onnx.TensorProto:
    values = RNG.standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(np.abs(values) + 0.5 if name == "var" else values, name)


def model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    shape: tuple[Any, ...] = (2, 3, 13, 17),
    *,
    rank: int = 4,
    opset: int = 20,
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(made)
    return made


ONNX: dict[str, onnx.ModelProto] = {
    "conv": model([n("Conv", "x w b")], [w("w", 5, 3, 3, 2), w("b", 5)]),
    "conv-everything": model(
        [n("Conv", "x w", pads=[1, 0, 2, 3], strides=[2, 1], dilations=[1, 2], group=3)],
        [w("w", 6, 1, 3, 3)],
    ),
    "conv-same-upper": model([n("Conv", "x w", auto_pad="SAME_UPPER")], [w("w", 5, 3, 2, 4)]),
    "conv-same-lower": model([n("Conv", "x w", auto_pad="SAME_LOWER")], [w("w", 5, 3, 2, 4)]),
    "conv-valid": model([n("Conv", "x w", auto_pad="VALID", strides=[2, 2])], [w("w", 5, 3, 2, 4)]),
    "max-pool": model(
        [n("MaxPool", "x", kernel_shape=[3, 2], pads=[1, 0, 0, 1], strides=[2, 2])], []
    ),
    "max-pool-ceil": model(
        [n("MaxPool", "x", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1, dilations=[2, 1])], []
    ),
    "avg-pool": model([n("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 0])], []),
    "avg-pool-padded": model(
        [n("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], []
    ),
    "global-max": model([n("GlobalMaxPool", "x")], []),
    "reduce-max": model([n("ReduceMax", "x", axes=[2, 3], keepdims=0)], [], rank=2, opset=11),
    "residual": model(
        [
            n("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
            n("BatchNormalization", "c s t mean var", "d"),
            n("Relu", "d", "e"),
            n("Conv", "e w2", "f", pads=[1, 1, 1, 1]),
            n("Add", "f e", "g"),
            n("MaxPool", "g", "h", kernel_shape=[2, 2], strides=[2, 2]),
            n("Relu", "h", "i"),
            n("GlobalAveragePool", "i", "j"),
            n("Flatten", "j", "k"),
            n("Gemm", "k v b2", transB=1),
        ],
        [
            *(w("w", 5, 3, 3, 3), w("b", 5), w("s", 5), w("t", 5), w("mean", 5), w("var", 5)),
            *(w("w2", 5, 5, 3, 3), w("v", 4, 5), w("b2", 4)),
        ],
        rank=2,
    ),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnx_networks_compute_the_same(name: str) -> None:
    made = ONNX[name]
    graph = infer_from_onnx(made)
    assert graph is not None
    tensors = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    x = RNG.standard_normal((2, 3, 13, 17)).astype(np.float32)
    want = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0]
    got = run(graph, tensors, x)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "made",
    [
        model([n("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], [w("w", 5, 3, 3, 3)]),
        model([n("Conv", "x w")], [w("w", 5, 3, 3, 3, 3)], (2, 3, 5, 5, 5), rank=5),
        model([n("Conv", "x w")], [w("w", 5, 3, 3)], (2, 3, 5), rank=3),
        model([n("Conv", "w x")], [w("w", 2, 3, 20, 20)]),
        model([n("MaxPool", "x", kernel_shape=[2])], [], (2, 3, 9), rank=3),
        model([n("MaxPool", "x", kernel_shape=[2, 2], pads=[0, 0, 2, 0])], []),
        model([n("AveragePool", "x", kernel_shape=[2, 2], ceil_mode=1)], []),
        model([n("AveragePool", "x", kernel_shape=[2, 2], dilations=[2, 1])], []),
        model([n("GlobalLpPool", "x")], []),
    ],
)
def test_inexact_onnx_networks_have_no_graph(made: onnx.ModelProto) -> None:
    assert infer_from_onnx(made) is None


# ---- Keras -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "MaxPooling2D", "AveragePooling2D"])
def test_keras_images_have_no_graph(kind: str) -> None:
    # Keras keeps images as (height, width, channels) and filters as (height, width, in, out);
    # what a graph computes with lies the other way round in the store.
    layers = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, 8, 8, 3]}},
        {"class_name": kind, "config": {"name": "layer", "pool_size": [2, 2], "use_bias": True}},
    ]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    assert infer_from_keras(config, {"layer": ["k", "b"]}) is None
