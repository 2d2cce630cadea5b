# SPDX-License-Identifier: Apache-2.0
"""ONNX models: initialisers and other weights are the tensors, the rest is an artifact.

Reading walks the protobuf wire format to find where the initialisers' bytes lie in the file (or
in files of external data) and parses only what remains, so that memory holds the graph and one
tensor. What protobuf makes impossible to read in parts stays whole: a tensor whose values are
coded as variable-length integers is parsed when it is read, weights inside nodes and subgraphs
are in memory while the source is open, and element types that a store does not keep (strings,
4-bit) remain in the artifact.

Writing streams too: everything except the tensors is known, hence every length. A model beyond
protobuf's 2 GiB gets its tensors in a file of external data beside it.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydedup.errors import ArgumentError, FormatError, PydedupError, UnsupportedFormatError
from pydedup.formats._files import RawFile, write_array
from pydedup.formats._onnx_tensors import (
    DTYPES,
    EXTERNAL,
    clear_values,
    has_values,
    nested_tensors,
    typed_values,
)
from pydedup.formats._paths import is_inside
from pydedup.formats._protobuf import BYTES, VARINT, Field, tag, varint, walk
from pydedup.formats.base import (
    DERIVED,
    Array,
    Artifact,
    LazyTensors,
    SourceBase,
    TensorEntry,
    count,
    fetch_tensor,
    find_artifact,
    name_problem,
)
from pydedup.formats.infer_onnx import infer_from_onnx
from pydedup.graph import Graph

__all__ = ["GRAPH", "OnnxSource", "looks_like", "own_data", "write"]

#: The artifact with the model without its initialisers' data.
GRAPH = DERIVED + "onnx-graph"

# Field numbers of onnx.proto (stable by protobuf's rules).
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA = 9, 4, 10
_TYPED_DATA = {_FLOAT_DATA, 5, 7, _DOUBLE_DATA, 11}
_TENSOR_DATA_TYPE, _TENSOR_STRINGS = 2, 6
#: Field number -> wire type of ModelProto, by which a file is recognised.
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}

#: protobuf messages end here; tests lower it.
_MAX_MESSAGE = (1 << 31) - 1
_EXTERNAL_ALIGNMENT = 4096
#: Smaller tensors stay inside the model: runtimes want shapes and axes there.
_EXTERNAL_FROM = 1024
#: Constants up to this size are looked at when the layers are inferred.
_CONSTANT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes are. ``parse`` marks a whole TensorProto to be parsed."""

    location: str
    offset: int
    length: int
    parse: bool = False


class OnnxSource(SourceBase):
    """Reader of an ``.onnx`` file and its external data. Safe between threads."""

    format = "onnx"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._onnx = _import_onnx()
        self._path = path
        self._raw = RawFile(path)
        self._external: dict[str, RawFile] = {}
        self._places: dict[str, _Place] = {}
        self._nested: dict[str, Array] = {}
        self._graph: Graph | None = None
        self._inferred = False
        try:
            stripped, places = _strip(self._raw)
            self._model = _parse(self._onnx.ModelProto, stripped, self.description)
            initializers = list(self._collect(places))
            self._set_entries([*initializers, *self._collect_nested()])
        except BaseException:
            self.close()
            raise

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

    def _collect(self, places: Sequence[_Place]) -> Iterator[TensorEntry]:
        for tensor, place in zip(self._model.graph.initializer, places, strict=True):
            dtype = DTYPES.get(tensor.data_type)
            if dtype is None:
                continue  # its data is still in the artifact
            shape = tuple(tensor.dims)
            where = f"{self.description}: initialiser {tensor.name!r}"
            if any(extent < 0 for extent in shape):
                raise FormatError(f"{where} has the impossible shape {shape}")
            n_bytes = count(shape) * dtype.itemsize
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
            if name in self._places or name in self._nested or name_problem(name):
                if tensor.data_location == EXTERNAL:
                    raise FormatError(f"{self.description}: external tensor {name!r} has no name")
                continue  # stays where it is
            dtype, shape = DTYPES[tensor.data_type], tuple(tensor.dims)
            where = f"{self.description}: tensor {name!r}"
            entry = TensorEntry(name, dtype, shape, key=name)
            if tensor.data_location == EXTERNAL:
                self._places[name] = self._external_place(tensor, entry.nbytes, where)
            else:
                self._nested[name] = typed_values(tensor, entry, self.description)
            clear_values(tensor)
            yield entry

    def _external_place(self, tensor: Any, n_bytes: int, where: str) -> _Place:
        fields = {item.key: item.value for item in tensor.external_data}
        location = fields.get("location", "")
        try:
            offset = int(fields.get("offset", "0"))
            length = int(fields.get("length", str(n_bytes)))
        except ValueError as exc:
            raise FormatError(f"{where} has damaged external data: {fields}") from exc
        pure = PurePosixPath(location)
        if not location or pure.is_absolute() or ".." in pure.parts or offset < 0:
            raise FormatError(
                f"{where} names the external file {location!r:.80}, which is not inside the "
                "model's folder; it is refused"
            )
        if location not in self._external:
            target = self._path.parent / location
            try:
                inside, exists = is_inside(target, self._path.parent), target.exists()
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
            if not exists:
                raise FormatError(f"{where} needs the file {target}, which does not exist")
            self._external[location] = RawFile(target)
        if offset + length > self._external[location].size:
            raise FormatError(f"{where}: external file {location!r} is truncated")
        return _Place(location, offset, length)

    def _read(self, entry: TensorEntry) -> Array:
        if entry.name in self._nested:
            return self._nested[entry.name]
        place = self._places[entry.name]
        raw = self._external[place.location] if place.location else self._raw
        if not place.parse:
            return raw.array(place.offset, entry.dtype.numpy, entry.shape)
        message = raw.read_at(place.offset, place.length)
        tensor = _parse(self._onnx.TensorProto, message, self.description)
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
    return _MODEL_GRAPH in seen


