# SPDX-License-Identifier: Apache-2.0
"""Block maps that many models have in common are parsed once."""

from __future__ import annotations

import numpy as np
import pytest

from pydedup.blocks import BlockGrid, BlockMap
from pydedup.catalog import ParsedMaps
from pydedup.errors import CorruptStoreError
from pydedup.types import DType

GRID = BlockGrid(8, 8, 4, 4)


def parts_of(first_page: int, grid: BlockGrid = GRID) -> list[bytes]:
    count = grid.count
    pages = np.arange(first_page, first_page + count, dtype=np.int64)
    return list(BlockMap(grid, DType.F32, pages, np.arange(count, dtype=np.uint32)).parts())


def test_the_same_bytes_for_the_same_grid_and_dtype_are_parsed_once() -> None:
    parsed = ParsedMaps()
    first = parsed.parse(parts_of(7), GRID, DType.F32)
    assert first.page_ids.tolist() == [7, 8, 9, 10]
    assert parsed.parse(parts_of(7), GRID, DType.F32) is first
    assert parsed.parse(parts_of(8), GRID, DType.F32).page_ids.tolist() == [8, 9, 10, 11]
    other = BlockGrid(16, 16, 8, 8)
    assert parsed.parse(parts_of(7), other, DType.F32).grid == other
    assert parsed.parse(parts_of(7), GRID, DType.F16).dtype is DType.F16


def test_what_does_not_parse_is_an_error_each_time() -> None:
    parsed = ParsedMaps()
    parsed.parse(parts_of(7), GRID, DType.F32)
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match="4 blocks where its tensor has 1"):
            parsed.parse(parts_of(7), BlockGrid(4, 4, 4, 4), DType.F32)
        with pytest.raises(CorruptStoreError, match="does not parse"):
            parsed.parse([parts_of(7)[0] + b"\0"], GRID, DType.F32)


def test_they_are_forgotten_before_they_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydedup.catalog.parsed._MOST_BYTES", 10_000)
    parsed = ParsedMaps()
    first = parsed.parse(parts_of(0), GRID, DType.F32)
    for page in range(1, 4):
        parsed.parse(parts_of(page), GRID, DType.F32)
    assert parsed.parse(parts_of(0), GRID, DType.F32) is first
    for page in range(4, 20):
        parsed.parse(parts_of(page), GRID, DType.F32)
    again = parsed.parse(parts_of(0), GRID, DType.F32)
    assert again is not first
    assert again.page_ids.tolist() == first.page_ids.tolist()


def test_a_large_map_is_not_kept() -> None:
    grid = BlockGrid(400, 400, 4, 4)
    parsed = ParsedMaps()
    first = parsed.parse(parts_of(0, grid), grid, DType.F32)
    assert parsed.parse(parts_of(0, grid), grid, DType.F32) is not first
