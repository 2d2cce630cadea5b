# SPDX-License-Identifier: Apache-2.0
"""Rows of a stored matrix, and sums, means and maxima of them: the lookups of embeddings.

Only pages that hold one of the rows are read. Pages are pinned a window at a time, so that memory
stays within the pool's budget; rows are taken where they lie in their page, or out of blocks that
are decoded into small scratch tiles. All work runs natively, without the GIL.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core, codec
from pydedup.arguments import as_array, as_count, no_memory
from pydedup.blocks import BlockMap
from pydedup.errors import ArgumentError
from pydedup.matmul import Shape, compute_dtype, real_array, room_for, shape_of
from pydedup.pool import Page, PagePool
from pydedup.sets import distinct
from pydedup.words import BagMode, check_word

__all__ = ["BAG_MODES", "bag", "take"]

#: How the rows of a bag become one.
BAG_MODES = get_args(BagMode)

_INT64_MAX = np.iinfo(np.int64).max


def take(
    block_map: BlockMap, pool: PagePool, ids: ArrayLike, *, each: int = 1, threads: int = 0
) -> NDArray[Any]:
    """Return rows of the matrix, reading only the pages that hold them.

    Parameters
    ----------
    ids
        Integers of any shape, each at least 0 and below the number of rows.
    each
        How many rows, one below the other, an id stands for: of a stack of matrices, those of one.

    Returns
    -------
    numpy.ndarray
        Shape ``ids.shape + (each * cols,)``, in the dtype that is stored.

    Raises
    ------
    ArgumentError
        When ids are no integers or out of range.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had, or there is no memory for the result.
    """
    threads = as_count("threads", threads)
    wanted = _ids(ids)
    flat = wanted.reshape(-1)
    if each != 1:
        flat = _rows_of(flat, each, block_map.grid.rows // each)
    cols = block_map.grid.cols
    out = room_for((len(flat), cols * block_map.dtype.itemsize), np.dtype(np.uint8))
    table = _row_table(block_map)
    missing = table.take(pool.native, flat, out, threads)
    if missing is not None and block_map.bases is not None:
        for blocks in _blocks_of_rows(block_map, pool, flat):
            table.take_blocks(*blocks, flat, out, threads)
    elif missing is not None:
        for rows, pages, _ in pool.windows(missing):
            table.take_from(missing[rows], pages, flat, out, threads)
    return out.reshape(-1).view(block_map.dtype.numpy).reshape(*wanted.shape, each * cols)


def bag(
    block_map: BlockMap,
    pool: PagePool,
    ids: ArrayLike,
    offsets: ArrayLike | None = None,
    mode: BagMode = "mean",
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
        Shape (n_bags, cols) in ``compute_dtype``; zero for an empty bag. Rows are added up by
        ascending ids, one by one: the same bits with any number of threads, any budget, any order
        of ids and however the matrix is stored. What a bag has of one id with several weights is
        added up in the order in which these are given.

    Raises
    ------
    ArgumentError
        When ids or offsets are no integers, out of range or of the wrong rank, when weights do not
        have the shape of ids or come with another mode than ``"sum"``, or for an unknown mode.
    PageNotFoundError, CorruptStoreError, BudgetError
        When the pages cannot be had, or there is no memory for the result.
    """
    check_word("mode", mode, BAG_MODES)
    threads = as_count("threads", threads)
    wanted = _ids(ids)
    edges = _bag_edges(wanted, offsets)
    dtype = compute_dtype(block_map.dtype)
    factors = None
    if weights is not None:
        factors = real_array(weights, dtype, "weights").astype(np.float64, copy=False)
        if mode != "sum":
            raise ArgumentError(f"weights go with mode 'sum' only, not {mode!r}")
        if factors.shape != wanted.shape:
            raise ArgumentError(
                f"weights have shape {factors.shape}; that of ids, {wanted.shape}, is needed"
            )
        factors = factors.reshape(-1)
    flat = wanted.reshape(-1)
    bags = _core.Bags(flat, edges, factors)
    counts = np.diff(edges)
    out = room_for((len(counts), block_map.grid.cols), dtype)
    out.fill(0)
    if mode == "max":
        out[counts > 0] = -np.inf
    table = _row_table(block_map)
    how = "max" if mode == "max" else "sum"
    missing = table.bag(pool.native, bags, how, out, threads)
    if missing is not None:
        for blocks in _blocks_of_rows(block_map, pool, flat):
            table.bag_blocks(*blocks, bags, how, out, threads)
    if mode == "mean":
        out /= np.maximum(counts, 1)[:, None]
    return out


