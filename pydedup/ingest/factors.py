# SPDX-License-Identifier: Apache-2.0
"""Two thin matrices whose product is most of a difference, in whole numbers.

An adapter that was merged into a model moves each weight matrix by a product B A of low rank (Hu et
al., *LoRA*, ICLR 2022); what is left of the difference is how the sums were rounded. The factors
are found by a randomised singular value decomposition (Halko, Martinsson and Tropp, *Finding
structure with randomness*, SIAM Review 2011, algorithms 4.4 and 5.1), refined by weighted least
squares, and written as integers, as coarse as what is left allows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_RANK", "Factors", "factor_bytes", "find_factors", "seems_low_rank"]

#: Of a delta (docs/format.md, "Factors").
MAX_RANK = 64
_LARGEST = (1 << 23) - 1
_LEAST_EXPONENT = -900

# Columns that the range is looked for with: first for ranks up to 20, then for all.
_SKETCHES = (24, 72)
# A singular value of noise is at most sigma (sqrt(m) + sqrt(n)), but for a little.
_ABOVE_NOISE = 1.1
# Ranks that are refined, at a cost of their square.
_MOST_REFINED = 32
# Rows whose weights are in memory.
_STRIP = 128
# Of the spacing of floats: how far the product may be off.
_FINEST, _COARSEST = 1 / 256, 1 / 8
# Of the size of a matrix: what is less is what sums in f64 were rounded to.
_OF_F64 = 2.0**-40
# Of setting how many threads numpy uses, which is said for all of a process.
_THREADS = threading.Lock()
# Squares that are left, of those of one rounding: one version after another was rounded.
_MOST_NOISE = 16
# Of all squares of a sample: of rows of noise alone about a quarter is left.
_MOST_REST = 0.15


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix as ``2**exponent * of_rows.T @ of_cols``.

    Attributes
    ----------
    exponent
        Of two.
    of_rows, of_cols
        int32 (rank, rows) and (rank, columns), each below 2**23 in magnitude.
    """

    exponent: int
    of_rows: NDArray[np.int32]
    of_cols: NDArray[np.int32]


