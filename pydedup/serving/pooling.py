# SPDX-License-Identifier: Apache-2.0
"""Maxima and means over windows of images (batch, channels, height, width).

A window is a rectangle, so both are taken along one axis after the other: as many passes over the
image as the window is wide and high, not as it has pixels. Results follow torch, NaN and infinities
included. Deliberately not here: pools of a whole image, which are plain reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import ArgumentError

__all__ = ["avg_pool2d", "max_pool2d"]

_Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Windows along one axis of ``size``: ``count`` of them, from ``-before`` on."""

    size: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int
    count: int

    @classmethod
    def of(
        cls,
        name: str,
        size: int,
        kernel: int,
        stride: int,
        before: int,
        after: int,
        dilation: int,
        ceil_mode: bool,
    ) -> _Axis:
        reach = (kernel - 1) * dilation + 1
        room = size + before + after - reach
        count = (-(-room // stride) if ceil_mode else room // stride) + 1
        if (count - 1) * stride >= size + before:
            count -= 1  # the last window must begin in the image, or before it
        if size < 1 or count < 1:
            raise ArgumentError(
                f"windows of {reach} do not fit into the image's {name}, which is "
                f"{size + before + after} with its padding"
            )
        return cls(size, kernel, stride, before, after, dilation, count)

    def counted(self, include_pad: bool) -> _Array:
        """Return how many elements each window has, its padding included or not."""
        starts = np.arange(self.count) * self.stride - self.before
        ends = np.minimum(starts + self.kernel, self.size + (self.after if include_pad else 0))
        counts: _Array = ends - (starts if include_pad else np.maximum(starts, 0))
        return counts

    def reduce(
        self, x: _Array, axis: int, fill: float, combine: Callable[[_Array, _Array], _Array]
    ) -> _Array:
        """Combine the elements of each window along ``axis``; outside of x they are ``fill``."""
        behind = (self.count - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        behind -= self.before + self.size
        if self.before or behind > 0:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (self.before, max(behind, 0))
            x = np.pad(x, widths, constant_values=fill)
        steps = [slice(None)] * x.ndim
        out: _Array | None = None
        for offset in range(0, self.kernel * self.dilation, self.dilation):
            steps[axis] = slice(offset, offset + (self.count - 1) * self.stride + 1, self.stride)
            part = x[tuple(steps)]
            out = part.copy() if out is None else combine(out, part)
        assert out is not None  # a kernel has at least one element
        return out


def _axes(
    x: _Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[_Axis, _Axis]:
    if x.ndim not in (3, 4):
        raise ArgumentError(
            f"x has shape {x.shape}; images are (batch, channels, height, width)"
            + ("; 3-D pools are not supported" if x.ndim == 5 else "")
        )
    vertical, horizontal = (
        _Axis.of(
            name,
            x.shape[i - 2],
            kernel[i],
            stride[i],
            padding[i],
            padding[i + 2],
            dilation[i],
            ceil_mode,
        )
        for i, name in enumerate(("height", "width"))
    )
    return vertical, horizontal


def max_pool2d(
    x: _Array,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> _Array:
    """Return the maximum of each window; a NaN wins, padding never does.

    Parameters
    ----------
    x
        float32 or float64 images, shape (batch, channels, height, width) or without batch.
    kernel, stride, dilation
        (vertical, horizontal), each at least 1.
    padding
        (top, left, bottom, right).
    ceil_mode
        Whether windows may begin in the image and end behind its padding.

    Raises
    ------
    ArgumentError
        When x has another rank or no window fits.
    """
    vertical, horizontal = _axes(x, kernel, stride, padding, dilation, ceil_mode)

    def larger(a: _Array, b: _Array) -> _Array:
        return np.asarray(np.maximum(a, b, out=a))

    return horizontal.reduce(vertical.reduce(x, -2, -np.inf, larger), -1, -np.inf, larger)


def avg_pool2d(
    x: _Array,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> _Array:
    """Return the mean of each window, as `max_pool2d` walks over it.

    With ``count_include_pad`` zeros of the padding count as elements; what a window has behind the
    padding never does. Raises ArgumentError as `max_pool2d` does.
    """
    vertical, horizontal = _axes(x, kernel, stride, padding, (1, 1), ceil_mode)

    def add(a: _Array, b: _Array) -> _Array:
        a += b
        return a

    total = horizontal.reduce(vertical.reduce(x, -2, 0.0, add), -1, 0.0, add)
    counts = np.multiply.outer(
        vertical.counted(count_include_pad), horizontal.counted(count_include_pad)
    )
    total /= counts.astype(total.dtype)
    return total
