# SPDX-License-Identifier: Apache-2.0
"""ONNX models: initialisers and other weights are the tensors, the rest is an artifact.

Reading walks the protobuf wire format to find where the initialisers' bytes lie in the file (or
in files of external data) and parses only what remains, so that memory holds the graph and one
tensor. What protobuf makes impossible to read in parts stays whole: a tensor whose values are
coded as variable-length integers is parsed when it is read, weights inside nodes and subgraphs
are in memory while the source is open, and texts remain in the artifact. Values of types that a
store does not have (4-bit numbers) are kept as the bytes that they are packed into.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydedup.errors import FormatError, PydedupError
from pydedup.formats._files import RawFile
from pydedup.formats._onnx_places import MODEL_GRAPH, Place, strip
from pydedup.formats._onnx_tensors import (
    EXTERNAL,
    clear_values,
    import_onnx,
    nested_tensors,
    parse,
    refuse_external,
    stored_as,
    typed_values,
)
from pydedup.formats._paths import exists, is_inside, stays_inside
from pydedup.formats._protobuf import walk
from pydedup.formats.base import (
    DERIVED,
    Array,
    Artifact,
    ModelSource,
    TensorEntry,
    name_problem,
)
from pydedup.formats.infer_onnx import infer_from_onnx
from pydedup.graph import Graph

__all__ = ["GRAPH", "OnnxSource", "looks_like", "own_data"]

#: The artifact with the model without its initialisers' data.
GRAPH = DERIVED + "onnx-graph"

#: Field number -> wire type of ModelProto, by which a file is recognised.
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
#: Constants up to this size are looked at when the layers are inferred.
_CONSTANT_BYTES = 4096


class OnnxSource(ModelSource):
    """Reader of an ``.onnx`` file and its external data. Safe between threads."""

    format = "onnx"
    has_program = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._onnx = import_onnx()
        self._path = path
        self._raw = RawFile(path)
        self._external: dict[str, RawFile] = {}
        self._places: dict[str, Place] = {}
        self._nested: dict[str, Array] = {}
        self._graph: Graph | None = None
        self._inferred = False
        with self._closed_on_failure():
            stripped, places = strip(self._raw)
            self._model = parse(self._onnx.ModelProto, stripped, self.description)
            initializers = list(self._collect(places))
            self._set_entries([*initializers, *self._collect_nested()])
            refuse_external(self._model, self.description)

    @property
    def graph(self) -> Graph | None:
        """The layers, when all operations are known."""
        if not self._inferred:
            model = self._onnx.ModelProto()
            model.CopyFrom(self._model)
            for tensor in model.graph.initializer:
                entry = self._by_name.get(tensor.name)
                if entry is not None and entry.nbytes <= _CONSTANT_BYTES:
                    tensor.raw_data = self.read(tensor.name).tobytes()
            self._graph = infer_from_onnx(model)
            self._inferred = True
        return self._graph

    def artifacts(self) -> Iterator[Artifact]:
        """Yield the model without its initialisers' data."""
        payload = self._model.SerializeToString(deterministic=True)
        yield Artifact(GRAPH, "application/x-onnx", payload)

    def close(self) -> None:
        """Close the files; arrays from them stay valid."""
        self._raw.close()
        for raw in self._external.values():
            raw.close()

    def _collect(self, places: Sequence[Place]) -> Iterator[TensorEntry]:
        for tensor, place in zip(self._model.graph.initializer, places, strict=True):
            stored = stored_as(tensor)
            if stored is None:
                continue  # its data is still in the artifact
            dtype, shape = stored
            where = f"{self.description}: initialiser {tensor.name!r}"
            if any(extent < 0 for extent in tensor.dims):
                raise FormatError(f"{where} has the impossible shape {tuple(tensor.dims)}")
            n_bytes = math.prod(shape) * dtype.itemsize
            if tensor.data_location == EXTERNAL:
                place = self._external_place(tensor, n_bytes, where)
                clear_values(tensor)
            if not place.parse and place.length != n_bytes:
                raise FormatError(
                    f"{where} is {dtype.label} {shape} but has {place.length} bytes, "
                    f"{n_bytes} are needed; the file is damaged"
                )
            self._places[tensor.name] = place
            key = (place.location, place.offset, dtype, shape) if n_bytes else tensor.name
            yield TensorEntry(tensor.name, dtype, shape, key)

    def _collect_nested(self) -> Iterator[TensorEntry]:
        for name, tensor in nested_tensors(self._model.graph):
            stored = stored_as(tensor)
            taken = name in self._places or name in self._nested
            if stored is None or taken or name_problem(name):
                if tensor.data_location == EXTERNAL:
                    raise FormatError(f"{self.description}: external tensor {name!r} has no name")
                continue  # stays where it is
            where = f"{self.description}: tensor {name!r}"
            entry = TensorEntry(name, *stored, key=name)
            if tensor.data_location == EXTERNAL:
                self._places[name] = self._external_place(tensor, entry.nbytes, where)
            else:
                self._nested[name] = typed_values(tensor, entry, self.description)
            clear_values(tensor)
            yield entry

    def _external_place(self, tensor: Any, n_bytes: int, where: str) -> Place:
        fields = {item.key: item.value for item in tensor.external_data}
        location = fields.get("location", "")
        if not isinstance(location, str):  # protobuf gives what is no UTF-8 as bytes
            raise FormatError(f"{where} has damaged external data: {fields!s:.200}")
        try:
            offset = int(fields.get("offset", "0"))
            length = int(fields.get("length", str(n_bytes)))
        except ValueError as exc:
            raise FormatError(f"{where} has damaged external data: {fields!s:.200}") from exc
        if not stays_inside(location) or offset < 0:
            raise FormatError(
                f"{where} names the external file {location!r:.80}, which is not inside the "
                "model's folder; it is refused"
            )
        if location not in self._external:
            target = self._path.parent / location
            try:
                inside, there = is_inside(target, self._path.parent), exists(target)
            except (OSError, ValueError) as exc:  # a name too long, a zero byte
                reason = getattr(exc, "strerror", None) or exc
                raise FormatError(
                    f"{where}: external file {location!r:.80} cannot be read: {reason}"
                ) from exc
            if not inside:
                raise FormatError(
                    f"{where}: external file {location!r} leads outside of the model's folder; "
                    "copy the folder with its links resolved (cp -rL)"
                )
            if not there:
                raise FormatError(f"{where} needs the file {target}, which does not exist")
            self._external[location] = RawFile(target)
        if offset + length > self._external[location].size:
            raise FormatError(f"{where}: external file {location!r} is truncated")
        return Place(location, offset, length)

    def _read(self, entry: TensorEntry) -> Array:
        if entry.name in self._nested:
            return self._nested[entry.name]
        place = self._places[entry.name]
        raw = self._external[place.location] if place.location else self._raw
        if not place.parse:
            return raw.array(place.offset, entry.dtype.numpy, entry.shape)
        message = raw.read_at(place.offset, place.length)
        tensor = parse(self._onnx.TensorProto, message, self.description)
        return typed_values(tensor, entry, self.description)


def looks_like(raw: RawFile) -> bool:
    """Return whether the file is a protobuf message with the fields of an ONNX model."""
    try:
        seen = {}
        for field in walk(raw, 0, raw.size):
            if _MODEL_FIELDS.get(field.number) != field.wire:
                return False
            seen[field.number] = field
    except FormatError:
        return False
    return MODEL_GRAPH in seen


def own_data(path: Path) -> list[Path]:
    """Return the files of external data that the model at ``path`` uses and that `write` named."""
    named = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    try:
        with OnnxSource(path) as source:
            return [path.parent / name for name in source._external if named.fullmatch(name)]
    except (PydedupError, OSError):  # what is there, if anything, is no model
        return []
