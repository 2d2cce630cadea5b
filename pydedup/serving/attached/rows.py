# SPDX-License-Identifier: Apache-2.0
"""Look-ups of rows of a stored tensor, and bags of them, as torch's functions are given them.

A handler returns ``NotImplemented`` for what it cannot read: the tensor is then loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pydedup.errors import ArgumentError
from pydedup.formats.torch_tensors import to_torch
from pydedup.serving.attached.activations import made
from pydedup.serving.attached.functions import as_floats, as_numpy, as_result, streamed
from pydedup.serving.attached.parameter import StoredParameter, handles
from pydedup.serving.engine import from_front, until_last, without_padding
from pydedup.words import BagMode

__all__ = ["rows_of"]


def _in_memory(x: torch.Tensor, weight: StoredParameter) -> NDArray[Any]:
    return as_numpy(x.detach() if x.is_meta else x.detach().cpu(), weight)


def _ids(ids: torch.Tensor, weight: StoredParameter) -> NDArray[Any]:
    """Return ids, or raise ArgumentError for what torch refuses: no tensor, or another dtype."""
    if not isinstance(ids, torch.Tensor):
        raise ArgumentError(
            f"the ids of {weight.label} are a {type(ids).__name__}; a tensor of int32 or int64 is "
            "needed"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"the ids of {weight.label} are {ids.dtype}; int32 or int64 is needed")
    return _in_memory(ids, weight)


@handles(functional.embedding)
def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    rows = rows_of(weight, input)
    if rows is NotImplemented or max_norm is None:
        return rows
    norms = rows.norm(norm_type, dim=-1, keepdim=True)
    return torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)


def rows_of(weight: torch.Tensor, ids: torch.Tensor, *, from_end: bool = False) -> Any:
    """Return the entries of the first axis with these numbers, or ``NotImplemented``.

    With ``from_end``, negative ones count from the end.
    """
    if type(weight) is not StoredParameter or weight.transposed or type(ids) is StoredParameter:
        return NotImplemented
    stored = weight.stored()
    if len(stored.shape) < 2 or (weight.entries and weight.ndim != 2):
        return NotImplemented
    taken = _ids(ids, weight)
    if from_end:
        taken = from_front(taken, weight.shape[0])
    if weight.rows is not None or weight.entries:
        if taken.size and not 0 <= taken.min() <= taken.max() < weight.shape[0]:
            raise ArgumentError(
                f"ids from {taken.min()} to {taken.max()} for {weight.shape[0]} rows of "
                f"{weight.label}"
            )
        first, _ = weight.rows or (0, 0)
        if weight.entries:
            stored, first = weight.attachment.weights().part(weight.number, weight.lines())
        taken = taken + first
    return made(to_torch(stored.take(taken))).to(weight.slot.dtype)


@handles(functional.embedding_bag)
def _embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: BagMode = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if type(weight) is not StoredParameter or type(input) is StoredParameter:
        return NotImplemented
    if weight.transposed or weight.rows is not None or weight.entries:
        return NotImplemented
    if max_norm is not None:  # torch shrinks the rows of its own table
        used, places = np.unique(_ids(input, weight), return_inverse=True)
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        at = np.flatnonzero(used == padding)
        return functional.embedding_bag(
            torch.from_numpy(places.reshape(input.shape)).to(input.dtype),
            _embedding(torch.from_numpy(used), weight, None, max_norm, norm_type),
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=int(at[0]) if at.size else None,
        )
    stored = streamed(weight, input)
    if stored is None:
        return NotImplemented
    ids = _ids(input, weight)
    starts = None if offsets is None else _in_memory(offsets, weight)
    factors = None if per_sample_weights is None else as_floats(per_sample_weights, weight)
    if starts is not None and include_last_offset:
        ids, starts = until_last(ids, starts)
        factors = None if factors is None else factors[: len(ids)]
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise ArgumentError(
                f"padding_idx {padding_idx} is none of the {weight.shape[0]} rows of {weight.label}"
            )
        padding = padding_idx % weight.shape[0]
        ids, starts, factors = without_padding(ids, starts, padding, factors)
    bags = stored.bag(ids, starts, mode, weights=factors)
    return as_result(bags, weight.slot.dtype)
