# SPDX-License-Identifier: Apache-2.0
"""What a convolution takes and what it refuses, saying why; its results are in test_conv.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pydedup import _core, conv
from pydedup.blocks import BlockMap
from pydedup.errors import ArgumentError, BudgetError, CorruptStoreError, PageNotFoundError
from pydedup.pool import PagePool
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType

X = np.ones((1, 4, 5, 6), np.float32)


def stored() -> tuple[BlockMap, PagePool]:
    pages = MemoryPages()
    return pages.add(np.ones((6, 2, 3, 3), np.float32), (4, 4)), pages.pool()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((4, 6), np.float32)}, r"x has shape \(4, 6\); images are"),
        ({"x": np.ones((1, 4, 5, 6, 7), np.float32)}, "3-D convolutions are not supported"),
        ({"x": np.ones((1, 3, 5, 6), np.float32)}, "2 groups do not divide 3 channels"),
        ({"x": np.ones((1, 8, 5, 6), np.float32)}, "need a weight of 36 columns"),
        ({"x": np.ones((1, 0, 5, 6), np.float32)}, "x has 0 channels"),
        ({"x": np.ones((1, 4, 0, 6), np.float32)}, "covers 3 of the image's height, which is 0"),
        ({"x": np.ones((1, 4, 5, 0), np.float32)}, "covers 3 of the image's width, which is 0"),
        ({"x": X.astype(np.complex64)}, "x must hold real numbers"),
        ({"kernel": (6, 3)}, "need a weight of 36 columns"),
        ({"kernel": 0}, "kernel must be an integer from 1 to .*, not 0"),
        ({"kernel": (3, 3, 3)}, "kernel is .* give an integer, or 2 of them"),
        ({"kernel": "3"}, "kernel must be an integer, not '3'"),
        ({"kernel": 3.0}, "kernel must be an integer, not 3.0"),
        ({"kernel": True}, "kernel must be an integer .*, not True"),
        ({"stride": 0}, "stride must be .*, not 0"),
        ({"stride": (1, -1)}, r"each of stride \(1, -1\) must be .*, not -1"),
        ({"stride": 1 << 40}, "2\\*\\*31 - 1"),
        ({"dilation": 0}, "dilation must be .*, not 0"),
        ({"dilation": 3}, "covers 7 of the image's height, which is 5"),
        ({"padding": -1}, "padding must be an integer from 0 to .*, not -1"),
        ({"padding": (0, 0, 0)}, "padding is .* give an integer, or 2 or 4 of them"),
        ({"padding": np.array([1.0, 1.0])}, "each of padding .* must be an integer, not 1.0"),
        ({"kernel": np.ones((2, 2), int)}, r"each of kernel .* must be an integer, not \[1, 1\]"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs stride 1"),
        ({"padding": (1 << 31) - 1}, "more elements than memory can hold|too large"),
        ({"groups": 0}, "groups must be an integer from 1 to .*, not 0"),
        ({"groups": 3}, "3 groups do not divide 4 channels"),
        ({"groups": 2.0}, "groups must be an integer, not 2.0"),
        ({"groups": [2]}, r"groups must be an integer, not \[2\]"),
        ({"bias": np.ones(3, np.float32)}, r"bias has shape \(3,\); \(6,\) is needed"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    block_map, pool = stored()
    given_ = {"x": X, "kernel": 3, "groups": 2, **change}
    with pytest.raises(ArgumentError, match=message):
        conv.conv2d(block_map, pool, given_.pop("x"), **given_)


def test_sizes_may_be_arrays() -> None:
    block_map, pool = stored()
    for kernel, padding in ((np.array(3), np.array([1, 2])), (np.array([3, 3]), np.array(1))):
        got = conv.conv2d(block_map, pool, X, kernel=kernel, padding=padding, groups=2)
        pad = padding.tolist()
        assert np.array_equal(got, conv.conv2d(block_map, pool, X, kernel=3, padding=pad, groups=2))


def test_a_result_beyond_memory_is_told() -> None:
    block_map, pool = stored()
    with pytest.raises(BudgetError, match=r"no memory for the result of size \(2097155, "):
        conv.conv2d(block_map, pool, X, kernel=3, padding=1 << 20, groups=2)


def test_the_core_checks_what_the_facade_would() -> None:
    def make(**change: Any) -> Any:
        y = np.empty((1, 6, 3, 4), np.float32)
        given_: dict[str, Any] = {
            "rows": 6,
            "cols": 18,
            "block_rows": 4,
            "block_cols": 4,
            "dtype": DType.F32.code,
            "x": X,
            "bias": None,
            "activation": "none",
            "y": y,
            "groups": 2,
            "kernel": (3, 3),
            "stride": (1, 1),
            "padding": (0, 0, 0, 0),
            "dilation": (1, 1),
        }
        given_.update(change)
        return _core.Conv2d(**given_)

    make()
    locked = np.empty((1, 6, 3, 4), np.float32)
    locked.flags.writeable = False
    for change, message in (
        ({"kernel": (0, 3)}, "kernel_h is 0"),
        ({"stride": (1, 0)}, "stride_w is 0"),
        ({"dilation": (0, 1)}, "dilation_h is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 4}, "4 groups do not divide"),
        ({"padding": (0, 0, 0, 1 << 40)}, "at most 2\\^31 - 1"),
        ({"padding": ((1 << 31) - 1,) * 4}, "result has more elements"),
        ({"kernel": (6, 3)}, "covers 6 of the image's height, which is 5"),
        ({"kernel": (3, 7)}, "covers 7 of the image's width, which is 6"),
        ({"rows": 8, "groups": 2}, "y must be"),
        ({"cols": 17}, "6 x 18"),
        ({"block_rows": 0}, "block shape"),
        ({"x": X[0]}, "axes batch, channels, height, width"),
        ({"x": X.astype(np.float64)}, "x must be a C-contiguous float32"),
        ({"x": X.transpose(0, 1, 3, 2)}, "x must be a C-contiguous"),
        ({"y": locked}, "y is read-only"),
        ({"y": np.empty((1, 6, 3, 5), np.float32)}, "y must be a C-contiguous float32 array of 72"),
        ({"bias": np.empty(5, np.float32)}, "bias must be"),
        ({"activation": "swish"}, "unknown activation"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(**change)
    with pytest.raises(TypeError):
        make(padding=(-1, 0, 0, 0))


def test_missing_and_wrong_pages_are_reported() -> None:
    w = np.ones((6, 4, 3, 3), np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (2, 9), per_page=2)
    lost = pages.payloads.pop(2)
    with pytest.raises(PageNotFoundError, match="1 page does not exist: 2"):
        conv.conv2d(block_map, pages.pool(), X, kernel=3)
    pages.payloads[2] = lost
    other = BlockMap(block_map.grid, DType.I32, block_map.page_ids, block_map.slots)
    with pytest.raises(CorruptStoreError, match="dtype code"):
        conv.conv2d(other, pages.pool(), X, kernel=3)
