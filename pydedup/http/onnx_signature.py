# SPDX-License-Identifier: Apache-2.0
"""What a stored ONNX model takes and returns, as it declares it. It is run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

from pydedup.errors import FormatError
from pydedup.serving.signature import Signature, TensorSpec

__all__ = ["onnx_signature"]

#: Numbers of ONNX's element types.
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}


def onnx_signature(payload: bytes) -> Signature:
    """Return what a model without its weights declares.

    Raises UnsupportedFormatError where what runs it is not installed, FormatError when the model
    does not parse.
    """
    from pydedup.serving.onnx_session import import_onnxruntime

    import_onnxruntime()
    import onnx

    try:
        graph = onnx.ModelProto.FromString(payload).graph
    except Exception as error:  # DecodeError lives in the protobuf package
        raise FormatError(f"the stored ONNX graph does not parse: {error}") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_spec(value) for value in graph.input if value.name not in weights)
    return Signature(inputs, tuple(_spec(value) for value in graph.output))


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    datatype = _DATATYPES.get(kind.elem_type, "FP32")
    if not kind.HasField("shape"):
        return TensorSpec(value.name, datatype, (-1,))
    # A size that is 0 is one that an exporter did not know.
    shape = tuple(dim.dim_value if dim.dim_value > 0 else -1 for dim in kind.shape.dim)
    return TensorSpec(value.name, datatype, shape)
