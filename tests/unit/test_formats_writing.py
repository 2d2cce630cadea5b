# SPDX-License-Identifier: Apache-2.0
"""Writing models to files: round trips, suffixes, and what is left where it fails."""

from __future__ import annotations

import errno
import os
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydedup.errors import (
    ArgumentError,
    FormatError,
    NotFoundError,
    StorageFullError,
    UnsupportedFormatError,
)
from pydedup.formats.base import Artifact, TensorEntry
from pydedup.formats.registry import WRITABLE, open_source, write_model
from pydedup.formats.wordvec import VOCABULARY
from pydedup.types import DType

from .test_formats_registry import MAKERS, NATURAL

TABLE = np.arange(6, dtype=np.float32).reshape(2, 3)


def _give(path: Path, **more: Any) -> None:
    entries = [TensorEntry("embedding", DType.F32, (2, 3), 1)]
    words = [Artifact(VOCABULARY, "text/plain", b"a\nb")]
    write_model(path, {"embedding": TABLE}, entries, words, **more)


def _artifacts(kind: str, tmp_path: Path) -> list[Artifact]:
    if kind not in ("onnx", "keras"):
        return [Artifact(VOCABULARY, "text/plain", b"a\nb")]
    origin = tmp_path / f"origin{NATURAL[kind]}"
    MAKERS[kind](origin)
    with open_source(origin) as source:
        artifacts = list(source.artifacts())
    origin.unlink()
    return artifacts


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_format_round_trips_by_name(kind: str, tmp_path: Path) -> None:
    entries = [TensorEntry("embedding", DType.F32, (2, 3), 1)]
    artifacts = _artifacts(kind, tmp_path)
    write_model(tmp_path / "m", {"embedding": TABLE}, entries, artifacts, format=kind)
    with open_source(tmp_path / "m") as source:
        assert source.format == kind
        (entry,) = source.entries
        assert source.read(entry.name).tobytes() == TABLE.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("failure", ["loader", "wrong-shape", "wrong-dtype", "interrupt"])
def test_a_failed_export_leaves_what_was_there(kind: str, failure: str, tmp_path: Path) -> None:
    artifacts = _artifacts(kind, tmp_path)
    target = tmp_path / "m"
    if kind != "huggingface":
        target.write_bytes(b"what was there")
    entries = [TensorEntry("embedding", DType.F32, (2, 3), 1)]

    class Failing:
        def __getitem__(self, name: str) -> Any:
            if failure == "loader":
                raise NotFoundError("gone")
            if failure == "interrupt":
                raise KeyboardInterrupt
            return TABLE[:1] if failure == "wrong-shape" else TABLE.astype(np.float64)

    expected = {"loader": NotFoundError, "interrupt": KeyboardInterrupt}.get(failure, ArgumentError)
    with pytest.raises(expected):
        write_model(target, Failing(), entries, artifacts, format=kind)
    if kind != "huggingface":
        assert target.read_bytes() == b"what was there"
        target.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m.safetensors", "safetensors"),
        ("m.PT", "torch"),
        ("m.pth", "torch"),
        ("m.npz", "npz"),
        ("m.npy", "npy"),
        ("m.weights.h5", "keras-h5"),
        ("m.vec", "word2vec"),
        ("m.txt", "glove"),
        ("m.bin", "word2vec-binary"),
        ("m", "huggingface"),
    ],
)
def test_the_suffix_chooses_the_format(name: str, found: str, tmp_path: Path) -> None:
    _give(tmp_path / name)
    with open_source(tmp_path / name) as source:
        assert source.format == found


