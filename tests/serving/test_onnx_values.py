# SPDX-License-Identifier: Apache-2.0
"""ONNX models with values of kinds that numpy, or ONNX Runtime, has names of its own for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydedup
from pydedup import config
from pydedup.errors import ArgumentError, BudgetError, UnsupportedFormatError
from pydedup.formats.onnx_inputs import TextStep, text_step
from pydedup.serving import onnx_kept

from .onnx_models import X, node, normal, onnx, run, save, value


def test_weights_of_eight_bit_floats(store: pydedup.Store, tmp_path: Path) -> None:
    """Numpy calls one of their types a float like its own, which the runtime took it for."""
    weights = {"w": normal(64, 80).astype(ml_dtypes.float8_e5m2)}
    nodes = [node("Cast", "w", "f", to=1), node("MatMul", "x f", "a"), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, weights, opset=19)
    store.add("m", path)
    for _ in range(3):
        np.testing.assert_allclose(store.predict("m", X), run(path, x=X), rtol=1e-4, atol=1e-4)


def test_inputs_and_outputs_that_are_no_arrays(store: pydedup.Store, tmp_path: Path) -> None:
    """The process ended where an output had no value."""
    make = onnx.helper
    array = make.make_tensor_type_proto(1, ("b", 64))
    sequence, optional = make.make_sequence_type_proto(array), make.make_optional_type_proto(array)
    branches = [
        make.make_graph([one], name, [], [make.make_value_info(name, optional)])
        for name, one in (
            ("given", node("Optional", "x", "given")),
            ("none", node("Optional", "", "none", type=array)),
        )
    ]
    for name, nodes, last, ends in (
        ("s", [node("ConcatFromSequence", "x", "y", axis=0)], sequence, [value("y")]),
        (
            "o",
            [node("If", "flag", "y", then_branch=branches[0], else_branch=branches[1])],
            array,
            [make.make_value_info("y", optional)],
        ),
    ):
        starts = [make.make_value_info("x", last)]
        starts += [value("flag", 9, ())] if name == "o" else []
        graph = make.make_graph(nodes, "g", starts, ends)
        sets = [make.make_opsetid("", 17)]
        onnx.save(make.make_model(graph, opset_imports=sets, ir_version=8), tmp_path / "m.onnx")
        store.add(name, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedFormatError, match=r"s@1 takes 'x' as seq.*, which is not supp"):
        store.predict("s", [X, X[:1]])
    flag = {"x": X, "flag": np.array(True)}
    np.testing.assert_array_equal(store.predict("o", flag)["y"], X)
    with pytest.raises(UnsupportedFormatError, match=r"'y' as optional.* without a value"):
        store.predict("o", {**flag, "flag": np.array(False)})


def test_inputs_that_are_texts(store: pydedup.Store, tmp_path: Path) -> None:
    """It was not said what to do; what is said to be cut out predicts."""
    encoder = {"domain": "ai.onnx.ml", "keys_strings": ["a", "b"], "values_floats": [1.0, 2.0]}
    nodes = [
        node("LabelEncoder", "word", "number", **encoder),
        node("Add", "number x", "a"),
        node("Sin", "a", "y"),
    ]
    starts = [value("word", 8), value("x")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(2)}, starts)
    unknown = [node("Words", "word", "a", domain="nobody"), node("Add", "a x", "y")]
    store.add("texts", path)
    told = (
        r"texts@1 takes 'word' as tensor\(string\).* what it does with texts \(LabelEncoder\) "
        r"before.*with the input 'number' \(onnx.utils.extract_model"
    )
    given = {"word": np.full(X.shape, "b"), "x": X}
    for inputs in (given, {"x": X}, X):
        with pytest.raises(UnsupportedFormatError, match=told):
            store.predict("texts", inputs)
    assert text_step(save(tmp_path / "u.onnx", unknown, {}, starts).read_bytes(), ["word"]) == (
        TextStep()
    )
    cut = tmp_path / "cut.onnx"
    onnx.utils.extract_model(path, cut, ["number", "x"], ["y"], check_model=False)
    store.add("numbers", cut)
    found = store.predict("numbers", {"number": np.full_like(X, 2), "x": X})["y"]
    np.testing.assert_allclose(found, run(path, word=np.full(X.shape, "b", object), x=X))


def test_values_that_no_memory_holds(store: pydedup.Store, tmp_path: Path) -> None:
    """The input was said to be wrong."""
    nodes = [node("ConstantOfShape", "x", "a"), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(2)}, [value("x", 7, (1,))])
    store.add("m", path)
    assert store.predict("m", np.array([3])).shape == (3,)
    with pytest.raises(BudgetError, match=r"ONNX Runtime cannot run m@1: .*there is no memory"):
        store.predict("m", np.array([2**46]))
    assert store.predict("m", np.array([3])).shape == (3,)


@pytest.mark.parametrize(
    ("kind", "given", "taken"),
    [
        (1, np.array([0, 3, -5]), np.float32),
        (1, np.array([True, False]), np.float32),
        (16, np.array([0.5, -2], np.float32), np.float32),
        (16, np.array([0.5, -2], ml_dtypes.bfloat16), np.float32),
        (9, np.array([True, False]), np.bool_),
        (3, np.array([-128, 127]), np.int8),
        (2, np.array([0, 255], np.uint64), np.uint8),
    ],
)
def test_inputs_of_another_type(
    store: pydedup.Store, tmp_path: Path, kind: int, given: Any, taken: Any
) -> None:
    nodes = [node("Cast", "x", "a", to=1), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(2)}, [value("x", kind, ("n",))])
    store.add("m", path)
    expected = np.sin(given.astype(taken).astype(np.float32))
    np.testing.assert_allclose(store.predict("m", given), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (7, np.array([1.5]), "int64, not float64"),
        (7, np.array([True]), "int64, not bool"),
        (9, np.array([1]), "bool, not int64"),
    ],
)
def test_inputs_that_would_become_others(
    store: pydedup.Store, tmp_path: Path, kind: int, given: Any, said: str
) -> None:
    nodes = [node("Cast", "x", "a", to=1), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": normal(2)}, [value("x", kind, ("n",))])
    store.add("m", path)
    with pytest.raises(ArgumentError, match=f"input 'x' must be {said}"):
        store.predict("m", given)


def test_threads_are_as_many_as_asked_for(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Sin", "a", "y")]
    store.add("m", save(tmp_path / "m.onnx", nodes, {"w": normal(64, 80)}))
    monkeypatch.setenv("PYDEDUP_THREADS", "1")
    monkeypatch.setattr(config, "threads", lambda: 1)  # which reads that once in a process
    store.predict("m", X)
    (session,) = onnx_kept.runner_of(store._pool)._sessions.values()
    assert session.runtime.get_session_options().intra_op_num_threads == 1


def test_what_goes_wrong_is_raised_and_not_printed(
    store: pydedup.Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Sin", "a", "y")]
    anything = [value("x", 1, ("b", "n"))]  # the operation finds out
    store.add("m", save(tmp_path / "m.onnx", nodes, {"w": normal(64, 80)}, anything))
    with pytest.raises(ArgumentError, match="ONNX Runtime cannot run m@1"):
        store.predict("m", X[:, :5])
    assert capfd.readouterr() == ("", "")
