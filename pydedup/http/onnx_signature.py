# SPDX-License-Identifier: Apache-2.0
"""What a stored ONNX model takes and returns, as it declares it. It is run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydedup.formats._onnx_tensors import DTYPES, parse
from pydedup.http.datatypes import NAMES, TEXT
from pydedup.serving.signature import Signature, TensorSpec

__all__ = ["onnx_signature"]

#: By the numbers of ONNX's element types; models take no others but texts, which are number 8.
_DATATYPES = {
    8: TEXT,
    **{kind: NAMES[dtype.numpy] for kind, dtype in DTYPES.items() if dtype.numpy in NAMES},
}


def onnx_signature(payload: bytes, address: str) -> Signature:
    """Return what a model without its weights declares.

    Raises UnsupportedFormatError where what runs it is not installed, or it declares what cannot be
    given or taken; FormatError when the model does not parse.
    """
    from pydedup.formats.onnx_inputs import text_step
    from pydedup.serving.onnx_values import check_kinds, check_outputs, import_onnxruntime

    import_onnxruntime()
    import onnx

    graph = parse(onnx.ModelProto, payload, "the stored ONNX graph").graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    check_kinds(_kinds(inputs), address, lambda texts: text_step(payload, texts))
    check_outputs(_kinds(graph.output), address)
    return Signature(tuple(map(_spec, inputs)), tuple(map(_spec, graph.output)))


def _kinds(values: Iterable[Any]) -> dict[str, str]:
    """Return the types of values as sessions name them; who infers one that is left out, tells."""
    return {value.name: _kind(value.type) for value in values}


def _kind(kind: Any) -> str:
    import onnx

    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        number = getattr(kind, which).elem_type or onnx.TensorProto.FLOAT
        found = onnx.TensorProto.DataType.Name(number).lower()
        return f"{which.removesuffix('_type')}({found})"
    if which == "sequence_type":
        return f"seq({_kind(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({_kind(kind.optional_type.elem_type)})"
    if which == "map_type":
        key = onnx.TensorProto.DataType.Name(kind.map_type.key_type).lower()
        return f"map({key},{_kind(kind.map_type.value_type)})"
    return "tensor(float)"


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    datatype = _DATATYPES.get(kind.elem_type, "FP32")
    if not kind.HasField("shape"):
        return TensorSpec(value.name, datatype, (-1,))
    # A size that is 0 is one that an exporter did not know.
    shape = tuple(dim.dim_value if dim.dim_value > 0 else -1 for dim in kind.shape.dim)
    return TensorSpec(value.name, datatype, shape)