def seems_low_rank(sample: NDArray[np.float64], spacing: NDArray[np.float32], error: float) -> bool:
    """Return whether a part of a matrix leaves little but noise behind when its rank is reduced.

    Parameters are those of `find_factors`, but for a few rows and columns. Weights that were all
    trained have a rank near to a low one, too, but only near.
    """
    if not np.isfinite(sample).all():
        return False
    products = sample @ sample.T if sample.shape[0] < sample.shape[1] else sample.T @ sample
    squares = np.linalg.eigvalsh(products)
    rest = squares[: max(len(squares) // 2, len(squares) - MAX_RANK)].sum()
    noise = max(_size(spacing) / 12**0.5, error)
    most = _MOST_NOISE * noise**2 * np.count_nonzero(spacing)
    return bool(rest <= min(most, _MOST_REST * squares.sum()))


def find_factors(
    difference: NDArray[np.float64], spacing: NDArray[np.float32], epsilon: float, error: float
) -> Factors | None:
    """Return factors of most of a matrix, ``None`` where it has no low rank.

    Parameters
    ----------
    difference
        float64 (m, n), finite.
    spacing
        Of the floats that the elements are differences to, float32 (m, n): what a sum was rounded
        to. Where it is 0, the difference is, too.
    epsilon
        The spacing of these floats at 1.
    error
        How far, as a root mean square, the product may be off besides.
    """
    try:
        with _one_thread():
            return _find(difference, spacing, epsilon, error)
    except np.linalg.LinAlgError:  # it did not converge, or equations say nothing
        return None


def _find(
    difference: NDArray[np.float64], spacing: NDArray[np.float32], epsilon: float, error: float
) -> Factors | None:
    rows, cols = difference.shape
    coarse = _size(spacing)
    error = max(error, _size(difference) * _OF_F64)
    noise = max(coarse / 12**0.5, error)
    total = float(np.vdot(difference, difference))
    for width in _SKETCHES:
        left, values, right = _decomposed(difference, min(width, rows, cols))
        least = _ABOVE_NOISE * _noise_of(spacing, total, values, noise)
        rank = int((values > least * (rows**0.5 + cols**0.5)).sum())
        if rank < min(width - 3, MAX_RANK + 1):
            break
    else:
        return None
    rest = max(total - float((values[:rank] ** 2).sum()), 0.0)
    if rank == 0 or rest > 0.5 * total:
        return None
    of_rows, of_cols = left[:, :rank].T * values[:rank, None], right[:rank]
    if error < coarse and rank <= _MOST_REFINED:
        if rows >= cols:
            of_rows, of_cols = _refined(difference, spacing, epsilon, of_cols)
        else:
            of_cols, of_rows = _refined(difference.T, spacing.T, epsilon, of_rows)
    # What is off costs a few bits of each element, and a bit of the factors halves it.
    share = min(max(rank * (rows + cols) / difference.size, _FINEST), _COARSEST)
    return _in_whole_numbers(of_rows, of_cols, max(coarse * share, error))


def _noise_of(
    spacing: NDArray[np.float32], total: float, values: NDArray[np.float64], least: float
) -> float:
    """Return the root mean square of what is no part of the first singular values.

    That is more than of one rounding, the least there is, where a base was itself a merged model.
    """
    rows, cols = (side - len(values) for side in spacing.shape)
    count = rows * cols * np.count_nonzero(spacing) / spacing.size
    if count <= 0:
        return least
    rest = max(total - float((values**2).sum()), 0.0) / count
    return float(min(max(rest**0.5, least), _MOST_NOISE**0.5 * least))


def factor_bytes(factors: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return what each of some factors takes in a delta; they are int32 (count, rank, numbers)."""
    magnitudes = np.abs(factors).max(axis=2, initial=0)
    bits = np.where(magnitudes > 0, np.frexp(magnitudes.astype(np.float64))[1] + 1, 0)
    taken = factors.shape[1] - (-bits.sum(axis=1) * factors.shape[2] // 8)
    return np.asarray(taken, np.int64)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let numpy multiply matrices on this thread alone.

    So the result does not depend on the number of cores; and where others want these too, threads
    that wait for each other take ten times as long.
    """
    import threadpoolctl  # type: ignore[import-untyped]  # not before it is wanted

    with _THREADS, threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield


def _decomposed(
    matrix: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the first singular vectors and values, so many."""
    drawn = np.random.default_rng(0).standard_normal((matrix.shape[1], width))
    basis = np.linalg.qr(matrix @ drawn)[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ basis)[0]
    inner, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner, values, right


def _refined(
    difference: NDArray[np.float64],
    spacing: NDArray[np.float32],
    epsilon: float,
    of_cols: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return better factors: where floats lie closer, a difference says more.

    Weighted least squares, for the rows' factor and then for that of the columns, which are no more
    than rows: of each there is a matrix in memory (as Gabriel and Zamir,
    *Lower rank approximation of matrices by least squares with any choice of weights*, 1979).
    """
    # What was added was itself rounded.
    least = _size(difference) * epsilon
    rank, (rows, cols) = len(of_cols), difference.shape
    one, other = np.triu_indices(rank)
    in_pairs = (of_cols[one] * of_cols[other]).T
    of_rows = np.empty((rank, rows))
    products, sums = np.zeros((cols, len(one))), np.zeros((cols, rank))
    for start in range(0, rows, _STRIP):
        strip = slice(start, start + _STRIP)
        weights = 1 / np.maximum(spacing[strip], least).astype(np.float64) ** 2
        weighted = weights * difference[strip]
        some = _solved(weights @ in_pairs, weighted @ of_cols.T)
        of_rows[:, strip] = some
        products += weights.T @ (some[one] * some[other]).T
        sums += weighted.T @ some.T
    return of_rows, _solved(products, sums)


def _solved(products: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the solutions of normal equations, of whose matrices there is the upper half."""
    count, rank = sums.shape
    one, other = np.triu_indices(rank)
    normal = np.empty((count, rank, rank))
    normal[:, one, other] = normal[:, other, one] = products
    return np.ascontiguousarray(np.linalg.solve(normal, sums[:, :, None])[:, :, 0].T)


def _size(values: NDArray[Any]) -> float:
    """Return the root mean square of what is not 0: blocks may be left out."""
    count = max(np.count_nonzero(values), 1)
    return float((np.square(values, dtype=np.float64).sum() / count) ** 0.5)


def _in_whole_numbers(
    of_rows: NDArray[np.float64], of_cols: NDArray[np.float64], allowed: float
) -> Factors | None:
    """Return factors whose rounding moves their product by no more than that."""
    sizes_of_rows = np.sqrt((of_rows**2).mean(axis=1, keepdims=True))
    sizes_of_cols = np.sqrt((of_cols**2).mean(axis=1, keepdims=True))
    sizes = sizes_of_rows * sizes_of_cols  # of each part of the product
    # Two factors of one size, rounded to integers, are off by 1/12 each: together by
    # sizes * 2**exponent / 6.
    exponent = int(np.floor(np.log2(6 * allowed**2 / sizes.sum())))
    scales = np.sqrt(sizes * 2.0**-exponent)
    of_rows = of_rows * (scales / sizes_of_rows)
    of_cols = of_cols * (scales / sizes_of_cols)
    largest = float(max(np.abs(of_rows).max(), np.abs(of_cols).max()))
    if not np.isfinite(largest):
        return None
    if largest > _LARGEST:
        too_many = int(np.ceil(np.log2(largest / _LARGEST)))
        exponent += 2 * too_many
        of_rows, of_cols = of_rows * 2.0**-too_many, of_cols * 2.0**-too_many
    if not _LEAST_EXPONENT <= exponent <= -_LEAST_EXPONENT:
        return None
    whole = [np.rint(factor).astype(np.int32) for factor in (of_rows, of_cols)]
    return Factors(exponent, *whole)
