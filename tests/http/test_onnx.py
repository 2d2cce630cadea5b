# SPDX-License-Identifier: Apache-2.0
"""Models that ONNX Runtime runs, with the weights of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.testing.serving import Start

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def model(path: Path) -> Any:
    """Save y = abs(ceil(x W)) and z, the shape of x; our own engine knows neither."""
    make = onnx.helper
    weight = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    graph = make.make_graph(
        [
            make.make_node("MatMul", ["x", "w"], ["h"]),
            make.make_node("Ceil", ["h"], ["c"]),
            make.make_node("Abs", ["c"], ["y"]),
            make.make_node("Shape", ["x"], ["z"]),
        ],
        "g",
        [make.make_tensor_value_info("x", 1, ["batch", 64])],
        [
            make.make_tensor_value_info("y", 1, ["batch", 8]),
            make.make_tensor_value_info("z", 7, [2]),
        ],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, path)
    return weight


def test_it_is_served_like_any_other(start: Start, own_url: str, tmp_path: Path) -> None:
    weight = model(tmp_path / "m.onnx")
    with pydedup.open(own_url) as store:
        store.add("ceil@1", tmp_path / "m.onnx")
        assert store.graph("ceil") is None
    server = start(own_url)
    found = server.ask("GET", "/v2/models/ceil").json
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    assert found["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [-1, 8]},
        {"name": "z", "datatype": "INT64", "shape": [2]},
    ]
    index = server.ask("POST", "/v2/repository/index", {"ready": True}).json
    assert "ceil" in [entry["name"] for entry in index]
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    entry = {"name": "x", "datatype": "FP32", "shape": [3, 64], "data": x.tolist()}
    y, z = server.infer("ceil", {"inputs": [entry]}).json["outputs"]
    np.testing.assert_allclose(np.reshape(y["data"], (3, 8)), np.abs(np.ceil(x @ weight)))
    assert z["data"] == [3, 64]
    wrong = {**entry, "shape": [64, 3], "data": x.T.tolist()}
    answer = server.infer("ceil", {"inputs": [wrong]})
    assert answer.status == 400
    assert answer.error
    assert server.infer("ceil", {"inputs": [{**entry, "name": "a"}]}).status == 400
    assert server.ask("POST", "/v2/repository/models/ceil/load", b"").status == 200
