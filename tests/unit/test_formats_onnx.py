# SPDX-License-Identifier: Apache-2.0
"""ONNX against onnx and onnxruntime: every way in which a model can hold its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from onnx import TensorProto, helper, numpy_helper

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError
from pydedup.formats import onnx as onnx_format
from pydedup.formats import onnx_write
from pydedup.formats.registry import open_source, write_model

from .formats_files import export

RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((300, 20)).astype(np.float32)
B1 = RNG.standard_normal(300).astype(np.float32)
W2 = RNG.standard_normal((300, 4)).astype(np.float32)


def mlp() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 20])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    initializers = [
        numpy_helper.from_array(W1, "w1"),
        helper.make_tensor("b1", TensorProto.FLOAT, B1.shape, B1.tolist()),  # packed floats
        numpy_helper.from_array(W2, "w2"),
    ]
    graph = helper.make_graph(nodes, "mlp", [x], [y], initializers, doc_string="wörter")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.metadata_props.add(key="author", value="me")
    onnx.checker.check_model(model)
    return model


def holder(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    """Return a model that only holds tensors."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["x2"])], "g", [x], [x], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def run(path: Path) -> Any:
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 20)
    return onnxruntime.InferenceSession(path).run(None, {"x": x})[0]


def values(path: Path) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_reads_what_onnx_wrote(path: Path) -> None:
    with open_source(path) as source:
        assert source.format == "onnx"
        assert [(entry.name, entry.shape) for entry in source.entries] == [
            ("w1", (300, 20)),
            ("b1", (300,)),
            ("w2", (300, 4)),
        ]
        for name, expected in (("w1", W1), ("b1", B1), ("w2", W2)):
            array = source.read(name)
            assert array.tobytes() == expected.tobytes()
            assert not array.flags.writeable


def test_the_graph_is_kept_without_the_weights(path: Path) -> None:
    with open_source(path) as source:
        (artifact,) = source.artifacts()
        assert source.graph is not None
        assert [node.op for node in source.graph.nodes] == ["linear", "relu", "linear"]
    assert artifact.name == onnx_format.GRAPH
    assert len(artifact.payload) < 1000 < path.stat().st_size
    stripped = onnx.ModelProto.FromString(artifact.payload)
    assert [list(t.dims) for t in stripped.graph.initializer] == [[300, 20], [300], [300, 4]]
    assert stripped.graph.doc_string == "wörter"


