# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: weights in one or several files, with config and tokenizer.

Each folder of the model may have weights: the first of a safetensors index, ``model.safetensors``
or the only other safetensors file, a torch index, ``pytorch_model.bin`` or the only other torch
file. Tensors of subfolders (parts of a diffusion pipeline, dense modules of a sentence encoder)
have the folder before their names: ``unet/conv_in.weight``.

All other small files are artifacts under their path. The same weights in further formats, states
of training and large files of unknown kind are left out, and listed.

Which weights were in which file is an artifact, too, so that the same files can be written again
(:mod:`pydedup.formats.folder_write`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydedup.errors import ArgumentError, FormatError
from pydedup.formats import safetensors, torch
from pydedup.formats._files import is_store, open_raw, refuse_foreign
from pydedup.formats._paths import is_inside, other_shards
from pydedup.formats.base import DERIVED, Array, Artifact, ModelSource, TensorEntry, find_object
from pydedup.graph import Graph
from pydedup.text import listed

__all__ = ["GRAPH_FILE", "LAYOUT", "SAFE_SUFFIX", "FolderSource", "weight_map_of"]

#: The artifact that says which weights were in which file.
LAYOUT = DERIVED + "folder-layout"
SAFE_SUFFIX = ".safetensors"
#: A file for models whose layers are known, so that they stay known.
GRAPH_FILE = "pydedup_graph.json"

_MAX_ARTIFACT = 64 << 20
_LARGEST_READ = 256 << 20
#: Files and folders after which a walk ends: one that has no weights by then is no model's, but a
#: home folder or a whole disk by mistake, which would take minutes.
_MOST_NAMES = 10_000
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
#: Weights in formats that pydedup does not read.
_FOREIGN_SUFFIXES = {
    *(".distcp", ".gguf", ".mlmodel", ".msgpack", ".onnx_data", ".ot", ".pb", ".tflite"),
}
_WEIGHT_SUFFIXES = {
    *(SAFE_SUFFIX, *_TORCH_SUFFIXES, ".ckpt", ".h5", ".keras", ".npy", ".npz", ".onnx"),
    *_FOREIGN_SUFFIXES,
}
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_SKIPPED_FOLDERS = re.compile(r"\.git|\.cache|__pycache__|checkpoint-\d+")
#: What says that folders hold parts of one model: of diffusers, of sentence-transformers.
_MANIFESTS = {"model_index.json", "modules.json"}
_MEDIA_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown",
    ".txt": "text/plain",
    ".py": "text/x-python",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}


@dataclass(slots=True)
class _Part:
    """The weights of one folder: an index or none, and the files."""

    folder: str
    index: str | None
    files: list[str]
    weight_map: Mapping[str, str] = field(default_factory=dict)


