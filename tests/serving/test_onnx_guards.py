# SPDX-License-Identifier: Apache-2.0
"""Inputs on which ONNX Runtime ended the process: of a signal, so that nobody was told why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, FormatError, PydedupError
from pydedup.formats._onnx_guards import guard

from .onnx_models import RNG, node, onnx, ort, run, save, value

_UINT8, _INT8, _INT32, _INT64, _UINT64 = 2, 3, 6, 7, 13


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


@pytest.mark.parametrize("kind", [_UINT8, _INT32, _INT64])
def test_several_divisions(store: pydedup.Store, tmp_path: Path, kind: int) -> None:
    """The runtime takes no graph of which two nodes are called alike."""
    nodes = [
        node("Div", "a b", "q", name="guard_3"),
        node("Mod", "a b", "r", name="division by zero_9"),
        node("Div", "q r", "y"),
    ]
    inputs = [value("a", kind, [None]), value("b", kind, [None])]
    path = save(tmp_path / "m.onnx", nodes, {}, inputs, kind=kind)
    store.add("m", path)
    dtype = {_UINT8: np.uint8, _INT32: np.int32, _INT64: np.int64}[kind]
    given = {"a": np.array([90, 75, 11], dtype), "b": np.array([13, 10, 4], dtype)}
    np.testing.assert_array_equal(store.predict("m", given)["y"], run(path, **given))
    for wrong in ([13, 0, 4], [13, 5, 4]):  # also of the second division
        with pytest.raises(ArgumentError, match="division by zero"):
            store.predict("m", {**given, "b": np.array(wrong, dtype)})


def in_functions(path: Path, kind: int, opset: int) -> Path:
    """Save a model of a // b by a function that calls another, whose types nothing tells."""
    make = onnx.helper
    own = [make.make_opsetid("", opset), make.make_opsetid("mine", 1)]
    functions = [
        make.make_function("mine", "Outer", ["p", "q"], ["r"], [inner], own)
        for inner in [node("Inner", "p q", "r", domain="mine")]
    ]
    functions.append(
        make.make_function("mine", "Inner", ["p", "q"], ["r"], [node("Div", "p q", "r")], own)
    )
    inputs = [value("a", kind, [None]), value("b", kind, [None])]
    graph = make.make_graph(
        [node("Outer", "a b", "y", domain="mine")], "g", inputs, [value("y", kind, [None])]
    )
    domains = [make.make_opsetid("", 17), make.make_opsetid("mine", 1)]
    model = make.make_model(graph, functions=functions, opset_imports=domains, ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("kind", [_INT32, _INT64])
def test_least_integers_in_functions(
    store: pydedup.Store, tmp_path: Path, kind: int, opset: int
) -> None:
    """Also in one of another version of the operations."""
    store.add("m", in_functions(tmp_path / "m.onnx", kind, opset))
    dtype = np.int32 if kind == _INT32 else np.int64
    a, b = np.array([np.iinfo(dtype).min, -7, 7, 9], dtype), np.array([-1, -1, 2, -3], dtype)
    np.testing.assert_array_equal(store.predict("m", {"a": a, "b": b})["y"], [a[0], 7, 3, -3])


def contributed(path: Path, kind: int) -> Path:
    """Save a model of a // b of an operation whose types onnx does not know."""
    # As a node: of an initialiser, ONNX Runtime 1.20 ends the process.
    axis = onnx.helper.make_tensor("zero", _INT32, (), [0])
    nodes = [
        node("Constant", "", "zero", value=axis),
        *(node("ExpandDims", f"{name} zero", f"{name}1", domain="com.microsoft") for name in "ab"),
        node("Div", "a1 b1", "y"),
    ]
    inputs = [value("a", kind, [None]), value("b", kind, [None])]
    return save(path, nodes, {}, inputs, kind=kind)


def test_what_nothing_is_known_of_is_divided_as_it_is(store: pydedup.Store, tmp_path: Path) -> None:
    store.add("whole", contributed(tmp_path / "whole.onnx", _INT32))
    least = np.array([np.iinfo(np.int32).min, 7, -9], np.int32)
    found = store.predict("whole", {"a": least, "b": np.array([-1, -1, 2], np.int32)})["y"]
    np.testing.assert_array_equal(found, [[least[0], -7, -4]])
    path = contributed(tmp_path / "floats.onnx", 1)
    store.add("floats", path)
    some = [np.inf, -np.inf, np.nan, 0, -0.0, -1, 1, 3, 1e-40, 3e38]
    a, b = (each.ravel() for each in np.meshgrid(*[np.array(some, np.float32)] * 2))
    found, wanted = store.predict("floats", {"a": a, "b": b})["y"], run(path, a=a, b=b)
    np.testing.assert_array_equal(found, wanted)
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(found)[numbers], np.signbit(wanted)[numbers])


def test_a_division_of_which_nothing_is_known_is_refused() -> None:
    """In a function of old operations, of which one has no like in those of the model."""
    make = onnx.helper
    nodes = [node("Identity", "p", "s"), node("Div", "s q", "r")]
    own = [make.make_opsetid("", 14)]
    function = make.make_function("mine", "F", ["p", "q"], ["r"], nodes, own)
    call = node("F", "a b", "y", domain="mine")
    graph = make.make_graph([call], "g", [value("a"), value("b")], [value("y")])
    domains = [make.make_opsetid("", 13), make.make_opsetid("mine", 1)]
    model = make.make_model(graph, functions=[function], opset_imports=domains)
    with pytest.raises(FormatError, match=r"the division 'r' in a function .* of version 14"):
        guard(model)


