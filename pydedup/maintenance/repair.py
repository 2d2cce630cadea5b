# SPDX-License-Identifier: Apache-2.0
"""Restores the blocks of damaged pages, and puts them where models find them.

Of a damaged page, most blocks are usually as they were: whatever still decodes to what was recorded
is taken from there, the rest looked for elsewhere by its hash: on sound pages of the store
(blocks_here.py), then in what it is repaired from (blocks_from.py). Bases come first,
then the deltas on them; a delta that cannot be had, or whose base cannot, is looked for by what it
stands for. Where its base is there, it is the delta that it was found as, on a base of the same
content, or one made anew, without factors; else it is stored without a base. All of it is staged on
new pages, in bounded transactions.

One short transaction then makes models name the new places. What it changes it reads within, so it
does not matter who published, removed or repacked in between. Damaged pages of which nothing is
used any more go; one that holds what was not found stays, for another try.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pydedup import codec
from pydedup.adapter import Adapter
from pydedup.errors import CorruptStoreError, PydedupError, SchemaVersionError, UnavailableError
from pydedup.jobs import PAGES_PER_TRANSACTION, Job
from pydedup.layout import PAGE_CAPACITY, block_at, block_place, split_place
from pydedup.maintenance.blocks_from import (
    BlockSource,
    EncodedBlock,
    Wanted,
    as_raw,
    base_dtypes,
    delta_on,
    dtype_of_base,
    on_base,
    page_of_slot,
    read_block,
)
from pydedup.maintenance.blocks_here import HereFirst
from pydedup.maintenance.relocate import Moves, relocate
from pydedup.maintenance.survey import Lost, survey
from pydedup.pool import PagePool
from pydedup.types import Progress

__all__ = ["MissingBlocks", "RepairReport", "repair"]


@dataclass(frozen=True, slots=True)
class MissingBlocks:
    """Blocks of a damaged page that were found nowhere, and the models that miss them.

    Attributes
    ----------
    damaged_there
        How many of them the source has, but damaged itself: on its ``source_pages``.
    forgotten
        How many nobody can look for: what they held is recorded nowhere any more. The others are
        not in the source.
    """

    page: int
    blocks: int
    models: tuple[str, ...]
    damaged_there: int = 0
    source_pages: tuple[int, ...] = ()
    forgotten: int = 0


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did.

    Attributes
    ----------
    damaged_pages, replaced_pages
        How many there were, and how many of them nothing is missing of any more.
    kept_blocks
        Blocks that were still as recorded on their damaged page.
    found_blocks
        Blocks that came from elsewhere, or from other pages.
    new_pages
        Pages that these were written to.
    missing
        What was found nowhere; these pages are as damaged as before.
    undeleted_pages
        Pages that nobody uses any more, and that the database is too damaged to delete.
    source_damage
        What of the source could not be read where blocks were looked for: of a page or a tensor,
        what is wrong with it.
    recorded_models, recorded_blocks
        Of how many models it was recorded anew what they read, and of how many blocks where they
        are, or that there is none. Nothing of the source is needed for that.
    """

    damaged_pages: int = 0
    replaced_pages: int = 0
    kept_blocks: int = 0
    found_blocks: int = 0
    new_pages: int = 0
    missing: tuple[MissingBlocks, ...] = ()
    undeleted_pages: tuple[int, ...] = ()
    source_damage: Mapping[str, str] = field(default_factory=dict)
    recorded_models: int = 0
    recorded_blocks: int = 0


def repair(
    adapter: Adapter,
    pool: PagePool,
    damaged: Collection[int],
    source: BlockSource,
    *,
    progress: Progress | None = None,
) -> RepairReport:
    """Restore the blocks that models use of damaged pages, as far as they are found.

    Memory: 16 pages, what `survey` takes, about 500 bytes for each block that is restored, and
    bases of which it is not sure what dtype they had.

    Raises
    ------
    ReadOnlyError, ConflictError, StorageFullError
        The store is as it was before, but for what the next vacuum collects.
    """
    if not damaged:
        return RepairReport()
    pool.drop(sorted(damaged))
    found = survey(adapter, damaged)
    job = Job(adapter, "repair")
    moves = Moves()
    source = HereFirst(adapter, pool, damaged, source, moves.places)
    work = _Repair(adapter, pool, source, moves, job, len(found.lost), progress)
    try:
        bases = {place: block for place, block in found.lost.items() if block.base is None}
        work.name_dtypes(bases, found.dependents, damaged)
        work.restore(bases, found.block_shapes)
        deltas = {place: block for place, block in found.lost.items() if block.base is not None}
        work.lost_bases = bases.keys() - work.moves.places.keys()
        for base in work.lost_bases:
            deltas.update(found.dependents.get(base, {}))
        work.restore(deltas, found.block_shapes)
        left = relocate(adapter, pool, work.moves, damaged, job)
    except BaseException:
        # What cannot be removed now (a full disk, a lost connection) goes with the next vacuum.
        with contextlib.suppress(PydedupError):
            job.discard(work.new_pages)
        raise
    unused = sorted(set(work.new_pages) - left.used)
    replaced = sorted(set(damaged) - left.missing.keys())
    return RepairReport(
        damaged_pages=len(damaged),
        replaced_pages=len(replaced),
        kept_blocks=work.kept,
        found_blocks=work.found,
        new_pages=len(work.new_pages) - len(unused),
        missing=tuple(
            _missing(page_id, places, found.lost, source)
            for page_id, places in sorted(left.missing.items())
        ),
        undeleted_pages=_deleted(job, [*unused, *replaced]),
        source_damage=dict(source.damage),
    )


