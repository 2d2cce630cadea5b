# SPDX-License-Identifier: Apache-2.0
"""Stored blocks in pieces of one kind each, to be read, or taken along as they are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.places import in_pieces, stacked
from pydedup.layout import by_kind, slot_entries
from pydedup.pool import PagePool
from pydedup.types import DType

__all__ = ["Piece", "stored_pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some blocks of one dtype and shape on pages that are at hand.

    Attributes
    ----------
    pages
        Those that hold the blocks and the bases of these.
    page_index, slots
        Per block: which of ``pages``, and the slot on it.
    entries
        What its slot says of each.
    bases
        Where the bases are, if the blocks are deltas.
    """

    dtype: DType
    shape: tuple[int, int]
    pages: Sequence[codec.Page]
    page_index: NDArray[np.uint32]
    slots: NDArray[np.uint32]
    entries: NDArray[np.void]
    bases: codec.StoredBases | None

    def read(self) -> MatrixView:
        """Return the blocks decoded, one below the other."""
        view = stacked(len(self.slots), self.dtype, self.shape)
        every = np.arange(len(self.slots))
        codec.read_blocks(view, every, self.pages, self.page_index, self.slots, bases=self.bases)
        return view

    def encoded(self, which: NDArray[np.int64]) -> codec.EncodedBlocks:
        """Return some of them as they are encoded."""
        return codec.encoded_blocks(self.pages, self.page_index[which], self.slots[which])


def stored_pieces(
    pool: PagePool,
    page_ids: NDArray[np.int64],
    slots: NDArray[np.uint32],
    bases: tuple[NDArray[np.int64], NDArray[np.uint32]] | None,
) -> Iterator[tuple[NDArray[np.int64], Piece]]:
    """Walk over blocks at places (n,), as `PagePool.windows_with_bases` does over their pages.

    Yields which of the blocks, and these; over all pieces each block once.
    """
    for at, pages, page_index, stored in pool.windows_with_bases(page_ids, bases):
        entries = slot_entries(pages, page_index, slots[at])
        for dtype, shape, same in by_kind(entries):
            for some in in_pieces(same, dtype, shape):
                yield (
                    at[some],
                    Piece(
                        dtype,
                        shape,
                        pages,
                        page_index[some],
                        slots[at[some]],
                        entries[some],
                        None if stored is None else _some_bases(stored, some),
                    ),
                )


def _some_bases(stored: codec.StoredBases, rows: NDArray[np.int64]) -> codec.StoredBases:
    return codec.StoredBases(
        stored.pages, np.asarray(stored.page_index)[rows], np.asarray(stored.slots)[rows]
    )