def test_an_export_equals_the_original(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    export(path, target)
    onnx.checker.check_model(target, full_check=True)
    assert values(target) == values(path)
    again, original = onnx.load(target), onnx.load(path)
    for model in (again, original):
        del model.graph.initializer[:]
    assert again == original
    assert run(target).tobytes() == run(path).tobytes()


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_is_read(one_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        mlp(),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="m.data" if one_file else None,
        size_threshold=0,
    )
    assert path.stat().st_size < 2000
    target = tmp_path / "out.onnx"
    export(path, target)
    (tmp_path / "m.onnx").unlink()
    assert values(target) == {"w1": W1.tobytes(), "b1": B1.tobytes(), "w2": W2.tobytes()}
    assert run(target).shape == (3, 4)


def test_models_beyond_the_limit_get_external_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_write, "_MAX_MESSAGE", 4096)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "big.onnx"
    export(path, target)
    assert sorted(item.name for item in target.parent.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert target.stat().st_size < 4096
    assert values(target) == values(path)
    assert run(target).tobytes() == run(path).tobytes()
    with open_source(target) as source:
        assert source.read("w1").tobytes() == W1.tobytes()
    places = [
        {item.key: item.value for item in tensor.external_data}
        for tensor in onnx.load(target, load_external_data=False).graph.initializer
    ]
    offsets = [int(place["offset"]) for place in places if place]
    assert len(offsets) > 1
    assert {offset % 4096 for offset in offsets} == {0}, "others map them into memory"
    # Written over itself: the old data file is in use until the model is replaced.
    (target.parent / "other.data").write_bytes(b"of somebody else")
    for _ in range(3):
        export(target, target)
        assert values(target) == values(path)
        found = {item.name for item in target.parent.iterdir()} - {"big.onnx", "other.data"}
        assert len(found) == 1
    monkeypatch.undo()
    export(target, target)
    assert sorted(item.name for item in target.parent.iterdir()) == ["big.onnx", "other.data"]


def test_tensors_that_share_their_external_data_do_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_write, "_MAX_MESSAGE", 4096)
    (tmp_path / "w.data").write_bytes(W1.tobytes())
    tensors = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=W1.shape, data_location=1)
        for name in ("a", "b")
    ]
    for tensor in tensors:
        tensor.external_data.add(key="location", value="w.data")
    onnx.save(holder(*tensors), tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "m.onnx"
    export(tmp_path / "m.onnx", target)
    assert values(target) == {"a": W1.tobytes(), "b": W1.tobytes()}
    assert (target.parent / "m.onnx.data").stat().st_size == W1.nbytes


@pytest.mark.parametrize("limit", [4096, 1 << 30])
def test_a_failed_export_leaves_nothing(
    limit: int, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_write, "_MAX_MESSAGE", limit)
    (tmp_path / "out").mkdir()
    with open_source(path) as source:
        tensors = {"w1": W1, "b1": B1, "w2": W2[:1]}  # does not fit its entry
        with pytest.raises(ArgumentError, match="'w2' is float32"):
            write_model(tmp_path / "out" / "m.onnx", tensors, source.entries, source.artifacts())
    assert list((tmp_path / "out").iterdir()) == []


TYPED = {
    "int32": (TensorProto.INT32, np.array([-1, 2], np.int32)),
    "int8": (TensorProto.INT8, np.array([-128, 127], np.int8)),
    "uint16": (TensorProto.UINT16, np.array([0, 65535], np.uint16)),
    "int64": (TensorProto.INT64, np.array([-(1 << 63), 5], np.int64)),
    "uint64": (TensorProto.UINT64, np.array([(1 << 64) - 1, 5], np.uint64)),
    "uint32": (TensorProto.UINT32, np.array([(1 << 32) - 1, 5], np.uint32)),
    "double": (TensorProto.DOUBLE, np.array([1e300, -0.0])),
    "float": (TensorProto.FLOAT, np.array([np.inf, -0.0], np.float32)),
    "bool": (TensorProto.BOOL, np.array([True, False])),
    "half": (TensorProto.FLOAT16, np.array([1.5, -2.0], np.float16)),
    "brain": (TensorProto.BFLOAT16, np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)),
    "e4m3": (TensorProto.FLOAT8E4M3FN, np.array([1.5, -2.0]).astype(ml_dtypes.float8_e4m3fn)),
    "e5m2": (TensorProto.FLOAT8E5M2, np.array([1.5, -2.0]).astype(ml_dtypes.float8_e5m2)),
}


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("name", TYPED)
def test_every_coding_of_values(name: str, raw: bool, tmp_path: Path) -> None:
    kind, expected = TYPED[name]
    if raw:
        tensor = helper.make_tensor(name, kind, expected.shape, expected.tobytes(), raw=True)
    else:
        tensor = helper.make_tensor(name, kind, expected.shape, expected)
        assert not tensor.raw_data
    onnx.save(holder(tensor), tmp_path / "m.onnx")
    with open_source(tmp_path / "m.onnx") as source:
        array = source.read(name)
        assert array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()
    export(tmp_path / "m.onnx", tmp_path / "out.onnx")
    (again,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert again.data_type == kind
    assert numpy_helper.to_array(again).tobytes() == expected.tobytes()


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    scalar = helper.make_tensor("scalar", TensorProto.FLOAT, [], [2.5])
    empty = helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], [])
    onnx.save(holder(scalar, empty), tmp_path / "m.onnx")
    with open_source(tmp_path / "m.onnx") as source:
        assert source.read("scalar").shape == ()
        assert source.read("scalar") == np.float32(2.5)
        assert source.read("empty").shape == (0, 3)


