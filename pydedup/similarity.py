# SPDX-License-Identifier: Apache-2.0
"""Blocks that are nearly equal: an index of sketches, exact distances, and magnitudes.

All results are the same from every kernel, for any number of threads, and for any cut of a batch
into calls (docs/kernels.md, "Similarity"). Deliberately not here: what is done with similar blocks
(`pydedup.ingest`), and blocks themselves: the index keeps sketches only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pydedup import _core
from pydedup.errors import ArgumentError
from pydedup.types import DType

__all__ = ["L2LSH", "SIMILARITY_VERSION", "Distances", "Fetch", "distances", "magnitude"]

#: Version of sketches and of what `L2LSH.save` returns.
SIMILARITY_VERSION = 1

#: Gives the blocks of these ids (int64, distinct, ascending), as an array of shape
#: (len(ids), rows, cols) or (len(ids), rows * cols) and the index's dtype.
Fetch: TypeAlias = Callable[[NDArray[np.int64]], NDArray[Any]]

_Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

_FLOATS = (DType.F32, DType.F64, DType.F16, DType.BF16)
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
        Bands, and hashes per band; at most 512 hashes in all. A block costs 2 bytes for each of
        max(64, bands * rows) projections and about 14 bytes per band.
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
        self._dtype = _as_float(np.dtype(dtype), "dtype")
        self._shape = _as_shape(block_shape)
        self._index = _core.L2Index(
            self._dtype.code,
            *self._shape,
            _as_number(r, "r"),
            _as_count(bands, "bands"),
            _as_count(rows, "rows"),
            _as_count(seed, "seed", most=2**64 - 1),
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
        index = cls.__new__(cls)
        index._index = _core.L2Index.load(payload)
        code, rows, cols = index._index.parameters[:3]
        index._dtype = next(member for member in DType if member.code == code)
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
        self._check(blocks, "blocks")
        self._index.add(blocks, _as_ids(ids), False, _as_count(threads, "threads"))

    def add_matrix(self, matrix: NDArray[Any], ids: _Ids, *, threads: int = 0) -> None:
        """Add the whole blocks of a matrix, row-major, without copying them.

        Edge blocks, which are smaller, are left out: there are (matrix rows // rows) * (matrix
        columns // columns) ids. Raises as `add` does.
        """
        self._check(matrix, "matrix")
        self._index.add(matrix, _as_ids(ids), True, _as_count(threads, "threads"))

    def remove(self, ids: _Ids) -> None:
        """Remove blocks; all or none.

        Raises
        ------
        ArgumentError
            When an id is not in the index or given twice.
        """
        self._index.remove(_as_ids(ids))

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
        self._check(blocks, "blocks")
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
        self._check(blocks, "blocks")
        return self._index.hashes(blocks, False, _as_count(threads, "threads"))

    def _query(
        self, blocks: NDArray[Any], k: int, fetch: Fetch | None, whole: bool, threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        wanted = _as_count(k, "k", least=1, most=1 << 20)
        workers = _as_count(threads, "threads")
        if fetch is None:
            return self._index.query(blocks, wanted, whole, workers)
        candidates, _ = self._index.query(blocks, max(8, 4 * wanted), whole, workers)
        asked = _whole_blocks(blocks, self._shape) if whole else _cut(blocks, self._shape)
        ids = np.full((len(candidates), wanted), -1, np.int64)
        exact = np.full((len(candidates), wanted), np.inf)
        block_bytes = math.prod(self._shape) * self._dtype.itemsize
        step = max(1, _FETCH_BYTES // (block_bytes * candidates.shape[1]))
        for start in range(0, len(candidates), step):
            part = slice(start, start + step)
            ids[part], exact[part] = self._exact(
                asked[part], candidates[part], wanted, fetch, workers
            )
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
            if len(blocks) != len(wanted):
                raise ArgumentError(
                    f"fetch returned {len(blocks)} blocks for {len(wanted)} ids; return one each"
                )
            found[rows, cols] = _core.compare_blocks(
                asked,
                _cut(blocks, self._shape),
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

    def _check(self, blocks: object, name: str) -> None:
        _check_array(blocks, name)
        if blocks.dtype != self._dtype.numpy:  # type: ignore[attr-defined]
            raise ArgumentError(
                f"{name} has dtype {blocks.dtype}, but the index is of "  # type: ignore[attr-defined]
                f"{self._dtype.label}"
            )


class Distances(NamedTuple):
    """What `distances` found, one entry per pair.

    Attributes
    ----------
    relative_l2
        float64: |a - b| / |a|; 0 for two zero blocks, infinity where only a is zero.
    max_difference
        float64: greatest |a - b|.
    share_within
        float64: entries with |a - b| <= eps / entries; None without ``eps``.
    """

    relative_l2: NDArray[np.float64]
    max_difference: NDArray[np.float64]
    share_within: NDArray[np.float64] | None


def distances(
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    eps: float | None = None,
    limit: float | None = None,
    threads: int = 0,
) -> Distances:
    """Compare blocks pair by pair, in one pass over each pair.

    Parameters
    ----------
    a
        Blocks (n, ...) of float32, float64, float16 or bfloat16. Up to three axes are read where
        they lie if the last is dense; more must be C-contiguous.
    b
        Blocks of the same shape, or one block (...) for all of a.
    eps
        Also count the entries that differ by at most this.
    limit
        Stop at pairs that are farther than this relative distance: their ``relative_l2`` is
        infinity, and the rest NaN.
    threads
        0 chooses by size.

    Returns
    -------
    Distances
        A pair in which a NaN or an infinity occurs is infinitely far, and never within a limit. The
        same bits from every kernel.

    Raises
    ------
    ArgumentError
        When shapes or dtypes differ, or eps or limit is negative or no number.
    """
    _check_array(a, "a")
    _check_array(b, "b")
    dtype = _as_float(a.dtype, "a")
    if b.dtype != a.dtype:
        raise ArgumentError(f"b has dtype {b.dtype}, but a has {a.dtype}")
    if b.shape not in (a.shape, a.shape[1:]):
        raise ArgumentError(f"b has shape {b.shape}; with a of {a.shape}, give that or one block")
    one = b.shape != a.shape
    left, shape = _blocks_of(a, "a")
    right, _ = _blocks_of(b[np.newaxis] if one else b, "b")
    pairs = np.arange(len(left), dtype=np.int64)
    found = _core.compare_blocks(
        left,
        right,
        dtype.code,
        *shape,
        pairs,
        np.zeros_like(pairs) if one else pairs,
        0.0 if eps is None else _as_number(eps, "eps"),
        math.inf if limit is None else _as_number(limit, "limit"),
        _as_count(threads, "threads"),
    )
    return Distances(found[:, 0], found[:, 1], None if eps is None else found[:, 2])


def magnitude(
    blocks: NDArray[Any], block_shape: tuple[int, int] | None = None, *, threads: int = 0
) -> NDArray[np.float64]:
    """Return the third quartile of the absolute values of each block.

    Parameters
    ----------
    blocks
        Blocks (n, ...) of float32, float64, float16 or bfloat16; or, with ``block_shape``, a matrix
        whose blocks are looked at where they lie, edge blocks in their true size.
    block_shape
        (rows, cols) of a block of the matrix.
    threads
        0 chooses by size.

    Returns
    -------
    numpy.ndarray
        float64 per block (of a matrix: row-major), what ``numpy.percentile(abs(block), 75)`` gives
        in float64: linear between the two elements around the rank. NaN for a block with a NaN.

    Notes
    -----
    By selection, in time linear in the elements (Floyd and Rivest 1975: a sample brackets the
    rank, one pass keeps what is between).
    """
    _check_array(blocks, "blocks")
    dtype = _as_float(blocks.dtype, "blocks")
    workers = _as_count(threads, "threads")
    if block_shape is None:
        batch, shape = _blocks_of(blocks, "blocks")
        return _core.block_magnitudes(batch, dtype.code, *shape, False, workers)
    if blocks.ndim != 2:
        raise ArgumentError(f"blocks is {blocks.ndim}-D; with a block_shape give a matrix")
    height, width = _as_shape(block_shape)
    down, across = blocks.shape[0] // height, blocks.shape[1] // width
    bottom, right = blocks.shape[0] - down * height, blocks.shape[1] - across * width
    out = np.empty((down + (bottom > 0), across + (right > 0)))
    for rows, height_here, n_rows in (
        (slice(0, down), height, down),
        (slice(down, None), bottom, 1),
    ):
        for cols, width_here, n_cols in (
            (slice(0, across), width, across),
            (slice(across, None), right, 1),
        ):
            if height_here == 0 or width_here == 0 or n_rows == 0 or n_cols == 0:
                continue
            top, left = rows.start * height, cols.start * width
            part = blocks[top : top + n_rows * height_here, left : left + n_cols * width_here]
            found = _core.block_magnitudes(part, dtype.code, height_here, width_here, True, workers)
            out[rows, cols] = found.reshape(n_rows, n_cols)
    return out.reshape(-1)


def _cut(blocks: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Blocks as (n, rows, cols), without a copy where that can be."""
    return blocks if blocks.ndim == 3 else blocks.reshape(len(blocks), *shape)


def _whole_blocks(matrix: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Return the whole blocks of a matrix as (n, rows, cols): a copy."""
    down, across = matrix.shape[0] // shape[0], matrix.shape[1] // shape[1]
    inner = matrix[: down * shape[0], : across * shape[1]]
    cut = inner.reshape(down, shape[0], across, shape[1]).swapaxes(1, 2)
    return cut.reshape(down * across, *shape)


def _blocks_of(array: NDArray[Any], name: str) -> tuple[NDArray[Any], tuple[int, int]]:
    """Return (n, ...) as (n, rows, cols) or (n, cols), and the shape of a block."""
    if array.ndim == 0:
        raise ArgumentError(f"{name} is a scalar; give blocks along the first axis")
    if math.prod(array.shape[1:]) == 0:
        raise ArgumentError(f"{name} has shape {array.shape}: blocks without elements")
    if array.ndim == 3:
        return array, (array.shape[1], array.shape[2])
    if array.ndim > 3 and not array.flags.c_contiguous:
        raise ArgumentError(f"{name} has {array.ndim} axes and must then be C-contiguous")
    flat = array if array.ndim == 2 else array.reshape(len(array), math.prod(array.shape[1:]))
    return flat, (1, flat.shape[1])


def _check_array(array: object, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{name} must be a numpy array, not {type(array).__name__}")


def _as_float(dtype: np.dtype[Any], name: str) -> DType:
    for member in _FLOATS:
        if member.numpy == dtype:
            return member
    known = ", ".join(member.label for member in _FLOATS)
    raise ArgumentError(f"{name} has dtype {dtype}; similarity takes {known} in native byte order")


def _as_shape(shape: object) -> tuple[int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ArgumentError(f"block_shape must be (rows, cols), not {shape!r}")
    rows, cols = (_as_count(side, "block_shape", least=1) for side in shape)
    return rows, cols


def _as_count(value: object, name: str, *, least: int = 0, most: int = 2**31 - 1) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ArgumentError(f"{name} must be an integer, not {value!r}") from error
    if isinstance(value, bool) or not least <= number <= most:
        raise ArgumentError(f"{name} must be an integer from {least} to {most}, not {value!r}")
    return number


def _as_number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} must be a number, not {value!r}") from error
    if math.isnan(number) or number < 0:
        raise ArgumentError(f"{name} must be a number from 0 on, not {value!r}")
    return number


def _as_ids(ids: object) -> NDArray[np.int64]:
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError) as error:
        raise ArgumentError("ids must hold integers in one dimension") from error
    if array.ndim != 1:
        raise ArgumentError(f"ids must hold integers in one dimension, not {array.ndim}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or (
        array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max
    ):
        raise ArgumentError(f"ids must hold 64-bit integers, not {array.dtype}")
    return np.ascontiguousarray(array, np.int64)
