# SPDX-License-Identifier: Apache-2.0
"""Blocks on their way through an add: copied out of matrices, and onto pages."""

from __future__ import annotations

import numpy as np
import pytest

from pydedup import codec
from pydedup.adapter import TensorRow
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.ingest.deltas import delta_limits
from pydedup.ingest.places import by_shape, stack_blocks
from pydedup.ingest.stored_table import StoredTable
from pydedup.ingest.write import _batches
from pydedup.layout import block_places, copy_page
from pydedup.pool import PagePool


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float64])
def test_stacks_hold_the_blocks_in_the_order_asked_for(dtype: type) -> None:
    matrix = np.arange(70 * 45).reshape(70, 45).astype(dtype)
    view = MatrixView.of(matrix, (32, 20))
    wanted = np.array([8, 0, 4, 1, 3, 0, 2, 7, 5])
    seen = []
    for shape, at in by_shape(view, wanted):
        stack = stack_blocks(view, wanted[at], shape)
        values = stack.data.view(dtype).reshape(-1, *shape)
        for block, number in zip(values, wanted[at].tolist(), strict=True):
            row, col = divmod(number, 3)
            top, left = row * 32, col * 20
            np.testing.assert_array_equal(block, matrix[top : top + 32, left : left + 20])
        assert (stack.grid.count, stack.grid.block_rows, stack.grid.block_cols) == (
            len(at),
            *shape,
        )
        seen += at.tolist()
    assert sorted(seen) == list(range(len(wanted)))


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 26])  # its pages one by one, or at once
def test_a_page_of_blocks_from_anywhere_is_the_page_that_they_were_encoded_for(
    memory_bytes: int,
) -> None:
    rng = np.random.default_rng(0)
    view = MatrixView.of(rng.standard_normal((40, 300)).astype(np.float32), (8, 100))
    every = np.arange(view.grid.count)
    encoded = codec.encode_blocks(view, every, planes=True)

    def page(numbers: np.ndarray) -> bytes:
        count = len(numbers)
        return codec.build_page(
            encoded.arena,
            encoded.offsets[numbers],
            encoded.lengths[numbers],
            encoded.encodings[numbers],
            np.full(count, view.dtype.code),
            np.full(count, 8),
            np.full(count, 100),
        )

    parts = [every[:7], every[7:9], every[9:]]
    pages = {number: page(part) for number, part in enumerate(parts)}
    pool = PagePool(lambda ids: ((i, None, pages[i]) for i in ids), memory_bytes)
    order = rng.permutation(every)
    page_of = np.searchsorted([7, 9], order, side="right")
    slots = (order - np.array([0, 7, 9])[page_of]).astype(np.uint32)
    assert copy_page(pool, page_of, slots) == page(order)
    some = order[::3]
    assert copy_page(pool, page_of[::3], slots[::3]) == page(some)
    slots[4] = 9
    with pytest.raises(CorruptStoreError, match=r"slot 9 was asked of a page with . slots"):
        copy_page(pool, page_of, slots)


def test_blocks_are_gathered_from_pages_that_are_there() -> None:
    columns = (np.zeros(1, np.uint32), np.zeros(2, np.uint32))
    for page_index, slots in (columns, columns[::-1]):
        with pytest.raises(ArgumentError, match="differ in length"):
            codec.gather_page([], page_index, slots)
    with pytest.raises(ArgumentError, match="page_index 0 is outside of 0 pages"):
        codec.gather_page([], columns[0], columns[0])
    assert codec.Page(codec.gather_page([], columns[0][:0], columns[0][:0])).n_slots == 0


def test_rows_go_into_transactions_of_bounded_bytes() -> None:
    maps = [("map", (1, number, 0, bytes(1 << 20))) for number in range(20)]
    rows = [("tensor", TensorRow(1, 0, "w", "f32", "[1]", "[1]")), *maps]
    batches = list(_batches(iter(rows)))
    assert [row for batch in batches for row in batch] == rows
    assert [len(batch) for batch in batches] == [9, 8, 4]


def test_a_delta_is_to_save_a_twentieth_or_a_byte() -> None:
    lengths = np.array([1, 19, 20, 39, 40, 1000])
    assert delta_limits(lengths).tolist() == [0, 18, 19, 38, 38, 950]


def test_a_place_has_one_reference() -> None:
    table = StoredTable()
    places = block_places(np.array([5, 3, 5, 5]), np.array([0, 0, 1, 0], np.uint32))
    references = table.references_at(places)
    assert references[0] == references[3] == table.references_at(places[:1])[0]
    assert len(set(references.tolist())) == 3
    np.testing.assert_array_equal(table.places(references), places)


def test_slots_of_a_pooled_page_outlive_it() -> None:
    view = MatrixView.of(np.arange(4096, dtype=np.float32).reshape(64, 64), (8, 16))
    every = np.arange(view.grid.count)
    encoded = codec.encode_blocks(view, every, planes=True)
    count = len(every)
    payload = codec.build_page(
        encoded.arena,
        encoded.offsets,
        encoded.lengths,
        encoded.encodings,
        np.full(count, view.dtype.code),
        np.full(count, 8),
        np.full(count, 16),
    )
    pool = PagePool(lambda ids: ((i, None, payload) for i in ids), 1 << 20)
    (page,) = pool.pages([0])
    slots = page.slots
    del page
    pool.clear()
    np.testing.assert_array_equal(slots, codec.Page(payload).slots)
    assert not slots.flags.writeable
    with pytest.raises(ArgumentError, match=r"^slots must hold integers of uint32, not float64"):
        codec.gather_page([], [0], [0.5])
    with pytest.raises(
        ArgumentError, match=r"^page_index must hold integers of uint32, not of -1 to -1"
    ):
        codec.gather_page([], [-1], [0])
