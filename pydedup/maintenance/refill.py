# SPDX-License-Identifier: Apache-2.0
"""Puts copies of pages back where a store keeps several, and one is missing or damaged.

Twice through all pages, a piece at a time. First what is missing is put back, which is known
without reading what is there, so that after the loss of a place each page has its copies again as
soon as can be. Then all copies are read, and those that are damaged are replaced. A copy is written
only from one that is whole: it parses, its checksum is right, and is the one that is recorded.

Each piece is a transaction of its own at each place, so that what was done stays when the work is
cut off. Others read, add, remove and vacuum meanwhile: pages never change, those that are added
have their copies, and of those that are deleted a copy may be left that the next vacuum collects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydedup import codec
from pydedup.adapter import Adapter, PageRow
from pydedup.adapter_options import RefillAdapter
from pydedup.catalog import page_readers
from pydedup.errors import (
    ConflictError,
    CorruptStoreError,
    PydedupError,
    ReadOnlyError,
    SchemaVersionError,
    StorageFullError,
    UnavailableError,
)
from pydedup.types import Progress

__all__ = ["RefillReport", "refill_store"]

#: Rows of pages looked at together, and pages whose copies are read together.
_ROWS_AT_ONCE = 4096
_PAGES_AT_ONCE = 8
_BYTES_AT_ONCE = 16 << 20


@dataclass(slots=True)
class RefillReport:
    """What putting copies back did.

    Attributes
    ----------
    copies
        In how many places each page is to be. Where that is 1 there is nothing to put back.
    pages, page_bytes
        What there is of pages, each counted once.
    missing, damaged
        Copies that were put back, by what was wrong with them.
    written_bytes
        Their bytes.
    places
        How many of them each place got.
    lost
        Pages of which there is no whole copy, with the models that read them. `Store.verify` with
        ``repair_from`` restores them.
    failed
        Places that were given up, and why: their copies are as they were, or not all checked. One
        that takes no changes is still read.
    """

    copies: int = 1
    pages: int = 0
    page_bytes: int = 0
    missing: int = 0
    damaged: int = 0
    written_bytes: int = 0
    places: dict[str, int] = field(default_factory=dict)
    lost: dict[int, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether each page now has all of its copies, as far as it can have any."""
        return not self.lost and not self.failed


def refill_store(adapter: Adapter, *, progress: Progress | None) -> RefillReport:
    """Put back each copy of a page that is missing or damaged.

    Memory: the copies of 8 pages (at most 16 MiB each time, unless a single page is larger), 4096
    rows, and the pages that are lost.

    Raises
    ------
    ReadOnlyError, ConflictError, StoreError
        Of the store as a whole; what is said of one place is in the report. What was put back
        before stays.
    """
    if not isinstance(adapter, RefillAdapter) or adapter.copies < 2:
        return RefillReport()
    adapter.begin_refill()
    work = _Refill(adapter, adapter, progress)
    work.fill()
    work.check()
    return work.report


