# SPDX-License-Identifier: Apache-2.0
"""The temporary file that full pages of an add go to, until these are written to the store."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from pydedup.errors import PageNotFoundError
from pydedup.formats._files import full_disk
from pydedup.pool import Fetched

__all__ = ["SpoolFile"]


class SpoolFile:
    """Pages by number. Thread-safe.

    The pool that reads from it refers to it, and not to the spool with all that is known of blocks:
    pools are given up to the garbage collector.
    """

    def __init__(self) -> None:
        # It has no name, so it vanishes with the process whatever happens.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=_folder())  # noqa: SIM115
        self._extents: dict[int, tuple[int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()  # of the file, and of where its pages are

    def close(self) -> None:
        """Give up the file, and all of its pages."""
        with self._lock:
            self._file.close()

    def write(self, number: int, payload: bytes) -> None:
        """Append a page. Raises what `full_disk` makes of a full disk."""
        said = (
            f"no space left for the temporary file in {_folder()}; free some or "
            "set TMPDIR to a folder with room for the new blocks"
        )
        with self._lock, full_disk(said):
            self._file.seek(self._end)
            self._file.write(payload)
            self._file.flush()
            self._extents[number] = self._end, len(payload)
            self._end += len(payload)

    def read(self, numbers: Sequence[int]) -> Iterator[Fetched]:
        """Yield pages, as a `pydedup.pool.PagePool` wants them."""
        for number in numbers:
            with self._lock:
                offset, length = self._extents[number]
                self._file.seek(offset)
                payload = self._file.read(length)
            if len(payload) != length:
                raise PageNotFoundError("the temporary file of this add was cut short by someone")
            yield number, None, payload


def _folder() -> str:
    # /tmp is memory on many machines; /var/tmp is meant for files that may be large.
    if "TMPDIR" not in os.environ:
        with contextlib.suppress(OSError):
            folder = Path("/var/tmp")
            if folder.is_dir() and os.access(folder, os.W_OK):
                return str(folder)
    return tempfile.gettempdir()
