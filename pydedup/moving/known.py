# SPDX-License-Identifier: Apache-2.0
"""What one model's copy leaves to the next: where blocks of the source are at the destination."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.ingest.spool import NO_BASE
from pydedup.layout import NO_PLACE, by_page, joined, split_places
from pydedup.sets import find_among, is_among

__all__ = ["Known", "Met", "Scope", "Whereabouts"]


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Places at the destination.

    Attributes
    ----------
    places, bases
        Of the blocks, and of the bases of those that are deltas there; else `NO_PLACE`.
    costs, base_costs
        What they take on their pages.
    """

    places: NDArray[np.int64]
    bases: NDArray[np.int64]
    costs: NDArray[np.int64]
    base_costs: NDArray[np.int64]

    @classmethod
    def nowhere(cls, count: int) -> Whereabouts:
        """Return those of blocks of which nothing is known."""
        nothing = np.full(count, NO_PLACE, np.int64)
        return cls(nothing, nothing.copy(), np.zeros(count, np.int64), np.zeros(count, np.int64))

    def take(self, rows: NDArray[np.int64]) -> Whereabouts:
        """Return some of them."""
        return Whereabouts(
            self.places[rows], self.bases[rows], self.costs[rows], self.base_costs[rows]
        )

    def put(self, rows: NDArray[np.int64], others: Whereabouts) -> None:
        """Replace some of them."""
        self.places[rows], self.bases[rows] = others.places, others.bases
        self.costs[rows], self.base_costs[rows] = others.costs, others.base_costs


class Known:
    """Whereabouts by place at the source. Memory: 40 bytes for each block that is noted."""

    def __init__(self) -> None:
        self._pages: dict[int, tuple[NDArray[np.int64], Whereabouts]] = {}

    def __contains__(self, page_id: int) -> bool:
        return page_id in self._pages

    def look_up(self, places: NDArray[np.int64]) -> Whereabouts:
        """Return where blocks at these places of the source are at the destination."""
        found = Whereabouts.nowhere(len(places))
        for page_id, rows in by_page(split_places(places)[0]):
            if page_id in self._pages:
                noted, whereabouts = self._pages[page_id]
                entries, same = find_among(noted, places[rows])
                found.put(rows[same], whereabouts.take(entries[same]))
        return found

    def note(self, places: NDArray[np.int64], whereabouts: Whereabouts) -> None:
        """Remember where blocks are; of one that was noted before, the newer counts."""
        for page_id, rows in by_page(split_places(places)[0]):
            noted, entries = places[rows], whereabouts.take(rows)
            if page_id in self._pages:
                before, others = self._pages[page_id]
                old = np.flatnonzero(~is_among(before, noted))
                every = np.concatenate([before[old], noted])
                both = Whereabouts.nowhere(len(every))
                both.put(np.arange(len(old)), others.take(old))
                both.put(np.arange(len(old), len(every)), entries)
                noted, entries = every, both
            order = np.argsort(noted)
            self._pages[page_id] = noted[order], entries.take(order)

    def forget(self, page_ids: Iterable[int]) -> None:
        """Forget the blocks on pages that nobody will ask about again."""
        for page_id in page_ids:
            self._pages.pop(page_id, None)

    def clear(self) -> None:
        """Forget everything: another writer may have moved it."""
        self._pages.clear()


class Met:
    """References of what models have that are copied together, by place at the source."""

    def __init__(self) -> None:
        self._places = np.empty(0, np.int64)
        self._references = np.empty(0, np.int64)
        self._are_deltas = np.empty(0, np.bool_)
        self._spooled: list[NDArray[np.int64]] = []

    def spool(self, places: NDArray[np.int64]) -> None:
        """Note where the next blocks on the spool are, `NO_PLACE` for what was made anew."""
        self._spooled.append(places)

    def spooled(self) -> NDArray[np.int64]:
        """Return where all blocks on the spool are, by number."""
        self._spooled = [joined(self._spooled)]
        return self._spooled[0]

    def note(
        self,
        places: NDArray[np.int64],
        references: NDArray[np.int64],
        are_deltas: NDArray[np.bool_],
    ) -> None:
        """Remember what blocks at these places are; some may be noted already, as the same."""
        every = np.concatenate([self._places, places])
        self._places, first = np.unique(every, return_index=True)
        self._references = np.concatenate([self._references, references])[first]
        self._are_deltas = np.concatenate([self._are_deltas, are_deltas])[first]

    def look_up(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return references of blocks at these places, `NO_BASE` where none are noted."""
        entries, there = find_among(self._places, places)
        references = np.full(len(places), NO_BASE, np.int64)
        references[there] = self._references[entries[there]]
        return references

    def can_be_bases(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether blocks at these places are noted, and as no deltas."""
        entries, there = find_among(self._places, places)
        there[there] = ~self._are_deltas[entries[there]]
        return there


@dataclass(frozen=True, slots=True)
class Scope:
    """What the resolving of a model may count on.

    Attributes
    ----------
    known
        What was brought before.
    met
        What comes together with it.
    twins
        Live pages of the destination by checksum, that others brought.
    used
        Blocks of each page of the source that some model of this copy needs; pages of which all
        are needed go whole. Empty where the destination has other models.
    not_whole
        Pages that must not.
    """

    known: Known
    met: Met
    twins: Mapping[bytes, int]
    used: Mapping[int, int]
    not_whole: set[int] = field(default_factory=set)
