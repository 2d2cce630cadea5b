# SPDX-License-Identifier: Apache-2.0
"""Tensors of a parsed ONNX model: their values, and those that are not initialisers of the graph.

Exporters also keep weights in ``Constant`` nodes and in the graphs of ``If`` and ``Loop`` nodes.
Protobuf has them in memory anyway when the model is parsed; they are taken out all the same, so
that they are deduplicated like any other tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pydedup.errors import FormatError, UnsupportedFormatError, not_installed
from pydedup.formats.base import Array, TensorEntry
from pydedup.types import DType

__all__ = [
    "DTYPES",
    "EXTERNAL",
    "PACKED",
    "all_nodes",
    "clear_values",
    "graphs_in",
    "has_values",
    "import_onnx",
    "is_constant_weight",
    "nested_tensors",
    "parse",
    "refuse_external",
    "stored_as",
    "typed_values",
]

#: TensorProto.DataType -> element type.
DTYPES = {
    1: DType.F32,
    2: DType.U8,
    3: DType.I8,
    4: DType.U16,
    5: DType.I16,
    6: DType.I32,
    7: DType.I64,
    9: DType.BOOL,
    10: DType.F16,
    11: DType.F64,
    12: DType.U32,
    13: DType.U64,
    16: DType.BF16,
    17: DType.F8_E4M3,
    19: DType.F8_E5M2,
}
#: TensorProto.DataType of what no store has -> bits of a value. Its bytes are kept as they are.
PACKED = {
    18: 8,  # FLOAT8E4M3FNUZ
    20: 8,  # FLOAT8E5M2FNUZ
    21: 4,  # UINT4
    22: 4,  # INT4
    23: 4,  # FLOAT4E2M1
    24: 8,  # FLOAT8E8M0
    25: 2,  # UINT2
    26: 2,  # INT2
}
#: TensorProto.DataLocation.
EXTERNAL = 1

#: AttributeProto.AttributeType.
_GRAPH, _GRAPHS = 5, 10
_VALUE_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
#: Smaller ones inside nodes and subgraphs are shapes, axes and scalars, which belong to the graph.
_NESTED_FROM = 1024


def import_onnx() -> Any:
    """Return the package. Raises UnsupportedFormatError where it is not installed."""
    try:
        import onnx
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed("an ONNX file", exc, "onnx")) from exc
    return onnx


def stored_as(tensor: Any) -> tuple[DType, tuple[int, ...]] | None:
    """Return the element type and shape in which a store keeps a TensorProto, None for texts.

    Values that are packed are bytes: rows of them where each row of the tensor begins with a byte.
    """
    shape = tuple(tensor.dims)
    if tensor.data_type not in PACKED:
        dtype = DTYPES.get(tensor.data_type)
        return None if dtype is None else (dtype, shape)
    in_a_byte = 8 // PACKED[tensor.data_type]
    if shape and shape[-1] % in_a_byte == 0:
        return DType.U8, (*shape[:-1], shape[-1] // in_a_byte)
    return DType.U8, (-(-math.prod(shape) // in_a_byte),)


def parse(kind: Any, data: bytes, where: str) -> Any:
    """Return a message of that kind. Raises FormatError."""
    try:
        return kind.FromString(data)
    except Exception as exc:  # DecodeError lives in the protobuf package, which onnx brings
        raise FormatError(f"{where} is no ONNX model: {exc}") from exc


def refuse_external(message: Any, where: str) -> None:
    """Refuse a message in which a tensor, wherever it is, has its values in another file.

    A runtime would open what it names, in the folder in which the process happens to be, and
    predictions would tell what is there. Raises FormatError.
    """
    for field, found in message.ListFields():
        if field.message_type is None:
            continue
        for inner in (found,) if hasattr(found, "ListFields") else found:
            if field.message_type.name == "TensorProto" and (
                inner.external_data or inner.data_location == EXTERNAL
            ):
                places = {item.key: item.value for item in inner.external_data}
                raise FormatError(
                    f"{where} has the values of {inner.name!r} in the file "
                    f"{places.get('location', '')!r:.80}, which pydedup reads for weights of types "
                    "that it stores alone, and not in functions; write a model with all inside of "
                    "it: onnx.save(onnx.load(path), another)"
                )
            refuse_external(inner, where)


def nested_tensors(graph: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, TensorProto) of weights in nodes and subgraphs, always in the same order.

    A constant is named by the value it makes; what is inside the graph of a node has the node's
    output and attribute before its name.
    """
    if prefix:
        for tensor in graph.initializer:
            if _is_weight(tensor, top=False):
                yield prefix + tensor.name, tensor
    for node in graph.node:
        name = node.output[0] if node.output else node.name
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                if _is_weight(attribute.t, top=not prefix):
                    yield prefix + name, attribute.t
            elif attribute.type == _GRAPH:
                yield from nested_tensors(attribute.g, f"{prefix}{name}/{attribute.name}/")
            elif attribute.type == _GRAPHS:
                for index, inner in enumerate(attribute.graphs):
                    path = f"{prefix}{name}/{attribute.name}/{index}/"
                    yield from nested_tensors(inner, path)


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph or function, those within others, too."""
    for node in graph.node:
        yield node
        for inner in graphs_in(node):
            yield from all_nodes(inner)


def graphs_in(node: Any) -> Iterator[Any]:
    """Yield the graphs in a node, as If and Loop have; empty ones among them."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def is_constant_weight(tensor: Any) -> bool:
    """Return whether a tensor in a ``Constant`` of the main graph counts as a weight."""
    return _is_weight(tensor, top=True)


