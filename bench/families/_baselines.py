# SPDX-License-Identifier: Apache-2.0
"""Ways to find near duplicates, written from what papers say of them, and pydedup's beside them.

Each is asked, for the blocks of a model, which distinct block seen before is nearest, and then told
which of them became distinct blocks themselves. What is done about it is not decided here.

`Pairwise` looks at every pair: the share of entries within 0.01 of each other, as Zhou et al.
(PVLDB 2022) measure similarity. `Products` does so where a matrix product of all blocks with all
others says that two are near, which is the fastest way to look at every pair that we know.
`MinHash` is after the approximate matching of MISTIQUE (Vartak et al., SIGMOD 2018): values are
rounded, a block is the set of its (place, value), and blocks whose min-hash signatures agree in a
band are compared by how much of the signatures agrees.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pydedup.similarity import L2LSH, distances

__all__ = ["Detector", "MinHash", "Ours", "Pairwise", "Products"]

#: Entries so close are alike, and blocks of which so many entries are alike are near.
EPSILON, SIMILAR = 0.01, 0.7
_NONE = -1

Blocks = NDArray[np.float32]
Found = NDArray[np.int64]


class Detector(Protocol):
    """Finds the nearest distinct block."""

    def nearest(self, blocks: Blocks) -> Found:
        """Return, for each block (n, elements), the number of a similar one, or -1."""

    def add(self, blocks: Blocks) -> None:
        """Make blocks distinct ones, numbered in this order."""


def share_within(block: NDArray[np.float32], others: Blocks) -> NDArray[np.float64]:
    """Return for each of ``others`` the share of entries that are within `EPSILON`."""
    share: NDArray[np.float64] = (np.abs(others - block) <= EPSILON).mean(axis=1)
    return share


class Pairwise:
    """Every pair, entry by entry."""

    def __init__(self, room: int, elements: int) -> None:
        self._blocks = np.empty((room, elements), np.float32)
        self._count = 0

    def nearest(self, blocks: Blocks) -> Found:
        found = np.full(len(blocks), _NONE, np.int64)
        # So many at a time stay in the cache.
        for row, block in enumerate(blocks):
            best = SIMILAR
            for start in range(0, self._count, 64):
                share = share_within(block, self._blocks[start : min(start + 64, self._count)])
                if share.max() >= best:
                    best, found[row] = float(share.max()), start + int(share.argmax())
        return found

    def add(self, blocks: Blocks) -> None:
        self._blocks[self._count : self._count + len(blocks)] = blocks
        self._count += len(blocks)


class Products(Pairwise):
    """Every pair by matrix products; the four nearest of each block entry by entry."""

    def nearest(self, blocks: Blocks) -> Found:
        found = np.full(len(blocks), _NONE, np.int64)
        known = self._blocks[: self._count]
        squares = np.einsum("ij,ij->i", known, known)
        for start in range(0, len(blocks) if self._count else 0, 512):
            some = blocks[start : start + 512]
            away = squares - 2 * (some @ known.T)
            count = min(4, self._count)
            near = np.argpartition(away, count - 1, axis=1)[:, :count]
            for row, (block, numbers) in enumerate(zip(some, near, strict=True), start):
                share = share_within(block, known[numbers])
                if share.max() >= SIMILAR:
                    found[row] = numbers[share.argmax()]
        return found


class MinHash:
    """Signatures of 64 min-hashes in 16 bands of 4."""

    _HASHES, _BANDS = 64, 16

    def __init__(self, elements: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._places = rng.integers(1, 2**32, elements, dtype=np.uint64) | np.uint64(1)
        self._factors = rng.integers(1, 2**32, self._HASHES, dtype=np.uint64) | np.uint64(1)
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(self._BANDS)]

    def nearest(self, blocks: Blocks) -> Found:
        found = np.full(len(blocks), _NONE, np.int64)
        for row, block in enumerate(blocks):
            signature = self._signature(block)
            numbers = {
                number
                for band, key in zip(self._bands, self._keys(signature), strict=True)
                for number in band.get(key, ())
            }
            if not numbers:
                continue
            order = sorted(numbers)
            agree = [float((self._signatures[n] == signature).mean()) for n in order]
            if max(agree) >= SIMILAR:
                found[row] = order[int(np.argmax(agree))]
        return found

    def add(self, blocks: Blocks) -> None:
        for block in blocks:
            signature = self._signature(block)
            for band, key in zip(self._bands, self._keys(signature), strict=True):
                band.setdefault(key, []).append(len(self._signatures))
            self._signatures.append(signature)

    def _signature(self, block: NDArray[np.float32]) -> NDArray[np.uint32]:
        rounded = np.floor(block / EPSILON).astype(np.int64).astype(np.uint64)
        mixed = (rounded * np.uint64(0x9E3779B97F4A7C15) ^ self._places) * self._places
        mixed ^= mixed >> np.uint64(29)
        with np.errstate(over="ignore"):
            hashed = (mixed * self._factors[:, np.newaxis]) >> np.uint64(32)
        return hashed.min(axis=1).astype(np.uint32)

    def _keys(self, signature: NDArray[np.uint32]) -> list[bytes]:
        return [part.tobytes() for part in np.split(signature, self._BANDS)]


class Ours:
    """What a store does to find candidates: sketches, the nearest three, exact distances."""

    def __init__(self, room: int, shape: tuple[int, int], farthest: float) -> None:
        self._index = L2LSH(shape, np.float32)
        self._blocks = np.empty((room, *shape), np.float32)
        self._count, self._shape, self._farthest = 0, shape, farthest

    def nearest(self, blocks: Blocks) -> Found:
        shaped = blocks.reshape(-1, *self._shape)
        ids: NDArray[Any]
        ids, estimates = self._index.query(shaped, k=3)
        rows, columns = np.nonzero((ids >= 0) & (estimates <= self._farthest))
        chosen = ids[rows, columns]
        away = distances(shaped[rows], self._blocks[chosen], limit=self._farthest).relative_l2
        found = np.full(len(blocks), _NONE, np.int64)
        least = np.full(len(blocks), np.inf)
        for row, number, distance in zip(rows, chosen, away, strict=True):
            if distance < least[row]:
                least[row], found[row] = distance, number
        return found

    def add(self, blocks: Blocks) -> None:
        stop = self._count + len(blocks)
        self._blocks[self._count : stop] = blocks.reshape(-1, *self._shape)
        self._index.add(self._blocks[self._count : stop], np.arange(self._count, stop))
        self._count = stop
