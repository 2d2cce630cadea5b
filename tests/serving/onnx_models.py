# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models, and what ONNX Runtime itself says to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(5)
X = RNG.standard_normal((3, 64), np.float32)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32) / np.float32(8)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    domain = attributes.pop("domain", "")
    return onnx.helper.make_node(op, inputs.split(), [output], domain=domain, **attributes)


def value(name: str, kind: int = 1, shape: Sequence[object] = ("b", 64)) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    nodes: Sequence[Any],
    weights: Mapping[str, NDArray[Any]],
    inputs: Sequence[Any] = (),
    output: str = "y",
    opset: int = 17,
    kind: int = 1,
) -> Path:
    """Write a model; bfloat16 and float8_e5m2 arrays become initialisers of that type.

    ``kind`` is the number of the element type of its output.
    """
    initializers = []
    for name, array in weights.items():
        kinds = {np.dtype(ml_dtypes.bfloat16): 16, np.dtype(ml_dtypes.float8_e5m2): 19}
        number = kinds.get(array.dtype) or onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        initializers.append(
            onnx.helper.make_tensor(name, number, array.shape, array.tobytes(), raw=True)
        )
    graph = onnx.helper.make_graph(
        nodes, "g", list(inputs) or [value("x")], [value(output, kind, None)], initializers
    )
    domains = [("", opset), ("ai.onnx.ml", 3), ("com.microsoft", 1), ("nobody", 1)]
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(*d) for d in domains]
    )
    model.ir_version = 9 if opset > 18 else 8
    onnx.save(model, path)
    return path


def run(path: Path, **inputs: NDArray[Any]) -> Any:
    return ort.InferenceSession(path).run(None, inputs)[0]


def stack(folder: Path, name: str, weights: Mapping[str, NDArray[Any]]) -> Path:
    nodes = [
        *(node("MatMul", "x w", "a"), node("Sin", "a", "b")),
        *(node("MatMul", "b v", "c"), node("Add", "c bias", "y")),
    ]
    return save(folder / name, nodes, weights)
