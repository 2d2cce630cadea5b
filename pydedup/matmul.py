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

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core, codec
from pydedup.blocks import BlockMap, MatrixView
from pydedup.errors import ArgumentError
from pydedup.pool import Page, PagePool
from pydedup.types import DType
from pydedup.windows import Window

__all__ = [
    "ACTIVATIONS",
    "BAG_MODES",
    "Among",
    "activate",
    "activate_in_place",
    "bag",
    "checked_factors",
    "compute_dtype",
    "feed_blocks",
    "matmul",
    "read",
    "real_array",
    "take",
]

#: Activations that a product can end with. ``gelu`` is the exact form, ``gelu_tanh`` the other.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
#: How the rows of a bag become one.
BAG_MODES = ("sum", "mean", "max")

_INT64_MAX = np.iinfo(np.int64).max

_Grid: TypeAlias = tuple[int, int, int, int, int]


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
    activation: str | None = None,
    transpose: bool = False,
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
    threads
        0 means one per core for large products.
    among
        Which blocks count for which rows of a 2-D x, when ``block_map`` has several at a place.

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
    given, offset = checked_factors(block_map, x, bias, transpose)
    _check_activation(activation)
    dtype = given.dtype
    inner = given.shape[-1]
    outer = block_map.grid.cols if transpose else block_map.grid.rows
    lead = given.shape[:-1]
    y = np.empty((math.prod(lead), outer), dtype)
    product = _core.Matmul(
        *_shape_of(block_map),
        given.reshape(len(y), inner),
        offset,
        activation or "none",
        transpose,
        y,
        threads,
        None if among is None else among.variants,
        None if among is None else among.places,
    )
    if y.size:
        feed_blocks(product, block_map, pool, None if among is None else among.members)
    return y.reshape(*lead, outer)


