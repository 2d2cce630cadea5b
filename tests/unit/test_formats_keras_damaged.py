# SPDX-License-Identifier: Apache-2.0
"""Keras files that are damaged, cut off, or lead elsewhere."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats import _hdf5_probe
from pydedup.formats.registry import open_source

from .test_formats_keras import BIAS, NAMES_2, check, make, write_archive, write_legacy


def _link(kind: str) -> Callable[[Any], None]:
    def write(file: Any) -> None:
        file["w"] = BIAS
        if kind == "external":
            file["link"] = h5py.ExternalLink("other.h5", "/w")
        elif kind == "soft":
            file["link"] = h5py.SoftLink("/w")
        elif kind == "cycle":
            file["group/self"] = file.create_group("group")
        elif kind == "external-data":
            file.create_dataset("x", (3,), "f4", external=[("/etc/passwd", 0, 12)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3,), "f4")
            layout[:] = h5py.VirtualSource("other.h5", "w", (3,))
            file.create_virtual_dataset("x", layout)
        elif kind == "bomb":
            file.create_dataset("x", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024))

    return write


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("external", "ExternalLink"),
        ("soft", "SoftLink"),
        ("cycle", "linked twice"),
        ("external-data", "in other files"),
        ("virtual", "in other files"),
        ("bomb", "claims"),
    ],
)
def test_what_leads_elsewhere_is_refused(kind: str, says: str, tmp_path: Path) -> None:
    make(tmp_path / "m.h5", _link(kind))
    with pytest.raises(FormatError, match=says):
        open_source(tmp_path / "m.h5")


def test_truncations_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    make(path, write_legacy, whole=True)
    raw = path.read_bytes()
    for length in (0, 1, 7, 8, 50, 96, 512, 2048, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def _small(path: Path) -> bytes:
    with h5py.File(path, "w") as file:
        file.create_group("layers").create_dataset("w", data=np.ones(4, np.float32))
        file.attrs["model_config"] = '{"class_name": "Sequential"}'
    return path.read_bytes()


def test_flipped_bits_in_the_structure_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    raw = _small(path)
    used = [index for index, byte in enumerate(raw) if byte]
    refused = 0
    for position in used[3::23]:
        changed = bytearray(raw)
        changed[position] ^= 0x80
        path.write_bytes(changed)
        try:
            with open_source(path) as source:
                for entry in source.entries:
                    source.read(entry.name)
        except FormatError:
            refused += 1
    assert refused > len(used[3::23]) // 4


def test_a_file_over_which_the_library_hangs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 2.0 follows a heap object of size 0 for ever."""
    monkeypatch.setattr(_hdf5_probe, "_SECONDS", 1)
    raw = bytearray(_small(tmp_path / "m.h5"))
    raw[raw.index(b"GCOL") + 24] ^= 0x20
    (tmp_path / "m.h5").write_bytes(raw)
    with pytest.raises(FormatError, match=r"crash or hang|damaged") as caught:
        open_source(tmp_path / "m.h5")
    assert "m.h5" in str(caught.value)


@pytest.mark.parametrize(
    "executable", ["/usr/lib/postgresql/bin/postgres", "/missing/python", None]
)
def test_without_an_interpreter_the_trial_is_skipped(
    executable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    make(tmp_path / "m.h5", write_legacy, whole=True)
    check(tmp_path / "m.h5", NAMES_2, ("optimizer_weights",))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_archives_are_noticed(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    write_archive(path, compression)
    raw = path.read_bytes()
    for length in range(0, len(raw), len(raw) // 20):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_source(path)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        start = archive.getinfo("model.weights.h5").header_offset + 200
    changed = bytearray(raw)
    changed[start + 5000] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FormatError, match=r"checksum|damaged"):
        open_source(path)


@pytest.mark.parametrize("text", ["{", "nope", "\udcff", "[" * 100_000])
def test_a_damaged_config_is_refused(text: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["w"] = BIAS
        file.attrs["model_config"] = text.encode("utf-8", "surrogateescape")[:60000]
    with pytest.raises(FormatError, match="config is damaged"):
        open_source(tmp_path / "m.h5")


def test_an_odd_config_is_kept_and_means_nothing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["w"] = BIAS
        file.attrs["model_config"] = "[1, 2]"
    with open_source(tmp_path / "m.h5") as source:
        assert source.graph is None
        assert source.read("w").tobytes() == BIAS.tobytes()


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "m.h5", write_legacy, whole=False)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'pydedup\[keras\]'"):
        open_source(tmp_path / "m.h5")
