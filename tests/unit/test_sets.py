# SPDX-License-Identifier: Apache-2.0
"""Sets of whole numbers beside numpy's, which hashes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pydedup import sets

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = st.sampled_from([np.uint8, np.int32, np.uint32, np.int64, np.uint64])


@st.composite
def two(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    dtype = draw(DTYPES)
    numbers = st.integers(0, 9) | arrays.from_dtype(np.dtype(dtype))
    shapes = arrays.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=40)
    one, other = (draw(arrays.arrays(dtype, shapes, elements=numbers)) for _ in range(2))
    return one, other


@given(two())
def test_like_numpy(arrays: tuple[NDArray[Any], NDArray[Any]]) -> None:
    one, other = arrays
    pairs = [
        (sets.distinct(one), np.unique(one)),
        (sets.is_among(one, other), np.isin(one, other)),
        (sets.common(one, other), np.intersect1d(one, other)),
        (sets.without(one, other), np.setdiff1d(one, other)),
        (sets.union(one, other), np.union1d(one, other)),
    ]
    for got, wanted in pairs:
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype


def test_shapes_and_lists() -> None:
    square = np.array([[3, 1], [1, 2]], np.int64)
    np.testing.assert_array_equal(sets.distinct(square), [1, 2, 3])
    np.testing.assert_array_equal(sets.is_among(square, [2, 3]), [[True, False], [False, True]])
    assert not sets.is_among(square, []).any()


#: numpy's functions that hash whole numbers, unless they are asked for places or counts.
HASHING = {"unique", "isin", "intersect1d", "setdiff1d", "union1d"}


@pytest.mark.parametrize("folder", ["pydedup", "adapters"])
def test_nobody_hashes_what_can_be_sorted(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_sorted = any((word.arg or "").startswith("return_") for word in node.keywords)
            if ast.unparse(node.func) in {f"np.{name}" for name in HASHING} and not is_sorted:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found == [], "see pydedup/sets.py"
