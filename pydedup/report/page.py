# SPDX-License-Identifier: Apache-2.0
"""From a store to its report on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydedup.adapter import Adapter
from pydedup.catalog import Catalog
from pydedup.errors import UnsupportedFormatError, not_installed
from pydedup.names import check_path
from pydedup.pool import PagePool
from pydedup.replacement import Trace
from pydedup.report.gather import gather

__all__ = ["ReportPage", "report"]


class ReportPage(str):
    """A report as HTML; ``damaged`` tells of what is not in it, as `StoreStats.damaged` does."""

    __slots__ = ("damaged",)
    damaged: tuple[str, ...]


def report(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    path: str | os.PathLike[str] | None,
    models: Sequence[str],
    trace: Trace | None,
) -> ReportPage:
    """Return a report as HTML, and write it when there is a path; see `Store.report`."""
    try:
        from pydedup.report.html import render
    except ModuleNotFoundError as error:
        raise UnsupportedFormatError(not_installed("a report", error, "report")) from None
    target = None if path is None else Path(check_path(path, "path"))
    found = gather(adapter, catalog, pool, models, trace)
    page = ReportPage(render(found))
    page.damaged = found.stats.damaged
    if target is not None:
        from pydedup.formats._files import atomic_file

        with atomic_file(target) as scratch:
            scratch.write_text(page, encoding="utf-8")
    return page
