# SPDX-License-Identifier: Apache-2.0
"""Checks pages: their checksums, and that blocks hash to what was recorded, deltas with bases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, Adapter, BlockRow, PageRow
from pydedup.adapter_options import PlacesAdapter, page_copies
from pydedup.catalog import page_readers, recorded_pages
from pydedup.errors import CorruptStoreError, SchemaVersionError, UnavailableError
from pydedup.hashing import hash_keys
from pydedup.layout import NO_PLACE, are_deltas, slot_entries, split_places
from pydedup.maintenance.damage import Damage, VerifyReport
from pydedup.maintenance.rows import blocks_of_no_page, rows_by_slot
from pydedup.pool import PagePool
from pydedup.sets import distinct, is_among
from pydedup.text import plural
from pydedup.types import LARGEST_ID, Progress

__all__ = ["DAMAGE", "OTHER_BASE", "PageChecks", "PageContent", "content_digests"]

_PAGES_AT_ONCE = 8
# Pages with bases, which come up again and again.
_BASE_PAGE_BYTES = 64 * 1024 * 1024

#: What follows in notes of room that is taken for nothing.
_NO_DAMAGE = ": no damage, and a vacuum may free the room"
OTHER_BASE = "its base is another than recorded"
#: What says that a page is damaged. Any other error (a kernel or memory that cannot be had) says
#: nothing about the store.
DAMAGE = (CorruptStoreError, SchemaVersionError)


@dataclass(frozen=True, slots=True)
class PageContent:
    """What the slots of a page hold."""

    dtypes: NDArray[np.uint8]
    rows: NDArray[np.uint32]
    cols: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    digests: NDArray[np.uint64]
    readable: NDArray[np.bool_]
    """False for deltas whose base cannot be read; their digests are 0."""
    bases: NDArray[np.int64] | None
    """Places of bases, `NO_PLACE` where a block is no delta; None where none is."""
    doubts: dict[int, tuple[BlockRow, str]] = field(default_factory=dict)
    """Slots that are not as recorded, with the row of each and what is said of it: either of them
    is damaged, and models may know which. Of deltas whose bases are gone, which may well be,
    nothing is said."""

    def bases_of(self, slots: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the places of the bases of some blocks."""
        return np.full(len(slots), NO_PLACE) if self.bases is None else self.bases[slots]


