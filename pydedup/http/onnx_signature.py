# SPDX-License-Identifier: Apache-2.0
"""What a stored ONNX model takes and returns, as it declares it. It is run by ONNX Runtime."""

from __future__ import annotations

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


def onnx_signature(payload: bytes) -> Signature:
    """Return what a model without its weights declares.

    Raises UnsupportedFormatError where what runs it is not installed, FormatError when the model
    does not parse.
    """
    from pydedup.serving.onnx_values import import_onnxruntime

    import_onnxruntime()
    import onnx

    graph = parse(onnx.ModelProto, payload, "the stored ONNX graph").graph
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
