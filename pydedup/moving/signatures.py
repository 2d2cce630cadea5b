# SPDX-License-Identifier: Apache-2.0
"""The part of the source's similarity index that is about copied blocks, under their new places."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import CorruptStoreError
from pydedup.ingest.candidates import cut_pieces, index_pages
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.layout import block_places, joined, split_places
from pydedup.moving.source import End
from pydedup.sets import common, distinct, in_parts, is_among, without
from pydedup.signatures import BlockKind, Segment, load_piece, new_index, segment_rows
from pydedup.similarity import L2LSH

__all__ = ["CarriedSegments", "SourceIndex"]

# A segment about so many times as many pages as are wanted of it is not read: after a vacuum one
# segment may be about the whole store, and sketching the wanted pages again takes less.
_FEW_TIMES = 8
_PAGES_AT_ONCE = 64


class SourceIndex:
    """The segments of a source, by the pages that they cover."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        pages = joined(one.page_ids for one in segments)
        owners = np.repeat(np.arange(len(segments)), [len(one.page_ids) for one in segments])
        order = np.argsort(pages)
        self._pages, self._owners = pages[order], owners[order]

    def about(self, page_ids: NDArray[np.int64]) -> list[Segment]:
        """Return the segments that cover some of these pages, oldest first."""
        starts = np.searchsorted(self._pages, page_ids, side="left").tolist()
        ends = np.searchsorted(self._pages, page_ids, side="right").tolist()
        found = [self._owners[start:end] for start, end in zip(starts, ends, strict=True)]
        return [self._segments[n] for n in distinct(np.concatenate([self._owners[:0], *found]))]


class CarriedSegments:
    """Gives the segment of one model (a `pydedup.ingest.write.Segments`).

    Parameters
    ----------
    source
        Where the index is.
    index
        All segments of the source.
    spool
        The new blocks.
    places
        Where each of them is at the source, `NO_PLACE` where it was made anew.
    """

    def __init__(
        self,
        source: End,
        index: SourceIndex,
        spool: Spool,
        places: NDArray[np.int64],
    ) -> None:
        self._source = source
        self._index = index
        self._spool = spool
        self._places = places

    def segments(
        self,
        number: int,
        page_of: NDArray[np.int64],
        slot_of: NDArray[np.uint32],
        page_ids: list[int],
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield rows of ``signatures`` for what the source has indexed of the new pages.

        A page is covered when all that it holds is from pages that are covered at the source; the
        next add indexes the others.
        """
        written = np.flatnonzero(page_of > 0)
        old_pages = split_places(self._places[written])[0]
        named = distinct(old_pages)
        useful = self._index.about(named)
        if not useful:
            return iter(())
        covered = np.concatenate([segment.page_ids for segment in useful])
        outside = ~is_among(old_pages, covered)  # also what was made anew, of no page
        open_pages = distinct(page_of[written[outside]])
        plain = written[~outside & (self._spool.bases[written] == NO_BASE)]
        old = self._places[plain]
        order = np.argsort(old)
        new = block_places(page_of[plain], slot_of[plain])[order]
        if len(covered) <= _FEW_TIMES * len(named):
            indexes = self._stored(useful)
        else:
            indexes = self._made_anew(common(named, covered).tolist())
        pieces = _moved(indexes, old[order], new)
        return segment_rows(
            number, without(np.array(page_ids, np.int64), open_pages).tolist(), pieces
        )

    def _stored(self, segments: Sequence[Segment]) -> Iterator[tuple[BlockKind, L2LSH]]:
        numbers = [number for segment in segments for number in segment.rows[1:]]
        for _, group, payload in self._source.adapter.signatures_of(numbers):
            # What a damaged one covers is missed by searches, here as at the source.
            with contextlib.suppress(CorruptStoreError):
                yield load_piece(group, payload)

    def _made_anew(self, page_ids: list[int]) -> Iterator[tuple[BlockKind, L2LSH]]:
        for group in in_parts(page_ids, _PAGES_AT_ONCE):
            yield from index_pages(self._source.pool, group).items()


def _moved(
    indexes: Iterator[tuple[BlockKind, L2LSH]], old: NDArray[np.int64], new: NDArray[np.int64]
) -> Iterator[tuple[BlockKind, L2LSH]]:
    """Yield indexes of the blocks at these ``old`` places, ascending, at their new ones."""
    found: dict[BlockKind, L2LSH] = {}
    for kind, some in indexes:
        ids = common(some.ids, old)
        if len(ids):
            index = found.setdefault(kind, new_index(kind))
            index.merge(some.select(ids, new[np.searchsorted(old, ids)]))
    for kind, index in found.items():
        yield from cut_pieces(index, kind, index.ids, index.ids)
