# SPDX-License-Identifier: Apache-2.0
"""Similarity: what a reviewer broke once. The law of the index and its kernels are elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from pydedup.errors import ArgumentError
from pydedup.similarity import L2LSH


@pytest.mark.parametrize("shape", [(1, 1), (4, 4)])
def test_blocks_of_the_largest_number_are_saved_and_found(shape: tuple[int, int]) -> None:
    """Scaled to f32 they round up, and their root mean square was infinite."""
    most = np.finfo(np.float64).max
    blocks = np.full((2, *shape), most)
    blocks[1] *= -1
    index = L2LSH(shape, np.float64)
    index.add(blocks, [1, 2])
    again = L2LSH.load(index.save())
    for each in (index, again):
        ids, distances = each.query(blocks)
        assert ids[:, 0].tolist() == [1, 2]
        assert distances[:, 0].tolist() == [0, 0]


def test_a_loaded_index_takes_no_more_memory() -> None:
    """Room was made for as many sketches as there are blocks."""
    one = np.random.default_rng(0).standard_normal((1, 8, 8), np.float32)
    index = L2LSH((8, 8), np.float32)
    index.add(np.broadcast_to(one, (50_000, 8, 8)), np.arange(50_000))
    again = L2LSH.load(index.save())
    assert again.memory_bytes <= 1.1 * index.memory_bytes
    assert again.query(one, 3)[0].tolist() == [[0, 1, 2]]
    again.add(2 * one, [50_000])
    assert again.query(2 * one)[0].tolist() == [[50_000]]


@pytest.mark.parametrize("shape", [(300, 300), (2048, 16), (2, 70_000)])
def test_blocks_of_one_broadcast_row_are_read_where_they_lie(shape: tuple[int, int]) -> None:
    """What to prefetch of a large block was found by dividing by its row stride, which is 0."""
    rows = np.random.default_rng(0).standard_normal((2, 1, shape[1]), np.float32)
    repeated = np.broadcast_to(rows, (2, *shape))
    index = L2LSH(shape, np.float32)
    index.add(repeated, [0, 1])
    for blocks in (repeated, repeated.copy()):
        ids, distances = index.query(blocks)
        assert ids[:, 0].tolist() == [0, 1]
        assert distances[:, 0].tolist() == [0, 0]


def test_a_shape_whose_rows_fill_up_to_too_much_is_refused() -> None:
    """Each row takes a group of lanes: signs for 2**31 rows of one element are 4 GiB."""
    with pytest.raises(ArgumentError, match=r"\(2147483647, 1\)"):
        L2LSH((2**31 - 1, 1), np.float32)
    L2LSH((2**20, 1), np.float32)


@pytest.mark.parametrize("dtype", [None, "nope", "float8"])
def test_a_dtype_that_is_none_is_an_argument_error(dtype: object) -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        L2LSH((2, 2), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (8,), (8, 4, 2), (8, 9), (8, 1, 8)])
def test_what_fetch_returns_is_named_when_it_has_another_shape(shape: tuple[int, ...]) -> None:
    blocks = np.random.default_rng(0).standard_normal((8, 2, 4), np.float32)
    index = L2LSH((2, 4), np.float32)
    index.add(blocks, range(8))
    with pytest.raises(ArgumentError, match="fetch returned"):
        index.query(blocks, 1, lambda ids: np.zeros(shape, np.float32))
