# SPDX-License-Identifier: Apache-2.0
"""The similarity index of a store, as it is read from ``signatures``, and kept for the next add.

A segment never changes (`pydedup.signatures`), so what was read of the index stays right while
segments are only added behind those that were read, and the same pages are live: then what is new
is read. In any other case, such as a vacuum, or an add by somebody else that is published later
than one that began after it, all is read again. Either way the index is the same: live blocks in
the order of segments, as if there had never been others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.layout import split_places
from pydedup.sets import find_among, union
from pydedup.signatures import (
    BlockKind,
    covering_rows,
    new_index,
    read_pieces,
    read_segments,
    rows_of_kind,
)
from pydedup.similarity import L2LSH

__all__ = ["KeptIndex", "StoredIndex"]

# Pieces that are in memory beside the index that they become part of.
_PIECES_AT_ONCE = 16
_NONE = np.empty(0, np.int64)


@dataclass(slots=True)
class _OfKind:
    """The blocks of one kind: the rows that were read, and pages that have a block in them."""

    index: L2LSH
    rows: NDArray[np.int64]
    live: NDArray[np.int64]
    #: Those that were not live: their blocks are not in the index.
    others: NDArray[np.int64]

    @property
    def memory_bytes(self) -> int:
        """Bytes that it takes."""
        arrays = self.rows.nbytes + self.live.nbytes + self.others.nbytes
        return self.index.memory_bytes + arrays


class StoredIndex:
    """What one add after the other has read. Not thread-safe; see `KeptIndex`."""

    def __init__(self, store_id: str | None) -> None:
        self.store_id = store_id
        self._rows = self._covered = _NONE
        self._kinds: dict[BlockKind, _OfKind] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes that it takes."""
        return (
            self._rows.nbytes
            + self._covered.nbytes
            + sum(kind.memory_bytes for kind in self._kinds.values())
        )

    def covered(self, adapter: Adapter) -> NDArray[np.int64]:
        """Return the pages that segments cover, in any order."""
        listed = covering_rows(adapter)
        if not _begins_with(listed, self._rows):
            self._rows = self._covered = _NONE
        new = read_segments(adapter, listed[len(self._rows) :].tolist())
        self._covered = np.concatenate([self._covered, *(one.page_ids for one in new)])
        self._rows = listed
        return self._covered

    def of_kind(self, adapter: Adapter, kind: BlockKind, live: NDArray[np.int64]) -> L2LSH:
        """Return the index of the blocks of one kind on ``live`` pages, which ascend.

        Whoever adds blocks to it removes them again before it is kept.
        """
        listed = rows_of_kind(adapter, kind)
        known = self._kinds.get(kind)
        if (
            known is None
            or not _begins_with(listed, known.rows)
            or not find_among(live, known.live)[1].all()
            or find_among(live, known.others)[1].any()
        ):
            known = self._kinds[kind] = _OfKind(new_index(kind), _NONE, _NONE, _NONE)
        pieces = read_pieces(adapter, kind, listed[len(known.rows) :].tolist())
        while some := list(islice(pieces, _PIECES_AT_ONCE)):
            _merge(known, some, live)
        known.rows = listed
        return known.index


class KeptIndex:
    """What an add leaves to the next one of the same open store.

    One add has it at a time; others read for themselves meanwhile. No lock, which a fork could
    leave held: each use is one operation on the deque.
    """

    def __init__(self) -> None:
        self._kept: deque[StoredIndex] = deque(maxlen=1)

    def take(self, store_id: str | None) -> StoredIndex:
        """Return what was kept of the store with this id, or begin anew."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return StoredIndex(store_id)
        return kept if kept.store_id == store_id else StoredIndex(store_id)

    def keep(self, index: StoredIndex, limit_bytes: int) -> None:
        """Keep an index, unless it takes more than that."""
        if index.memory_bytes <= limit_bytes:
            self._kept.append(index)


def _merge(known: _OfKind, pieces: list[L2LSH], live: NDArray[np.int64]) -> None:
    ids = [piece.ids for piece in pieces]
    pages = split_places(np.concatenate(ids))[0]
    is_live = find_among(live, pages)[1]
    known.live = union(known.live, pages[is_live])
    if not is_live.all():
        known.others = union(known.others, pages[~is_live])
        starts = np.cumsum([len(mine) for mine in ids[:-1]])
        for piece, mine, stay in zip(pieces, ids, np.split(is_live, starts), strict=True):
            piece.remove(mine[~stay])
    for piece in pieces:
        known.index.merge(piece)


def _begins_with(listed: NDArray[np.int64], rows: NDArray[np.int64]) -> bool:
    return np.array_equal(listed[: len(rows)], rows)