def write(
    path: Path,
    tensors: LazyTensors,
    entries: Sequence[TensorEntry],
    artifacts: Sequence[Artifact],
    *,
    final_path: Path,
) -> None:
    """Write the model with its tensors put back, streaming.

    ``path`` is where to write, ``final_path`` what it will be called: a file of external data,
    when one is needed, is named after that and written beside it first.
    """
    onnx = _import_onnx()
    payload = find_artifact(artifacts, GRAPH)
    if payload is None:
        raise UnsupportedFormatError(
            "an ONNX file needs the graph, which is kept for models that were added from ONNX; "
            "export to safetensors"
        )
    model = _parse(onnx.ModelProto, payload, "the stored ONNX graph")
    by_name = {entry.name: entry for entry in entries}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in by_name]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in by_name]
    nested = {name: t for name, t in nested_tensors(model.graph) if not has_values(t)}
    _check_complete({**{t.name: t for t in initializers}, **nested}, kept, by_name)
    for name, tensor in nested.items():
        tensor.raw_data = fetch_tensor(tensors, by_name[name]).tobytes()
    sizes = {tensor.name: by_name[tensor.name].nbytes for tensor in initializers}
    data_path: Path | None = None
    try:
        if model.ByteSize() + sum(sizes.values()) + 32 * len(sizes) > _MAX_MESSAGE:
            data_path = _external_path(final_path)
            large = [tensor for tensor in initializers if sizes[tensor.name] >= _EXTERNAL_FROM]
            _write_external(data_path, tensors, by_name, large)
            sizes = {name: size for name, size in sizes.items() if size < _EXTERNAL_FROM}
        _write_model(path, tensors, by_name, model, kept, initializers, sizes)
    except BaseException:
        if data_path is not None:
            data_path.unlink(missing_ok=True)
        raise


def _write_model(
    path: Path,
    tensors: LazyTensors,
    by_name: dict[str, TensorEntry],
    model: Any,
    kept: Sequence[Any],
    initializers: Sequence[Any],
    sizes: dict[str, int],
) -> None:
    """Write the message; ``sizes`` names the tensors whose bytes go inside."""
    heads = {tensor.name: _initializer_head(tensor, sizes) for tensor in initializers}
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    bodies = [len(heads[name]) + sizes.get(name, 0) for name in heads]
    framed = [len(tag(_GRAPH_INITIALIZER, BYTES)) + len(varint(n)) + n for n in bodies]
    with path.open("wb") as file:
        file.write(model.SerializeToString())
        file.write(tag(_MODEL_GRAPH, BYTES) + varint(len(graph) + sum(framed)))
        file.write(graph)
        for (name, head), body in zip(heads.items(), bodies, strict=True):
            file.write(tag(_GRAPH_INITIALIZER, BYTES) + varint(body) + head)
            if name in sizes:
                write_array(file, fetch_tensor(tensors, by_name[name]))


def _initializer_head(tensor: Any, sizes: dict[str, int]) -> bytes:
    head: bytes = tensor.SerializeToString()
    if tensor.name in sizes:
        head += tag(_RAW_DATA, BYTES) + varint(sizes[tensor.name])
    return head