class FolderSource(ModelSource):
    """Reader of a model folder. Safe between threads."""

    format = "huggingface"

    def __init__(
        self, path: Path, weights_key: str | None = None, *, every_set: bool = False
    ) -> None:
        super().__init__(str(path))
        self._path = path
        self._wanted, self._every_set = weights_key, every_set
        self._files: dict[str, ModelSource] = {}
        self._where: dict[str, tuple[ModelSource, str]] = {}
        with self._closed_on_failure():
            names, skipped = _list_files(path)
            self._parts = list(_parts(path, names))
            if not self._parts:
                raise FormatError(f"{path} holds no model weights{_hint(names, skipped)}")
            self._layout: list[dict[str, Any]] = []
            self._set_entries(list(self._open_parts()))
            if weights_key is not None and all(
                isinstance(source, safetensors.SafetensorsSource) for source in self._files.values()
            ):
                raise ArgumentError(
                    f"the weights in {path} are safetensors and no torch checkpoint; weights_key "
                    f"({weights_key!r}, --weights-key) is for these alone"
                )
            self._check_that_it_is_one(names, skipped)
            self._artifact_files, left_out = self._choose_artifacts(names)
            self.left_out += tuple(skipped + left_out)
            self._graph = self._read_graph(names)

    @property
    def graph(self) -> Graph | None:
        """The layers, when pydedup wrote the folder and knew them."""
        return self._graph

    def artifacts(self) -> Iterator[Artifact]:
        """Yield all small files, and the layout of the weights."""
        layout = {"version": 1, "parts": self._layout}
        yield Artifact(LAYOUT, "application/json", json.dumps(layout).encode())
        for name in self._artifact_files:
            suffix = PurePosixPath(name).suffix.lower()
            media_type = _MEDIA_TYPES.get(suffix, "application/octet-stream")
            yield Artifact(name, media_type, _read_file(self._path / name))

    def close(self) -> None:
        """Close the files; arrays from them stay valid."""
        for source in self._files.values():
            source.close()

    def _read(self, entry: TensorEntry) -> Array:
        source, name = self._where[entry.name]
        return source.read(name)

    def _open_parts(self) -> Iterator[TensorEntry]:
        for part in self._parts:
            prefix = f"{part.folder}/" if part.folder else ""
            files = []
            found: set[str] = set()
            for file in part.files:
                source = self._open_weights(self._path / part.folder / file)
                self._files[prefix + file] = source
                self.weights_key = self.weights_key or source.weights_key
                also = []
                for entry in source.entries:
                    listed_in = part.weight_map.get(entry.name)
                    if listed_in not in (None, file):
                        continue  # the index prefers the copy in another file
                    if part.index and listed_in is None:
                        also.append(entry.name)
                    found.add(entry.name)
                    self._check_prefix(part, entry.name)
                    self._where[prefix + entry.name] = source, entry.name
                    key = (prefix + file, entry.key)
                    yield TensorEntry(prefix + entry.name, entry.dtype, entry.shape, key)
                self.left_out += tuple(f"{prefix}{file}: {key}" for key in source.left_out)
                metadata = find_object(source.artifacts(), safetensors.METADATA)
                files.append({"name": file, "metadata": metadata, "also": also})
            missing = sorted(set(part.weight_map) - found)
            if missing and part.index:
                raise FormatError(
                    f"{self._path / part.folder / part.index} lists tensor {missing[0]!r} in "
                    f"{part.weight_map[missing[0]]!r}, which does not have it"
                )
            self._layout.append({"folder": part.folder, "index": part.index, "files": files})

    def _open_weights(self, path: Path) -> ModelSource:
        if _is_safetensors(path):
            return safetensors.SafetensorsSource(path)
        return torch.TorchSource(path, self._wanted, every_set=self._every_set)

    def _check_that_it_is_one(self, names: Sequence[str], skipped: Sequence[str]) -> None:
        """Refuse a folder with a model in each of its folders: checkpoints, nightly builds."""
        folders = [part.folder for part in self._parts]
        if "" in folders or _MANIFESTS.intersection(names):
            return
        of_folder: dict[str, set[tuple[Any, ...]]] = {folder: set() for folder in folders}
        for entry in self._entries:
            folder = max((one for one in folders if entry.name.startswith(one + "/")), key=len)
            name = entry.name.removeprefix(folder)
            of_folder[folder].add((name, entry.dtype, entry.shape))
        kinds = list(of_folder.values())
        checkpoints = [name for name in _folders(skipped) if name.startswith("checkpoint-")]
        if checkpoints or any(kind in kinds[:i] for i, kind in enumerate(kinds)):
            found = [*(f"{folder}/" for folder in folders), *checkpoints]
            raise FormatError(
                f"{self.description} has no weights of its own, and each of several folders in it "
                f"has a model's; add these one by one, as versions, say: {listed(found)}"
            )

    def _check_prefix(self, part: _Part, name: str) -> None:
        full = f"{part.folder}/{name}" if part.folder else name
        for other in self._parts:
            if len(other.folder) > len(part.folder) and full.startswith(other.folder + "/"):
                raise FormatError(
                    f"{self.description}: tensor {name!r} of folder {part.folder or '.'!r} is "
                    f"named like one of folder {other.folder!r}; add the folders separately"
                )

    def _choose_artifacts(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        kept, left_out = [], []
        for name in names:
            if name in self._files or name == GRAPH_FILE:
                continue
            indexes = {str(PurePosixPath(p.folder, p.index)) for p in self._parts if p.index}
            stale = name.endswith(".index.json") and name not in indexes
            weights = PurePosixPath(name).suffix.lower() in _WEIGHT_SUFFIXES
            inside = is_inside(self._path / name, self._path)
            ours = name.startswith(DERIVED)  # a name of what is no file
            refused = ours or stale or weights or not inside
            # A store may be the one that this is added to.
            if refused or _size(self._path / name) > _MAX_ARTIFACT or is_store(self._path / name):
                left_out.append(name)
            else:
                kept.append(name)
        return kept, left_out

    def _read_graph(self, names: Sequence[str]) -> Graph | None:
        if GRAPH_FILE not in names:
            return None
        try:
            graph = Graph.from_json(_read_file(self._path / GRAPH_FILE))
            graph.validate({entry.name: entry.shape for entry in self._entries})
        except ArgumentError as exc:
            raise FormatError(f"{self._path / GRAPH_FILE} is damaged: {exc}") from exc
        return graph


def _list_files(path: Path) -> tuple[list[str], list[str]]:
    """Return all files by path inside the folder, and what was skipped: folders end in ``/``.

    Others are no files: links to what is not there, pipes.
    """
    names: list[str] = []
    skipped: list[str] = []

    def fail(exc: OSError) -> None:
        raise FormatError(f"{exc.filename} cannot be read: {exc.strerror}") from exc

    seen = 0
    for folder, folders, files in os.walk(path, onerror=fail):
        relative = Path(folder).relative_to(path)
        seen += len(folders) + len(files)
        if seen > _MOST_NAMES and not _begins_a_model(files if folder == str(path) else names):
            raise FormatError(
                f"{path} holds no model weights of its own, and too many files for a folder of a "
                f"model (over {_MOST_NAMES:,}); give the path of a file, or of a model's folder"
            )
        for name in list(folders):
            # Not `Path.is_symlink`, which raises where entries of a folder may only be listed: the
            # walk says that of them.
            linked = os.path.islink(Path(folder, name))  # noqa: PTH114
            if linked or _SKIPPED_FOLDERS.fullmatch(name):
                folders.remove(name)
                if not name.startswith((".", "__")):
                    skipped.append(f"{(relative / name).as_posix()}/")
        for name in files:
            found = names if _is_file(Path(folder, name)) else skipped
            found.append((relative / name).as_posix())
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise FormatError(f"{path} holds a file whose name {name!r} is no valid text") from exc
    return sorted(names), sorted(skipped)


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; raise FormatError where that cannot be told."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise FormatError(f"{path} cannot be read: {exc.strerror}") from exc


def _begins_a_model(names: Sequence[str]) -> bool:
    """Return whether files are weights at the top of a folder, or say what its folders hold."""
    return any(
        name in _MANIFESTS or ("/" not in name and name.endswith((SAFE_SUFFIX, *_TORCH_SUFFIXES)))
        for name in names
    )


def _parts(path: Path, names: Sequence[str]) -> Iterator[_Part]:
    by_folder: dict[str, list[str]] = {}
    for name in names:
        folder = PurePosixPath(name).parent.as_posix()
        by_folder.setdefault("" if folder == "." else folder, []).append(PurePosixPath(name).name)
    for folder in sorted(by_folder):
        part = _part(path, folder, by_folder[folder])
        if part is not None:
            yield part


def _part(path: Path, folder: str, files: Sequence[str]) -> _Part | None:
    safe = [name for name in files if name.endswith(SAFE_SUFFIX)]
    other = [
        name for name in files if name.endswith(_TORCH_SUFFIXES) and not _TRAINING.fullmatch(name)
    ]
    for suffix, found, usual in (
        (SAFE_SUFFIX, safe, ("model.safetensors", "diffusion_pytorch_model.safetensors")),
        (".bin", other, ("pytorch_model.bin", "diffusion_pytorch_model.bin")),
    ):
        indexes = [name for name in files if name.endswith(suffix + ".index.json")]
        for index in sorted(indexes, key=len)[:1]:  # variants have longer names
            weight_map = weight_map_of(path / folder / index)
            for file in weight_map.values():
                if file not in files:
                    raise FormatError(f"{path / folder / index} names {file!r}, which is missing")
            return _Part(folder, index, sorted(set(weight_map.values())), weight_map)
        if not found or (suffix == ".bin" and folder and not set(usual) & set(found)):
            continue  # in a subfolder, any other .bin or .pt may be anything
        chosen = next((name for name in usual if name in found), None)
        if chosen is None and len(found) > 1:
            raise FormatError(
                f"{path / folder} holds several weight files ({listed(found)}) and no "
                "index; give the path of one of them"
            )
        file = chosen or found[0]
        if rest := other_shards(file):
            raise FormatError(
                f"{path / folder} holds {file!r} alone of a model in {len(rest) + 1} files, and no "
                f"index; fetch the others, {listed(rest)}, or give the path of the file"
            )
        return _Part(folder, None, [file])
    return None


def weight_map_of(path: Path) -> Mapping[str, str]:
    """Return which file an index has each tensor in. Raises FormatError."""
    payload = _read_file(path)
    try:
        index = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path} is no index of weights: it is no JSON ({exc!s:.100})") from exc
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path} is no index of weights: it has no object 'weight_map' of tensors and files"
        )
    for file in weight_map.values():
        if not isinstance(file, str) or PurePosixPath(file).name != file:
            raise FormatError(f"{path} names the file {file!r:.80}, which is not in its folder")
    return weight_map