class PageChecks:
    """Checks all live pages, and remembers what is on them for the check of the models.

    Attributes
    ----------
    contents
        By id, what is on each page that could be read.
    damage
        Takes down the pages that could not, and those that are not as recorded.
    """

    def __init__(
        self,
        adapter: Adapter,
        unreadable: Mapping[int, str],
        damaged_rows: Collection[int],
        report: VerifyReport,
    ) -> None:
        self._adapter = adapter
        self._unreadable = unreadable
        self._damaged_rows = damaged_rows
        self._report = report
        self._rows = adapter.page_rows(state=LIVE)
        self._live = {row.id for row in self._rows}
        fetch = recorded_pages(adapter)
        self._pool = PagePool(fetch, _BASE_PAGE_BYTES, copies=page_copies(adapter))
        self._seen: dict[bytes, tuple[int, int]] = {}  # where each block was first
        self._twins: Counter[tuple[int, int]] = Counter()  # by page and page that has them, too
        self.contents: dict[int, PageContent] = {}
        self.damage = Damage(adapter, report, page_readers(adapter), self._live, self._pool)

    def run(self, progress: Progress | None) -> None:
        """Check them all, and what is recorded of blocks that are on none."""
        self.damage.note_missing(self._damaged_rows)
        for page_id, said in self._unreadable.items():
            self.damage.note_unreadable(page_id, said)
        known = 0
        for start in range(0, len(self._rows), _PAGES_AT_ONCE):
            some = self._rows[start : start + _PAGES_AT_ONCE]
            blocks = self._adapter.blocks_on_pages([row.id for row in some])
            known += len(blocks)
            self._check_group(some, blocks)
            if progress is not None:
                done = min(start + _PAGES_AT_ONCE, len(self._rows))
                progress("checking pages", done, len(self._rows))
        self.damage.sum_up_unreachable()
        self._report.notes += [
            f"page {page_id} has {plural(count, 'block')} of page {first} once more{_NO_DAMAGE}"
            for (page_id, first), count in self._twins.items()
        ]
        self._report.add_surplus(blocks_of_no_page(self._adapter, known))

    def note_doubts(self) -> None:
        """Say what is still in doubt after all models were checked: then the page is wrong.

        But for deltas without a base, such as a repair leaves of which the models are elsewhere.
        """
        report = self._report
        for page_id, content in self.contents.items():
            unused = 0
            for slot, (_, said) in content.doubts.items():
                if said:
                    self.damage.note(page_id, f", slot {slot}: {said}")
                else:
                    unused += 1
            if unused:
                report.notes.append(
                    f"page {page_id} has {plural(unused, 'delta')} whose base is gone, which no "
                    f"model is known to use{_NO_DAMAGE}"
                )
            if page_id in report.damaged_pages:
                report.unrecorded_blocks.pop(page_id, None)

    def note_others(self, tags: Mapping[int, bytes], disputed: Collection[int]) -> None:
        """Say which pages are others than these tags tell, where nothing else of them is wrong.

        Of those that are disputed others tell so, to readers that need not be all.
        """
        report = self._report
        others = [
            row.id
            for row in self._rows
            if row.id in disputed or not row.checksum.startswith(tags.get(row.id, b""))
        ]
        for page_id in others:
            if page_id not in report.damaged_pages:
                self.damage.note(page_id, ": its row is that of another page")
            report.unrecorded_blocks.pop(page_id, None)
        # What is recorded of their blocks is right, and what a repair finds them by.
        known = {row.id for row in self._adapter.blocks_on_pages(others)}
        report.surplus_blocks[:] = [n for n in report.surplus_blocks if n not in known]

    def _check_group(self, some: Sequence[PageRow], blocks: Sequence[BlockRow]) -> None:
        report, damage = self._report, self.damage
        recorded: dict[int, list[BlockRow]] = {}
        for block in blocks:
            if block.id > LARGEST_ID:  # which none can follow
                report.surplus_blocks.append(block.id)
            else:
                recorded.setdefault(block.page_id, []).append(block)
        unseen = {row.id: row for row in some if row.id not in self._unreadable}
        for page_id, payload in _payloads(self._adapter, list(unseen.values()), report, damage):
            row = unseen.pop(page_id)
            report.pages += 1
            report.page_bytes += len(payload)
            try:
                self._check_page(row, payload, recorded.get(page_id, []))
            except UnavailableError as exc:
                damage.note_unreachable(page_id, exc)
            except DAMAGE as exc:
                damage.note(page_id, f": {exc}")
        for page_id in sorted(unseen.keys() - report.unreachable_pages.keys()):
            what = "row is damaged"
            if page_id not in self._damaged_rows:
                what = "bytes are in no place that answers"
            damage.note(page_id, f": its {what}")

    def _check_page(self, row: PageRow, payload: bytes, recorded: Sequence[BlockRow]) -> None:
        report = self._report
        page = codec.Page(payload)
        wanted, surplus = rows_by_slot(page, recorded)
        bases, unrecorded = _bases_on(page, row.id, wanted, report)
        readable = _has_base(page, bases, self.damage.can_read)
        other_bases: list[int] = []
        digests = content_digests(page, bases, readable, self._pool, other_bases)
        if page.checksum != row.checksum:
            self.damage.note(row.id, ": its checksum is not the one of its row")
        elif len(payload) != row.payload_bytes:  # a column of its own, in some
            self.damage.note(row.id, ": its size is not the one of its row")
        # Copies: what is only a part of the page's slots keeps all of the page in memory.
        dtypes, *sides, lengths = (
            page.slots[key].copy() for key in ("dtype", "rows", "cols", "length")
        )
        content = PageContent(dtypes, sides[0], sides[1], lengths, digests, readable, bases)
        self.contents[row.id] = content
        report.blocks += page.n_slots
        unrecorded += self._check_slots(row.id, content, wanted, other_bases, unrecorded)
        if not any(said for _, said in content.doubts.values()):
            report.add_surplus(surplus)
        if unrecorded:
            report.unrecorded_blocks[row.id] = unrecorded

    def _check_slots(
        self,
        page_id: int,
        content: PageContent,
        wanted: Mapping[int, BlockRow],
        other_bases: Collection[int],
        unrecorded: Collection[int],
    ) -> list[int]:
        """Compare each slot with its row in ``wanted``; return those that have none."""
        report = self._report
        nameless, is_recorded = [], False
        digests = hash_keys(content.digests)
        gone = ~content.readable
        if content.bases is not None and gone.any():
            gone &= ~is_among(split_places(content.bases)[0], list(self._live))
        for slot, readable in enumerate(content.readable.tolist()):
            digest = digests[slot]
            if slot not in wanted:
                report.add_error(f"page {page_id}, slot {slot}: no distinct block names it")
                nameless.append(slot)
            elif not readable:
                # Whether a model needs it, which would be damage, is seen later.
                if slot in other_bases:
                    content.doubts[slot] = wanted[slot], OTHER_BASE
                elif gone[slot] and slot not in unrecorded:
                    content.doubts[slot] = wanted[slot], ""
                continue
            elif wanted[slot].hash128 != digest:
                said = f"recorded was {wanted[slot].hash128.hex()}"
                content.doubts[slot] = wanted[slot], f"content hashes to {digest.hex()}, {said}"
            else:
                is_recorded = True
            self._note_twin(digest, page_id, slot)
        if is_recorded and page_id not in report.damaged_pages:
            # It is the page that it should be, and its checksum is right.
            for slot in [slot for slot in content.doubts if content.readable[slot]]:
                report.add_wrong(page_id, slot, *content.doubts.pop(slot))
                nameless.append(slot)
        return nameless

    def _note_twin(self, digest: bytes, page_id: int, slot: int) -> None:
        """Count a block that is stored twice: wasteful, not wrong."""
        twin = self._seen.setdefault(digest, (page_id, slot))
        if twin != (page_id, slot):
            mine, other = self.contents[page_id], self.contents[twin[0]]
            if mine.dtypes[slot] == other.dtypes[twin[1]]:
                self._twins[page_id, twin[0]] += 1


