# SPDX-License-Identifier: Apache-2.0
"""Frees what nobody uses, and repacks pages when models read more of them than they must.

In order: stagings of dead adds, pages without an owner, a new layout of the pages where that saves
enough to be worth writing them (deltas whose base is nobody's may be stored without it), retired
pages whose grace period is over, and space given back to the file system. Where files do not
shrink, or a disk is full, the last two come first as well: the new layout needs room. Every step is
a series of bounded transactions but the one that publishes a new layout; readers go on throughout.
`plan_vacuum` says beforehand what that would save, and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter, PageRow
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import Catalog, page_readers
from pydedup.errors import (
    CorruptStoreError,
    PageNotFoundError,
    ReadOnlyError,
    StorageFullError,
    UnavailableError,
)
from pydedup.jobs import LEASE_SECONDS, job_is_dead, models_of_job, staging_jobs
from pydedup.layout import least_pages
from pydedup.maintenance.orphans import may_pay_without
from pydedup.maintenance.repack import Repacked, RepackPlan, plan_repack, repack
from pydedup.maintenance.rows import refuse_pages_in_use
from pydedup.maintenance.unused import UNUSED_PART, is_much_unused
from pydedup.maintenance.versions import retire_pages
from pydedup.pool import PagePool
from pydedup.sets import in_parts
from pydedup.signatures import drop_dead_segments, drop_segment
from pydedup.text import listed, plural
from pydedup.types import Progress

__all__ = [
    "ModelReads",
    "VacuumReport",
    "collect_abandoned",
    "plan_vacuum",
    "read_amplification",
    "vacuum_store",
]

#: Pages read by a model over the fewest that could hold its blocks: repack above this.
TARGET_AMPLIFICATION = 1.1
_ROWS_PER_TRANSACTION = 64
# Times that a new layout is made, of which each is for nothing when others publish meanwhile.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class ModelReads:
    """Pages that a model reads, before and after, and the fewest that could hold its blocks."""

    model: str
    before: int
    after: int
    least: int


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """What a vacuum did, or would do. Amplification is the worst of all models.

    ``pages_*`` and ``page_bytes_*`` count live pages, ``freed_*`` also what dead adds and earlier
    vacuums left. ``rewritten_pages`` are those whose blocks go to the ``repacked_pages``, which are
    new and have ``repacked_bytes``; all others stay as they are. After a dry run
    ``stored_bytes_after`` is an estimate: what the database needs beside pages is not foreseen, nor
    how much room for new ones there is in files that never shrink.
    Where ``stored_bytes_exact`` is false, both ``stored_bytes_*`` are the least that the store may
    occupy. ``not_repacked`` says why pages stayed where they are though a new layout may pay: a
    part of the database that it needs was away, or others published all the time.
    ``reencoded_blocks`` are deltas on blocks of removed models that were stored without these,
    which takes ``reencoded_saves_bytes`` less.
    """

    abandoned_adds: int
    freed_pages: int
    freed_bytes: int
    waiting_pages: int
    rewritten_pages: int
    repacked_pages: int
    repacked_bytes: int
    pages_before: int
    pages_after: int
    page_bytes_before: int
    page_bytes_after: int
    amplification_before: float
    amplification_after: float
    stored_bytes_before: int
    stored_bytes_after: int
    stored_bytes_exact: bool
    models: tuple[ModelReads, ...]
    dry_run: bool
    not_repacked: str | None = None
    reencoded_blocks: int = 0
    reencoded_saves_bytes: int = 0


def read_amplification(adapter: Adapter) -> dict[int, tuple[int, int]]:
    """Return per live model the pages that it reads and the fewest that could hold its blocks."""
    pages: dict[int, int] = {row.id: 0 for row in adapter.models()}
    size: dict[int, int] = dict.fromkeys(pages, 0)
    for model_id, _, _, block_bytes in adapter.model_pages():
        if model_id in pages:
            pages[model_id] += 1
            size[model_id] += block_bytes
    return {model_id: (pages[model_id], least_pages(size[model_id])) for model_id in pages}


def worst_amplification(reads: dict[int, tuple[int, int]]) -> float:
    """Return the largest pages read / least possible of all models; 1.0 for an empty store."""
    return max((read / least for read, least in reads.values() if least), default=1.0)


def vacuum_store(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    *,
    grace_seconds: float,
    lease_seconds: float,
    progress: Progress | None,
) -> VacuumReport:
    """Vacuum a store.

    Parameters
    ----------
    grace_seconds
        How long a retired page is kept for readers that still have its id. Readers look a block
        map up again when they miss a page, so 0 is safe; more saves them the second look.
    lease_seconds
        Silence after which an unfinished add counts as abandoned.

    Raises
    ------
    ReadOnlyError, ConflictError, UnavailableError
    StorageFullError
        Where there is no room for a new layout, when what nobody uses was freed.
    CorruptStoreError
        When a model uses a page that is recorded as unused; no page is deleted then. When one is
        too damaged for a new layout, after what nobody uses was freed.
    """
    stored_before = adapter.stored_bytes()
    reads_before = read_amplification(adapter)
    live_before = adapter.page_rows(state=LIVE)
    abandoned = _collect_and_retire(adapter, lease_seconds)

    def free() -> _Freed:
        freed = _free_retired(adapter, grace_seconds, progress)
        drop_dead_segments(adapter)
        adapter.compact()
        return freed

    repacked, not_repacked = Repacked(), None
    problem: CorruptStoreError | StorageFullError | None = None
    # A new layout takes room, which a file that never shrinks then has, and a full disk needs.
    freed = None if adapter.capabilities.shrinks else free()
    try:
        try:
            made = _repack_in_peace(adapter, catalog, pool, progress)
        except StorageFullError:
            if freed is not None:
                raise
            freed = free()
            made = _repack_in_peace(adapter, catalog, pool, progress)
        if made is None:
            not_repacked = (
                f"others changed the store during each of {_ATTEMPTS} attempts; vacuum when "
                "less is added and removed"
            )
        else:
            repacked = made
    except (UnavailableError, ReadOnlyError) as error:
        # Of one of several servers, with pages. If it is the only one, what follows says so.
        not_repacked = str(error)
    except (CorruptStoreError, StorageFullError) as error:
        problem = error  # all else does without a new layout
    if freed is None or repacked.new_pages or not_repacked or problem:
        freed = free() if freed is None else freed.and_then(free())
    if problem is not None:
        raise _not_repacked(adapter, problem, freed.pages) from problem
    live_after = adapter.page_rows(state=LIVE)
    reads_after = read_amplification(adapter)
    return VacuumReport(
        abandoned_adds=abandoned,
        freed_pages=freed.pages,
        freed_bytes=freed.nbytes,
        waiting_pages=freed.waiting,
        rewritten_pages=repacked.old_pages,
        repacked_pages=repacked.new_pages,
        repacked_bytes=repacked.new_bytes,
        pages_before=len(live_before),
        pages_after=len(live_after),
        page_bytes_before=_bytes_of(live_before),
        page_bytes_after=_bytes_of(live_after),
        amplification_before=worst_amplification(reads_before),
        amplification_after=worst_amplification(reads_after),
        stored_bytes_before=stored_before,
        stored_bytes_after=adapter.stored_bytes(),
        stored_bytes_exact=adapter.size_is_exact(),
        models=_model_reads(adapter, reads_before, reads_after),
        dry_run=False,
        not_repacked=not_repacked,
        reencoded_blocks=repacked.anew_blocks,
        reencoded_saves_bytes=repacked.anew_saves,
    )


def _repack_in_peace(
    adapter: Adapter, catalog: Catalog, pool: PagePool, progress: Progress | None
) -> Repacked | None:
    """Repack if it may pay, again when somebody else published meanwhile; None if always."""
    for _ in range(_ATTEMPTS):
        epoch = adapter.epoch()
        try:
            if not _wants_repack(adapter, pool, adapter.page_rows(state=LIVE)):
                return Repacked()
            made = repack(adapter, catalog, pool, progress=progress)
        except PageNotFoundError:
            if adapter.epoch() == epoch:
                raise
            continue  # another vacuum gave it up, and deleted it before it was read here
        if made is not None:
            return made
    return None


def plan_vacuum(
    adapter: Adapter,
    pool: PagePool,
    *,
    grace_seconds: float,
    lease_seconds: float,
) -> VacuumReport:
    """Return the report that `vacuum_store` would give now; writes nothing.

    Exact, but for ``stored_bytes_after``, unless another writer comes in between. Where a new
    layout may pay, every page in use is read once.
    """
    with adapter.snapshot():
        abandoned, _, nothing_runs = _dead_stagings(adapter, lease_seconds)
        gone = set(abandoned)
        owned = {page for model, page, _, _ in adapter.model_pages() if model not in gone}
        live_before = adapter.page_rows(state=LIVE)
        live = [row for row in live_before if row.id in owned]
        retired = adapter.page_rows(state=RETIRED)
        due = [row for row in retired if _is_due(row, grace_seconds)]
        newly = [row for row in live_before if row.id not in owned]
        refuse_pages_in_use(adapter, [row.id for row in (*retired, *newly)])
        if nothing_runs:
            newly += [row for row in adapter.page_rows(state=STAGING) if row.id not in owned]
        reads_before = reads_after = read_amplification(adapter)
        plan: RepackPlan | None = None
        if _wants_repack(adapter, pool, live, gone):
            plan = plan_repack(adapter, pool, live_pages=len(live))
        kept: list[PageRow] = live
        if plan is not None:
            staying = set(plan.kept)
            kept = [row for row in live if row.id in staying]
            newly += [row for row in live if row.id not in staying]
            reads_after = plan.reads
        freed = due if grace_seconds > 0 else due + newly
        stored = adapter.stored_bytes()
        new_pages, new_bytes = (0, 0) if plan is None else (plan.pages, plan.page_bytes)
        # Where files do not shrink, what is freed in them is for what comes next.
        given_back = _bytes_of(freed) if adapter.capabilities.shrinks else 0
        return VacuumReport(
            abandoned_adds=len(abandoned),
            freed_pages=len(freed),
            freed_bytes=_bytes_of(freed),
            waiting_pages=len(retired) + len(newly) - len(freed),
            rewritten_pages=len(live) - len(kept),
            repacked_pages=new_pages,
            repacked_bytes=new_bytes,
            pages_before=len(live_before),
            pages_after=len(kept) + new_pages,
            page_bytes_before=_bytes_of(live_before),
            page_bytes_after=_bytes_of(kept) + new_bytes,
            amplification_before=worst_amplification(reads_before),
            amplification_after=worst_amplification(reads_after),
            stored_bytes_before=stored,
            stored_bytes_after=stored + new_bytes - given_back,
            stored_bytes_exact=adapter.size_is_exact(),
            models=_model_reads(adapter, reads_before, reads_after),
            dry_run=True,
            reencoded_blocks=0 if plan is None else int(plan.places.anew.sum()),
            reencoded_saves_bytes=0 if plan is None else plan.places.anew_saves,
        )


def _not_repacked(
    adapter: Adapter, problem: CorruptStoreError | StorageFullError, freed: int
) -> CorruptStoreError | StorageFullError:
    """Return the error about what of a vacuum was not done, and what was."""
    said = f"{plural(freed, 'page')} freed, and none repacked: {problem}"
    if isinstance(problem, StorageFullError):
        return StorageFullError(said)
    readers = page_readers(adapter)
    models = sorted({model for page in problem.page_ids for model in readers.get(page, ())})
    by = f" (read by {listed(models)})" if models and "read by" not in said else ""
    told = CorruptStoreError(
        f"{said}{by}; until that is mended, or the model removed, vacuum only frees pages"
    )
    told.page_ids = problem.page_ids
    return told


def _model_reads(
    adapter: Adapter, before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]
) -> tuple[ModelReads, ...]:
    """Return one entry per model that was there before and is there now, by address."""
    both = [row for row in adapter.models() if row.id in before and row.id in after]
    entries = [ModelReads(row.address, before[row.id][0], *after[row.id]) for row in both]
    return tuple(sorted(entries, key=lambda entry: entry.model))


def _bytes_of(rows: Sequence[PageRow]) -> int:
    return sum(row.payload_bytes for row in rows)


def collect_abandoned(adapter: Adapter) -> int:
    """Delete what dead adds and copies left; returns how many pages that were.

    Writes nothing when there is nothing of the kind.
    """
    with only_sound_rows(adapter):
        abandoned, dead, nothing_runs = _dead_stagings(adapter, LEASE_SECONDS)
        # One that was interrupted as it committed has taken back its job, and not what it staged.
        if not (abandoned or dead or (nothing_runs and adapter.page_ids(STAGING))):
            return 0
    before = set(adapter.page_ids(RETIRED))
    _collect_and_retire(adapter, LEASE_SECONDS)
    left = [page_id for page_id in adapter.page_ids(RETIRED) if page_id not in before]
    _delete_pages(adapter, left)
    return len(left)


def _collect_and_retire(adapter: Adapter, lease_seconds: float) -> int:
    """Delete what dead adds left and retire pages without an owner; returns how many adds.

    In one transaction that holds the epoch from its beginning: on most databases each of the reads
    here sees the newest committed state, and who publishes between the one of stagings and the one
    of jobs would look like a staging without a job.

    Raises CorruptStoreError, behind it, where a model uses a page that was given up.
    """
    with adapter.transaction():
        adapter.bump_epoch()
        staged_pages = set(adapter.page_ids(STAGING))
        abandoned, dead, nothing_runs = _dead_stagings(adapter, lease_seconds)
        for model_id in abandoned:
            drop_segment(adapter, model_id)
            adapter.delete_model(model_id)
        for job_id in dead:
            adapter.delete_job(job_id)
        orphans = adapter.orphan_pages()
        if nothing_runs:
            # Staged pages have no owner until late: only when nothing runs are they left over,
            # those whose owner was deleted above included.
            left = sorted(staged_pages.intersection(orphans))
            adapter.set_page_state(left, RETIRED, time.time())
        retire_pages(adapter, orphans)
    refuse_pages_in_use(adapter, adapter.page_ids(RETIRED))
    return len(abandoned)


def _dead_stagings(adapter: Adapter, lease_seconds: float) -> tuple[list[int], list[str], bool]:
    """Return the models and jobs that nobody works on any more, and whether no job goes on."""
    # In this order: an add that begins in between has a job that is seen, and no model.
    staged = [row.id for row in adapter.models(state=STAGING)]
    jobs = staging_jobs(adapter)
    dead = [job for job in jobs if job_is_dead(job[1], job[2], lease_seconds)]
    running = {m for job in jobs if job not in dead for m in models_of_job(job[1])}
    abandoned = [model_id for model_id in staged if model_id not in running]
    return abandoned, [job[0] for job in dead], len(dead) == len(jobs)


def _wants_repack(
    adapter: Adapter, pool: PagePool, live: Sequence[PageRow], gone: Collection[int] = ()
) -> bool:
    """Whether a new layout may pay: too many pages read or stored, or much of them for nobody.

    ``gone`` are models to leave out of account.
    """
    if worst_amplification(read_amplification(adapter)) > TARGET_AMPLIFICATION:
        return True
    largest: dict[int, int] = {}
    together: dict[int, int] = {}
    for model_id, page_id, _, block_bytes in adapter.model_pages():
        if model_id not in gone:
            largest[page_id] = max(largest.get(page_id, 0), block_bytes)
            together[page_id] = together.get(page_id, 0) + block_bytes
    stored = _bytes_of(live)
    if len(live) > TARGET_AMPLIFICATION * max(least_pages(stored), 1):
        return True
    # What all models use of a page is at most the sum, and at least what one of them uses: cheap
    # to know, and repack decides.
    if stored > TARGET_AMPLIFICATION * (sum(largest.values()) + len(live)):
        return True
    in_doubt: list[int] = []
    for row in live:
        enough = (1 - UNUSED_PART) * (row.payload_bytes - codec.PAGE_OVERHEAD_BYTES)
        if together.get(row.id, 0) < enough:
            return True
        if largest.get(row.id, 0) < enough:
            in_doubt.append(row.id)
    return is_much_unused(adapter, pool, in_doubt) or may_pay_without(adapter, pool, live)


@dataclass(frozen=True, slots=True)
class _Freed:
    """Pages that were deleted, their bytes, and pages that still wait."""

    pages: int
    nbytes: int
    waiting: int

    def and_then(self, more: _Freed) -> _Freed:
        return _Freed(self.pages + more.pages, self.nbytes + more.nbytes, more.waiting)


def _free_retired(adapter: Adapter, grace_seconds: float, progress: Progress | None) -> _Freed:
    """Delete retired pages whose grace is over."""
    retired = adapter.page_rows(state=RETIRED)
    due = [row for row in retired if _is_due(row, grace_seconds)]
    _delete_pages(adapter, [row.id for row in due], progress)
    return _Freed(len(due), _bytes_of(due), len(retired) - len(due))


def _is_due(row: PageRow, grace_seconds: float) -> bool:
    # From either side: a clock that was ahead would keep a page until it is then.
    return row.retired_at is None or abs(time.time() - row.retired_at) >= grace_seconds


def _delete_pages(
    adapter: Adapter, page_ids: Sequence[int], progress: Progress | None = None
) -> None:
    done = 0
    for group in in_parts(page_ids, _ROWS_PER_TRANSACTION):
        with adapter.transaction():
            adapter.delete_pages(group)
        done += len(group)
        if progress is not None:
            progress("freeing pages", done, len(page_ids))
