# SPDX-License-Identifier: Apache-2.0
"""Choosing readers by content, refusing what is no model, and replacing files in one step.

Every format is given every wrong name and every kind of damage here; what is particular to one
format is in its own test file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from onnx import TensorProto, helper, numpy_helper

from pydedup.errors import (
    ArgumentError,
    BudgetError,
    FormatError,
    NotFoundError,
    UnsupportedFormatError,
)
from pydedup.formats.base import ModelSource, TensorEntry
from pydedup.formats.registry import open_source
from pydedup.types import DType

TABLE = np.arange(6, dtype=np.float32).reshape(2, 3)


def _onnx(path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    table = [numpy_helper.from_array(TABLE, "embedding")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y], table)
    onnx.save(helper.make_model(graph), path)


def _h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["embedding"] = TABLE


def _keras(path: Path) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["embedding"] = TABLE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", buffer.getvalue())


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, embedding=TABLE)


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, TABLE)


def _torch(path: Path) -> None:
    torch.save({"embedding": torch.from_numpy(TABLE)}, path)


def _torch_old(path: Path) -> None:
    state = {"embedding": torch.from_numpy(TABLE)}
    torch.save(state, path, _use_new_zipfile_serialization=False)


MAKERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: safetensors.numpy.save_file({"embedding": TABLE}, path),
    "torch": _torch,
    "torch-before-zip": _torch_old,
    "npz": _npz,
    "npy": _npy,
    "onnx": _onnx,
    "keras": _keras,
    "keras-h5": _h5,
    "glove": lambda path: path.write_bytes(b"a 0 1 2\nb 3 4 5\n"),
    "word2vec": lambda path: path.write_bytes(b"2 3\na 0 1 2\nb 3 4 5\n"),
    "word2vec-binary": lambda path: path.write_bytes(
        b"2 3\na " + TABLE[0].tobytes() + b"b " + TABLE[1].tobytes()
    ),
}
NATURAL = {
    "safetensors": ".safetensors",
    "torch": ".pt",
    "torch-before-zip": ".bin",
    "npz": ".npz",
    "npy": ".npy",
    "onnx": ".onnx",
    "keras": ".keras",
    "keras-h5": ".h5",
    "glove": ".txt",
    "word2vec": ".vec",
    "word2vec-binary": ".bin",
}
SUFFIXES = [*dict.fromkeys(NATURAL.values()), ".pth", ".weights.h5", "", ".unknown", ".SAFETENSORS"]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_wrong_suffix_is_read_right_or_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"made{NATURAL[kind]}"
    MAKERS[kind](path)
    for suffix in SUFFIXES:
        path = path.rename(tmp_path / f"file{suffix}")
        try:
            with open_source(path) as source:
                assert source.format == kind.removesuffix("-before-zip"), suffix
                (entry,) = source.entries
                assert source.read(entry.name).tobytes() == TABLE.tobytes()
        except FormatError as error:
            # Text formats have no magic: under the name of a binary format they are refused.
            text = kind in ("glove", "word2vec", "word2vec-binary")
            if not text or suffix in ("", ".unknown", NATURAL[kind]):
                raise
            assert path.name in str(error)  # noqa: PT017 - either outcome is right


def test_words_that_look_like_numbers_are_no_reason_to_misread(tmp_path: Path) -> None:
    """A log or a table of text must not become word vectors by accident."""
    for text in ("error 5\nall is well\n", "a,b,c\n1,2,3\n", "{}", "# title\n\ntext\n"):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(FormatError):
            open_source(tmp_path / "notes.txt")


@pytest.mark.parametrize("kind", MAKERS)
def test_empty_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{NATURAL[kind]}"
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="is empty"):
        open_source(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_folders_in_place_of_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{NATURAL[kind]}"
    path.mkdir()
    with pytest.raises(FormatError, match="holds no model weights"):
        open_source(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_missing_files_are_not_found(kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        open_source(tmp_path / f"file{NATURAL[kind]}")


def test_an_empty_path_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was that where the process ran: what an unset variable gives stored all files of it."""
    np.savez(tmp_path / "unrelated.npz", w=np.zeros(4, np.float32))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="path of the model is empty"):
        open_source("")


