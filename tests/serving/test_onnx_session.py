# SPDX-License-Identifier: Apache-2.0
"""ONNX models that our engine does not run: ONNX Runtime predicts, with weights of the store."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch

import pydedup
from pydedup.errors import ArgumentError, NotFoundError, UnsupportedFormatError
from pydedup.testing.program import run_here

from .onnx_models import RNG, X, node, normal, run, save, stack, value

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def test_an_unknown_operation(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {"w": normal(64, 80), "v": normal(80, 600), "bias": normal(600)}
    path = stack(tmp_path, "m.onnx", weights)
    store.add("m", path)
    assert store.graph("m") is None
    wanted = run(path, x=X)
    np.testing.assert_allclose(store.predict("m", X), wanted, rtol=1e-4, atol=1e-5)
    found = store.predict("m", {"x": X})
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        store.predict("m", X.astype(np.float64)), wanted, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(store.predict("m", X.T.copy().T), wanted, rtol=1e-4, atol=1e-5)


def test_the_same_blocks_in_another_shape_or_dtype(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {
        "w": np.zeros((64, 80), np.float32),
        "r": np.zeros((64, 8, 10), np.float32),
        "i": np.zeros((64, 80), np.int32),
    }
    nodes = [
        *(node("Einsum", "x w", "a", equation="bi,ij->bj"), node("Cast", "i", "f", to=1)),
        *(node("Einsum", "x f", "b", equation="bi,ij->bj"), node("Add", "a b", "s")),
        *(node("Einsum", "x r", "c", equation="bi,ijk->bkj"), node("Flatten", "c", "d")),
        node("Add", "s d", "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, weights)
    store.add("m", path)
    np.testing.assert_array_equal(store.predict("m", X), run(path, x=X))


def test_every_place_of_a_weight(store: pydedup.Store, tmp_path: Path) -> None:
    then = onnx.helper.make_graph([node("MatMul", "x w", "t")], "then", [], [value("t")])
    inner = onnx.helper.make_tensor("v", 1, (64, 64), normal(64, 64).tobytes(), raw=True)
    otherwise = onnx.helper.make_graph(
        [node("MatMul", "x v", "o")], "else", [], [value("o")], [inner]
    )
    large = onnx.helper.make_tensor("c", 1, (64, 64), normal(64, 64).tobytes(), raw=True)
    small = onnx.helper.make_tensor("s", 7, (2,), [-1, 32])
    nodes = [
        node("If", "flag", "i", then_branch=then, else_branch=otherwise),
        node("Constant", "", "constant", value=large),
        node("Constant", "", "shape", value=small),
        *(
            node("MatMul", "i constant", "p"),
            node("Sin", "p", "q"),
            node("Reshape", "q shape", "y"),
        ),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, {"w": normal(64, 64)}, [value("x"), value("flag", 9, (1,))]
    )
    store.add("m", path)
    assert set(store.load("m")) == {"w", "i/else_branch/v", "constant"}
    for flag in (True, False):
        inputs = {"x": X, "flag": np.array([flag])}
        np.testing.assert_allclose(
            store.predict("m", inputs)["y"], run(path, **inputs), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
def test_weights_of_other_types(store: pydedup.Store, tmp_path: Path, dtype: Any) -> None:
    weights = {"w": (normal(64, 80) * 100).astype(dtype)}
    path = save(
        tmp_path / "m.onnx",
        [node("Cast", "w", "f", to=1), node("MatMul", "x f", "a"), node("Sin", "a", "y")],
        weights,
    )
    store.add("m", path)
    np.testing.assert_allclose(store.predict("m", X), run(path, x=X), rtol=1e-4, atol=1e-4)


def test_recurrent_and_look_ups(store: pydedup.Store, tmp_path: Path) -> None:
    nodes = [
        node("Gather", "table x", "rows", axis=0),
        node("LSTM", "rows w r", "h", hidden_size=32),
        node("Squeeze", "h axes", "y"),
    ]
    weights = {
        "table": normal(500, 64),
        "w": normal(1, 128, 64),
        "r": normal(1, 128, 32),
        "axes": np.array([1]),
    }
    path = save(tmp_path / "m.onnx", nodes, weights, [value("x", 7, ("t", "b"))])
    store.add("m", path)
    ids = RNG.integers(0, 500, (7, 2))
    np.testing.assert_allclose(store.predict("m", ids), run(path, x=ids), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        store.predict("m", ids.astype(np.uint8) * 0), run(path, x=ids * 0), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ArgumentError, match="input 'x' must be int64, not float32"):
        store.predict("m", X)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("shape", [(7, 0, 64), (0, 2, 64)])
def test_recurrent_layers_on_nothing(
    store: pydedup.Store, tmp_path: Path, op: str, shape: tuple[int, ...]
) -> None:
    """ONNX Runtime ends the process there."""
    gates = 32 * (4 if op == "LSTM" else 3)
    nodes = [node(op, "x w r", "h", hidden_size=32), node("Squeeze", "h axes", "y")]
    weights = {"w": normal(1, gates, 64), "r": normal(1, gates, 32), "axes": np.array([1])}
    store.add("m", save(tmp_path / "m.onnx", nodes, weights, [value("x", 1, ("t", "b", 64))]))
    with pytest.raises(ArgumentError, match="the LSTM or GRU of m@1 cannot be run on nothing"):
        store.predict("m", np.zeros(shape, np.float32))
    assert store.predict("m", np.zeros((7, 2, 64), np.float32)).shape == (7, 2, 32)


def test_a_quantised_recurrent_layer_on_nothing(store: pydedup.Store, tmp_path: Path) -> None:
    many = ["x", "w", "r", *[""] * 5, "one", "zero", "one", "zero"]
    lstm = onnx.helper.make_node(
        "DynamicQuantizeLSTM", many, ["y"], domain="com.microsoft", hidden_size=32
    )
    weights = {
        **{
            name: RNG.integers(-9, 9, (1, rows, 128), np.int8)
            for name, rows in (("w", 64), ("r", 32))
        },
        "one": np.ones(1, np.float32),
        "zero": np.zeros(1, np.int8),
    }
    inputs = [value("x", 1, ("t", "b", 64))]
    store.add("m", save(tmp_path / "m.onnx", [lstm], weights, inputs))
    with pytest.raises(ArgumentError, match="the LSTM or GRU of m@1 cannot be run on nothing"):
        store.predict("m", np.zeros((7, 0, 64), np.float32))
    assert store.predict("m", np.zeros((7, 2, 64), np.float32)).shape == (7, 1, 2, 32)


def test_recurrent_layers_of_functions_on_nothing(store: pydedup.Store, tmp_path: Path) -> None:
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
    lstm = node("LSTM", "x w r", "h", hidden_size=32)
    function = onnx.helper.make_function("own", "Layer", ["x", "w", "r"], ["h"], [lstm], opsets[:1])
    nodes = [onnx.helper.make_node("Layer", ["x", "w", "r"], ["y"], domain="own")]
    weights = {"w": normal(1, 128, 64), "r": normal(1, 128, 32)}
    path = save(tmp_path / "m.onnx", nodes, weights, [value("x", 1, ("t", "b", 64))])
    model = onnx.load(path)
    model.functions.append(function)
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    onnx.save(model, path)
    store.add("m", path)
    with pytest.raises(ArgumentError, match="the LSTM or GRU of m@1 cannot be run on nothing"):
        store.predict("m", np.zeros((7, 0, 64), np.float32))
    assert store.predict("m", np.zeros((7, 2, 64), np.float32)).shape == (7, 1, 2, 32)


def test_look_ups_from_the_end(store: pydedup.Store, tmp_path: Path) -> None:
    path = save(
        tmp_path / "rows.onnx",
        [node("Gather", "table x", "y")],
        {"table": normal(500, 64)},
        [value("x", 7, ("b",))],
    )
    store.add("rows", path)
    assert store.graph("rows") is not None
    ids = np.array([0, -1, -500, 499])
    np.testing.assert_array_equal(store.predict("rows", ids), run(path, x=ids))


def test_a_norm_with_one_scale(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {"scale": normal(1), "shift": normal(1)}
    path = save(tmp_path / "n.onnx", [node("LayerNormalization", "x scale shift", "y")], weights)
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("ONNX Runtime before 1.24 runs no norm with one scale")
    store.add("norm", path)
    np.testing.assert_allclose(store.predict("norm", X), run(path, x=X), rtol=1e-4, atol=1e-5)


def test_dropout_at_the_end_has_the_name_of_the_output(
    store: pydedup.Store, tmp_path: Path
) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Dropout", "h", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 8)})
    model = onnx.load(path)
    model.graph.output.append(value("h", 1, ("b", 8)))
    onnx.save(model, path)
    store.add("m", path)
    assert store.graph("m") is not None
    found = store.predict("m", {"x": X})
    assert list(found) == ["y", "h"]
    for output in found.values():
        np.testing.assert_allclose(output, run(path, x=X), rtol=1e-4, atol=1e-5)


def test_half_precision_gives_what_it_declares(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {"w": normal(64, 80).astype(np.float16), "b": normal(80).astype(np.float16)}
    nodes = [node("MatMul", "x w", "a"), node("Add", "a b", "h"), node("Relu", "h", "y")]
    path = save(tmp_path / "m.onnx", nodes, weights, [value("x", 10)])
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = 10
    onnx.save(model, path)
    store.add("m", path)
    assert store.graph("m") is not None
    x = X.astype(np.float16)
    wanted = run(path, x=x)
    assert wanted.dtype == np.float16
    many = store.predict_many([("m", x), ("m", {"x": x[:1]})])
    for got, expected in (
        (store.predict("m", x), wanted),
        (store.predict("m", X), wanted),
        (many[0], wanted),
        (many[1]["y"], wanted[:1]),
    ):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, expected, rtol=0.01, atol=0.01)
    with np.errstate(all="raise"):
        assert np.isinf(store.predict("m", np.full((1, 64), 6e4, np.float32))).any()


def test_wrong_inputs(store: pydedup.Store, tmp_path: Path) -> None:
    nodes = [node("Mul", "x z", "a"), node("MatMul", "a w", "c"), node("Sin", "c", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(64, 80)}, [value("x"), value("z")])
    store.add("m", path)
    for x, message in (
        (X, "takes several inputs: x, z"),
        ({"x": X}, "input 'z' is missing; the model takes: x, z"),
        ({"x": X, "z": X, "w": normal(64, 80)}, "unknown input 'w'; the model takes: x, z"),
        ({"x": X, "z": np.array(["a"])}, "input 'z' must hold numbers, not <U1"),
        ({"x": X, "z": X[:, :5]}, "ONNX Runtime cannot run m@1: .*"),
    ):
        with pytest.raises(ArgumentError, match=message):
            store.predict("m", x)
    np.testing.assert_allclose(
        store.predict("m", {"x": X, "z": X})["y"], run(path, x=X, z=X), rtol=1e-4, atol=1e-5
    )


def test_a_number_alone_stays_one(store: pydedup.Store, tmp_path: Path) -> None:
    """It became a vector of one, and what was looked up by it a matrix of one row."""
    nodes = [node("Gather", "w i", "a", axis=0), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(8, 5)}, [value("i", 7, ())])
    store.add("m", path)
    expected = run(path, i=np.array(3))
    assert expected.shape == (5,)
    for number in (3, np.array(3, np.int8)):
        np.testing.assert_allclose(store.predict("m", number), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "label", "number"),
    [(6, "int32", 2**32 + 1), (2, "uint8", 256), (12, "uint32", -1), (13, "uint64", -1)],
)
def test_integers_that_a_model_cannot_take(
    store: pydedup.Store, tmp_path: Path, kind: int, label: str, number: int
) -> None:
    """They were taken for others: 256 for 0."""
    nodes = [node("Cast", "i", "a", to=1), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(2)}, [value("i", kind, ("n",))])
    store.add("m", path)
    with pytest.raises(ArgumentError, match=f"input 'i' must be {label}, from .*; it has {number}"):
        store.predict("m", np.array([1, number]))
    expected = np.sin(np.array([0, 7, 127], np.float32))
    np.testing.assert_allclose(store.predict("m", np.array([0, 7, 127])), expected, rtol=1e-5)
    assert store.predict("m", np.empty(0, np.int64)).shape == (0,)


def test_an_operation_that_nobody_knows(store: pydedup.Store, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Guess", "a", "y", domain="nobody")]
    store.add("m", save(tmp_path / "m.onnx", nodes, {"w": normal(64, 80)}))
    with pytest.raises(UnsupportedFormatError, match=r"ONNX Runtime cannot load m@1: .*Guess"):
        store.predict("m", X)


def test_what_the_runtime_says_is_not_printed(
    store: pydedup.Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A name that is no UTF-8 had it print four lines to standard output, and try once more."""
    path = save(
        tmp_path / "m.onnx",
        [node("MatMul", "x w", "a"), node("Guess", "a", "y")],
        {"w": normal(64, 80)},
    )
    path.write_bytes(path.read_bytes().replace(b"Guess", b"Gues\xff"))
    store.add("m", path)
    with pytest.raises(UnsupportedFormatError, match=r"ONNX Runtime cannot load m@1: .*utf-8"):
        store.predict("m", X)
    assert capfd.readouterr() == ("", "")