def checked_factors(
    block_map: BlockMap, x: ArrayLike, bias: ArrayLike | None, transpose: bool
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return x and bias as kernels take them. Raises ArgumentError as `matmul` does."""
    grid = block_map.grid
    dtype = compute_dtype(block_map.dtype)
    inner, outer = (grid.rows, grid.cols) if transpose else (grid.cols, grid.rows)
    given = real_array(x, dtype, "x")
    if given.ndim == 0 or given.shape[-1] != inner:
        raise ArgumentError(
            f"x has shape {given.shape}; its last axis must be {inner} for a matrix of shape "
            f"({grid.rows}, {grid.cols})" + (" with transpose" if transpose else "")
        )
    offset = None
    if bias is not None:
        offset = real_array(bias, dtype, "bias")
        if offset.shape != (outer,):
            raise ArgumentError(f"bias has shape {offset.shape}; ({outer},) is needed")
    return given, offset


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(
            f"unknown activation {activation!r}; choose one of: {', '.join(ACTIVATIONS)}"
        )


def feed_blocks(
    product: _core.Matmul | _core.Conv2d,
    block_map: BlockMap,
    pool: PagePool,
    members: NDArray[np.uint64] | None = None,
) -> None:
    """Give a product all blocks of a matrix in order, deltas with their bases.

    ``members`` is `Among.members`, for a Matmul only. Windows whose pages are all here are used out
    of the pool, and what has to be decoded of them is kept where there is memory for that.
    """

    def at_once(window: Window) -> bool:
        return product.feed_resident(
            pool.native, _blocks_in(window, block_map), **_of(members, window.rows)
        )

    for part, pages, page_index, bases in pool.stream_with_bases(
        block_map.page_ids, block_map.bases, at_once
    ):
        slots, at = block_map.slots[part], codec.bases_for_core(bases)
        product.feed(pages, page_index, slots, at, **_of(members, part))


def _blocks_in(window: Window, block_map: BlockMap) -> _core.BlockWindow:
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
    wanted = _ids(ids)
    flat = wanted.reshape(-1)
    cols = block_map.grid.cols
    out = np.empty((len(flat), cols * block_map.dtype.itemsize), np.uint8)
    table = _row_table(block_map)
    missing = table.take(pool.native, flat, out, threads)
    if missing is not None and block_map.bases is not None:
        for blocks in _blocks_of_rows(block_map, pool, flat):
            table.take_blocks(*blocks, flat, out, threads)
    elif missing is not None:
        for page_ids, pages in _windows(pool, missing):
            table.take_from(page_ids, pages, flat, out, threads)
    return out.reshape(-1).view(block_map.dtype.numpy).reshape(*wanted.shape, cols)


def bag(
    block_map: BlockMap,
    pool: PagePool,
    ids: ArrayLike,
    offsets: ArrayLike | None = None,
    mode: str = "mean",
    *,
    weights: ArrayLike | None = None,
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
    weights
        A factor for each of the ids, in their shape; with ``"sum"`` only.

    Returns
    -------
    numpy.ndarray
        Shape (n_bags, cols) in ``compute_dtype``; zero for an empty bag. Summed in an order that
        depends on the layout of the pages, not on the number of threads.

    Raises
    ------
    ArgumentError
        When ids or offsets are no integers, out of range or of the wrong rank, when weights do not
        have the shape of ids or come with another mode than ``"sum"``, or for an unknown mode.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had.
    """
    if mode not in BAG_MODES:
        raise ArgumentError(f"unknown mode {mode!r}; choose one of: {', '.join(BAG_MODES)}")
    wanted = _ids(ids)
    edges = _bag_edges(wanted, offsets)
    dtype = compute_dtype(block_map.dtype)
    factors = None
    if weights is not None:
        factors = real_array(weights, dtype, "weights")
        if mode != "sum":
            raise ArgumentError(f"weights go with mode 'sum' only, not {mode!r}")
        if factors.shape != wanted.shape:
            raise ArgumentError(
                f"weights have shape {factors.shape}; that of ids, {wanted.shape}, is needed"
            )
        factors = factors.reshape(-1)
    flat = wanted.reshape(-1)
    counts = np.diff(edges)
    out = np.zeros((len(counts), block_map.grid.cols), dtype)
    if mode == "max":
        out[counts > 0] = -np.inf
    table = _row_table(block_map)
    how = "max" if mode == "max" else "sum"
    missing = table.bag(pool.native, flat, edges, factors, how, out, threads)
    if missing is not None and block_map.bases is not None:
        for blocks in _blocks_of_rows(block_map, pool, flat):
            table.bag_blocks(*blocks, flat, edges, factors, how, out, threads)
    elif missing is not None:
        for page_ids, pages in _windows(pool, missing):
            table.bag_from(page_ids, pages, flat, edges, factors, how, out, threads)
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
        walk = pool.windows_with_bases(block_map.page_ids, block_map.bases)
        for rows, pages, page_index, bases in walk:
            slots = block_map.slots[rows]
            codec.read_blocks(view, rows, pages, page_index, slots, bases=bases, threads=threads)
    return out


def activate(x: NDArray[Any], activation: str, *, threads: int = 0) -> NDArray[Any]:
    """Return an activation of `ACTIVATIONS` of float32 or float64 values, as a new array."""
    _check_activation(activation)
    if x.dtype not in (np.float32, np.float64):
        raise ArgumentError(f"activate takes float32 or float64 values, got {x.dtype}")
    out = np.array(x, order="C")
    _core.activate(out, activation, threads)
    return out


def activate_in_place(y: NDArray[Any], activation: str) -> None:
    """Apply an activation of `ACTIVATIONS` to float32 or float64 values, C-contiguous."""
    _core.activate(y, activation, 0)


# ---- inside -------------------------------------------------------------------------------------


def _shape_of(block_map: BlockMap) -> _Grid:
    grid = block_map.grid
    return grid.rows, grid.cols, grid.block_rows, grid.block_cols, block_map.dtype.code


def _as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ArgumentError(f"{name} does not make an array: {error}") from error


def real_array(values: ArrayLike, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Return a C-contiguous, aligned array of ``dtype``; the same one if it is one already."""
    given = _as_array(values, name)
    if given.dtype == dtype:
        return np.require(given, requirements=["C", "A"])
    if given.dtype.kind not in "biuf":
        try:
            DType.of(given.dtype)  # bf16 and f8 have kinds of their own
        except ArgumentError:
            raise ArgumentError(f"{name} must hold real numbers, not {given.dtype}") from None
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, as in any conversion
        return given.astype(dtype, order="C")


def _ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Return ids as int64; that they are in range, the core checks."""
    given = _as_array(ids, "ids")
    if given.size == 0 and given.dtype == np.float64:
        given = given.astype(np.int64)  # what numpy makes of an empty list
    if given.dtype.kind not in "iu":
        raise ArgumentError(f"ids must be integers, not {given.dtype}")
    if given.dtype == np.uint64 and given.size and int(given.max()) > _INT64_MAX:
        raise ArgumentError(f"id {int(given.max())} is out of range")
    ready: NDArray[np.int64] = np.require(given, np.int64, ["C", "A"])
    return ready


def _bag_edges(ids: NDArray[np.int64], offsets: ArrayLike | None) -> NDArray[np.int64]:
    """Return where each bag begins in the flat ids, and the end of the last one."""
    if ids.ndim == 2 and offsets is None:
        regular: NDArray[np.int64] = np.arange(ids.shape[0] + 1, dtype=np.int64) * ids.shape[1]
        return regular
    if ids.ndim != 1 or offsets is None:
        raise ArgumentError(
            f"ids of rank {ids.ndim} {'with' if offsets is not None else 'without'} offsets; "
            "give 2-D ids, a bag per row, or 1-D ids and offsets"
        )
    starts = _as_array(offsets, "offsets")
    if starts.ndim != 1 or (starts.dtype.kind not in "iu" and starts.size):
        raise ArgumentError(f"offsets must be a 1-D array of integers, got {starts.dtype}")
    if len(starts) == 0:
        if len(ids):
            raise ArgumentError(f"offsets name no bag for {len(ids)} ids")
        return np.zeros(1, np.int64)
    edges = np.append(starts.astype(np.int64), len(ids))
    if edges[0] != 0 or np.diff(edges).min() < 0:
        raise ArgumentError(f"offsets must begin with 0, ascend and stay within the {len(ids)} ids")
    return edges


@dataclass(frozen=True, slots=True)
class _Known:
    """The table of a block map, as long as its page ids live: they and the slots never change."""

    page_ids: weakref.ref[NDArray[np.int64]]
    slots: NDArray[np.uint32]
    base_slots: NDArray[np.uint32] | None
    shape: _Grid
    table: _core.RowTable


_tables: dict[int, _Known] = {}


def _row_table(block_map: BlockMap) -> _core.RowTable:
    page_ids, shape = block_map.page_ids, _shape_of(block_map)
    key = id(page_ids)
    known = _tables.get(key)
    if (
        known is not None
        and known.page_ids() is page_ids
        and known.slots is block_map.slots
        and known.base_slots is block_map.base_slots
        and known.shape == shape
    ):
        return known.table
    table = _core.RowTable(
        *shape, page_ids, block_map.slots, block_map.base_page_ids, block_map.base_slots
    )
    gone = weakref.ref(page_ids, lambda _: _tables.pop(key, None))
    _tables[key] = _Known(gone, block_map.slots, block_map.base_slots, shape, table)
    return table


def _windows(
    pool: PagePool, page_ids: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], list[Page]]]:
    """Yield these pages, given in ascending order, as many together as the budget lets in."""
    for rows, pages, _ in pool.windows(page_ids):
        yield page_ids[rows], pages


_Blocks: TypeAlias = tuple[
    NDArray[np.int64], list[Page], NDArray[np.uint32], NDArray[np.uint32], "_core.Bases | None"
]


def _blocks_of_rows(
    block_map: BlockMap, pool: PagePool, ids: NDArray[np.int64]
) -> Iterator[_Blocks]:
    """Yield the blocks with a piece of these rows, each once: the first arguments of take_blocks.

    A delta needs two pages at a time, so it is blocks that are walked over here, not pages.
    """
    grid = block_map.grid
    rows = np.unique(ids // grid.block_rows)
    numbers = (rows[:, None] * grid.grid_cols + np.arange(grid.grid_cols)).reshape(-1)
    slots = block_map.slots[numbers]
    bases = block_map.bases
    if bases is not None:
        bases = bases[0][numbers], bases[1][numbers]
    for part, pages, page_index, here in pool.windows_with_bases(
        block_map.page_ids[numbers], bases
    ):
        yield numbers[part], pages, page_index, slots[part], codec.bases_for_core(here)
