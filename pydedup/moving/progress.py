# SPDX-License-Identifier: Apache-2.0
"""How far a copy is, in bytes."""

from __future__ import annotations

from pydedup.types import Progress

__all__ = ["CopyProgress"]


class CopyProgress:
    """Tells of a copy in bytes of the source's pages, each counted once."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._before = self._model = self._done = self._whole = 0

    def begin(self, model_bytes: int) -> None:
        """Begin a model, or begin it anew, of which so many bytes are not there yet."""
        self._model, self._done, self._whole = model_bytes, 0, 0

    def grow(self, more_bytes: int) -> None:
        """Take note of so many bytes that come along for later models."""
        self._model += more_bytes

    def advance(self, count: int) -> None:
        """Take note of bytes that were found or spooled."""
        self._done += count
        self._tell()

    def will_write(self, whole_bytes: int) -> None:
        """Take note that so many bytes go whole, first of all that is written next."""
        self._whole = whole_bytes

    def wrote(self, count: int) -> None:
        """Take note of bytes that were written; those of whole pages were not counted yet."""
        new = min(count, self._whole)
        self._whole -= new
        self.advance(new)

    def checked(self, done: int, total: int) -> None:
        """Tell how many bytes of what was written were read back."""
        if self._progress is not None:
            self._progress("checking", done, total)

    def end(self) -> None:
        """Take note that the model is there."""
        self._before += self._model
        self._model = self._done = 0
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            done = self._before + min(self._done, self._model)
            self._progress("copying", min(done, self._total), self._total)
