# SPDX-License-Identifier: Apache-2.0
"""What several models of a copy have in common, and what the destination has of them already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, Adapter, ModelRow, PageRow
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import ModelsAhead, StoredModel
from pydedup.errors import CorruptStoreError, NotFoundError
from pydedup.layout import joined, split_places, used_places
from pydedup.sets import distinct, in_parts

__all__ = ["Survey", "Target", "look_at_target", "survey"]

_PAGES_AT_ONCE = 4096
_MODELS_AT_ONCE = 64


@dataclass(slots=True)
class Survey:
    """The pages of the source that models read which are still to be copied.

    Attributes
    ----------
    epoch
        That of the source.
    readers
        How many of these models read each page.
    sizes
        Bytes of each of these pages.
    used
        How many blocks of each page any of these models needs; empty when nobody asks.
    """

    epoch: int
    readers: Counter[int]
    sizes: dict[int, int]
    used: dict[int, int] = field(default_factory=dict)

    def done(self, page_ids: Sequence[int]) -> list[int]:
        """Note that one model that reads these pages is there; return those no other reads."""
        last = [page_id for page_id in page_ids if self.readers[page_id] <= 1]
        self.readers.subtract(page_ids)
        return last


def survey(source: Adapter, rows: Sequence[ModelRow], epoch: int, *, blocks: bool) -> Survey:
    """Look at what these models read; with ``blocks`` also at which blocks they need.

    ``epoch`` is that of the source, as it was read before.

    Memory: some 200 bytes per page, and with ``blocks`` meanwhile 32 per distinct block.
    """
    with only_sound_rows(source):  # those of a model are read strictly when it is copied
        return _survey(source, rows, epoch, blocks)


def _survey(source: Adapter, rows: Sequence[ModelRow], epoch: int, blocks: bool) -> Survey:
    found = Survey(epoch, Counter(), {})
    needed = np.empty(0, np.int64)
    further: list[NDArray[np.int64]] = []
    count = 0
    for row in rows:
        found.readers.update(page_id for _, page_id, _, _ in source.model_pages(row.id))
    for places in _used(source, rows) if blocks else ():
        further.append(places)
        count += len(places)
        if count > len(needed):  # so that thousands of models do not sort all of it each
            needed, further, count = distinct(joined([needed, *further])), [], 0
    needed = distinct(joined([needed, *further]))
    page_ids = list(found.readers)
    for some in in_parts(page_ids, _PAGES_AT_ONCE):
        pages = source.page_rows(ids=some)
        found.sizes.update((page.id, page.payload_bytes) for page in pages)
    ids, counts = np.unique(split_places(needed)[0], return_counts=True)
    found.used = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return found


def _used(source: Adapter, rows: Sequence[ModelRow]) -> Iterator[NDArray[np.int64]]:
    """Yield the places that each of these models reads; some more than once."""
    for some in in_parts(rows, _MODELS_AT_ONCE):
        try:
            yield from _places(source, some)
        except (NotFoundError, CorruptStoreError):
            for row in some:
                # It was removed meanwhile, or is damaged, which its copy will say.
                with suppress(NotFoundError, CorruptStoreError):
                    yield from _places(source, [row])


def _places(source: Adapter, rows: Sequence[ModelRow]) -> Iterator[NDArray[np.int64]]:
    with source.snapshot():
        ahead = ModelsAhead(source, rows)
        for row in rows:
            yield used_places(StoredModel(source, row, ahead=ahead).block_maps())


@dataclass(slots=True)
class Target:
    """What the destination had when it was last looked at.

    Attributes
    ----------
    epoch
        When that was; what this copy publishes counts on.
    twins
        Its pages by checksum.
    is_bare
        Whether it had no pages but such as the source has.
    """

    epoch: int
    twins: dict[bytes, int]
    is_bare: bool


def look_at_target(target: Adapter, source: Adapter) -> Target:
    """Look at the destination.

    Memory: some 150 bytes for each page of the destination, 250 while it is looked at; of the
    source, whose pages are looked through too, a few thousand rows at a time.
    """
    epoch = target.epoch()
    twins = {row.checksum: row.id for row in _live_pages(target)}
    strangers = set(twins)
    if strangers:
        with only_sound_rows(source):
            strangers.difference_update(row.checksum for row in _live_pages(source))
    return Target(epoch, twins, not strangers)


def _live_pages(adapter: Adapter) -> Iterator[PageRow]:
    after = 0
    while rows := adapter.page_rows(state=LIVE, after=after, limit=_PAGES_AT_ONCE):
        yield from rows
        after = rows[-1].id
