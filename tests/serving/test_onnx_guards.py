# SPDX-License-Identifier: Apache-2.0
"""Inputs on which ONNX Runtime ended the process: of a signal, so that nobody was told why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, FormatError
from pydedup.formats._onnx_guards import guard

from .onnx_models import RNG, node, onnx, run, save, value

_INT32, _INT64 = 6, 7


def quotients(path: Path, kind: int, *, within: bool = False, opset: int = 17) -> Path:
    """Save a model of a // b, which it computes in an If if that is wanted, or of parts of them."""
    nodes = [node("Identity", "b", "c"), node("Div", "a c", "y")]
    if within:
        outputs = [value("y", kind, [None])]
        branch = onnx.helper.make_graph(
            [node("Slice", "a zero end", "s"), node("Div", "s b", "y")], "branch", [], outputs
        )
        nodes = [
            node("Size", "a", "n"),
            node("Greater", "n zero1", "some"),
            node("If", "some", "y", then_branch=branch, else_branch=branch),
        ]
    constants = {"zero": np.array([0]), "end": np.array([9]), "zero1": np.array(0)}
    inputs = [value("a", kind, [None]), value("b", kind, [None])]
    return save(path, nodes, constants, inputs, kind=kind, opset=opset)


@pytest.mark.parametrize("kind", [_INT32, _INT64])
@pytest.mark.parametrize(("within", "opset"), [(False, 7), (False, 17), (True, 17)])
def test_the_least_integer_divided_by_minus_one(
    store: pydedup.Store, tmp_path: Path, kind: int, within: bool, opset: int
) -> None:
    store.add("m", quotients(tmp_path / "m.onnx", kind, within=within, opset=opset))
    dtype = np.int32 if kind == _INT32 else np.int64
    a = RNG.integers(-99, 99, 9).astype(dtype)
    b = np.array([-1, 1, 2, -3, 7, -1, 5, -1, 50], dtype)
    a[0] = np.iinfo(dtype).min
    wanted = np.trunc(a[1:] / b[1:])
    found = store.predict("m", {"a": a, "b": b})["y"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [a[0], *wanted])
    found = store.predict("m", {"a": a, "b": b[:1]})["y"]
    np.testing.assert_array_equal(found, [a[0], *-a[1:]])
    with pytest.raises(ArgumentError, match="division by zero"):
        store.predict("m", {"a": a, "b": 0 * b})


@pytest.mark.parametrize("kind", ["floats", "a constant", "a shape by a constant"])
def test_other_quotients_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    nodes = [node("Shape", "x", "s"), node("Sqrt", "x", "r"), node("Div", "s n", "q")]
    if kind == "floats":
        nodes[2:] = [node("Div", "x r", "q")]
    elif kind == "a constant":
        nodes[2:] = [node("Cast", "x", "i", to=_INT64), node("Div", "i n", "q")]
    path = save(tmp_path / "m.onnx", nodes, {"n": np.array([2])}, output="q")
    model = onnx.load(path)
    guard(model)
    assert model == onnx.load(path)


def frames(path: Path, *, with_window: bool) -> Path:
    make = onnx.helper
    names = ["x", "step", "w", ""] if with_window else ["x", "step", "", "length"]
    other = value("w", 1, [None]) if with_window else value("length", _INT32, [])
    kind = _INT64 if with_window else _INT32
    inputs = [value("x", 1, [1, None, 1]), value("step", kind, []), other]
    return save(path, [make.make_node("STFT", names, ["y"])], {}, inputs)


def test_frames_of_no_elements(store: pydedup.Store, tmp_path: Path) -> None:
    x = RNG.standard_normal((1, 16, 1), np.float32)
    given: dict[str, Any]
    for name, key, good, bad in (
        ("windows", "w", np.ones(4, np.float32), np.ones(0, np.float32)),
        ("lengths", "length", np.array(4, np.int32), np.array(0, np.int32)),
    ):
        path = frames(tmp_path / f"{name}.onnx", with_window=key == "w")
        store.add(name, path)
        step = np.array(2, np.int64 if key == "w" else np.int32)
        given = {"x": x, "step": step, key: good}
        np.testing.assert_array_equal(store.predict(name, given)["y"], run(path, **given))
        with pytest.raises(ArgumentError, match="the frames of STFT must not be empty"):
            store.predict(name, {**given, key: bad})


def test_n_grams_without_a_column(store: pydedup.Store, tmp_path: Path) -> None:
    def grams(columns: list[int]) -> Path:
        many = node(
            "TfIdfVectorizer",
            "x",
            "y",
            mode="TF",
            min_gram_length=1,
            max_gram_length=2,
            max_skip_count=0,
            ngram_counts=[0, 2],
            ngram_indexes=columns,
            pool_int64s=[1, 2, 1, 2],
        )
        return save(tmp_path / f"{len(columns)}.onnx", [many], {}, [value("x", _INT64, [None])])

    store.add("three", grams([0, 1, 2]))
    np.testing.assert_array_equal(store.predict("three", np.array([1, 2, 2])), [1, 2, 1])
    store.add("one", grams([0]))
    with pytest.raises(FormatError, match=r"TfIdfVectorizer '' .* has 3 n-grams, and columns"):
        store.predict("one", np.array([1, 2]))
