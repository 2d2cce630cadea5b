# SPDX-License-Identifier: Apache-2.0
"""ONNX tensors of types that no store has, such as 4-bit numbers: kept as their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from onnx import TensorProto, helper, numpy_helper

import pydedup
from pydedup.formats import onnx as onnx_format
from pydedup.formats import onnx_write
from pydedup.formats.base import Artifact, Outgoing
from pydedup.formats.registry import open_source

from .formats_files import export

#: Their numbers in onnx.proto, some of which older releases of onnx do not name.
UINT4, INT4, FLOAT4, E8M0, UINT2 = 21, 22, 23, 24, 25
CODES = np.random.default_rng(0).integers(0, 256, (256, 64), dtype=np.uint8)


def packed(name: str, kind: int, dims: tuple[int, ...], data: bytes) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=dims, raw_data=data)


def quantised(codes: np.ndarray, *, constant: bool = False) -> onnx.ModelProto:
    """Return a dense layer with weights of 4 bits, scaled by rows."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    weight = packed("w", INT4, (rows, columns), codes.tobytes())
    scale = numpy_helper.from_array(np.full(rows, 0.01, np.float32), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["real"], axis=0),
        helper.make_node("MatMul", ["x", "real"], ["y"]),
    ]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])
    graph = helper.make_graph(nodes, "g", [x], [y], [scale] if constant else [scale, weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "dims", "shape"),
    [
        (INT4, (256, 128), (256, 64)),
        (UINT4, (4, 3), (6,)),
        (INT4, (3,), (2,)),
        (UINT4, (), (1,)),
        (FLOAT4, (2, 4, 6), (2, 4, 3)),
        (UINT2, (8, 8), (8, 2)),
        (UINT2, (3, 3), (3,)),
        (E8M0, (3, 5), (3, 5)),
    ],
)
def test_packed_values_are_tensors_of_bytes(
    kind: int, dims: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """They stayed in the graph, where nothing is shared, and a report did not count them."""
    data = CODES.tobytes()[: int(np.prod(shape))]
    model = quantised(CODES)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.initializer.append(packed("w", kind, dims, data))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with open_source(tmp_path / "m.onnx") as source:
        (entry,) = source.entries
        assert (entry.dtype.label, entry.shape) == ("uint8", shape)
        assert source.read("w").tobytes() == data
        assert len(next(iter(source.artifacts())).payload) < 200
    export(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == model


@pytest.mark.parametrize("how", ["typed", "outside", "constant"])
def test_packed_values_wherever_they_are(how: str, tmp_path: Path) -> None:
    model = quantised(CODES, constant=how == "constant")
    if how == "typed":
        weight = model.graph.initializer[1]
        weight.ClearField("raw_data")
        weight.int32_data.extend(CODES.reshape(-1).tolist())
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=how == "outside")
    with open_source(tmp_path / "m.onnx") as source:
        assert source.read("w").tobytes() == CODES.tobytes()
    export(tmp_path / "m.onnx", tmp_path / "out.onnx")
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    before, after = (
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"x": x})[0]
        for name in ("m.onnx", "out.onnx")
    )
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("constant", [False, True])
def test_models_of_four_bits_share_blocks_and_predict(constant: bool, tmp_path: Path) -> None:
    changed = CODES.copy()
    changed[0, :8] ^= 1
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    with pydedup.open(tmp_path / "models.db") as store:
        for name, codes in (("one", CODES), ("two", changed)):
            onnx.save(quantised(codes, constant=constant), tmp_path / f"{name}.onnx")
            report = store.add(name, tmp_path / f"{name}.onnx")
            assert report.logical_bytes == CODES.nbytes + 1024
            session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
            np.testing.assert_array_equal(store.predict(name, x), session.run(None, {"x": x})[0])
        assert report.stored_bytes < 0.1 * CODES.nbytes


def test_sessions_with_weights_inside_make_room(tmp_path: Path) -> None:
    """They were kept, so that no more of these models ran than fit the budget together."""
    x = np.ones((1, 1024), np.float32)
    wanted = {}
    with pydedup.open(tmp_path / "models.db", memory="8MiB") as store:
        for seed in range(5):
            codes = np.random.default_rng(seed).integers(0, 256, (1024, 1024), np.uint8)
            path = tmp_path / f"{seed}.onnx"
            onnx.save(quantised(codes), path)
            store.add(path.stem, path)
            wanted[path.stem] = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
        for name in (*wanted, *wanted):
            np.testing.assert_array_equal(store.predict(name, x), wanted[name])


def test_a_graph_that_an_older_pydedup_kept_is_written(tmp_path: Path) -> None:
    """It has packed values within, and no tensor for them."""
    model = quantised(CODES)
    model.graph.initializer[0].ClearField("raw_data")
    onnx.save(quantised(CODES), tmp_path / "m.onnx")
    with open_source(tmp_path / "m.onnx") as source:
        kept = Artifact(onnx_format.GRAPH, "application/x-onnx", model.SerializeToString())
        entries = [entry for entry in source.entries if entry.name == "scale"]
        outgoing = Outgoing({"scale": source.read("scale")}, entries, [kept])
        onnx_write.write(tmp_path / "out.onnx", outgoing, final_path=tmp_path / "out.onnx")
    weights = {t.name: t.raw_data for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert weights["w"] == CODES.tobytes()
