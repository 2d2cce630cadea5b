# SPDX-License-Identifier: Apache-2.0
"""Memory that is free again, given back to the system; not how much there is, or may be used."""

from __future__ import annotations

import ctypes

__all__ = ["give_back_after", "give_back_freed"]

# Writing so much takes far longer than giving memory back: some 20 to 60 MiB, which a process that
# goes on would keep.
_MUCH_BYTES = 64 * 1024 * 1024


def give_back_after(nbytes: int) -> None:
    """Do so if much was written: call it when that is over, and what it needed is free."""
    if nbytes >= _MUCH_BYTES:
        give_back_freed()


def give_back_freed() -> None:
    """Let the C library give free memory back: pages between used ones it keeps otherwise.

    A few milliseconds, while which other threads may wait for memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
