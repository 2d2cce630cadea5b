# SPDX-License-Identifier: Apache-2.0
"""What may be chosen of a server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServeOptions"]


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
    max_body, max_queue
        Bytes of one request's body; requests that may wait.
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
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 64
    max_wait_ms: float = 2.0
    threads: int = min(4, os.cpu_count() or 1)
    max_body: int = 64 * 1024 * 1024
    max_queue: int = 512
    timeout: float = 30.0
    grace: float = 30.0
    token: bytes | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    access_log: bool = False

    def __repr__(self) -> str:
        return f"ServeOptions({self.host!r}, {self.port})"  # without the token
