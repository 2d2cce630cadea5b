# SPDX-License-Identifier: Apache-2.0
"""Models given as a mapping of names to numpy arrays, torch tensors or what converts to arrays.

Nothing is copied until a tensor is read, and then only what is not already contiguous and in
native byte order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from pydedup.arguments import as_array
from pydedup.errors import ArgumentError
from pydedup.formats.base import Array, ModelSource, TensorEntry, name_problem
from pydedup.formats.torch_tensors import is_tensor, to_numpy, torch_entry
from pydedup.types import DType

__all__ = ["MappingSource"]


class MappingSource(ModelSource):
    """A mapping of names to arrays or tensors; it must not change while the source is open."""

    format = "mapping"

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__("the given mapping")
        self._arrays: dict[str, Any] = {}
        # Otherwise wrong input is the caller's slip here, not a damaged file.
        for name in values:
            problem = name_problem(name)
            if problem:
                raise ArgumentError(f"tensor name {name!r:.80} {problem}")
        entries = []
        for name, value in values.items():
            if is_tensor(value):
                self._arrays[name] = value
                entries.append(torch_entry(name, value, f"tensor {name!r}"))
                continue
            array = _as_array(name, value)
            # The key may name temporary memory of a conversion: keeping the array keeps it valid.
            self._arrays[name] = array
            entries.append(TensorEntry(name, _dtype(name, array), array.shape, _key(name, array)))
        self._set_entries(entries)

    def close(self) -> None:
        """Let go of the arrays."""
        self._arrays = {}

    def _read(self, entry: TensorEntry) -> Array:
        value = self._arrays[entry.name]
        if not isinstance(value, np.ndarray):
            return to_numpy(value)
        array = value.astype(entry.dtype.numpy, copy=False)
        return array if array.flags.c_contiguous else array.copy("C")


def _as_array(name: str, value: Any) -> Array:
    array = as_array(value, f"tensor {name!r}")
    if array.dtype.hasobject:
        kind = "dtype object" if isinstance(value, np.ndarray) else f"type {type(value).__name__}"
        # A checkpoint, as torch.load gives it.
        hint = f"; to store what it holds, give it alone: [{name!r}] of what was given"
        raise ArgumentError(
            f"tensor {name!r} is of {kind}, which is no array of numbers"
            f"{hint if isinstance(value, Mapping) else ''}"
        )
    return array


def _dtype(name: str, array: Array) -> DType:
    try:
        return DType.of(array.dtype)
    except ArgumentError as exc:
        raise ArgumentError(f"tensor {name!r}: {exc}") from exc


def _key(name: str, array: Array) -> Hashable:
    if not array.size:
        return name
    address = array.__array_interface__["data"][0]
    return (address, array.dtype.str, array.dtype.name, array.shape, array.strides)
