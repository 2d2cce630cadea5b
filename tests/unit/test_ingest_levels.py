# SPDX-License-Identifier: Apache-2.0
"""What the policy `Accuracy` offers in the place of a block: what saves, and nothing farther."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.levels import Levels
from pydedup.ingest.pairs import Pairs


def weights(seed: int = 5) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.02, (64, 64)).astype(np.float32)


def stacked(block: NDArray[np.float32]) -> MatrixView:
    return MatrixView.of(block, (64, 64))


def levels_of(block: NDArray[np.float32]) -> Levels:
    return Levels(stacked(block))


def pair(base: NDArray[np.float32]) -> Pairs:
    one = np.zeros(1, np.int64)
    return Pairs(one, one - 2, np.zeros(1), stacked(base), one)


def moved(block: NDArray[np.float32], by: float) -> NDArray[np.float32]:
    return (block + by * np.roll(weights(9), 3)).astype(np.float32)


def test_the_most_saving_comes_first_and_each_that_follows_is_nearer() -> None:
    base = weights()
    block = moved(base, 0.1)
    levels = levels_of(block)
    for bound in (0.001, 0.03, 0.005):
        levels.add_deltas(pair(base), bound)
    levels.add_stored(0, base, 0.102)
    ((row, best),) = levels.best()
    assert row == 0
    assert [level.error for level in best] == [0.102, 0.03, 0.005, 0.001]
    saved = [level.saved for level in best]
    assert saved == sorted(set(saved), reverse=True)
    assert [level.delta is None for level in best] == [True, False, False, False]
    for level in best:
        away = np.linalg.norm(level.content() - block) / np.linalg.norm(block)
        assert away <= level.error


def test_what_is_farther_and_saves_no_more_is_not_offered() -> None:
    base = weights()
    levels = levels_of(moved(base, 0.01))
    levels.add_deltas(pair(base), 0.03)
    levels.add_stored(0, base, 0.01)
    levels.add_stored(0, moved(base, 0.001), 0.01)
    levels.add_stored(0, moved(base, 0.5), 0.5)
    ((_, best),) = levels.best()
    assert [level.error for level in best] == [0.01]


def test_what_saves_little_beside_the_block_as_it_is_is_not_offered() -> None:
    base = weights()
    levels = levels_of(moved(base, 0.1))
    levels.add_deltas(pair(base), 0.001)
    ((_, best),) = levels.best()
    plain = levels.kept[0]
    taken = plain - best[0].saved
    for least, offered in ((taken * 100 // 96, 0), (taken * 100 // 94, 1)):
        levels.kept[0] = least
        assert len(list(levels.best())) == offered
    levels.kept[0] = taken
    levels.add_deltas(pair(base), 0.03)
    levels.add_deltas(pair(base), 0.0005)  # takes more
    levels.add_deltas(pair(moved(base, -0.3)), 0.03)  # and so does that
    assert [level.error for _, best in levels.best() for level in best] == [0.03]


def test_bytes_that_others_on_the_page_have_too_count_as_saved() -> None:
    base = weights()
    block = moved(base, 0.1)
    alone, beside = levels_of(block), levels_of(block)
    factors = codec.LowRankFactors(
        -40,
        np.arange(64, dtype=np.int32).reshape(1, 1, 64),
        np.arange(64, dtype=np.int32).reshape(1, 1, 64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
    )
    alone.add_deltas(replace(pair(base), factors=factors), 0.03)
    beside.add_deltas(replace(pair(base), factors=factors, shared=np.array([60])), 0.03)
    (((_, one),), ((_, other),)) = (list(levels.best()) for levels in (alone, beside))
    assert other[0].saved == one[0].saved + 60
    np.testing.assert_array_equal(one[0].content(), other[0].content())
