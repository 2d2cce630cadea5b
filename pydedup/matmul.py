# SPDX-License-Identifier: Apache-2.0
"""Computing with a stored matrix without ever holding it: products, rows, bags of rows.

Every function walks over the blocks of a `pydedup.blocks.BlockMap`. Pages are pinned a window at a
time, so that memory stays within the pool's budget for a matrix of any size; blocks are used where
they lie in their page, or decoded into small scratch tiles. All work runs natively, without the
GIL. `read` alone returns the whole matrix.

Results are float32, or float64 for weights of float64 and of 32- or 64-bit integers: whatever holds
every weight exactly (`compute_dtype`; 64-bit integers beyond 2**53 are rounded).

Deliberately not here: names of tensors and models (:mod:`pydedup.serving`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core, codec
from pydedup.blocks import BlockMap, MatrixView
from pydedup.errors import ArgumentError
from pydedup.pool import Page, PagePool
from pydedup.types import DType

__all__ = ["ACTIVATIONS", "BAG_MODES", "activate", "bag", "compute_dtype", "matmul", "read", "take"]

#: Activations that a product can end with. ``gelu`` is the exact form, ``gelu_tanh`` the other.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
#: How the rows of a bag become one.
BAG_MODES = ("sum", "mean", "max")

_Grid: TypeAlias = tuple[int, int, int, int, int]


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
    activation: str | None = None,
    transpose: bool = False,
    threads: int = 0,
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
    threads
        0 means one per core for large products.

    Returns
    -------
    numpy.ndarray
        Shape (..., rows), or (..., cols) with ``transpose``; dtype ``compute_dtype``. The same
        bits for any number of threads and any memory budget; kernels may differ in the last bits.

    Raises
    ------
    ArgumentError
        When shapes do not fit or an input does not hold real numbers.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had; see `PagePool.windows`.
    """
    grid = block_map.grid
    dtype = compute_dtype(block_map.dtype)
    inner, outer = (grid.rows, grid.cols) if transpose else (grid.cols, grid.rows)
    given = _real(x, dtype, "x")
    if given.ndim == 0 or given.shape[-1] != inner:
        raise ArgumentError(
            f"x has shape {given.shape}; its last axis must be {inner} for a matrix of shape "
            f"({grid.rows}, {grid.cols})" + (" with transpose" if transpose else "")
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(
            f"unknown activation {activation!r}; choose one of: {', '.join(ACTIVATIONS)}"
        )
    offset = None
    if bias is not None:
        offset = _real(bias, dtype, "bias")
        if offset.shape != (outer,):
            raise ArgumentError(f"bias has shape {offset.shape}; ({outer},) is needed")
    lead = given.shape[:-1]
    rows = np.prod(lead, dtype=np.int64)
    y = np.empty((int(rows), outer), dtype)
    product = _core.Matmul(
        *_shape_of(block_map),
        given.reshape(len(y), inner),
        offset,
        activation or "none",
        transpose,
        y,
        threads,
    )
    if y.size:
        for part, pages, page_index in pool.stream(block_map.page_ids):
            product.feed(pages, page_index, block_map.slots[part])
    return y.reshape(*lead, outer)


def take(block_map: BlockMap, pool: PagePool, ids: ArrayLike, *, threads: int = 0) -> NDArray[Any]:
    """Return rows of the matrix, reading only the pages that hold them.

    Parameters
    ----------
    ids
        Integers of any shape, each at least 0 and below the number of rows.

    Returns
    -------
    numpy.ndarray
        Shape ``ids.shape + (cols,)``, in the dtype that is stored.

    Raises
    ------
    ArgumentError
        When ids are no integers or out of range.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had.
    """
    grid = block_map.grid
    wanted = _ids(ids, grid.rows)
    flat = wanted.reshape(-1)
    out = np.empty((len(flat), grid.cols), block_map.dtype.numpy)
    places = np.arange(len(flat))
    if out.size:
        to = out.view(np.uint8).reshape(len(flat), -1)
        for blocks, chosen in _rows_at_hand(block_map, pool, flat):
            _core.take_rows(
                *_shape_of(block_map), *blocks, flat[chosen], places[chosen], to, threads
            )
    return out.reshape(*wanted.shape, grid.cols)


def bag(
    block_map: BlockMap,
    pool: PagePool,
    ids: ArrayLike,
    offsets: ArrayLike | None = None,
    mode: str = "mean",
    *,
    threads: int = 0,
) -> NDArray[Any]:
    """Return the sum, mean or maximum of the rows of each bag, without gathering them first.

    Parameters
    ----------
    ids
        Row numbers: 2-D, a bag per row; or 1-D with ``offsets``.
    offsets
        Where each bag begins in 1-D ``ids``: ascending, the first one 0. A bag ends where the
        next one begins, the last one with ``ids``.
    mode
        ``"sum"``, ``"mean"`` or ``"max"`` (a NaN wins).

    Returns
    -------
    numpy.ndarray
        Shape (n_bags, cols) in ``compute_dtype``; zero for an empty bag. Summed in an order that
        depends on the layout of the pages, not on the number of threads.

    Raises
    ------
    ArgumentError
        When ids or offsets are no integers, out of range or of the wrong rank, or for an unknown
        mode.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had.
    """
    if mode not in BAG_MODES:
        raise ArgumentError(f"unknown mode {mode!r}; choose one of: {', '.join(BAG_MODES)}")
    grid = block_map.grid
    wanted = _ids(ids, grid.rows)
    counts = _bag_sizes(wanted, offsets)
    flat = wanted.reshape(-1)
    out = np.zeros((len(counts), grid.cols), compute_dtype(block_map.dtype))
    if mode == "max":
        out[counts > 0] = -np.inf
    if out.size and len(flat):
        bags = np.repeat(np.arange(len(counts)), counts)
        how = "max" if mode == "max" else "sum"
        for blocks, chosen in _rows_at_hand(block_map, pool, flat):
            _core.bag_rows(
                *_shape_of(block_map), *blocks, flat[chosen], bags[chosen], how, out, threads
            )
    if mode == "mean":
        out /= np.maximum(counts, 1)[:, None]
    return out


def read(block_map: BlockMap, pool: PagePool, *, threads: int = 0) -> NDArray[Any]:
    """Return the whole matrix, bit for bit, of shape (rows, cols) in the dtype that is stored.

    Raises PageNotFoundError, CorruptStoreError, BudgetError when the pages cannot be had.
    """
    grid = block_map.grid
    out = np.empty((grid.rows, grid.cols), block_map.dtype.numpy)
    if out.size:
        view = MatrixView(out.view(np.uint8).reshape(grid.rows, -1), block_map.dtype, grid)
        for rows, pages, page_index in pool.windows(block_map.page_ids):
            slots = block_map.slots[rows]
            codec.read_blocks(view, rows, pages, page_index, slots, threads=threads)
    return out


def activate(x: NDArray[Any], activation: str, *, threads: int = 0) -> NDArray[Any]:
    """Return an activation of `ACTIVATIONS` of float32 or float64 values, as a new array."""
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            f"unknown activation {activation!r}; choose one of: {', '.join(ACTIVATIONS)}"
        )
    if x.dtype not in (np.float32, np.float64):
        raise ArgumentError(f"activate takes float32 or float64 values, got {x.dtype}")
    out = np.array(x, order="C")
    _core.activate(out, activation, threads)
    return out


