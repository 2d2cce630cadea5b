# SPDX-License-Identifier: Apache-2.0
"""The front alone: what it says when a replica is full, dies, or takes too long. Without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from pydedup.http.access import Gate
from pydedup.http.options import ServeOptions
from pydedup.ray.cluster import import_ray

import_ray("ray.serve")
exceptions = import_ray("ray.serve.exceptions")
died = import_ray("ray.exceptions").RayActorError

ANSWERED = (200, [(b"content-type", b"text/plain")], b"fine", "m@1", "ok")


class Response:
    """What a call of a deployment returns."""

    def __init__(self, result: Any, calls: list[str]) -> None:
        self._result = result
        self._calls = calls

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self._result is None:
            await asyncio.sleep(30)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def cancel(self) -> None:
        self._calls.append("cancel")


class Handle:
    """A deployment that answers what it was told to, in turn."""

    def __init__(self, *results: Any) -> None:
        self._results = list(results)
        self.calls: list[str] = []

    def options(self, *, method_name: str, multiplexed_model_id: str) -> Handle:
        self.calls.append(f"{method_name} {multiplexed_model_id}".strip())
        return self

    def remote(self, method: str, raw_path: bytes, headers: Any, body: bytes) -> Response:
        self.calls.append(f"{method} {raw_path.decode()} {body.decode()}")
        return Response(self._results.pop(0), self.calls)


class Families:
    """Each name is a family."""

    def key(self, address: str) -> str:
        return f"family of {address}"

    def refresh(self) -> bool:
        return False


Ask = Callable[..., tuple[int, bytes]]


@pytest.fixture
def ask() -> Ask:
    from pydedup.ray.serving.front import Front

    def ask(
        handle: Any, *, root: str = "", action: str = "POST models/m/infer", **options: Any
    ) -> tuple[int, bytes]:
        method, _, place = action.partition(" ")

        async def run() -> tuple[int, bytes]:
            chosen = ServeOptions(**{"timeout": 5.0, **options})
            front = Front(handle, Families(), chosen, Gate(None), None, "x")  # type: ignore[arg-type]
            sent: list[dict[str, Any]] = []

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": b"{}"}

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            path = f"{quote(root)}/v2/{place}".encode()
            scope = {"type": "http", "method": method, "raw_path": path, "headers": []}
            await front({**scope, "root_path": root}, receive, send)
            return sent[0]["status"], b"".join(one["body"] for one in sent[1:])

        return asyncio.run(run())

    return ask


def test_a_request_is_handed_on_by_its_family(ask: Ask) -> None:
    handle = Handle(ANSWERED)
    assert ask(handle) == (200, b"fine")
    assert handle.calls == ["answer family of m", "POST /v2/models/m/infer {}"]


def test_a_prefix_is_taken_off(ask: Ask) -> None:
    handle = Handle(ANSWERED)
    assert ask(handle, root="/of models") == (200, b"fine")
    assert handle.calls[1] == "POST /v2/models/m/infer {}"


def test_replicas_that_die_are_asked_again_three_times(ask: Ask) -> None:
    assert ask(Handle(died(), died(), ANSWERED)) == (200, b"fine")
    status, body = ask(Handle(died(), died(), died(), ANSWERED))
    assert status == 503
    assert "no replica lives long enough" in json.loads(body)["error"]


def test_too_many_requests_are_told_to_come_again(ask: Ask) -> None:
    status, body = ask(
        Handle(exceptions.BackPressureError(num_queued_requests=7, max_queued_requests=7)),
        max_queue=7,
    )
    assert status == 503
    assert "7 requests wait already" in json.loads(body)["error"]


def test_only_so_many_bytes_of_answers_are_held() -> None:
    from pydedup.ray.serving.front import Front

    async def run() -> list[int]:
        handle = Handle(*[ANSWERED] * 6)
        options = ServeOptions(max_answer=4)
        front = Front(handle, Families(), options, Gate(None), None, "x")  # type: ignore[arg-type]
        statuses: list[int] = []
        read = asyncio.Event()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: dict[str, Any]) -> None:
            if "status" in message:
                statuses.append(message["status"])
                if len(statuses) <= 4:
                    await read.wait()

        path = b"/v2/models/m/infer"
        scope = {"type": "http", "method": "POST", "raw_path": path, "headers": []}
        slow = [asyncio.create_task(front(scope, receive, send)) for _ in range(4)]
        while len(statuses) < 4:
            await asyncio.sleep(0)
        await front(scope, receive, send)
        read.set()
        await asyncio.gather(*slow)
        await front(scope, receive, send)
        return statuses

    assert asyncio.run(run()) == [200, 200, 200, 200, 503, 200]


def test_what_takes_too_long_is_cancelled(ask: Ask) -> None:
    handle = Handle(None)
    assert ask(handle, timeout=0.05)[0] == 504
    assert handle.calls[-1] == "cancel"


def test_it_is_not_ready_when_no_replica_answers(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the database is away and the last replica died: who asked waited for `timeout`."""
    assert ask(Handle(ANSWERED), action="GET health/ready") == (200, b"fine")
    monkeypatch.setattr("pydedup.ray.serving.front._READY_SECONDS", 0.05)
    handle = Handle(None)
    status, body = ask(handle, action="GET health/ready", timeout=200.0)
    assert (status, handle.calls[-1]) == (503, "cancel")
    assert "no replica answers" in json.loads(body)["error"]


def test_what_a_replica_raises_is_no_news_for_clients(ask: Ask) -> None:
    status, body = ask(Handle(ValueError("secret")))
    assert (status, json.loads(body)) == (
        500,
        {"error": "a fault of the server; its log says more"},
    )
