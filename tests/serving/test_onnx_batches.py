# SPDX-License-Identifier: Apache-2.0
"""ONNX models that were exported for one batch, whose size may be part of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.errors import ArgumentError

from .onnx_models import RNG, node, normal, ort, save, value

BATCHES = (1, 2, 3, 4, 8)
WEIGHTS = {"w": normal(64, 32), "k": normal(8, 3, 3, 3), "v": normal(8, 4)}
SIZES = {
    "flat": [-1, 64],
    "one": [1, -1],
    "exact": [1, 64],
    "eight": [-1, 8],
    "cut": [4, -1],
    "two": [2, 16, 2],
    "halves": [0, 2, 16],
    "kept": [0, 8, 8],
}
PRODUCT, RELU = node("MatMul", "x w", "a"), node("Relu", "a", "y")
POOLED = [node("Conv", "x k", "c"), node("GlobalAveragePool", "c", "p")]


def model(path: Path, nodes: Sequence[Any], *shapes: Sequence[object]) -> Any:
    """Save a model with inputs x and z of these shapes; return what runs it."""
    used = {name for one in nodes for name in one.input}
    constants = {name: np.array(size, np.int64) for name, size in SIZES.items()}
    weights = {name: w for name, w in {**WEIGHTS, **constants}.items() if name in used}
    inputs = [value(name, 1, shape) for name, shape in zip("xz", shapes, strict=False)]
    return ort.InferenceSession(save(path, nodes, weights, inputs))


def normals(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize("declared", [1, 4])
@pytest.mark.parametrize(
    ("nodes", "row"),
    [
        ([PRODUCT, RELU], (64,)),
        ([PRODUCT, node("Softmax", "a", "y", axis=-1)], (64,)),
        ([node("Reshape", "x flat", "b"), node("MatMul", "b w", "y")], (8, 8)),
        ([*POOLED, node("Flatten", "p", "f"), node("MatMul", "f v", "y")], (3, 9, 9)),
        ([*POOLED, node("Reshape", "p eight", "f"), node("MatMul", "f v", "y")], (3, 9, 9)),
    ],
)
def test_rows_by_themselves_may_be_of_any_number(
    store: pydedup.Store, tmp_path: Path, nodes: Any, row: tuple[int, ...], declared: int
) -> None:
    path = tmp_path / "m.onnx"
    session = model(path, nodes, (declared, *row))
    store.add("m", path)
    for rows in BATCHES:
        x = normals(rows, *row)
        copies = [np.repeat(x[at : at + 1], declared, axis=0) for at in range(rows)]
        wanted = [session.run(None, {"x": each})[0][:1] for each in copies]
        np.testing.assert_allclose(store.predict("m", x), np.concatenate(wanted), 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([PRODUCT, node("Reshape", "a one", "y")], (1, 64)),
        ([PRODUCT, node("Reshape", "a one", "b"), node("Softmax", "b", "y", axis=-1)], (1, 64)),
        ([node("Reshape", "x one", "b"), node("MatMul", "b w", "y")], (1, 8, 8)),
        ([node("Reshape", "x exact", "b"), node("MatMul", "b w", "y")], (1, 8, 8)),
        ([node("Reshape", "x cut", "b"), node("ReduceMax", "b", "y", axes=[1])], (1, 64)),
        ([PRODUCT, node("Softmax", "a", "y", axis=0)], (2, 64)),
        ([PRODUCT, node("ReduceMean", "a", "y", axes=[0], keepdims=0)], (2, 64)),
        ([PRODUCT, node("Transpose", "a", "y", perm=[1, 0])], (2, 64)),
        ([PRODUCT, node("Reshape", "a two", "y")], (2, 64)),
    ],
)
def test_a_batch_that_is_part_of_the_layers(
    store: pydedup.Store, tmp_path: Path, nodes: Any, shape: tuple[int, ...]
) -> None:
    """Of another one, rows became one another's, or one row of all, without a word."""
    path = tmp_path / "m.onnx"
    session = model(path, nodes, shape)
    store.add("m", path)
    for rows in (None, *BATCHES):
        x = normals(shape[0] if rows is None else rows, *shape[1:])
        if len(x) == shape[0]:
            wanted = session.run(None, {"x": x})[0]
            np.testing.assert_allclose(store.predict("m", x), wanted, 1e-4, 1e-5)
            continue
        told = rf"input 'x' has shape \({len(x)}, .* m@1 was exported for \({shape[0]}, .*dynamic"
        with pytest.raises(ArgumentError, match=told):
            store.predict("m", x)
        good = normals(*shape)
        first, second = store.predict_many([("m", x), ("m", good)])
        assert isinstance(first, ArgumentError)
        np.testing.assert_array_equal(second, store.predict("m", good))


def test_a_length_that_is_part_of_the_layers(store: pydedup.Store, tmp_path: Path) -> None:
    """Twice the length gave two rows for one."""
    path = tmp_path / "m.onnx"
    nodes = [node("Reshape", "x flat", "b"), node("MatMul", "b w", "y")]
    session = model(path, nodes, ("n", 4, 16))
    store.add("m", path)
    for rows in BATCHES:
        x = normals(rows, 4, 16)
        np.testing.assert_allclose(
            store.predict("m", x), session.run(None, {"x": x})[0], 1e-4, 1e-5
        )
    with pytest.raises(ArgumentError, match=r"has shape \(1, 8, 16\).*exported for \(any, 4, 16\)"):
        store.predict("m", normals(1, 8, 16))