class _Refill:
    def __init__(self, adapter: Adapter, there: RefillAdapter, progress: Progress | None) -> None:
        self._adapter = adapter
        self._there = there
        self._progress = progress
        self._given_up: set[str] = set()
        self._takes_none: set[str] = set()
        self.report = RefillReport(there.copies)

    def fill(self) -> None:
        """Put back the copies that are not there."""
        report, total = self.report, 0
        for rows in self._windows():
            report.pages += len(rows)
            report.page_bytes += sum(row.payload_bytes for row in rows)
            size = {row.id: row.payload_bytes for row in rows}
            total += sum(size[page] for ids in self._absent(rows).values() for page in ids)
        if not total:
            return
        for rows in self._windows():
            absent = self._absent(rows)
            anywhere = set[int]().union(*absent.values())
            for piece in _pieces([row for row in rows if row.id in anywhere]):
                self._mend(piece, absent)
                if self._progress is not None:
                    done = self.report.written_bytes
                    self._progress("refilling", done, max(done, total))

    def check(self) -> None:
        """Read all copies, and replace those that are damaged."""
        done = 0
        for rows in self._windows():
            for piece in _pieces(rows):
                self._mend(piece, {}, tell=True)
                done += sum(row.payload_bytes for row in piece)
                if self._progress is not None:
                    self._progress("checking copies", done, max(done, self.report.page_bytes))
        if self.report.lost:
            readers = page_readers(self._adapter)
            self.report.lost = {page: readers.get(page, []) for page in sorted(self.report.lost)}

    # ---- inside -------------------------------------------------------------------------------

    def _windows(self) -> Iterator[list[PageRow]]:
        """Yield the rows of all pages, whatever their state: also what is retired is read."""
        after = 0
        while rows := self._adapter.page_rows(after=after, limit=_ROWS_AT_ONCE):
            yield rows
            after = rows[-1].id

    def _absent(self, rows: Sequence[PageRow]) -> dict[str, set[int]]:
        """Return by place the pages whose copies are not there."""
        absent: dict[str, set[int]] = {}
        for place, ids in self._there.copy_places([row.id for row in rows]).items():
            if place in self._given_up:
                continue
            try:
                found = self._there.present_copies(place, ids)
            except (UnavailableError, CorruptStoreError) as error:
                self._give_up(place, error)
                continue
            absent[place] = set(ids).difference(found)
        return absent

    def _mend(
        self,
        rows: Sequence[PageRow],
        absent: Mapping[str, Collection[int]],
        *,
        tell: bool = False,
    ) -> None:
        """Write the copies of some pages that are not there or damaged, from those that are whole.

        ``absent`` are known not to be there, and not asked for. With ``tell`` it is noted which
        pages have no whole copy.
        """
        of = {row.id: row for row in rows}
        places = self._there.copy_places(list(of))
        wanted = {}
        for place, ids in places.items():
            if place not in self._given_up:
                wanted[place] = [page for page in ids if page not in absent.get(place, ())]
        read, problems = self._there.read_copies({k: ids for k, ids in wanted.items() if ids})
        for place, problem in problems.items():
            self._give_up(place, problem)
        whole: dict[int, bytes] = {}
        wrong: dict[str, list[int]] = {}
        for place, ids in places.items():
            if place in self._given_up:
                continue
            copies = read.get(place, {})
            for page in ids:
                if page in copies and _is_whole(copies[page], of[page]):
                    whole.setdefault(page, copies[page])
                else:
                    wrong.setdefault(place, []).append(page)
        for place, ids in wrong.items():
            mended = {page: whole[page] for page in ids if page in whole}
            if mended and place not in self._takes_none:
                self._write(place, mended, read.get(place, {}))
        if tell:
            gone = [page for page in of if page not in whole and self._all_answer(page)]
            # Those that were deleted meanwhile are none that anybody misses.
            there = self._adapter.page_rows(ids=gone) if gone else []
            self.report.lost.update((row.id, []) for row in there)

    def _write(self, place: str, copies: Mapping[int, bytes], found: Mapping[int, bytes]) -> None:
        try:
            self._there.write_copies(place, copies)
        except (UnavailableError, CorruptStoreError) as error:
            self._give_up(place, error)
            return
        except (ReadOnlyError, StorageFullError, ConflictError) as error:
            # It is read on: it may have the only whole copy of what another lacks.
            self._takes_none.add(place)
            self.report.failed[self._there.place_name(place)] = str(error)
            return
        damaged = len(copies.keys() & found.keys())
        self.report.damaged += damaged
        self.report.missing += len(copies) - damaged
        self.report.written_bytes += sum(map(len, copies.values()))
        name = self._there.place_name(place)
        self.report.places[name] = self.report.places.get(name, 0) + len(copies)

    def _give_up(self, place: str, error: PydedupError) -> None:
        self._given_up.add(place)
        self.report.failed[self._there.place_name(place)] = str(error)

    def _all_answer(self, page: int) -> bool:
        return self._given_up.isdisjoint(self._there.copy_places([page]))


def _is_whole(payload: bytes, row: PageRow) -> bool:
    try:
        return codec.Page(payload).checksum == row.checksum
    except (CorruptStoreError, SchemaVersionError):
        return False


def _pieces(rows: Sequence[PageRow]) -> Iterator[list[PageRow]]:
    """Yield rows in pieces whose copies fit into memory together."""
    piece: list[PageRow] = []
    size = 0
    for row in rows:
        if piece and (len(piece) == _PAGES_AT_ONCE or size + row.payload_bytes > _BYTES_AT_ONCE):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += row.payload_bytes
    if piece:
        yield piece
