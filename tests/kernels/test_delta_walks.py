# SPDX-License-Identifier: Apache-2.0
"""Walks over blocks and their bases, and bases that are damaged or not at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pydedup import _core, codec, conv, lookup, matmul
from pydedup.blocks import NO_PAGE, BlockMap, MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError, PageNotFoundError
from pydedup.pool import PagePool

from .test_delta_kernels import Pair, x_for

SHAPE = (70, 135)  # edge blocks on both sides
BLOCK = (16, 32)


# ---- walks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("budget_pages", [2, 3, 40])
def test_a_walk_visits_each_block_once_with_both_pages(budget_pages: int, in_order: bool) -> None:
    pair = Pair(every=2, scattered=True)
    assert pair.delta.bases is not None
    pool = pair.pages.pool(budget_pages * max(map(len, pair.pages.payloads.values())))
    walk = pool.stream if in_order else pool.windows_with_bases
    seen: list[int] = []
    everything = np.arange(pair.delta.grid.count)
    for rows, pages, page_index, bases in walk(pair.delta.page_ids, pair.delta.bases):
        mine = everything[rows]
        seen += mine.tolist()
        assert bases is not None
        for at, block in enumerate(mine.tolist()):
            page = pages[page_index[at]]
            assert page.payload == pair.pages.payloads[int(pair.delta.page_ids[block])]
            base = int(pair.delta.bases[0][block])
            index = int(np.asarray(bases.page_index)[at])
            assert (index == -1) == (base == NO_PAGE)
            if index >= 0:
                assert bases.pages[index].payload == pair.pages.payloads[base]
                assert np.asarray(bases.slots)[at] == pair.delta.bases[1][block]
    assert sorted(seen) == everything.tolist()
    assert not in_order or seen == sorted(seen)


def test_walks_without_bases_give_none() -> None:
    pair = Pair()
    pool, page_ids = pair.pages.pool(), pair.raw.page_ids
    plain = [rows.tolist() for rows, _, _ in pool.windows(page_ids)]
    with_none = pool.windows_with_bases(page_ids, None)
    assert [rows.tolist() for rows, _, _, none in with_none if none is None] == plain
    parts = [(part.start, part.stop) for part, *_, none in pool.stream(page_ids, None) if not none]
    starts, stops = zip(*parts, strict=True)
    assert starts == (0, *stops[:-1])
    assert stops[-1] == len(page_ids)


def test_a_walk_remembers_which_bases_it_was_planned_for() -> None:
    pair = Pair(every=2)
    pool = pair.pages.pool()
    x = x_for(pair, 2)
    want = matmul.matmul(pair.delta, pool, x)
    with pytest.raises(CorruptStoreError, match="without its base"):
        matmul.matmul(replace(pair.delta, base_page_ids=None, base_slots=None), pool, x)
    assert (matmul.matmul(pair.delta, pool, x) == want).all()


# ---- damage -------------------------------------------------------------------------------------


def no_bases(pair: Pair) -> BlockMap:
    return replace(pair.delta, base_page_ids=None, base_slots=None)


def one_missing(pair: Pair) -> BlockMap:
    assert pair.delta.bases is not None
    pages = pair.delta.bases[0].copy()
    pages[0] = NO_PAGE
    return replace(pair.delta, base_page_ids=pages)


def is_a_delta(pair: Pair) -> BlockMap:
    return replace(pair.delta, base_page_ids=pair.delta.page_ids, base_slots=pair.delta.slots)


def wrong_block(pair: Pair) -> BlockMap:
    assert pair.delta.bases is not None
    slots = pair.delta.bases[1].copy()
    slots[0] += 1
    return replace(pair.delta, base_slots=slots)


def no_such_slot(pair: Pair) -> BlockMap:
    assert pair.delta.bases is not None
    slots = pair.delta.bases[1].copy()
    slots[0] = 2**31
    return replace(pair.delta, base_slots=slots)


def other_shape(pair: Pair) -> BlockMap:
    assert pair.delta.bases is not None
    pages, slots = pair.delta.bases[0].copy(), pair.delta.bases[1].copy()
    pages[0], slots[0] = pages[-1], slots[-1]
    return replace(pair.delta, base_page_ids=pages, base_slots=slots)


def no_such_page(pair: Pair) -> BlockMap:
    assert pair.delta.bases is not None
    pages = pair.delta.bases[0].copy()
    pages[0] = 10**9
    return replace(pair.delta, base_page_ids=pages)


USES: dict[str, Callable[[BlockMap, PagePool], Any]] = {
    "read": matmul.read,
    "dots": lambda m, pool: matmul.matmul(m, pool, np.ones((1, SHAPE[1]), np.float32)),
    "tiles": lambda m, pool: matmul.matmul(m, pool, np.ones((30, SHAPE[1]), np.float32)),
    "transposed": lambda m, pool: matmul.matmul(
        m, pool, np.ones((2, SHAPE[0]), np.float32), transpose=True
    ),
    "take": lambda m, pool: lookup.take(m, pool, [0, 1]),
    "bag": lambda m, pool: lookup.bag(m, pool, [[0, 1]]),
    "conv": lambda m, pool: conv.conv2d(
        m, pool, np.ones((1, SHAPE[1] // 27, 9, 9), np.float32), kernel=(3, 9)
    ),
}
DAMAGE: list[tuple[Callable[[Pair], BlockMap], type[Exception], str]] = [
    (no_bases, CorruptStoreError, "without its base"),
    (one_missing, CorruptStoreError, "without its base"),
    (is_a_delta, CorruptStoreError, "base is a delta itself"),
    (wrong_block, CorruptStoreError, "not the base that it was made from"),
    (no_such_slot, CorruptStoreError, "slot"),
    (other_shape, CorruptStoreError, "its base has"),
    (no_such_page, PageNotFoundError, "does not exist"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_bad_bases_are_errors(
    damage: Callable[[Pair], BlockMap], error: type[Exception], message: str, use: str
) -> None:
    pair = Pair()
    damaged = damage(pair)
    for pool in (pair.pages.pool(), pair.pages.pool(pair.two_pages)):
        for _ in range(2):  # with pages fetched, and with pages that were there
            with pytest.raises(error, match=message):
                USES[use](damaged, pool)
            assert pool.stats()["pinned_bytes"] == 0


def pages_of(pair: Pair, *numbers: int) -> list[codec.Page]:
    return [codec.Page(pair.pages.payloads[number]) for number in numbers]


def test_bases_that_are_not_at_hand_are_argument_errors() -> None:
    pair = Pair()
    assert pair.delta.bases is not None
    grid, page = pair.delta.grid, int(pair.delta.page_ids[0])
    n = int((pair.delta.page_ids == page).sum())
    (here,) = pages_of(pair, page)
    index, slots = np.zeros(n, np.uint32), pair.delta.slots[:n]
    row = np.zeros(1, np.int64)
    view = MatrixView.of(np.empty(SHAPE, np.float32), BLOCK)
    for base_index, base_slots in (
        (np.full(n, 1), slots),  # behind the list
        (np.full(n, -2), slots),
        (np.full(n, 2**40), slots),
        (np.zeros(n - 1, np.int64), slots[1:]),  # too few
        (np.zeros(n, np.int64), slots[1:]),
    ):
        bases = codec.StoredBases([here], base_index, base_slots)
        with pytest.raises(ArgumentError):
            codec.read_blocks(view, np.arange(n), [here], index, slots, bases=bases)
        with pytest.raises(ArgumentError):
            codec.blocks_equal(view, np.arange(n), [here], index, slots, bases=bases)
        with pytest.raises(ArgumentError):
            codec.block_digests([here], index, slots, bases=bases)
        x, y = np.ones((1, SHAPE[1]), np.float32), np.empty((1, SHAPE[0]), np.float32)
        shape = (grid.rows, grid.cols, grid.block_rows, grid.block_cols, pair.delta.dtype.code)
        product = _core.Matmul(*shape, x, None, "none", False, y)
        with pytest.raises(ArgumentError):
            product.feed([here], index, slots, codec.bases_for_core(bases))
        table = _core.RowTable(*shape, pair.delta.page_ids, pair.delta.slots, *pair.delta.bases)
        out = np.empty((1, 4 * SHAPE[1]), np.uint8)
        core = codec.bases_for_core(bases)
        with pytest.raises(ArgumentError):
            table.take_blocks(np.arange(n), [here], index, slots, core, row, out)
    # The page of the delta without that of its base.
    with pytest.raises(ArgumentError, match="not among the"):
        table.take_from(np.array([page]), [here], row, out)
    with pytest.raises(ArgumentError, match="out of range"):
        table.take_blocks(np.array([grid.count]), [here], index[:1], slots[:1], None, row, out)
    with pytest.raises(ArgumentError, match="slots of bases"):
        _core.RowTable(
            *shape, pair.delta.page_ids, pair.delta.slots, *(b[1:] for b in pair.delta.bases)
        )
