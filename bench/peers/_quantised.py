# SPDX-License-Identifier: Apache-2.0
"""Weights as they are quantised for deployment: the rules of the usual tools, in numpy.

Matrices are quantised, with their scales beside them; vectors stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTISED"]

_Weights = dict[str, NDArray[Any]]
#: Weights that share a scale, of 4 bits.
_GROUP = 32


def _int8(weight: NDArray[np.float32]) -> _Weights:
    """Return int8 with a scale for each row, as dynamic quantisation by channels does it."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return {"": np.rint(weight / scale).astype(np.int8), ".scale": scale[:, 0]}


def _fp8(weight: NDArray[np.float32]) -> _Weights:
    """Return f8_e4m3 with one scale."""
    scale = np.abs(weight).max() / np.float32(448)
    return {"": (weight / scale).astype(ml_dtypes.float8_e4m3fn), ".scale": np.array([scale])}


def _int4(weight: NDArray[np.float32]) -> _Weights:
    """Return 4 bits, two of them in a byte, with a scale for each group of a row."""
    groups = weight.reshape(len(weight), -1, _GROUP)
    scale = (np.abs(groups).max(axis=2, keepdims=True) / 7).astype(np.float16)
    scale[scale == 0] = 1
    whole = np.clip(np.rint(groups / scale.astype(np.float32)), -8, 7).astype(np.int8) + 8
    pairs = whole.astype(np.uint8).reshape(len(weight), -1, 2)
    return {"": pairs[..., 0] | pairs[..., 1] << 4, ".scale": scale[..., 0]}


def _quantised(
    weights: Mapping[str, NDArray[Any]], how: Callable[[NDArray[np.float32]], _Weights]
) -> _Weights:
    made: _Weights = {}
    for name, array in weights.items():
        if array.dtype == np.float32 and array.ndim == 2 and array.shape[1] % _GROUP == 0:
            made |= {name + ending: part for ending, part in how(array).items()}
        else:
            made[name] = array
    return made


#: Kind -> what quantises all matrices of a model so.
QUANTISED: Mapping[str, Callable[[Mapping[str, NDArray[Any]]], _Weights]] = {
    "int8": lambda weights: _quantised(weights, _int8),
    "f8_e4m3": lambda weights: _quantised(weights, _fp8),
    "4 bit": lambda weights: _quantised(weights, _int4),
}
