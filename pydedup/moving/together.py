# SPDX-License-Identifier: Apache-2.0
"""Models that are copied together: small ones next to each other, up to some bytes.

One transaction publishes them, as one for each would take longer than its model. All else is of
each by itself: what it brings lies on pages of its own, as if it had come alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pydedup.ingest.match import Matcher
from pydedup.ingest.pages import settled
from pydedup.ingest.places import BlockReader
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.layout import joined
from pydedup.moving.plan import Item
from pydedup.moving.resolve import Resolved
from pydedup.moving.source import SourceModel
from pydedup.moving.staged import MovedModel
from pydedup.sets import distinct
from pydedup.types import CopiedModel

__all__ = ["MOST_BYTES", "AloneError", "Moved", "gathered", "lay_out", "nothing_done", "report"]

#: Bytes of weights, or of pages, of models that are copied together, and how many of them.
MOST_BYTES: Final = 8 << 20
_MOST_MODELS: Final = 64


class AloneError(Exception):
    """A model must be copied alone: it is matched anew, with what its relatives have there."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One model on its way.

    Attributes
    ----------
    item, source
        What is copied, and what the source has recorded of it.
    copy
        What is staged.
    resolved
        Where its blocks are.
    """

    item: Item
    source: SourceModel
    copy: MovedModel
    resolved: Resolved


def gathered(items: Sequence[Item], start: int) -> Sequence[Item]:
    """Return the model at ``start``, and those behind it that may be copied together with it.

    One that replaces another comes alone, as it may take pages away.
    """
    stop, left = start, MOST_BYTES
    for item in items[start : start + _MOST_MODELS]:
        left -= item.row.logical_bytes
        if left < 0 or not item.is_wanted or item.replaces:
            break
        stop += 1
    return items[start : max(stop, start + 1)]


def lay_out(moved: Sequence[Moved], reader: BlockReader, spool: Spool) -> list[NDArray[np.int64]]:
    """Return the new pages: whole ones, then other new blocks, by model in the source's order."""
    whole = [page for one in moved for page in one.resolved.whole]
    owners = _owners(moved, reader, spool)
    owners[joined(whole)] = -1
    parts = [np.flatnonzero(owners == number) for number in range(len(moved))]

    def pages_of(sizes: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
        return [page for part in parts for page in _filled(part, sizes, capacity)]

    return whole + settled(spool, pages_of)


def _owners(moved: Sequence[Moved], reader: BlockReader, spool: Spool) -> NDArray[np.int64]:
    """Return the first of these models that needs each block of the spool, -1 where none does."""
    owners = np.full(spool.count, -1, np.int64)
    for number, one in reversed(list(enumerate(moved))):
        references = one.copy.references(reader)
        owners[references[references >= 0]] = number
        owners[joined(one.resolved.whole)] = number
    return owners


def _filled(
    numbers: NDArray[np.int64], sizes: NDArray[np.int64], capacity: int
) -> list[NDArray[np.int64]]:
    """Fill pages with blocks in their order."""
    filled = []
    ends = np.cumsum(sizes[numbers])
    start = 0
    while start < len(numbers):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + capacity, side="right"))
        stop = max(stop, start + 1)
        filled.append(numbers[start:stop])
        start = stop
    return filled


def nothing_done(item: Item) -> CopiedModel:
    """Say what became of a model that is not copied."""
    return CopiedModel(item.address, item.status, item.row.logical_bytes)


def report(
    moved: Sequence[Moved],
    layout: Sequence[NDArray[np.int64]],
    spool: Spool,
    matcher: Matcher,
    seconds: float,
) -> list[CopiedModel]:
    """Say what became of models; a page, and what is on it, is of the one that brought it."""
    owners = _owners(moved, matcher.reader, spool)
    copied = []
    for number, one in enumerate(moved):
        pages = [page for page in layout if owners[page[0]] == number]
        references = one.copy.references()
        new = references[references >= 0]
        new = new[owners[new] == number]
        copied.append(
            CopiedModel(
                model=one.item.address,
                status="replaced" if one.item.replaces else "copied",
                logical_bytes=one.item.row.logical_bytes,
                stored_bytes=int(spool.lengths[joined(pages)].sum()),
                blocks=len(references),
                shared_blocks=len(references) - len(distinct(new)),
                delta_blocks=int((matcher.reader.bases_of(references) != NO_BASE).sum()),
                pages=len(pages),
                whole_pages=len(one.resolved.whole),
                seconds=seconds / len(moved),
            )
        )
    return copied
