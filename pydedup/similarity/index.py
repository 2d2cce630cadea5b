# SPDX-License-Identifier: Apache-2.0
"""The index of sketches that finds near duplicates.

Deliberately not here: the sketches, which the native core makes, and blocks: they stay where they
are, and come back through ``fetch`` when exact distances are asked for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pydedup import _core
from pydedup.arguments import as_block_shape, as_count, as_integers, check_array
from pydedup.errors import ArgumentError
from pydedup.similarity._arguments import as_float, as_number, known_dtype
from pydedup.types import DType

__all__ = ["L2LSH", "SIMILARITY_VERSION", "Fetch"]

#: Version of sketches and of what `L2LSH.save` returns.
SIMILARITY_VERSION = 1

#: Gives the blocks of these ids (int64, distinct, ascending), as an array of shape
#: (len(ids), rows, cols) or (len(ids), rows * cols) and the index's dtype.
Fetch: TypeAlias = Callable[[NDArray[np.int64]], NDArray[Any]]

_Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

#: Blocks fetched at a time take about this much.
_FETCH_BYTES = 64 << 20


class L2LSH:
    """An index of blocks of one shape and dtype that finds near duplicates.

    Locality-sensitive hashing for L2 (Datar, Immorlica, Indyk, Mirrokni 2004): each of ``bands *
    rows`` hashes is floor((a . v + b) / r) for the block v scaled to unit root mean square, a
    random projection a, and b uniform in [0, r). Two blocks are compared when all ``rows`` hashes
    of a band agree. With distances relative to the length of a block, the entries of a have
    variance 1 / n, so ``r`` is a relative distance too.

    Parameters
    ----------
    block_shape
        (rows, cols) of every block; edge blocks of another shape belong to another index.
    dtype
        float32, float64, float16 or ml_dtypes.bfloat16; blocks must have it.
    r
        Width of a hash's bucket, 1/128 to 16.
    bands, rows
        Bands, and hashes per band: 1 to 64 each, and at most 512 hashes in all. A block costs 2
        bytes for each of max(64, bands * rows) projections and about 14 bytes per band.
    seed
        Indexes of different seeds are unrelated; equal ones hash alike on every machine.

    Raises
    ------
    ArgumentError
        When the dtype is not one of those, or a number is out of range.

    Notes
    -----
    The default finds 99.6 % of the blocks at a relative distance of 0.05 and 90 % at 0.1, and takes
    one unrelated pair (distance about 1.4) in 800,000 for a candidate.

    A block with a NaN or an infinity is counted and removed like any other, but never found, and
    finds nothing. A zero block is near to zero blocks alone. Blocks whose sketches are equal, as
    those of identical blocks are, share one place in the index. So that no query takes too long, of
    a bucket with more than 256 distinct sketches only the 256 added first are looked at, and of
    more than 64 blocks (or ``k``) with the same sketch those added first; an identical block is
    found all the same.

    Calls may come from several threads: queries run side by side, changes alone. The GIL is
    released.
    """

    __slots__ = ("_dtype", "_index", "_shape")

    def __init__(
        self,
        block_shape: tuple[int, int],
        dtype: DTypeLike,
        *,
        r: float = 0.5,
        bands: int = 8,
        rows: int = 8,
        seed: int = 0,
    ) -> None:
        self._dtype = as_float(known_dtype(dtype), "dtype")
        self._shape = as_block_shape(block_shape, most=2**31 - 1)
        self._index = _core.L2Index(
            self._dtype.code,
            *self._shape,
            as_number(r, "r"),
            as_count("bands", bands),
            as_count("rows", rows),
            as_count("seed", seed, most=2**64 - 1),
        )

    @classmethod
    def load(cls, payload: bytes) -> L2LSH:
        """Return the index that `save` wrote.

        Raises
        ------
        CorruptStoreError
            When the bytes are no index or damaged.
        SchemaVersionError
            When a newer pydedup wrote them.
        """
        if not isinstance(payload, bytes):
            raise ArgumentError(f"payload must be bytes, not {type(payload).__name__}")
        return cls._wrap(_core.L2Index.load(payload))

    @classmethod
    def _wrap(cls, core: _core.L2Index) -> L2LSH:
        index = cls.__new__(cls)
        index._index = core
        code, rows, cols = core.parameters[:3]
        index._dtype = DType.of_code(code)
        index._shape = (rows, cols)
        return index

    def save(self) -> bytes:
        """Return the index as bytes (docs/format.md, "Similarity index"), the same everywhere."""
        return self._index.save()

    @property
    def block_shape(self) -> tuple[int, int]:
        """(rows, cols) of every block."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of every block."""
        return self._dtype.numpy

    @property
    def r(self) -> float:
        """Width of a hash's bucket."""
        return self._index.parameters[3]

    @property
    def bands(self) -> int:
        """Number of bands."""
        return self._index.parameters[4]

    @property
    def rows(self) -> int:
        """Hashes per band."""
        return self._index.parameters[5]

    @property
    def seed(self) -> int:
        """What all random numbers follow from."""
        return self._index.parameters[6]

    @property
    def ids(self) -> NDArray[np.int64]:
        """All ids, ascending."""
        return self._index.ids()

    @property
    def memory_bytes(self) -> int:
        """Bytes that the index takes."""
        return self._index.memory_bytes

    def __len__(self) -> int:
        return self._index.size

    def __contains__(self, block_id: object) -> bool:
        try:
            value = operator.index(block_id)  # type: ignore[arg-type]
        except TypeError:
            return False
        return 0 <= value < 2**63 and self._index.contains(value)

    def __repr__(self) -> str:
        return (
            f"L2LSH({self._shape}, {self._dtype.label!r}, r={self.r}, bands={self.bands}, "
            f"rows={self.rows}, seed={self.seed}) of {len(self)} blocks"
        )

    def add(self, blocks: NDArray[Any], ids: _Ids, *, threads: int = 0) -> None:
        """Add blocks under new ids; all or none.

        Parameters
        ----------
        blocks
            Shape (n, rows, cols) or (n, rows * cols), read where they lie: only the last axis must
            be dense.
        ids
            n integers from 0 on, none of them in the index.
        threads
            0 chooses by size.

        Raises
        ------
        ArgumentError
            When shapes or dtypes do not fit, or an id is negative, taken or given twice.
        """
        self._check_blocks(blocks)
        self._index.add(
            blocks, as_integers("ids", ids, np.int64), False, as_count("threads", threads)
        )

    def add_matrix(self, matrix: NDArray[Any], ids: _Ids, *, threads: int = 0) -> None:
        """Add the whole blocks of a matrix, row-major, without copying them.

        Edge blocks, which are smaller, are left out: there are (matrix rows // rows) * (matrix
        columns // columns) ids. Raises as `add` does.
        """
        self._check(matrix, "matrix")
        self._index.add(
            matrix, as_integers("ids", ids, np.int64), True, as_count("threads", threads)
        )

    def merge(self, other: L2LSH, *, threads: int = 0) -> None:
        """Add the blocks of another index whose ids this one does not have; all or none.

        What follows is as if they had been added with `add`, in the other's order.

        Raises
        ------
        ArgumentError
            When the two differ in block shape, dtype, r, bands, rows or seed.
        """
        if not isinstance(other, L2LSH):
            raise ArgumentError(f"other must be an L2LSH, not {type(other).__name__}")
        self._index.merge(other._index, as_count("threads", threads))

    def select(self, ids: _Ids, new_ids: _Ids) -> L2LSH:
        """Return a new index of some of the blocks, under other ids.

        Raises
        ------
        ArgumentError
            When an id is not in the index, or a new one is negative or given twice.
        """
        mine, theirs = as_integers("ids", ids, np.int64), as_integers("new_ids", new_ids, np.int64)
        return self._wrap(self._index.select(mine, theirs))

    def remove(self, ids: _Ids) -> None:
        """Remove blocks; all or none.

        Raises
        ------
        ArgumentError
            When an id is not in the index or given twice.
        """
        self._index.remove(as_integers("ids", ids, np.int64))

    def query(
        self, blocks: NDArray[Any], k: int = 1, fetch: Fetch | None = None, *, threads: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the nearest blocks of the index, nearest first; ties by id.

        Parameters
        ----------
        blocks
            As for `add`.
        k
            Answers per block, at least 1.
        fetch
            Gives blocks by id. With it the best max(8, 4 * k) candidates of a block are fetched,
            in few calls, and their exact distances decide. Without, the sketches' estimates do.
        threads
            0 chooses by size.

        Returns
        -------
        ids, distances
            int64 and float64 of shape (n, k): ids, -1 where there are no more candidates, and
            relative L2 distances |v - w| / |v| to the block v that was asked for, infinity there.
            An estimate deviates by about 9 % of itself (one over the root of twice the number of
            projections, of which there are at least 64), and below 0.0005 it is noise.

        Raises
        ------
        ArgumentError
            When shapes or dtypes do not fit, also those of what `fetch` gives.
        """
        self._check_blocks(blocks)
        return self._query(blocks, k, fetch, False, threads)

    def query_matrix(
        self, matrix: NDArray[Any], k: int = 1, fetch: Fetch | None = None, *, threads: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Query with the whole blocks of a matrix, row-major, without copying them."""
        self._check(matrix, "matrix")
        return self._query(matrix, k, fetch, True, threads)

    def hashes(self, blocks: NDArray[Any], *, threads: int = 0) -> NDArray[np.int32]:
        """Return the hashes of blocks: int32 of shape (n, bands, rows).

        Those of a block that is zero or not finite are the least int32.
        """
        self._check_blocks(blocks)
        return self._index.hashes(blocks, False, as_count("threads", threads))

    def _query(
        self, blocks: NDArray[Any], k: int, fetch: Fetch | None, whole: bool, threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        wanted = as_count("k", k, least=1, most=1 << 20)
        workers = as_count("threads", threads)
        if fetch is None:
            return self._index.query(blocks, wanted, whole, workers)
        if not callable(fetch):
            raise ArgumentError(f"fetch must be a function of ids, not {type(fetch).__name__}")
        candidates, _ = self._index.query(blocks, max(8, 4 * wanted), whole, workers)
        ids = np.full((len(candidates), wanted), -1, np.int64)
        exact = np.full((len(candidates), wanted), np.inf)
        block_bytes = math.prod(self._shape) * self._dtype.itemsize
        step = max(1, _FETCH_BYTES // (block_bytes * candidates.shape[1]))
        for start in range(0, len(candidates), step):
            part = slice(start, start + step)
            asked = _blocks_of_matrix(blocks, self._shape, part) if whole else blocks[part]
            ids[part], exact[part] = self._exact(asked, candidates[part], wanted, fetch, workers)
        return ids, exact

    def _exact(
        self,
        asked: NDArray[Any],
        candidates: NDArray[np.int64],
        k: int,
        fetch: Fetch,
        threads: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        found = np.full(candidates.shape, np.inf)
        rows, cols = np.nonzero(candidates >= 0)
        if len(rows):
            wanted, place = np.unique(candidates[rows, cols], return_inverse=True)
            blocks = fetch(wanted)
            self._check(blocks, "what fetch returned")
            if blocks.shape[1:] not in (self._shape, (math.prod(self._shape),)):
                raise ArgumentError(
                    f"fetch returned the shape {blocks.shape}; return (n, rows, cols) or "
                    f"(n, rows * cols) with blocks of {self._shape}"
                )
            if len(blocks) != len(wanted):
                raise ArgumentError(
                    f"fetch returned {len(blocks)} blocks for {len(wanted)} ids; return one each"
                )
            found[rows, cols] = _core.compare_blocks(
                asked,
                blocks,
                self._dtype.code,
                *self._shape,
                rows.astype(np.int64),
                place.reshape(-1).astype(np.int64),
                0.0,
                math.inf,
                threads,
            )[:, 0]
        order = np.lexsort((candidates, found), axis=1)[:, :k]
        exact = np.take_along_axis(found, order, axis=1)
        ids = np.take_along_axis(candidates, order, axis=1)
        return np.where(np.isfinite(exact), ids, -1), exact

    def _check(self, blocks: NDArray[Any], name: str) -> None:
        check_array(blocks, name)
        if blocks.dtype != self._dtype.numpy:
            raise ArgumentError(
                f"{name} has dtype {blocks.dtype}, but the index is of {self._dtype.label}"
            )

    def _check_blocks(self, blocks: NDArray[Any]) -> None:
        self._check(blocks, "blocks")
        rows, cols = self._shape
        if blocks.shape[1:] not in (self._shape, (rows * cols,)):
            one = "; one block is blocks[None]" if blocks.shape == self._shape else ""
            raise ArgumentError(
                f"blocks has the shape {blocks.shape}; n blocks of this index have (n, {rows}, "
                f"{cols}) or (n, {rows * cols}){one}"
            )


def _blocks_of_matrix(matrix: NDArray[Any], shape: tuple[int, int], part: slice) -> NDArray[Any]:
    """Copy some of a matrix's whole blocks into an array (n, rows, cols)."""
    rows, cols = shape
    across = matrix.shape[1] // cols
    count = matrix.shape[0] // rows * across
    places = range(count)[part]
    out = np.empty((len(places), rows, cols), matrix.dtype)
    for block, place in zip(out, places, strict=True):
        top, left = place // across * rows, place % across * cols
        block[:] = matrix[top : top + rows, left : left + cols]
    return out
