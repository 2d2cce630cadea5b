# SPDX-License-Identifier: Apache-2.0
"""Checks a whole store, bit by bit, and changes nothing.

Page by page: every page's checksum, and that each block on it still hashes to what was recorded
when it was stored, deltas with their bases. Then model by model: every block map leads to a block
of the right shape and dtype whose hash is that of the source, so a load gives the source back. What
a model stored within an error bound holds is no longer the source: there, content is what was
recorded when it was stored, and the source's hashes say nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.adapter_options import hidden_rows, only_sound_rows
from pydedup.errors import CorruptStoreError, StoreError
from pydedup.maintenance.damage import VerifyReport, sound_rows, unreadable_pages
from pydedup.maintenance.rows import lost_models
from pydedup.maintenance.verify_models import ModelChecks, verify_meta, verify_names
from pydedup.maintenance.verify_pages import PageChecks
from pydedup.text import plural
from pydedup.types import Progress

__all__ = ["VerifyReport", "verify_store"]


def verify_store(adapter: Adapter, *, progress: Progress | None) -> VerifyReport:
    """Verify everything that is live.

    Memory: a few pages, 64 MiB of pages with bases, 31 bytes per distinct block (39 on pages with
    deltas), and the block maps and hashes of one model.
    """
    try:
        return _verified(adapter, {}, progress)
    except StoreError as exc:
        # Some databases have checksums of their own; where one does not fit they end the snapshot,
        # and the error may be only about that.
        if type(exc) not in (StoreError, CorruptStoreError):
            raise
        with only_sound_rows(adapter):
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
        pages = PageChecks(adapter, unreadable, damaged["pages"], report)
        pages.run(progress)
        models = ModelChecks(adapter, pages.contents, report)
        rows = adapter.models()
        report.names = len({row.name for row in rows})
        for number, row in enumerate(rows):
            models.check(row)
            report.models += 1
            if progress is not None:
                progress("checking models", number + 1, len(rows))
        pages.note_doubts()
        pages.note_others(models.tags, models.disputed)
        verify_meta(adapter, report)
        verify_names(adapter, rows, damaged["models"], report)
        _note_leftovers(adapter, damaged["models"], report)
    hidden = [f"database: {said}" for said in hidden_rows(adapter)]
    # That rows may be hidden is no damage, and comes before what seems to be some by it.
    (report.errors if report.errors else report.notes)[:0] = hidden
    return report


def _note_leftovers(adapter: Adapter, damaged: Collection[int], report: VerifyReport) -> None:
    adapter.jobs()  # rows of it may be damaged
    models = adapter.models(state=None)
    for row in models:
        if row.state not in (STAGING, LIVE):
            report.add_error(
                f"{row.address} is {row.state!r}, a state that no model has, so it is "
                "not served; restore a backup"
            )
    for model_id in sorted(lost_models(adapter).difference(damaged, (row.id for row in models))):
        report.add_error(
            f"the row of the model with id {model_id} is lost, but its pages are there; restore a "
            "backup"
        )
    staging = sum(row.state == STAGING for row in models)
    if staging:
        report.notes.append(plural(staging, "unfinished or running add"))
    for state in (STAGING, RETIRED):
        pages = len(adapter.page_rows(state=state))
        if pages:
            report.notes.append(plural(pages, f"{state} page"))