def _missing(
    page_id: int,
    places: Mapping[int, Collection[str]],
    lost: Mapping[int, Lost],
    source: BlockSource,
) -> MissingBlocks:
    """Say what of a page was found nowhere, and why."""
    digests = [lost[place].digest if place in lost else None for place in places]
    there = [source.unreadable[digest] for digest in digests if digest in source.unreadable]
    return MissingBlocks(
        page=page_id,
        blocks=len(places),
        models=tuple(sorted(set[str]().union(*places.values()))),
        damaged_there=len(there),
        source_pages=tuple(sorted(set[int]().union(*there))),
        forgotten=digests.count(None),
    )


def _deleted(job: Job, page_ids: Sequence[int]) -> tuple[int, ...]:
    """Delete pages that nobody uses; returns those that the database refuses to delete."""
    refused = []
    for page_id in page_ids:
        try:
            job.discard([page_id])
        except CorruptStoreError:
            refused.append(page_id)
    return tuple(refused)


class _Repair:
    """Restores blocks and stages them, a page at a time."""

    def __init__(
        self,
        adapter: Adapter,
        pool: PagePool,
        source: BlockSource,
        moves: Moves,
        job: Job,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._adapter = adapter
        self._pool = pool
        self._source = source
        self._job = job
        self._total = total
        self._progress = progress
        self._full: list[list[_Placed]] = []
        self._page: list[_Placed] = []
        self._bytes = 0
        self.moves = moves
        self.new_pages: list[int] = []
        self.lost_bases: Collection[int] = frozenset()
        self.kept = self.found = 0

    def restore(self, lost: Mapping[int, Lost], block_shapes: Collection[tuple[int, int]]) -> None:
        """Restore blocks: from their own pages what still is as it was, the rest from elsewhere.

        Bases of deltas among them must have been restored before, as far as they can be.
        """
        rest: dict[Wanted, list[int]] = {}
        for place, block, encoded in self._kept(lost):
            if encoded is not None:
                self._put(place, encoded, block)
                self.kept += 1
            elif block.digest is not None:
                for dtype, shape in itertools.product(block.dtypes, block.shapes):
                    wanted = Wanted(block.digest, dtype, *shape)
                    rest.setdefault(wanted, []).append(place)
        found = self._source.find(list(rest), block_shapes, self._job.keep_alive) if rest else ()
        ranks: dict[int, int] = {}  # by place: how unlikely the dtype is that it was found with
        unsure: dict[int, EncodedBlock] = {}
        for encoded in found:
            for place in rest.pop(encoded.content, ()):
                dtypes = lost[place].dtypes
                rank = dtypes.index(encoded.content.dtype)
                if rank >= ranks.get(place, len(dtypes)):
                    continue
                ranks[place] = rank
                if rank > 0:
                    unsure[place] = encoded
                else:
                    unsure.pop(place, None)
                    self._put(place, self._as_delta(encoded, lost[place]), lost[place])
        for place, encoded in unsure.items():
            self._put(place, encoded, lost[place])
        self.found += len(ranks)
        self._end_page()
        self._stage()

    def name_dtypes(
        self,
        bases: Mapping[int, Lost],
        dependents: Mapping[int, Mapping[int, Lost]],
        damaged: Collection[int],
    ) -> None:
        """Find out the dtypes of blocks that are only used as bases: deltas on them say so.

        A delta on a damaged page may say it wrong. Where no sound one says it, every dtype that can
        be is looked for, the one that most name first. No harm comes of a wrong one that has the
        same bytes: deltas on it do not decode to what they were.
        """
        payloads: dict[int, bytes] = {}
        for place, block in bases.items():
            if block.dtypes:
                continue
            named: Counter[int] = Counter()
            for delta, of in dependents.get(place, {}).items():
                page_id, slot = split_place(delta)
                if page_id not in payloads:
                    payloads = {page_id: self._payload(page_id)}
                page = page_of_slot(payloads[page_id], slot)
                possible = base_dtypes(of.dtypes[0])
                named.update(dict.fromkeys(possible, 0))
                if page is not None and dtype_of_base(page) in possible:
                    if page_id not in damaged:
                        named = Counter([dtype_of_base(page)])
                        break
                    named[dtype_of_base(page)] += 1
            block.dtypes = tuple(dtype for dtype, _ in named.most_common())

    # ---- inside -------------------------------------------------------------------------------

    def _kept(self, lost: Mapping[int, Lost]) -> Iterator[tuple[int, Lost, EncodedBlock | None]]:
        """Yield place, block, and the block as its page has it, where that is still right."""
        at, payload = -1, b""
        for place in sorted(lost):
            page_id, slot = split_place(place)
            if page_id != at:
                at, payload = page_id, self._payload(page_id)
            self._job.keep_alive()
            yield place, lost[place], self._as_recorded(payload, slot, lost[place])

    def _as_recorded(self, payload: bytes, slot: int, block: Lost) -> EncodedBlock | None:
        page = page_of_slot(payload, slot)
        if page is None or block.digest is None:
            return None
        dtype, rows, cols = (int(page.slots[0][name]) for name in ("dtype", "rows", "cols"))
        if (rows, cols) not in block.shapes or (block.dtypes and dtype not in block.dtypes):
            return None
        try:
            encoded = read_block(page, 0, self._base(block), keep_delta=True)
        except (CorruptStoreError, SchemaVersionError, UnavailableError):
            # It does not decode, or its base is lost, or on a server that does not answer.
            return None
        return encoded if encoded.content.digest == block.digest else None

    def _as_delta(self, found: EncodedBlock, block: Lost) -> EncodedBlock:
        """Return a block as a delta on its base here: as it was found as one, or else anew."""
        if block.base is None or block.base in self.lost_bases or block.is_raw:
            return found
        try:
            base = self._base(block)
            assert base is not None
            if found.delta is not None:
                with contextlib.suppress(CorruptStoreError, SchemaVersionError):  # of another base
                    kept = on_base(found.delta, base)
                    if kept.content == found.content:
                        return kept
            return delta_on(found, base)
        except (CorruptStoreError, SchemaVersionError, UnavailableError):
            return found  # that is lost

    def _base(self, block: Lost) -> tuple[codec.Page, int] | None:
        """Return where the base of a delta is now. Raises CorruptStoreError where it is lost."""
        if block.base is None:
            return None
        return block_at(self._pool, self.moves.places.get(block.base, block.base))

    def _payload(self, page_id: int) -> bytes:
        """Return the bytes of a page, whatever they are; none of one that is not there."""
        try:
            return next((payload for _, payload in self._adapter.read_pages([page_id])), b"")
        except CorruptStoreError:  # the database has checksums of its own
            return b""

    def _put(self, place: int, encoded: EncodedBlock, block: Lost) -> None:
        """Add a block to the page that is being filled."""
        base = None
        if codec.Encoding(encoded.encoding).is_delta:
            assert block.base is not None
            base = self.moves.places.get(block.base, block.base)
        elif block.is_raw:
            encoded = as_raw(encoded)
        cost = int(codec.page_cost(len(encoded.data)))
        if self._bytes + cost > PAGE_CAPACITY:
            self._end_page()
            if len(self._full) == PAGES_PER_TRANSACTION:
                self._stage()
        self._page.append(_Placed(place, encoded, base))
        self._bytes += cost

    def _end_page(self) -> None:
        """Let the next block be the first of another page."""
        if self._page:
            self._full.append(self._page)
            self._page, self._bytes = [], 0

    def _stage(self) -> None:
        """Write full pages, in one transaction."""
        if not self._full:
            return
        with self._adapter.transaction():
            staged = [self._stage_page(blocks) for blocks in self._full]
            self._job.beat()
        self.new_pages += [
            page_id for page_id, _ in staged
        ]  # only now: ids of a transaction that failed may become another's
        for (page_id, costs), blocks in zip(staged, self._full, strict=True):
            for slot, (block, cost) in enumerate(zip(blocks, costs, strict=True)):
                self.moves.note(block.place, block_place(page_id, slot), block.base, cost)
        self._full = []
        if self._progress is not None:
            done = len(self.moves.places)
            self._progress("restoring blocks", done, max(done, self._total))

    def _stage_page(self, blocks: Sequence[_Placed]) -> tuple[int, list[int]]:
        """Write a page; return its id and what each block takes on it."""
        contents = [block.encoded for block in blocks]
        lengths = np.array([len(encoded.data) for encoded in contents], np.int64)
        image = codec.build_page(
            np.frombuffer(b"".join(encoded.data for encoded in contents), np.uint8),
            np.cumsum(lengths) - lengths,
            lengths,
            [encoded.encoding for encoded in contents],
            [encoded.content.dtype for encoded in contents],
            [encoded.content.rows for encoded in contents],
            [encoded.content.cols for encoded in contents],
            np.array([encoded.tag for encoded in contents], np.uint64),
        )
        (page_id,) = self._job.stage_pages([(codec.page_checksum(image), image)])
        self._job.stage_blocks(
            (block.encoded.content.digest, page_id, slot, block.base)
            for slot, block in enumerate(blocks)
        )
        return page_id, codec.page_cost(codec.Page(image).slots["length"]).tolist()


@dataclass(frozen=True, slots=True)
class _Placed:
    """A restored block, where it was, where its base is now (None for no delta), and its cost."""

    place: int
    encoded: EncodedBlock
    base: int | None
