# SPDX-License-Identifier: Apache-2.0
"""Pages that an add reads: most past the pool, the ones that come back into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import CorruptStoreError, PageNotFoundError
from pydedup.ingest.scan import PageScan
from pydedup.pool import PagePool


def page(number: int) -> bytes:
    view = MatrixView.of(np.full((8, 16), number, np.float32), (8, 16))
    encoded = codec.encode_blocks(view, np.arange(1), planes=False)
    columns = encoded.offsets, encoded.lengths, encoded.encodings
    return codec.build_page(encoded.arena, *columns, [view.dtype.code], [8], [16])


class Pages:
    """The part of an adapter that is needed here; says what was read."""

    def __init__(self, count: int) -> None:
        self.payloads = {number: page(number) for number in range(1, count + 1)}
        self.checksums = {n: codec.page_checksum(one) for n, one in self.payloads.items()}
        self.read: list[int] = []

    def read_recorded_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        for number in ids:
            self.read.append(number)
            if number in self.payloads:
                yield number, self.checksums[number], self.payloads[number]


def walk(scan: PageScan, page_ids: Sequence[int]) -> None:
    """Walk over the first block of each of these pages and check that it is that."""
    seen = []
    for rows, pages, page_index in scan.windows(np.array(page_ids, np.int64)):
        for row, number in zip(rows.tolist(), page_index.tolist(), strict=True):
            assert pages[number].payload == page(page_ids[row])
            seen.append(row)
    assert sorted(seen) == list(range(len(page_ids)))


@pytest.fixture
def pages() -> Pages:
    return Pages(40)


def test_pages_needed_once_are_read_once_and_not_pooled(pages: Pages) -> None:
    pool = PagePool(pages.read_recorded_pages, 1 << 20)
    walk(PageScan(pages, pool), [*range(40, 0, -1), 7, 7, 1])  # type: ignore[arg-type]
    assert sorted(pages.read) == list(range(1, 41))
    assert pool.stats()["pages"] == 0


def test_the_last_pages_are_kept_and_those_that_come_back_are_pooled(pages: Pages) -> None:
    pool = PagePool(pages.read_recorded_pages, 1 << 20)
    scan = PageScan(pages, pool)  # type: ignore[arg-type]
    walk(scan, [1, 2, 3])
    walk(scan, [3, 2])
    assert pages.read == [1, 2, 3]
    walk(scan, list(range(4, 30)))
    walk(scan, [1, 2])
    assert pages.read == [*range(1, 30), 1, 2]
    assert pool.stats()["pages"] == 2
    pages.read.clear()
    walk(scan, [1, 2])
    assert pages.read == []


def test_what_is_pooled_is_not_read(pages: Pages) -> None:
    pool = PagePool(pages.read_recorded_pages, 1 << 20)
    pool.pages([5])
    pages.read.clear()
    walk(PageScan(pages, pool), [5, 6])  # type: ignore[arg-type]
    assert pages.read == [6]


def test_a_pool_that_is_too_small_is_done_without(pages: Pages) -> None:
    pool = PagePool(pages.read_recorded_pages, 700)  # not even one page
    scan = PageScan(pages, pool)  # type: ignore[arg-type]
    for _ in range(3):
        walk(scan, list(range(1, 41)))


def test_damaged_and_missing_pages_are_named(pages: Pages) -> None:
    scan = PageScan(pages, PagePool(pages.read_recorded_pages, 1 << 20))  # type: ignore[arg-type]
    with pytest.raises(PageNotFoundError, match="99"):
        walk(scan, [1, 99])
    broken = bytearray(pages.payloads[2])
    broken[-1] ^= 1
    pages.payloads[2] = bytes(broken)
    with pytest.raises(CorruptStoreError, match=r"page 2: .*run verify"):
        walk(scan, [2])


def test_a_page_in_the_place_of_another_is_damage(pages: Pages) -> None:
    """Each is sound by itself: only what is recorded tells that they are exchanged."""
    pages.payloads[2], pages.payloads[3] = pages.payloads[3], pages.payloads[2]
    pool = PagePool(pages.read_recorded_pages, 1 << 20)
    for read in (lambda: walk(PageScan(pages, pool), [1, 2]), lambda: pool.pages([1, 2])):  # type: ignore[arg-type]
        with pytest.raises(
            CorruptStoreError, match=r"page 2: its checksum is not the one of its row"
        ):
            read()
    assert pool.stats()["pages"] <= 1


def test_a_page_is_the_one_that_models_recorded(pages: Pages) -> None:
    """Row and page are those of another, which nothing else tells."""
    pool = PagePool(pages.read_recorded_pages, 1 << 20)
    pool.expect({2: pages.checksums[2][:8]})
    walk(PageScan(pages, pool), [2])  # type: ignore[arg-type]
    pages.payloads[2], pages.checksums[2] = pages.payloads[3], pages.checksums[3]
    with pytest.raises(CorruptStoreError, match="page 2"):
        walk(PageScan(pages, pool), [1, 2])  # type: ignore[arg-type]
