# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix without ever holding it.

A product walks over the blocks of a `pydedup.blocks.BlockMap`. Pages are pinned a window at a
time, so that memory stays within the pool's budget for a matrix of any size; blocks are used where
they lie in their page, or decoded into small scratch tiles. All work runs natively, without the
GIL. `read` alone returns the whole matrix.

Results are float32, or float64 for weights of float64 and of 32- or 64-bit integers: whatever holds
every weight exactly (`compute_dtype`; 64-bit integers beyond 2**53 are rounded).

Deliberately not here: rows and bags of them (:mod:`pydedup.lookup`), names of tensors and models
(:mod:`pydedup.serving`).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core, codec
from pydedup.arguments import as_array, as_count, as_dtype, no_memory
from pydedup.blocks import BlockMap, MatrixView
from pydedup.errors import ArgumentError, BudgetError
from pydedup.pool import PagePool
from pydedup.types import DType
from pydedup.windows import Window
from pydedup.words import Activation, check_word

__all__ = [
    "ACTIVATIONS",
    "Among",
    "Shape",
    "activate",
    "activate_in_place",
    "as_factor",
    "blocks_in",
    "check_activation",
    "checked_bias",
    "checked_factors",
    "compute_dtype",
    "feed_blocks",
    "matmul",
    "read",
    "real_array",
    "result_dtype",
    "room_for",
    "shape_of",
    "widened",
]

#: Activations that a product can end with. ``gelu`` is the exact form, ``gelu_tanh`` the other.
ACTIVATIONS = get_args(Activation)

# Smaller arrays are not worth pages of their own.
_LEAST_MAPPED = 128 << 10

#: Of a block map: rows, columns, those of a block, the dtype's code.
Shape: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Among:
    """Which blocks count for which rows of x: columns beside those of a block map.

    Attributes
    ----------
    variants
        Of each row of x, whose it is: uint8 below 64.
    places
        Of each block its place in the grid: uint32, ascending, each place at least once.
    members
        Of each block, who has it: uint64, bit v for the rows of variant v.
    """

    variants: NDArray[np.uint8]
    places: NDArray[np.uint32]
    members: NDArray[np.uint64]


def compute_dtype(dtype: DType) -> np.dtype[Any]:
    """Return the dtype of results with weights of ``dtype``: float32 or float64."""
    code = _core.compute_dtype(dtype.code)
    return np.dtype(np.float64 if code == DType.F64.code else np.float32)


def matmul(
    block_map: BlockMap,
    pool: PagePool,
    x: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    activation: Activation | None = None,
    transpose: bool = False,
    dtype: DType | None = None,
    threads: int = 0,
    among: Among | None = None,
) -> NDArray[Any]:
    """Return ``activation(x @ W.T + bias)``, or ``x @ W + bias`` with ``transpose``.

    Parameters
    ----------
    block_map
        W, of shape (rows, cols).
    pool
        Where its pages come from.
    x
        Real numbers of shape (..., cols), or (..., rows) with ``transpose``; converted to
        ``compute_dtype(block_map.dtype)``, which may round float64.
    bias
        One number per column of the result.
    activation
        One of `ACTIVATIONS`.
    dtype
        Of the result; `result_dtype` says which there are.
    threads
        0 means one per core for large products.
    among
        Which blocks count for which rows of a 2-D x, when ``block_map`` has several at a place.

    Returns
    -------
    numpy.ndarray
        Shape (..., rows), or (..., cols) with ``transpose``; dtype ``compute_dtype``, or bfloat16:
        that rounded. The same bits for any number of threads and any memory budget; kernels may
        differ in the last bits.

    Raises
    ------
    ArgumentError
        When shapes do not fit, an input does not hold real numbers, ``transpose`` is no bool, or a
        product has no result of ``dtype``.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had; see `PagePool.windows`. Or no memory for the result.
    """
    given, offset = checked_factors(block_map, x, bias, transpose, keeps_bf16=True)
    check_activation(activation)
    inner = given.shape[-1]
    outer = block_map.grid.cols if transpose else block_map.grid.rows
    lead = given.shape[:-1]
    result = result_dtype(block_map.dtype, dtype)
    as_bf16 = dtype is DType.BF16
    y = room_for((math.prod(lead), outer), np.dtype(np.uint16) if as_bf16 else result)
    product = _core.Matmul(
        *shape_of(block_map),
        given.reshape(len(y), inner),
        offset,
        activation or "none",
        transpose,
        y,
        as_count("threads", threads),
        None if among is None else among.variants,
        None if among is None else among.places,
    )
    if y.size:
        feed_blocks(product, block_map, pool, None if among is None else among.members)
    y = y.reshape(*lead, outer)
    return y.view(result) if as_bf16 else y


