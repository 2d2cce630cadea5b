# SPDX-License-Identifier: Apache-2.0
"""A replica: one store, one buffer pool, the application of `pydedup serve` without its socket."""

from __future__ import annotations

import os
import sys
from typing import Any, TypeAlias

from ray import serve

from pydedup.http.access import Gate
from pydedup.http.app import App
from pydedup.http.options import ServeOptions
from pydedup.http.served import ServedStore
from pydedup.http.server import SWITCH_SECONDS
from pydedup.ray.cluster import Secret, use_threads
from pydedup.ray.serving.source import reveal
from pydedup.words import Replacement

__all__ = ["Answered", "Replica"]

#: Status, headers, body, the model that answered, and what the metrics call it.
Answered: TypeAlias = tuple[int, list[tuple[bytes, bytes]], bytes, str, str]

#: Families that a replica tells Ray it has served, the latest. Not what its pool holds: that goes
#: by the use of pages.
_MOST_FAMILIES = 1000


class Replica:
    """Answers what a front hands on."""

    def __init__(
        self,
        source: Secret,
        memory: int,
        replacement: Replacement,
        options: ServeOptions,
        threads: int,
    ) -> None:
        use_threads(threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._store = ServedStore.connect(reveal(source), memory, replacement)
        # The front has looked at the token, and writes the log.
        self._app = App(self._store, options, Gate(None), None)
        self._name = str(serve.get_replica_context().replica_id.unique_id)

    async def answer(
        self, method: str, raw_path: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Answered:
        """Answer one request, errors included."""
        family = serve.get_multiplexed_model_id()
        if family:
            await self._hold(family)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        scope = {"method": method, "raw_path": raw_path, "headers": headers}
        exchange = self._app.exchange(scope, receive)
        try:
            reply = await self._app.answer(exchange)
        finally:
            exchange.give_back()
        parts = list(reply.parts)
        whole = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        return reply.status, list(reply.headers), whole, exchange.model, exchange.outcome

    def pool_stats(self) -> tuple[str, int, dict[str, int]]:
        """Return who this is, the id of its process, and what its buffer pool counts."""
        return self._name, os.getpid(), self._store.pool_stats()

    @serve.multiplexed(max_num_models_per_replica=_MOST_FAMILIES)  # type: ignore[untyped-decorator,unused-ignore]
    async def _hold(self, family: str) -> str:
        """Have Ray know that this replica serves a family. Its pages are read as they are used."""
        return family

    def __del__(self) -> None:
        if hasattr(self, "_app"):
            self._app.close()
            self._store.close()
