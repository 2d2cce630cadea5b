# SPDX-License-Identifier: Apache-2.0
"""How much memory a process takes at most, looked at by a thread of its own. For tests; Linux."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

__all__ = ["ResidentMemory"]

_STATM, _PAGE_BYTES = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")


class ResidentMemory:
    """The memory of this process; as a context manager it is looked at every 2 ms."""

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def now(self) -> int:
        """Return how many bytes it takes."""
        return int(_STATM.read_text(encoding="ascii").split()[1]) * _PAGE_BYTES

    def forget(self) -> None:
        """Begin anew: what was seen up to now does not count."""
        self._peak = 0

    def peak(self) -> int:
        """Return the most bytes that were seen since `forget`, or since it is watched."""
        return max(self._peak, self.now())

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self.now())
