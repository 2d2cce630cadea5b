# SPDX-License-Identifier: Apache-2.0
"""What a verification reports, and which pages it found damaged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydedup.adapter import LIVE, Adapter, BlockRow
from pydedup.adapter_options import PlacesAdapter, only_sound_rows
from pydedup.errors import CorruptStoreError, UnavailableError
from pydedup.maintenance.repair import RepairReport
from pydedup.pool import PagePool
from pydedup.text import clean, listed, plural

__all__ = ["MAX_ERRORS", "Damage", "VerifyReport", "sound_rows", "unreadable_pages"]

#: Errors that a report lists.
MAX_ERRORS = 100


@dataclass(slots=True)
class VerifyReport:
    """What a verification looked at and what it found.

    ``models`` counts each version of a model, ``names`` the models themselves.
    ``errors`` are damage, ``broken_promises`` metrics below what a certificate says; ``notes`` are
    harmless: leftovers that a vacuum removes, blocks that are stored twice, metrics as certified.
    ``damaged_pages`` has the pages that cannot be read, or do not hold what was recorded, each
    with the models that read it; all others are served.
    ``unreachable`` says which servers do not answer now, and ``unreachable_pages`` has what is
    nowhere else: neither sound nor damaged, as far as is known. ``unrecorded_blocks`` has by page
    the slots that no distinct block names, ``surplus_blocks`` the ids of distinct blocks that are
    on no page, and ``wrong_readers`` the models of which it is recorded wrongly what they read, by
    all that their block maps say: a repair makes these rows anew.
    """

    pages: int = 0
    blocks: int = 0
    models: int = 0
    page_bytes: int = 0
    names: int = 0
    errors: list[str] = field(default_factory=list)
    damaged_pages: dict[int, list[str]] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)
    unreachable_pages: dict[int, list[str]] = field(default_factory=dict)
    unrecorded_blocks: dict[int, list[int]] = field(default_factory=dict)
    surplus_blocks: list[int] = field(default_factory=list)
    wrong_readers: list[str] = field(default_factory=list)
    broken_promises: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repair: RepairReport | None = None
    """What was restored before this verification, where it was asked for."""

    @property
    def ok(self) -> bool:
        """Whether all was checked, nothing is damaged, and the promises asked about are kept."""
        return not self.errors and not self.broken_promises and not self.unreachable

    def unread(self, page_id: int) -> bool:
        """Whether a page was told of already, as damaged or not to be had."""
        return page_id in self.damaged_pages or page_id in self.unreachable_pages

    def add_surplus(self, rows: Iterable[BlockRow]) -> None:
        """Record distinct blocks that are on no page.

        Not those of damaged pages: by them a repair knows what to look for.
        """
        for row in rows:
            if row.page_id in self.damaged_pages:
                continue
            place = f"page {row.page_id}, slot {row.slot}"
            self.add_error(f"{place}: recorded, but there is no such block")
            self.surplus_blocks.append(row.id)

    def add_wrong(self, page_id: int, slot: int, row: BlockRow, said: str) -> None:
        """Record that what is recorded of a slot is wrong, while the slot is right."""
        self.add_error(f"page {page_id}, slot {slot}: {said}, which is wrong")
        self.surplus_blocks.append(row.id)

    def add_error(self, text: str) -> None:
        """Record damage; a hopeless store stops the list at some point."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(clean(text))  # names that are damaged may steer a terminal


@contextmanager
def sound_rows(adapter: Adapter, report: VerifyReport) -> Iterator[dict[str, set[int]]]:
    """Report rows with a value that its column cannot have, and go on as if they were not there.

    Gives by table the ids of pages and of models whose rows that are; of a distinct block another
    row can be made.
    """
    damaged: dict[str, set[int]] = {"pages": set(), "models": set()}
    told: set[str] = set()

    def tell(table: str, key: Mapping[str, object], said: str) -> None:
        if said in told:
            return
        told.add(said)
        report.add_error(said)
        row_id = key.get("id")
        if table in damaged and isinstance(row_id, int):
            damaged[table].add(row_id)
        elif table == "distinct_blocks" and isinstance(row_id, int):
            report.surplus_blocks.append(row_id)

    with only_sound_rows(adapter, tell):
        yield damaged


class Damage:
    """Takes down which pages are damaged, with the models that read them."""

    def __init__(
        self,
        adapter: Adapter,
        report: VerifyReport,
        readers: Mapping[int, list[str]],
        live: Collection[int],
        pool: PagePool,
    ) -> None:
        self._adapter = adapter
        self._report = report
        self._readers = readers
        self._live = live
        self._pool = pool
        self._can_read: dict[int, bool] = {}
        self._said = ""

    def note(self, page_id: int, text: str) -> None:
        """Record damage of a page; its readers are named once."""
        readers = self._readers.get(page_id, [])
        if page_id not in self._report.damaged_pages:
            text += f"; read by {listed(readers)}" if readers else "; no model reads it"
        self._report.damaged_pages[page_id] = readers
        self._report.add_error(f"page {page_id}{text}")

    def note_missing(self, damaged: Collection[int]) -> None:
        """Record pages that models read and that are not among the live ones.

        Those whose row is ``damaged`` were told of, and are in the way of all that lists pages.
        """
        missing = sorted(self._readers.keys() - set(self._live))
        states = (
            {row.id: row.state for row in self._adapter.page_rows(ids=missing)} if missing else {}
        )
        for page_id in sorted(damaged):
            self.note(page_id, ": its row is damaged")
        for page_id in sorted(set(missing).difference(damaged)):
            self.note(page_id, f": it is {states.get(page_id, 'missing')}")

    def note_unreadable(self, page_id: int, said: str) -> None:
        """Record a page that the database refuses to read."""
        self.note(page_id, f": {said}")
        self._can_read[page_id] = False

    def note_unreachable(self, page_id: int, error: UnavailableError) -> None:
        """Record a page that is where nobody answers.

        Raises the error where there is no other place: nothing else can be read then, either.
        """
        if not isinstance(self._adapter, PlacesAdapter):
            raise error
        if not self._report.unreachable_pages:
            self._said = str(error)
        self._report.unreachable_pages[page_id] = self._readers.get(page_id, [])
        self._can_read[page_id] = False

    def sum_up_unreachable(self) -> None:
        """Say which servers do not answer, and what is not known for that."""
        report = self._report
        pages = report.unreachable_pages
        if isinstance(self._adapter, PlacesAdapter):
            report.unreachable += self._adapter.unreachable_places()
        if not pages:
            return
        if not report.unreachable:
            report.unreachable.append(self._said)
        models = sorted({name for readers in pages.values() for name in readers})
        read_by = f"read by {listed(models)}" if models else "no model reads them"
        report.unreachable.append(f"{plural(len(pages), 'page')} could not be checked; {read_by}")

    def can_read(self, page_id: int) -> bool:
        """Whether a page is live, can be had, and parses."""
        if page_id not in self._can_read:
            try:
                is_there = page_id in self._live and bool(self._pool.pages([page_id]))
                self._can_read[page_id] = is_there
            except CorruptStoreError:
                self._can_read[page_id] = False
            except UnavailableError as exc:
                self.note_unreachable(page_id, exc)
        return self._can_read[page_id]


def unreadable_pages(adapter: Adapter) -> dict[int, str]:
    """Return the live pages that the database itself refuses to read, and what it says."""
    found: dict[int, str] = {}
    for row in adapter.page_rows(state=LIVE):
        try:
            for _ in adapter.read_pages([row.id]):
                pass
        except CorruptStoreError as exc:
            found[row.id] = str(exc)
    return found
