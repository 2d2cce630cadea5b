# SPDX-License-Identifier: Apache-2.0
"""Memory that is free again, given back to the system; not how much there is, or may be used."""

from __future__ import annotations

import ctypes

__all__ = ["give_back_freed"]


def give_back_freed() -> None:
    """Let the C library give free memory back: pages between used ones it keeps otherwise.

    A few milliseconds, while which other threads may wait for memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
