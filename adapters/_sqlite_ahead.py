# SPDX-License-Identifier: Apache-2.0
"""Asking the system for the payloads of pages before they are read.

SQLite reads 16 or 64 KiB at a time, and what the system then reads ahead by itself, up to megabytes
for each place, is mostly not what is wanted next. So it is told: where the row of a page lies is
found in the file (_sqlite_places.py), and asked for as a whole.

These are hints: where something lies is a guess, and a wrong one costs a wrong hint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Final

from pydedup.errors import PydedupError

from ._sqlite_places import PagePlaces, pages_apart
from ._sqlite_tree import NotFoundInFileError

__all__ = ["PagesAhead"]

#: Pages asked for before the first of them is read, by each thread that reads.
_WINDOW: Final = 16


class PagesAhead:
    """Asks for payloads at these places."""

    def __init__(self, places: PagePlaces) -> None:
        self._places = places

    def walk(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the ids, each after it and the next few were asked for.

        Where most pages of a stretch are wanted, the system reads ahead what is needed by itself.
        """
        apart = pages_apart(ids)
        asked = 0
        for number, page_id in enumerate(ids):
            if asked < len(apart) and apart[asked] <= number + _WINDOW // 2:
                some = apart[asked : asked + _WINDOW]
                self.ask([ids[each] for each in some])
                asked += len(some)
            yield page_id

    def ask(self, ids: Sequence[int]) -> None:
        """Ask for what is not in memory of these pages; a hint that fails is none."""
        with contextlib.suppress(NotFoundInFileError, PydedupError, OSError):
            handle, pages = self._places.find(ids)
            for page in pages:
                start, stop = page.place.start, page.place.stop
                if start < stop and not page.is_in_memory(handle):
                    os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_WILLNEED)
