# SPDX-License-Identifier: Apache-2.0
"""Checks of what callers give: each returns the plain value, or says what was wrong, by name.

Deliberately not here: strides and sizes of arrays, which the native core checks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pydedup.errors import ArgumentError
from pydedup.types import DType

_FLOATS = (DType.F32, DType.F64, DType.F16, DType.BF16)


def blocks_of(array: NDArray[Any], name: str) -> tuple[NDArray[Any], tuple[int, int]]:
    """Return (n, ...) as (n, rows, cols) or (n, cols), and the shape of a block."""
    if array.ndim == 0:
        raise ArgumentError(f"{name} is a scalar; give blocks along the first axis")
    if math.prod(array.shape[1:]) == 0:
        raise ArgumentError(f"{name} has shape {array.shape}: blocks without elements")
    if array.ndim == 3:
        return array, (array.shape[1], array.shape[2])
    if array.ndim > 3 and not array.flags.c_contiguous:
        raise ArgumentError(f"{name} has {array.ndim} axes and must then be C-contiguous")
    flat = array if array.ndim == 2 else array.reshape(len(array), math.prod(array.shape[1:]))
    return flat, (1, flat.shape[1])


def known_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return what numpy makes of a dtype that must be given."""
    if dtype is None:  # to numpy that is float64
        raise ArgumentError("dtype must be given: the one that all blocks have")
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(f"dtype must be one that numpy knows, not {dtype!r}") from error


def as_float(dtype: np.dtype[Any], name: str) -> DType:
    """Return a dtype of numpy as one of those that have distances."""
    for member in _FLOATS:
        if member.numpy == dtype:
            return member
    known = ", ".join(member.label for member in _FLOATS)
    raise ArgumentError(f"{name}: similarity takes {known} in native byte order, not dtype {dtype}")


def as_number(value: object, name: str) -> float:
    """Return a number that must be 0 or more."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} must be a number, not {value!r}") from error
    if math.isnan(number) or number < 0:
        raise ArgumentError(f"{name} must be 0 or more, not {value!r}")
    return number
