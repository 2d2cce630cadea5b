# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch as arrays, and back.

Of all of pydedup's readers only this file and ``torch`` import torch, and only when they are used.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from pydedup.errors import ArgumentError, UnsupportedFormatError, not_installed
from pydedup.formats.base import Array, TensorEntry
from pydedup.types import DType
from pydedup.words import Device

if TYPE_CHECKING:
    import torch

__all__ = [
    "by_dtype",
    "dtypes",
    "is_module",
    "is_tensor",
    "require_torch",
    "to_numpy",
    "to_torch",
    "torch_entry",
]


def torch_entry(name: str, tensor: torch.Tensor, where: str) -> TensorEntry:
    """Return the entry of a tensor; tied tensors get equal keys.

    Raises
    ------
    UnsupportedFormatError
        When it is sparse, nested, quantised, without data, or of a dtype that cannot be stored.
    """
    import torch

    if torch.nn.parameter.is_lazy(tensor):
        raise UnsupportedFormatError(
            f"{where} is not initialised yet; run the module once, then store it"
        )
    if tensor.is_quantized:
        raise UnsupportedFormatError(f"{where} is quantised; dequantize() it first")
    kind = "meta" if tensor.device.type == "meta" else type(tensor).__name__
    if kind in ("meta", "FakeTensor"):  # of torch's tracers; it claims to be on the CPU
        raise UnsupportedFormatError(f"{where} is without data ({kind}); load its values first")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise UnsupportedFormatError(f"{where} is {kind}; convert it to a dense tensor")
    dtype = dtypes().get(tensor.dtype)
    if dtype is None:
        refusal = DType.refusal(
            in_bytes=tensor.dtype.itemsize == 1, in_pairs=tensor.dtype.is_complex
        )
        raise UnsupportedFormatError(f"{where} has dtype {tensor.dtype}, which {refusal}")
    if tensor.is_neg():
        raise UnsupportedFormatError(f"{where} is a lazily negated view; clone() it first")
    shape = tuple(tensor.shape)
    key: Hashable = name
    if tensor.numel():
        storage = tensor.untyped_storage()
        try:
            address = storage.data_ptr()
        except RuntimeError as exc:  # of subclasses that wrap others
            kind = type(tensor).__name__
            raise UnsupportedFormatError(
                f"{where} is of the type {kind}; give plain tensors (of a quantised model those "
                "that it was made from, or the parts of each by a name of its own)"
            ) from exc
        last = sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True))
        if (tensor.storage_offset() + last + 1) * dtype.itemsize > storage.nbytes():
            # Whoever shards a model frees what others hold; torch itself would read there.
            raise UnsupportedFormatError(
                f"{where} is without data (freed); gather its values first"
            )
        key = (address, tensor.storage_offset(), tensor.dtype, shape, tensor.stride())
    return TensorEntry(name, dtype, shape, key)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return the elements, C-contiguous; a view where the tensor is contiguous on the CPU."""
    import torch

    dtype = dtypes()[tensor.dtype].numpy
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), dtype)
    # Of a single element torch calls any strides contiguous, and then refuses to view it as bytes.
    try:
        whole = tensor.detach().cpu().contiguous()
    except RuntimeError as exc:
        if "can't allocate memory" in str(exc):  # for torch that is no MemoryError
            raise MemoryError(str(exc)) from exc
        raise
    flat = whole.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    array: Array = flat.numpy().view(dtype).reshape(tuple(tensor.shape))
    return array


def to_torch(array: Array, device: Device | None = None) -> torch.Tensor:
    """Return a tensor of an array's elements; on the CPU it uses the array's memory.

    Raises
    ------
    UnsupportedFormatError
        When torch is not installed.
    ArgumentError
        When torch has no such device.
    """
    require_torch()
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError, TypeError, ValueError) as exc:
            raise ArgumentError(f"device {device!r:.100} is none that torch has here") from exc
    dtype = by_dtype()[DType.of(array.dtype)]
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype, device=device)
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(dtype).reshape(array.shape).to(device)


def is_tensor(value: object) -> bool:
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_module(value: object) -> bool:
    """Return whether ``value`` is a torch module, without importing torch."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "nn"):
        return False
    return isinstance(value, torch.nn.Module)


def require_torch(what: str = "a torch file") -> None:
    """Raise UnsupportedFormatError, which says what needs it, where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed(what, exc, "torch")) from exc


def dtypes() -> dict[torch.dtype, DType]:
    """Return the element types of torch that a store keeps."""
    import torch

    return {
        torch.float64: DType.F64,
        torch.float32: DType.F32,
        torch.float16: DType.F16,
        torch.bfloat16: DType.BF16,
        torch.float8_e4m3fn: DType.F8_E4M3,
        torch.float8_e5m2: DType.F8_E5M2,
        torch.int8: DType.I8,
        torch.int16: DType.I16,
        torch.int32: DType.I32,
        torch.int64: DType.I64,
        torch.uint8: DType.U8,
        torch.uint16: DType.U16,
        torch.uint32: DType.U32,
        torch.uint64: DType.U64,
        torch.bool: DType.BOOL,
    }


def by_dtype() -> dict[DType, torch.dtype]:
    """Return what torch calls the element types of a store."""
    return {dtype: torch_dtype for torch_dtype, dtype in dtypes().items()}
