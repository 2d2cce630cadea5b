# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests as they come in, and the bytes that answers take, within limits."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from pydedup.http.problems import bad, busy

__all__ = ["DisconnectedError", "Held", "Room", "read_body"]

#: Bodies, or answers, that are held at once may be so many times as large as one, all together.
_AT_ONCE = 4


class DisconnectedError(Exception):
    """The client went away in the middle of its request."""


class Room:
    """How many bytes of bodies, or of answers, the server holds, and may.

    Parameters
    ----------
    most
        Bytes of one.
    what, advice
        What a message calls one, and what it says that a client can do.
    """

    def __init__(self, most: int, what: str, advice: str = "") -> None:
        self.most = most
        self.what = what
        self.advice = advice
        self.held = 0
        self.lock = threading.Lock()


class Held:
    """What one request holds of a room. Safe between threads."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._is_over = False
        self.nbytes = 0

    def take(self, nbytes: int) -> None:
        """Count bytes of this request.

        Raises HttpError 413 when they are more than one may have, 503 when all together are too
        many; DisconnectedError when they were given back: the request has ended meanwhile.
        """
        room = self._room
        with room.lock:
            total = self.nbytes + nbytes
            if self._is_over:
                raise DisconnectedError
            if total > room.most:
                said = f"it takes {total} bytes, and {room.most} are allowed{room.advice}"
                raise bad(room.what, said, 413)
            if room.held + nbytes > _AT_ONCE * room.most:
                raise busy(
                    f"requests whose {room.what} takes {room.held} bytes, all together, are being "
                    "served already; try again soon",
                    "queue_full",
                )
            room.held += nbytes
            self.nbytes = total

    def give_back(self) -> None:
        """Count nothing any more."""
        with self._room.lock:
            self._room.held -= self.nbytes
            self.nbytes = 0
            self._is_over = True


async def read_body(receive: Any, headers: Mapping[bytes, bytes], held: Held) -> bytes | bytearray:
    """Return the body of a request.

    Raises HttpError 413 or 503 as `Held.take` does, before the body is read where its length is
    given, and 415 for a compressed one; DisconnectedError when the client goes away.
    """
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"", b"identity"):
        raise bad("Content-Encoding", "send the body as it is, without compression", 415)
    length = headers.get(b"content-length")
    known = length is not None and length.isdigit()
    if length is not None and known:
        held.take(int(length[:20]))
    body: bytes | bytearray = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise DisconnectedError
        part = message.get("body", b"")
        if part and not known:
            held.take(len(part))
        if not body:
            body = part
        elif part:
            if isinstance(body, bytes):
                body = bytearray(body)
            body += part
        if not message.get("more_body", False):
            return body
