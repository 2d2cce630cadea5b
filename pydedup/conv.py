# SPDX-License-Identifier: Apache-2.0
"""2-D convolution with a stored weight, without ever holding the weight or unfolding the image.

The weight is the matrix view (out, in / groups * kernel_h * kernel_w) of a tensor
(out, in / groups, kernel_h, kernel_w), cut into blocks of any shape; images are
(batch, channels, height, width). As in :mod:`pydedup.matmul`, pages are pinned a window at a time
and results are float32, or float64 for weights that need it.

Deliberately not here: other ranks. A 1-D convolution is one of height 1; 3-D ones are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core
from pydedup.arguments import as_count
from pydedup.blocks import BlockGrid, BlockMap
from pydedup.errors import ArgumentError
from pydedup.matmul import (
    as_factor,
    check_activation,
    checked_bias,
    compute_dtype,
    feed_blocks,
    result_dtype,
    room_for,
)
from pydedup.pool import PagePool
from pydedup.types import DType
from pydedup.words import Activation

__all__ = ["Padding", "Pair", "Window", "conv2d"]

#: One number for both axes, or (vertical, horizontal).
Pair: TypeAlias = int | Sequence[int]
#: A `Pair`; (top, left, bottom, right); ``"valid"`` for none; or ``"same"``, which keeps the size
#: of an image at stride 1, with the odd row or column below or to the right, as torch does it.
Padding: TypeAlias = int | Sequence[int] | str


@dataclass(frozen=True, slots=True)
class Window:
    """How a window walks over an image: checked numbers for (vertical, horizontal).

    ``padding`` is (top, left, bottom, right).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Window:
        """Return the window that these arguments describe.

        Raises
        ------
        ArgumentError
            When one is no integer, out of range, or of a wrong length; the message names it.
        """
        size = _pair(kernel, "kernel")
        step = _pair(stride, "stride")
        apart = _pair(dilation, "dilation")
        return cls(size, step, _padding(padding, size, step, apart), apart)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the result; raises ArgumentError for an image that is too small."""
        top, left, bottom, right = self.padding
        sizes = []
        for i, (axis, given) in enumerate(
            (("height", height + top + bottom), ("width", width + left + right))
        ):
            reach = (self.kernel[i] - 1) * self.dilation[i] + 1
            if reach > given:
                raise ArgumentError(
                    f"the kernel covers {reach} of the image's {axis}, which is {given} with its "
                    "padding"
                )
            sizes.append((given - reach) // self.stride[i] + 1)
        return sizes[0], sizes[1]


def conv2d(
    block_map: BlockMap,
    pool: PagePool,
    x: ArrayLike,
    *,
    kernel: Pair,
    bias: ArrayLike | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: Activation | None = None,
    dtype: DType | None = None,
    threads: int = 0,
) -> NDArray[Any]:
    """Return ``activation(conv(x, W) + bias)``: cross-correlation, as frameworks call it.

    Parameters
    ----------
    block_map
        W, of shape (out, in / groups * kernel_h * kernel_w).
    pool
        Where its pages come from.
    x
        Real numbers of shape (batch, in, height, width), or (in, height, width) for one image;
        converted to ``compute_dtype(block_map.dtype)``, but for bfloat16 where that is float32.
    kernel
        Size of a filter.
    bias
        One number per output channel.
    stride, dilation
        Steps between windows, and within one; at least 1.
    padding
        Zeros around the image, see `Padding`.
    groups
        Output channels are cut into so many groups, each of which sees its part of the input
        channels.
    activation
        One of `pydedup.matmul.ACTIVATIONS`.
    dtype
        Of the result; `pydedup.matmul.result_dtype` says which there are.
    threads
        0 means one per core for large images.

    Returns
    -------
    numpy.ndarray
        Shape (batch, out, out_height, out_width), or without batch as x; dtype ``compute_dtype``,
        or bfloat16: that rounded. The same bits for any number of threads and any memory budget;
        kernels may differ in the last bits.

    Raises
    ------
    ArgumentError
        When sizes do not fit, are zero or negative, or an input does not hold real numbers.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had; see `PagePool.windows`. Or no memory for the result.

    Notes
    -----
    The image is gathered tile by tile, at most 256 KiB per thread. The products of padding zeros
    are computed: an infinite weight makes NaN at the border.
    """
    window = Window.of(kernel, stride, padding, dilation)
    grid = block_map.grid
    computed = compute_dtype(block_map.dtype)
    given = as_factor(x, computed)
    if given.ndim not in (3, 4):
        raise ArgumentError(
            f"x has shape {given.shape}; images are (batch, channels, height, width)"
            + ("; 3-D convolutions are not supported" if given.ndim == 5 else "")
        )
    images = given if given.ndim == 4 else given[None]
    groups = as_count("groups", groups, least=1)
    _check_channels(grid, images.shape[1], groups, window)
    check_activation(activation)
    offset = checked_bias(bias, computed, grid.rows)
    result = result_dtype(block_map.dtype, dtype)
    as_bf16 = dtype is DType.BF16
    out_size = window.out_size(images.shape[2], images.shape[3])
    what = f"the result of size {out_size}"
    room = np.dtype(np.uint16) if as_bf16 else result
    y = room_for((images.shape[0], grid.rows, *out_size), room, what)
    product = _core.Conv2d(
        grid.rows,
        grid.cols,
        grid.block_rows,
        grid.block_cols,
        block_map.dtype.code,
        images,
        offset,
        activation or "none",
        y,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        groups,
        as_count("threads", threads),
    )
    if y.size:
        feed_blocks(product, block_map, pool)
    y = y.view(result) if as_bf16 else y
    return y if given.ndim == 4 else y[0]


# ---- inside -------------------------------------------------------------------------------------


def _check_channels(grid: BlockGrid, channels: int, groups: int, window: Window) -> None:
    """Refuse images whose channels, in so many groups, the weight does not take."""
    if channels % groups or grid.rows % groups:
        raise ArgumentError(
            f"{groups} groups do not divide {channels} channels and {grid.rows} output channels"
        )
    columns = channels // groups * window.kernel[0] * window.kernel[1]
    if grid.cols != columns or grid.rows == 0 or channels == 0:
        raise ArgumentError(
            f"x has {channels} channels, which with {groups} groups and a kernel of "
            f"{window.kernel} need a weight of {columns} columns; it is ({grid.rows}, {grid.cols})"
        )


def _sizes(value: object, name: str, lengths: tuple[int, ...], least: int) -> tuple[int, ...]:
    """Return an integer, or a sequence of as many as ``lengths`` allow, as a tuple."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (as_count(name, value, least=least),)
    if len(value) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ArgumentError(f"{name} is {value!r}; give an integer, or {wanted} of them")
    return tuple(as_count(f"each of {name} {value!r}", size, least=least) for size in value)


def _pair(value: object, name: str) -> tuple[int, int]:
    sizes = _sizes(value, name, (2,), 1)
    return sizes[0], sizes[-1]


def _padding(
    padding: Padding, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            if stride != (1, 1):
                raise ArgumentError(f"padding 'same' needs stride 1, not {stride}")
            high, wide = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
            return high // 2, wide // 2, high - high // 2, wide - wide // 2
        raise ArgumentError(f"padding is {padding!r}; give sizes, 'same' or 'valid'")
    sizes = _sizes(padding, "padding", (2, 4), 0)
    if len(sizes) == 4:
        return sizes[0], sizes[1], sizes[2], sizes[3]
    return sizes[0], sizes[-1], sizes[0], sizes[-1]
