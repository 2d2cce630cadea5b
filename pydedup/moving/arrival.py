# SPDX-License-Identifier: Apache-2.0
"""Whether what a copy wrote is what the source has: it is read back before it is live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.errors import CorruptStoreError
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.write import Stager
from pydedup.maintenance.verify_pages import content_digests
from pydedup.moving.source import End

__all__ = ["check_arrival"]

_PAGES_AT_ONCE = 16


def check_arrival(
    target: End,
    stager: Stager,
    spool: Spool,
    layout: Sequence[NDArray[np.int64]],
    tell: Callable[[int, int], None],
) -> None:
    """Hold what each block on the staged pages holds against what the source recorded of it.

    Raises CorruptStoreError when that differs or a page is not there; ``tell`` is told how many
    bytes of how many are done.
    """
    total, done = sum(int(spool.lengths[numbers].sum()) for numbers in layout), 0
    for start in range(0, len(layout), _PAGES_AT_ONCE):
        ids = stager.page_ids[start : start + _PAGES_AT_ONCE]
        payloads = dict(target.adapter.read_pages(ids))
        for page_id, numbers in zip(ids, layout[start : start + _PAGES_AT_ONCE], strict=True):
            if page_id not in payloads:
                raise CorruptStoreError(
                    f"{target.adapter.url} has lost page {page_id}, which was just written"
                )
            page = codec.Page(payloads[page_id])
            _check_page(target, stager, spool, page_id, page, numbers)
            done += int(spool.lengths[numbers].sum())
        tell(done, total)
        stager.keep_alive()


def _check_page(
    target: End,
    stager: Stager,
    spool: Spool,
    page_id: int,
    page: codec.Page,
    numbers: NDArray[np.int64],
) -> None:
    references = spool.bases[numbers]
    bases = stager.places(references) if (references != NO_BASE).any() else None
    if page.n_slots == len(numbers):
        every = np.ones(page.n_slots, np.bool_)
        digests = content_digests(page, bases, every, target.pool)
        wrong = np.flatnonzero((digests != spool.hashes[numbers]).any(axis=1))
        if not len(wrong):
            return
        where = f"slot {wrong[0]} of page {page_id}"
    else:
        where = f"page {page_id}"
    raise CorruptStoreError(
        f"{where} of {target.adapter.url} does not hold what the source has recorded; run verify "
        "on the source"
    )