# ---- inside -------------------------------------------------------------------------------------


def _shape_of(block_map: BlockMap) -> _Grid:
    grid = block_map.grid
    return grid.rows, grid.cols, grid.block_rows, grid.block_cols, block_map.dtype.code


def _real(values: ArrayLike, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Return a C-contiguous array of ``dtype``; the same one if it is one already."""
    given = np.asarray(values)
    if given.dtype == dtype:
        return np.ascontiguousarray(given) if given.ndim else given
    if given.dtype.kind not in "biuf":
        try:
            DType.of(given.dtype)  # bf16 and f8 have kinds of their own
        except ArgumentError:
            raise ArgumentError(f"{name} must hold real numbers, not {given.dtype}") from None
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, as in any conversion
        return given.astype(dtype, order="C")


def _ids(ids: ArrayLike, rows: int) -> NDArray[np.int64]:
    given = np.asarray(ids)
    if given.size == 0 and given.dtype == np.float64:
        given = given.astype(np.int64)  # what numpy makes of an empty list
    if given.dtype.kind not in "iu":
        raise ArgumentError(f"ids must be integers, not {given.dtype}")
    if given.size:
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= rows:
            raise ArgumentError(
                f"id {low if low < 0 else high} is out of range; the matrix has {rows} rows"
            )
    return np.ascontiguousarray(given, np.int64) if given.ndim else given.astype(np.int64)


def _bag_sizes(ids: NDArray[np.int64], offsets: ArrayLike | None) -> NDArray[np.int64]:
    if ids.ndim == 2 and offsets is None:
        return np.full(ids.shape[0], ids.shape[1], np.int64)
    if ids.ndim != 1 or offsets is None:
        raise ArgumentError(
            f"ids of rank {ids.ndim} {'with' if offsets is not None else 'without'} offsets; "
            "give 2-D ids, a bag per row, or 1-D ids and offsets"
        )
    starts = np.asarray(offsets)
    if starts.ndim != 1 or (starts.dtype.kind not in "iu" and starts.size):
        raise ArgumentError(f"offsets must be a 1-D array of integers, got {starts.dtype}")
    if len(starts) == 0:
        if len(ids):
            raise ArgumentError(f"offsets name no bag for {len(ids)} ids")
        return np.empty(0, np.int64)
    edges = np.append(starts.astype(np.int64), len(ids))
    sizes = np.diff(edges)
    if edges[0] != 0 or sizes.min() < 0:
        raise ArgumentError(f"offsets must begin with 0, ascend and stay within the {len(ids)} ids")
    return sizes


def _rows_at_hand(
    block_map: BlockMap, pool: PagePool, ids: NDArray[np.int64]
) -> Iterator[
    tuple[
        tuple[NDArray[np.int64], list[Page], NDArray[np.uint32], NDArray[np.uint32]],
        NDArray[np.bool_] | slice,
    ]
]:
    """Yield sets of blocks (their numbers, pages, page index, slots) and which ids they serve.

    Over all sets every block with a piece of a wanted row comes once.
    """
    grid = block_map.grid
    block_rows = ids // grid.block_rows
    needed = np.zeros(grid.grid_rows, np.bool_)
    needed[block_rows] = True
    columns = np.arange(grid.grid_cols)
    numbers = (np.flatnonzero(needed)[:, None] * grid.grid_cols + columns).reshape(-1)
    for rows, pages, page_index in pool.windows(block_map.page_ids[numbers]):
        order = np.argsort(rows)
        blocks = numbers[rows[order]]
        chosen: NDArray[np.bool_] | slice = slice(None)
        if len(blocks) < len(numbers):
            here = np.zeros(grid.grid_rows, np.bool_)
            here[blocks // grid.grid_cols] = True
            chosen = here[block_rows]
        yield (blocks, pages, page_index[order], block_map.slots[blocks]), chosen