def calling(names: Sequence[tuple[str, str]]) -> Any:
    """Return a model of functions, each of which calls another twice; "" is a division."""
    make = onnx.helper
    own = [make.make_opsetid("", 17), make.make_opsetid("mine", 1)]
    functions = [
        make.make_function(
            "mine",
            name,
            ["p", "q"],
            ["r"],
            [node(called or "Div", f"{a} q", r, domain="mine" if called else "") for a, r in steps],
            own,
        )
        for name, called in names
        for steps in [(("p", "z"), ("z", "r"))]
    ]
    inputs = [value(name, _INT64, [None]) for name in "ab"]
    graph = make.make_graph(
        [node(names[0][0], "a b", "y", domain="mine")], "g", inputs, [value("y", _INT64, [None])]
    )
    return make.make_model(graph, functions=functions, opset_imports=own, ir_version=8)


def test_functions_that_no_memory_has_room_for_are_refused() -> None:
    guard(calling([("A", "B"), ("B", "")]))
    with pytest.raises(FormatError, match="call each other without an end"):
        guard(calling([("A", "B"), ("B", "C"), ("C", "B"), ("D", "")]))
    chain = [(f"F{i}", f"F{i + 1}") for i in range(40)]
    with pytest.raises(FormatError, match="2,199,023,255,552 nodes with those of its functions"):
        guard(calling([*chain, ("F40", "")]))
    long = [(f"F{i}", f"F{i + 1}") for i in range(400)]
    with pytest.raises(FormatError, match="or 100 deep"):
        guard(calling([*long, ("F400", "")]))


def test_divisions_of_too_few_numbers_are_left_to_the_runtime(
    store: pydedup.Store, tmp_path: Path
) -> None:
    store.add("m", save(tmp_path / "m.onnx", [node("Div", "x", "y")], {}))
    with pytest.raises(PydedupError, match="ONNX Runtime cannot load m@1"):
        store.predict("m", np.ones((1, 64), np.float32))


def test_types_that_operations_with_several_outputs_give(
    store: pydedup.Store, tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node("TopK", ["b", "one"], ["top", "at"]),
        node("SequenceConstruct", "top", "both"),
        node("SequenceAt", "both zero", "divisor"),
        node("Split", "a", "dividend"),
        node("Div", "dividend divisor", "y"),
    ]
    constants = {"one": np.array([1]), "zero": np.array(0)}
    inputs = [value("a", _INT64, [None]), value("b", _INT64, [None])]
    store.add("m", save(tmp_path / "m.onnx", nodes, constants, inputs, kind=_INT64))
    a = np.array([np.iinfo(np.int64).min])
    np.testing.assert_array_equal(store.predict("m", {"a": a, "b": np.array([-5, -1])})["y"], a)


def test_floats_of_operations_that_onnx_does_not_know_stay_as_they_are(tmp_path: Path) -> None:
    nodes = [node("Gelu", "x", "g", domain="com.microsoft"), node("Sqrt", "g", "r")]
    path = save(tmp_path / "m.onnx", [*nodes, node("Div", "g r", "q")], {}, output="q")
    model = onnx.load(path)
    guard(model)
    assert model == onnx.load(path)


@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize("kind", [_INT32, _INT64, _INT8, _UINT8, _UINT64])
@pytest.mark.parametrize("scalar", [True, False])
def test_integers_divided_by_zero(
    store: pydedup.Store, tmp_path: Path, op: str, kind: int, scalar: bool
) -> None:
    """Before 1.25, the runtime ended the process; and where the rest of a / -1 was asked for."""
    shape = [] if scalar else [None]
    inputs = [value("a", kind, [None]), value("b", kind, shape)]
    path = save(tmp_path / "m.onnx", [node(op, "a b", "y")], {}, inputs, kind=kind, opset=14)
    try:
        ort.InferenceSession(path)
    except Exception as error:
        pytest.skip(f"the runtime has no {op} of it: {error}")
    store.add("m", path)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    a = np.array([np.iinfo(dtype).min, 7, np.iinfo(dtype).max], dtype)
    for number in (1, 3, np.iinfo(dtype).max, *((-3, -1) if dtype.kind == "i" else ())):
        b = np.full([] if scalar else 3, number, dtype)
        numbers = [int(n) for n in a]
        wanted = [n % number for n in numbers]
        if op == "Div":
            wanted = [abs(n) // abs(number) * (1 if n * number > 0 else -1) for n in numbers]
        bits = [n & (2 ** (8 * dtype.itemsize) - 1) for n in wanted]
        found = store.predict("m", {"a": a, "b": b})["y"]
        np.testing.assert_array_equal(found, np.array(bits, f"u{dtype.itemsize}").view(dtype))
        assert found.shape == (3,)
    zeros = np.zeros_like(b)
    with pytest.raises(ArgumentError, match="division by zero"):
        store.predict("m", {"a": a, "b": zeros})
    if not scalar:  # of nothing
        found = store.predict("m", {"a": a[:0], "b": zeros[:0]})["y"]
        assert found.shape == (0,)


def test_a_rest_of_floats_stays_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Mod", "x x", "y", fmod=1)], {})
    model = onnx.load(path)
    guard(model)
    assert model == onnx.load(path)


def test_unknown_integers_divided_by_zero(store: pydedup.Store, tmp_path: Path) -> None:
    store.add("m", contributed(tmp_path / "m.onnx", _INT64))
    with pytest.raises(ArgumentError, match="division by zero"):
        store.predict("m", {"a": np.array([1, 2]), "b": np.array([1, 0])})


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
    both = [make.make_node("STFT", names, [output]) for output in "st"]
    return save(path, [*both, node("Add", "s t", "y")], {}, inputs)


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
