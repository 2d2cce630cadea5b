# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts, whose matrices are all one tensor.

Of a stack of matrices, whose blocks are those of one each, the experts that are asked are streamed.
Of small experts, and of what was stored before there were stacks, a block holds rows of several:
they are loaded where that is a small part of the pool; else some columns of all are read at a time,
once per product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from pydedup.formats.torch_tensors import to_torch
from pydedup.serving.attached.activations import made
from pydedup.serving.attached.functions import as_input
from pydedup.serving.attached.parameter import StoredParameter, are_loaded, handles

__all__: list[str] = []

#: Experts of a model that take more than this part of the pool, all together, are not loaded. No
#: stacks, those that are loaded are three times as fast (a token, two experts of eight, 2026-11).
_LOADED_PART = 2
#: What is read of them at a time takes this part of the budget, or the least that can be read.
_PIECE_PART = 16


# It is private, and called by the public one of later releases: a torch without it loads experts.
@handles(*filter(None, [getattr(torch, "_grouped_mm", None)]))
def _grouped_mm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Return the products of groups of rows, which end at ``offs``, with a matrix each."""
    if type(mat2) is not StoredParameter or type(input) is StoredParameter or mat2.rows is not None:
        return NotImplemented
    if offs is None or bias is not None or out_dtype not in (None, input.dtype):
        return NotImplemented
    ends = offs.tolist()
    fits = (
        (input.ndim, mat2.ndim, input.dtype) == (2, 3, mat2.dtype)
        and mat2.shape[:2] == (len(ends), input.shape[1])
        and [0, *ends, len(input)] == sorted([0, *ends, len(input)])
    )
    if not fits:  # torch says what does not
        return NotImplemented
    groups = [
        (number, slice(first, end))
        for number, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        if first < end
    ]
    x = as_input(input, mat2)
    if mat2.stored().is_stack:
        y = x.new_zeros(len(x), mat2.shape[2])
        for number, rows in groups:
            y[rows] = x[rows] @ mat2.entry(number)
        return y
    if _is_loaded(mat2):
        return NotImplemented
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    x = x.to(dtype)
    y = x.new_zeros(len(x), mat2.shape[2])
    for lines, part in _pieces(mat2) if groups else ():
        for number, rows in groups:
            matrix = part[number].to(dtype)
            if mat2.transposed:
                y[rows, lines] = x[rows] @ matrix.t()
            else:
                y[rows] += x[rows, lines] @ matrix
        del part, matrix  # before the next one is read
    return y.to(input.dtype)


def _is_loaded(weight: StoredParameter) -> bool:
    """Load it if the experts take a small part of the budget, and return whether it is."""
    slots = weight.attachment.slots
    nbytes = sum(slot.nbytes for slot in slots if len(slot.shape) == len(weight.slot.shape))
    return are_loaded([weight], nbytes, _LOADED_PART)


def _pieces(weight: StoredParameter) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield lines of all matrices, as they are stored, and which these are."""
    count, height, width = weight.slot.shape
    stored = weight.stored()
    columns = stored.block_shape[1]
    # As many as make whole blocks, so that none is read twice.
    unit = columns // math.gcd(columns, width)
    most = weight.attachment.memory_bytes // _PIECE_PART
    step = max(most // (count * width * stored.dtype.itemsize * unit), 1) * unit
    for first in range(0, height, step):
        stop = min(first + step, height)
        part = made(to_torch(stored.columns(first * width, stop * width)))
        yield slice(first, stop), part.view(count, stop - first, width)
        del part