def has_values(tensor: Any) -> bool:
    """Return whether a TensorProto holds its own values."""
    return any(getattr(tensor, name) for name in _VALUE_FIELDS)


def clear_values(tensor: Any) -> None:
    """Remove the values of a TensorProto, and where they are."""
    for name in (*_VALUE_FIELDS, "external_data", "data_location"):
        tensor.ClearField(name)


def typed_values(tensor: Any, entry: TensorEntry, where: str) -> Array:
    """Return the values of a TensorProto, however they are coded.

    Raises
    ------
    FormatError
        When there are not as many as the shape says, or they overflow the element type.
    """
    wrong = f"{where}: tensor {entry.name!r}"
    if tensor.raw_data:
        if len(tensor.raw_data) != entry.nbytes:
            raise FormatError(f"{wrong} has {len(tensor.raw_data)} bytes, not {entry.nbytes}")
        values = np.frombuffer(tensor.raw_data, entry.dtype.numpy)
    elif entry.dtype in (DType.F16, DType.BF16):  # bit patterns
        values = _integers(tensor.int32_data, np.uint16, wrong).view(entry.dtype.numpy)
    elif entry.dtype in (DType.F8_E4M3, DType.F8_E5M2):
        values = _integers(tensor.int32_data, np.uint8, wrong).view(entry.dtype.numpy)
    else:
        source = {
            DType.F32: "float_data",
            DType.F64: "double_data",
            DType.I64: "int64_data",
            DType.U32: "uint64_data",
            DType.U64: "uint64_data",
        }.get(entry.dtype, "int32_data")
        values = _integers(getattr(tensor, source), entry.dtype.numpy, wrong)
    needed = math.prod(entry.shape)
    if values.size != needed:
        raise FormatError(
            f"{wrong} has {values.size} values, its shape {entry.shape} needs {needed}"
        )
    return values.reshape(entry.shape)


def _integers(values: Any, dtype: Any, wrong: str) -> Array:
    try:
        return np.array(values, dtype)
    except OverflowError as exc:
        raise FormatError(f"{wrong} holds a value that its element type cannot") from exc


def _is_weight(tensor: Any, *, top: bool) -> bool:
    stored = stored_as(tensor)
    if stored is None or any(extent < 0 for extent in tensor.dims) or not math.prod(tensor.dims):
        return False
    dtype, shape = stored
    if tensor.data_location == EXTERNAL:
        return True
    # In the main graph also short vectors: a bias is what a layer's weight needs beside it.
    if top and dtype.is_float and tensor.dims:
        return True
    return math.prod(shape) * dtype.itemsize >= _NESTED_FROM