def _check_complete(
    wanted: dict[str, Any], kept: Sequence[Any], by_name: dict[str, TensorEntry]
) -> None:
    """Check that the tensors are exactly those that the graph wants."""
    for name, tensor in wanted.items():
        entry = by_name.get(name)
        if entry is None:
            continue
        if DTYPES.get(tensor.data_type) != entry.dtype or tuple(tensor.dims) != entry.shape:
            raise ArgumentError(
                f"tensor {entry.name!r} is {entry.dtype.label} {entry.shape}, which the stored "
                "ONNX graph does not expect; export without converting"
            )
    missing = [tensor.name for tensor in kept if tensor.data_type in DTYPES]
    wrong = sorted({*missing, *(set(wanted) ^ set(by_name))})
    if wrong:
        name = wrong[0]
        raise ArgumentError(f"tensors and the stored ONNX graph do not belong together: {name!r}")


def own_data(path: Path) -> list[Path]:
    """Return the files of external data that the model at ``path`` uses and that `write` named."""
    named = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    try:
        with OnnxSource(path) as source:
            return [path.parent / name for name in source._external if named.fullmatch(name)]
    except (PydedupError, OSError):  # what is there, if anything, is no model
        return []


def _external_path(final_path: Path) -> Path:
    path = final_path.with_name(final_path.name + ".data")
    if path.exists():
        # The model that is there now may use it until it is replaced.
        path = final_path.with_name(f"{final_path.name}.{secrets.token_hex(4)}.data")
    return path


def _write_external(
    path: Path, tensors: LazyTensors, by_name: dict[str, TensorEntry], large: Sequence[Any]
) -> None:
    with path.open("xb") as file:
        for tensor in large:
            _place_external(file, tensor, path.name, by_name[tensor.name].nbytes)
            write_array(file, fetch_tensor(tensors, by_name[tensor.name]))
        file.flush()
        os.fsync(file.fileno())


def _place_external(file: IO[bytes], tensor: Any, location: str, n_bytes: int) -> None:
    file.write(bytes(-file.tell() % _EXTERNAL_ALIGNMENT))
    tensor.data_location = EXTERNAL
    place = {"location": location, "offset": str(file.tell()), "length": str(n_bytes)}
    for key, value in place.items():
        item = tensor.external_data.add()
        item.key, item.value = key, value


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as exc:
        raise UnsupportedFormatError(
            "ONNX models need the package onnx, which is not installed; "
            "run: pip install 'pydedup[onnx]'"
        ) from exc
    return onnx


def _parse(kind: Any, data: bytes, where: str) -> Any:
    try:
        return kind.FromString(data)
    except Exception as exc:  # DecodeError lives in the protobuf package, which onnx brings
        raise FormatError(f"{where} is no ONNX model: {exc}") from exc


def _strip(raw: RawFile) -> tuple[bytes, list[_Place]]:
    """Return the model without the data of its storable initialisers, and where that data is."""
    pieces: list[bytes] = []
    places: list[_Place] = []
    graphs = 0
    for field in walk(raw, 0, raw.size):
        if field.number == _MODEL_GRAPH and field.wire == BYTES:
            graphs += 1
            graph = b"".join(_strip_graph(raw, field, places))
            pieces += [tag(_MODEL_GRAPH, BYTES), varint(len(graph)), graph]
        else:
            pieces.append(raw.read_at(field.begin, field.end - field.begin))
    if graphs != 1:
        raise FormatError(f"{raw.path} has {graphs} graphs; an ONNX model has one")
    return b"".join(pieces), places


def _strip_graph(raw: RawFile, graph: Field, places: list[_Place]) -> Iterator[bytes]:
    for field in walk(raw, graph.value, graph.end):
        if field.number == _GRAPH_INITIALIZER and field.wire == BYTES:
            stripped, place = _strip_initializer(raw, field)
            places.append(place)
            yield tag(_GRAPH_INITIALIZER, BYTES) + varint(len(stripped)) + stripped
        else:
            yield raw.read_at(field.begin, field.end - field.begin)


def _strip_initializer(raw: RawFile, tensor: Field) -> tuple[bytes, _Place]:
    fields = list(walk(raw, tensor.value, tensor.end))
    whole = _Place("", tensor.value, tensor.length, parse=True)
    data_type = 0
    for field in fields:
        if field.number == _TENSOR_DATA_TYPE and field.wire == VARINT:
            coded = raw.read_at(field.value, field.end - field.value)
            data_type = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(coded))
    if data_type not in DTYPES:
        return raw.read_at(tensor.value, tensor.length), whole
    data = [field for field in fields if field.number in _TYPED_DATA | {_RAW_DATA}]
    rest = b"".join(
        raw.read_at(field.begin, field.end - field.begin) for field in fields if field not in data
    )
    if not data:
        return rest, _Place("", tensor.value, 0)
    plain = {_RAW_DATA: True, _FLOAT_DATA: data_type == 1, _DOUBLE_DATA: data_type == 11}
    if len(data) == 1 and data[0].wire == BYTES and plain.get(data[0].number, False):
        # Packed float32 and float64 are coded exactly as raw data.
        return rest, _Place("", data[0].value, data[0].length)
    return rest, whole
