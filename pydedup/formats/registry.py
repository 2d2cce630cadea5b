# SPDX-License-Identifier: Apache-2.0
"""Which reader opens a source, and which writer makes a file.

Readers are chosen by what a file holds. Its name is only asked when the content says nothing, to
give the error that the user expects: a damaged ``x.onnx`` is reported as a damaged ONNX model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydedup.errors import (
    ArgumentError,
    BudgetError,
    FormatError,
    NotFoundError,
    UnsupportedFormatError,
)
from pydedup.formats import (
    folder,
    folder_write,
    keras,
    npz,
    onnx,
    onnx_write,
    safetensors,
    torch,
    wordvec,
)
from pydedup.formats._files import (
    RawFile,
    atomic_file,
    atomic_folder,
    open_raw,
    refuse_foreign,
    write_errors,
)
from pydedup.formats._paths import exists, other_shards
from pydedup.formats._zip import ZipMembers
from pydedup.formats.arrays import MappingSource
from pydedup.formats.base import (
    WRITABLE,
    LazyArtifact,
    LazyTensors,
    ModelSource,
    Outgoing,
    TensorEntry,
    checked_entries,
)
from pydedup.formats.ties import copies
from pydedup.formats.torch_tensors import is_module
from pydedup.graph import Graph
from pydedup.names import check_path
from pydedup.text import listed

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["WRITABLE", "detect", "open_source", "write_model"]

_READERS: Mapping[str, Callable[[Path], ModelSource]] = {
    "safetensors": safetensors.SafetensorsSource,
    "npz": npz.NpzSource,
    "npy": npz.NpySource,
    "onnx": onnx.OnnxSource,
    "keras": keras.KerasSource,
    "keras-h5": keras.KerasSource,
    **{
        kind: lambda path, kind=kind: wordvec.WordVectorSource(path, kind)  # type: ignore[misc]
        for kind in ("glove", "word2vec", "word2vec-binary")
    },
}

#: Not of ONNX, which wants to know what the file will be called: it may write one beside it.
_WRITERS: Mapping[str, Callable[[Path, Outgoing], None]] = {
    "safetensors": safetensors.write,
    "torch": torch.write,
    "npz": npz.write_npz,
    "npy": npz.write_npy,
    "keras": keras.write_archive,
    "keras-h5": keras.write_hdf5,
    "glove": wordvec.write_glove,
    "word2vec": wordvec.write_word2vec_text,
    "word2vec-binary": wordvec.write_word2vec_binary,
}
#: Formats in which tied tensors stay one.
_WITH_TIES = ("torch", "keras", "keras-h5")
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
    ".npz": "npz",
    ".npy": "npy",
    ".onnx": "onnx",
    ".keras": "keras",
    ".h5": "keras-h5",
    ".hdf5": "keras-h5",
    ".vec": "word2vec",
    ".txt": "glove",
}

_HEAD = 1 << 20
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def open_source(
    source: str | os.PathLike[str] | Mapping[str, Any] | Module | ModelSource,
    weights_key: str | None = None,
    *,
    every_set: bool = False,
) -> ModelSource:
    """Open a model for reading.

    Parameters
    ----------
    source
        Path of a file or folder in any known format, a mapping of names to arrays or tensors, or
        a torch module; what is open already is returned.
    weights_key
        Of a torch checkpoint with several sets of weights in it, also in a folder, the key of
        those to read.
    every_set
        Read all of them as one model instead, each name behind its key.

    Raises
    ------
    NotFoundError
        When the path does not exist, or nothing in it has that key.
    FormatError
        When the file is damaged, unsafe, or of no known format.
    ArgumentError
        When ``source`` is something else, or has several sets of weights, or is no file that has
        such keys, and one is given.
    BudgetError
        When a format that cannot be read in parts does not fit into memory.
    """
    if isinstance(source, str | os.PathLike):
        if not isinstance(weights_key, str | None):
            raise ArgumentError(f"weights_key must be a text, not {weights_key!r:.80}")
        if not os.fspath(source):  # to `Path`, that is the folder where the process runs
            raise ArgumentError("the path of the model is empty")
        path = Path(source)
        try:
            opened = _open_path(path, weights_key, every_set)
        except MemoryError as exc:
            if isinstance(exc, BudgetError):
                raise
            raise BudgetError(f"no memory to open {path}") from exc
        opened.left_out += other_shards(path.name)
        return opened
    if weights_key is not None:
        raise ArgumentError(
            f"weights_key {weights_key!r} is for the path of a torch checkpoint, not for a "
            f"{type(source).__name__}"
        )
    if isinstance(source, ModelSource):
        return source
    if is_module(source):
        return torch.ModuleSource(source)  # type: ignore[arg-type]
    if isinstance(source, Mapping):
        return MappingSource(source)
    raise ArgumentError(
        f"a model must be a path, a mapping of names to arrays or a torch module, "
        f"not {type(source).__name__}"
    )


def _open_path(path: Path, weights_key: str | None, every_set: bool) -> ModelSource:
    kind = detect(path)
    if kind == "torch":
        return torch.TorchSource(path, weights_key, every_set=every_set)
    if kind == "huggingface":
        return folder.FolderSource(path, weights_key, every_set=every_set)
    if weights_key is not None:
        raise ArgumentError(
            f"{path} is no torch checkpoint but {kind}; weights_key ({weights_key!r}, "
            "--weights-key) is for these alone"
        )
    return _READERS[kind](path)


def detect(path: Path) -> str:
    """Return the name of the format of a file or folder, judged by its content.

    Raises
    ------
    NotFoundError, FormatError
        As `open_source`.
    """
    try:
        if not exists(path):
            raise NotFoundError(f"{path} does not exist")
        if path.is_dir():
            return "huggingface"
    except (OSError, ValueError) as exc:  # a name too long, a zero byte, no permission
        reason = getattr(exc, "strerror", None) or exc
        raise FormatError(f"{str(path)!r:.200} cannot be read: {reason}") from exc
    if path.name.endswith(".index.json"):
        raise FormatError(
            f"{path} is the index of a model that lies in several files; give its folder, "
            f"{str(path.parent)!r}"
        )
    with open_raw(path) as raw:
        if raw.size == 0:
            raise FormatError(f"{path} is empty")
        head = raw.read_at(0, min(raw.size, _HEAD))
        found = _by_content(path, raw, head)
    if found is None:
        # Not recognised: let the reader that the name promises say what is wrong.
        found = _SUFFIXES.get(path.suffix.lower())
        if found is None or found in ("glove", "word2vec"):
            raise UnsupportedFormatError(
                f"{path} is in no format that pydedup knows; it reads safetensors, torch "
                "checkpoints, npz and npy, ONNX, Keras, word2vec and GloVe files, and Hugging "
                "Face folders"
            )
        if found == "torch":
            raise FormatError(f"{path} is no torch checkpoint: it is no zip archive and no pickle")
        if found in ("keras", "npz"):
            raise FormatError(f"{path} is damaged or truncated: it is no zip archive")
    return found


def write_model(
    path: str | os.PathLike[str],
    tensors: LazyTensors,
    entries: Sequence[TensorEntry],
    artifacts: Iterable[LazyArtifact] = (),
    graph: Graph | None = None,
    *,
    format: str | None = None,
) -> list[str]:
    """Write a model to a file or folder, in one step: nothing is seen of it until it is complete.

    Parameters
    ----------
    path
        Target. A file that exists is replaced; a folder must not exist or be empty.
    tensors
        ``tensors[name]`` gives one array; it may load on demand, and is asked for one at a time
        in the order of ``entries`` (or of the file, where the format dictates it).
    entries
        Names, dtypes and shapes. Equal keys are stored once where the format can.
    artifacts
        What the source of the model gave; formats take what they understand.
    graph
        Kept in a folder; other formats have no place for it.
    format
        One of `WRITABLE`; by default chosen by the suffix of ``path``, none meaning a folder.

    Returns
    -------
    list of str
        The names of tensors with the key of an earlier one that were written once more.

    Raises
    ------
    UnsupportedFormatError
        When the format cannot hold this model, or no format fits the suffix.
    ArgumentError
        When the target cannot be written, or a tensor is not what its entry says.
    StorageFullError
        When there is no room.
    """
    text = check_path(path, "path")
    target = Path(text)
    outgoing = Outgoing(tensors, checked_entries("the model", entries), list(artifacts), graph)
    kind: object = format
    if kind is None:
        with write_errors(target):
            kind = _format_of(text, target, outgoing.artifacts)
    if not isinstance(kind, str) or kind not in WRITABLE:
        known = ", ".join(WRITABLE)
        raise UnsupportedFormatError(f"unknown format {kind!r}; choose one of {known}")
    if kind == "huggingface":
        with atomic_folder(target) as scratch:
            return folder_write.write(scratch, outgoing)
    replaced = onnx.own_data(target) if kind == "onnx" else []
    with atomic_file(target) as scratch:
        again = _write_file(kind, scratch, target, outgoing)
    for data in replaced:
        with contextlib.suppress(OSError):
            data.unlink()
    return again


def _write_file(kind: str, scratch: Path, target: Path, outgoing: Outgoing) -> list[str]:
    """Write a file; return the names of tied tensors that were written once more."""
    if kind == "onnx":
        return onnx_write.write(scratch, outgoing, final_path=target)
    _WRITERS[kind](scratch, outgoing)
    return [] if kind in _WITH_TIES else copies(outgoing.entries)


def _format_of(text: str, target: Path, artifacts: Sequence[LazyArtifact]) -> str:
    suffix = target.suffix.lower()
    if text.endswith(os.sep) or target.is_dir() or not suffix:
        return "huggingface"
    if suffix == ".bin" and any(item.name == wordvec.VOCABULARY for item in artifacts):
        return "word2vec-binary"
    if suffix not in _SUFFIXES:
        raise UnsupportedFormatError(
            f"no format for the suffix {suffix!r} of {target}; use one of "
            f"{', '.join(_SUFFIXES)}, none for a folder, or name the format"
        )
    return _SUFFIXES[suffix]


def _by_content(path: Path, raw: RawFile, head: bytes) -> str | None:
    refuse_foreign(path, head)
    if head[:2] == b"PK" and head[2:4] in (b"\x03\x04", b"\x05\x06"):
        return _zip_kind(path)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(_HDF5_MAGIC) or _late_hdf5(raw):
        return "keras-h5"
    if torch.looks_like_legacy(head):
        return "torch"
    if safetensors.looks_like(head, raw.size):
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise FormatError(
            f"{path} is a Python pickle; it is refused because unpickling it can run code. "
            "Save the weights as safetensors, or with torch.save(model.state_dict(), ...)"
        )
    if onnx.looks_like(raw):
        return "onnx"
    # A damaged file of a binary format may well begin like a word and a number.
    suffix = path.suffix.lower()
    if _SUFFIXES.get(suffix, "glove") in ("glove", "word2vec") or suffix == ".bin":
        return wordvec.detect(head)
    return None


def _late_hdf5(raw: RawFile) -> bool:
    """Return whether an HDF5 file begins after a block of the user's own."""
    start = 512
    while start + len(_HDF5_MAGIC) <= raw.size and start <= 1 << 20:
        if raw.read_at(start, len(_HDF5_MAGIC)) == _HDF5_MAGIC:
            return True
        start *= 2
    return False


def _zip_kind(path: Path) -> str:
    with contextlib.closing(ZipMembers(path)) as archive:
        names = list(archive.members)
    if any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names):
        return "torch"
    if any(name.endswith("/models/model.json") for name in names):
        raise UnsupportedFormatError(
            f"{path} is a torch.export archive, a program with its weights; load it with "
            "torch.export.load and give its state_dict"
        )
    if "model.weights.h5" in names:
        return "keras"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    if not names and path.suffix.lower() == ".npz":
        return "npz"  # numpy.savez without arrays
    raise UnsupportedFormatError(
        f"{path} is a zip archive of no known format, with {listed(names) or 'nothing'} in it; "
        "unpack it first"
    )