# ---- inside -------------------------------------------------------------------------------------


def _ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Return ids as int64; that they are in range, the core checks."""
    given = as_array(ids, "ids")
    if given.size == 0 and given.dtype == np.float64:
        given = given.astype(np.int64)  # what numpy makes of an empty list
    if given.dtype.kind not in "iu":
        raise ArgumentError(f"ids must be integers, not {given.dtype}")
    if given.dtype == np.uint64 and given.size and int(given.max()) > _INT64_MAX:
        raise ArgumentError(f"id {int(given.max())} is out of range")
    try:
        ready: NDArray[np.int64] = np.require(given, np.int64, ["C", "A"])
    except MemoryError as exc:
        raise no_memory("a copy of ids", given.shape, np.dtype(np.int64)) from exc
    return ready


def _rows_of(ids: NDArray[np.int64], each: int, count: int) -> NDArray[np.int64]:
    """Return the rows that these ids, each below ``count``, stand for."""
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise ArgumentError(
            f"ids from {ids.min()} to {ids.max()} are not all from 0 to {count - 1}"
        )
    return (ids[:, None] * each + np.arange(each)).reshape(-1)


def _bag_edges(ids: NDArray[np.int64], offsets: ArrayLike | None) -> NDArray[np.int64]:
    """Return where each bag begins in the flat ids, and the end of the last one."""
    if ids.ndim == 2 and offsets is None:
        try:
            regular: NDArray[np.int64] = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
        except MemoryError as exc:  # of bags without ids there may be any number
            raise no_memory("where bags begin", (len(ids) + 1,), np.dtype(np.int64)) from exc
        return regular
    if ids.ndim != 1 or offsets is None:
        raise ArgumentError(
            f"ids of rank {ids.ndim} {'with' if offsets is not None else 'without'} offsets; "
            "give 2-D ids, a bag per row, or 1-D ids and offsets"
        )
    starts = as_array(offsets, "offsets")
    if starts.ndim != 1 or (starts.dtype.kind not in "iu" and starts.size):
        raise ArgumentError(f"offsets must be a 1-D array of integers, got {starts.dtype}")
    if len(starts) == 0:
        if len(ids):
            raise ArgumentError(f"offsets name no bag for {len(ids)} ids")
        return np.zeros(1, np.int64)
    try:
        edges = np.append(starts.astype(np.int64), len(ids))
    except MemoryError as exc:
        raise no_memory("a copy of offsets", starts.shape, np.dtype(np.int64)) from exc
    if edges[0] != 0 or np.diff(edges).min() < 0:
        raise ArgumentError(f"offsets must begin with 0, ascend and stay within the {len(ids)} ids")
    return edges


@dataclass(frozen=True, slots=True)
class _Known:
    """The table of a block map, as long as its page ids live: they and the slots never change."""

    page_ids: weakref.ref[NDArray[np.int64]]
    slots: NDArray[np.uint32]
    base_slots: NDArray[np.uint32] | None
    shape: Shape
    table: _core.RowTable


_tables: dict[int, _Known] = {}
# In a forked child the lock of one may be held for ever, by a thread that is not there.
os.register_at_fork(after_in_child=_tables.clear)


def _row_table(block_map: BlockMap) -> _core.RowTable:
    page_ids, shape = block_map.page_ids, shape_of(block_map)
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
    tables = _tables  # of a module, names are None once the interpreter has ended it
    gone = weakref.ref(page_ids, lambda _: tables.pop(key, None))
    tables[key] = _Known(gone, block_map.slots, block_map.base_slots, shape, table)
    return table


_Blocks: TypeAlias = tuple[
    NDArray[np.int64], list[Page], NDArray[np.uint32], NDArray[np.uint32], "_core.Bases | None"
]


def _blocks_of_rows(
    block_map: BlockMap, pool: PagePool, ids: NDArray[np.int64]
) -> Iterator[_Blocks]:
    """Yield the blocks with a piece of these rows, ascending: the first arguments of take_blocks.

    Sums need that order, and a delta needs two pages at a time, so it is blocks that are walked
    over here, not pages.
    """
    grid = block_map.grid
    rows = distinct(ids // grid.block_rows)
    numbers = (rows[:, None] * grid.grid_cols + np.arange(grid.grid_cols)).reshape(-1)
    slots = block_map.slots[numbers]
    bases = block_map.bases
    if bases is not None:
        bases = bases[0][numbers], bases[1][numbers]
    walk = pool.stream(block_map.page_ids[numbers], bases, once=True)
    for part, pages, page_index, here in walk:
        yield numbers[part], pages, page_index, slots[part], codec.bases_for_core(here)
