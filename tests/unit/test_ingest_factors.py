# SPDX-License-Identifier: Apache-2.0
"""Factors of differences: the rank that is found, how exact they are, and what they take."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.factors import (
    MAX_RANK,
    Difference,
    Factors,
    factor_bytes,
    find_factors,
    refit,
    seems_low_rank,
)
from pydedup.types import DType

LARGEST = 1 << 23


def adapted(shape: tuple[int, int], rank: int, size: float = 2e-4) -> Difference:
    """Return a difference of that rank, as f32 weights round it."""
    rng = np.random.default_rng(51)
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    by = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    new = base + (by * (size / max(rank, 1) ** 0.5)).astype(np.float32)
    return Difference(new, new - base)


def spaced(apart: NDArray[np.float64], spacing: float) -> Difference:
    """Return a difference of floats that lie so far from each other."""
    # One whose last bit is set, or it might be of a narrower dtype.
    value = np.full(apart.shape, spacing * 2.0**23, np.float32)
    if spacing > 0:
        value.view(np.uint32)[:] |= 1
    return Difference(value, apart.astype(np.float32))


def product(factors: Factors) -> NDArray[np.float64]:
    whole = factors.of_rows.astype(np.float64).T @ factors.of_cols.astype(np.float64)
    return whole * 2.0**factors.exponent


def is_sound(factors: Factors) -> bool:
    return (
        factors.of_rows.dtype == factors.of_cols.dtype == np.int32
        and len(factors.of_rows) == len(factors.of_cols) <= MAX_RANK
        and max(np.abs(factors.of_rows).max(), np.abs(factors.of_cols).max()) < LARGEST
        and -900 <= factors.exponent <= 900
    )


@pytest.mark.parametrize("shape", [(300, 400), (130, 700), (700, 130)])
@pytest.mark.parametrize("rank", [1, 4, 20, 21, 33, 64])
def test_the_rank_of_an_adapter_is_found(shape: tuple[int, int], rank: int) -> None:
    difference = adapted(shape, rank)
    factors = find_factors(difference, 0.0)
    assert factors is not None
    assert len(factors.of_rows) == rank
    assert (factors.of_rows.shape[1], factors.of_cols.shape[1]) == shape
    assert is_sound(factors)
    # What is left is how sums were rounded, 0.29 of the spacing, and little else.
    off = np.linalg.norm(product(factors) - difference.apart) / difference.apart.size**0.5
    assert off < 0.4 * difference.coarse


@pytest.mark.parametrize("rank", [65, 80])
def test_more_than_the_format_has_is_no_low_rank(rank: int) -> None:
    assert find_factors(adapted((300, 400), rank), 0.0) is None


def test_noise_has_no_low_rank() -> None:
    rng = np.random.default_rng(52)
    noise = rng.normal(0, 1e-4, (300, 400))
    assert not seems_low_rank(spaced(noise, 1e-9), 0.0)
    assert find_factors(spaced(noise, 1e-9), 0.0) is None
    # A rank that is there, of which less than half of the difference is.
    outer = rng.normal(size=(300, 1)) @ rng.normal(size=(1, 400)) * 5e-5
    assert find_factors(spaced(noise + outer, 1e-9), 0.0) is None
    # What is as small as sums are rounded is no rank either.
    assert find_factors(spaced(noise, 1e-3), 0.0) is None
    assert find_factors(spaced(np.zeros((30, 40)), 1e-9), 0.0) is None


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_a_part_of_an_adapter_seems_to_be_one(rank: int) -> None:
    part = adapted((128, 256), rank)
    assert seems_low_rank(part, 0.0)
    adapter = part.apart.copy()
    part.apart += np.random.default_rng(57).normal(0, 1e-6, adapter.shape).astype(np.float32)
    assert not seems_low_rank(part, 0.0)
    assert seems_low_rank(part, 1e-6)  # that much is allowed
    for bad in (np.nan, np.inf):
        part.apart[:] = adapter
        part.apart[3, 5] = bad
        assert not seems_low_rank(part, 0.0)


@pytest.mark.parametrize("few", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("across", [False, True])
def test_few_rows_or_columns_of_noise_seem_to_have_no_low_rank(few: int, across: bool) -> None:
    """Their rank is as low as they are few; but no fewer numbers say what they hold."""
    rng = np.random.default_rng(55)
    apart = np.zeros((128, 256))
    at = rng.choice(apart.shape[across], few, replace=False)
    apart[(slice(None), at) if across else at] = rng.normal(
        0, 1e-4, (128, few) if across else (few, 256)
    )
    assert not seems_low_rank(spaced(apart, 1e-9), 0.0)


@given(
    rows=st.integers(2, 130),
    cols=st.integers(2, 130),
    rank=st.integers(1, 70),
    blur=st.sampled_from([0.0, 1e-4, 0.1, 0.5, 2.0]),
    error=st.sampled_from([0.0, 1e-3, 0.1]),
    twice=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_sample_is_judged_as_by_its_singular_values(
    rows: int, cols: int, rank: int, blur: float, error: float, twice: bool
) -> None:
    rng = np.random.default_rng([rows, cols, rank])
    by = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols)) / rank**0.5
    sample = spaced(by + blur * rng.normal(size=by.shape), 2.0**-30)
    squares = np.linalg.svd(sample.apart.astype(np.float64), compute_uv=False) ** 2
    largest = min((len(squares) + 1) // 2, MAX_RANK) // (2 if twice else 1)
    rest = squares[largest:].sum() / squares.sum()
    noise = max(sample.coarse / 12**0.5, error)
    most = min(4 * noise**2 * by.size / squares.sum(), 0.15)
    if abs(rest - most) > 1e-9:  # nearer, how sums are rounded decides
        assert seems_low_rank(sample, error, twice=twice) == (rest < most)


def test_an_adapter_of_few_rows_is_one() -> None:
    """As one of an embedding is, of which other rows did not occur."""
    whole = adapted((128, 256), 4)
    apart = whole.apart.copy()
    apart[::2] = 0
    assert seems_low_rank(Difference(whole.values, apart), 0.0)


def test_trained_weights_of_bf16_seem_to_have_no_low_rank() -> None:
    """They are rounded so coarsely that little is left of the noise beside an adapter."""
    rng = np.random.default_rng(56)
    base = rng.normal(0, 0.02, (128, 256)).astype(np.float32)
    by = rng.normal(size=(128, 4)) @ rng.normal(size=(4, 256)) * 1e-4
    new = base + (by + rng.normal(0, 2e-4, base.shape)).astype(np.float32)
    old, new = (a.astype(DType.BF16.numpy) for a in (base, new))
    apart = (new.astype(np.float32) - old.astype(np.float32)).astype(np.float32)
    assert not seems_low_rank(Difference(new, apart), 0.0)


@pytest.mark.parametrize("error", [0.0, 1e-6])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_other_rows_of_an_adapter_have_its_factor_of_columns(rank: int, error: float) -> None:
    whole = adapted((400, 300), rank)
    first, other = (
        Difference(whole.values[rows], whole.apart[rows]) for rows in (np.s_[:250], np.s_[250:])
    )
    factors = find_factors(first, error)
    assert factors is not None
    fitted = refit(other, factors, error)
    assert fitted is not None
    assert is_sound(fitted)
    assert fitted.exponent == factors.exponent
    assert fitted.of_cols is factors.of_cols
    off = np.linalg.norm(product(fitted) - other.apart) / other.apart.size**0.5
    assert off < 1.5 * max(0.29 * other.coarse, error)
    assert refit(adapted((150, 300), rank, size=1e-3), factors, error) is None  # of another one


def test_more_than_one_rounding_is_still_noise() -> None:
    """Of adapters that were merged one after the other, where a base is itself a merged model."""
    rng = np.random.default_rng(58)
    once = adapted((300, 400), 4)
    spacing = np.spacing(np.abs(once.values))
    part = np.s_[:128, :256]
    for roundings in (2, 4, 9):
        rounded = rng.uniform(-0.5, 0.5, (roundings - 1, *spacing.shape)).sum(axis=0) * spacing
        again = Difference(once.values, (once.apart + rounded).astype(np.float32))
        factors = find_factors(again, 0.0)
        assert seems_low_rank(Difference(again.values[part], again.apart[part]), 0.0)
        assert factors is not None
        assert len(factors.of_rows) == 4
        alone = Difference(once.values, rounded.astype(np.float32))
        assert not seems_low_rank(Difference(alone.values[part], alone.apart[part]), 0.0)
        assert find_factors(alone, 0.0) is None


def test_an_error_that_is_allowed_makes_factors_coarser() -> None:
    difference = adapted((300, 400), 8)
    allowed = 1e-6
    exact = find_factors(difference, 0.0)
    coarse = find_factors(difference, allowed)
    assert exact is not None
    assert coarse is not None
    off = np.linalg.norm(product(coarse) - difference.apart) / difference.apart.size**0.5
    assert off <= 1.5 * allowed
    sizes = [factor_bytes(one.of_rows[None])[0] for one in (coarse, exact)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e30])
def test_factors_of_any_size_are_whole_numbers(size: float) -> None:
    rng = np.random.default_rng(53)
    whole = rng.integers(-3, 4, (60, 2)) @ rng.integers(-3, 4, (2, 50))
    difference = whole.astype(np.float64) * size
    for spacing in (0.0, size * 1e-9, size * 1e-3):
        factors = find_factors(spaced(difference, spacing), 0.0)
        assert factors is not None
        assert is_sound(factors)
        assert np.abs(product(factors) - difference).max() <= max(spacing, size * 1e-5)


def test_a_matrix_that_became_zero_has_factors() -> None:
    """Zeros have no spacing, and nothing is allowed to be off: that was an OverflowError."""
    column = np.zeros((64, 64))
    column[:, 0] = -1
    factors = find_factors(spaced(column, 0.0), 0.0)
    assert factors is not None
    assert is_sound(factors)
    assert np.abs(product(factors) - column).max() < 1e-6


@pytest.mark.parametrize("shape", [(20_000, 80), (80, 20_000)])
def test_memory_is_bounded_whatever_the_shape(shape: tuple[int, int]) -> None:
    difference = adapted(shape, 30)
    tracemalloc.start()
    try:
        factors = find_factors(difference, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert factors is not None
    assert len(factors.of_rows) == 30
    assert peak < 48 * 1024 * 1024


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_factor_bytes_is_what_a_delta_has_of_them(rank: int) -> None:
    rng = np.random.default_rng(54)
    base = rng.normal(0, 0.02, (40, 50)).astype(np.float32)
    for largest in (0, 1, 2, 127, 128, 2**22, 2**23 - 1):
        rows, cols = (rng.integers(-largest, largest + 1, (1, rank, n), np.int32) for n in (40, 50))
        rows[0, 0, 0] = cols[0, -1, -1] = -largest
        at = np.zeros(1, np.int64)
        factors = codec.LowRankFactors(-900, rows, cols, at, at)
        view = MatrixView.of(base, (40, 50))
        encoded = codec.encode_deltas(view, [0], view, [0], factors=factors)
        head, no_mask, no_change = 12 + 4 + 2, 1, 1
        expected = head + no_mask + no_change + factor_bytes(rows)[0] + factor_bytes(cols)[0]
        assert encoded.lengths.tolist() == [expected]
