# SPDX-License-Identifier: Apache-2.0
"""What torch's functions do when they are given a stored tensor: stream it, where a kernel can.

Products and convolutions are here; look-ups of rows are in :mod:`pydedup.serving.attached.rows`,
the views of a matrix that lead to both in :mod:`pydedup.serving.attached.views`. A handler returns
``NotImplemented`` for what it cannot stream: the tensor is then loaded. Arrays pass between torch
and numpy without a copy. Kernels compute in float32 (float64 where weights are stored so), and
results are cast to the dtype that torch would return.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import forward_ad
from torch.nn import functional

from pydedup.conv import Window
from pydedup.errors import ArgumentError, BudgetError
from pydedup.matmul import compute_dtype
from pydedup.serving.attached.activations import made, needed
from pydedup.serving.attached.again import product_again
from pydedup.serving.attached.parameter import StoredParameter, handles
from pydedup.serving.attached.weights import Rows
from pydedup.serving.plan import bytes_of_factor
from pydedup.serving.tensor import StoredTensor
from pydedup.types import DType

__all__ = ["as_floats", "as_input", "as_numpy", "as_result", "streamed"]

_Tensor = torch.Tensor
_HALVES = (torch.bfloat16, torch.float16)


def as_input(x: torch.Tensor, weight: StoredParameter, what: str = "input") -> torch.Tensor:
    """Return an input that is in memory and asks for no derivative, or raise ArgumentError."""
    if not x.is_cpu:
        raise ArgumentError(f"{weight.label} is streamed on the CPU; the {what} is on {x.device}")
    if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise ArgumentError(
            f"the {what} of {weight.label} has a tangent, and streamed weights give none; call the "
            "module outside of torch.autograd.forward_ad.dual_level"
        )
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise ArgumentError(
                f"the {what} of {weight.label} requires a gradient, and streamed weights have "
                "none; use torch.no_grad()"
            )
        x = x.detach()  # and without its tangent
    return x


def as_floats(
    x: torch.Tensor, weight: StoredParameter, what: str = "input", *, keeps_bf16: bool = False
) -> NDArray[Any]:
    """Return an input as kernels take it, without a copy where it is float32 or float64.

    Products take bfloat16 as it is, which ``keeps_bf16`` asks for.
    """
    x = as_input(x, weight, what)
    dtype = x.dtype
    if keeps_bf16 and dtype is torch.bfloat16:
        return as_numpy(x, weight, what).view(DType.BF16.numpy)
    if dtype in _HALVES:
        x = x.float()
    elif dtype is not torch.float32 and dtype is not torch.float64:
        raise ArgumentError(f"the {what} of {weight.label} is {dtype}; floats are needed")
    return as_numpy(x, weight, what)


def _cast(x: torch.Tensor, weight: StoredParameter, what: str = "input") -> torch.Tensor:
    """Return an input of a product as torch.autocast has it, which a module may enter itself."""
    if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float32, *_HALVES):
        return x.to(torch.get_autocast_dtype("cpu"))
    dtype = weight.slot.dtype
    if x.dtype != dtype and x.is_floating_point():
        # As torch does: else a float64 one would be answered with the digits of float32.
        raise ArgumentError(
            f"the {what} of {weight.label} is {x.dtype}, and the weight {dtype}: convert the "
            f"{what}, or attach a module in its dtype"
        )
    return x


def as_numpy(x: torch.Tensor, weight: StoredParameter, what: str = "input") -> NDArray[Any]:
    """Return an input as an array, numbers in bfloat16 as their bits.

    Raises ArgumentError for what is no plain tensor, BudgetError without memory for a copy.
    """
    try:
        if torch._is_functional_tensor(x):  # numpy() would show what happens to be in memory
            raise TypeError("it is a wrapper of torch.func.functionalize")
        if x.dtype is torch.bfloat16:  # which numpy does not know
            x = x.view(torch.int16)
        return (x if x.is_contiguous() else x.contiguous()).numpy()  # torch's copies are counted
    except (RuntimeError, TypeError) as exc:
        if "can't allocate memory" in str(exc):
            raise BudgetError(
                f"no memory for a copy of the {what} of {weight.label}: {x.dtype} of shape "
                f"{tuple(x.shape)}"
            ) from exc
        raise ArgumentError(
            f"the {what} of {weight.label} is no plain tensor in memory (sparse, nested, of vmap "
            f"or of a tracer): {exc}"
        ) from exc


def as_result(y: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """Return what a kernel gave as a tensor of this dtype, whose memory is counted."""
    if y.dtype == DType.BF16.numpy:  # which torch does not take from numpy
        return made(torch.from_numpy(y.view(np.int16)).view(torch.bfloat16))
    result = made(torch.from_numpy(y))
    return result if result.dtype is dtype else result.to(dtype)


def _bytes_of_each(width: int, as_bf16: bool) -> int:
    """Return what a number of a result takes; beside one in bf16 its sum may rest meanwhile."""
    return width + 2 if as_bf16 else width


def _bias(bias: torch.Tensor | None, weight: StoredParameter) -> NDArray[Any] | None:
    """Return a bias that is stored, or any other vector, which is an input as well."""
    if bias is None:
        return None
    if type(bias) is StoredParameter:  # of a vector, the whole: parts of one are loaded
        return bias.attachment.weights().bias(bias.number)
    return as_floats(_cast(bias, weight, "bias"), weight, "bias")


def _is_beside(bias: torch.Tensor, weight: StoredParameter) -> TypeGuard[StoredParameter]:
    return isinstance(bias, StoredParameter) and bias.attachment is weight.attachment


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    # Of a stored one, `shape` goes the long way of functions of torch.
    return tensor.slot.shape if isinstance(tensor, StoredParameter) else tuple(tensor.shape)


def _misfit(why: object, weight: StoredParameter, x: torch.Tensor) -> ArgumentError:
    """Return what a kernel refused, with what it does not know: names, and shapes of tensors."""
    return ArgumentError(
        f"{weight.label}, of shape {_shape(weight)}, does not take an input of shape "
        f"{tuple(x.shape)}: {why}"
    )


def streamed(weight: object, x: object, ndim: int = 2) -> StoredTensor | None:
    """Return what streams this weight with this input; ``None`` to load it."""
    if type(weight) is not StoredParameter or type(x) is StoredParameter:
        return None
    slot = weight.slot
    stored = weight.stored()
    # Of a stack, a matrix.
    if len(slot.shape) - len(weight.entries) != ndim or not slot.dtype.is_floating_point:
        return None
    if stored.is_stack and ndim != 2:
        return None
    # Kernels of convolutions take all filters, as they are.
    if ndim > 2 and (weight.rows is not None or weight.transposed):
        return None
    # A kernel would round the inputs of such a module to float32.
    if slot.dtype is torch.float64 and stored.dtype.itemsize < 8:
        return None
    return stored


# ---- products -----------------------------------------------------------------------------------


@handles(functional.linear)
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    y = product_again(input, weight, bias)
    return _product(input, weight, bias, transpose=False) if y is None else y


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transpose: bool
) -> Any:
    """Return x @ weight.T + bias, or x @ weight + bias with ``transpose``."""
    stored = streamed(weight, x)
    if stored is None:
        return NotImplemented
    assert isinstance(weight, StoredParameter)
    if bias is not None and len(_shape(bias)) > 1:
        return NotImplemented
    x = _cast(x, weight)
    given = as_floats(x, weight, keeps_bf16=True)
    transpose = weight.transposed is not transpose
    copies = bytes_of_factor(given, stored.dtype, transpose=transpose)
    width = compute_dtype(stored.dtype).itemsize
    if weight.rows is None and not weight.entries:
        outer, inner = stored.shape[::-1] if transpose else stored.shape
        as_bf16 = x.dtype is torch.bfloat16 and width == 4
        each = _bytes_of_each(width, as_bf16)
        needed(lambda: copies + given.size // max(inner, 1) * outer * each)
        weights = weight.attachment.weights()
        if given.shape[-1:] != (inner,):
            raise _misfit(f"its last axis must be {inner}", weight, x)
        if bias is None:
            y = weights.matmul(weight.number, given, None, transpose=transpose, as_bf16=as_bf16)
        elif _is_beside(bias, weight) and _shape(bias) == (outer,):
            y = weights.matmul(
                weight.number, given, bias.number, transpose=transpose, as_bf16=as_bf16
            )
        else:
            offset = _bias(bias, weight)
            if offset is not None and offset.size == 1:  # torch adds it to every column
                offset = offset.repeat(outer)
            dtype = DType.BF16 if as_bf16 else None
            y = stored.matmul(given, bias=offset, transpose=transpose, dtype=dtype)
        return as_result(y, x.dtype)
    rows = weight.lines()
    outer, inner = rows[1] - rows[0], stored.shape[-1]
    if transpose:
        outer, inner = inner, outer
    offset = _bias(bias, weight)
    if given.shape[-1:] != (inner,) or (offset is not None and offset.size not in (1, outer)):
        return NotImplemented  # torch says what is wrong
    if transpose:
        needed(lambda: copies + (given.size + given.size // max(inner, 1) * outer) * width)
        y = _times_rows(given, weight, rows)
    else:
        part, before = weight.attachment.weights().part(weight.number, rows)
        needed(lambda: copies + given.size // max(inner, 1) * part.shape[0] * width)
        y = np.ascontiguousarray(part.matmul(given)[..., before : before + outer])
    if offset is not None:
        y += offset
    return as_result(y, x.dtype)


def _times_rows(x: NDArray[Any], weight: StoredParameter, rows: Rows) -> NDArray[Any]:
    """Return x @ these rows of the matrix view of a weight."""
    weights, stored = weight.attachment.weights(), weight.stored()
    first, stop = rows
    y = np.zeros((*x.shape[:-1], stored.shape[-1]), compute_dtype(stored.dtype))
    # Blocks at the ends may have rows of others: zeros times these may be no zeros.
    step = stored.block_shape[0]
    top, bottom = -(-first // step) * step, stop // step * step
    for start, end in ((first, top), (top, bottom), (bottom, stop)) if top < bottom else (rows,):
        if start == end:
            continue
        part, before = weights.part(weight.number, (start, end))
        given = x[..., start - first : end - first]
        if part.shape[0] == end - start:
            y += part.matmul(given, transpose=True)
        else:
            matrix = part.numpy()[before : before + end - start]
            y += given.astype(y.dtype) @ matrix.astype(y.dtype)
    return y


@handles(torch.matmul, _Tensor.matmul, _Tensor.__matmul__)
def _matmul(input: torch.Tensor, other: torch.Tensor) -> Any:
    if input.ndim == other.ndim == 3:
        return _bmm(input, other)
    if type(input) is StoredParameter:  # W @ x = (x.T @ W.T).T
        if other.ndim not in (1, 2):
            return NotImplemented
        y = _product(other.t(), input, None, transpose=False)
        return y if y is NotImplemented else y.t()
    return _product(input, other, None, transpose=True)


@handles(torch.bmm, _Tensor.bmm)
def _bmm(input: torch.Tensor, mat2: torch.Tensor) -> Any:
    if type(mat2) is not StoredParameter or type(input) is StoredParameter:
        return NotImplemented
    if not mat2.stored().is_stack or mat2.ndim != 3:
        return NotImplemented
    if (len(mat2), mat2.shape[1]) != (len(input), input.shape[2]) or not len(mat2):
        return NotImplemented  # torch repeats what is one, or says what is wrong
    return torch.stack([input[number] @ mat2.entry(number) for number in range(len(mat2))])


@handles(torch.mm, _Tensor.mm)
def _mm(input: torch.Tensor, mat2: torch.Tensor) -> Any:
    return _matmul(input, mat2)


@handles(_Tensor.__rmatmul__)
def _rmatmul(self: torch.Tensor, other: torch.Tensor) -> Any:
    return _matmul(other, self)


@handles(torch.addmm, _Tensor.addmm)
def _addmm(
    input: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1 or input.shape[0] != mat2.shape[1]:
        return NotImplemented
    return _product(mat1, mat2, input, transpose=True)


def _convolution(
    n_axes: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Return the convolution of images, or of rows, which are images of height 1."""
    stored = streamed(weight, input, 2 + n_axes)
    if stored is None:
        return NotImplemented
    assert isinstance(weight, StoredParameter)

    def sizes(size: Any, other: int) -> Any:
        """Return sizes for both directions; of rows, ``other`` is that for their height."""
        if isinstance(size, Sequence) and len(size) == 1:  # torch takes (n,) for n
            size = int(size[0])
        return size if n_axes == 2 else (other, size)

    x = _cast(input, weight)
    given = as_floats(x, weight, keeps_bf16=True)
    if x.ndim not in (1 + n_axes, 2 + n_axes):
        axes = "height, width" if n_axes == 2 else "length"
        raise _misfit(f"it must be (batch, channels, {axes}), or without batch", weight, x)
    images = given if n_axes == 2 else given[..., None, :]
    around = padding if isinstance(padding, str) else sizes(padding, 0)
    step, apart = sizes(stride, 1), sizes(dilation, 1)
    width = compute_dtype(stored.dtype).itemsize
    as_bf16 = x.dtype is torch.bfloat16 and width == 4
    offset = _bias(bias, weight)

    def nbytes() -> int:
        window = Window.of((*[1] * (2 - n_axes), *stored.shape[2:]), step, around, apart)
        places = math.prod((*images.shape[:-3], *window.out_size(*images.shape[-2:])))
        copies = 0 if as_bf16 or images.itemsize == width else images.size * width
        return copies + places * stored.shape[0] * _bytes_of_each(width, as_bf16)

    try:
        needed(nbytes)
        y = stored.conv2d(
            images,
            bias=offset,
            stride=step,
            padding=around,
            dilation=apart,
            groups=groups,
            dtype="bf16" if as_bf16 else None,
        )
    except ArgumentError as exc:
        raise _misfit(exc, weight, x) from exc
    return as_result(y if n_axes == 2 else y[..., 0, :], x.dtype)


handles(functional.conv1d)(partial(_convolution, 1))
handles(functional.conv2d)(partial(_convolution, 2))


# ---- functions made of others -------------------------------------------------------------------


def _without_check(function: Any) -> types.FunctionType:
    """Return a function of torch that goes on where the original would ask for an override.

    Those made of many others ask once, at their beginning, and so would hide the products inside of
    them. The copy has torch's code and another idea of whether anybody overrides it.
    """

    def nobody(*tensors: object) -> bool:
        return False

    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    copied = types.FunctionType(
        function.__code__,
        {**function.__globals__, **dict.fromkeys(names, nobody)},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


handles(functional.multi_head_attention_forward)(
    _without_check(functional.multi_head_attention_forward)
)
