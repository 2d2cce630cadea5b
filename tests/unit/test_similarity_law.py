# SPDX-License-Identifier: Apache-2.0
"""The collision law of L2 LSH (Datar et al. 2004), held to over many seeds.

Two blocks at distance d have the hash floor((a . v + b) / r) in common with the probability

    p(d) = 1 - 2 F(-r/d) - 2 d / (sqrt(2 pi) r) * (1 - exp(-r^2 / (2 d^2)))

with F the normal distribution function. Seeds are independent, so the mean over the hashes of one
seed is one observation, whatever the hashes of a seed have to do with each other; the test is of
the mean over seeds, at five of its standard errors. That errs less than once in a million runs,
and the seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.similarity import L2LSH

SEEDS = 60
R = 0.5


def law(distance: float, r: float = R) -> float:
    t = r / distance
    below = 0.5 * math.erfc(t / math.sqrt(2))
    return 1 - 2 * below - 2 / (math.sqrt(2 * math.pi) * t) * (1 - math.exp(-t * t / 2))


def differences(shape: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """Differences of every kind; what a fixed set of signs or buckets would fall for."""
    rows, cols = shape
    rng = np.random.default_rng(7)
    found = {
        "dense": rng.standard_normal(shape),
        "constant": np.ones(shape),
        "checkerboard": (-1.0) ** np.add.outer(np.arange(rows), np.arange(cols)),
        "rank one": np.outer(rng.standard_normal(rows), rng.standard_normal(cols)),
        "one entry": np.zeros(shape),
        "two neighbours": np.zeros(shape),
        "two of a column": np.zeros(shape),
        "four of a row": np.zeros(shape),
        "one row": np.zeros(shape),
        "one column": np.zeros(shape),
        "last row and column": np.zeros(shape),
        "a few large": rng.standard_normal(shape) ** 9,
    }
    found["one entry"][rows // 2, cols // 3] = 1
    found["two neighbours"][rows // 2, cols // 3 : cols // 3 + 2] = 1
    found["two of a column"][[0, rows - 1], cols // 2] = 1
    found["four of a row"][0, :: max(1, cols // 4)] = 1
    found["one row"][rows // 3] = rng.standard_normal(cols)
    found["one column"][:, cols // 3] = 1
    found["last row and column"][-1] = 1
    found["last row and column"][:, -1] = 1
    return found


def pair(shape: tuple[int, int], kind: str, distance: float) -> tuple[NDArray[np.float32], float]:
    """Return two blocks about that far apart, and how far they are once both have unit length."""
    base = np.random.default_rng(3).standard_normal(shape)
    step = differences(shape)[kind]
    other = base + step * (distance * np.linalg.norm(base) / np.linalg.norm(step))
    blocks = np.stack([base, other]).astype(np.float32)
    exact = blocks.astype(np.float64)
    unit = exact / np.linalg.norm(exact, axis=(1, 2), keepdims=True)
    return blocks, float(np.linalg.norm(unit[0] - unit[1]))


def agreements(
    blocks: NDArray[np.float32], bands: int, rows: int, r: float = R
) -> NDArray[np.bool_]:
    """Which hashes agree: (seeds, bands, rows)."""
    found = []
    for seed in range(SEEDS):
        index = L2LSH(blocks.shape[1:], blocks.dtype, r=r, bands=bands, rows=rows, seed=seed)  # type: ignore[arg-type]
        first, second = index.hashes(blocks)
        found.append(first == second)
    return np.array(found)


def check_mean(observed: NDArray[np.float64], expected: float) -> None:
    """Observations, one per seed, have the expected mean."""
    error = observed.std(ddof=1) / math.sqrt(len(observed))
    assert abs(observed.mean() - expected) < 5 * error + 0.002, (observed.mean(), expected, error)


@pytest.mark.parametrize("distance", [0.1, 0.4, 1.4])
@pytest.mark.parametrize("kind", differences((64, 64)))
def test_hashes_agree_as_often_as_the_law_says(kind: str, distance: float) -> None:
    blocks, apart = pair((64, 64), kind, distance)
    agree = agreements(blocks, 32, 16)
    check_mean(agree.mean(axis=(1, 2)), law(apart))


@pytest.mark.parametrize("shape", [(300, 300), (1, 4096), (4096, 1), (3, 2000), (5, 7), (100, 50)])
@pytest.mark.parametrize("kind", ["dense", "one entry", "one column", "constant"])
def test_the_law_holds_for_every_shape(shape: tuple[int, int], kind: str) -> None:
    if kind == "one column" and shape[1] == 1:
        kind = "dense"
    blocks, apart = pair(shape, kind, 0.3)
    agree = agreements(blocks, 32, 16)
    check_mean(agree.mean(axis=(1, 2)), law(apart))


@pytest.mark.parametrize("kind", differences((64, 64)))
def test_hashes_agree_independently(kind: str) -> None:
    blocks, apart = pair((64, 64), kind, 0.2)
    p = law(apart)
    agree = agreements(blocks, 64, 8)
    # All eight of a band, and both of two bands, as often as independent ones would.
    check_mean(agree.all(axis=2).mean(axis=1), p**8)
    flat = agree.reshape(SEEDS, -1)
    places = np.arange(flat.shape[1])
    for apart_by in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        both = flat & flat[:, places ^ apart_by]
        check_mean(both.mean(axis=1), p * p)


def test_shifts_are_uniform_and_projections_normal() -> None:
    block = np.random.default_rng(1).standard_normal((1, 64, 64)).astype(np.float32)
    hashes = np.concatenate(
        [
            L2LSH((64, 64), np.float32, r=1 / 64, bands=64, rows=8, seed=seed)
            .hashes(block)
            .reshape(-1)
            for seed in range(SEEDS)
        ]
    )
    projections = np.sort((hashes + 0.5) / 64)
    # Kolmogorov and Smirnov at one in a million.
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in projections])
    ranks = (np.arange(len(normal)) + 0.5) / len(normal)
    assert np.abs(normal - ranks).max() < 2.7 / math.sqrt(len(normal)) + 0.004


def test_the_default_finds_near_duplicates_and_spares_the_rest() -> None:
    rng = np.random.default_rng(5)
    base = rng.standard_normal((3000, 64, 64), np.float32)
    near = base + 0.05 * rng.standard_normal(base.shape, np.float32)
    index = L2LSH((64, 64), np.float32)
    index.add(base, np.arange(len(base)))
    found, _ = index.query(near)
    assert (found[:, 0] == np.arange(len(base))).mean() >= 0.99
    unrelated, _ = index.query(rng.standard_normal(base.shape, np.float32), k=64)
    assert (unrelated >= 0).sum() < 100, "of nine million pairs"
