# SPDX-License-Identifier: Apache-2.0
"""What callers give, as what the package computes with, or an ArgumentError that names it.

Here: arrays, integers, block shapes. Deliberately not here: names (`pydedup.names`), and what only
one function takes.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup.errors import ArgumentError, BudgetError, PydedupError

__all__ = [
    "as_array",
    "as_block_shape",
    "as_count",
    "as_dtype",
    "as_integers",
    "check_array",
    "no_memory",
]

_Integer = TypeVar("_Integer", bound=np.integer[Any])


def as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return values as an array. Raises ArgumentError when they make none, or some are masked."""
    if "numpy.ma" in sys.modules and np.ma.is_masked(values):  # it is large: not imported for this
        raise ArgumentError(f"{name} has masked elements, which are lost; fill them first")
    try:
        return np.asarray(values)
    except PydedupError:  # of a stored tensor, whose pages may be damaged
        raise
    except Exception as error:  # rows of different lengths, or whatever __array__ of others raises
        raise ArgumentError(f"{name} does not make an array: {error}") from error


def check_array(array: object, name: str) -> None:
    """Raise ArgumentError for what is no array of numpy, or has masked elements."""
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{name} must be a numpy array, not {type(array).__name__}")
    as_array(array, name)


def as_dtype(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return numbers in a dtype and C-contiguous; the same array if it is both already.

    What is beyond the dtype is infinite and NaN stays NaN; of neither does numpy warn.
    """
    with np.errstate(all="ignore"):
        return array.astype(dtype, order="C", copy=False)


def no_memory(what: str, shape: Sequence[int], dtype: np.dtype[Any]) -> BudgetError:
    """Return the error for an array that there is no memory for, in other words than numpy's.

    A view of one element may claim more than there ever will be; a copy of it has to have it.
    """
    return BudgetError(f"no memory for {what}: {dtype} of shape {tuple(shape)}")


def as_block_shape(shape: object, *, most: int = 2**63 - 1) -> tuple[int, int]:
    """Return a block shape that a caller gave as plain integers.

    Raises
    ------
    ArgumentError
        When it is not two integers from 1 to ``most``.
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ArgumentError(f"block_shape must be (rows, cols), not {shape!r}")
    name = f"each side of block_shape {shape!r}"
    rows, cols = (as_count(name, side, least=1, most=most) for side in shape)
    return rows, cols


def as_count(name: str, value: object, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return an integer that a caller gave as ``name``, such as threads, as a plain one.

    Raises
    ------
    ArgumentError
        When it is no integer from ``least`` to ``most``; neither True nor False is one.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ArgumentError(f"{name} must be an integer, not {value!r}") from error
    if isinstance(value, bool) or not least <= number <= most:
        raise ArgumentError(
            f"{name} must be an integer from {least} to {_as_power(most)}, not {value!r}"
        )
    return number


def _as_power(most: int) -> str:
    # As people read it.
    exponent = (most + 1).bit_length() - 1
    return f"2**{exponent} - 1" if most > 1 << 20 and most + 1 == 1 << exponent else f"{most:,}"


def as_integers(name: str, values: ArrayLike, dtype: type[_Integer]) -> NDArray[_Integer]:
    """Return integers that a caller gave as ``name``, such as ids: contiguous and aligned, 1-D.

    Raises
    ------
    ArgumentError
        When they are not integers in one dimension that fit the dtype, or some are masked.
    BudgetError
        When there is no memory for a copy.
    """
    array = as_array(values, name)
    if array.ndim != 1:
        raise ArgumentError(f"{name} must hold integers in one dimension, not {array.ndim}")
    if array.size == 0:
        return np.empty(0, dtype)
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"{name} must hold integers of {dtype.__name__}, not {array.dtype}")
    if not np.can_cast(array.dtype, dtype):
        least, most = int(array.min()), int(array.max())
        limits = np.iinfo(dtype)
        if least < limits.min or most > limits.max:
            raise ArgumentError(
                f"{name} must hold integers of {dtype.__name__}, not of {least} to {most}"
            )
    try:
        return np.require(array, dtype, ["C", "A"])
    except MemoryError as exc:
        raise no_memory(f"a copy of {name}", array.shape, np.dtype(dtype)) from exc
