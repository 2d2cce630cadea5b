# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP/1.1 with limits that it lacks: on headers, how slowly they come, and connections.

Answers come in the order of the requests, also where one of several sent at once is no HTTP.

A client may end its side of a connection behind its last request, and has its answers all the same.

An offer to go on in another protocol, as Java's client makes with every request, is passed over:
httptools would leave out the body of such a request.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

__all__ = ["LimitedProtocol"]

_LOG = logging.getLogger("pydedup.http")
#: Bytes of the line of a request and its headers together.
_LARGEST_HEAD = 64 * 1024
#: How long a client that was refused may go on sending before the connection ends.
_LINGER_SECONDS = 5.0
#: Headers that say where a body ends.
_FRAMING = (b"content-length", b"transfer-encoding")
#: Headers that ask for what no other will do: the only value, and the status of all others.
_UNDERSTOOD = {b"transfer-encoding": (b"chunked", 501), b"expect": (b"100-continue", 417)}


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    #: Seconds from the first byte of a request (or the connection) to the end of its headers.
    head_seconds = 15.0
    #: Connections at a time. More would take the files that the store is read with.
    most_connections = 1 << 40
    #: Whether the log has it that there were more; of the class, so that it is said once.
    _told_of_many = False

    #: Bytes since the last that were of a body: of a head, of trailers, or between chunks.
    _head_bytes = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None
    #: Whether the body of a request is to come that httptools takes to be complete.
    _body_follows = False
    #: Whether the parser gets the head of such a request once more.
    _is_repeated = False
    #: The answer to what was no request, after which nothing counts; empty once it was sent.
    _refusal: bytes | None = None
    #: Whether the client sends no more.
    _has_ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head that is too long is refused even where no header ends."""
        if self._refusal is not None:
            return
        self._head_bytes += len(data)
        if self._in_head and self._head_timer is None:
            self._await_head()
        self._unset_keepalive_if_required()
        rest = data
        while rest and not self.transport.is_closing():
            rest = self._parse(rest)
        if self._head_bytes > _LARGEST_HEAD:
            self._refuse_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Stay connected where whole requests wait for their answers; of TLS nobody may."""
        is_asked = self._in_head and not getattr(self.cycle, "response_complete", True)
        if not is_asked or not self.transport.can_write_eof():
            return False
        self._has_ended = True
        self._stop_timer()
        return True

    def _parse(self, data: bytes) -> bytes:
        """Take bytes up to the end of a request that offers another protocol; returns the rest."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._body_follows:
                framing = [b"%s: %s\r\n" % one for one in self.headers if one[0] in _FRAMING]
                self._body_follows, self._is_repeated = False, True
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(framing))
                self._is_repeated = False
            return data[offer.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        return b""

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._is_repeated:
            return
        self._in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the line of a request."""
        if self._in_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those behind a body, trailers, say nothing that is asked for here."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin the body of a request."""
        if self._is_repeated:
            return
        lines = (len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        length = len(self.url) + sum(lines)
        if length > _LARGEST_HEAD:
            self._refuse_head()
            raise httptools.HttpParserError  # so that the parser stops
        for name, (understood, status) in _UNDERSTOOD.items():
            asked = b", ".join(value for key, value in self.headers if key == name).strip().lower()
            if asked not in (b"", understood):
                only = f"{name.decode()}: only {understood.decode()!r} is understood"
                self._refuse(status, only)
                raise httptools.HttpParserError
        self._stop_timer()
        self._in_head = False
        self._head_bytes = 0
        is_framed = any(name in _FRAMING for name, _ in self.headers)
        self._body_follows = is_framed and self.parser.should_upgrade()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body of a request."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body of a request."""
        if self._body_follows:
            return
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or the refusal of what came behind the last."""
        if self._refusal and not self.pipeline:
            self._send_refusal(self._refusal)
        if self._has_ended and not self.pipeline:
            self.transport.close()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self._refuse(400, msg)

    def _make_room(self) -> None:
        """Close a connection without a request for this one, or refuse this one."""
        for other in self.connections:
            is_idle = getattr(other, "timeout_keep_alive_task", None) is not None
            if is_idle and not other.transport.is_closing():
                _close_now(other.transport)
                return
        most = self.most_connections
        if not self._told_of_many:
            type(self)._told_of_many = True
            _LOG.warning(
                "%d connections at a time are all that the limit of open files allows, others are "
                "refused: raise `ulimit -n`, or LimitNOFILE of the service",
                most,
            )
        self._refusal = b""
        self._stop_timer()
        busy = f"{most} connections are open; try again soon"
        # Without waiting until all that was sent is read, which would take a file meanwhile.
        self.transport.write(_error(503, busy, b"retry-after: 1\r\n"))
        _close_now(self.transport)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            _close_now(self.transport)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers have more than {_LARGEST_HEAD} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, behind the answers to whole requests that came before."""
        if self.transport.is_closing() or self._refusal is not None:
            return
        self._stop_timer()
        self._refusal = _error(status, message)
        # Before the first request there is no cycle.
        is_done = getattr(self.cycle, "response_complete", True)
        if not self._in_head and self.pipeline:
            self.pipeline.popleft()  # the request of the bad body, which waits for others
        elif not self._in_head or is_done:
            self._send_refusal(self._refusal)

    def _send_refusal(self, refusal: bytes) -> None:
        if self.transport.is_closing():
            return
        self._refusal = b""
        self.transport.write(refusal)
        if not self.transport.can_write_eof():  # TLS
            self.transport.close()
            return
        # Closed while more is on its way, the connection is reset, and the client may lose the
        # answer: so the rest is read and forgotten, for a while.
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _close_now(transport: asyncio.Transport) -> None:
    """Close a connection, also where the client does not say goodbye, for which TLS waits."""
    is_sent = transport.get_write_buffer_size() == 0
    transport.close()
    if is_sent and not transport.can_write_eof():  # TLS
        transport.abort()


def _error(status: int, message: str, header: bytes = b"") -> bytes:
    """Return the last answer of a connection."""
    body = orjson.dumps({"error": message})
    head: list[Any] = [
        STATUS_LINE[status],
        b"content-type: application/json\r\nconnection: close\r\n",
        header,
        b"content-length: %d\r\n\r\n" % len(body),
    ]
    return b"".join(head) + body