def test_tensors_of_any_length_are_written(tmp_path: Path) -> None:
    """Each length is written in as few bytes as it needs, of seven bits each."""
    sizes = (1, 100, 127, 128, 129, 16_383, 16_384)
    arrays = [np.arange(size).astype(np.uint8) for size in sizes]
    onnx.save(
        holder(*(numpy_helper.from_array(array, f"w{len(array)}") for array in arrays)),
        tmp_path / "m.onnx",
    )
    export(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert values(tmp_path / "out.onnx") == {f"w{len(a)}": a.tobytes() for a in arrays}


def test_unpacked_floats_are_parsed(tmp_path: Path) -> None:
    """A packed field may be written unpacked, a tag for each value; the library never does."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2]).SerializeToString()
    tensor += b"".join(b"\x25" + np.float32(value).tobytes() for value in (1.5, -2.5))
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "m.onnx").write_bytes(b"\x08\x09\x3a" + bytes([len(graph)]) + graph)
    with open_source(tmp_path / "m.onnx") as source:
        assert source.read("w").tolist() == [1.5, -2.5]


def test_element_types_no_store_keeps_stay_in_the_graph(tmp_path: Path) -> None:
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])
    kept = numpy_helper.from_array(np.ones(3, np.float32), "w")
    onnx.save(holder(words, kept), tmp_path / "m.onnx")
    with open_source(tmp_path / "m.onnx") as source:
        assert [entry.name for entry in source.entries] == ["w"]
    export(tmp_path / "m.onnx", tmp_path / "out.onnx")
    again = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert again["words"] == words
    assert numpy_helper.to_array(again["w"]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", ["initializer", "constant", "function", "sparse"])
def test_external_data_that_stays_in_the_graph_is_refused(place: str, tmp_path: Path) -> None:
    """It was left in the graph, and read where the process that predicted happened to be."""
    kind = TensorProto.FLOAT if place in ("function", "sparse") else TensorProto.COMPLEX64
    tensor = TensorProto(name="w", data_type=kind, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="w.data")
    (tmp_path / "w.data").write_bytes(bytes(16))
    model = holder(*[tensor] * (place == "initializer"))
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    if place == "constant":
        model.graph.node.append(node)
    elif place == "function":
        opsets = [helper.make_opsetid("", 20)]
        model.functions.append(helper.make_function("mine", "F", [], ["c"], [node], opsets))
    elif place == "sparse":
        indices = helper.make_tensor("i", TensorProto.INT64, [4], range(4))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [9]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(FormatError, match=r"m\.onnx has the values of 'w' in the file 'w\.data'"):
        open_source(tmp_path / "m.onnx")


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))


def test_weights_in_constants_are_tensors(tmp_path: Path) -> None:
    nodes = [
        constant("w", W1),
        constant("b", B1[:300]),
        constant("shape", np.array([-1, 300])),
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Reshape", ["h", "shape"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 20])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 300])
    graph = helper.make_graph(nodes, "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    with open_source(path) as source:
        assert [entry.name for entry in source.entries] == ["w", "b"]
        assert source.read("w").tobytes() == W1.tobytes()
        assert source.graph is not None
        assert source.graph.nodes[0].weights == {"weight": "w", "bias": "b"}
        assert all(len(artifact.payload) < 1000 for artifact in source.artifacts())
        artifacts, entries = list(source.artifacts()), source.entries
    export(path, target)
    assert onnx.load(target) == model
    assert run(target).tobytes() == run(path).tobytes()
    with pytest.raises(ArgumentError, match="do not belong together: 'b'"):
        write_model(target, {"w": W1}, entries[:1], artifacts)


def test_weights_in_subgraphs_are_tensors(tmp_path: Path) -> None:
    h = helper.make_tensor_value_info("h", TensorProto.FLOAT, None)
    branches = {}
    for branch, sign in (("then_branch", 1), ("else_branch", -1)):
        nodes = [
            constant("b", B1 * sign),
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        ]
        weights = [numpy_helper.from_array(W1 * sign, "w")]
        branches[branch] = helper.make_graph(nodes, branch, [], [h], weights)
    choose = helper.make_node("If", ["flag"], ["y"], **branches)
    flag = numpy_helper.from_array(np.array(True), "flag")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 20])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    # What is inside and would have the name of another tensor stays in the graph.
    namesake = numpy_helper.from_array(W2, "y/then_branch/b")
    graph = helper.make_graph([choose], "g", [x], [y], [flag, namesake])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    with open_source(path) as source:
        assert {entry.name for entry in source.entries} == {
            "flag",
            "y/then_branch/w",
            "y/then_branch/b",
            "y/else_branch/w",
            "y/else_branch/b",
        }
        assert source.read("y/else_branch/w").tobytes() == (-W1).tobytes()
        assert source.read("y/then_branch/b").tobytes() == W2.tobytes()
        assert source.graph is None
    export(path, target)
    assert onnx.load(target) == model
    assert run(target).tobytes() == run(path).tobytes()


def test_models_of_other_formats_have_no_onnx_graph(tmp_path: Path) -> None:
    with (
        open_source({"w": np.ones(2)}) as source,
        pytest.raises(UnsupportedFormatError, match="needs the graph"),
    ):
        write_model(tmp_path / "m.onnx", {"w": np.ones(2)}, source.entries)
    assert list(tmp_path.iterdir()) == []


def test_a_converted_model_cannot_fill_the_graph(path: Path, tmp_path: Path) -> None:
    with open_source(path) as source:
        artifacts = list(source.artifacts())
    tensors = {"w1": W1.astype(np.float64), "b1": B1, "w2": W2}
    with (
        open_source(tensors) as source,
        pytest.raises(ArgumentError, match="export without converting"),
    ):
        write_model(tmp_path / "out.onnx", tensors, source.entries, artifacts)
    for wrong in ({"w1": W1, "b1": B1}, {"w1": W1, "b1": B1, "w2": W2, "more": B1}):
        with (
            open_source(wrong) as source,
            pytest.raises(ArgumentError, match="do not belong together"),
        ):
            write_model(tmp_path / "out.onnx", wrong, source.entries, artifacts)
