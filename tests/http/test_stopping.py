# SPDX-License-Identifier: Apache-2.0
"""How a real server ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

import pydedup
from pydedup.http.server import stopping_signals
from pydedup.testing.serving import Busy, Start, until

GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def slow(rows: int) -> dict[str, Any]:
    data = np.ones(rows * 512).tolist()
    entry = {"name": "x", "datatype": "FP32", "shape": [rows, 512], "data": data}
    return {"inputs": [entry]}


@pytest.mark.parametrize("number", stopping_signals())
def test_idle(start: Start, store_url: str, number: int) -> None:
    server = start(store_url, "--grace", 600)
    open_one = server.connect()  # it is in use, and idle
    assert server.ask("GET", "/v2", connection=open_one).status == 200
    started = time.monotonic()
    assert server.stop(number) == 0
    assert time.monotonic() - started < 60  # connections may be idle for longer
    open_one.close()
    assert server.errors == []


def test_one_whose_standard_output_is_closed_serves(store_url: str) -> None:
    """As `>&-` in the background; that nobody had its greeting ended it."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    words = [sys.executable, "-P", "-m", "pydedup", "serve", store_url, "--port", str(port)]
    process = subprocess.Popen(
        ["bash", "-c", 'exec "$@" <&- >&-', "bash", *words], stderr=subprocess.PIPE, text=True
    )

    def is_served() -> bool:  # an answer: it listens before it takes signals
        assert process.poll() is None
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v2/health/live") as answer:
            return bool(answer.status == 200)
        return False

    try:
        until(is_served)
        process.terminate()
        assert process.communicate(timeout=60) == (None, "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_requests_under_way_finish_and_new_ones_are_turned_away(
    start: Start, held_url: str, busy: Busy
) -> None:
    server = start(held_url, "--grace", 600)
    kept = server.connect()
    assert server.ask("GET", "/v2", connection=kept).status == 200
    with busy(server) as pending:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/v2/health/ready").status == 503)
        answer = server.ask("POST", "/v2/models/dense/infer", GOOD, connection=kept)
        assert answer.status == 503
        assert "stopping" in answer.error
        assert answer.headers["connection"] == "close"
        assert "retry-after" in answer.headers
        # It ends by a clock of ten ticks a second, of which every tenth sets the date: one that
        # does not wait for requests still answered all of the above before the first of them.
        live = server.ask("GET", "/v2/health/live")
        assert live.status == 200
        date = live.headers["date"]
        until(lambda: server.ask("GET", "/v2/health/live").headers["date"] != date)
        assert not pending.done()
    assert pending.result().status == 200
    kept.close()
    assert server.stop() == 0
    assert server.errors == []


def test_who_sends_a_long_body_hears_that_the_server_stops(
    start: Start, held_url: str, busy: Busy
) -> None:
    """The connection was closed while the body came, and every second client had no answer."""
    server = start(held_url, "--grace", 600)
    with busy(server):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/v2/health/ready").status == 503)
        for _ in range(20):
            answer = server.infer("dense", bytes(3_000_000))
            assert answer.status == 503
            assert "stopping" in answer.error
    assert server.stop() == 0


def test_what_takes_longer_than_the_grace_period_is_cut_off(start: Start, store_url: str) -> None:
    server = start(store_url, "--grace", "0.2", status=130)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.infer, "slow", slow(6000))
        until(lambda: server.metric("pydedup_running_batches"))
        assert server.stop() == 130
        answer = pending.result()
        assert answer.status == 503
        assert "stopped" in answer.error
    assert "cut off 1 request under way" in server.errors[-1]


def test_a_model_that_is_removed_while_it_predicts(start: Start, own_url: str) -> None:
    server = start(own_url)
    with pydedup.open(own_url) as store, ThreadPoolExecutor(1) as pool:
        wanted = store.predict("slow", np.ones((2, 512), np.float32))
        # So that the server need not look any more where the model's blocks are.
        assert server.infer("slow", slow(1)).status == 200
        pending = pool.submit(server.infer, "slow", slow(1500))
        # A batch that runs may not have found the model yet; room for its answer is taken then.
        until(lambda: server.metric("pydedup_answer_bytes"))
        store.remove("slow@1")
        store.vacuum()
        answer = pending.result()
        assert answer.status == 200
        found = np.array(answer.json["outputs"][0]["data"][:512])
        np.testing.assert_allclose(found, wanted[0], rtol=1e-3, atol=1e-5)
    answer = server.infer("slow", slow(1))
    assert answer.status == 404
    assert answer.error
