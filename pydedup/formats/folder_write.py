# SPDX-License-Identifier: Apache-2.0
"""Writing Hugging Face model folders: the files that a model came from, with its tensors.

What says which files those are is from a store, which need not be one's own: nothing is read or
written outside of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.formats import safetensors, torch
from pydedup.formats._paths import stays_inside
from pydedup.formats.base import DERIVED, Array, LazyTensors, Outgoing, TensorEntry, find_object
from pydedup.formats.folder import GRAPH_FILE, LAYOUT, SAFE_SUFFIX, weight_map_of
from pydedup.formats.ties import copies

__all__ = ["write"]


@dataclass(frozen=True, slots=True)
class _File:
    """A file of weights: those that the index has in it, and others."""

    name: str
    metadata: dict[str, str] | None
    also: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """The weights of one folder: an index or none, and the files."""

    folder: str
    index: str | None
    files: tuple[_File, ...]

    @property
    def prefix(self) -> str:
        """What the names of its tensors and files begin with."""
        return f"{self.folder}/" if self.folder else ""


def write(path: Path, outgoing: Outgoing) -> list[str]:
    """Fill the empty folder ``path``: artifacts that were files, and the weights as they were.

    Returns the names of tied tensors that were written once more.
    """
    for item in outgoing.artifacts:
        if not item.name.startswith(DERIVED):
            target = _new_file(path, item.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(item.payload)
    if outgoing.graph is not None:
        (path / GRAPH_FILE).write_text(outgoing.graph.to_json(), encoding="utf-8")
    layout = find_object(outgoing.artifacts, LAYOUT)
    if layout is None:
        safetensors.write(_new_file(path, "model.safetensors"), outgoing, {"format": "pt"})
        return copies(outgoing.entries)
    again: list[str] = []
    by_name = {entry.name: entry for entry in outgoing.entries}
    for part in sorted(_parts(layout), key=lambda part: -len(part.folder)):
        for file, names in _assign(path, part, by_name):
            chosen = [by_name.pop(name) for name in names]
            inner = [
                TensorEntry(e.name.removeprefix(part.prefix), e.dtype, e.shape, e.key)
                for e in chosen
            ]
            target = _new_file(path, part.prefix + file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            mine = Outgoing(_Prefixed(outgoing.tensors, part.prefix), inner)
            if target.suffix == SAFE_SUFFIX:
                safetensors.write(target, mine, file.metadata)
                again += copies(chosen)
            else:
                torch.write(target, mine)
    if by_name:
        raise ArgumentError(
            f"tensor {min(by_name)!r} belongs to none of the files this model came from; "
            "export to one .safetensors file"
        )
    return again


class _Prefixed:
    """The tensors of one folder under their names in its files."""

    def __init__(self, tensors: LazyTensors, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str, /) -> Array:
        return self._tensors[self._prefix + name]


def _parts(layout: Mapping[str, Any]) -> list[_Part]:
    """Return what an artifact says of files of weights. Raises CorruptStoreError."""
    try:
        return [_part(part) for part in layout["parts"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise CorruptStoreError(
            f"the artifact {LAYOUT!r} of the model is damaged ({exc!r:.200}); restore a backup, or "
            "export to one .safetensors file"
        ) from exc


def _part(part: Mapping[str, Any]) -> _Part:
    files = tuple(
        _File(_text(file["name"]), _metadata(file["metadata"]), tuple(map(_text, file["also"])))
        for file in part["files"]
    )
    if not files or len({file.name for file in files}) < len(files):
        raise ValueError("it has no file, or one twice")
    index = part["index"]
    return _Part(_text(part["folder"]), None if index is None else _text(index), files)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    value.encode()
    return value


def _metadata(value: object) -> dict[str, str] | None:
    return safetensors.checked_metadata(f"the artifact {LAYOUT!r}", value)


def _assign(
    path: Path, part: _Part, by_name: Mapping[str, TensorEntry]
) -> list[tuple[_File, list[str]]]:
    """Return which tensors go into which file of a part."""
    mine = [name for name in by_name if name.startswith(part.prefix)]
    if part.index is None:
        return [(part.files[0], mine)]
    weight_map = dict(weight_map_of(_inside(path, part.prefix + part.index)))
    missing = set(weight_map) - {name.removeprefix(part.prefix) for name in mine}
    if missing:
        raise ArgumentError(
            f"tensor {part.prefix + min(missing)!r} is missing, which {part.index} lists; export "
            "to one .safetensors file"
        )
    weight_map.update({name: file.name for file in part.files for name in file.also})
    result = []
    for file in part.files:
        names = [n for n in mine if weight_map.get(n.removeprefix(part.prefix)) == file.name]
        result.append((file, names))
    return result


def _inside(folder: Path, name: str) -> Path:
    """Return where a stored file goes; names that would leave the folder are refused."""
    if not stays_inside(name) or "\0" in name:
        raise ArgumentError(f"artifact {name!r:.80} would be outside of the folder")
    return folder / PurePosixPath(name)


def _new_file(folder: Path, name: str) -> Path:
    target = _inside(folder, name)
    if target.exists():
        raise ArgumentError(f"artifact {name!r:.80} and another file want the same place")
    return target
