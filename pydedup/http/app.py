# SPDX-License-Identifier: Apache-2.0
"""The application: from a request as ASGI has it to its answer.

Nothing in the event loop waits for the database, computes, or works through much data: that is
done in threads. Deliberately not here: sockets and signals (`server`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydedup import __version__
from pydedup.errors import StoreError
from pydedup.http import responses, service
from pydedup.http.access import AccessLog, Gate
from pydedup.http.batcher import Batcher
from pydedup.http.bodies import DisconnectedError, Held, Room, read_body
from pydedup.http.metrics import CONTENT_TYPE, Metrics
from pydedup.http.numbers import PIECE_BYTES
from pydedup.http.options import ServeOptions
from pydedup.http.paths import Route, route_of
from pydedup.http.problems import RETRY_SOON, HttpError, bad, problem_of
from pydedup.http.requests import header_length, parse_infer, parse_object
from pydedup.http.responses import Reply
from pydedup.http.served import Arrays, ServedStore

__all__ = ["App"]

_T = TypeVar("_T")
_LOG = logging.getLogger("pydedup.http")
#: Seconds that the database has to say that it is there.
_PING_SECONDS = 5.0
#: An answer goes out in parts of so many bytes, so that a slow reader is noticed between them.
_PART_BYTES = 1024 * 1024
_OPEN_TO_ALL = ("live", "ready")
#: What takes as long as reading the model takes.
_UNHURRIED = ("load",)


@dataclass(slots=True)
class _Exchange:
    """One request on its way."""

    scope: Mapping[str, Any]
    receive: Any
    headers: Mapping[bytes, bytes]
    held: Held
    route: Route | None = None
    model: str = ""
    outcome: str = "ok"
    reading: bool = False
    started: float = field(default_factory=time.monotonic)


class App:
    """An ASGI application that serves one store."""

    def __init__(
        self, store: ServedStore, options: ServeOptions, gate: Gate, log: AccessLog | None
    ) -> None:
        self._store = store
        self._options = options
        self._gate = gate
        self._log = log
        self._room = Room(options.max_body)
        self._batcher = Batcher[tuple[str, Arrays], service.Answer](
            lambda requests: service.run_batch(store, requests),
            max_rows=options.max_batch,
            max_wait=options.max_wait_ms / 1000,
            max_queue=options.max_queue,
            threads=options.threads,
            observe=lambda requests, rows: self._metrics.batch(requests, rows),
        )
        self._metrics = Metrics(
            store.pool_stats,
            {
                "queue_requests": ("Requests that wait.", lambda: self._batcher.waiting),
                "running_batches": ("Batches that run.", lambda: self._batcher.running),
                "open_requests": ("Requests under way.", lambda: self.under_way),
                "body_bytes": ("Bytes of requests under way.", lambda: self._room.held),
            },
        )
        # Apart, so that a database that does not answer, or a model that is loaded, holds up
        # nothing that does not need it.
        self._pools = {
            name: ThreadPoolExecutor(threads, thread_name_prefix=name)
            for name, threads in {"parse": 2, "ask": 2, "load": 1, "ping": 1, "metrics": 1}.items()
        }
        self._actions: dict[str, Callable[[_Exchange], Any]] = {
            "live": self._live,
            "ready": self._ready,
            "server": self._server,
            "metrics": self._metrics_text,
            "model": self._model,
            "model_ready": self._model_ready,
            "model_config": self._model_config,
            "model_infer": self._infer,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
        }
        #: Requests that have no complete answer yet.
        self.under_way = 0
        #: Whether new requests are turned away.
        self.draining = False
        self._complained = 0.0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        room = Held(self._room)
        exchange = _Exchange(scope, receive, dict(scope["headers"]), room)
        self.under_way += 1
        status = sent = 0
        try:
            reply = await self._reply(exchange)
            status = reply.status
            sent = await self._send(reply, send)
        except DisconnectedError:
            exchange.outcome = "disconnected"
        finally:
            self.under_way -= 1
            received = room.nbytes
            room.give_back()
            self._account(exchange, status, received, sent)

    def close(self) -> None:
        """Stop the threads; what they are doing is not waited for."""
        self._batcher.close()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- around each request ------------------------------------------------------------------

    async def _reply(self, exchange: _Exchange) -> Reply:
        limit = asyncio.timeout(None)
        try:
            async with limit:
                route = route_of(exchange.scope["method"], exchange.scope["raw_path"])
                exchange.route = route
                if self.draining and route.action not in ("live", "metrics"):
                    headers = (*RETRY_SOON, (b"connection", b"close"))
                    raise HttpError(503, "the server is stopping", "stopping", headers)
                if route.action not in _OPEN_TO_ALL:
                    self._gate.check(exchange.headers.get(b"authorization"))
                if route.action not in _UNHURRIED:
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
                said = "the server stopped before it was done"
                problem = HttpError(503, said, "stopping", RETRY_SOON)
            if isinstance(error, TimeoutError) and limit.expired():
                said = f"not done within {self._options.timeout:g} seconds"
                problem = HttpError(504, said, "timeout", RETRY_SOON)
                if exchange.reading:
                    close = ((b"connection", b"close"),)
                    problem = HttpError(408, f"body: {said}", "timeout", close)
            if problem.cause is not None:
                self._complain(problem.cause)
            # Clients need not know where the store is.
            problem.message = problem.message.replace(self._store.url, "the store")
            exchange.outcome = problem.outcome
            return responses.error_reply(problem)

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
                    for at in range(0, len(part), _PART_BYTES):
                        piece = part[at : at + _PART_BYTES]
                        left -= len(piece)
                        await send(
                            {"type": "http.response.body", "body": piece, "more_body": left > 0}
                        )
        except TimeoutError:
            raise DisconnectedError from None
        return total

    def _account(self, exchange: _Exchange, status: int, received: int, sent: int) -> None:
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

    async def _in(self, pool: str, call: Callable[..., _T], *given: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pools[pool], call, *given)

    async def _body(self, exchange: _Exchange) -> bytes | bytearray:
        exchange.reading = True
        body = await read_body(exchange.receive, exchange.headers, exchange.held)
        exchange.reading = False
        return body

    # ---- the paths ----------------------------------------------------------------------------

    async def _live(self, exchange: _Exchange) -> Reply:
        return responses.json_reply({"live": True})

    async def _ready(self, exchange: _Exchange) -> Reply:
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await self._in("ping", self._store.ping)
        except TimeoutError:
            said = f"the database does not answer within {_PING_SECONDS:g} seconds"
            raise HttpError(503, said, "unavailable", RETRY_SOON) from None
        except Exception as error:
            problem = problem_of(error)
            raise HttpError(
                503, problem.message, "unavailable", RETRY_SOON, problem.cause
            ) from None
        return responses.json_reply({"ready": True})

    async def _server(self, exchange: _Exchange) -> Reply:
        extensions = ["binary_tensor_data", "model_repository", "model_configuration"]
        return responses.json_reply(
            {"name": "pydedup", "version": __version__, "extensions": extensions}
        )

    async def _metrics_text(self, exchange: _Exchange) -> Reply:
        text = await self._in("metrics", self._metrics.text)
        return Reply(200, [(b"content-type", CONTENT_TYPE)], [text])

    async def _model(self, exchange: _Exchange) -> Reply:
        return responses.json_reply(
            await self._in("ask", service.model_metadata, self._store, _address(exchange))
        )

    async def _model_config(self, exchange: _Exchange) -> Reply:
        return responses.json_reply(
            await self._in(
                "ask",
                service.model_config,
                self._store,
                _address(exchange),
                self._options.max_batch,
            )
        )

    async def _model_ready(self, exchange: _Exchange) -> Reply:
        model = await self._in("ask", self._store.served, _address(exchange))
        return responses.json_reply({"name": model.name, "ready": True})

    async def _infer(self, exchange: _Exchange) -> Reply:
        body = await self._body(exchange)
        given = exchange.headers.get(b"inference-header-content-length")
        json_bytes = header_length(
            None if given is None else given.decode("latin-1").strip(), len(body)
        )
        if (len(body) if json_bytes is None else json_bytes) > PIECE_BYTES:
            request = await self._in("parse", parse_infer, body, json_bytes)
        else:
            request = parse_infer(body, json_bytes)
        answer = await self._batcher.submit(
            (_address(exchange), request.inputs), service.rows_of(request.inputs)
        )
        model, outputs = answer.model, answer.outputs
        exchange.model = model.address
        wanted = responses.wanted_outputs(request, outputs)
        given_reply = (model.name, model.version, request, wanted, outputs)
        if responses.is_long(outputs, wanted):
            return await self._in("parse", responses.infer_reply, *given_reply)
        return responses.infer_reply(*given_reply)

    async def _index(self, exchange: _Exchange) -> Reply:
        asked = parse_object(await self._body(exchange))
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise bad("ready", "it must be true or false")
        entries: list[dict[str, str]] = []
        for one in await self._in("ask", self._store.index):
            entry = {"name": one.name, "version": one.version}
            if one.has_graph:
                entries.append({**entry, "state": "READY", "reason": ""})
            elif not ready:
                reason = "it has no graph to predict with"
                entries.append({**entry, "state": "UNAVAILABLE", "reason": reason})
        return responses.json_reply(entries)

    async def _load(self, exchange: _Exchange) -> Reply:
        asked = parse_object(await self._body(exchange))
        if any(name == "config" or "file:" in name for name in asked.get("parameters") or ()):
            raise bad("parameters", "models come from the store alone, without config or files")
        pages = await self._in("load", self._warm, _address(exchange))
        return responses.json_reply({"pages": pages})

    def _warm(self, address: str) -> int:
        return self._store.warm(self._store.served(address).address)

    async def _unload(self, exchange: _Exchange) -> Reply:
        await self._body(exchange)
        pages = await self._in("ask", self._store.cool, _address(exchange))
        return responses.json_reply({"pages": pages})


def _address(exchange: _Exchange) -> str:
    assert exchange.route is not None
    return exchange.route.address