def _is_safetensors(path: Path) -> bool:
    """Return whether a file of weights is of that format, and no torch checkpoint."""
    if not is_inside(path, path.parent):
        raise FormatError(
            f"{path} leads outside of the model's folder; copy it with its links resolved (cp -rL)"
        )
    with open_raw(path) as raw:
        head = raw.read_at(0, min(raw.size, 64))
        known = safetensors.looks_like(head, raw.size)
    if not known:
        refuse_foreign(path, head)
    if known or path.suffix == SAFE_SUFFIX:
        return True
    if head[:2] != b"PK" and not torch.looks_like_legacy(head):
        graph = min((one.name for one in path.parent.glob("*.onnx")), default=None)
        what = "the model's file" if graph is None else f"{graph!r}, whose weights these may be"
        raise FormatError(f"{path} is no torch checkpoint; give the path of {what}")
    return False


def _hint(names: Sequence[str], skipped: Sequence[str]) -> str:
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
    foreign = [name for name in names if suffixes[name] in _FOREIGN_SUFFIXES]
    for name in names:
        if suffixes[name] in _WEIGHT_SUFFIXES - _FOREIGN_SUFFIXES:
            return f" of its own; give the path of a file, such as {name!r}"
    if folders := _folders(skipped):
        # What transformers' Trainer writes; the last of them, as numbers go.
        newest = max(folders, key=lambda name: (len(name), name))
        return f" of its own; give the path of a folder in it, such as {newest!r}"
    if foreign:
        return f" in a format that we read ({foreign[0]!r} is in none); save it as safetensors"
    return ": no .safetensors and no pytorch_model.bin"


def _folders(skipped: Sequence[str]) -> list[str]:
    return [name for name in skipped if name.endswith("/")]


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_READ + 1)
    except OSError as exc:
        raise FormatError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(data) > _LARGEST_READ:
        raise FormatError(f"{path} has over {_LARGEST_READ} bytes, too many for a file of its kind")
    return data


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as exc:
        raise FormatError(f"{path} cannot be read: {exc.strerror}") from exc
