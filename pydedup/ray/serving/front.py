# SPDX-License-Identifier: Apache-2.0
"""The front: takes requests as `pydedup serve` does, and hands them to the replica to ask.

It looks at paths, tokens, lengths and time, never into a body. What fails because a replica died
is asked again of another one: nothing that a store is asked here changes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from pydedup.errors import PydedupError
from pydedup.http.access import AccessLog, Gate, check_token
from pydedup.http.endpoint import Endpoint, Exchange
from pydedup.http.metrics import CONTENT_TYPE, Metrics, pool_family
from pydedup.http.options import ServeOptions
from pydedup.http.problems import busy
from pydedup.http.responses import Reply
from pydedup.opening import connect_store
from pydedup.ray.cluster import Secret
from pydedup.ray.serving.families import Families
from pydedup.ray.serving.source import reveal

__all__ = ["Answering", "Front", "Ingress"]

_LOG = logging.getLogger("pydedup.ray")
#: Seconds between looks at which models there are, and what they share.
_REFRESH_SECONDS = 5.0
#: Replicas that may die in the middle of one request.
_DEATHS = 3
_HANDLES = 1024
_METRICS_SECONDS = 2.0
#: A replica waits half as long for the database. One that is being started asks it for longer.
_READY_SECONDS = 10.0
#: What a replica needs to know of a request's headers.
_PASSED_ON = (b"content-encoding", b"inference-header-content-length")


class Front(Endpoint):
    """An ASGI application whose answers come from the replicas of a deployment."""

    def __init__(
        self,
        handle: Any,
        families: Families | None,
        options: ServeOptions,
        gate: Gate,
        log: AccessLog | None,
        secret: str,
    ) -> None:
        super().__init__(options, gate, log, secret)
        self._handle = handle
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._families = families
        self._looking: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="families")
        self._pools = _Pools()
        self._metrics = Metrics(
            None,
            {
                "open_requests": ("Requests under way.", lambda: self.under_way),
                "body_bytes": ("Bytes of requests under way.", lambda: self._room.held),
                "answer_bytes": ("Bytes of answers under way.", lambda: self._answers.held),
            },
        )
        self._metrics.register(self._pools)
        self._actions = defaultdict(
            lambda: self._hand_on,
            {"live": self._live, "metrics": self._metrics_text, "ready": self._ready},
        )

    def exchange(self, scope: Mapping[str, Any], receive: Any) -> Exchange:
        """Return a request as it begins, its path without the prefix of the application."""
        prefix = quote(scope.get("root_path", "")).encode()
        raw_path = scope["raw_path"]
        if prefix and raw_path.startswith(prefix):
            scope = {**scope, "raw_path": raw_path[len(prefix) :]}
        return super().exchange(scope, receive)

    async def _ready(self, exchange: Exchange) -> Reply:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                return await self._hand_on(exchange)
        except TimeoutError:
            raise busy(f"no replica answers within {_READY_SECONDS:g} seconds") from None

    async def _metrics_text(self, exchange: Exchange) -> Reply:
        # Not every Ray that fits has it; where not, any name is a method of the deployment.
        if hasattr(type(self._handle), "broadcast"):
            found = await self._handle.broadcast("pool_stats").results_async(
                timeout_s=_METRICS_SECONDS, return_exceptions=True
            )
            told = [one for one in found if not isinstance(one, BaseException)]
            self._pools.stats = {replica: stats for replica, _, stats in told}
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(None, self._metrics.text)
        return Reply(200, [(b"content-type", CONTENT_TYPE)], [text])

    async def _hand_on(self, exchange: Exchange) -> Reply:
        method = exchange.scope["method"]
        body = await self._body(exchange) if method == "POST" else b""
        headers = [
            (name, exchange.headers[name]) for name in _PASSED_ON if name in exchange.headers
        ]
        call = self._handle_of(exchange.address)
        for left in reversed(range(_DEATHS)):
            response = call.remote(method, exchange.scope["raw_path"], headers, bytes(body))
            try:
                status, replied, whole, model, outcome = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                said = f"{self._options.max_queue} requests wait already; try again soon"
                raise busy(said, "queue_full") from None
            except RayActorError as error:
                if not left:
                    said = "no replica lives long enough to answer; try again soon"
                    raise busy(said) from error
                continue
            break
        exchange.model, exchange.outcome = model, outcome
        if model:  # a prediction; that it is not too large, the replica has seen to
            exchange.answer.take(min(len(whole), self._options.max_answer))
        return Reply(status, list(replied), [whole])

    def _handle_of(self, address: str) -> Any:
        """Return the deployment as it is called for a model."""
        key = ""
        if self._families is not None:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            key = self._families.key(address) if address else ""
        found = self._handles.get(key)
        if found is None:
            found = self._handle.options(method_name="answer", multiplexed_model_id=key)
            self._handles[key] = found
            if len(self._handles) > _HANDLES:
                self._handles.popitem(last=False)
        return found

    async def _look(self) -> None:
        """Keep up with the store, while there are requests; not more than now and then."""
        assert self._families is not None
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._families.refresh)
        except PydedupError as error:
            _LOG.warning("what models share is not known anew: %s", error)
        await asyncio.sleep(_REFRESH_SECONDS)


class _Pools(Collector):
    """The buffer pools of the replicas, as they were told last."""

    def __init__(self) -> None:
        self.stats: dict[str, dict[str, int]] = {}

    def collect(self) -> Iterator[Metric]:
        for name in next(iter(self.stats.values()), {}):
            family = pool_family(name, labels=["replica"])
            for replica, stats in self.stats.items():
                family.add_metric([replica], stats[name])
            yield family


#: That of this process, once `Ingress` has made it.
_FRONTS: list[Front] = []


class Answering:
    """The application that Ray Serve is given, before there is a front to answer.

    It has no state: Ray pickles it. Newer ones take a function that makes an application as well.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        await _FRONTS[-1](scope, receive, send)

    def add_exception_handler(self, error: object, handler: object) -> None:
        """Do nothing: some of Ray call it on any application, and a front lets no error out."""


class Ingress:
    """What Ray Serve starts; `ray.serve.ingress` gives it `Front` to answer with."""

    def __init__(
        self,
        handle: Any,
        source: Secret,
        token: Secret | None,
        options: ServeOptions,
        family_bytes: int | None,
    ) -> None:
        adapter = connect_store(reveal(source), mode="r")
        families = None
        if family_bytes is not None:
            families = Families(adapter, family_bytes)
            families.refresh()
        gate = Gate(None if token is None else check_token(reveal(token), "the token"))
        log = AccessLog() if options.access_log else None
        self._adapter, self._log = adapter, log
        _FRONTS.append(Front(handle, families, options, gate, log, adapter.url))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._adapter.close()
