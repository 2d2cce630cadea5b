# SPDX-License-Identifier: Apache-2.0
"""Distances and magnitudes of blocks against numpy: arguments, layouts of memory, odd values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pydedup.errors import ArgumentError
from pydedup.similarity import distances, magnitude

from .test_similarity import random_blocks

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_are_those_of_float64(dtype: Any) -> None:
    a, b = random_blocks(5, (33, 47), dtype), random_blocks(5, (33, 47), dtype, seed=1)
    found = distances(a, b, eps=0.5)
    left, right = a.astype(np.float64), b.astype(np.float64)
    wanted = np.linalg.norm(left - right, axis=(1, 2)) / np.linalg.norm(left, axis=(1, 2))
    assert found.relative_l2 == pytest.approx(wanted, rel=1e-6)
    assert found.max_difference == pytest.approx(np.abs(left - right).max(axis=(1, 2)), rel=1e-6)
    assert found.share_within == pytest.approx(
        (np.abs(left - right) <= 0.5).mean(axis=(1, 2)), abs=1e-3
    )
    one = distances(a, b[0])
    assert one.relative_l2[0] == found.relative_l2[0]
    assert one.share_within is None
    wide = np.zeros((5, 33, 60), dtype)
    wide[:, :, :47] = b
    assert (distances(a, wide[:, :, :47]).relative_l2 == found.relative_l2).all()
    flat = distances(a.reshape(5, 3, 11, 47), b.reshape(5, 3, 11, 47))
    assert flat.relative_l2 == pytest.approx(found.relative_l2, rel=1e-6)
    some = np.array([4, 0, 4, 2]), np.array([1, 1, 0, 2])
    chosen, copied = distances(a, b[:3], pairs=some, eps=0.5), distances(a[some[0]], b[some[1]])
    assert (chosen.relative_l2 == copied.relative_l2).all()
    with pytest.raises(ArgumentError, match=r"pairs\[1\] names block 4 of 3"):
        distances(a, b[:3], pairs=some[::-1])
    with pytest.raises(ArgumentError, match="blocks of b have shape"):
        distances(a, b[:, :5], pairs=some)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_values_have_plain_distances(dtype: Any) -> None:
    zero, one = np.zeros((1, 40), dtype), np.ones((1, 40), dtype)
    assert distances(zero, zero).relative_l2[0] == 0
    assert distances(zero, one).relative_l2[0] == np.inf
    assert distances(one, zero).relative_l2[0] == 1
    for bad in (np.nan, np.inf, -np.inf):
        odd = one.copy()
        odd[0, 17] = bad
        for pair in ((odd, one), (one, odd), (odd, odd)):
            found = distances(*pair, eps=10)
            assert found.relative_l2[0] == np.inf
            assert found.max_difference[0] == np.inf
            assert found.share_within is not None
            assert found.share_within[0] == pytest.approx(39 / 40)
            assert np.isinf(distances(*pair, limit=1e9).relative_l2[0])
    info = ml_dtypes.finfo(dtype)
    for scale in (float(info.max) / 4, float(info.smallest_normal) * 8):
        a, b = np.full((1, 40), scale).astype(dtype), np.full((1, 40), scale).astype(dtype)
        b[0, 0] = 0
        assert distances(a, b).relative_l2[0] == pytest.approx(40**-0.5, rel=1e-6)
        assert distances(a, b, limit=0.1).relative_l2[0] == np.inf
        assert distances(a, a, limit=0.0).relative_l2[0] == 0
    apart = one.copy()
    apart[0, 3] += ml_dtypes.finfo(dtype).eps
    assert 0 < distances(one, apart).relative_l2[0] < 0.01


def test_a_limit_stops_early_and_never_too_early() -> None:
    a = random_blocks(1, (1, 200_000))
    a = np.repeat(a, 9, axis=0)
    b = a.copy()
    sizes = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 2, 3])
    b += (sizes[:, None, None] * random_blocks(9, (1, 200_000), seed=3)).astype(np.float32)
    full = distances(a, b).relative_l2
    for limit in full:
        kept = distances(a, b, limit=float(limit)).relative_l2
        assert (kept[full <= limit] == full[full <= limit]).all()
        assert np.isinf(kept[full > limit]).all()


def test_wrong_pairs_are_named() -> None:
    a = random_blocks(3, (4, 5))
    for b, message in (
        (a[:2], "shape"),
        (a.astype(np.float16), "float16"),
        (a[0, 0], "shape"),
        (None, "numpy array"),
    ):
        with pytest.raises(ArgumentError, match=message):
            distances(a, b)  # type: ignore[arg-type]
    for eps in (-1, float("nan"), "x"):
        with pytest.raises(ArgumentError, match="eps"):
            distances(a, a, eps=eps)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="limit"):
            distances(a, a, limit=eps)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"pairs\[1\] must hold integers of int64, not float64"):
        distances(a, a, pairs=([0], [0.5]))  # type: ignore[arg-type]
    for pairs in (5, ([0],), ([0], [0], [0])):
        with pytest.raises(ArgumentError, match="pairs must be two arrays of block numbers, not"):
            distances(a, a, pairs=pairs)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="int64"):
        distances(np.ones((2, 2), int), np.ones((2, 2), int))
    with pytest.raises(ArgumentError, match="without elements"):
        distances(np.ones((2, 0)), np.ones((2, 0)))
    with pytest.raises(ArgumentError, match="scalar"):
        magnitude(np.array(1.0))
    assert distances(a[:0], a[:0]).relative_l2.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 16, 17, 1000, 1025, 4096, 90_000])
def test_magnitudes_are_those_of_numpy(dtype: Any, n: int) -> None:
    blocks = random_blocks(4, (1, n), dtype, seed=n)
    wanted = np.percentile(np.abs(blocks.astype(np.float64)).reshape(4, -1), 75, axis=1)
    np.testing.assert_allclose(magnitude(blocks), wanted, rtol=1e-15)


def test_magnitudes_are_right_where_a_sample_is_wrong() -> None:
    """Of many elements some are looked at first, at places that are known: there, all are alike."""
    n, run, sampled = 4096, 16, 512
    places = np.add.outer(
        np.arange(sampled // run) * ((n - run) // (sampled // run - 1)), np.arange(run)
    )
    alike = np.arange(0.65, 0.9, 2.0**-12, dtype=np.float32)
    blocks = np.tile(
        np.random.default_rng(0).permutation(n).astype(np.float32) / n, (len(alike), 1)
    )
    blocks[:, places.ravel()] = alike[:, None]
    wanted = np.percentile(blocks.astype(np.float64), 75, axis=1)
    np.testing.assert_allclose(magnitude(blocks), wanted, rtol=1e-15)
    np.testing.assert_allclose(magnitude(blocks.astype(np.float64)), wanted, rtol=1e-15)


def test_magnitudes_of_odd_blocks() -> None:
    blocks = np.ones((5, 40), np.float32)
    blocks[0, 5] = np.nan
    blocks[1, :20] = -np.inf
    blocks[2] = 0
    blocks[3, :10] = np.inf  # rank 29.25 lies between a number and infinity
    found = magnitude(blocks)
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert found[2] == 0
    assert found[3] == np.inf
    assert found[4] == 1


@pytest.mark.parametrize(
    "shape", [(64, 64), (130, 70), (1, 200), (200, 1), (5, 5), (64, 100), (70, 32)]
)
def test_blocks_of_a_matrix_are_measured_where_they_lie(shape: tuple[int, int]) -> None:
    matrix = random_blocks(1, (shape[0], shape[1] + 3))[0][:, : shape[1]]
    wanted = [
        magnitude(np.ascontiguousarray(matrix[r : r + 64, c : c + 32]).reshape(1, -1))[0]
        for r in range(0, shape[0], 64)
        for c in range(0, shape[1], 32)
    ]
    assert magnitude(matrix, (64, 32)).tolist() == wanted
    assert magnitude(matrix[:0], (64, 32)).shape == (0,)
