# SPDX-License-Identifier: Apache-2.0
"""Which pages of the source go as they are into a store that has nothing else.

A page does when all of its blocks are needed, none of them is there yet, and the bases of its
deltas are there or come at the same time. A base that is on a page which the model itself does not
read brings that page along, within a limit: pages that a vacuum wrote mix blocks of many models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.ingest.spool import NO_BASE
from pydedup.layout import NO_PLACE, by_page, split_places
from pydedup.moving.known import Scope
from pydedup.moving.source import Recorded, recorded
from pydedup.sets import distinct, is_among

__all__ = ["WholePages"]

# Pages beside those of the model that may come along, at least; else as many as it reads.
_MORE_PAGES = 64


class WholePages:
    """The pages that go whole with one model.

    Parameters
    ----------
    rows
        What is recorded of the blocks on the pages that the model reads and that are not there.
    places
        The places that the model reads.
    there
        Those of them that the destination has.
    scope
        What other models of this copy brought, and which pages may go whole.

    Attributes
    ----------
    rows
        With what is recorded of the pages that come along.
    entries
        Per page that goes whole, which of ``rows`` are its blocks, by slot.
    """

    def __init__(
        self,
        source: Adapter,
        rows: Recorded,
        places: NDArray[np.int64],
        there: NDArray[np.int64],
        scope: Scope,
    ) -> None:
        self.rows = rows
        self.entries: dict[int, NDArray[np.int64]] = {}
        self._source = source
        self._places = places
        self._there = there
        self._scope = scope
        if scope.used:
            self._add(rows, 0)
            self._bring_bases(max(_MORE_PAGES, len(self.entries)))

    def _add(self, rows: Recorded, offset: int) -> None:
        """Add the pages of ``rows``, bases aside; they begin at ``offset`` of all rows."""
        page_ids, slots = split_places(rows.places)
        taken = is_among(rows.places, self._there)
        taken |= self._scope.known.look_up(rows.places).places != NO_PLACE
        taken |= self._scope.met.look_up(rows.places) != NO_BASE
        for page_id, entries in by_page(page_ids):
            if (
                self._scope.used.get(page_id) == len(entries)
                and page_id not in self._scope.not_whole
                and np.array_equal(slots[entries], np.arange(len(entries)))
                and not taken[entries].any()
            ):
                self.entries[page_id] = entries + offset

    def _bring_bases(self, room: int) -> None:
        """Add pages of bases, as long as there is room; then drop pages that lack one."""
        tried = set(distinct(split_places(self.rows.places)[0]).tolist())
        while True:
            lacking = self._lacking()
            if not lacking:
                return
            wanted = distinct(split_places(np.concatenate(list(lacking.values())))[0])
            more = [page_id for page_id in wanted.tolist() if page_id not in tried][:room]
            if not more:
                for page_id in lacking:
                    del self.entries[page_id]
                continue
            room -= len(more)
            tried.update(more)
            rows = recorded(self._source, np.array(more, np.int64))
            self._add(rows, len(self.rows.places))
            # Not by place any more: whoever looks a place up does so in what the model reads.
            self.rows = Recorded(
                np.concatenate([self.rows.places, rows.places]),
                np.concatenate([self.rows.digests, rows.digests]),
                np.concatenate([self.rows.bases, rows.bases]),
            )

    def _lacking(self) -> dict[int, NDArray[np.int64]]:
        """Return the pages that lack bases, and the places of these."""
        if not self.entries:
            return {}
        every = np.concatenate(list(self.entries.values()))
        bases = distinct(self.rows.bases[every])
        here = is_among(bases, self._places) | is_among(bases, self.rows.places[every])
        found = self._scope.known.look_up(bases)
        here |= (found.places != NO_PLACE) & (found.bases == NO_PLACE)
        here |= self._scope.met.can_be_bases(bases)
        missing = bases[~here & (bases != NO_PLACE)]
        if not len(missing):
            return {}
        lacking = {}
        for page_id, entries in self.entries.items():
            bases = self.rows.bases[entries]
            bases = bases[is_among(bases, missing)]
            if len(bases):
                lacking[page_id] = bases
        return lacking
