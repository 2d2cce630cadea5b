# SPDX-License-Identifier: Apache-2.0
"""Checks a whole store, bit by bit, and changes nothing.

Page by page: every page's checksum, and that each block on it still hashes to what was recorded
when it was stored, deltas with their bases. Then model by model: every block map leads to a block
of the right shape and dtype whose hash is that of the source, so a load gives the source back. What
a model stored within an error bound holds is no longer the source: there, content is what was
recorded when it was stored, and the source's hashes say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter, BlockRow
from pydedup.adapter_options import PlacesAdapter
from pydedup.catalog import (
    StoredModel,
    certificate_of,
    model_info,
    page_copies,
    page_readers,
)
from pydedup.errors import (
    CorruptStoreError,
    StoreError,
    UnavailableError,
)
from pydedup.layout import slot_entries, split_places
from pydedup.maintenance.damage import (
    Damage,
    VerifyReport,
    sound_rows,
    unreadable_pages,
)
from pydedup.maintenance.rows import blocks_of_no_page, lost_models, rows_by_slot
from pydedup.maintenance.verify_models import (
    DAMAGE,
    NO_BASE,
    OTHER_BASE,
    PageContent,
    verify_meta,
    verify_model,
    verify_names,
)
from pydedup.pool import PagePool
from pydedup.text import plural
from pydedup.types import LARGEST_ID, Progress

__all__ = ["VerifyReport", "content_digests", "verify_store"]

_PAGES_AT_ONCE = 8
# Pages with bases, which come up again and again.
_BASE_PAGE_BYTES = 64 * 1024 * 1024


def verify_store(adapter: Adapter, *, progress: Progress | None = None) -> VerifyReport:
    """Verify everything that is live.

    Memory: a few pages, 64 MiB of pages with bases, and 31 bytes per distinct block (39 on pages
    with deltas).
    """
    try:
        return _verified(adapter, {}, progress)
    except StoreError as exc:
        # Some databases have checksums of their own; where one does not fit they end the snapshot,
        # and the error may be only about that.
        if type(exc) not in (StoreError, CorruptStoreError):
            raise
        with sound_rows(adapter, VerifyReport()):
            unreadable = unreadable_pages(adapter)
        if not unreadable:
            raise
    return _verified(adapter, unreadable, progress)


def _verified(
    adapter: Adapter, unreadable: Mapping[int, str], progress: Progress | None
) -> VerifyReport:
    report = VerifyReport()
    for complaint in adapter.integrity_errors():
        report.add_error(f"database: {complaint}")
    with adapter.snapshot(), sound_rows(adapter, report) as damaged:
        contents, damage = _verify_pages(adapter, unreadable, damaged["pages"], report, progress)
        rows = adapter.models()
        for number, row in enumerate(rows):
            for read in (model_info, certificate_of):
                try:
                    read(row)
                except CorruptStoreError as exc:
                    report.add_error(str(exc))
            try:
                model = StoredModel(adapter, row)
            except CorruptStoreError as exc:
                report.add_error(str(exc))
            else:
                verify_model(adapter, model, contents, report)
            report.models += 1
            if progress is not None:
                progress("checking models", number + 1, len(rows))
        for page_id, content in contents.items():
            for slot, (_, said) in content.doubts.items():
                if said:
                    damage.note(page_id, f", slot {slot}: {said}")
            if page_id in report.damaged_pages:
                report.unrecorded_blocks.pop(page_id, None)
        verify_meta(adapter, report)
        verify_names(adapter, rows, damaged["models"], report)
        _note_leftovers(adapter, damaged["models"], report)
    return report


def _verify_pages(
    adapter: Adapter,
    unreadable: Mapping[int, str],
    damaged_rows: Collection[int],
    report: VerifyReport,
    progress: Progress | None,
) -> tuple[dict[int, PageContent], Damage]:
    contents: dict[int, PageContent] = {}
    rows = adapter.page_rows(state=LIVE)
    live = {row.id for row in rows}
    pool = PagePool(adapter.read_pages, _BASE_PAGE_BYTES, copies=page_copies(adapter))
    damage = Damage(adapter, report, page_readers(adapter), live, pool)
    damage.note_missing(damaged_rows)
    for page_id, said in unreadable.items():
        damage.note_unreadable(page_id, said)
    seen: dict[bytes, tuple[int, int]] = {}
    known = 0
    for start in range(0, len(rows), _PAGES_AT_ONCE):
        some = rows[start : start + _PAGES_AT_ONCE]
        group = {row.id: row for row in some if row.id not in unreadable}
        recorded: dict[int, list[BlockRow]] = {}
        for block in adapter.blocks_on_pages([row.id for row in some]):
            known += 1
            if block.id > LARGEST_ID:  # which none can follow
                report.surplus_blocks.append(block.id)
                continue
            recorded.setdefault(block.page_id, []).append(block)
        unseen = set(group)
        for page_id, payload in _payloads(adapter, list(group), report, damage):
            unseen.discard(page_id)
            report.pages += 1
            report.page_bytes += len(payload)
            try:
                page = codec.Page(payload)
                wanted, surplus = rows_by_slot(page, recorded.get(page_id, []))
                bases, unrecorded = _bases_on(page, page_id, wanted, report)
                readable = _has_base(page, bases, damage.can_read)
                other_bases: list[int] = []
                digests = content_digests(page, bases, readable, pool, other_bases)
            except UnavailableError as exc:
                damage.note_unreachable(page_id, exc)
                continue
            except DAMAGE as exc:
                damage.note(page_id, f": {exc}")
                continue
            if page.checksum != group[page_id].checksum:
                damage.note(page_id, ": its checksum is not the one of its row")
            elif len(payload) != group[page_id].payload_bytes:  # a column of its own, in some
                damage.note(page_id, ": its size is not the one of its row")
            # Copies: what is only a part of the page's slots keeps all of the page in memory.
            dtypes, *sides, lengths = (
                page.slots[key].copy() for key in ("dtype", "rows", "cols", "length")
            )
            content = PageContent(dtypes, sides[0], sides[1], lengths, digests, readable, bases)
            contents[page_id] = content
            report.blocks += page.n_slots
            actual = digests.astype("<u8").tobytes()
            gone = ~readable
            if bases is not None and gone.any():
                gone &= ~np.isin(split_places(bases)[0], list(live))
            for slot in range(page.n_slots):
                digest = actual[16 * slot : 16 * slot + 16]
                if slot not in wanted:
                    report.add_error(f"page {page_id}, slot {slot}: no distinct block names it")
                    unrecorded.append(slot)
                elif not readable[slot]:
                    # Whether a model needs it, which would be damage, is seen later.
                    if slot in other_bases:
                        content.doubts[slot] = wanted[slot], OTHER_BASE
                    elif gone[slot] and slot not in unrecorded:
                        content.doubts[slot] = wanted[slot], ""
                        report.notes.append(
                            f"page {page_id}, slot {slot}: a delta whose base is gone"
                        )
                    continue
                elif wanted[slot].hash128 != digest:
                    said = f"recorded was {wanted[slot].hash128.hex()}"
                    said = f"content hashes to {digest.hex()}, {said}"
                    content.doubts[slot] = wanted[slot], said
                _note_twin(report, seen, contents, digest, page_id, slot)
            if not any(said for _, said in content.doubts.values()):
                report.add_surplus(surplus)
            if unrecorded:
                report.unrecorded_blocks[page_id] = unrecorded
        for page_id in sorted(unseen.difference(report.unreachable_pages)):
            what = "row is damaged"
            if page_id not in damaged_rows:
                what = "bytes are in no place that answers"
            damage.note(page_id, f": its {what}")
        if progress is not None:
            progress("checking pages", min(start + _PAGES_AT_ONCE, len(rows)), len(rows))
    damage.sum_up_unreachable()
    report.add_surplus(blocks_of_no_page(adapter, known))
    return contents, damage


def _payloads(
    adapter: Adapter, page_ids: Sequence[int], report: VerifyReport, damage: Damage
) -> Iterator[tuple[int, bytes]]:
    """Yield pages; where there are copies, the first that is whole, after a look at all of them."""
    copies = page_copies(adapter)
    if copies is None:
        yield from _had(adapter, page_ids, damage)
        return
    for page_id in page_ids:
        whole: list[bytes] = []
        damaged: list[bytes] = []
        said = ""
        for payload in copies(page_id):
            try:
                codec.Page(payload)
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
    is_delta = page.slots["encoding"] >= codec.Encoding.DELTA
    bases = np.full(page.n_slots, NO_BASE)
    wrong: list[int] = []
    for slot, row in recorded.items():
        if slot < page.n_slots and row.base_id is not None:
            bases[slot] = row.base_id
    for slot in np.flatnonzero(is_delta != (bases != NO_BASE)).tolist():
        kind = "a delta, but no base is" if is_delta[slot] else "no delta, but a base is"
        report.add_error(f"page {page_id}, slot {slot}: it is {kind} recorded")
        if slot in recorded:
            report.surplus_blocks.append(recorded[slot].id)
            wrong.append(slot)
    bases[~is_delta] = NO_BASE
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
    is_delta = page.slots["encoding"] >= codec.Encoding.DELTA
    base_page_ids = split_places(bases)[0]
    sound = [n for n in np.unique(base_page_ids[is_delta]).tolist() if can_read(n)]
    return ~is_delta | np.isin(base_page_ids, sound)


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
    is_delta = bases != NO_BASE
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
        if len(some):
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
    is_own[at] = entries["encoding"] < codec.Encoding.DELTA
    there = np.flatnonzero(is_own)
    if len(there):
        digests = codec.block_digests(pages, page_index[there], slots[there])
        is_own[there] = page.slots["base"][deltas[there]] == codec.base_tags(digests)
    return is_own


def _note_twin(
    report: VerifyReport,
    seen: dict[bytes, tuple[int, int]],
    contents: dict[int, PageContent],
    digest: bytes,
    page_id: int,
    slot: int,
) -> None:
    """Note a block that is stored twice: wasteful, not wrong."""
    twin = seen.setdefault(digest, (page_id, slot))
    if twin != (page_id, slot):
        mine, other = contents[page_id], contents[twin[0]]
        if mine.dtypes[slot] == other.dtypes[twin[1]]:
            report.notes.append(
                f"page {page_id}, slot {slot}: same block as page {twin[0]}, slot {twin[1]}"
            )


def _note_leftovers(adapter: Adapter, damaged: Collection[int], report: VerifyReport) -> None:
    adapter.jobs()  # rows of it may be damaged
    models = adapter.models(state=None)
    for row in models:
        if row.state not in (STAGING, LIVE):
            report.add_error(
                f"{row.name}@{row.version} is {row.state!r}, which no model can be, so it is not "
                "served; restore a backup"
            )
    for model_id in sorted(lost_models(adapter).difference(damaged, (row.id for row in models))):
        report.add_error(
            f"the row of the model with id {model_id} is lost, whose pages are there; restore a "
            "backup"
        )
    staging = sum(row.state == STAGING for row in models)
    if staging:
        report.notes.append(plural(staging, "unfinished or running add"))
    for state in (STAGING, RETIRED):
        pages = len(adapter.page_rows(state=state))
        if pages:
            report.notes.append(plural(pages, f"{state} page"))