@pytest.mark.parametrize("kind", MAKERS)
def test_rubbish_is_refused_in_the_name_of_its_format(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{NATURAL[kind]}"
    for rubbish in (bytes(1000), bytes(range(256)) * 4, b"\xff" * 1000, b"PK\x03\x04"):
        path.write_bytes(rubbish)
        with pytest.raises(FormatError) as caught:
            open_source(path)
        message = str(caught.value)
        assert path.name in message
        assert "\n" not in message
        assert len(message) < 400


@pytest.mark.parametrize("kind", MAKERS)
def test_unreadable_files_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops; so the system call is made to fail."""
    path = tmp_path / f"file{NATURAL[kind]}"
    MAKERS[kind](path)
    really_open = os.open

    def refuse(name: Any, *args: Any, **more: Any) -> int:
        if Path(name) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return really_open(name, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FormatError, match="cannot be read: Permission denied"):
        open_source(path)


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/null")):
        with pytest.raises(FormatError, match="no regular file"):
            open_source(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(FormatError, match="cannot be read"):
            open_source(tmp_path / "s")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths_are_refused(path: str) -> None:
    with pytest.raises((FormatError, NotFoundError)):
        open_source(path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!doctype html><html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip; unpack it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "zstandard; unpack it first"),
        (b"\x80\x04\x95" + bytes(20), "Python pickle.*run code"),
    ],
)
def test_what_people_take_for_models_is_named(raw: bytes, says: str, tmp_path: Path) -> None:
    for name in ("m.safetensors", "m.bin", "m"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(FormatError, match=says):
            open_source(tmp_path / name)


def test_other_zip_archives_are_named(tmp_path: Path) -> None:
    """One with a model in it was said to hold none, and to hold its file."""
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("model.onnx", "")
    with pytest.raises(UnsupportedFormatError, match=r"with model\.onnx in it; unpack it first"):
        open_source(tmp_path / "m.npz")


def test_memory_that_is_not_there_is_a_budget_error() -> None:
    class Huge(ModelSource):
        def _read(self, entry: TensorEntry) -> Any:
            raise MemoryError

    source = Huge("huge")
    source._set_entries([TensorEntry("w", DType.F32, (3,), 1)])
    with pytest.raises(BudgetError, match="12 bytes of tensor 'w'"):
        source.read("w")


def test_a_checkpoint_that_does_not_fit_is_a_budget_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **more: Any) -> Any:
        raise MemoryError

    _torch_old(tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(BudgetError, match="no memory to open"):
        open_source(tmp_path / "m.pt")


def test_reading_after_closing_says_so(tmp_path: Path) -> None:
    for kind in ("safetensors", "npz", "onnx", "glove"):
        path = tmp_path / f"m{NATURAL[kind]}"
        MAKERS[kind](path)
        source = open_source(path)
        source.close()
        source.close()
        with pytest.raises(ArgumentError, match="is closed"):
            source.read("embedding")


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for kind, make in MAKERS.items():
        path = tmp_path / f"m{NATURAL[kind]}"
        make(path)
        with open_source(path) as source:
            for entry in source.entries:
                source.read(entry.name)
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) - 3])
        with contextlib.suppress(FormatError):
            open_source(path).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_interrupt_while_closing_closes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    MAKERS["safetensors"](path)
    source = open_source(path)
    closed: list[int] = []
    close = os.close

    def interrupted(fd: int) -> None:
        close(fd)
        closed.append(fd)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.close()
    # The number is another file's by now, as in a thread of a server.
    other = os.open(path, os.O_RDONLY)
    assert closed == [other]
    source.close()
    del source
    assert os.read(other, 1) == path.read_bytes()[:1]
    os.close(other)