def test_bin_without_a_vocabulary_is_torch(tmp_path: Path) -> None:
    entries = [TensorEntry("w", DType.F32, (2, 3), 1)]
    write_model(tmp_path / "m.bin", {"w": TABLE}, entries)
    with open_source(tmp_path / "m.bin") as source:
        assert source.format == "torch"


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"no format for the suffix '\.gguf'"):
        _give(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedFormatError, match="unknown format 'gguf'; choose one of safe"):
        _give(tmp_path / "m", format="gguf")
    with pytest.raises(ArgumentError, match="is a folder"):
        _give(tmp_path, format="npz")
    with pytest.raises(ArgumentError, match="path is empty"):
        write_model("", {"w": TABLE}, [TensorEntry("w", DType.F32, (2, 3), 1)])
    with pytest.raises(ArgumentError, match="does not exist"):
        _give(tmp_path / "no" / "m.npz")
    with pytest.raises(ArgumentError, match="does not exist"):
        _give(tmp_path / "no" / "m")
    with pytest.raises(FormatError, match="occurs twice"):
        write_model(tmp_path / "m.npz", {"w": TABLE}, [TensorEntry("w", DType.F32, (2, 3), 1)] * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "m.npz"
    _give(target)
    before = target.read_bytes()
    seen: list[bytes] = []

    class Watching:
        def __getitem__(self, name: str) -> Any:
            seen.append(target.read_bytes())
            return TABLE + 1

    write_model(target, Watching(), [TensorEntry("embedding", DType.F32, (2, 3), 1)])
    assert seen == [before]
    with open_source(target) as source:
        assert source.read("embedding").tobytes() == (TABLE + 1).tobytes()


def test_links_are_written_through_and_modes_are_usual(tmp_path: Path) -> None:
    """A file that only its owner could read was for everybody when it was written anew."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "m.npz").write_bytes(b"")
    (tmp_path / "real" / "m.npz").chmod(0o604)
    (tmp_path / "link.npz").symlink_to(tmp_path / "real" / "m.npz")
    old = os.umask(0o027)
    try:
        _give(tmp_path / "link.npz")
        _give(tmp_path / "new.npz")
    finally:
        os.umask(old)
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "real" / "m.npz").stat().st_mode & 0o777 == 0o604
    assert (tmp_path / "new.npz").stat().st_mode & 0o777 == 0o640
    with open_source(tmp_path / "link.npz") as source:
        assert len(source.entries) == 1


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """An export to /dev/null, as root, put a file in the place of the device."""
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "link.npz").symlink_to(tmp_path / "pipe.npz")
    for name in ("pipe.npz", "link.npz"):
        with pytest.raises(ArgumentError, match=f"{name} is no regular file; choose another path"):
            _give(tmp_path / name)
    assert (tmp_path / "pipe.npz").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_full_disk_is_named_and_nothing_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = _artifacts(kind, tmp_path)
    entries = [TensorEntry("embedding", DType.F32, (2, 3), 1)]

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="no space left while writing"):
        write_model(tmp_path / "m", {"embedding": TABLE}, entries, artifacts, format=kind)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_target_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ArgumentError, match="cannot be written: Read-only file system"):
        _give(tmp_path / "m.npz")


def test_a_target_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    """Of one in another user's folder, too, the system's own error was raised."""
    with pytest.raises(ArgumentError, match="x cannot be written: File name too long"):
        _give(tmp_path / ("x" * 300))
    with pytest.raises(ArgumentError, match="npz cannot be written: File name too long"):
        _give(tmp_path / f"{'x' * 300}.npz")


@pytest.mark.parametrize("kind", ["npz", "keras"])
def test_an_interrupt_as_a_member_of_a_zip_archive_is_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an unexpected ValueError about the archive, which could not be closed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    entries = [TensorEntry("embedding", DType.F32, (2, 3), 1)]
    artifacts = _artifacts(kind, tmp_path)
    monkeypatch.setattr(zipfile, "_ZipWriteFile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "m", {"embedding": TABLE}, entries, artifacts, format=kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["safetensors", "huggingface"])
def test_what_a_killed_export_left_goes_with_the_next_one(kind: str, tmp_path: Path) -> None:
    """It lay there for ever, hidden, as large as the model."""
    target, entry = tmp_path / "m.[1]", TensorEntry("embedding", DType.F32, (2, 3), 1)

    class Waiting:
        def __getitem__(self, name: str) -> Any:
            os.write(said, b"?")
            os.read(answer, 1)
            return TABLE

    (asked, said), (answer, answered) = os.pipe(), os.pipe()
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            write_model(target, Waiting(), [entry], [], format=kind)
            os._exit(0)
        assert os.read(asked, 1) == b"?"
    assert len(list(tmp_path.iterdir())) == 2, "neither takes the other's away"
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    others = tmp_path / ".o.0123456789ab.tmp", tmp_path / ".m.1.0123456789ab.tmp"
    just_made = tmp_path / ".m.[1].0123456789ab.new"  # by one who was killed before he locked it
    for other in (*others, just_made):
        other.mkdir()
    write_model(target, {"embedding": TABLE}, [entry], [], format=kind)
    assert set(tmp_path.iterdir()) == {target, *others}
    for end in (asked, said, answer, answered):
        os.close(end)


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_folder_that_is_taken_for_one_that_was_left_is_made_again(
    event: str, tmp_path: Path
) -> None:
    """Nobody knows whose it is before it is locked."""
    target, entry = tmp_path / "m.npz", TensorEntry("embedding", DType.F32, (2, 3), 1)
    taken: list[str] = []

    def take_away(happens: str, arguments: tuple[object, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        if happens == event and path.endswith(".new") and not taken:
            taken.append(path)
            Path(path).rmdir()

    child = os.fork()
    if not child:  # of its own: no such hook is ever given back
        sys.addaudithook(take_away)
        try:
            write_model(target, {"embedding": TABLE}, [entry], [])
        finally:
            os._exit(0 if taken and target.exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_may_be_written_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error, though the file was there."""
    _give(tmp_path / "first.safetensors")  # what is imported for it, not everybody may read
    folder = tmp_path / "letterbox"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.chmod(0o300)
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        _give(Path("m.safetensors"))
    finally:
        os.seteuid(user)
        folder.chmod(0o700)
    with open_source(folder / "m.safetensors") as source:
        assert source.read("embedding").tobytes() == TABLE.tobytes()
    assert [path.name for path in folder.iterdir()] == ["m.safetensors"]
