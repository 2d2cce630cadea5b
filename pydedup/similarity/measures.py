# SPDX-License-Identifier: Apache-2.0
"""Exact distances between blocks, and the magnitude of a block, each in one pass.

Deliberately not here: which blocks are worth comparing (`pydedup.similarity.index`).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup.arguments import as_block_shape, as_count, as_integers, check_array
from pydedup.errors import ArgumentError
from pydedup.similarity._arguments import as_float, as_number, blocks_of

__all__ = ["Distances", "distances", "magnitude", "upper_bounds"]

# By how much of itself a relative distance may be off: squares are added up in f32, 64 at a time.
_ROUNDING = 5e-6


class Distances(NamedTuple):
    """What `distances` found, one entry per pair.

    Attributes
    ----------
    relative_l2
        float64: |a - b| / |a|; 0 for two zero blocks, infinity where only a is zero. It may be off
        by a few millionths of itself (`upper_bounds`).
    max_difference
        float64: greatest |a - b|.
    share_within
        float64: entries with |a - b| <= eps / entries; None without ``eps``.
    """

    relative_l2: NDArray[np.float64]
    max_difference: NDArray[np.float64]
    share_within: NDArray[np.float64] | None


def distances(
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    eps: float | None = None,
    limit: float | None = None,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    threads: int = 0,
) -> Distances:
    """Compare blocks pair by pair, in one pass over each pair.

    Parameters
    ----------
    a
        Blocks (n, ...) of float32, float64, float16 or bfloat16. Up to three axes are read where
        they lie if the last is dense; more must be C-contiguous.
    b
        Blocks of the same shape, or one block (...) for all of a.
    pairs
        Which block of a and which of b are compared, int64 (n,) each: then neither is copied, and
        there may be any number of both. By default each with the one at its place.
    eps
        Also count the entries that differ by at most this.
    limit
        Stop at pairs that are farther than this relative distance: their ``relative_l2`` is
        infinity, and the rest NaN.
    threads
        0 chooses by size.

    Returns
    -------
    Distances
        A pair in which a NaN or an infinity occurs is infinitely far, and never within a limit. The
        same bits from every kernel.

    Raises
    ------
    ArgumentError
        When shapes or dtypes differ, pairs name a block that is not there, or eps or limit is
        negative or no number.
    """
    check_array(a, "a")
    check_array(b, "b")
    dtype = as_float(a.dtype, "a")
    if b.dtype != a.dtype:
        raise ArgumentError(f"b has dtype {b.dtype}, but a has {a.dtype}")
    if pairs is None and b.shape not in (a.shape, a.shape[1:]):
        raise ArgumentError(f"b has shape {b.shape}; with a of {a.shape}, give that or one block")
    one = pairs is None and b.shape != a.shape
    left, shape = blocks_of(a, "a")
    right, other = blocks_of(b[np.newaxis] if one else b, "b")
    if other != shape:
        raise ArgumentError(f"blocks of b have shape {other}; those of a have {shape}")
    if pairs is None:
        numbers = np.arange(len(left), dtype=np.int64)
        pairs = numbers, np.zeros_like(numbers) if one else numbers
    try:
        of_a, of_b = pairs
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"pairs must be two arrays of block numbers, not {pairs!r:.100}"
        ) from error
    found = _core.compare_blocks(
        left,
        right,
        dtype.code,
        *shape,
        as_integers("pairs[0]", of_a, np.int64),
        as_integers("pairs[1]", of_b, np.int64),
        0.0 if eps is None else as_number(eps, "eps"),
        math.inf if limit is None else as_number(limit, "limit"),
        as_count("threads", threads),
    )
    return Distances(found[:, 0], found[:, 1], None if eps is None else found[:, 2])


def upper_bounds(relative_l2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return upper bounds of the true distances, for some that `distances` found."""
    return relative_l2 * (1 + _ROUNDING)


def magnitude(
    blocks: NDArray[Any], block_shape: tuple[int, int] | None = None, *, threads: int = 0
) -> NDArray[np.float64]:
    """Return the third quartile of the absolute values of each block.

    Parameters
    ----------
    blocks
        Blocks (n, ...) of float32, float64, float16 or bfloat16; or, with ``block_shape``, a matrix
        whose blocks are looked at where they lie, edge blocks in their true size.
    block_shape
        (rows, cols) of a block of the matrix.
    threads
        0 chooses by size.

    Returns
    -------
    numpy.ndarray
        float64 per block (of a matrix: row-major), what ``numpy.percentile(abs(block), 75)`` gives
        in float64: linear between the two elements around the rank. NaN for a block with a NaN;
        infinity between two infinite elements, of which numpy makes NaN.

    Raises
    ------
    ArgumentError
        For another dtype, a matrix that is none, or a block shape that cannot be.

    Notes
    -----
    By selection, in time linear in the elements (Floyd and Rivest 1975: a sample brackets the
    rank, one pass keeps what is between).
    """
    check_array(blocks, "blocks")
    dtype = as_float(blocks.dtype, "blocks")
    workers = as_count("threads", threads)
    if block_shape is None:
        batch, shape = blocks_of(blocks, "blocks")
        return _core.block_magnitudes(batch, dtype.code, *shape, False, workers)
    if blocks.ndim != 2:
        raise ArgumentError(f"blocks is {blocks.ndim}-D; with a block_shape give a matrix")
    height, width = as_block_shape(block_shape, most=2**31 - 1)
    down, across = blocks.shape[0] // height, blocks.shape[1] // width
    bottom, right = blocks.shape[0] - down * height, blocks.shape[1] - across * width
    out = np.empty((down + (bottom > 0), across + (right > 0)))
    # Blocks of one size at a time: the number of the first row or column, how many, and their side.
    for (row, n_rows, tall), (col, n_cols, wide) in itertools.product(
        ((0, down, height), (down, 1, bottom)), ((0, across, width), (across, 1, right))
    ):
        if n_rows * tall == 0 or n_cols * wide == 0:
            continue
        top, left = row * height, col * width
        part = blocks[top : top + n_rows * tall, left : left + n_cols * wide]
        found = _core.block_magnitudes(part, dtype.code, tall, wide, True, workers)
        out[row : row + n_rows, col : col + n_cols] = found.reshape(n_rows, n_cols)
    return out.reshape(-1)
