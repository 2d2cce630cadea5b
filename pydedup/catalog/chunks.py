# SPDX-License-Identifier: Apache-2.0
"""How an artifact that is kept in blocks lies in these: in chunks, one a row, filled up with zeros.

The row of the artifact has the lengths of its chunks, where others have the payload
(docs/format.md, "Tables").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["chunk_lengths", "joined_chunks", "laid_out"]


def laid_out(content: NDArray[np.uint8], lengths: Sequence[int], width: int) -> NDArray[np.uint8]:
    """Return chunks of these lengths as a matrix of such rows, uint8 (len(lengths), width)."""
    matrix = np.zeros((len(lengths), width), np.uint8)
    start = 0
    for row, length in zip(matrix, lengths, strict=True):
        row[:length] = content[start : start + length]
        start += length
    return matrix


def chunk_lengths(lengths: Sequence[int]) -> bytes:
    """Return the lengths of chunks as they are recorded."""
    return json.dumps(lengths).encode()


def joined_chunks(recorded: bytes, matrix: NDArray[Any]) -> bytes | None:
    """Return what was laid out, given the lengths as recorded; ``None`` where these are damaged."""
    try:
        lengths = [int(length) for length in json.loads(recorded)]
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    rows, width = matrix.shape
    if len(lengths) != rows or not all(0 <= length <= width for length in lengths):
        return None
    return b"".join(row[:length].tobytes() for row, length in zip(matrix, lengths, strict=True))