def test_info_says_who_runs_it(store: pydedup.Store, tmp_path: Path) -> None:
    path = stack(tmp_path, "m", {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)})
    store.add("m", path)
    store.add("weights", {"w": normal(64, 80)})
    for name, predicts, said in (("m", True, "yes, by ONNX Runtime"), ("weights", False, "no, ")):
        figures = store.info(name)
        assert (figures.has_graph, figures.by_onnx_runtime) == (predicts, predicts)
        shown = run_here("info", store.url, name).stdout
        assert re.search(rf"predicts +{said}", shown), shown


def test_a_model_without_a_graph(store: pydedup.Store) -> None:
    store.add("m", {"w": normal(64, 80)})
    with pytest.raises(NotFoundError, match=r"has no graph to predict with.*store\.attach\(\)"):
        store.predict("m", X)


def test_a_torch_module_with_a_layer_that_is_not_known(store: pydedup.Store) -> None:
    """Who had added an nn.Sequential was told to add one."""
    store.add("m", torch.nn.Sequential(torch.nn.Conv1d(64, 8, 1), torch.nn.ReLU()))
    said = (
        r"from an ONNX file, or from Keras or a torch\.nn\.Sequential of layers that pydedup knows"
    )
    with pytest.raises(NotFoundError, match=said):
        store.predict("m", X)


def test_without_the_runtime(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stack(tmp_path, "m", {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)})
    store.add("m", path.rename(tmp_path / "m.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UnsupportedFormatError, match=r"this ONNX model .* not installed \(import of onnxruntime"
    ):
        store.predict("m", X)


def test_a_forked_child(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {"w": normal(64, 80), "v": normal(80, 600), "bias": normal(600)}
    store.add("m", stack(tmp_path, "m.onnx", weights))
    x = normal(1000, 64)  # so large that the runtime uses its threads
    wanted = store.predict("m", x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = np.array_equal(store.predict("m", x), wanted)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
