# SPDX-License-Identifier: Apache-2.0
"""safetensors files: an 8-byte length, a JSON header, then the bytes of all tensors.

The header is parsed here rather than by the safetensors library, because the library hands out
copies, and because its offsets make each tensor a view of the file. Every rule of the format that
keeps a reader safe is checked: sizes match shapes, offsets leave no hole and no overlap, names
are unique, nothing lies outside the file.

Writing streams one tensor at a time and produces what the library would: alignment by descending
element size where the given order is not aligned by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats._files import RawFile, write_array
from pydedup.formats.base import (
    DERIVED,
    Array,
    Artifact,
    ModelSource,
    Outgoing,
    TensorEntry,
    find_object,
)
from pydedup.types import DType

__all__ = ["METADATA", "SafetensorsSource", "checked_metadata", "looks_like", "write"]

#: The artifact that keeps ``__metadata__``.
METADATA = DERIVED + "safetensors-metadata"

#: The limit of the reference implementation; a larger header is damage or an attack.
_MAX_HEADER = 100_000_000

_DTYPES = {
    "F64": DType.F64,
    "F32": DType.F32,
    "F16": DType.F16,
    "BF16": DType.BF16,
    "I64": DType.I64,
    "I32": DType.I32,
    "I16": DType.I16,
    "I8": DType.I8,
    "U64": DType.U64,
    "U32": DType.U32,
    "U16": DType.U16,
    "U8": DType.U8,
    "BOOL": DType.BOOL,
    "F8_E4M3": DType.F8_E4M3,
    "F8_E5M2": DType.F8_E5M2,
}
_LABELS = {dtype: label for label, dtype in _DTYPES.items()}
#: Known to newer writers, but no dtype of a store.
_UNSTORABLE = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


class SafetensorsSource(ModelSource):
    """Reader of one ``.safetensors`` file. Safe between threads."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._raw = RawFile(path)
        with self._closed_on_failure():
            header, data_start = _read_header(self._raw)
            self._metadata = checked_metadata(self.description, header.pop("__metadata__", None))
            self._offsets: dict[str, int] = {}
            self._set_entries(self._parse(header, data_start))

    def artifacts(self) -> Iterator[Artifact]:
        """Yield ``__metadata__`` when the file has one."""
        if self._metadata is not None:
            payload = json.dumps(self._metadata, ensure_ascii=False).encode()
            yield Artifact(METADATA, "application/json", payload)

    def close(self) -> None:
        """Close the file; arrays from it stay valid."""
        self._raw.close()

    def _read(self, entry: TensorEntry) -> Array:
        return self._raw.array(self._offsets[entry.name], entry.dtype.numpy, entry.shape)

    def _parse(self, header: Mapping[str, Any], data_start: int) -> Iterator[TensorEntry]:
        where = self.description
        spans: list[tuple[int, int, TensorEntry]] = []
        for name, info in header.items():
            dtype, shape, begin, end = _tensor_info(where, name, info)
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise FormatError(
                    f"{where}: tensor {name!r} is {dtype.label} {shape} but has {end - begin} bytes"
                )
            self._offsets[name] = data_start + begin
            spans.append((begin, end, TensorEntry(name, dtype, shape, key=name)))
        spans.sort(key=lambda span: span[:2])
        position = 0
        for begin, end, entry in spans:
            if begin != position:
                raise FormatError(
                    f"{where}: tensor {entry.name!r} starts at byte {begin} of the data, "
                    f"{position} was expected; the header is damaged"
                )
            position = end
        if data_start + position != self._raw.size:
            raise FormatError(
                f"{where} has {self._raw.size} bytes, its header describes "
                f"{data_start + position}; it is truncated or damaged"
            )
        return (entry for _, _, entry in spans)


def looks_like(head: bytes, size: int) -> bool:
    """Return whether a file with these first bytes can be a safetensors file."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    return int.from_bytes(head[:8], "little") <= min(_MAX_HEADER, size - 8)


def write(path: Path, outgoing: Outgoing, metadata: Mapping[str, str] | None = None) -> None:
    """Write one file, tensor by tensor. ``metadata`` overrides the artifact's."""
    if metadata is None:
        stored = find_object(outgoing.artifacts, METADATA)
        metadata = checked_metadata(f"the artifact {METADATA!r}", stored)
    ordered = _aligned_order(outgoing.entries)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for entry in ordered:
        if entry.name == "__metadata__":
            raise UnsupportedFormatError(
                "a tensor named '__metadata__' cannot be written as safetensors; "
                "choose another format"
            )
        header[entry.name] = {
            "dtype": _LABELS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise UnsupportedFormatError(
            f"the safetensors header would have {len(text)} bytes; {_MAX_HEADER} are allowed"
        )
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            write_array(file, outgoing.fetch(entry))


def _aligned_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    ordered = list(entries)
    position = 0
    for entry in ordered:
        if position % entry.dtype.itemsize:
            return sorted(ordered, key=lambda item: -item.dtype.itemsize)
        position += entry.nbytes
    return ordered


def _read_header(raw: RawFile) -> tuple[dict[str, Any], int]:
    if raw.size < 8:
        raise FormatError(f"{raw.path} has {raw.size} bytes, too few for a safetensors file")
    length = int.from_bytes(raw.read_at(0, 8), "little")
    if length > _MAX_HEADER or 8 + length > raw.size:
        raise FormatError(
            f"{raw.path}: the header should have {length} bytes but the file has {raw.size}; "
            "it is truncated or no safetensors file"
        )
    try:
        header = json.loads(raw.read_at(8, length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{raw.path}: the safetensors header is damaged: {exc}") from exc
    if not isinstance(header, dict):
        raise FormatError(f"{raw.path}: the safetensors header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r:.80} occurs twice")
        result[name] = value
    return result


def checked_metadata(where: str, value: object) -> dict[str, str] | None:
    """Return what a file says of itself. Raises FormatError."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: __metadata__ of a safetensors file must map text to text")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise FormatError(
            f"{where}: __metadata__ of the safetensors file is no valid Unicode text"
        ) from exc
    return value


def _tensor_info(where: str, name: str, info: object) -> tuple[DType, tuple[int, ...], int, int]:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}: the header entry of {name!r:.80} is damaged; "
            "dtype, shape and data_offsets are needed"
        )
    label, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if isinstance(label, str) and label in _UNSTORABLE:
        raise UnsupportedFormatError(
            f"{where}: tensor {name!r} has dtype {label}, which "
            f"{DType.refusal(in_bytes=label != 'C64', in_pairs=label == 'C64')}"
        )
    if not isinstance(label, str) or label not in _DTYPES:
        raise FormatError(f"{where}: tensor {name!r} has the unknown dtype {label!r:.40}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: shape or data_offsets of tensor {name!r} are damaged")
    return _DTYPES[label], tuple(shape), offsets[0], offsets[1]


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