def _payloads(
    adapter: Adapter, rows: Sequence[PageRow], report: VerifyReport, damage: Damage
) -> Iterator[tuple[int, bytes]]:
    """Yield pages; where there are copies, the first that is whole, after a look at all of them."""
    copies = page_copies(adapter)
    if copies is None:
        yield from _had(adapter, [row.id for row in rows], damage)
        return
    for row in rows:
        page_id = row.id
        whole: list[bytes] = []
        damaged: list[bytes] = []
        said = ""
        for payload in copies(page_id):
            try:
                codec.Page(payload)
                codec.check_recorded(payload, row.checksum)
                whole.append(payload)
            except DAMAGE as exc:
                damaged.append(payload)
                said = str(exc)
        if whole and damaged:
            report.add_error(f"page {page_id}: a copy of it is damaged ({said}); another is read")
        for payload in (*whole, *damaged)[:1]:
            yield page_id, payload
        if not whole and not damaged:
            yield from _had(adapter, [page_id], damage)


def _had(adapter: Adapter, page_ids: Sequence[int], damage: Damage) -> Iterator[tuple[int, bytes]]:
    """Yield pages without those that are where nobody answers, which are noted."""
    try:
        found = list(adapter.read_pages(page_ids))
    except UnavailableError as exc:
        if len(page_ids) == 1 or not isinstance(adapter, PlacesAdapter):
            damage.note_unreachable(page_ids[0], exc)
            return
        for page_id in page_ids:
            yield from _had(adapter, [page_id], damage)
        return
    yield from found


