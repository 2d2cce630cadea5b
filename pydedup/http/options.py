# SPDX-License-Identifier: Apache-2.0
"""What may be chosen of a server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydedup.errors import ArgumentError

__all__ = ["ServeOptions"]

_MANY: Final = 1 << 40
#: From, to, and whether it is a whole number.
_RANGES: Final[dict[str, tuple[float, float, bool]]] = {
    "max_batch": (1, _MANY, True),
    "max_wait_ms": (0, 60_000, False),
    "threads": (1, 256, True),
    "max_body": (0, _MANY, True),
    "max_answer": (0, _MANY, True),
    "max_queue": (1, _MANY, True),
    "timeout": (0.001, _MANY, False),
    "grace": (0, _MANY, False),
}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Limits and places of a server.

    Attributes
    ----------
    host, port
        Where it listens; port 0 is any free one.
    max_batch, max_wait_ms
        Rows that go together; how long a request waits for others while a thread is free.
    threads
        Batches that are predicted at once.
    max_body, max_answer, max_queue
        Bytes of one request's body, and those that it takes beside the memory budget until it is
        answered; requests that may wait.
    timeout
        Seconds that a request may take.
    grace
        Seconds that requests under way have when the server is told to stop.
    token
        What clients must send as ``Authorization: Bearer``, or None.
    tls_cert, tls_key
        Certificate (with its chain) and key, PEM.
    access_log
        Whether each request is a line on standard error.

    Raises
    ------
    ArgumentError
        For a number that is none, or not in its range, or an empty host.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 64
    max_wait_ms: float = 2.0
    threads: int = min(4, os.cpu_count() or 1)
    max_body: int = 64 * 1024 * 1024
    max_answer: int = 64 * 1024 * 1024
    max_queue: int = 512
    timeout: float = 30.0
    grace: float = 30.0
    token: bytes | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    access_log: bool = False

    def __post_init__(self) -> None:
        for name, (low, high, whole) in _RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, int if whole else (int, float))
            if not is_number or isinstance(value, bool) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise ArgumentError(f"{name} is {value!r}; it must be {kind}, {low:g} to {high:g}")
        if not self.host.strip():  # an empty one would be all addresses
            raise ArgumentError(
                f"host is {self.host!r}; it must be a name or an address, 0.0.0.0 for all of them"
            )

    def __repr__(self) -> str:
        return f"ServeOptions({self.host!r}, {self.port})"  # without the token
