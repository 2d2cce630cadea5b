# SPDX-License-Identifier: Apache-2.0
"""ONNX files that are damaged, cut off, or lead out of their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats.registry import open_source

from .test_formats_onnx import holder, mlp


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    onnx.save(holder(numpy_helper.from_array(np.ones(3, np.float32), "w")), tmp_path / "m.onnx")
    raw = (tmp_path / "m.onnx").read_bytes()
    readable = []
    for length in range(len(raw)):
        (tmp_path / "m.onnx").write_bytes(raw[:length])
        try:
            with open_source(tmp_path / "m.onnx") as source:
                assert source.read("w").tolist() == [1, 1, 1]
            readable.append(length)
        except FormatError:
            pass
    # Cut exactly after the graph, only the list of operator versions is missing.
    assert readable == [raw.rindex(b"\x42")]


def test_flipped_bits_never_crash(tmp_path: Path) -> None:
    onnx.save(holder(numpy_helper.from_array(np.ones(3, np.float32), "w")), tmp_path / "m.onnx")
    raw = (tmp_path / "m.onnx").read_bytes()
    refused = 0
    for position in range(len(raw)):
        for bit in (1, 0x10, 0x80):
            changed = bytearray(raw)
            changed[position] ^= bit
            (tmp_path / "m.onnx").write_bytes(changed)
            try:
                with open_source(tmp_path / "m.onnx") as source:
                    for entry in source.entries:
                        source.read(entry.name)
                    list(source.artifacts())
                    str(source.graph)
            except FormatError:
                refused += 1
    assert refused > len(raw)


def test_a_constant_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[300], raw_data=bytes(1199))
    model = holder()
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(FormatError, match=r"m\.onnx: tensor 'c' has 1199 bytes, not 1200"):
        open_source(tmp_path / "m.onnx")


@pytest.mark.parametrize("n_bytes", [11, 13, 0])
def test_data_of_the_wrong_size_is_refused(n_bytes: int, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(n_bytes))
    (tmp_path / "m.onnx").write_bytes(holder(tensor).SerializeToString())
    with pytest.raises(FormatError, match=f"'w' is f32 .* has {n_bytes} bytes"):
        open_source(tmp_path / "m.onnx")


def test_an_empty_tensor_of_an_impossible_shape_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[0, 1 << 62])
    (tmp_path / "m.onnx").write_bytes(holder(tensor).SerializeToString())
    with pytest.raises(FormatError, match="'w' has the impossible shape"):
        open_source(tmp_path / "m.onnx")


def test_names_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    one = numpy_helper.from_array(np.ones(1, np.float32), "w")
    for name, says in (("", "is empty"), ("w", "occurs twice"), ("a\tb", "control")):
        other = numpy_helper.from_array(np.ones(1, np.float32), name)
        (tmp_path / "m.onnx").write_bytes(holder(one, other).SerializeToString())
        with pytest.raises(FormatError, match=says):
            open_source(tmp_path / "m.onnx")


def _external(path: Path, **fields: str) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=1)
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(holder(tensor).SerializeToString())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "not inside the model's folder"),
        ({"location": "/etc/passwd"}, "not inside the model's folder"),
        ({"location": "../secret"}, "not inside the model's folder"),
        ({"location": "a/../../secret"}, "not inside the model's folder"),
        ({"location": "link"}, "leads outside"),
        ({"location": "linked/secret"}, "leads outside"),
        ({"location": "missing"}, "does not exist"),
        ({"location": "w.data", "offset": "x"}, "damaged external data"),
        ({"location": "w.data", "offset": "-4"}, "not inside"),
        ({"location": "w.data", "offset": "4"}, "truncated"),
        ({"location": "w.data", "length": "8"}, "has 8 bytes"),
        ({"location": "folder"}, "no regular file"),
        ({"location": "w\0data"}, "cannot be read: .*embedded null"),
        ({"location": "w" * 300}, "cannot be read: File name too long"),
    ],
)
def test_external_data_stays_in_its_folder(
    fields: dict[str, str], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(12))
    (folder / "w.data").write_bytes(bytes(12))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    _external(folder / "m.onnx", **fields)
    with pytest.raises(FormatError, match=says):
        open_source(folder / "m.onnx")
    _external(folder / "m.onnx", location="w.data")
    with open_source(folder / "m.onnx") as source:
        assert source.read("w").tolist() == [0, 0, 0]


def test_an_external_file_whose_name_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """It was a TypeError, of a path in bytes."""
    _external(tmp_path / "m.onnx", location="w.data")
    raw = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(raw.replace(b"w.data", b"w.\xffata"))
    with pytest.raises(FormatError, match=r"initialiser 'w' has damaged external data"):
        open_source(tmp_path / "m.onnx")


def test_links_within_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--m" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    _external(blobs / "1", location="w.data")
    (blobs / "2").write_bytes(np.ones(3, np.float32).tobytes())
    (snapshot / "m.onnx").symlink_to("../../blobs/1")
    (snapshot / "w.data").symlink_to("../../blobs/2")
    with open_source(snapshot / "m.onnx") as source:
        assert source.read("w").tolist() == [1, 1, 1]


def test_without_onnx_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'pydedup\[onnx\]'"):
        open_source(path)
