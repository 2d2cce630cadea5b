# SPDX-License-Identifier: Apache-2.0
"""Matrices on pages in memory, for tests of what reads pages: no database, no store.

Deliberately not here: layouts as a store makes them; pages are filled in block order, or dealt out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec, hashing
from pydedup.blocks import NO_PAGE, BlockMap, MatrixView
from pydedup.pool import Fetched, PagePool
from pydedup.types import DType

__all__ = ["MemoryPages", "random_weights"]


class MemoryPages:
    """Pages by id, with a record of what was fetched."""

    def __init__(self) -> None:
        self.payloads: dict[int, bytes] = {}
        self.fetches: list[list[int]] = []

    def fetch(self, ids: Sequence[int]) -> Iterator[Fetched]:
        """Yield the pages that exist, of which nothing is recorded."""
        self.fetches.append(list(ids))
        return ((number, None, self.payloads[number]) for number in ids if number in self.payloads)

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
        encoded = codec.encode_blocks(view, np.arange(view.grid.count), planes=planes)
        return self._lay(view, encoded, per_page, scattered)

    def add_deltas(
        self,
        array: NDArray[Any],
        base: NDArray[Any],
        base_map: BlockMap,
        *,
        every: int = 1,
        max_rel_error: float | None = None,
        per_page: int = 8,
        scattered: bool = False,
    ) -> BlockMap:
        """Store an array as deltas on another, block on block, and return where its blocks are.

        Parameters
        ----------
        array
            As for `add`.
        base
            What `add` returned ``base_map`` for: of the same shape, and of the same dtype or both
            of floats.
        every
            One in so many blocks is a delta, where that is smaller; the others are raw.
        max_rel_error
            ``None`` for exact deltas, otherwise as in `codec.encode_deltas`.
        """
        grid = base_map.grid
        shape = grid.block_shape
        view, base_view = MatrixView.of(array, shape), MatrixView.of(base, shape)
        indices = np.arange(grid.count)
        raw = codec.encode_blocks(view, indices, planes=False)
        deltas = codec.encode_deltas(view, indices, base_view, indices, max_rel_error=max_rel_error)
        chosen = (indices % every == 0) & (deltas.lengths > 0)
        encoded = codec.EncodedBlocks(
            np.concatenate((raw.arena, deltas.arena)),
            np.where(chosen, deltas.offsets + len(raw.arena), raw.offsets),
            np.where(chosen, deltas.lengths, raw.lengths),
            np.where(chosen, deltas.encodings, raw.encodings),
        )
        tags = np.maximum(hashing.hash_view(base_view)[:, 0], np.uint64(1))
        block_map = self._lay(view, encoded, per_page, scattered, np.where(chosen, tags, 0))
        return replace(
            block_map,
            base_page_ids=np.where(chosen, base_map.page_ids, NO_PAGE),
            base_slots=np.where(chosen, base_map.slots, 0).astype(np.uint32),
        )

    def _lay(
        self,
        view: MatrixView,
        encoded: codec.EncodedBlocks,
        per_page: int,
        scattered: bool,
        tags: NDArray[np.uint64] | None = None,
    ) -> BlockMap:
        count = view.grid.count
        pages = -(-count // per_page)
        page_of = np.arange(count) % max(pages, 1) if scattered else np.arange(count) // per_page
        heights, widths = view.grid.all_shapes()
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
                None if tags is None else tags[mine],
            )
        return BlockMap(view.grid, view.dtype, (first + page_of).astype(np.int64), slots)


def random_weights(rng: np.random.Generator, shape: tuple[int, int], dtype: DType) -> NDArray[Any]:
    """Return weights of any dtype: normal, or integers below 2**40 in magnitude.

    Sums of products of these are far from the limits of int64, so that a reference is exact.
    """
    if dtype is DType.BOOL:
        return rng.random(shape) < 0.5
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    limits = np.iinfo(dtype.numpy)
    low, high = max(limits.min, -(1 << 40)), min(limits.max, 1 << 40)
    return rng.integers(low, high, shape, dtype=dtype.numpy, endpoint=True)
