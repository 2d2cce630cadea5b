# SPDX-License-Identifier: Apache-2.0
"""safetensors against the safetensors library, and every rule of the header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pydedup.errors import FormatError, NotFoundError, UnsupportedFormatError
from pydedup.formats import _files
from pydedup.formats.base import Artifact, TensorEntry
from pydedup.formats.registry import open_source, write_model
from pydedup.formats.safetensors import METADATA
from pydedup.types import DType

from .formats_files import export, is_mapped

DTYPES = [member.numpy for member in DType]


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        'wörter."quoted"': torch.randn(300, 401),
        "half": torch.randn(7, 3).half(),
        "brain": torch.randn(300, 500).bfloat16(),
        "e4m3": torch.randn(33).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(33).to(torch.float8_e5m2),
        "double": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "deep": torch.randn(2, 3, 4, 5, 6),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(model(), path, metadata={"format": "pt", "naïve": "ü"})
    return path


def test_reads_what_the_library_wrote(path: Path) -> None:
    expected = model()
    with open_source(path) as source:
        assert source.format == "safetensors"
        assert {entry.name for entry in source.entries} == set(expected)
        for entry in source.entries:
            array = source.read(entry.name)
            assert array.shape == tuple(expected[entry.name].shape) == entry.shape
            assert array.dtype == entry.dtype.numpy
            assert array.flags.c_contiguous
            assert not array.flags.writeable
            assert array.tobytes() == bits(expected[entry.name])
        (artifact,) = source.artifacts()
    assert artifact.name == METADATA
    assert json.loads(artifact.payload) == {"format": "pt", "naïve": "ü"}


def test_arrays_outlive_the_source(path: Path) -> None:
    with open_source(path) as source:
        large, small = source.read('wörter."quoted"'), source.read("half")
    path.unlink()
    assert large.tobytes() == bits(model()['wörter."quoted"'])
    assert small.tobytes() == bits(model()["half"])


def test_very_large_tensors_are_views_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_MAP_FROM", 256 * 1024)
    with open_source(path) as source:
        assert is_mapped(source.read("brain"))
        assert not is_mapped(source.read("half"))  # a copy is cheaper


def test_tensors_stay_when_the_file_changes(path: Path) -> None:
    """Somebody saves it again while it is being added."""
    with open_source(path) as source:
        read = {entry.name: source.read(entry.name) for entry in source.entries}
        before = {name: array.tobytes() for name, array in read.items()}
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes(size))
        assert {name: array.tobytes() for name, array in read.items()} == before
        path.write_bytes(b"")
        assert {name: array.tobytes() for name, array in read.items()} == before
        with pytest.raises(FormatError, match="is truncated"):
            source.read("brain")


def test_an_export_is_the_same_file(path: Path, tmp_path: Path) -> None:
    export(path, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_library_reads_an_export(path: Path, tmp_path: Path) -> None:
    export(path, tmp_path / "again.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "again.safetensors")
    for name, tensor in model().items():
        assert bits(loaded[name]) == bits(tensor)


@given(
    arrays=st.lists(
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(
                np.uint8,
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4).map(
                    lambda shape: (*shape, dtype.itemsize)
                ),
            ).map(lambda raw: raw.view(dtype)[..., 0])
        ),
        max_size=5,
    )
)
def test_any_order_of_dtypes_round_trips(
    arrays: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {f"t{index}": np.ascontiguousarray(array) for index, array in enumerate(arrays)}
    tensors = {name: array.reshape(arrays[int(name[1:])].shape) for name, array in tensors.items()}
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    with open_source(tensors) as source:
        write_model(path, tensors, source.entries)
    # The library's own parser is the judge of the header.
    with safetensors.safe_open(path, "numpy") as judged:
        assert set(judged.keys()) == set(tensors)
    with open_source(path) as source:
        assert {entry.name for entry in source.entries} == set(tensors)
        for name, array in tensors.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_mixed_sizes_are_aligned(tmp_path: Path) -> None:
    tensors = {"flag": np.array([True]), "w": np.ones(3, np.float64), "b": np.ones(1, np.float16)}
    path = tmp_path / "m.safetensors"
    with open_source(tensors) as source:
        write_model(path, tensors, source.entries)
    header, start = _parts(path.read_bytes())
    for name, array in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % array.itemsize == 0
    assert safetensors.numpy.load_file(path)["w"].tobytes() == tensors["w"].tobytes()


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    flag = b"\x01"
    weights = np.arange(100_000, dtype=np.float32)
    header = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [100_000], "data_offsets": [1, 400_001]},
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(_file(header, flag + weights.tobytes()))
    with open_source(path) as source:
        array = source.read("w")
    assert array.flags.aligned
    assert array.tobytes() == weights.tobytes()


# ---- bad input ---------------------------------------------------------------------------------


def _file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _parts(raw: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'

BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "seven-bytes": (b"\x01\x00\x00\x00\x00\x00\x00", "too few"),
    "huge-length": (b"\xff" * 7 + b"\x7f{" + EIGHT, "header should have"),
    "length-beyond-the-file": (b"\x40" + bytes(7) + b"{}", "header should have"),
    "no-json": (_file(b"{nope}  ", EIGHT), "damaged"),
    "not-utf-8": (_file(b'{"\xff":{}}', EIGHT), "damaged"),
    "nested-too-deep": (_file(b'{"a":' + b"[" * 90_000, EIGHT), "damaged"),
    "no-object": (_file(b"[1]", EIGHT), "no JSON object"),
    "twice": (_file(TWICE, EIGHT), "occurs twice"),
    "metadata": (_file({"__metadata__": {"a": 1}, "a": _entry()}, EIGHT), "text to text"),
    "no-dtype": (_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "is damaged"),
    "unknown-dtype": (_file({"a": _entry("F99")}, EIGHT), "unknown dtype 'F99'"),
    "dtype-of-wrong-type": (_file({"a": _entry(["F32"])}, EIGHT), "unknown dtype"),
    "negative-size": (_file({"a": _entry(shape=(-2,))}, EIGHT), "are damaged"),
    "fractional-size": (_file({"a": _entry(shape=(2.0,))}, EIGHT), "are damaged"),
    "backwards": (_file({"a": _entry(offsets=(8, 0))}, EIGHT), "are damaged"),
    "size-and-shape-differ": (_file({"a": _entry(shape=(3,))}, EIGHT), "has 8 bytes"),
    "overflowing-shape": (_file({"a": _entry(shape=(1 << 62, 4))}, EIGHT), "has 8 bytes"),
    "hole": (_file({"a": _entry(offsets=(4, 12))}, bytes(12)), "starts at byte 4"),
    "overlap": (
        _file({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12)),
        "starts at byte 4",
    ),
    "beyond-the-end": (_file({"a": _entry()}, bytes(7)), "truncated"),
    "trailing-bytes": (_file({"a": _entry()}, bytes(9)), "truncated or damaged"),
    "empty-name": (_file({"": _entry()}, EIGHT), "is empty"),
    "control-characters": (_file({"a\n": _entry()}, EIGHT), "control characters"),
    "lone-surrogate": (_file({"\ud800": _entry()}, EIGHT), "Unicode"),
    "surrogate-in-metadata": (
        _file({"__metadata__": {"a": "\ud800"}, "a": _entry()}, EIGHT),
        "__metadata__ .* no valid Unicode",
    ),
    "empty-and-huge": (
        _file({"a": _entry(shape=(0, 1 << 62), offsets=(0, 0))}, b""),
        "'a' has the impossible shape",
    ),
    "too-many-axes": (_file({"a": _entry(shape=[1] * 40 + [2])}, EIGHT), "41 axes"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(name: str, tmp_path: Path) -> None:
    raw, says = BAD_HEADERS[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=says) as caught:
        open_source(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "C64"])
def test_dtypes_no_store_keeps_are_named(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(_file({"odd": _entry(dtype)}, EIGHT))
    with pytest.raises(UnsupportedFormatError, match=f"'odd' has dtype {dtype}") as caught:
        open_source(path)
    assert ("tensor.view(torch.uint8)" in str(caught.value)) == (dtype != "C64")
    assert ("imaginary" in str(caught.value)) == (dtype == "C64")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"a": np.ones(5, np.float32), "b": np.ones(2, np.int8)}, path)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_source(path)


def test_a_file_cut_while_open_is_noticed(path: Path) -> None:
    with open_source(path) as source:
        with path.open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(FormatError, match="truncated"):
            source.read("brain")


@pytest.mark.parametrize("flip", [lambda b: b ^ 1, lambda b: b ^ 0x80], ids=["low-bit", "high-bit"])
def test_flipped_header_bits_never_crash(flip: Callable[[int], int], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"a": np.ones(5, np.float32), "b": np.ones(2, np.int8)}, path)
    raw = path.read_bytes()
    refused = 0
    for position in range(_parts(raw)[1]):
        changed = bytearray(raw)
        changed[position] = flip(changed[position])
        path.write_bytes(changed)
        try:
            with open_source(path) as source:  # a letter of a name may change unseen
                for entry in source.entries:
                    source.read(entry.name)
        except FormatError:
            refused += 1
    assert refused > _parts(raw)[1] // 2


def test_unknown_names_are_not_found(path: Path) -> None:
    with open_source(path) as source, pytest.raises(NotFoundError, match="'nope'"):
        source.read("nope")


def test_the_name_of_the_metadata_is_no_tensor(tmp_path: Path) -> None:
    entry = TensorEntry("__metadata__", DType.F32, (1,), key=1)
    tensors = {"__metadata__": np.ones(1, np.float32)}
    with pytest.raises(UnsupportedFormatError, match="__metadata__"):
        write_model(tmp_path / "m.safetensors", tensors, [entry])
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_another_source_is_written(tmp_path: Path) -> None:
    entry = TensorEntry("a", DType.BF16, (1,), key=1)
    tensors = {"a": np.ones(1, ml_dtypes.bfloat16)}
    artifacts = [Artifact(METADATA, "application/json", b'{"who":"me"}')]
    write_model(tmp_path / "m.safetensors", tensors, [entry], artifacts)
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"who": "me"}
