# SPDX-License-Identifier: Apache-2.0
"""The application: what each path does with the store. What surrounds requests is in `endpoint`.

Nothing in the event loop waits for the database, computes, or works through much data: that is
done in threads. Deliberately not here: sockets and signals (`server`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydedup import __version__
from pydedup.http import responses, service
from pydedup.http.access import AccessLog, Gate
from pydedup.http.batcher import Batcher
from pydedup.http.endpoint import Endpoint, Exchange
from pydedup.http.metrics import CONTENT_TYPE, Metrics
from pydedup.http.numbers import PIECE_BYTES
from pydedup.http.options import ServeOptions
from pydedup.http.problems import bad, busy, problem_of
from pydedup.http.requests import header_length, parameters_of, parse_infer, parse_object, raw_infer
from pydedup.http.responses import Reply
from pydedup.http.served import Admit, Arrays, ServedStore

__all__ = ["App"]

_T = TypeVar("_T")
#: Seconds that the database has to say that it is there.
_PING_SECONDS = 5.0
#: An output and its JSON take at most so many times the bytes of the output, but for f16.
_AS_JSON = 5


class App(Endpoint):
    """An ASGI application that serves one store."""

    def __init__(
        self, store: ServedStore, options: ServeOptions, gate: Gate, log: AccessLog | None
    ) -> None:
        super().__init__(options, gate, log, store.url)
        self._store = store
        store.limit_loops(options.timeout)
        self._batcher = Batcher[tuple[str, Arrays, Admit], service.Answer](
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
                "answer_bytes": ("Bytes that answers take.", lambda: self._answers.held),
            },
        )
        # Apart, so that a database that does not answer, or a model that is loaded, holds up
        # nothing that does not need it.
        self._pools = {
            name: ThreadPoolExecutor(threads, thread_name_prefix=name)
            for name, threads in {"parse": 2, "ask": 2, "load": 1, "ping": 1, "metrics": 1}.items()
        }
        self._actions = {
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

    def close(self) -> None:
        """Stop the threads; what they are doing is not waited for."""
        self._batcher.close()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def _in(self, pool: str, call: Callable[..., _T], *given: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pools[pool], call, *given)

    # ---- the paths ----------------------------------------------------------------------------

    async def _ready(self, exchange: Exchange) -> Reply:
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await self._in("ping", self._store.ping)
        except TimeoutError:
            said = f"the database does not answer within {_PING_SECONDS:g} seconds"
            raise busy(said) from None
        except Exception as error:
            problem = problem_of(error)
            raise busy(problem.message, cause=problem.cause) from None
        # The protocol's text calls it live; its servers call it ready.
        return responses.json_reply({"live": True, "ready": True})

    async def _server(self, exchange: Exchange) -> Reply:
        extensions = ["binary_tensor_data", "model_repository", "model_configuration"]
        return responses.json_reply(
            {"name": "pydedup", "version": __version__, "extensions": extensions}
        )

    async def _metrics_text(self, exchange: Exchange) -> Reply:
        text = await self._in("metrics", self._metrics.text)
        return Reply(200, [(b"content-type", CONTENT_TYPE)], [text])

    async def _model(self, exchange: Exchange) -> Reply:
        return responses.json_reply(
            await self._in("ask", service.model_metadata, self._store, exchange.address)
        )

    async def _model_config(self, exchange: Exchange) -> Reply:
        return responses.json_reply(
            await self._in(
                "ask",
                service.model_config,
                self._store,
                exchange.address,
                self._options.max_batch,
            )
        )

    async def _model_ready(self, exchange: Exchange) -> Reply:
        model = await self._in("ask", self._store.ready, exchange.address)
        return responses.json_reply({"name": model.name, "ready": True})

    async def _infer(self, exchange: Exchange) -> Reply:
        body = await self._body(exchange)
        given = exchange.headers.get(b"inference-header-content-length")
        json_bytes = header_length(
            None if given is None else given.decode("latin-1").strip(), len(body)
        )
        address = exchange.address
        if json_bytes == 0:  # what it is, the model says; the alias may move meanwhile
            model = await self._in("ask", self._store.served, address)
            address, request = model.address, raw_infer(body, model.signature.inputs)
        elif (len(body) if json_bytes is None else json_bytes) > PIECE_BYTES:
            request = await self._in("parse", parse_infer, body, json_bytes)
        else:
            request = parse_infer(body, json_bytes)
        times = _AS_JSON if request.wants_json else 1

        def admit(out_nbytes: int, more: int) -> None:
            exchange.answer.take(times * out_nbytes + more)

        answer = await self._batcher.submit(
            (address, request.inputs, admit), service.rows_of(request.inputs)
        )
        model, outputs = answer.model, answer.outputs
        exchange.model = model.address
        if isinstance(outputs, Exception):
            raise outputs
        wanted = responses.wanted_outputs(request, outputs)
        given_reply = (model.name, model.version, request, wanted, outputs)
        if responses.is_long(outputs, wanted):
            return await self._in("parse", responses.infer_reply, *given_reply)
        return responses.infer_reply(*given_reply)

    async def _index(self, exchange: Exchange) -> Reply:
        asked = parse_object(await self._body(exchange))
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise bad("ready", "it must be true or false")
        entries: list[dict[str, str]] = []
        for one in await self._in("ask", self._store.index):
            state = "UNAVAILABLE" if one.hindrance else "READY"
            entry = {"name": one.name, "version": one.version, "state": state}
            if not (ready and one.hindrance):
                entries.append({**entry, "reason": one.hindrance})
        return responses.json_reply(entries)

    async def _load(self, exchange: Exchange) -> Reply:
        asked = parameters_of(parse_object(await self._body(exchange)), "parameters")
        if any(name == "config" or "file:" in name for name in asked):
            raise bad("parameters", "models come from the store alone, without config or files")
        pages = await self._in("load", self._warm, exchange.address)
        return responses.json_reply({"pages": pages})

    def _warm(self, address: str) -> int:
        return self._store.warm(self._store.ready(address).address)

    async def _unload(self, exchange: Exchange) -> Reply:
        await self._body(exchange)
        pages = await self._in("ask", self._store.cool, exchange.address)
        return responses.json_reply({"pages": pages})
