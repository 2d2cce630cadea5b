# SPDX-License-Identifier: Apache-2.0
"""The operations that nodes of a graph may have: their inputs, weights and attributes.

What they compute (``x`` is the first input, ``y`` the second; numpy terms):

=================  =============================================================================
``linear``         ``x @ W.T + bias`` with weight (out, in); with ``transpose`` the tensor is
                   stored as (in, out) and the result is ``x @ W + bias``
``embedding``      ``weight[ids]``; negative ids, counted from the end, only with ``from_end``
``embedding_bag``  rows of ``weight`` per bag, reduced by ``mode`` (sum, mean, max). Inputs: ids
                   2-D, a bag per row; or ids 1-D and offsets 1-D, with the end of the last bag
                   as one more offset when ``include_last_offset``. Entries equal to
                   ``padding_idx`` (negative: counted from the end) do not count. An empty bag
                   is zero
``conv2d``         cross-correlation of images (batch, channels, height, width)
                   with weight (out, channels / ``groups``, kernel_h, kernel_w), ``+ bias``;
                   ``stride`` and ``dilation`` are [vertical, horizontal], ``padding`` [top, left,
                   bottom, right] of zeros
``max_pool2d`` ``avg_pool2d``   over windows of ``kernel``, with ``stride``, ``dilation`` (max only)
                   and ``padding`` as above, which is smaller than the window; with ``ceil_mode``
                   also over windows that begin in the image and end behind it. Padding is never
                   the maximum; it counts in means when ``count_include_pad``
``relu`` ``sigmoid`` ``tanh`` ``silu`` ``identity``   as named
``gelu``           exact (``approximate="none"``) or the tanh form (``"tanh"``)
``leaky_relu``     ``x`` where positive, else ``alpha * x``
``elu``            ``x`` where positive, else ``alpha * (exp(x) - 1)``
``softplus``       ``log(1 + exp(x))``
``softmax`` ``log_softmax``   over ``axis``
``flatten``        all axes from ``start_axis`` on become one, of size 1 where there is none
``reshape``        to ``shape``, in which one entry may be -1; 0 keeps the size of that axis
``layer_norm``     over the last ``axes`` axes, then ``* weight + bias``
``batch_norm``     ``(x - mean) / sqrt(var + eps) * weight + bias`` along ``axis``
``add`` ``mul`` ``sub``       with broadcasting
``concat``         all inputs along ``axis``
``mean`` ``max``     over ``axis`` (one or several), kept as size 1 when ``keepdims``
``transpose``      axes in the order ``perm``
=================  =============================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydedup.errors import ArgumentError

__all__ = [
    "KEEPING_SHAPE",
    "OPS",
    "OpSpec",
    "attr_problem",
    "axes_of",
    "counts_axes",
    "flattened_from",
    "reshaped_to",
    "shape_problem",
    "window_problem",
]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What a node of one operation must and may have; ``attrs`` maps names to defaults.

    A default of ``...`` marks an attribute that must be given.
    """

    min_inputs: int = 1
    max_inputs: int = 1
    weights: tuple[str, ...] = ()
    optional_weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


_TWO = OpSpec(2, 2)
_POOL: Mapping[str, Any] = {
    "kernel": ...,
    "stride": ...,
    "padding": [0, 0, 0, 0],
    "ceil_mode": False,
}

