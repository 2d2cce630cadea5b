# SPDX-License-Identifier: Apache-2.0
"""Who may come in, and the log of who did. A token is never logged, and no body is."""

from __future__ import annotations

import hmac
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from pydedup.errors import ArgumentError
from pydedup.http.problems import HttpError

__all__ = ["AccessLog", "Gate", "check_token", "read_token"]

_LONGEST_QUEUE = 10_000


def read_token(path: Path | None, environment: Mapping[str, str], variable: str) -> bytes | None:
    """Return the token of a file, else of an environment variable, else None.

    Raises ArgumentError when it is empty, or not what a header can hold.
    """
    if path is not None:
        # What is no ASCII is refused below.
        where, text = f"the token in {path}", path.read_text("utf-8", errors="replace").strip()
    elif variable in environment:
        where, text = f"the token in {variable}", environment[variable].strip()
    else:
        return None
    return check_token(text, where)


def check_token(text: str, where: str) -> bytes:
    """Return a token as headers hold it. Raises ArgumentError where it cannot be one."""
    if not text:
        raise ArgumentError(f"{where} is empty")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ArgumentError(f"{where} must be printable ASCII without spaces")
    return text.encode()


class Gate:
    """Lets requests with the right token in, or all when there is none."""

    def __init__(self, token: bytes | None) -> None:
        self._token = token

    def check(self, authorization: bytes | None) -> None:
        """Raise HttpError 401 unless the header ``Authorization`` has the token."""
        if self._token is None:
            return
        scheme, _, given = (authorization or b"").partition(b" ")
        good = hmac.compare_digest(given.strip(), self._token)
        if scheme.lower() != b"bearer" or not good:
            raise HttpError(
                401,
                "a token is needed: send the header 'Authorization: Bearer TOKEN'",
                "unauthorized",
                ((b"www-authenticate", b'Bearer realm="pydedup"'),),
            )


class AccessLog:
    """One JSON object a line, written by a thread of its own: a slow reader holds nobody up."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def note(self, **fields: Any) -> None:
        """Log one request; when too many wait to be written, it is left out."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._queue.put_nowait({"time": now, **fields})
        except queue.Full:
            return

    def close(self) -> None:
        """Write what waits, for a second at most."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(1.0)

    def _write(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._stream.write(orjson.dumps(entry).decode() + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return
