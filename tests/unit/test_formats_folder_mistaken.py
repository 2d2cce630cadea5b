# SPDX-License-Identifier: Apache-2.0
"""Folders that are no model's: a home folder, a whole disk, what another user keeps to itself."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pydedup.errors import FormatError
from pydedup.formats import folder as reader
from pydedup.formats.registry import open_source


def test_a_folder_of_very_many_files_is_not_walked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pydedup add STORE x /usr` looked at each file of it before it said that none is a model."""
    monkeypatch.setattr(reader, "_MOST_NAMES", 20)
    for n in range(5):
        (tmp_path / f"{n}").mkdir()
        for name in "abcde":
            (tmp_path / f"{n}" / name).touch()
    with pytest.raises(FormatError, match=r"too many files for .*\(over 20\); give the path of"):
        open_source(tmp_path)
    # A model may come with as many.
    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, tmp_path / "x.safetensors")
    with open_source(tmp_path) as source:
        assert [entry.name for entry in source.entries] == ["w"]
        assert len(list(source.artifacts())) == 5 * 5 + 1


def test_a_link_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    """A link into another user's folder was a PermissionError of Python's, not of pydedup."""
    (tmp_path / "config.json").symlink_to("x" * 300)  # which not even root may follow
    with pytest.raises(FormatError, match=r"config\.json cannot be read: File name too long"):
        open_source(tmp_path)


def test_weights_that_may_not_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were a PermissionError, too."""

    def refuse(*args: Any, **options: Any) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    for module in (io, os):
        monkeypatch.setattr(module, "open", refuse)
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be read: Permission denied"):
        open_source(tmp_path)


def test_weights_of_an_onnx_graph_are_no_torch_checkpoint(tmp_path: Path) -> None:
    """The message sent to "the model's file", which they may be taken for."""
    (tmp_path / "weights.bin").write_bytes(bytes(4096))
    with pytest.raises(FormatError, match=r"weights\.bin is no torch .* path of the model's file$"):
        open_source(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    with pytest.raises(FormatError, match=r"give the path of 'model\.onnx', whose weights these"):
        open_source(tmp_path)
