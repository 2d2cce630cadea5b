# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime, where it is installed, and arrays as it takes and gives them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup.arguments import as_dtype
from pydedup.errors import ArgumentError, UnsupportedFormatError, not_installed
from pydedup.serving.predict import as_input
from pydedup.types import DType

__all__ = ["as_output", "as_runtime_input", "as_value", "import_onnxruntime", "is_installed"]

#: ONNX's number of the only type of inputs that numpy lacks.
_BF16 = 16
#: Types of ONNX as sessions name them -> ours.
_TYPES = {
    "tensor(float)": DType.F32,
    "tensor(double)": DType.F64,
    "tensor(float16)": DType.F16,
    "tensor(bfloat16)": DType.BF16,
    "tensor(bool)": DType.BOOL,
    **{
        f"tensor({sign}int{bits})": DType.of_label(f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def is_installed() -> bool:
    """Return whether the packages are there that run such models; loads none of them."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def import_onnxruntime() -> Any:
    """Return ONNX Runtime. Raises UnsupportedFormatError where it or onnx cannot be imported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed("this ONNX model", exc, "onnx")) from exc
    return onnxruntime


def as_value(array: NDArray[Any], kind: int) -> Any:
    """Return an array as the runtime takes it; the memory stays the array's."""
    ort = import_onnxruntime()
    if array.dtype.kind in "biuf":
        return ort.OrtValue.ortvalue_from_numpy(array)
    plain = array.view(np.dtype(f"u{array.dtype.itemsize}"))  # bf16 and f8 have no numpy type
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, kind)


def as_runtime_input(x: ArrayLike, kind: Any) -> Any:
    """Return an input in the type that the model wants. Raises ArgumentError."""
    array = as_input(x, f"input {kind.name!r}")
    wanted = _TYPES.get(kind.type)
    if wanted is None:
        raise ArgumentError(f"input {kind.name!r} is a {kind.type}, which is not supported")
    both_whole = wanted.numpy.kind in "iu" and array.dtype.kind in "iu"
    if not (both_whole or wanted.is_float or wanted.numpy == array.dtype):
        raise ArgumentError(f"input {kind.name!r} must be {wanted.label}, not {array.dtype}")
    if array.dtype.kind not in "biuf":
        try:
            DType.of(array.dtype)
        except ArgumentError:
            raise ArgumentError(
                f"input {kind.name!r} must hold numbers, not {array.dtype}"
            ) from None
    if both_whole and array.size:
        limits = np.iinfo(wanted.numpy)
        for number in (int(array.min()), int(array.max())):
            if not limits.min <= number <= limits.max:
                raise ArgumentError(
                    f"input {kind.name!r} must be {wanted.label}, from {limits.min} to "
                    f"{limits.max}; it has {number}"
                )
    return as_value(as_dtype(array, wanted.numpy), _BF16)


def as_output(value: Any, what: str) -> NDArray[Any]:
    """Return an output as an array. Raises UnsupportedFormatError."""
    kind: str = value.data_type()
    if kind != "tensor(string)" and (kind not in _TYPES or _TYPES[kind] is DType.BF16):
        advice = "; convert its classifier with options={'zipmap': False}" if "map(" in kind else ""
        raise UnsupportedFormatError(f"{what} as {kind}, which is not supported{advice}")
    array: NDArray[Any] = value.numpy()
    return array
