# SPDX-License-Identifier: Apache-2.0
"""npz and npy against numpy."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats import _files
from pydedup.formats._zip import ZipMembers
from pydedup.formats.registry import open_source, write_model

from .formats_files import is_mapped

RNG = np.random.default_rng(0)


def model() -> dict[str, Any]:
    base = RNG.standard_normal((300, 401))
    return {
        "c-order": base.astype(np.float32),
        "fortran": np.asfortranarray(base.astype(np.float32)),
        "fortran-deep": np.asfortranarray(RNG.standard_normal((3, 4, 5))),
        "big-endian": base.astype(">f4"),
        "big-endian-fortran": np.asfortranarray(base.astype(">f8")),
        "half": RNG.standard_normal(5).astype(np.float16),
        "flags": np.array([[True], [False]]),
        "scalar": np.float64(np.nan),
        "empty": np.zeros((0, 3), np.int16),
        "ids": np.arange(5, dtype=np.uint64),
        "layer/dense/kernel:0": np.arange(3, dtype=np.int8),
        "ends.npy": np.arange(2),
    }


def same(read: Any, expected: Any) -> None:
    assert read.shape == expected.shape
    assert read.flags.c_contiguous
    assert not read.flags.writeable
    assert read.dtype == expected.dtype.newbyteorder("=")
    assert read.dtype.isnative
    assert read.tobytes() == expected.astype(expected.dtype.newbyteorder("="), order="C").tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_wrote(save: Any, tmp_path: Path) -> None:
    expected = model()
    save(tmp_path / "m.npz", **expected)
    with open_source(tmp_path / "m.npz") as source:
        assert source.format == "npz"
        assert [entry.name for entry in source.entries] == list(expected)
        for name, array in expected.items():
            same(source.read(name), np.asarray(array))


@pytest.mark.parametrize("name", model())
def test_npy_reads_what_numpy_wrote(name: str, tmp_path: Path) -> None:
    expected = np.asarray(model()[name])
    np.save(tmp_path / "m.npy", expected)
    with open_source(tmp_path / "m.npy") as source:
        assert source.format == "npy"
        assert [entry.name for entry in source.entries] == ["arr_0"]
        same(source.read("arr_0"), expected)


def test_numpy_reads_an_export_and_it_is_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: np.asarray(array) for name, array in model().items()}
    path = tmp_path / "out.npz"
    with open_source(tensors) as source:
        write_model(path, {name: source.read(name) for name in tensors}, source.entries)
    assert zipfile.ZipFile(path).testzip() is None
    with np.load(path, allow_pickle=False) as loaded:
        assert loaded.files == list(tensors)
        for name, array in tensors.items():
            if name != "ends.npy":  # numpy looks the suffix up twice
                assert loaded[name].tobytes() == array.astype(loaded[name].dtype).tobytes()
    monkeypatch.setattr(_files, "_MAP_FROM", 1)
    with open_source(path) as source:
        read = source.read("c-order")
        assert is_mapped(read)  # a view: the writer aligns what zip would not
        assert read.ctypes.data % 64 == 0
        for name, array in tensors.items():
            same(source.read(name), array)


def test_npy_export(tmp_path: Path) -> None:
    tensors = {"weights": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with open_source(tensors) as source:
        write_model(tmp_path / "out.npy", tensors, source.entries)
    assert np.load(tmp_path / "out.npy").tobytes() == tensors["weights"].tobytes()
    with (
        open_source({**tensors, "more": np.ones(1)}) as source,
        pytest.raises(UnsupportedFormatError, match=r"the model has 2; export to \.npz"),
    ):
        write_model(tmp_path / "two.npy", tensors, source.entries)
    assert not (tmp_path / "two.npy").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_floats_without_a_numpy_name_are_refused_both_ways(dtype: Any, tmp_path: Path) -> None:
    tensors = {"w": np.ones(4, dtype)}
    for name in ("m.npz", "m.npy"):
        with (
            open_source(tensors) as source,
            pytest.raises(UnsupportedFormatError, match="cannot name"),
        ):
            write_model(tmp_path / name, tensors, source.entries)
        assert list(tmp_path.iterdir()) == []
    np.savez(tmp_path / "m.npz", **tensors)
    with pytest.raises(UnsupportedFormatError, match="save it as safetensors"):
        open_source(tmp_path / "m.npz")


def test_an_empty_npz_has_no_tensors(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz")
    with open_source(tmp_path / "m.npz") as source:
        assert list(source.entries) == []


def test_members_that_are_no_arrays_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", w=np.ones(3))
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
        archive.writestr("README", "hello")
    with open_source(tmp_path / "m.npz") as source:
        assert [entry.name for entry in source.entries] == ["w"]
        assert source.left_out == ("README",)


# ---- bad input ---------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def _npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1").ljust(118 - len("\n")) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def _array(shape: str, data: bytes = b"", descr: str = "'<f4'") -> bytes:
    return _npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}", data)


RECORD = "[('a', '<f4')]"
BAD_NPY = {
    "header-only-magic": (b"\x93NUMPY", "damaged npy header"),
    "cut-header": (_npy("{'descr': '<f4'")[:40], "damaged npy header"),
    "unfinished": (_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,"), "damaged"),
    "unfinished-long": (_npy("{'descr': '<f4', 'shape': (3L,"), "damaged"),
    "no-dict": (_npy("[1, 2]"), "damaged npy header"),
    "code": (_npy("__import__('os').system('true')"), "damaged npy header"),
    "unknown-version": (_npy("{}", version=b"\x09\x00"), "damaged npy header|version"),
    "negative": (_array("(-1,)"), "impossible shape"),
    "short": (_array("(3,)", bytes(11)), "describes"),
    "long": (_array("(3,)", bytes(13)), "describes"),
    "huge": (_array("(9000000000000000000, 9)"), "describes"),
    "empty-and-huge": (_array("(0, 4611686018427387904)"), "impossible shape"),
    "objects": (_array("(0,)", descr="'|O'"), "run code"),
    "text": (_array("(1,)", bytes(8), "'<U2'"), "cannot be stored"),
    "complex": (_array("(1,)", bytes(8), "'<c8'"), "cannot be stored"),
    "records": (_array("(1,)", bytes(4), RECORD), "cannot be stored"),
    "no-dtype": (_array("(1,)", bytes(4), "'<q9'"), "element type"),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_npy_files_are_refused(name: str, tmp_path: Path) -> None:
    raw, says = BAD_NPY[name]
    (tmp_path / "bad.npy").write_bytes(raw)
    with pytest.raises(FormatError, match=says) as caught:
        open_source(tmp_path / "bad.npy")
    assert "bad.npy" in str(caught.value)
    # The same array inside an archive.
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("w.npy", raw)
    with pytest.raises(FormatError):
        open_source(tmp_path / "bad.npz")


def test_pickled_objects_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("m.npz", w=np.array([Bomb()], dtype=object))
    np.save("m.npy", np.array([Bomb()], dtype=object))
    with pytest.raises(pickle.UnpicklingError):  # the bomb would work
        raise pickle.UnpicklingError from _explode(Path("m.npy"))
    Path("exploded").unlink()
    for name in ("m.npz", "m.npy"):
        with pytest.raises(FormatError, match="unpickling can run code"):
            open_source(name)
    assert not Path("exploded").exists()


def _explode(path: Path) -> BaseException:
    np.load(path, allow_pickle=True)
    assert Path("exploded").exists()
    return RuntimeError("exploded")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_truncation_is_noticed(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    save(path, a=np.arange(9.0), b=np.arange(3))
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_source(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_are_noticed_or_harmless(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    expected = {"a": np.arange(40.0), "b": np.arange(3)}
    save(path, **expected)
    raw = path.read_bytes()
    refused = 0
    for position in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        try:
            with open_source(path) as source:
                read = {entry.name: source.read(entry.name) for entry in source.entries}
        except FormatError:
            refused += 1
            continue
        # What is accepted has every value right: the checksum covers names' contents, not names.
        wanted = sorted(array.tobytes() for array in expected.values())
        assert all(array.tobytes() in wanted for array in read.values())
    assert refused > len(raw) // 6


def test_an_array_named_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", buffer.getvalue())
    with pytest.raises(FormatError, match=r"'a\.npy' occurs twice"):
        open_source(tmp_path / "m.npz")


def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20))
    raw = bytearray(path.read_bytes())
    claimed = (1 << 23) + 128
    at = raw.rindex(claimed.to_bytes(4, "little"))  # in the directory at the end
    raw[at : at + 4] = (0xF0000000).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="claims"):
        open_source(path)


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.ones(2))
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 46 : at + 46 + 5] = b"\0.npy"  # zipfile cuts names at a zero byte
    (tmp_path / "m.npz").write_bytes(raw)
    with pytest.raises(FormatError, match="has no name"):
        open_source(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("at", "changed", "said"),
    [
        (0, b"PJ", r"the header of member 'b\.npy' is damaged"),
        (28, b"\xff\xff", r"is truncated: member 'b\.npy' is not all there"),
    ],
)
def test_a_damaged_header_of_a_member_is_told(
    at: int, changed: bytes, said: str, tmp_path: Path
) -> None:
    """Where a library reads the archive as well, it may be the first to see that."""
    path = tmp_path / "m.npz"
    np.savez(path, a=np.ones(2), b=np.ones(3))
    raw = bytearray(path.read_bytes())
    at += raw.rindex(b"PK\x03\x04")
    raw[at : at + 2] = changed
    path.write_bytes(raw)
    members = ZipMembers(path)
    with contextlib.closing(members), pytest.raises(FormatError, match=said):
        members.offset("b.npy")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (8, 1, r"member 'a\.npy' is encrypted; unpack it first"),
        (10, 14, r"member 'a\.npy' is compressed by method 14; write the file with deflate"),
    ],
)
def test_what_is_in_an_archive_otherwise_is_refused(
    at: int, value: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, a=np.ones(2))
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + at] = value
    path.write_bytes(raw)
    with pytest.raises(UnsupportedFormatError, match=said):
        open_source(path)


def test_an_empty_directory_in_an_archive_is_no_member(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
        archive.mkdir("folder")
    with open_source(tmp_path / "m.npz") as source:
        assert [entry.name for entry in source.entries] == ["a"]


def test_what_is_said_of_a_damaged_archive_is_not_what_is_in_it(tmp_path: Path) -> None:
    """The length of a name was damaged: the message had the whole array in it."""
    np.savez(tmp_path / "m.npz", w=np.zeros((20, 30)))
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    raw[27] = 0x10  # the high byte of that length
    (tmp_path / "m.npz").write_bytes(raw)
    damaged = pytest.raises(FormatError, match=r"is a damaged or truncated zip archive")
    with damaged as caught, open_source(tmp_path / "m.npz") as source:
        source.read("w")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
