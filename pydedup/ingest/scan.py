# SPDX-License-Identifier: Apache-2.0
"""Reading of stored pages by an add: most are needed once, and would only push others out.

A page that is in the pool is taken from there. Others are read past it, and the last few kept; one
that is asked for again after that goes into the pool. So a new version of a model, which needs some
blocks of each page of the version before, costs no memory of the pool and none of its copies.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import Adapter
from pydedup.catalog import recorded_pages
from pydedup.errors import BudgetError, CorruptStoreError
from pydedup.pool import PagePool
from pydedup.sets import in_parts
from pydedup.windows import by_page

__all__ = ["PageScan", "unreadable_pages"]

# Pages beside the pool at a time, in a walk and kept from before.
_PAGES = 8


def unreadable_pages(pool: PagePool, page_ids: NDArray[np.int64]) -> tuple[int, ...]:
    """Return those of the pages that cannot be read; all are tried."""
    found: list[int] = []
    for some in in_parts(page_ids.tolist(), _PAGES):
        try:
            pool.pages(some)
        except CorruptStoreError:
            for page_id in some:
                try:
                    pool.pages([page_id])
                except CorruptStoreError:
                    found.append(page_id)
    return tuple(found)


class PageScan:
    """The stored pages, for one add. Not thread-safe."""

    def __init__(self, adapter: Adapter, pool: PagePool) -> None:
        self._read_recorded = recorded_pages(adapter)
        self._pool = pool
        self._last: OrderedDict[int, codec.Page] = OrderedDict()
        self._seen: set[int] = set()

    def windows(
        self, page_ids: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], list[codec.Page], NDArray[np.uint32]]]:
        """Walk over blocks as `PagePool.windows` does; raises what that raises."""
        for window in by_page(page_ids, None, _PAGES):
            assert isinstance(window.rows, np.ndarray)
            yield window.rows, self._pages(window.ids), window.page_index

    def _pages(self, ids: NDArray[np.int64]) -> list[codec.Page]:
        found: dict[int, codec.Page] = {}
        for number, page in zip(ids.tolist(), self._pool.native.pin(ids), strict=True):
            known = self._last.get(number) if page is None else page
            if known is not None:
                found[number] = known
        missing = [number for number in ids.tolist() if number not in found]
        again = [number for number in missing if number in self._seen]
        if again:
            # Too many for what the pool holds at once: then they are read past it again.
            with contextlib.suppress(BudgetError):
                found.update(zip(again, self._pool.pages(again), strict=True))
        found.update(self._read([number for number in missing if number not in found]))
        self._seen.update(missing)
        return [found[number] for number in ids.tolist()]

    def _read(self, ids: list[int]) -> dict[int, codec.Page]:
        """Read pages past the pool; what is wrong with others is its to see to, and to say."""
        pages: dict[int, codec.Page] = {}
        for number, checksum, payload in self._read_recorded(ids) if ids else ():
            with contextlib.suppress(CorruptStoreError):  # there may be another copy
                codec.check_recorded(payload, checksum)
                if self._pool.is_expected(number, checksum):
                    pages[number] = codec.Page(payload)
        absent = [number for number in ids if number not in pages]
        if absent:
            pages.update(zip(absent, self._pool.pages(absent), strict=True))
        self._last.update(pages)
        while len(self._last) > _PAGES:
            self._last.popitem(last=False)
        return pages
