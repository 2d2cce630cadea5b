# SPDX-License-Identifier: Apache-2.0
"""Graphs inferred from ONNX models, computed against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from onnx import TensorProto, helper, numpy_helper

from pydedup.formats.infer_onnx import infer_from_onnx
from pydedup.formats.registry import open_source
from pydedup.testing.graphs import compute

Array = npt.NDArray[Any]


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
def test_onnx_models_compute_the_same(name: str, tmp_path: Path) -> None:
    model = ONNX[name]
    onnx.save(model, tmp_path / "m.onnx")
    with open_source(tmp_path / "m.onnx") as source:
        graph = source.graph
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
        _model([_n("Add", "x x", broadcast=1, axis=0)], [], opset=6),
        _model([_n("Identity", "x")], [], kind=TensorProto.STRING),
        _model([_n("Concat", "x x", axis=0)], [], kind=TensorProto.COMPLEX64),
        _model(
            [_n("MatMul", "x w", "h"), _n("Add", "h b", broadcast=1, axis=0)],
            [_tensor("w", 4, 4), _tensor("b", 4)],
            (4, 4),
            opset=6,
        ),
        _model(
            [_n("MaxPool", "x", kernel_shape=[3, 3], dilations=[2, 2], auto_pad="SAME_UPPER")],
            [],
            ("n", 2, 8, 8),
            rank=4,
        ),
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
        _model([_n("ReduceMean", "x", axes=[1, -1])], [], opset=11),
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
