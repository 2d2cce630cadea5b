# SPDX-License-Identifier: Apache-2.0
"""Views and conversions of stored tensors: rows, a transposed matrix, the same in another dtype.

What a product or a look-up can still stream stays a stored tensor; anything else is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pydedup.errors import ArgumentError
from pydedup.serving.attached.parameter import StoredParameter, handles
from pydedup.serving.attached.rows import rows_of

__all__: list[str] = []

_Tensor = torch.Tensor


# ---- views --------------------------------------------------------------------------------------


@handles(_Tensor.t, torch.t, _Tensor.T.__get__)  # type: ignore[attr-defined]
def _t(input: StoredParameter) -> Any:
    return _transpose(input, 0, 1) if input.ndim == 2 else NotImplemented


@handles(_Tensor.mT.__get__)  # type: ignore[attr-defined]
def _mt(input: StoredParameter) -> Any:
    return _transpose(input, -2, -1)


@handles(_Tensor.transpose, torch.transpose)
def _transpose(input: StoredParameter, dim0: int, dim1: int) -> Any:
    rank = input.ndim
    if rank not in (2, 3) or not all(-rank <= dim < rank for dim in (dim0, dim1)):
        return NotImplemented
    if {dim0 % rank, dim1 % rank} != {rank - 2, rank - 1}:
        return NotImplemented
    return input.with_transposed()


@handles(_Tensor.split, torch.split)
def _split(self: StoredParameter, split_size: Any, dim: int = 0) -> Any:
    if not _has_rows(self) or dim not in (0, -self.ndim):
        return NotImplemented
    total = self.shape[0]
    if not isinstance(split_size, int):
        sizes = list(split_size)
    elif split_size > 0:
        sizes = [min(split_size, total - at) for at in range(0, total, split_size)]
    else:
        return NotImplemented  # torch says what is wrong
    if sum(sizes) != total or min(sizes, default=-1) < 0:
        return NotImplemented
    ends = np.cumsum(sizes).tolist()
    return tuple(_part(self, end - size, end) for size, end in zip(sizes, ends, strict=True))


@handles(_Tensor.chunk, torch.chunk)
def _chunk(input: StoredParameter, chunks: int, dim: int = 0) -> Any:
    if input.ndim == 0 or chunks < 1:
        return NotImplemented
    return _split(input, max(1, -(-input.shape[0] // chunks)), dim)


@handles(_Tensor.__getitem__)
def _getitem(self: torch.Tensor, index: Any) -> Any:
    if type(self) is not StoredParameter:
        return NotImplemented
    if type(index) is slice and index.step in (None, 1) and _has_rows(self):
        start, stop, _ = index.indices(self.shape[0])
        if start < stop:
            return _part(self, start, stop)
    if type(index) is tuple and index and type(index[0]) is int and _has_entries(self):
        entry = self[index[0]]
        return entry[index[1:]] if len(index) > 1 else entry
    is_number = type(index) is torch.Tensor and index.dtype in (torch.int64, torch.int32)
    if is_number and index.ndim == 0 and _has_entries(self):
        index, is_number = int(index), False  # of torch, a view as well
    if type(index) is int and _has_entries(self):
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is no index of {self.label}, of shape {tuple(self.shape)}")
        return self.entry(index % len(self))
    if is_number and self.ndim > 1:
        return rows_of(self, index, from_end=True)
    return NotImplemented


@handles(_Tensor.select, torch.select)
def _select(input: StoredParameter, dim: int, index: int) -> Any:
    return _getitem(input, index) if dim in (0, -input.ndim) else NotImplemented


@handles(_Tensor.unbind, torch.unbind)
def _unbind(input: StoredParameter, dim: int = 0) -> Any:
    if not _has_entries(input) or dim not in (0, -input.ndim):
        return NotImplemented
    return tuple(map(input.entry, range(len(input))))


def _has_entries(weight: StoredParameter) -> bool:
    """Return whether an entry of its first axis is a view: a matrix of a stack, or a row of one."""
    axes = 1 if weight.transposed and weight.ndim == 2 else weight.ndim
    return axes > 1 and weight.stored().is_stack


def _has_rows(weight: torch.Tensor) -> bool:
    return type(weight) is StoredParameter and weight.ndim > 1 and not weight.transposed


def _part(weight: StoredParameter, start: int, stop: int) -> StoredParameter:
    first = 0 if weight.rows is None else weight.rows[0]
    return weight.with_rows((first + start, first + stop))


@handles(_Tensor.detach, _Tensor.data.__get__)  # type: ignore[attr-defined]
def _same(self: StoredParameter) -> Any:
    return self


def _converts(method: Callable[..., Any]) -> None:
    """Register a conversion: one that changes nothing gives the stored tensor back."""

    @handles(method)
    def convert(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Of `x.to(weight)`, only the kind matters.
        like = [_empty_like(arg) for arg in args]
        kwargs = {name: _empty_like(value) for name, value in kwargs.items()}
        if type(self) is not StoredParameter:
            return method(self, *like, **kwargs)
        empty = _empty_like(self)
        made = method(empty, *like, **kwargs)
        if isinstance(made, str):  # `type()`
            return made
        if made.device != empty.device or made.dtype != empty.dtype:
            return NotImplemented
        return self


def _empty_like(value: Any) -> Any:
    if type(value) is not StoredParameter:
        return value
    return torch.empty(0, dtype=value.slot.dtype)


for _method in (
    *(_Tensor.to, _Tensor.type, _Tensor.type_as, _Tensor.cpu),
    *(_Tensor.float, _Tensor.double, _Tensor.half, _Tensor.bfloat16),
):
    _converts(_method)


@handles(_Tensor.contiguous)
def _contiguous(
    self: StoredParameter, *, memory_format: torch.memory_format = torch.contiguous_format
) -> Any:
    if self.transposed or memory_format is not torch.contiguous_format:
        return NotImplemented
    return self


def _gives_array(method: Callable[..., Any]) -> None:
    """Register what gives an array: what is written there, torch would not count as a change."""

    @handles(method)
    def give(self: StoredParameter, *args: Any, **kwargs: Any) -> Any:
        array = method(self.loaded(), *args, **kwargs)
        array.flags.writeable = array.flags.owndata  # a copy, of another dtype, is the caller's
        return array


_gives_array(_Tensor.numpy)
_gives_array(_Tensor.__array__)


@handles(_Tensor.__dlpack__)
def _dlpack(self: StoredParameter, *args: Any, **kwargs: Any) -> Any:
    return self.loaded().clone().__dlpack__(*args, **kwargs)  # it may be written to


@handles(_Tensor.requires_grad_)
def _requires_grad_(self: StoredParameter, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise ArgumentError(f"{self.label} is in a store and has no gradient")
    return self


@handles(_Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _set_requires_grad(self: StoredParameter, value: bool) -> None:
    _requires_grad_(self, value)
