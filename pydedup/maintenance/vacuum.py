# SPDX-License-Identifier: Apache-2.0
"""Frees what nobody uses, and repacks pages when models read more of them than they must.

In order: stagings of dead adds, pages without an owner, a new layout where it helps, retired
pages whose grace period is over, and space given back to the file system. Every step is a series
of bounded transactions but the one that publishes a new layout; readers go on throughout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.catalog import Catalog
from pydedup.jobs import LEASE_SECONDS, job_is_dead, models_of_job
from pydedup.layout import least_pages
from pydedup.maintenance.repack import repack
from pydedup.pool import PagePool
from pydedup.types import Progress

__all__ = ["VacuumReport", "read_amplification", "vacuum_store"]

#: Pages read by a model over the fewest that could hold its blocks: repack above this.
TARGET_AMPLIFICATION = 1.1
_ROWS_PER_TRANSACTION = 64


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """What a vacuum did. Amplification is the worst of all models, before and after."""

    abandoned_adds: int
    freed_pages: int
    freed_bytes: int
    waiting_pages: int
    repacked_pages: int
    pages_before: int
    pages_after: int
    amplification_before: float
    amplification_after: float
    stored_bytes_before: int
    stored_bytes_after: int


def read_amplification(adapter: Adapter) -> dict[int, tuple[int, int]]:
    """Return per live model the pages that it reads and the fewest that could hold its blocks."""
    pages: dict[int, int] = {row.id: 0 for row in adapter.models()}
    size: dict[int, int] = dict.fromkeys(pages, 0)
    for model_id, _, _, block_bytes in adapter.model_pages():
        if model_id in pages:
            pages[model_id] += 1
            size[model_id] += block_bytes
    return {model_id: (pages[model_id], least_pages(size[model_id])) for model_id in pages}


def worst_amplification(adapter: Adapter) -> float:
    """Return the largest pages read / least possible of all models; 1.0 for an empty store."""
    ratios = [read / least for read, least in read_amplification(adapter).values() if least]
    return max(ratios, default=1.0)


def vacuum_store(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    *,
    grace_seconds: float = 0.0,
    lease_seconds: float = LEASE_SECONDS,
    progress: Progress | None = None,
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
    ReadOnlyError, ConflictError, StorageFullError
    """
    before = adapter.stored_bytes()
    amplification = worst_amplification(adapter)
    pages_before = len(adapter.page_rows(state=LIVE))
    abandoned = _collect_stagings(adapter, lease_seconds)
    _retire_orphans(adapter)
    repacked = 0
    if _wants_repack(adapter):
        repacked = repack(adapter, catalog, pool, progress=progress)
    freed, freed_bytes, waiting = _free_retired(adapter, grace_seconds, progress)
    adapter.compact()
    return VacuumReport(
        abandoned_adds=abandoned,
        freed_pages=freed,
        freed_bytes=freed_bytes,
        waiting_pages=waiting,
        repacked_pages=repacked,
        pages_before=pages_before,
        pages_after=len(adapter.page_rows(state=LIVE)),
        amplification_before=amplification,
        amplification_after=worst_amplification(adapter),
        stored_bytes_before=before,
        stored_bytes_after=adapter.stored_bytes(),
    )


def retire_orphans(adapter: Adapter) -> None:
    """Retire live pages without an owner; inside a transaction of the caller."""
    live = {row.id for row in adapter.page_rows(state=LIVE)}
    orphans = [page_id for page_id in adapter.orphan_pages() if page_id in live]
    if orphans:
        adapter.set_page_state(orphans, RETIRED, time.time())


def _retire_orphans(adapter: Adapter) -> None:
    with adapter.transaction():
        adapter.bump_epoch()
        retire_orphans(adapter)


def _collect_stagings(adapter: Adapter, lease_seconds: float) -> int:
    """Delete what dead adds left; returns how many models there were.

    One transaction: an add that begins or publishes in between must be seen whole or not at all.
    """
    with adapter.transaction():
        staged_pages = {row.id for row in adapter.page_rows(state=STAGING)}
        staged = [row.id for row in adapter.models(state=STAGING)]
        jobs = adapter.jobs()
        dead = [job for job in jobs if job_is_dead(job[1], job[2], lease_seconds)]
        running = {m for job in jobs if job not in dead for m in models_of_job(job[1])}
        abandoned = [model_id for model_id in staged if model_id not in running]
        for model_id in abandoned:
            adapter.delete_model(model_id)
        for job_id, _, _, _ in dead:
            adapter.delete_job(job_id)
        if len(dead) == len(jobs):
            # Staged pages have no owner until late: only when nothing runs are they left over,
            # those whose owner was deleted above included.
            orphans = staged_pages.intersection(adapter.orphan_pages())
            adapter.set_page_state(sorted(orphans), RETIRED, time.time())
    return len(abandoned)


def _wants_repack(adapter: Adapter) -> bool:
    """Whether a new layout may pay: too many pages read, too many stored, or much of them dead."""
    if worst_amplification(adapter) > TARGET_AMPLIFICATION:
        return True
    largest: dict[int, int] = {}
    for _, page_id, _, block_bytes in adapter.model_pages():
        largest[page_id] = max(largest.get(page_id, 0), block_bytes)
    live = adapter.page_rows(state=LIVE)
    stored = sum(row.payload_bytes for row in live)
    if len(live) > TARGET_AMPLIFICATION * max(least_pages(stored), 1):
        return True
    # What one model uses of a page is a lower bound of what all use: cheap, and repack decides.
    return stored > TARGET_AMPLIFICATION * (sum(largest.values()) + len(live))


def _free_retired(
    adapter: Adapter, grace_seconds: float, progress: Progress | None
) -> tuple[int, int, int]:
    """Delete retired pages whose grace is over; returns (pages, bytes, pages still waiting)."""
    retired = adapter.page_rows(state=RETIRED)
    deadline = time.time() - grace_seconds
    due = [row for row in retired if row.retired_at is None or row.retired_at <= deadline]
    _delete_pages(adapter, [row.id for row in due], progress)
    return len(due), sum(row.payload_bytes for row in due), len(retired) - len(due)


def _delete_pages(
    adapter: Adapter, page_ids: Sequence[int], progress: Progress | None = None
) -> None:
    done = 0
    for group in _groups(page_ids):
        with adapter.transaction():
            adapter.delete_pages(group)
        done += len(group)
        if progress is not None:
            progress("freeing pages", done, len(page_ids))


def _groups(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _ROWS_PER_TRANSACTION):
        yield ids[start : start + _ROWS_PER_TRANSACTION]
