# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, as they come in, within limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydedup.http.problems import RETRY_SOON, HttpError, bad

__all__ = ["DisconnectedError", "Held", "Room", "read_body"]

#: Bodies that are held at once, all together, may be so many times as large as one.
_AT_ONCE = 4


class DisconnectedError(Exception):
    """The client went away in the middle of its request."""


class Room:
    """How many bytes of bodies the server holds, and may."""

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.held = 0

    def take(self, nbytes: int) -> None:
        """Count bytes. Raises HttpError 503 when there is no room for them."""
        if self.held + nbytes > _AT_ONCE * self.max_body:
            raise HttpError(
                503,
                f"requests of {self.held} bytes are being served already; try again soon",
                "queue_full",
                RETRY_SOON,
            )
        self.held += nbytes


class Held:
    """What one request holds of the room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.nbytes = 0

    def take(self, nbytes: int) -> None:
        """Count bytes of this request.

        Raises
        ------
        HttpError
            413 when they are more than one body may have, 503 when all together are too many.
        """
        if self.nbytes + nbytes > self._room.max_body:
            raise bad(
                "body", f"it is larger than the {self._room.max_body} bytes that are allowed", 413
            )
        self._room.take(nbytes)
        self.nbytes += nbytes

    def give_back(self) -> None:
        """Count nothing any more."""
        self._room.held -= self.nbytes
        self.nbytes = 0


async def read_body(receive: Any, headers: Mapping[bytes, bytes], held: Held) -> bytes | bytearray:
    """Return the body of a request.

    Raises
    ------
    HttpError
        413 or 503 as `Held.take` does, before the body is read where its length is given; 415 for
        a compressed one.
    DisconnectedError
        When the client goes away.
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
