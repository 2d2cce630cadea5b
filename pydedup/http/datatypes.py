# SPDX-License-Identifier: Apache-2.0
"""The protocol's names of datatypes and numpy's."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["BINARY_ONLY", "DATATYPES", "NAMES", "TEXT", "answer_bytes", "binary_texts", "named"]

#: The datatype of texts, which models of ONNX Runtime may give, and none may take.
TEXT = "BYTES"

#: Datatype to dtype, little-endian as the binary form is; of numbers, which is what models take.
DATATYPES: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        **{f"INT{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
        **{f"UINT{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
        **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
#: What has no form in JSON.
BINARY_ONLY = frozenset({"BF16"})

#: The other way round.
NAMES = {dtype: name for name, dtype in DATATYPES.items()}


def named(array: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    """Return an array's datatype; an array of a dtype without one becomes float32."""
    if array.dtype.kind == "O":
        return TEXT, array
    name = NAMES.get(array.dtype)
    return ("FP32", array.astype(np.float32)) if name is None else (name, array)


def binary_texts(array: NDArray[Any]) -> bytes:
    """Return texts in binary form: each in UTF-8, behind its length in four bytes."""
    encoded = [str(text).encode() for text in array.reshape(-1)]
    return b"".join(part for text in encoded for part in (len(text).to_bytes(4, "little"), text))


def answer_bytes(array: NDArray[Any]) -> int:
    """Return how many bytes an output has in binary form."""
    return len(binary_texts(array)) if array.dtype.kind == "O" else array.nbytes
