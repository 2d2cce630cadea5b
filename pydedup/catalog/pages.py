# SPDX-License-Identifier: Apache-2.0
"""Pages with the checksums that their rows record: what is read may be sound, and another page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydedup.adapter import Adapter
from pydedup.adapter_options import RecordedPagesAdapter

__all__ = ["recorded_pages"]


def recorded_pages(
    adapter: Adapter,
) -> Callable[[Sequence[int]], Iterator[tuple[int, bytes, bytes]]]:
    """Return what reads pages as `RecordedPagesAdapter.read_recorded_pages` does."""
    if isinstance(adapter, RecordedPagesAdapter):
        return adapter.read_recorded_pages

    def read(ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        checksums = {row.id: row.checksum for row in adapter.page_rows(ids=ids)}
        for page_id, payload in adapter.read_pages(ids):
            if page_id in checksums:  # else it was added in between
                yield page_id, checksums[page_id], payload

    return read
