# SPDX-License-Identifier: Apache-2.0
"""The option ``timeout`` of all URLs: how long a writer waits for another."""

from __future__ import annotations

from typing import Final

__all__ = ["TIMEOUT_SECONDS", "seconds_of"]

#: Unless the URL says otherwise.
TIMEOUT_SECONDS: Final = 30.0
_MOST_SECONDS: Final = 86400.0


def seconds_of(text: str) -> float:
    """Return a number of seconds. Raises ValueError, which says what it must be, and no more."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MOST_SECONDS:
        raise ValueError(f"a number of seconds, 0 to {_MOST_SECONDS:.0f}")
    return seconds
