# SPDX-License-Identifier: Apache-2.0
"""A store from a stranger, who wrote into its tables what pydedup never does.

Whoever can write a store can also make its hashes fit: certificates here say nothing of what they
are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import pydedup
from pydedup.errors import FormatError

from .damage import change

RNG = np.random.default_rng(3)
W = RNG.standard_normal((32, 32), np.float32)
X = RNG.standard_normal((2, 32), np.float32)


def onnx_model(weights: Sequence[Any]) -> onnx.ModelProto:
    """Return a model that ONNX Runtime has to run."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Sin", ["h"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def replace_artifact(url: str, payload: bytes) -> None:
    change(url, "UPDATE {models} SET certificate = ?", "{}")
    change(url, "UPDATE {artifacts} SET payload = ?", payload)


def test_an_onnx_graph_reads_no_file(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the process happened to be was read, and predictions told what is in it."""
    onnx.save(onnx_model([numpy_helper.from_array(W, "w")]), tmp_path / "m.onnx")
    with pydedup.open(store_url) as store:
        store.add("m", tmp_path / "m.onnx")
    secret = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=W.shape, data_location=1)
    secret.external_data.add(key="location", value="secret")
    hostile = onnx_model([secret]).SerializeToString()
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(W.tobytes())
    assert onnxruntime.InferenceSession(hostile).run(None, {"x": X})  # it would
    replace_artifact(store_url, hostile)
    with pydedup.open(store_url) as store:
        for use in (lambda: store.predict("m", X), lambda: store.export("m", "out.onnx")):
            with pytest.raises(FormatError, match="has the values of 'w' in the file 'secret'"):
                use()
    assert not Path("out.onnx").exists()