def result_dtype(weights: DType, wanted: DType | None) -> np.dtype[Any]:
    """Return the dtype of a product with weights of a dtype: `compute_dtype`, or bf16 for float32.

    Raises ArgumentError for any other that is wanted.
    """
    computed = compute_dtype(weights)
    if wanted is None or wanted.numpy == computed:
        return computed
    if wanted is DType.BF16 and computed == np.float32:
        return wanted.numpy
    raise ArgumentError(
        f"a product with weights of {weights.label} has results of {computed}"
        + (" or bf16" if computed == np.float32 else "")
        + f", not of {wanted.label}"
    )


def checked_factors(
    block_map: BlockMap,
    x: ArrayLike,
    bias: ArrayLike | None,
    transpose: bool,
    *,
    keeps_bf16: bool = False,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return x and bias as kernels take them: x of bf16, for a product in f32, as uint16 if it may.

    Raises ArgumentError as `matmul` does.
    """
    if not isinstance(transpose, (int, np.bool_)):  # an array is neither true nor false
        raise ArgumentError(f"transpose must be True or False, not {transpose!r:.100}")
    grid = block_map.grid
    dtype = compute_dtype(block_map.dtype)
    inner, outer = (grid.rows, grid.cols) if transpose else (grid.cols, grid.rows)
    given = as_factor(x, dtype) if keeps_bf16 else real_array(x, dtype, "x")
    if given.ndim == 0 or given.shape[-1] != inner:
        raise ArgumentError(
            f"x has shape {given.shape}; its last axis must be {inner} for a matrix of shape "
            f"({grid.rows}, {grid.cols})" + (" with transpose" if transpose else "")
        )
    return given, checked_bias(bias, dtype, outer)


def as_factor(x: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x as a product in ``dtype`` takes it; bf16, for one in f32, as uint16.

    Raises ArgumentError, BudgetError as `real_array`.
    """
    given = as_array(x, "x")
    if given.dtype == dtype and given.flags.carray:
        return given  # most are: at once
    if given.dtype != dtype and dtype == np.float32 and given.dtype == DType.BF16.numpy:
        return real_array(given, given.dtype, "x").view(np.uint16)
    return real_array(given, dtype, "x")


def checked_bias(bias: ArrayLike | None, dtype: np.dtype[Any], outer: int) -> NDArray[Any] | None:
    """Return a bias of so many numbers as kernels take it. Raises ArgumentError."""
    if bias is None:
        return None
    offset = real_array(bias, dtype, "bias")
    if offset.shape != (outer,):
        raise ArgumentError(f"bias has shape {offset.shape}; ({outer},) is needed")
    return offset


def check_activation(activation: Activation | None) -> None:
    """Raise ArgumentError for an activation that is none of `ACTIVATIONS`."""
    if activation is not None:
        check_word("activation", activation, ACTIVATIONS)


def feed_blocks(
    product: _core.Matmul | _core.Conv2d,
    block_map: BlockMap,
    pool: PagePool,
    members: NDArray[np.uint64] | None = None,
) -> None:
    """Give a product all blocks of a matrix in order, deltas with their bases.

    ``members`` is `Among.members`, for a Matmul only. Windows whose pages are all here are used out
    of the pool, and what has to be decoded of them is kept where there is memory for that. Raises
    what `PagePool.windows` does; BudgetError also where there is no memory for sums that rest.
    """

    def at_once(window: Window) -> bool:
        return product.feed_resident(
            pool.native, blocks_in(window, block_map), **_of(members, window.rows)
        )

    try:
        walk = pool.stream(block_map.page_ids, block_map.bases, at_once)
        for part, pages, page_index, bases in walk:
            slots, at = block_map.slots[part], codec.bases_for_core(bases)
            product.feed(pages, page_index, slots, at, **_of(members, part))
    except MemoryError as exc:
        if isinstance(exc, BudgetError):
            raise
        raise BudgetError("no memory for what a product needs beside x and its result") from exc


def blocks_in(window: Window, block_map: BlockMap) -> _core.BlockWindow:
    """Return the blocks of a window of this map, the same object each time."""
    blocks: _core.BlockWindow
    for slots, base_slots, blocks in window.kept:
        if slots is block_map.slots and base_slots is block_map.base_slots:
            return blocks
    bases = None
    if block_map.base_slots is not None and window.base_index is not None:
        bases = window.base_index, block_map.base_slots[window.rows]
    blocks = _core.BlockWindow(window.ids, window.page_index, block_map.slots[window.rows], bases)
    window.kept[:] = [(block_map.slots, block_map.base_slots, blocks)]
    return blocks


def _of(members: NDArray[np.uint64] | None, part: Any) -> dict[str, NDArray[np.uint64]]:
    return {} if members is None else {"members": members[part]}


def read(
    block_map: BlockMap, pool: PagePool, *, threads: int = 0, is_mapped: bool = False
) -> NDArray[Any]:
    """Return the whole matrix, bit for bit, of shape (rows, cols) in the dtype that is stored.

    Where it ``is_mapped``, its memory goes back to the system as soon as it is free.

    Raises PageNotFoundError, CorruptStoreError, BudgetError when the pages cannot be had, or there
    is no memory for the matrix.
    """
    grid = block_map.grid
    out = (_mapped if is_mapped else room_for)((grid.rows, grid.cols), block_map.dtype.numpy)
    if out.size:
        view = MatrixView(out.view(np.uint8).reshape(grid.rows, -1), block_map.dtype, grid)
        walk = pool.windows_with_bases(block_map.page_ids, block_map.bases)
        for rows, pages, page_index, bases in walk:
            slots = block_map.slots[rows]
            codec.read_blocks(view, rows, pages, page_index, slots, bases=bases, threads=threads)
    return out


def activate(x: NDArray[Any], activation: Activation, *, threads: int = 0) -> NDArray[Any]:
    """Return an activation of `ACTIVATIONS` of float32 or float64 values, as a new array.

    Raises ArgumentError for another activation or dtype.
    """
    check_activation(activation)
    if x.dtype not in (np.float32, np.float64):
        raise ArgumentError(f"activate takes float32 or float64 values, got {x.dtype}")
    out = np.array(x, order="C")
    _core.activate(out, activation, as_count("threads", threads))
    return out


def activate_in_place(y: NDArray[Any], activation: Activation) -> None:
    """Apply an activation of `ACTIVATIONS` to float32 or float64 values, C-contiguous."""
    _core.activate(y, activation, 0)


# ---- what the core takes ------------------------------------------------------------------------


def shape_of(block_map: BlockMap) -> Shape:
    """Return rows, columns, those of a block, and the dtype's code, as the core takes them."""
    grid = block_map.grid
    return grid.rows, grid.cols, grid.block_rows, grid.block_cols, block_map.dtype.code


def real_array(values: ArrayLike, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Return a C-contiguous, aligned array of ``dtype``; the same one if it is one already.

    Raises ArgumentError for what is no array of real numbers, BudgetError without memory for a
    copy.
    """
    given = as_array(values, name)
    if given.dtype == dtype:
        if given.flags.c_contiguous and given.flags.aligned:
            return given  # as `np.require` would, in a tenth of its time
        try:
            return np.require(given, requirements=["C", "A"])
        except MemoryError as exc:
            raise no_memory(f"a copy of {name}", given.shape, dtype) from exc
    if given.dtype.kind not in "biuf":
        try:
            DType.of(given.dtype)  # bf16 and f8 have kinds of their own
        except ArgumentError:
            raise ArgumentError(f"{name} must hold real numbers, not {given.dtype}") from None
    try:
        return as_dtype(given, dtype)
    except MemoryError as exc:
        raise no_memory(f"a copy of {name}", given.shape, dtype) from exc


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """Return stored values as float32 or float64, whichever holds them exactly."""
    return as_dtype(array, compute_dtype(DType.of(array.dtype)))


def _mapped(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array, not filled, that is no part of a heap.

    Large arrays are parts of one once some were freed, and what lies between others in it stays:
    where models make room for each other, that was as much as the budget. Raises BudgetError.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LEAST_MAPPED:
        return room_for(shape, dtype)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as exc:
        raise BudgetError(f"no memory for a tensor of {nbytes:,} bytes: {exc}") from exc
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


def room_for(
    shape: tuple[int, ...], dtype: np.dtype[Any], what: str = "the result"
) -> NDArray[Any]:
    """Return an array, not filled. Raises BudgetError, or ArgumentError for one that cannot be."""
    try:
        return np.empty(shape, dtype)
    except ValueError as exc:  # more than an array can be
        raise ArgumentError(f"{what} is too large: {exc}") from exc
    except MemoryError as exc:
        raise no_memory(what, shape, np.dtype(dtype)) from exc
