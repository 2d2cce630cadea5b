# SPDX-License-Identifier: Apache-2.0
"""Writing the pages of a batch, in state ``staging`` and in transactions of bounded size.

A worker makes the next pages while some are being written. Where ids of pages can be had before
(`NumberingAdapter`), several write side by side, each with a connection of its own; which page gets
which id does not depend on that. On SQLite, which has one writer, a thread moves its log into the
main file meanwhile (`pydedup.jobs`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.errors import UnavailableError
from pydedup.ingest.match import Matcher
from pydedup.ingest.spool import Spool
from pydedup.ingest.staged import StagedModel
from pydedup.ingest.workers import Task, Workers
from pydedup.jobs import PAGES_PER_TRANSACTION, Job
from pydedup.layout import PAGE_CAPACITY, even_shares, filled_capacity, fitting, joined
from pydedup.packing import pack
from pydedup.sets import distinct, in_parts

__all__ = ["PageWriter", "plan_layout", "settled"]

_LOG = logging.getLogger("pydedup")

# Transactions that write pages side by side, where the database lets them.
_MOST_AT_ONCE = 4
# Layouts of blocks with factors, and what part of the one before the next must take to be tried.
_MOST_LAYOUTS = 4
_WORTH_A_LAYOUT = 0.99
# Rows of blocks with factors that pages are filled with at a time.
_TILE_ROWS = 16

# Blocks of some pages, in slot order.
_Group: TypeAlias = Sequence[NDArray[np.int64]]


def plan_layout(matcher: Matcher, models: Sequence[StagedModel]) -> list[NDArray[np.int64]]:
    """Return the pages of the spooled blocks: per page, block numbers in slot order."""
    if matcher.spool.count == 0:
        return []
    owners = []
    for model in models:
        references = model.references(matcher.reader)
        owners.append(distinct(references[references >= 0]))
    order = _in_tiles(matcher.spool, models)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    ranks = [rank[numbers] for numbers in owners]
    used = order[distinct(joined(ranks))]
    if len(used) == 0:
        return []

    def pages_of(sizes: NDArray[np.int64], capacity: int) -> _Group:
        return [order[page] for page in pack(ranks, capacity, sizes=sizes[used]).pages]

    return settled(matcher.spool, pages_of)


def _in_tiles(spool: Spool, models: Sequence[StagedModel]) -> NDArray[np.int64]:
    """Return all blocks of the spool in the order in which pages are filled: as they came.

    But those with factors by columns, some rows of blocks at a time: a page has a factor once for
    each row and for each column, so it had better be as high as it is wide.
    """
    numbers = np.arange(spool.count, dtype=np.int64)
    factored = spool.factored
    if not factored.any():
        return numbers
    keys = np.zeros((3, spool.count), np.int64)
    keys[0] = numbers
    for model in models:
        for tensor in model.tensors:
            there = np.flatnonzero(tensor.references >= 0)
            there = there[factored[tensor.references[there]]]
            if not len(there):
                continue
            down, across = np.divmod(there, tensor.grid.grid_cols)
            mine = tensor.references[there]
            _, edges, tile_of = np.unique(
                down // _TILE_ROWS, return_index=True, return_inverse=True
            )
            keys[:, mine] = np.minimum.reduceat(mine, edges)[tile_of], across, down
    return np.lexsort(keys[::-1])


def settled(
    spool: Spool, pages_of: Callable[[NDArray[np.int64], int], _Group]
) -> list[NDArray[np.int64]]:
    """Return pages, laid out by what blocks take on them, and let the spool know that.

    ``pages_of`` returns pages of such a capacity for blocks of such sizes, those of all of the
    spool. Blocks with factors have some of these in common on a page (`Spool.settle`). So more fit
    on one, which then have more in common: it is laid out again while that saves something.
    """
    spool.unsettle()
    pages = pages_of(spool.costs, PAGE_CAPACITY)
    factored = spool.factored
    if not factored.any():
        return list(pages)
    page_at = np.zeros(len(factored), np.int64)
    before = float("inf")
    for _ in range(_MOST_LAYOUTS):
        taken = sum(map(spool.settle, pages))
        if taken > before * _WORTH_A_LAYOUT:
            break
        before = taken
        for number, page in enumerate(pages):
            page_at[page] = number
        chosen = joined(page[factored[page]] for page in pages)
        shares = even_shares(spool.costs, chosen, page_at[chosen])
        pages = pages_of(shares, filled_capacity(shares))
    return fitting(pages, spool.settle)


class PageWriter:
    """Writes pages of spooled blocks, and knows where each block came to lie.

    Parameters
    ----------
    job
        What the pages are staged for.
    spool
        Has the blocks; frozen.
    layout
        The pages: per page, block numbers in slot order.
    advance
        Called with bytes of pages that were written.

    Attributes
    ----------
    page_ids
        Of the pages that were written, in the order of the layout.
    checksums
        Of each page that was written, by id.
    page_of, slot_of
        Of each block of the spool, 0 until it was written.
    """

    def __init__(
        self,
        job: Job,
        spool: Spool,
        layout: _Group,
        workers: Workers | None,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._job = job
        self._spool = spool
        self._advance = advance
        self._groups = list(in_parts(layout, PAGES_PER_TRANSACTION))
        helpful = workers is not None and workers.are_several and not spool.lists
        self._workers = workers if helpful else None
        self.page_ids: list[int] = []
        self.checksums: dict[int, bytes] = {}
        self.page_of = np.zeros(spool.count, np.int64)
        self.slot_of = np.zeros(spool.count, np.uint32)

    @property
    def is_small(self) -> bool:
        """Whether all pages fit into one transaction, beside other things."""
        return len(self._groups) <= 1

    def make_small(self) -> list[bytes]:
        """Return all pages, for `write_small`."""
        return [image for group in self._groups for image in self._spool.images(group)]

    def write_small(self, images: Sequence[bytes]) -> None:
        """Write the pages that `make_small` returned, inside a transaction."""
        for group in self._groups:
            self.page_ids = self._write_pages(group, images)

    def note_small(self) -> None:
        """Tell of the pages of `write_small`, when that transaction is committed."""
        for group in self._groups:
            self._note_written(group)

    def write(self) -> None:
        """Write all pages, in several transactions."""
        page_ids = None
        if self._workers is not None:
            page_ids = self._job.new_page_ids(sum(map(len, self._groups)))
        if self._workers is None or page_ids is None:
            self._write_in_turn()
        else:
            self._write_side_by_side(self._workers, page_ids)

    def forget(self) -> None:
        """Take note that the written pages are gone."""
        self.page_ids = []

    # ---- inside -------------------------------------------------------------------------------

    def _write_in_turn(self) -> None:
        for group, images in zip(self._groups, self._images(), strict=True):
            with self._job.staging():
                ids = self._write_pages(group, images)
                self._job.beat()
            self.page_ids.extend(ids)  # only now: ids of one that failed may become another's
            self._note_written(group)

    def _write_side_by_side(self, workers: Workers, page_ids: list[int]) -> None:
        """Write groups of pages, some at once: each takes a connection and its pages in memory.

        Where the database gives no further connection, they are written by the one that there is.
        """
        self.page_ids = page_ids  # nobody else gets them, whatever becomes of the transactions
        ids = iter(page_ids)
        left = [(group, list(itertools.islice(ids, len(group)))) for group in self._groups]
        at_once = min(workers.count, _MOST_AT_ONCE)
        while left:
            some, left = left[:at_once], left[at_once:]
            refused = self._write_at_once(workers, some)
            if refused is not None:
                _LOG.warning("this add goes on with one connection: %s", refused)
                at_once = 1
            self._job.keep_alive()
            for group, page_ids in some:
                self._note_places(group, page_ids)
                self._note_written(group)

    def _write_at_once(
        self, workers: Workers, some: Sequence[tuple[_Group, list[int]]]
    ) -> UnavailableError | None:
        """Write groups of pages; return why not all could have a connection of their own, if so."""
        refused = None
        tasks = [workers.submit(partial(self._write_beside, *one)) for one in some[1:]]
        try:
            self._write_numbered(*some[0])
            for one, task in zip(some[1:], tasks, strict=True):
                error = task.result()
                if error is not None:
                    refused = error
                    self._write_numbered(*one)
        finally:
            for task in tasks:
                task.end()
        return refused

    def _write_beside(
        self, group: _Group, page_ids: Sequence[int], _threads: int
    ) -> UnavailableError | None:
        """Write pages with the connection of this thread; return why it has none, if so."""
        try:
            self._job.connect()
        except UnavailableError as error:
            return error
        self._write_numbered(group, page_ids)
        return None

    def _write_numbered(self, group: _Group, page_ids: Sequence[int]) -> None:
        images = self._spool.images(group)
        pages = [(codec.page_checksum(image), image) for image in images]
        with self._job.staging():
            self._job.stage_numbered_pages(pages, page_ids)
        self.checksums.update(zip(page_ids, (checksum for checksum, _ in pages), strict=True))

    def _images(self) -> Iterator[list[bytes]]:
        """Yield the pages of each group, the next one being made meanwhile."""
        workers, spool, groups = self._workers, self._spool, self._groups
        if workers is None:
            yield from map(spool.images, groups)
            return

        def made(group: _Group) -> Task[list[bytes]]:
            return workers.submit(lambda _threads: spool.images(group))

        coming = [made(group) for group in groups[:1]]
        for group in [*groups[1:], None]:
            now = coming.pop()
            if group is not None:
                coming.append(made(group))
            yield now.result()

    def _write_pages(self, group: _Group, images: Sequence[bytes]) -> list[int]:
        pages = [(codec.page_checksum(image), image) for image in images]
        page_ids = self._job.stage_pages(pages)
        self.checksums.update(zip(page_ids, (checksum for checksum, _ in pages), strict=True))
        self._note_places(group, page_ids)
        return page_ids

    def _note_places(self, group: _Group, page_ids: Sequence[int]) -> None:
        for numbers, page_id in zip(group, page_ids, strict=True):
            self.page_of[numbers] = page_id
            self.slot_of[numbers] = np.arange(len(numbers), dtype=np.uint32)

    def _note_written(self, group: _Group) -> None:
        if self._advance is not None:
            self._advance(sum(int(self._spool.costs[numbers].sum()) for numbers in group))