def _bases_on(
    page: codec.Page, page_id: int, recorded: dict[int, BlockRow], report: VerifyReport
) -> tuple[NDArray[np.int64] | None, list[int]]:
    """Return the recorded place of the base of each slot's block, None for a page without any.

    Also the slots whose rows are to be made anew: a page knows which of its blocks are deltas.
    """
    is_delta = are_deltas(page.slots["encoding"])
    bases = np.full(page.n_slots, NO_PLACE)
    wrong: list[int] = []
    for slot, row in recorded.items():
        if slot < page.n_slots and row.base_id is not None:
            bases[slot] = row.base_id
    for slot in np.flatnonzero(is_delta != (bases != NO_PLACE)).tolist():
        kind = "a delta, but no base is" if is_delta[slot] else "no delta, but a base is"
        report.add_error(f"page {page_id}, slot {slot}: it is {kind} recorded")
        if slot in recorded:
            report.surplus_blocks.append(recorded[slot].id)
            wrong.append(slot)
    bases[~is_delta] = NO_PLACE
    return bases if is_delta.any() else None, wrong


def _has_base(
    page: codec.Page, bases: NDArray[np.int64] | None, can_read: Callable[[int], bool]
) -> NDArray[np.bool_]:
    """Return which blocks of a page can be read: all but deltas whose base is on no sound page.

    A page may be kept for other blocks than a delta whose last user is gone; then nobody keeps the
    base's page.
    """
    if bases is None:
        return np.ones(page.n_slots, np.bool_)
    is_delta = are_deltas(page.slots["encoding"])
    base_page_ids = split_places(bases)[0]
    sound = [n for n in distinct(base_page_ids[is_delta]).tolist() if can_read(n)]
    return ~is_delta | is_among(base_page_ids, sound)


def content_digests(
    page: codec.Page,
    bases: NDArray[np.int64] | None,
    readable: NDArray[np.bool_],
    pool: PagePool,
    other_bases: list[int] | None = None,
) -> NDArray[np.uint64]:
    """Return the digest of each slot's content, 0 for those that cannot be read.

    ``bases`` are the places of bases in ``pool``, -1 where a block is no delta; None where none
    is. Slots whose bases are others go to ``other_bases``, and are not ``readable`` from then on;
    without it that is a CorruptStoreError.
    """
    if bases is None:
        return codec.page_digests(page)
    digests = np.zeros((page.n_slots, 2), np.uint64)
    is_delta = bases != NO_PLACE
    plain = np.flatnonzero(readable & ~is_delta)
    digests[plain] = codec.block_digests([page], np.zeros_like(plain), plain)
    deltas = np.flatnonzero(readable & is_delta)
    base_page_ids, base_slots = split_places(bases[deltas])
    for rows, pages, page_index in pool.windows(base_page_ids):
        some, index, slots = deltas[rows], page_index.astype(np.int64), base_slots[rows]
        is_own = _are_tagged(page, some, pages, index, slots)
        if not is_own.all():
            wrong = some[~is_own].tolist()
            if other_bases is None:
                raise CorruptStoreError(
                    f"slot {wrong[0]} carries the tag of another base than its own"
                )
            other_bases += wrong
            readable[wrong] = False
            some, index, slots = some[is_own], index[is_own], slots[is_own]
        here = codec.StoredBases(pages, index, slots)
        digests[some] = codec.block_digests([page], np.zeros_like(some), some, bases=here)
    return digests


def _are_tagged(
    page: codec.Page,
    deltas: NDArray[np.int64],
    pages: Sequence[codec.Page],
    page_index: NDArray[np.int64],
    slots: NDArray[np.uint32],
) -> NDArray[np.bool_]:
    """Return which deltas of a page carry the tag of the block at each one's place."""
    is_own = slots < np.array([one.n_slots for one in pages], np.int64)[page_index]
    at = np.flatnonzero(is_own)
    entries = slot_entries(pages, page_index[at].astype(np.uint32), slots[at])
    is_own[at] = ~are_deltas(entries["encoding"])
    there = np.flatnonzero(is_own)
    digests = codec.block_digests(pages, page_index[there], slots[there])
    is_own[there] = page.slots["base"][deltas[there]] == codec.base_tags(digests)
    return is_own
