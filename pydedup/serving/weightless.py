# SPDX-License-Identifier: Apache-2.0
"""What operations without weights compute, in numpy: in float64 where inputs are, else in float32.

They follow torch, NaN and infinities included. Deliberately not here: operations with weights, and
the order in which nodes are run (:mod:`pydedup.serving.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import ArgumentError
from pydedup.graph import Node
from pydedup.matmul import activate
from pydedup.operations import axes_of, flattened_from, reshaped_to
from pydedup.serving.pooling import avg_pool2d, max_pool2d
from pydedup.types import DType
from pydedup.words import Activation

__all__ = ["WEIGHTLESS", "activation_of", "checked_axis", "real"]

_Array: TypeAlias = NDArray[Any]


def activation_of(node: Node) -> Activation | None:
    """Return what kernels call the operation of a node, if they have it behind a product."""
    if node.op == "gelu":
        return "gelu_tanh" if node.attr("approximate") == "tanh" else "gelu"
    return next((name for name in get_args(Activation) if name == node.op), None)


def real(x: _Array) -> _Array:
    """Return an input to compute with: float64 stays, all other numbers become float32."""
    if x.dtype.kind == "f" and x.dtype.itemsize in (4, 8):  # of either byte order
        return x.astype(x.dtype.newbyteorder("="), copy=False)
    if x.dtype.kind not in "biuf":
        try:
            DType.of(x.dtype)  # bf16 and f8 have kinds of their own
        except ArgumentError:
            raise ArgumentError(f"numbers are needed, not {x.dtype}") from None
    return x.astype(np.float32)


def checked_axis(axis: int, x: _Array) -> int:
    """Return an axis of an input counted from the front. Raises ArgumentError if there is none."""
    if not -x.ndim <= axis < x.ndim:
        raise ArgumentError(f"axis {axis} does not exist in an input of shape {x.shape}")
    return axis % x.ndim


def _activation(node: Node, x: _Array) -> _Array:
    name = activation_of(node)
    assert name is not None
    return activate(real(x), name)


def _softmax(node: Node, x: _Array) -> _Array:
    x = real(x)
    axis = checked_axis(node.attr("axis"), x)
    powers = np.exp(x - x.max(axis=axis, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _log_softmax(node: Node, x: _Array) -> _Array:
    x = real(x)
    axis = checked_axis(node.attr("axis"), x)
    shifted = x - x.max(axis=axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def _leaky_relu(node: Node, x: _Array) -> _Array:
    x = real(x)
    return np.where(x > 0, x, x * x.dtype.type(node.attr("alpha")))


def _elu(node: Node, x: _Array) -> _Array:
    x = real(x)
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)) * x.dtype.type(node.attr("alpha")))


def _softplus(node: Node, x: _Array) -> _Array:
    x = real(x)
    return np.asarray(np.logaddexp(x.dtype.type(0), x))


def _identity(node: Node, x: _Array) -> _Array:
    return x


def _flatten(node: Node, x: _Array) -> _Array:
    start = flattened_from(node.attr("start_axis"), x.shape)
    return x.reshape(*x.shape[:start], math.prod(x.shape[start:]))


def _reshape(node: Node, x: _Array) -> _Array:
    return x.reshape(reshaped_to(node.attr("shape"), x.shape))


def _arithmetic(operation: Callable[..., Any], node: Node, x: _Array, y: _Array) -> _Array:
    return np.asarray(operation(real(x), real(y)))


def _concat(node: Node, *parts: _Array) -> _Array:
    if any(part.dtype.kind not in "iu" for part in parts):  # ids stay ids
        parts = tuple(real(part) for part in parts)
    return np.concatenate(parts, axis=checked_axis(node.attr("axis"), parts[0]))


def _mean(node: Node, x: _Array) -> _Array:
    axes = _axes(node, x)
    total = _reduced(node, real(x).sum(axis=axes, keepdims=True), axes)
    # Of nothing that is NaN, as torch has it; numpy's own mean warns the user of that.
    count = math.prod(x.shape[axis] for axis in axes)
    return np.asarray(total / total.dtype.type(count))  # numpy before 2 widens by an int


def _max(node: Node, x: _Array) -> _Array:
    axes = _axes(node, x)
    if not all(x.shape[axis] for axis in axes):
        raise ArgumentError(f"there is no maximum over axis {axes} of shape {x.shape}: it is empty")
    return _reduced(node, real(x).max(axis=axes, keepdims=True), axes)


def _reduced(node: Node, kept: _Array, axes: tuple[int, ...]) -> _Array:
    """Return what is left over axes, which have one element each, without them if it says so."""
    return kept if node.attr("keepdims") else np.asarray(kept.squeeze(axis=axes))


def _axes(node: Node, x: _Array) -> tuple[int, ...]:
    return tuple(checked_axis(axis, x) for axis in axes_of(node.attr("axis")))


def _pool(node: Node, x: _Array) -> _Array:
    x = real(x)
    options: dict[str, Any] = {name: node.attr(name) for name in ("kernel", "stride", "padding")}
    options["ceil_mode"] = bool(node.attr("ceil_mode"))
    if node.op == "max_pool2d":
        return max_pool2d(x, dilation=node.attr("dilation"), **options)
    return avg_pool2d(x, count_include_pad=bool(node.attr("count_include_pad")), **options)


def _transpose(node: Node, x: _Array) -> _Array:
    return x.transpose(node.attr("perm"))


#: By operation: computes a node from its inputs.
WEIGHTLESS: Mapping[str, Callable[..., _Array]] = {
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "relu": _activation,
    "gelu": _activation,
    "silu": _activation,
    "sigmoid": _activation,
    "tanh": _activation,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "identity": _identity,
    "flatten": _flatten,
    "reshape": _reshape,
    "add": partial(_arithmetic, np.add),
    "sub": partial(_arithmetic, np.subtract),
    "mul": partial(_arithmetic, np.multiply),
    "concat": _concat,
    "mean": _mean,
    "max": _max,
    "transpose": _transpose,
}
