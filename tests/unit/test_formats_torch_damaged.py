# SPDX-License-Identifier: Apache-2.0
"""torch files that are damaged, cut off, carry code, or are no models."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError
from pydedup.formats.registry import open_source

from .test_formats_torch import check, model


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_code_in_a_pickle_never_runs(
    zipped: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "alone": Bomb(),
        "beside": {"epoch": Bomb(), "state_dict": {"w": torch.ones(2)}},
        "inside": {"w": torch.ones(2), "b": Bomb()},
    }
    torch.save(values[place], "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"m\.pt holds the Python object \w+\.mkdir .*run code"):
        open_source("m.pt")
    assert not Path("exploded").exists()
    torch.load("m.pt", weights_only=False)  # the bomb would have worked
    assert Path("exploded").exists()


def test_a_plain_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(2, 6):
        Path("m.bin").write_bytes(pickle.dumps({"w": Bomb()}, protocol))
        with pytest.raises(FormatError, match=r"Python pickle.*run code"):
            open_source("m.bin")
    assert not Path("exploded").exists()


class Whole(nn.Module):
    """A module saved whole, as people do."""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Whole(), r"holds the Python object [\w.]*Whole"),
        ([torch.ones(2)], "holds a value of type list, not a state dict"),
        (torch.ones(2), "holds a value of type Tensor, not a state dict"),
        (3, "holds a value of type int"),
        ({"w": torch.ones(2), "a.epoch": 3}, "'a.epoch' is of type int, not a tensor"),
        ({"w": {"x": torch.ones(2)}}, "'w' is of type dict, not a tensor"),
        (
            {"0._packed_params.dtype": torch.qint8},
            r"of type dtype, not a tensor; .* quantised",
        ),
        ({1: torch.ones(2)}, "has the key 1"),
        ({"": torch.ones(2)}, "name '' is empty"),
        ({"w": torch.eye(3).to_sparse()}, "sparse"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_what_is_no_state_dict_is_named(value: Any, says: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=says) as caught:
        open_source(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", b"")
    with pytest.raises(UnsupportedFormatError, match="TorchScript"):
        open_source(tmp_path / "m.pt")


def test_an_exported_program_is_refused(tmp_path: Path) -> None:
    """It was a zip archive that "holds no model"."""
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/data/weights/weight_0", b"")
        archive.writestr("m/models/model.json", b"")
    with pytest.raises(UnsupportedFormatError, match=r"m\.pt2 is a torch\.export archive.*load"):
        open_source(tmp_path / "m.pt2")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncation_is_noticed(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(
        {"a": torch.randn(9), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped
    )
    raw = path.read_bytes()
    for length in range(0, len(raw), 11):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def _flipped(raw: bytes, path: Path, step: int) -> tuple[int, int]:
    """Flip bits one at a time; return how many were refused, and tried."""
    refused = tried = 0
    for position in range(0, len(raw), step):
        changed = bytearray(raw)
        changed[position] ^= 0x04
        path.write_bytes(changed)
        tried += 1
        try:
            with open_source(path) as source:
                for entry in source.entries:
                    source.read(entry.name)
        except FormatError:
            refused += 1
    return refused, tried


def test_flipped_bits_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.randn(9), "b": torch.ones(3)}, path)
    raw = path.read_bytes()
    refused, tried = _flipped(raw, path, 5)
    assert refused > tried // 20  # most of a small file is padding and unused zip fields
    at = raw.index(torch.ones(3).numpy().tobytes())
    for position in range(at, at + 12):
        changed = bytearray(raw)
        changed[position] ^= 1
        path.write_bytes(changed)
        with open_source(path) as source:
            source.read("a")
            with pytest.raises(FormatError, match="checksum"):
                source.read("b")


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    with open_source(path) as source:
        check(source, model())


def test_a_repacked_and_compressed_archive_is_read_right(tmp_path: Path) -> None:
    expected = model()
    torch.save(expected, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with open_source(tmp_path / "packed.pt") as source:
        check(source, expected)


def test_a_view_that_leaves_its_storage_is_refused(tmp_path: Path) -> None:
    """The pickle claims more elements than the storage has bytes for."""
    path = tmp_path / "m.pt"
    torch.save({"a": torch.arange(64, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    # BININT1 64 as the tensor's size becomes 65; the storage keeps its 64.
    at = members[pickled].rindex(b"K@")
    members[pickled] = members[pickled][:at] + b"KA" + members[pickled][at + 2 :]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(FormatError), open_source(path) as source:
        source.read("a")


@pytest.mark.parametrize("make", [lambda: 3, lambda: None, lambda: torch.ones(2), lambda: [1]])
def test_other_things_are_no_models(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError, match="a model must be a path, a mapping"):
        open_source(make())
