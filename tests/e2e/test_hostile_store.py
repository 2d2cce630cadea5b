# SPDX-License-Identifier: Apache-2.0
"""A store from a stranger, who wrote into its tables what pydedup never does.

Whoever can write a store can also make its hashes fit: certificates here say nothing of what they
are about.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import sqlite3
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import pydedup
from pydedup.errors import (
    ArgumentError,
    CorruptStoreError,
    FormatError,
    NotAStoreError,
    PydedupError,
)
from pydedup.formats import _hdf5
from pydedup.graph import Graph, Node

from .damage import change

RNG = np.random.default_rng(3)
W = RNG.standard_normal((32, 32), np.float32)
X = RNG.standard_normal((2, 32), np.float32)


#: Rows without end.
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"


def onnx_model(weights: Sequence[Any]) -> onnx.ModelProto:
    """Return a model that ONNX Runtime has to run."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Sin", ["h"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def replace_artifact(url: str, payload: bytes, name: str = "pydedup:%") -> None:
    change(url, "UPDATE {models} SET certificate = ?", "{}")
    change(url, "UPDATE {artifacts} SET payload = ? WHERE name LIKE ?", payload, name)


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


def _skeleton(fill: Callable[[h5py.File], object]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return gzip.compress(buffer.getvalue())


def _outside(path: Path) -> Callable[[h5py.File], object]:
    where = [(str(path), 0, W.nbytes)]
    return lambda file: file.create_dataset("w", W.shape, "f4", external=where)


def test_a_keras_structure_writes_no_other_file(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export wrote the model's weights over any file that the structure named."""
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["w"] = W
    with pydedup.open(store_url) as store:
        store.add("m", tmp_path / "m.h5")
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine" * 2000)
    monkeypatch.setattr(_hdf5, "_MAX_SKELETON", 1 << 20)
    sound = _skeleton(lambda file: file.create_dataset("w", W.shape, "f4"))
    link = _skeleton(lambda file: file.update({"w": h5py.ExternalLink("mine", "/w")}))
    for payload, said in (
        (_skeleton(_outside(mine)), "keeps its data in other files"),
        (link, "ExternalLink"),
        (gzip.compress(bytes(2 << 20)), "bytes when it is unpacked"),
        (b"mine", "cannot be unpacked"),
        (sound[: len(sound) // 2], "cannot be unpacked"),
        (gzip.compress(b"mine"), "damaged or truncated HDF5"),
    ):
        replace_artifact(store_url, payload)
        with (
            pydedup.open(store_url) as store,
            pytest.raises(FormatError, match=f"the stored Keras structure.* {said}"),
        ):
            store.export("m", tmp_path / "out.h5")
        assert mine.read_bytes() == b"mine" * 2000
        assert not (tmp_path / "out.h5").exists()


def _layout(**part: object) -> str:
    file = {"name": "model.safetensors", "metadata": None, "also": []}
    return json.dumps({"parts": [{"folder": "", "index": None, "files": [file], **part}]})


@pytest.mark.parametrize(
    ("layout", "error", "said"),
    [
        (_layout(index="/tmp/index.json"), ArgumentError, "outside of the folder"),
        (_layout(folder="..", index="index.json"), ArgumentError, "outside of the folder"),
        (_layout(folder="/tmp"), ArgumentError, "outside of the folder"),
        (_layout(folder=1), CorruptStoreError, "1 is no text"),
        (_layout(index=1e308), CorruptStoreError, "is no text"),
        (_layout(files=[]), CorruptStoreError, "no file"),
        (_layout(files=[{"name": "a"}]), CorruptStoreError, "KeyError"),
        (
            _layout(files=[{"name": "\ud800", "metadata": None, "also": []}]),
            CorruptStoreError,
            "utf-8",
        ),
        (_layout(files=[{"name": "a", "metadata": [1], "also": []}]), CorruptStoreError, "text"),
        ('{"parts": 1}', CorruptStoreError, "not iterable"),
        ("[" * 100_000, CorruptStoreError, "recursion|Stack overflow"),
    ],
)
def test_a_layout_of_a_folder_reads_and_writes_nothing_outside(
    layout: str, error: type[PydedupError], said: str, tmp_path: Path
) -> None:
    """An index was read from anywhere; others of these were KeyErrors and TypeErrors."""
    (tmp_path / "m").mkdir()
    save_file({"w": W}, tmp_path / "m" / "model.safetensors")
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("m", tmp_path / "m")
    replace_artifact(url, layout.encode(), "pydedup:folder-layout")
    with pydedup.open(url) as store, pytest.raises(error, match=said):
        store.export("m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shape_of_no_array(store_url: str) -> None:
    """The product of its extents took for ever, or was too long a number for a message."""
    with pydedup.open(store_url) as store:
        store.add("m", {"w": W})
    change(store_url, "UPDATE {models} SET certificate = ?", "{}")
    for shape in ([1 << 40] * 2, [10**18] * 500, [1] * 100_000, [-1, -1024]):
        change(store_url, "UPDATE {tensors} SET shape = ?", json.dumps(shape))
        with pydedup.open(store_url) as store:
            (told,) = store.verify().errors
            assert re.match("m@1, tensor 'w': its shape or dtype cannot be read", told)
            assert len(told) < 500
            with pytest.raises(CorruptStoreError, match="its shape or dtype cannot be read"):
                store.load("m")


@pytest.mark.parametrize(
    "row", ["certificate", "metadata", "shape", "block_shape", "quotas", "job"]
)
def test_json_that_is_nested_without_end(row: str, store_url: str) -> None:
    """It was a RecursionError, with which `verify`, `ls` and adds ended."""
    with pydedup.open(store_url) as store:
        store.add("m", {"w": W})
        store.quotas.set("tenant", None, 1 << 30)
    nested = "[" * 100_000
    if row == "quotas":
        change(store_url, "UPDATE {meta} SET value = ? WHERE name = 'quotas'", nested)
    elif row == "job":
        change(store_url, "INSERT INTO {jobs} VALUES ('j', ?, '0', 'adding')", nested)
    else:
        table = "tensors" if "shape" in row else "models"
        change(store_url, f"UPDATE {{{table}}} SET {row} = ?", nested)  # noqa: S608
    with pydedup.open(store_url) as store:
        assert row == "job" or not store.verify().ok
        for use in (
            lambda: store.models(),
            lambda: store.load("m"),
            lambda: store.add("n", {"w": W + 1}, metadata={"tenant": "a"}),
            lambda: store.vacuum(),
        ):
            with contextlib.suppress(CorruptStoreError):
                use()


@pytest.mark.parametrize("kind", ["VIEW", "VIRTUAL TABLE"])
@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("meta", "'k' || i AS name, 'v' AS value"),
        ("aliases", "'m' AS name, 'a' || i AS alias, 1 AS model_id"),
        ("tensors", "1 AS model_id, i AS ordinal, 'w' AS name, 'f32' AS dtype"),
        ("Pages", "1 AS id, 'live' AS state, zeroblob(1000) AS payload"),
    ],
)
def test_a_view_in_place_of_a_table(kind: str, table: str, columns: str, tmp_path: Path) -> None:
    """Opening the store, or reading a model, took for ever: SQLite gives such rows without end."""
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", {"w": W})
    name = f"pydedup_{table}"
    body = f"AS {ENDLESS.format(columns)}" if kind == "VIEW" else "USING fts5(name, value)"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP VIEW pydedup_sharing")  # which names the table
        for view in ("model_sizes", "page_owners"):
            connection.execute(f"DROP VIEW pydedup_{view}")
        connection.execute(f"ALTER TABLE {name} RENAME TO kept")
        connection.execute(f"CREATE {kind} {name} {body}")
    for mode in ("a", "r"):
        with pytest.raises(NotAStoreError, match=f"its {name} is a view.*do not trust"):
            pydedup.open(path, mode=mode)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"DROP {kind.split()[-1]} {name}")
        connection.execute(f"ALTER TABLE kept RENAME TO {name.lower()}")
    with pydedup.open(path) as store:
        assert np.array_equal(store.load("m")["w"], W)


def test_a_weight_of_another_rank_than_its_layer(store_url: str) -> None:
    """The prediction was an IndexError."""
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(store_url) as store:
        store.add("m", {"w": W}, graph=graph)
    change(store_url, "UPDATE {models} SET certificate = ?, logical_bytes = 4", "{}")
    change(store_url, "UPDATE {tensors} SET shape = ?", "[]")
    with pydedup.open(store_url) as store, pytest.raises(PydedupError):
        store.predict("m", X)


def test_a_version_that_steers_a_terminal_is_escaped_in_errors(
    store_url: str, tmp_path: Path
) -> None:
    """It went as it is to where programs show what was raised."""
    version = "1\x1b[2J\x9b31m\u202e"
    with pydedup.open(store_url) as store:
        store.add("m", {"w": W})
    stored = version.encode() if "mysql" in store_url else version
    change(store_url, "UPDATE {models} SET version = ?", stored)
    with pydedup.open(store_url) as store:
        for use in (lambda: store.load("m"), lambda: store.copy_to(tmp_path / "copy.db")):
            with pytest.raises(CorruptStoreError, match=r"m@1.* was added as m@1") as told:
                use()
            shown = "".join(traceback.format_exception(told.value))
            assert "m@1\\x1b[2J\\x9b31m\\u202e was" in shown
            assert not set(version[1:]) - set("[2J31m") & set(shown)
        errors = store.verify().errors
        assert all(error.isprintable() for error in errors)
        assert any("m@1\\x1b[2J\\x9b31m\\u202e was" in error for error in errors)
