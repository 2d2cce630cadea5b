# SPDX-License-Identifier: Apache-2.0
"""Matrices on pages in memory, for tests of what reads pages: no database, no store.

Deliberately not here: layouts as a store makes them; pages are filled in block order, or dealt out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import BlockMap, MatrixView
from pydedup.pool import PagePool

__all__ = ["MemoryPages"]


class MemoryPages:
    """Pages by id, with a record of what was fetched."""

    def __init__(self) -> None:
        self.payloads: dict[int, bytes] = {}
        self.fetches: list[list[int]] = []

    def fetch(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the pages that exist, as `Adapter.read_pages` does."""
        self.fetches.append(list(ids))
        return ((number, self.payloads[number]) for number in ids if number in self.payloads)

    def pool(self, memory_bytes: int = 1 << 30) -> PagePool:
        """Return a pool on these pages."""
        return PagePool(self.fetch, memory_bytes)

    def add(
        self,
        array: NDArray[Any],
        block_shape: tuple[int, int] | None = None,
        *,
        planes: bool = False,
        per_page: int = 8,
        scattered: bool = False,
    ) -> BlockMap:
        """Store an array and return where its blocks are.

        Parameters
        ----------
        array
            Of any rank and storable dtype.
        planes
            Whether to compress byte planes where that pays.
        per_page
            Blocks on a page.
        scattered
            Deal blocks out to the pages in turn, so that neighbours lie apart.
        """
        view = MatrixView.of(array, block_shape)
        count = view.grid.count
        encoded = codec.encode_blocks(view, np.arange(count), planes=planes)
        pages = -(-count // per_page)
        page_of = np.arange(count) % max(pages, 1) if scattered else np.arange(count) // per_page
        heights, widths = view.grid.heights(), view.grid.widths()
        first = max(self.payloads, default=0) + 1
        slots = np.empty(count, np.uint32)
        for page in range(pages):
            mine = np.flatnonzero(page_of == page)
            slots[mine] = np.arange(len(mine))
            self.payloads[first + page] = codec.build_page(
                encoded.arena,
                encoded.offsets[mine],
                encoded.lengths[mine],
                encoded.encodings[mine],
                np.full(len(mine), view.dtype.code),
                heights[mine],
                widths[mine],
            )
        return BlockMap(view.grid, view.dtype, (first + page_of).astype(np.int64), slots)
