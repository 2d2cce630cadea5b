# SPDX-License-Identifier: Apache-2.0
"""Block maps byte by byte (docs/format.md, "Block map"), what of them is refused, and how matrices
are cut.
"""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest

from pydedup.blocks import BlockGrid, BlockMap, MatrixView, _pack_part, default_block_shape
from pydedup.errors import CorruptStoreError
from pydedup.types import DType

GRID = BlockGrid(3, 4, 1, 4)
PLAIN = struct.pack("<4sHHII2q3H3H", b"PDBM", 1, 2, 2, 3, 7, 300, 1, 0, 1, 5, 0, 6)
WITH_DELTA = struct.pack(
    "<4sHHII3q12H", b"PDBM", 2, 2, 3, 3, 7, 9, 300, 2, 0, 2, 5, 0, 6, 3, 3, 1, 0, 0, 8
)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def slots(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def test_the_bytes_of_version_1_and_2() -> None:
    plain = BlockMap(GRID, DType.F32, ids(300, 7, 300), slots(5, 0, 6))
    assert list(plain.parts()) == [PLAIN]
    delta = BlockMap(
        GRID, DType.F32, ids(300, 7, 300), slots(5, 0, 6), ids(-1, -1, 9), slots(0, 0, 8)
    )
    assert list(delta.parts()) == [WITH_DELTA]


def test_what_version_1_and_2_say() -> None:
    assert BlockMap.from_parts([PLAIN], GRID, DType.F32).bases is None
    read = BlockMap.from_parts([WITH_DELTA], GRID, DType.F32)
    assert read.page_ids.tolist() == [300, 7, 300]
    assert read.slots.tolist() == [5, 0, 6]
    assert read.bases is not None
    assert read.bases[0].tolist() == [-1, -1, 9]
    assert read.bases[1].tolist() == [0, 0, 8]


def test_only_parts_with_a_delta_are_version_2_and_all_are_small() -> None:
    count = 70_000
    grid = BlockGrid(count, 1, 1, 1)
    pages = np.arange(count, dtype=np.int64) + 1
    bases = np.full(count, -1, np.int64)
    bases[-3:] = 5
    base_slots = np.zeros(count, np.uint32)
    base_slots[-1] = 2
    parts = list(BlockMap(grid, DType.F32, pages, slots(*[0] * count), bases, base_slots).parts())
    assert [part[4] for part in parts] == [1] * 159 + [2]
    read = BlockMap.from_parts(parts, grid, DType.F32)
    assert read.bases is not None
    assert (read.bases[0] == bases).all()
    assert (read.bases[1] == base_slots).all()
    # The worst there is: every block and every base on a page of its own, indices of 4 bytes.
    worst = BlockMap(grid, DType.F32, pages, slots(*[70_000] * count), pages + count, base_slots)
    parts = list(worst.parts())
    assert max(map(len, parts)) <= 2**16
    again = BlockMap.from_parts(parts, grid, DType.F32)
    assert again.bases is not None
    assert (again.bases[0] == pages + count).all()


def test_an_index_behind_the_pages_needs_room() -> None:
    """65,536 pages: their indices fit two bytes, and the one that means no base does not."""
    count = 32_769
    grid = BlockGrid(count, 1, 1, 1)
    pages = np.maximum(np.arange(count, dtype=np.int64) - 1, 0)  # the first two on one page
    bases = np.arange(count, dtype=np.int64) + count
    bases[0] = -1
    none = slots(*[0] * count)
    part = _pack_part(BlockMap(grid, DType.F32, pages, none, bases, none), slice(0, count))
    read = BlockMap.from_parts([part], grid, DType.F32)  # `parts` would cut it
    assert read.bases is not None
    assert (read.bases[0] == bases).all()
    assert (read.page_ids == pages).all()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 3, "does not parse"),
        (4, 1, "does not parse"),
        (40, 3, "outside of its own list"),
        (52, 4, "base's page outside"),
        (58, 1, "base on no page"),
    ],
)
def test_damage_is_named(at: int, value: int, message: str) -> None:
    damaged = bytearray(WITH_DELTA)
    damaged[at] = value
    with pytest.raises(CorruptStoreError, match=message):
        BlockMap.from_parts([bytes(damaged)], GRID, DType.F32)


