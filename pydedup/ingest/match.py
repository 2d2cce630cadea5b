# SPDX-License-Identifier: Apache-2.0
"""Exact matching: for each block of each model, where its bytes already are.

A block is looked for in its own tensor, in the blocks of this batch, and in the store, by hash;
bytes are compared before anything is shared. What is found nowhere goes to the spool.

References are int64: n >= 0 is block n of the spool, n < 0 is entry -(n+1) of the stored table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter, BlockRow
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.spool import Spool
from pydedup.pool import PagePool

__all__ = ["Matcher", "StoredTable", "hash_keys"]

# Blocks encoded in one go: bounds the arena beside the tensor to 2 MiB or so.
_ENCODE_BLOCKS = 128
_LOOKUP_BLOCKS = 8192


def hash_keys(digests: NDArray[np.uint64]) -> list[bytes]:
    """Return digests of shape (n, 2) as 16-byte keys, little-endian."""
    flat = np.ascontiguousarray(digests, "<u8").tobytes()
    return [flat[i : i + 16] for i in range(0, len(flat), 16)]


@dataclass(slots=True)
class StoredTable:
    """Blocks of the store that this batch shares."""

    page_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    _number: dict[tuple[int, int], int] = field(default_factory=dict)

    def reference(self, row: BlockRow) -> int:
        """Return the (negative) reference of a stored block."""
        place = (row.page_id, row.slot)
        number = self._number.get(place)
        if number is None:
            number = len(self.page_ids)
            self._number[place] = number
            self.page_ids.append(row.page_id)
            self.slots.append(row.slot)
            self.costs.append(0)
        return -(number + 1)

    def places(self, references: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Return page ids and slots of (negative) references; the table itself is not walked."""
        numbers = (-references - 1).tolist()
        page_ids = np.fromiter((self.page_ids[n] for n in numbers), np.int64, len(numbers))
        slots = np.fromiter((self.slots[n] for n in numbers), np.uint32, len(numbers))
        return page_ids, slots

    def costs_of(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the blocks of (negative) references take on their pages."""
        numbers = (-references - 1).tolist()
        return np.fromiter((self.costs[n] for n in numbers), np.int64, len(numbers))


class Matcher:
    """Matches the tensors of one batch, in order. Not thread-safe."""

    def __init__(self, adapter: Adapter, pool: PagePool, spool: Spool) -> None:
        self._adapter = adapter
        self._pool = pool
        self._spool = spool
        self.stored = StoredTable()
        # hash -> references of blocks with that hash; several only where hashes collide, or the
        # same bytes exist under two dtypes.
        self._known: dict[bytes, list[int]] = {}
        self._asked: set[bytes] = set()

    def match(
        self,
        view: MatrixView,
        *,
        planes: bool,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the reference of each block of a matrix, and its digests (n, 2)."""
        digests = hash_view(view)
        sizes = view.block_bytes()
        keys = hash_keys(digests)
        references = np.empty(len(keys), np.int64)
        for start in range(0, len(keys), _LOOKUP_BLOCKS):
            stop = min(start + _LOOKUP_BLOCKS, len(keys))
            self._look_up(keys[start:stop])
            self._resolve(view, keys, digests, references, start, stop, planes)
            if advance is not None:
                advance(int(sizes[start:stop].sum()))
        return references, digests

    def _look_up(self, keys: list[bytes]) -> None:
        """Ask the store about hashes that it was not asked about before."""
        unknown = [key for key in dict.fromkeys(keys) if key not in self._asked]
        self._asked.update(unknown)
        for row in self._adapter.find_blocks(unknown):
            found = self._known.setdefault(row.hash128, [])
            reference = self.stored.reference(row)
            if reference not in found:
                # Stored blocks first: sharing with the store beats sharing within the batch.
                found.insert(0, reference)

    def _resolve(
        self,
        view: MatrixView,
        keys: list[bytes],
        digests: NDArray[np.uint64],
        references: NDArray[np.int64],
        start: int,
        stop: int,
        planes: bool,
    ) -> None:
        pending = list(range(start, stop))
        fresh: dict[bytes, list[int]] = {}  # hash -> blocks of this range that found no match
        attempt = 0
        while pending:
            indices: list[int] = []
            candidates: list[int] = []
            for i in pending:
                known = self._known.get(keys[i], ())
                if attempt < len(known):
                    indices.append(i)
                    candidates.append(known[attempt])
                else:
                    fresh.setdefault(keys[i], []).append(i)
            same = self._equal(view, np.array(indices, np.int64), np.array(candidates, np.int64))
            for i, reference, equal in zip(indices, candidates, same, strict=True):
                if equal:
                    references[i] = reference
            pending = [i for i, equal in zip(indices, same, strict=True) if not equal]
            attempt += 1
        self._append(view, fresh, digests, references, planes)

    def _append(
        self,
        view: MatrixView,
        fresh: dict[bytes, list[int]],
        digests: NDArray[np.uint64],
        references: NDArray[np.int64],
        planes: bool,
    ) -> None:
        """Spool the distinct ones of ``fresh``, in block order."""
        leader_of: dict[int, int] = {}
        leaders: list[int] = []
        for blocks in fresh.values():
            groups: list[int] = []
            for i in blocks:
                leader = next((g for g in groups if _same_bytes(view, g, i)), None)
                if leader is None:
                    groups.append(i)
                    leaders.append(i)
                    leader = i
                leader_of[i] = leader
        leaders.sort()
        for start in range(0, len(leaders), _ENCODE_BLOCKS):
            piece = np.array(leaders[start : start + _ENCODE_BLOCKS], np.int64)
            first = self._spool.count
            self._spool.append(view, piece, digests[piece], planes=planes)
            references[piece] = first + np.arange(len(piece))
        for blocks_key, blocks in fresh.items():
            known = self._known.setdefault(blocks_key, [])
            for i in blocks:
                references[i] = references[leader_of[i]]
                if leader_of[i] == i:
                    known.append(int(references[i]))

    def _equal(
        self, view: MatrixView, indices: NDArray[np.int64], candidates: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Compare blocks of the matrix with what the references hold, byte by byte."""
        equal = np.zeros(len(indices), np.bool_)
        spooled = np.flatnonzero(candidates >= 0)
        if len(spooled):
            equal[spooled] = self._spool.equal(view, indices[spooled], candidates[spooled])
        stored = np.flatnonzero(candidates < 0)
        if len(stored):
            references = candidates[stored]
            page_ids, slots = self.stored.places(references)
            for rows, pages, page_index in self._pool.windows(page_ids):
                at = stored[rows]
                equal[at] = codec.blocks_equal(view, indices[at], pages, page_index, slots[rows])
                self._note_costs(references[rows], pages, page_index, slots[rows])
        return equal

    def _note_costs(
        self,
        references: NDArray[np.int64],
        pages: list[codec.Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
    ) -> None:
        """Remember what stored blocks take on their pages, while the pages are at hand."""
        costs = [codec.page_cost(page.slots["length"]) for page in pages]
        for reference, page, slot in zip(references.tolist(), page_index, slots, strict=True):
            self.stored.costs[-reference - 1] = int(costs[page][slot])


def _same_bytes(view: MatrixView, a: int, b: int) -> bool:
    """Whether two blocks of one matrix have the same shape and bytes."""
    return bool(np.array_equal(_bytes_of(view, a), _bytes_of(view, b)))


def _bytes_of(view: MatrixView, index: int) -> NDArray[np.uint8]:
    grid, item = view.grid, view.dtype.itemsize
    row, col = divmod(index, grid.grid_cols)
    top, left = row * grid.block_rows, col * grid.block_cols * item
    return view.data[top : top + grid.block_rows, left : left + grid.block_cols * item]
