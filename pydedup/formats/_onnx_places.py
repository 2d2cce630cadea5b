# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of an ONNX model's initialisers lie in its file, without parsing it whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydedup.errors import FormatError
from pydedup.formats._files import RawFile
from pydedup.formats._onnx_tensors import DTYPES, PACKED
from pydedup.formats._protobuf import BYTES, VARINT, Field, tag, varint, walk

__all__ = ["GRAPH_INITIALIZER", "MODEL_GRAPH", "RAW_DATA", "Place", "strip"]

# Field numbers of onnx.proto (stable by protobuf's rules).
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA = 9, 4, 10
_TYPED_DATA = {_FLOAT_DATA, 5, 7, _DOUBLE_DATA, 11}
_TENSOR_DATA_TYPE = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are. ``parse`` marks a whole TensorProto to be parsed."""

    location: str
    offset: int
    length: int
    parse: bool = False


def strip(raw: RawFile) -> tuple[bytes, list[Place]]:
    """Return the model without the data of its storable initialisers, and where that data is."""
    pieces: list[bytes] = []
    places: list[Place] = []
    graphs = 0
    for field in walk(raw, 0, raw.size):
        if field.number == MODEL_GRAPH and field.wire == BYTES:
            graphs += 1
            graph = b"".join(_strip_graph(raw, field, places))
            pieces += [tag(MODEL_GRAPH), varint(len(graph)), graph]
        else:
            pieces.append(raw.read_at(field.begin, field.end - field.begin))
    if graphs != 1:
        raise FormatError(f"{raw.path} has {graphs} graphs; an ONNX model has one")
    return b"".join(pieces), places


def _strip_graph(raw: RawFile, graph: Field, places: list[Place]) -> Iterator[bytes]:
    for field in walk(raw, graph.value, graph.end):
        if field.number == GRAPH_INITIALIZER and field.wire == BYTES:
            stripped, place = _strip_initializer(raw, field)
            places.append(place)
            yield tag(GRAPH_INITIALIZER) + varint(len(stripped)) + stripped
        else:
            yield raw.read_at(field.begin, field.end - field.begin)


def _strip_initializer(raw: RawFile, tensor: Field) -> tuple[bytes, Place]:
    fields = list(walk(raw, tensor.value, tensor.end))
    whole = Place("", tensor.value, tensor.length, parse=True)
    data_type = 0
    for field in fields:
        if field.number == _TENSOR_DATA_TYPE and field.wire == VARINT:
            coded = raw.read_at(field.value, field.end - field.value)
            data_type = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(coded))
    if data_type not in DTYPES and data_type not in PACKED:
        return raw.read_at(tensor.value, tensor.length), whole
    data = [field for field in fields if field.number in _TYPED_DATA | {RAW_DATA}]
    rest = b"".join(
        raw.read_at(field.begin, field.end - field.begin) for field in fields if field not in data
    )
    if not data:
        return rest, Place("", tensor.value, 0)
    plain = {RAW_DATA: True, _FLOAT_DATA: data_type == 1, _DOUBLE_DATA: data_type == 11}
    if len(data) == 1 and data[0].wire == BYTES and plain.get(data[0].number, False):
        # Packed float32 and float64 are coded exactly as raw data.
        return rest, Place("", data[0].value, data[0].length)
    return rest, whole