@pytest.mark.parametrize("column", ["slots", "base_slots"])
def test_a_slot_that_no_page_has_is_damage(column: str) -> None:
    """An add after such a map took memory for each slot up to it."""
    at = {"slots": slots(0, 0, 0), "base_slots": slots(0, 0, 0)}
    for slot, refused in ((2**20 - 1, False), (2**20, True), (2**32 - 1, True)):
        at[column][2] = slot
        written = BlockMap(
            GRID, DType.F32, ids(1, 2, 3), at["slots"], ids(-1, 4, 4), at["base_slots"]
        )
        with (
            pytest.raises(CorruptStoreError, match=f"names slot {slot}, and no page has so many")
            if refused
            else contextlib.nullcontext()
        ):
            BlockMap.from_parts(list(written.parts()), GRID, DType.F32)


@pytest.mark.parametrize("bit", range(40, 64))
def test_a_page_that_no_store_has_is_damage(bit: int) -> None:
    """Its place would be that of another page, whose place together with its slot has 63 bits."""
    page = 4 | (1 << bit if bit < 63 else -1 << bit)
    written = BlockMap(
        GRID, DType.F32, ids(1, 2, 3), slots(0, 0, 0), ids(-1, 4, page), slots(0, 0, 0)
    )
    with (
        pytest.raises(CorruptStoreError, match=r"names page [0-9]{13,}, which no store has")
        if bit >= 43
        else contextlib.nullcontext()
    ):
        BlockMap.from_parts(list(written.parts()), GRID, DType.F32)


@pytest.mark.parametrize(
    ("shape", "dtype", "block_shape"),
    [
        ((1000, 1000), DType.F32, (64, 64)),
        ((1000, 1000), DType.F16, (64, 64)),
        ((1000, 1000), DType.BF16, (64, 64)),
        ((1000, 1000), DType.F64, (32, 64)),
        ((1000, 1000), DType.I8, (256, 64)),
        ((5000, 50), DType.F32, (80, 50)),
        ((10_000, 50), DType.F64, (40, 50)),
        ((10_000, 1), DType.F32, (4096, 1)),
        ((100, 7), DType.F32, (100, 7)),
        ((1, 100_000), DType.F32, (1, 4096)),
        ((3, 100_000), DType.F32, (3, 1344)),
        ((11, 10_000), DType.F32, (11, 320)),
        ((0, 3), DType.F32, (1, 3)),
        ((60_000, 300), DType.F32, (64, 300)),
        ((60_000, 300), DType.BF16, (64, 300)),
        ((60_000, 300), DType.F64, (32, 300)),
        ((60_000, 300), DType.I8, (256, 300)),
        ((30_522, 384), DType.F32, (64, 384)),
        ((30_522, 385), DType.F32, (64, 64)),
        ((60_000, 64), DType.F32, (64, 64)),
        ((60_000, 768), DType.F32, (64, 64)),
        ((4800, 300), DType.F32, (64, 300)),
        ((4799, 300), DType.F32, (64, 64)),
    ],
)
def test_matrices_are_cut_as_they_were(
    shape: tuple[int, int], dtype: DType, block_shape: tuple[int, int]
) -> None:
    """What is cut otherwise shares nothing with what earlier versions of pydedup stored."""
    assert default_block_shape(*shape, dtype) == block_shape


def test_a_stack_is_no_table() -> None:
    experts = np.zeros((16, 256, 256), np.float32)
    assert MatrixView.of(experts).grid.block_shape == MatrixView.of(experts[0]).grid.block_shape
    assert MatrixView.of(experts.reshape(-1, 256)).grid.block_shape == (64, 256)


def test_the_number_of_blocks_is_that_of_the_grid() -> None:
    with pytest.raises(CorruptStoreError, match="3 blocks where its tensor has 12"):
        BlockMap.from_parts([WITH_DELTA], BlockGrid(3, 4, 1, 1), DType.F32)
    assert list(BlockMap(BlockGrid(0, 4, 1, 1), DType.F32, ids(), slots()).parts()) == []
