# SPDX-License-Identifier: Apache-2.0
"""Products with several stored matrices, each with what the one before gives, in one native call.

Only where all their pages are in the pool: then Python between them is what takes the time, ten
times as long as a small product. Deliberately not here: which layers of a graph these are
(:mod:`pydedup.serving.stacks`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup.blocks import BlockMap
from pydedup.errors import PydedupError
from pydedup.matmul import as_factor, blocks_in, checked_bias, compute_dtype, shape_of
from pydedup.pool import PagePool
from pydedup.sets import distinct
from pydedup.types import DType
from pydedup.words import Activation

__all__ = ["Layer", "Stack"]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A matrix, and what `pydedup.matmul.matmul` takes with it."""

    block_map: BlockMap
    bias: NDArray[Any] | None
    activation: Activation | None
    transpose: bool

    @property
    def inner(self) -> int:
        """Numbers in a row of what it is multiplied with."""
        return self.block_map.grid.rows if self.transpose else self.block_map.grid.cols

    @property
    def outer(self) -> int:
        """Numbers in a row of the result."""
        return self.block_map.grid.cols if self.transpose else self.block_map.grid.rows


class Stack:
    """Products of ``x`` with some matrices in turn. Safe between threads.

    ``layers`` compute in one dtype, and each takes what the one before gives. How their blocks are
    cut into windows, ``pool`` says; it is not kept. Raises ArgumentError for a bias that
    `pydedup.matmul.matmul` refuses.

    Attributes
    ----------
    n_pages
        How many pages they are on.
    bias_bytes
        Bytes of the biases, which are kept.
    dtype
        What it computes in: float32 or float64.
    """

    def __init__(self, layers: Sequence[Layer], pool: PagePool) -> None:
        self._inner, self._outer = layers[0].inner, layers[-1].outer
        self.dtype = compute_dtype(layers[0].block_map.dtype)
        self.bias_bytes = 0
        parts, ids = [], [np.zeros(0, np.int64)]
        for layer in layers:
            block_map = layer.block_map
            windows = pool.planned(block_map.page_ids, block_map.bases)
            ids += [window.ids for window in windows]
            bias = checked_bias(layer.bias, self.dtype, layer.outer)
            self.bias_bytes += 0 if bias is None else bias.nbytes
            parts.append(
                (
                    *shape_of(block_map),
                    bias,
                    layer.activation or "none",
                    layer.transpose,
                    [blocks_in(window, block_map) for window in windows],
                )
            )
        page_ids = distinct(np.concatenate(ids))
        self.n_pages = len(page_ids)
        self._native = _core.Stack(parts, page_ids)

    def run(self, pool: PagePool, x: NDArray[Any], *, as_bf16: bool = False) -> NDArray[Any] | None:
        """Return what the last product gives for x of shape (..., inner), if that can be had here.

        ``as_bf16`` rounds it to bfloat16, where products are in float32.

        None where a page is not in the pool, and for whatever `pydedup.matmul.matmul` refuses: that
        says why. The bits are those that it gives.
        """
        try:
            y = self.run_factor(pool, as_factor(x, self.dtype), as_bf16=as_bf16)
        except (PydedupError, MemoryError):
            return None
        return y.view(DType.BF16.numpy) if as_bf16 and y is not None else y

    def run_factor(
        self, pool: PagePool, x: NDArray[Any], *, as_bf16: bool = False
    ) -> NDArray[Any] | None:
        """Return what `run` does of an x as `as_factor` gives it; bfloat16 as uint16, too."""
        if x.ndim == 0 or x.shape[-1] != self._inner or not x.size:
            return None
        rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), self._inner)
        try:
            with pool.hold(self.n_pages):
                y: NDArray[Any] | None = self._native.run(pool.native, rows, 0, as_bf16)
        except (PydedupError, MemoryError):
            return None
        if y is None or x.ndim == 2:
            return y
        return y.reshape(*x.shape[:-1], self._outer)
