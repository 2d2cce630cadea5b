# SPDX-License-Identifier: Apache-2.0
"""Blocks of a matrix view as stored bytes (docs/format.md, "Block encodings").

By themselves, or as deltas on base blocks; with the same bytes on every machine. A part of
`pydedup.codec`, which has all of these names and reads the bytes back.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core
from pydedup.arguments import as_count, as_integers, check_array
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError

__all__ = [
    "EncodedBlocks",
    "Encoding",
    "LowRankFactors",
    "encode_blocks",
    "encode_deltas",
    "estimate_deltas",
]


# Of what power of two factors are at most.
_MOST_EXPONENT = 900


class Encoding(enum.IntEnum):
    """How a block is kept. Codes are persisted in pages: never renumber."""

    RAW = 0
    """The elements, row-major, without gaps."""
    PLANES = 1
    """Byte planes, each raw, constant or Huffman-coded."""
    DELTA = 2
    """The exact difference to a base block."""
    QUANTISED = 3
    """The difference to a base block, within an error bound."""

    @property
    def is_delta(self) -> bool:
        """Whether a block of this encoding says nothing without its base."""
        return self in (Encoding.DELTA, Encoding.QUANTISED)


@dataclass(frozen=True, slots=True)
class EncodedBlocks:
    """Encoded blocks, one after another without gaps.

    Attributes
    ----------
    arena
        uint8 (n_bytes,), all encoded bytes.
    offsets, lengths
        int64 (n_blocks,): where in ``arena`` each block lies.
    encodings
        uint8 (n_blocks,): an `Encoding` each.
    """

    arena: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    encodings: NDArray[np.uint8]

    @classmethod
    def of(cls, pieces: Sequence[NDArray[np.uint8]], encodings: NDArray[np.uint8]) -> EncodedBlocks:
        """Return these encoded blocks one after another."""
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        arena = np.concatenate([np.empty(0, np.uint8), *pieces])
        return cls(arena, np.cumsum(lengths) - lengths, lengths, encodings)

    def pieces(self) -> list[NDArray[np.uint8]]:
        """Return the bytes of each block, without a copy."""
        spans = zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)
        return [self.arena[start : start + length] for start, length in spans]

    def have_factors(self) -> NDArray[np.bool_]:
        """Return which are deltas with factors (docs/format.md, "Version 3"), bool (n_blocks,)."""
        return _core.have_factors(self.arena, self.offsets, self.lengths, self.encodings)

    def select(self, which: NDArray[np.int64]) -> EncodedBlocks:
        """Return some of the blocks, ``which`` ascending, one after another without gaps."""
        if len(which) == len(self.lengths):
            return self
        pieces = self.pieces()
        return EncodedBlocks.of([pieces[i] for i in which.tolist()], self.encodings[which])


def encode_blocks(
    view: MatrixView, indices: ArrayLike, *, planes: bool, threads: int = 0
) -> EncodedBlocks:
    """Encode blocks of a matrix view.

    Parameters
    ----------
    view
        The matrix; its memory is borrowed for the call.
    indices
        Numbers of the blocks, row-major over the grid, shape (n_blocks,).
    planes
        Whether to store a block as compressed byte planes where that saves at least 5 % of its
        bytes. False stores all blocks raw.
    threads
        0 chooses by size.

    Returns
    -------
    EncodedBlocks
        In the order of ``indices``; the same bytes on every machine.

    Raises
    ------
    ArgumentError
        When an index is outside of the grid, a block has 4 GiB or more, or threads is out of range.
    """
    columns = _core.encode_blocks(
        *view.for_core,
        as_integers("indices", indices, np.int64),
        planes,
        as_count("threads", threads),
    )
    return EncodedBlocks(*columns)


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """By how much blocks of low-rank relatives differ, as those with a merged adapter (LoRA) do.

    Element (i, j) of a base is moved by ``2**exponent`` times the sum over k of
    ``of_rows[row_of[b], k, i] * of_cols[col_of[b], k, j]``, which is exact, and then rounded to the
    dtype of the differences; where that sum is 0, or the base not finite, it stays.

    Attributes
    ----------
    exponent
        -900 to 900.
    of_rows, of_cols
        int32 (any number, rank, rows of a block) and (any number, rank, columns of a block), each
        number below 2**23 in magnitude; rank is 1 to 64.
    row_of, col_of
        int64 (n_blocks,): which of these block b has.
    """

    exponent: int
    of_rows: NDArray[np.int32]
    of_cols: NDArray[np.int32]
    row_of: NDArray[np.int64]
    col_of: NDArray[np.int64]

    @property
    def for_core(self) -> _core.Factors:
        """As the functions of the core take it.

        Raises
        ------
        ArgumentError
            When these are no such numbers, or the factors have no rank in common.
        """
        exponent = self.exponent
        if isinstance(exponent, bool | np.bool_) or not isinstance(exponent, int | np.integer):
            raise ArgumentError(f"factors.exponent must be an integer, got {exponent!r}")
        if not -_MOST_EXPONENT <= exponent <= _MOST_EXPONENT:
            raise ArgumentError(
                f"factors.exponent must be -{_MOST_EXPONENT} to {_MOST_EXPONENT}, got {exponent}"
            )
        shapes = []
        for name, factors in (("of_rows", self.of_rows), ("of_cols", self.of_cols)):
            check_array(factors, f"factors.{name}")
            if factors.ndim != 3:
                raise ArgumentError(
                    f"factors.{name} must be an array (any number, rank, numbers), "
                    f"not of the shape {factors.shape}"
                )
            shapes.append(factors.shape)
        if shapes[0][1] != shapes[1][1]:
            raise ArgumentError(
                f"factors.of_rows has rank {shapes[0][1]}, and factors.of_cols {shapes[1][1]}: "
                "both must have the same"
            )
        return (
            shapes[0][1],
            int(exponent),
            as_integers("factors.of_rows", self.of_rows.reshape(-1), np.int32),
            as_integers("factors.of_cols", self.of_cols.reshape(-1), np.int32),
            as_integers("factors.row_of", self.row_of, np.int64),
            as_integers("factors.col_of", self.col_of, np.int64),
        )


def encode_deltas(
    view: MatrixView,
    indices: ArrayLike,
    base_view: MatrixView,
    base_indices: ArrayLike,
    *,
    limits: ArrayLike | None = None,
    max_rel_error: float | None = None,
    factors: LowRankFactors | None = None,
    is_transposed: bool = False,
    threads: int = 0,
) -> EncodedBlocks:
    """Encode blocks of a matrix view as deltas on blocks of another.

    Parameters
    ----------
    view
        The matrix; its memory is borrowed for the call, as is that of ``base_view``.
    indices
        Numbers of the blocks, row-major over the grid, shape (n_blocks,).
    base_view
        A matrix that holds the bases. A base has the shape of its block, and its dtype, or another
        where both are among f64, f32, f16 and bf16: it is then rounded to that of the block.
    base_indices
        The number of each block's base in the grid of ``base_view``, shape (n_blocks,).
    limits
        The most bytes that each delta may take, shape (n_blocks,): what the block would take
        without a base, for instance. By default one byte less than the raw block.
    max_rel_error
        ``None`` for exact deltas. Otherwise what is read back differs from the block by at most
        this share of its Euclidean norm (checked on each block), and elements that are 0 stay 0.
        Blocks that cannot be quantised so, or would not be smaller, become exact deltas.
    factors
        By how much the bases are moved first; of floats, and for blocks of one shape.
    is_transposed
        Whether each block is a delta on its base transposed, and has the shape of that.
    threads
        0 chooses by size.

    Returns
    -------
    EncodedBlocks
        In the order of ``indices``, each `Encoding.DELTA` or `Encoding.QUANTISED`; the same bytes
        on every machine. ``lengths`` is 0 where the limit is not enough.

    Raises
    ------
    ArgumentError
        When an index is outside of its grid, a base has another shape or a dtype that is not
        converted, a limit is negative, ``max_rel_error`` is not within 0 and 1, or factors do not
        fit.
    """
    chosen = as_integers("indices", indices, np.int64)
    if not isinstance(factors, LowRankFactors | None):
        raise ArgumentError(f"factors must be LowRankFactors or None, got {factors!r}")
    if limits is None:
        raw = view.block_bytes()
        if chosen.size and (chosen.min() < 0 or chosen.max() >= raw.size):
            raise ArgumentError(
                f"indices has blocks outside of a grid of {raw.size} blocks; "
                f"it goes from {chosen.min()} to {chosen.max()}"
            )
        most = raw[chosen] - 1
    else:
        most = as_integers("limits", limits, np.int64)
    columns = _core.encode_deltas(
        *view.for_core,
        chosen,
        *base_view.for_core,
        as_integers("base_indices", base_indices, np.int64),
        most,
        _error_bound(max_rel_error),
        None if factors is None else factors.for_core,
        is_transposed,
        as_count("threads", threads),
    )
    return EncodedBlocks(*columns)


def estimate_deltas(
    view: MatrixView,
    indices: ArrayLike,
    base_view: MatrixView,
    base_indices: ArrayLike,
    *,
    max_rel_error: float | None = None,
    threads: int = 0,
) -> NDArray[np.int64]:
    """Estimate what `encode_deltas` would need, for choosing among several bases.

    Parameters are those of `encode_deltas`. A quarter of the elements is looked at, so that this
    is several times faster.

    Returns
    -------
    numpy.ndarray
        int64 (n_blocks,): bytes, at most those of the raw block.
    """
    return _core.estimate_deltas(
        *view.for_core,
        as_integers("indices", indices, np.int64),
        *base_view.for_core,
        as_integers("base_indices", base_indices, np.int64),
        _error_bound(max_rel_error),
        as_count("threads", threads),
    )


def _error_bound(max_rel_error: object) -> float | None:
    if max_rel_error is None:
        return None
    if not isinstance(max_rel_error, int | float | np.floating):
        raise ArgumentError(
            f"max_rel_error must be a number above 0 and below 1, got {max_rel_error!r}"
        )
    return float(max_rel_error)