#: The operations a graph may use.
OPS: Mapping[str, OpSpec] = MappingProxyType(
    {
        "linear": OpSpec(
            weights=("weight",), optional_weights=("bias",), attrs={"transpose": False}
        ),
        "embedding": OpSpec(weights=("weight",), attrs={"from_end": False}),
        "embedding_bag": OpSpec(
            1,
            2,
            weights=("weight",),
            attrs={"mode": "mean", "padding_idx": None, "include_last_offset": False},
        ),
        "conv2d": OpSpec(
            weights=("weight",),
            optional_weights=("bias",),
            attrs={"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1},
        ),
        "max_pool2d": OpSpec(attrs={**_POOL, "dilation": [1, 1]}),
        "avg_pool2d": OpSpec(attrs={**_POOL, "count_include_pad": True}),
        "relu": OpSpec(),
        "gelu": OpSpec(attrs={"approximate": "none"}),
        "sigmoid": OpSpec(),
        "tanh": OpSpec(),
        "softmax": OpSpec(attrs={"axis": -1}),
        "log_softmax": OpSpec(attrs={"axis": -1}),
        "leaky_relu": OpSpec(attrs={"alpha": 0.01}),
        "elu": OpSpec(attrs={"alpha": 1.0}),
        "silu": OpSpec(),
        "softplus": OpSpec(),
        "identity": OpSpec(),
        "flatten": OpSpec(attrs={"start_axis": 1}),
        "reshape": OpSpec(attrs={"shape": ...}),
        "layer_norm": OpSpec(weights=("weight", "bias"), attrs={"axes": 1, "eps": 1e-5}),
        "batch_norm": OpSpec(
            weights=("weight", "bias", "mean", "var"), attrs={"eps": 1e-5, "axis": 1}
        ),
        "add": _TWO,
        "mul": _TWO,
        "sub": _TWO,
        "concat": OpSpec(1, 1 << 16, attrs={"axis": ...}),
        "mean": OpSpec(attrs={"axis": ..., "keepdims": False}),
        "max": OpSpec(attrs={"axis": ..., "keepdims": False}),
        "transpose": OpSpec(attrs={"perm": ...}),
    }
)

#: Those without weights whose result has the shape of their only input.
KEEPING_SHAPE = frozenset(
    ("relu", "gelu", "sigmoid", "tanh", "softmax", "log_softmax", "leaky_relu", "elu", "silu")
) | {"softplus", "identity"}

_INT_ATTRS = {"start_axis", "axes", "axis", "padding_idx", "groups"}
_FLOAT_ATTRS = {"alpha", "eps"}
_BOOL_ATTRS = {
    "transpose",
    "from_end",
    "include_last_offset",
    "keepdims",
    "ceil_mode",
    "count_include_pad",
}
#: Lists of sizes: how many, and the least each may be.
_SIZES = {"kernel": (2, 1), "stride": (2, 1), "dilation": (2, 1), "padding": (4, 0)}
#: What the kernels count with.
_LARGEST_SIZE = 2**31 - 1
_CHOICES = {"mode": ("sum", "mean", "max"), "approximate": ("none", "tanh")}


def attr_problem(op: str, name: str, value: object) -> str | None:
    """Say what is wrong with the value of an attribute that the operation has."""
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"choose one of {', '.join(_CHOICES[name])}"
    if name in _BOOL_ATTRS:
        return None if isinstance(value, bool) else "it must be true or false"
    if name in _FLOAT_ATTRS:
        good = isinstance(value, float) or _is_int(value)
        # Not isfinite(): an integer beyond all floats is an OverflowError there.
        finite = good and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
        return None if finite else "it must be a finite number"
    if name == "padding_idx" and value is None:
        return None
    listed = isinstance(value, list) and all(_is_int(item) for item in value)
    if name in _SIZES:
        length, least = _SIZES[name]
        sizes = value if isinstance(value, list) and listed else []
        if len(sizes) == length and all(least <= size <= _LARGEST_SIZE for size in sizes):
            return None
        return f"it must be {length} integers of at least {least}, below 2**31"
    if name in ("perm", "shape") or (op in ("mean", "max") and listed):
        if not listed:
            return "it must be a list of integers"
        return _list_problem(name, value)  # type: ignore[arg-type]
    assert name in _INT_ATTRS
    if not _is_int(value):
        return "it must be an integer"
    if name in ("axes", "groups") and value < 1:  # type: ignore[operator]
        return "it must be at least 1"
    return None


def window_problem(op: str, attr: Callable[[str], Any]) -> str | None:
    """Say when a pool may have windows of nothing but padding."""
    if op not in ("max_pool2d", "avg_pool2d"):
        return None
    kernel, padding = attr("kernel"), attr("padding")
    dilation = attr("dilation") if op == "max_pool2d" else [1, 1]
    for axis, name in enumerate(("vertical", "horizontal")):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        most = max(padding[axis], padding[axis + 2])
        if 2 * most > reach:
            return f"{name} padding of {most} is more than half of a window of {reach}"
    return None


def _list_problem(name: str, value: list[int]) -> str | None:
    if name == "perm" and sorted(value) != list(range(len(value))):
        return "it must name each axis once"
    if name == "shape" and (value.count(-1) > 1 or any(item < -1 for item in value)):
        return "it must hold sizes, and -1 at most once"
    if name == "axis" and len(set(value)) != len(value):
        return "it must name an axis at most once"
    return None


def shape_problem(
    op: str,
    weights: Mapping[str, str],
    attr: Callable[[str], Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Say what is wrong with the shapes of a node's tensors, which are given by role."""
    weight = shapes.get("weight")
    if weight is None:
        return None
    named = f"tensor {weights['weight']!r} has shape {weight}"
    if op in ("linear", "embedding", "embedding_bag"):
        if len(weight) != 2:
            return f"{named}; 2 axes are needed"
        if "bias" in shapes:
            out = weight[1] if attr("transpose") else weight[0]
            if shapes["bias"] != (out,):
                return f"bias has shape {shapes['bias']}; ({out},) is needed"
        return None
    if op == "conv2d":
        if len(weight) != 4 or 0 in weight:
            return f"{named}; 4 axes are needed (out, in / groups, kernel_h, kernel_w), none of 0"
        if weight[0] % attr("groups"):
            return f"{named}; {attr('groups')} groups do not divide its {weight[0]} outputs"
        if "bias" in shapes and shapes["bias"] != (weight[0],):
            return f"bias has shape {shapes['bias']}; ({weight[0]},) is needed"
        return None
    if op == "layer_norm" and len(weight) != attr("axes"):
        return f"{named}; {attr('axes')} axes are needed"
    if op == "batch_norm" and len(weight) != 1:
        return f"{named}; 1 axis is needed"
    for role, shape in shapes.items():
        if shape != weight:
            return f"{role} has shape {shape}; that of weight, {weight}, is needed"
    return None


def axes_of(axis: int | list[int]) -> list[int]:
    """Return the axes that an attribute names, which may be one or several."""
    return axis if isinstance(axis, list) else [axis]


def flattened_from(start_axis: int, shape: Sequence[int]) -> int:
    """Return the first of the axes that ``flatten`` makes one, counted from the front.

    It is the rank where there is none. Raises ArgumentError for an axis beyond that; an input of
    one number takes any.
    """
    rank = len(shape)
    if rank == 0 or start_axis == rank:
        return rank
    if not -rank <= start_axis < rank:
        raise ArgumentError(f"axis {start_axis} does not exist in an input of shape {shape}")
    return start_axis % rank


def reshaped_to(shape: Sequence[int], given: Sequence[int]) -> list[int]:
    """Return the ``shape`` of a ``reshape`` of an input, with the sizes that 0 stands for.

    Raises ArgumentError where the input has no such axis.
    """
    if any(size == 0 and axis >= len(given) for axis, size in enumerate(shape)):
        raise ArgumentError(f"shape {list(shape)} keeps an axis that {tuple(given)} does not have")
    return [given[axis] if size == 0 else size for axis, size in enumerate(shape)]


def counts_axes(op: str, attr: Callable[[str], Any]) -> bool:
    """Return whether a node finds axes by their number from the front.

    Of an input with one axis more or fewer in front these are others.
    """
    if op in ("reshape", "transpose"):
        return True
    if op == "flatten":
        return bool(attr("start_axis") >= 0)
    return "axis" in OPS[op].attrs and any(axis >= 0 for axis in axes_of(attr("axis")))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
