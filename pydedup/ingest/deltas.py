# SPDX-License-Identifier: Apache-2.0
"""Encoded deltas on their way to the spool: several as one, read back, put in others' place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.places import stacked
from pydedup.types import DType

__all__ = ["Delta", "decode_deltas", "delta_limits", "encoded_blocks", "replaced"]


@dataclass(frozen=True, slots=True)
class Delta:
    """An encoded delta.

    Attributes
    ----------
    base, base_tag
        Reference of its base, and what its slot is to carry.
    payload
        The encoded bytes, uint8.
    encoding
        Code of its `codec.Encoding`.
    """

    base: int
    base_tag: int
    payload: NDArray[np.uint8]
    encoding: int


def encoded_blocks(deltas: Sequence[Delta]) -> codec.EncodedBlocks:
    """Return deltas one after another."""
    encodings = np.array([delta.encoding for delta in deltas], np.uint8)
    return codec.EncodedBlocks.of([delta.payload for delta in deltas], encodings)


def delta_limits(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most bytes of deltas in the place of blocks of so many: 5 % less, 1 at least."""
    return lengths - np.maximum(lengths // 20, 1)


def decode_deltas(
    deltas: codec.EncodedBlocks,
    which: NDArray[np.int64],
    blocks: MatrixView,
    bases: MatrixView,
    base_index: NDArray[np.int64],
) -> MatrixView:
    """Return what some deltas hold, stacked as ``blocks`` are: read back as a store does it."""
    dtype, shape = blocks.dtype, blocks.grid.block_shape
    numbers = np.arange(len(which))
    zeros = np.zeros(len(which), np.int64)
    used, base_slots = np.unique(base_index, return_inverse=True)
    raw = codec.encode_blocks(bases, used, planes=False)
    base_shape = bases.grid.block_shape
    base_page = _page_of(raw, np.arange(len(used)), bases.dtype, base_shape, None)
    page = _page_of(deltas, which, dtype, shape, zeros + 1)
    out = stacked(len(which), dtype, shape)
    codec.read_blocks(
        out,
        numbers,
        [page],
        zeros,
        numbers,
        bases=codec.StoredBases([base_page], zeros, base_slots),
    )
    return out


def _page_of(
    encoded: codec.EncodedBlocks,
    which: NDArray[np.int64],
    dtype: DType,
    shape: tuple[int, int],
    tags: NDArray[np.int64] | None,
) -> codec.Page:
    count = len(which)
    return codec.Page(
        codec.build_page(
            encoded.arena,
            encoded.offsets[which],
            encoded.lengths[which],
            encoded.encodings[which],
            np.full(count, dtype.code),
            np.full(count, shape[0]),
            np.full(count, shape[1]),
            tags,
        )
    )


def replaced(
    encoded: codec.EncodedBlocks,
    places: NDArray[np.int64],
    by: codec.EncodedBlocks,
    which: NDArray[np.int64],
) -> codec.EncodedBlocks:
    """Return encoded blocks with those at ``places`` replaced by ``which`` of others."""
    everything = np.arange(len(encoded.lengths))
    if len(by.lengths) == len(everything) and all(
        np.array_equal(numbers, everything) for numbers in (places, which)
    ):
        return by
    pieces, others = encoded.pieces(), by.pieces()
    for place, number in zip(places.tolist(), which.tolist(), strict=True):
        pieces[place] = others[number]
    encodings = encoded.encodings.copy()
    encodings[places] = by.encodings[which]
    return codec.EncodedBlocks.of(pieces, encodings)
