# SPDX-License-Identifier: Apache-2.0
"""What surrounds a request whoever answers it: its path, token, limits, time, errors, log.

Deliberately not here: what the paths do (`app`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydedup.errors import StoreError, without_frames
from pydedup.http import responses
from pydedup.http.access import AccessLog, Gate
from pydedup.http.bodies import DisconnectedError, Held, Room, read_body
from pydedup.http.metrics import Metrics
from pydedup.http.options import ServeOptions
from pydedup.http.paths import Route, route_of
from pydedup.http.problems import RETRY_SOON, HttpError, busy, problem_of
from pydedup.http.responses import Reply
from pydedup.sets import in_parts

__all__ = ["Endpoint", "Exchange"]

_LOG = logging.getLogger("pydedup.http")
#: An answer goes out in parts of so many bytes, so that a slow reader is noticed between them.
_PART_BYTES = 1024 * 1024
_OPEN_TO_ALL = ("live", "ready")
#: What takes, once its body is there, as long as reading the model takes.
_UNHURRIED = ("load",)
#: So long the body of a request that is refused may take to come.
_ARRIVAL_SECONDS = 5.0
_ADVICE = " (--max-answer); ask for fewer or shorter rows at a time, or for binary data"


@dataclass(slots=True)
class Exchange:
    """One request on its way."""

    scope: Mapping[str, Any]
    receive: Any
    headers: Mapping[bytes, bytes]
    held: Held
    answer: Held
    route: Route | None = None
    model: str = ""
    outcome: str = "ok"
    reading: bool = False
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.Timeout(None))
    started: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> str:
        """The model that is asked for."""
        assert self.route is not None
        return self.route.address

    def give_back(self) -> None:
        """Hold nothing any more, of what bodies and answers may take."""
        self.held.give_back()
        self.answer.give_back()


class Endpoint:
    """An ASGI application by the paths of `paths`; those who derive say what the paths do.

    Parameters
    ----------
    secret
        What no answer may show: where the store is.
    """

    def __init__(
        self,
        options: ServeOptions,
        gate: Gate,
        log: AccessLog | None,
        secret: str,
    ) -> None:
        self._options = options
        self._gate = gate
        self._log = log
        self._secret = secret
        self._room = Room(options.max_body, "body")
        self._answers = Room(options.max_answer, "answer", _ADVICE)
        #: What each path does; set by those who derive, as are the metrics.
        self._actions: Mapping[str, Callable[[Exchange], Any]] = {}
        self._metrics: Metrics
        #: Requests that have no complete answer yet.
        self.under_way = 0
        #: Whether new requests are turned away.
        self.draining = False
        self._complained = 0.0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        exchange = self.exchange(scope, receive)
        self.under_way += 1
        status = sent = 0
        try:
            reply = await self.answer(exchange)
            status = reply.status
            sent = await self._send(reply, send)
        except DisconnectedError:
            exchange.outcome = "disconnected"
        finally:
            self.under_way -= 1
            received = exchange.held.nbytes
            exchange.give_back()
            self._account(exchange, status, received, sent)

    def exchange(self, scope: Mapping[str, Any], receive: Any) -> Exchange:
        """Return a request as it begins."""
        held, answer = Held(self._room), Held(self._answers)
        return Exchange(scope, receive, dict(scope["headers"]), held, answer)

    async def answer(self, exchange: Exchange) -> Reply:
        """Return the answer to a request; that of an error, where there is one."""
        limit = exchange.limit
        try:
            async with limit:
                route = route_of(exchange.scope["method"], exchange.scope["raw_path"])
                exchange.route = route
                if self.draining and route.action not in ("live", "metrics"):
                    await self._let_arrive(exchange)
                    headers = (*RETRY_SOON, (b"connection", b"close"))
                    raise HttpError(503, "the server is stopping", "stopping", headers)
                if route.action not in _OPEN_TO_ALL:
                    self._gate.check(exchange.headers.get(b"authorization"))
                limit.reschedule(asyncio.get_running_loop().time() + self._options.timeout)
                reply: Reply = await self._actions[route.action](exchange)
                return reply
        except DisconnectedError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            problem = problem_of(error)
            if isinstance(error, asyncio.CancelledError):  # the end of the grace period
                if not self.draining:
                    raise
                problem = busy("the server stopped before it was done", "stopping")
            if isinstance(error, TimeoutError) and limit.expired():
                said = f"not done within {self._options.timeout:g} seconds"
                problem = HttpError(504, said, "timeout", RETRY_SOON)
                if exchange.reading:
                    close = ((b"connection", b"close"),)
                    problem = HttpError(408, f"body: {said}", "timeout", close)
            if problem.cause is not None:
                self._complain(problem.cause)
            # Clients need not know where the store is.
            problem.message = problem.message.replace(self._secret, "the store")
            exchange.outcome = problem.outcome
            without_frames(error)
            return responses.error_reply(problem)

    async def _let_arrive(self, exchange: Exchange) -> None:
        """Read the body of a request that is refused and its connection closed, and forget it.

        A client that is still writing would lose the answer. The end of the server waits for none.
        """
        if b"expect" in exchange.headers:  # the client waits to hear that its body is wanted
            return
        self.under_way -= 1
        try:
            async with asyncio.timeout(_ARRIVAL_SECONDS):
                while (await exchange.receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        finally:
            self.under_way += 1

    def _complain(self, cause: BaseException) -> None:
        """Log what is no client's fault: in full, or a line a second of a database that is away."""
        if not isinstance(cause, StoreError):
            _LOG.error("a request failed", exc_info=cause)
        elif time.monotonic() - self._complained > 1.0:
            self._complained = time.monotonic()
            _LOG.error("%s: %s", type(cause).__name__, cause)

    async def _send(self, reply: Reply, send: Any) -> int:
        """Send an answer; returns its length. One that nobody reads is given up."""
        total = reply.nbytes
        headers = [*reply.headers, (b"content-length", b"%d" % total)]
        try:
            async with asyncio.timeout(self._options.timeout):
                await send(
                    {"type": "http.response.start", "status": reply.status, "headers": headers}
                )
                left = total
                for part in reply.parts:
                    for piece in in_parts(part, _PART_BYTES):
                        left -= len(piece)
                        await send(
                            {"type": "http.response.body", "body": piece, "more_body": left > 0}
                        )
        except TimeoutError:
            raise DisconnectedError from None
        return total

    def _account(self, exchange: Exchange, status: int, received: int, sent: int) -> None:
        seconds = time.monotonic() - exchange.started
        route, scope = exchange.route, exchange.scope
        if route is not None and route.action == "model_infer":
            self._metrics.request(exchange.model, exchange.outcome, seconds)
        if self._log is not None:
            client = scope.get("client")
            self._log.note(
                client=client[0] if client else None,
                method=scope["method"],
                path=scope["raw_path"].decode("ascii", "backslashreplace"),
                model=exchange.model or None,
                status=status,
                outcome=exchange.outcome,
                ms=round(seconds * 1000, 3),
                received=received,
                sent=sent,
            )

    async def _live(self, exchange: Exchange) -> Reply:
        return responses.json_reply({"live": True})

    async def _body(self, exchange: Exchange) -> bytes | bytearray:
        exchange.reading = True
        body = await read_body(exchange.receive, exchange.headers, exchange.held)
        exchange.reading = False
        if exchange.route is not None and exchange.route.action in _UNHURRIED:
            exchange.limit.reschedule(None)
        return body