def test_batches_of_several_inputs(store: pydedup.Store, tmp_path: Path) -> None:
    """One row was added to four; rows one by one are another model."""
    path = tmp_path / "m.onnx"
    session = model(path, [PRODUCT, node("Add", "a z", "y")], (1, 64), (4, 32))
    store.add("m", path)
    given = {"x": normals(1, 64), "z": normals(4, 32)}
    (wanted,) = session.run(None, given)
    np.testing.assert_allclose(store.predict("m", given)["y"], wanted, 1e-4, 1e-5)
    with pytest.raises(ArgumentError, match=r"'x' has shape \(4, 64\)"):
        store.predict("m", {**given, "x": normals(4, 64)})
    with pytest.raises(ArgumentError, match=r"'z' has shape \(1, 32\)"):
        store.predict("m", {**given, "z": normals(1, 32)})


@pytest.mark.parametrize("batch", ["n", 1, 3])
@pytest.mark.parametrize(
    "nodes",
    [
        [node("ReduceMax", "x", "y", axes=[1], keepdims=0)],
        [node("ReduceMean", "x", "y", axes=[1, 2], keepdims=1)],
        [node("Softmax", "x", "y", axis=1)],
        [node("Transpose", "x", "y", perm=[0, 2, 1])],
        [node("Concat", "x x", "y", axis=1)],
        [node("Flatten", "x", "y", axis=1)],
        [node("Reshape", "x halves", "y")],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_a_row_is_computed_along_the_axes_of_a_batch(
    store: pydedup.Store, tmp_path: Path, nodes: Any, batch: object
) -> None:
    """A positive axis was another one where the first was missing: a maximum of other numbers."""
    session = model(tmp_path / "m.onnx", nodes, (batch, 4, 8))
    store.add("m", tmp_path / "m.onnx")
    x = normals(batch if isinstance(batch, int) else 5, 4, 8)
    expected = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(store.predict("m", x), expected, 1e-5, 1e-6)
    for row, its in zip(x, expected, strict=True):
        np.testing.assert_allclose(store.predict("m", row), its, 1e-5, 1e-6)
    assert store.predict_many([("m", x[0]), ("m", x)])[0].shape == expected.shape[1:]
    by_name = store.predict("m", {"x": x[0]})
    np.testing.assert_allclose(by_name["y"], expected[0], 1e-5, 1e-6)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8), (8,), ()])
def test_other_numbers_of_axes_are_refused_where_they_count(
    store: pydedup.Store, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model(tmp_path / "m.onnx", [node("ReduceMax", "x", "y", axes=[1], keepdims=0)], ("n", 4, 8))
    store.add("m", tmp_path / "m.onnx")
    with pytest.raises(ArgumentError, match=r"exported for \(any, 4, 8\).*: give it 3 axes"):
        store.predict("m", normals(*shape))
    (refused,) = store.predict_many([("m", normals(*shape))])
    assert isinstance(refused, ArgumentError)


def test_what_counts_no_axes_takes_any_number_of_them(store: pydedup.Store, tmp_path: Path) -> None:
    model(tmp_path / "m.onnx", [PRODUCT, node("Softmax", "a", "y", axis=-1)], ("n", 64))
    store.add("m", tmp_path / "m.onnx")
    x = normals(2, 3, 64)
    rows = store.predict("m", x.reshape(6, 64))
    np.testing.assert_allclose(store.predict("m", x), rows.reshape(2, 3, 32), 1e-5, 1e-6)


def test_rows_that_a_model_flattens_first_may_be_flat(store: pydedup.Store, tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "f", axis=1), node("MatMul", "f w", "y")]
    model(tmp_path / "m.onnx", nodes, ("n", 8, 8))
    store.add("m", tmp_path / "m.onnx")
    x = normals(3, 8, 8)
    np.testing.assert_allclose(
        store.predict("m", x.reshape(3, 64)), store.predict("m", x), 1e-5, 1e-6
    )


def test_a_reshape_that_keeps_rows_mixes_none(store: pydedup.Store, tmp_path: Path) -> None:
    """Of 4 rows of 32 numbers it made 2 of 64."""
    model(tmp_path / "m.onnx", [node("Reshape", "x kept", "y")], ("n", "m"))
    store.add("m", tmp_path / "m.onnx")
    x = normals(2, 64)
    assert (store.predict("m", x) == x.reshape(2, 8, 8)).all()
    assert (store.predict("m", x[0]) == x[0].reshape(8, 8)).all()
    with pytest.raises(ArgumentError, match="reshape"):
        store.predict("m", normals(4, 32))


def test_a_row_without_an_axis_for_rows(store: pydedup.Store, tmp_path: Path) -> None:
    for name, nodes in (
        ("apart", [PRODUCT, RELU]),
        ("not", [PRODUCT, node("Softmax", "a", "y", axis=0)]),
    ):
        model(tmp_path / "m.onnx", nodes, (2, 64))
        store.add(name, tmp_path / "m.onnx")
    x = normals(64)
    np.testing.assert_allclose(store.predict("apart", x), store.predict("apart", x[None])[0], 1e-5)
    with pytest.raises(ArgumentError, match=r"x' has shape \(64,\), and not@1 was exp.* \(2, 64\)"):
        store.predict("not", x)
