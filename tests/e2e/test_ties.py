# SPDX-License-Identifier: Apache-2.0
"""Tied tensors are one again in what a store gives back, where that has a way to say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import CorruptStoreError
from pydedup.formats import onnx_write
from pydedup.formats.ties import first_names
from pydedup.testing.program import run_here as run

torch = pytest.importorskip("torch")
nn = torch.nn


class Net(nn.Module):
    """An embedding tied to the layer behind it, and two norms that are merely equal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 30)
        self.norm, self.same = nn.LayerNorm(30), nn.LayerNorm(30)
        self.head = nn.Linear(30, 60)
        self.head.weight = self.embed.weight


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    with pydedup.open(tmp_path / "models.db") as opened:
        opened.add("m", Net())
        yield opened


def one(tensors: Any, *names: str) -> bool:
    return len({tensors[name].data_ptr() for name in names}) == 1


TIED = "embed.weight", "head.weight"
EQUAL = "norm.weight", "same.weight"


def test_a_state_dict(store: pydedup.Store) -> None:
    for state in (store.load_torch("m"), store.load_torch("m", "bf16")):
        assert one(state, *TIED)
        assert not one(state, *EQUAL)
    assert list(state) == list(Net().state_dict())


def test_torch_files(store: pydedup.Store, tmp_path: Path) -> None:
    assert store.export("m", tmp_path / "m.pt") == []
    state = torch.load(tmp_path / "m.pt")
    assert one(state, *TIED)
    assert not one(state, *EQUAL)
    # From one store into another, and in a new version.
    with pydedup.open(tmp_path / "other.db") as other:
        store.copy_to(other.url)
        other.add("m@2", tmp_path / "m.pt")
        assert one(other.load_torch("m@1"), *TIED)
        assert one(other.load_torch("m@2"), *TIED)


def test_hdf5_files(store: pydedup.Store, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    assert store.export("m", tmp_path / "m.h5") == []
    with h5py.File(tmp_path / "m.h5") as file:
        addresses = [h5py.h5o.get_info(file[name].id).addr for name in (*TIED, *EQUAL)]
        assert addresses[0] == addresses[1]
        assert addresses[2] != addresses[3]
        assert np.array_equal(file["head.weight"], store.load("m")["head.weight"])
    store.add("back", tmp_path / "m.h5")
    assert one(store.load_torch("back"), *TIED)


def test_formats_without_ties_say_so(store: pydedup.Store, tmp_path: Path) -> None:
    assert store.export("m", tmp_path / "m.safetensors") == ["head.weight"]
    assert store.export("m", tmp_path / "m.npz") == ["head.weight"]
    assert store.export("m", tmp_path / "folder") == ["head.weight"]
    with np.load(tmp_path / "m.npz") as arrays:
        assert np.array_equal(arrays["head.weight"], arrays["embed.weight"])
    url, path = store.url, str(tmp_path / "again.safetensors")
    assert "knows no ties: head.weight is written" in run("export", url, "m", path).stdout
    assert "knows no ties" not in run("export", url, "m", str(tmp_path / "again.pt")).stdout
    assert json.loads(run("export", url, "m", path, "--json").stdout)["tied_copies"] == [
        "head.weight"
    ]


def test_folders_of_torch_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save(Net().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pydedup.open(tmp_path / "models.db") as store:
        store.add("m", tmp_path / "model")
        assert store.export("m", tmp_path / "back") == []
    assert one(torch.load(tmp_path / "back" / "pytorch_model.bin"), *TIED)


def test_external_data_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    weight = np.random.default_rng(0).standard_normal((30, 30)).astype(np.float32)
    tensors = [onnx.numpy_helper.from_array(weight, name) for name in "vw"]
    for tensor in tensors:
        onnx.external_data_helper.set_external_data(tensor, "data", 0, weight.nbytes)
        tensor.ClearField("raw_data")
    (tmp_path / "data").write_bytes(weight.tobytes())
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 30])
        for name in "xy"
    )
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "v"], ["h"]),
        onnx.helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], tensors))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pydedup.open(tmp_path / "models.db") as store:
        store.add("m", tmp_path / "m.onnx")
        assert store.export("m", tmp_path / "inside.onnx") == ["w"]
        monkeypatch.setattr(onnx_write, "_MAX_MESSAGE", 2000)
        assert store.export("m", tmp_path / "large.onnx") == []
    assert (tmp_path / "large.onnx.data").stat().st_size == weight.nbytes
    for tensor in onnx.load(tmp_path / "large.onnx").graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), weight)


@pytest.mark.parametrize("payload", [b"{", b"7", b'[["a", "x"]]', b'[["a", "b"]]', b"[[1]]"])
def test_a_record_that_is_none(payload: bytes) -> None:
    with pytest.raises(CorruptStoreError, match="tied tensors is damaged"):
        first_names(payload, {"a": (3,), "b": (4,)})
