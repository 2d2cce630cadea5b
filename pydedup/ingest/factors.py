# SPDX-License-Identifier: Apache-2.0
"""Two thin matrices whose product is most of a difference, in whole numbers.

An adapter that was merged into a model moves each weight matrix by a product B A of low rank (Hu et
al., *LoRA*, ICLR 2022); what is left of the difference is how the sums were rounded. The factors
are found by a singular value decomposition, refined by weighted least squares, and written as
integers, as coarse as what is left allows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.arguments import as_dtype
from pydedup.ingest.decomposition import decomposed, one_thread

__all__ = [
    "MAX_RANK",
    "Difference",
    "Factors",
    "factor_bytes",
    "find_factors",
    "refit",
    "seems_low_rank",
]

#: Of a delta (docs/format.md, "Version 3").
MAX_RANK = 64
_LARGEST = (1 << 23) - 1
_LEAST_EXPONENT = -900

# Columns that the range is looked for with: first for ranks up to 20, then for all.
_SKETCHES = (24, 72)
# A singular value of noise is at most sigma (sqrt(m) + sqrt(n)), but for a little.
_ABOVE_NOISE = 1.1
# Ranks that are refined, at a cost of their square.
_MOST_REFINED = 32
# Elements that are in memory as f64, or rows where that is more.
_STRIP, _STRIP_ROWS = 16 * 1024, 32
_BF16_MANTISSA = 7
_WIDE = np.dtype(np.float64)
# Of the spacing of floats: how far the product may be off.
_FINEST, _COARSEST = 1 / 256, 1 / 8
# Of the size of a matrix: what is less is what its differences were rounded to.
_OF_F32 = 2.0**-25
# Squares that are left, of those of one rounding: one version after another was rounded; those of a
# sample, whose noise is cut in half (about 0.3 for each rounding, and 8 and more where bf16 weights
# were all trained by 1 %); and those of a factor of columns that fits other rows as well.
_MOST_NOISE, _MOST_OF_SAMPLE, _AS_WELL = 16, 4, 2
# Of all squares of a sample: of rows of noise alone about a quarter is left.
_MOST_REST = 0.15
# Of all squares: more than sums of them are rounded by.
_SLACK = 1e-9
# Rows or columns of a sample that differ, at least.
_LEAST_SAMPLE = 2


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


class Difference:
    """A matrix of floats minus another, and how these floats were rounded.

    Parameters
    ----------
    values
        The floats, (m, n) of f32, f16 or bf16; they are borrowed.
    apart
        What they differ by, float32 (m, n).

    Attributes
    ----------
    epsilon
        The spacing of these floats at 1.
    size, coarse
        Root mean squares of the floats and of the spacing of floats at each.
    """

    def __init__(self, values: NDArray[Any], apart: NDArray[np.float32]) -> None:
        self.apart = apart
        self.values = values
        used = 0
        for strip in self.strips():
            bits = np.ascontiguousarray(values[strip]).view(f"u{values.itemsize}")
            used |= int(np.bitwise_or.reduce(bits, axis=None))
        mantissa = np.finfo(values.dtype).nmant if values.dtype.kind == "f" else _BF16_MANTISSA
        unused = (used & -used).bit_length() - 1 if used else mantissa
        # Those of a narrower dtype that were saved in this one use fewer bits.
        self.epsilon = 2.0 ** -(mantissa - min(unused, mantissa))
        squares, spacings = 0.0, 0.0
        for strip in self.strips():
            wide = as_dtype(values[strip], _WIDE)
            squares += _squares(wide)
            spacings += _squares(self.spacing(strip))
        self.size = (squares / apart.size) ** 0.5
        self.coarse = (spacings / apart.size) ** 0.5

    @property
    def transposed(self) -> Difference:
        """Columns as rows."""
        other = copy.copy(self)
        other.apart, other.values = self.apart.T, self.values.T
        return other

    def strips(self) -> Iterator[slice]:
        """Yield rows that are looked at together, so that little of it is in memory as f64."""
        rows, cols = self.apart.shape
        step = max(_STRIP // cols, _STRIP_ROWS)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def spacing(self, strip: slice) -> NDArray[np.float64]:
        """Return the spacing of floats at each of these, 0 at 0."""
        wide = as_dtype(self.values[strip], _WIDE)
        spacing: NDArray[np.float64] = np.ldexp((wide != 0) * self.epsilon, np.frexp(wide)[1] - 1)
        return spacing

    def weights(self, strip: slice, least: float) -> NDArray[np.float64]:
        """Return how much each says: the more, the closer floats lie, down to ``least``."""
        return np.asarray(1 / np.maximum(self.spacing(strip), least) ** 2, np.float64)

    def times(self, right: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return its product with a matrix (n, k)."""
        parts = [self.apart[strip].astype(np.float64) @ right for strip in self.strips()]
        return np.concatenate(parts)

    def transposed_times(self, right: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the product of its columns, as rows, with a matrix (m, k)."""
        total = np.zeros((self.apart.shape[1], right.shape[1]))
        for strip in self.strips():
            total += self.apart[strip].astype(np.float64).T @ right[strip]
        return total

    def squares(self) -> float:
        """Return the sum of its squares."""
        return sum(_squares(self.apart[strip].astype(np.float64)) for strip in self.strips())


def seems_low_rank(sample: Difference, error: float, *, twice: bool = False) -> bool:
    """Return whether a part of a matrix leaves little but noise behind when its rank is reduced.

    Or, ``twice``, whether the difference of two such would: that has both their ranks.
    ``error`` is as `find_factors` takes it. Weights that were all trained have a rank near to a
    low one, too, but only near. Rows and columns that do not differ say nothing: where few do, the
    rank is low whatever they hold, and a delta says that in fewer bytes.
    """
    apart = sample.apart.astype(np.float64)
    if not np.isfinite(apart).all():
        return False
    differ = apart != 0
    apart = apart[differ.any(axis=1)][:, differ.any(axis=0)]
    one = apart if apart.shape[0] < apart.shape[1] else apart.T
    if len(one) < _LEAST_SAMPLE:
        return False
    noise = max(sample.coarse / 12**0.5, error)
    try:
        with one_thread():
            gram = one @ one.T
            total, count = float(np.trace(gram)), len(gram)
            least = min(_MOST_OF_SAMPLE * noise**2 * apart.size, _MOST_REST * total)
            most = min(count - count // 2, MAX_RANK)
            largest = most // 2 if twice else most
            if total - _most_of_largest(gram, largest) > least + _SLACK * total:
                return False
            rest = np.linalg.eigvalsh(gram)[: count - largest].sum()
    except np.linalg.LinAlgError:  # it did not converge
        return False
    return bool(rest <= least)


def _most_of_largest(gram: NDArray[np.float64], largest: int) -> float:
    """Return what the sum of so many of the largest eigenvalues is at most (Cauchy-Schwarz).

    That is known of the sums of all and of their squares, without looking for any.
    """
    total, count = float(np.trace(gram)), len(gram)
    spread = max(_squares(gram) - total**2 / count, 0.0)
    return total * largest / count + math.sqrt(spread * largest * (count - largest) / count)


def find_factors(difference: Difference, error: float) -> Factors | None:
    """Return factors of most of a matrix, ``None`` where it has no low rank.

    Parameters
    ----------
    difference
        What the product is to be near to; finite.
    error
        How far, as a root mean square, the product may be off besides what was rounded.
    """
    try:
        with one_thread():
            return _find(difference, error)
    except np.linalg.LinAlgError:  # it did not converge, or equations say nothing
        return None


def _find(difference: Difference, error: float) -> Factors | None:
    rows, cols = difference.apart.shape
    count = rows * cols
    total = difference.squares()
    if total == 0:
        return None
    coarse = difference.coarse
    error = max(error, (total / count) ** 0.5 * _OF_F32)
    noise = max(coarse / 12**0.5, error)
    for width in _SKETCHES:
        left, values, right = decomposed(difference, cols, min(width, rows, cols))
        least = _ABOVE_NOISE * _noise_of(difference, total, values, noise)
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
        least = (total / count) ** 0.5 * difference.epsilon  # what was added was itself rounded
        if rows >= cols:
            of_rows, of_cols = _refined(difference, least, of_cols)
        else:
            of_cols, of_rows = _refined(difference.transposed, least, of_rows)
    # What is off costs a few bits of each element, and a bit of the factors halves it.
    share = min(max(rank * (rows + cols) / count, _FINEST), _COARSEST)
    return _in_whole_numbers(of_rows, of_cols, max(coarse * share, error))


def _noise_of(
    difference: Difference, total: float, values: NDArray[np.float64], least: float
) -> float:
    """Return the root mean square of what is no part of the first singular values.

    That is more than of one rounding, the least there is, where a base was itself a merged model.
    """
    rows, cols = (side - len(values) for side in difference.apart.shape)
    if rows <= 0 or cols <= 0:
        return least
    rest = max(total - float((values**2).sum()), 0.0) / (rows * cols)
    return float(min(max(rest**0.5, least), _MOST_NOISE**0.5 * least))


def refit(difference: Difference, factors: Factors, error: float) -> Factors | None:
    """Return the factors of other rows that the same factor of columns fits as well, if it does.

    So a page has that once for more rows. ``error`` is as `find_factors` takes it.
    """
    try:
        with one_thread():
            return _refit(difference, factors, error)
    except np.linalg.LinAlgError:
        return None


def _refit(difference: Difference, factors: Factors, error: float) -> Factors | None:
    of_cols = np.asarray(factors.of_cols * 2.0**factors.exponent, np.float64)
    rank, rows = len(of_cols), difference.apart.shape[0]
    in_pairs = _in_pairs(of_cols)
    is_refined = error < difference.coarse and rank <= _MOST_REFINED
    least = (difference.squares() / difference.apart.size) ** 0.5 * difference.epsilon
    of_rows = np.empty((rank, rows))
    rest = 0.0
    for strip in difference.strips():
        apart = difference.apart[strip].astype(np.float64)
        if is_refined:
            weights = difference.weights(strip, least)
            some = _solved(weights @ in_pairs, (weights * apart) @ of_cols.T)
        else:
            some = np.asarray(np.linalg.solve(of_cols @ of_cols.T, of_cols @ apart.T), np.float64)
        of_rows[:, strip] = np.rint(some)
        apart -= of_rows[:, strip].T @ of_cols
        rest += _squares(apart)
    noise = max(difference.coarse / 12**0.5, error)
    is_near = rest <= _AS_WELL * noise**2 * difference.apart.size
    if not is_near or np.abs(of_rows).max() > _LARGEST:
        return None
    return Factors(factors.exponent, of_rows.astype(np.int32), factors.of_cols)


def factor_bytes(factors: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return what each of some factors takes in a delta; they are int32 (count, rank, numbers)."""
    magnitudes = np.abs(factors).max(axis=2, initial=0)
    bits = np.where(magnitudes > 0, np.frexp(magnitudes.astype(np.float64))[1] + 1, 0)
    taken = factors.shape[1] - (-bits.sum(axis=1) * factors.shape[2] // 8)
    return np.asarray(taken, np.int64)


def _squares(values: NDArray[np.float64]) -> float:
    """Return the sum of squares; of no use are the threads that a product of vectors has."""
    with np.errstate(all="ignore"):  # of NaN and infinities; whoever asks looks for these
        return float(np.square(values).sum())


def _refined(
    difference: Difference, least: float, of_cols: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return better factors: where floats lie closer, a difference says more, down to ``least``.

    Weighted least squares, for the rows' factor and then for that of the columns, which are no more
    than rows: of each there is a matrix in memory (as Gabriel and Zamir,
    *Lower rank approximation of matrices by least squares with any choice of weights*, 1979).
    """
    rank, (rows, cols) = len(of_cols), difference.apart.shape
    in_pairs = _in_pairs(of_cols)
    of_rows = np.empty((rank, rows))
    products, sums = np.zeros(in_pairs.shape), np.zeros((cols, rank))
    for strip in difference.strips():
        weights = difference.weights(strip, least)
        weighted = weights * difference.apart[strip]
        some = _solved(weights @ in_pairs, weighted @ of_cols.T)
        of_rows[:, strip] = some
        products += weights.T @ _in_pairs(some)
        sums += weighted.T @ some.T
    return of_rows, _solved(products, sums)


def _in_pairs(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the products of each two of a factor's numbers, of shape (numbers, pairs)."""
    one, other = np.triu_indices(len(factor))
    return np.asarray((factor[one] * factor[other]).T, np.float64)


def _solved(products: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the solutions of normal equations, of whose matrices there is the upper half."""
    count, rank = sums.shape
    one, other = np.triu_indices(rank)
    normal = np.empty((count, rank, rank))
    normal[:, one, other] = normal[:, other, one] = products
    return np.ascontiguousarray(np.linalg.solve(normal, sums[:, :, None])[:, :, 0].T)


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
