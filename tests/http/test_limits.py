# SPDX-License-Identifier: Apache-2.0
"""Limits of a real server: bodies, answers, queues, time, headers."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing.serving import Busy, Server, Start, until

GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def words_body(*shape: int, binary: bool = True) -> tuple[bytes, dict[str, str]]:
    """A request of a byte for each id; with one in a row, an answer has 17 bytes for it."""
    entry = {"name": "ids", "datatype": "UINT8", "shape": shape}
    size = int(np.prod(shape))
    head = json.dumps(
        {
            "inputs": [{**entry, "parameters": {"binary_data_size": size}}],
            "parameters": {"binary_data_output": binary},
        }
    )
    return head.encode() + bytes(size), {"Inference-Header-Content-Length": str(len(head))}


def head_of(model: str, body: bytes, headers: dict[str, str]) -> bytes:
    """What is sent before a body, by who speaks HTTP himself."""
    lines = [f"POST /v2/models/{model}/infer HTTP/1.1", "Host: x"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode()


def test_a_body_that_is_too_large(start: Start, store_url: str) -> None:
    server = start(store_url, "--max-body", "100KiB")
    answer = server.infer("dense", b" " * 102_401)
    assert answer.status == 413
    assert "102400" in answer.error
    assert server.infer("dense", {**GOOD, "id": "a" * 100}).status == 200
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        # It is refused by its length, before it is sent; and one without a length when it is sent.
        head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\n"
        connection.sendall(head + b"Content-Length: 99999999999999\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(20):
                connection.sendall(b"2000\r\n" + b" " * 8192 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"
    assert server.metric("pydedup_body_bytes") == 0


def test_a_queue_that_is_full(start: Start, held_url: str, busy: Busy) -> None:
    server = start(held_url, "--max-queue", 1, "--threads", 1)
    with ThreadPoolExecutor(8) as pool:
        with busy(server) as first:
            asked = [pool.submit(server.infer, "dense", GOOD) for _ in range(8)]
            until(lambda: sum(one.done() for one in asked) == 7)
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status == 503]
    assert len(refused) == 7
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert "wait already" in answer.error
    assert first.result().status == 200
    assert server.infer("dense", GOOD).status == 200


def test_a_request_that_takes_too_long(start: Start, held_url: str, busy: Busy) -> None:
    server = start(held_url, "--timeout", 0.7, "--threads", 1)
    until(lambda: server.infer("dense", GOOD).status == 200)
    with ThreadPoolExecutor(1) as pool:
        with busy(server) as first:
            load = pool.submit(server.ask, "POST", "/v2/repository/models/words/load", b"{}")
            until(lambda: server.metric("pydedup_open_requests") == 3)
            answer = server.infer("dense", GOOD)  # waits for its turn
            assert answer.status == 504
            assert first.result().status == 504
        assert load.result().status == 200  # which takes as long as reading the model does
    until(lambda: server.metric("pydedup_running_batches") == 0)
    assert server.metric("pydedup_queue_requests") == 0
    until(lambda: server.infer("dense", GOOD).status == 200)


@pytest.mark.parametrize("path", ["models/dense/infer", "repository/models/dense/load"])
def test_a_body_that_does_not_come(start: Start, store_url: str, path: str) -> None:
    """That of ``load`` was waited for without end, and counted against those of all others."""
    server = start(store_url, "--timeout", 0.3)
    text = f"POST /v2/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(text.encode())
        said = b"".join(iter(lambda: connection.recv(10_000), b""))  # until the server closes
        assert said.startswith(b"HTTP/1.1 408")
        assert b'"body: not done within 0.3 seconds"' in said
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(text.encode())
    until(lambda: server.metric("pydedup_body_bytes") == 0)


def test_headers_that_do_not_come(start: Start, store_url: str) -> None:
    server = start(store_url, "--timeout", 0.5)
    for text in (b"", b"GET /v2", b"GET /v2 HTTP/1.1\r\nHost: x\r\n"):
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(text)
            assert connection.recv(100) == b""  # it is closed
            assert time.monotonic() - started > 0.4
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        for _ in range(3):  # a byte now and then does not help
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            response = HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            response.read()
            time.sleep(0.6)  # between requests, it may be quiet for longer
        started = time.monotonic()
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 60:
                connection.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - started < 50


def test_an_answer_that_nobody_reads(start: Start, store_url: str) -> None:
    server = start(store_url, "--timeout", 1.5)
    body, headers = words_body(900_000, 1)  # 15 MB of answer, which no buffer on the way holds
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head_of("words", body, headers) + body)
        until(
            lambda: server.metric("pydedup_requests_total", model="words@1", outcome="disconnected")
        )
        assert server.metric("pydedup_open_requests") == 1  # that of the metrics
        assert server.metric("pydedup_body_bytes") == 0


def test_large_bodies_do_not_hold_up_others(start: Start, store_url: str) -> None:
    server = start(store_url)
    rows = 400_000
    body = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [rows, 4],
                    "data": [0.123456] * (4 * rows),
                }
            ]
        }
    ).encode()
    # Each of three bodies would hold up somebody, each time; a busy machine does so now and then.
    told: list[str] = []
    for _ in range(5):
        third, took = third_longest_wait(server, body)
        if third < max(0.1, took / 5):
            return
        told.append(f"{third:.3f} s of {took:.3f} s")
    raise AssertionError(told)


def third_longest_wait(server: Server, body: bytes) -> tuple[float, float]:
    """Return how long others wait while a body is read, three times, and how long each takes."""
    waits: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        connection = server.connect()
        while not stop.is_set():
            started = time.monotonic()
            assert server.ask("GET", "/v2/health/live", connection=connection).status == 200
            waits.append(time.monotonic() - started)
            time.sleep(0.002)
        connection.close()

    asking = threading.Thread(target=ask)
    asking.start()
    started = time.monotonic()
    for _ in range(3):
        assert server.infer("dense", body).status == 200
    took = (time.monotonic() - started) / 3
    stop.set()
    asking.join()
    assert len(waits) > 3
    return sorted(waits)[-3], took


def test_only_so_many_bytes_are_held(start: Start, store_url: str) -> None:
    server = start(store_url, "--max-body", "1MiB")
    head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), 60)
            )
            connection.sendall(head)
        until(lambda: server.metric("pydedup_body_bytes") == 4_000_000)
        answer = server.infer("dense", {**GOOD, "id": "a" * 300_000})
        assert answer.status == 503
        assert "retry-after" in answer.headers
    until(lambda: server.metric("pydedup_body_bytes") == 0)
    assert server.infer("dense", GOOD).status == 200


def test_an_answer_that_is_too_large(start: Start, store_url: str) -> None:
    server = start(store_url, "--max-answer", "100KiB")
    for rows, binary, status in (
        (7000, True, 413),
        (6000, True, 200),
        (6000, False, 413),  # JSON is larger
        (1000, False, 200),
    ):
        body, headers = words_body(rows, 1, binary=binary)
        answer = server.infer("words", body, headers=headers)
        assert answer.status == status
        if status == 413:
            for said in ("102400", "--max-answer", "fewer", "binary"):
                assert said in answer.error
    until(lambda: server.metric("pydedup_answer_bytes") == 0)


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """Give the memory that a server has, looked at again and again; the first is as it began."""
    process = psutil.Process(server.process.pid)
    seen = [process.memory_info().rss]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_a_small_body_does_not_take_much_memory(start: Start, own_url: str) -> None:
    table = {"table": np.ones((200, 768), np.float32)}
    look_up = Node("embedding", ("ids",), "rows", {"weight": "table"})
    graphs = {
        "rows": (look_up, Node("identity", ("rows",), "y")),
        "mean": (look_up, Node("mean", ("rows",), "y", attrs={"axis": 1})),
        "refused": (look_up, Node("reshape", ("rows",), "y", attrs={"shape": [7, 7]})),
    }
    with pydedup.open(own_url) as store:
        for name, nodes in graphs.items():
            store.add(name, table, graph=Graph(("ids",), ("y",), nodes))
    server = start(own_url, "--memory", "16MiB")
    # 614 MB of outputs; and between layers, of one row, and before it shows that it does not fit.
    shapes = {"rows": (200_000, 1), "mean": (1, 200_000), "refused": (200_000, 1)}
    with watched(server) as seen:
        for name, shape in shapes.items():
            body, headers = words_body(*shape)
            answer = server.infer(name, body, headers=headers)
            assert answer.status == 413, name
            assert "fewer or shorter rows" in answer.error
        body, headers = words_body(2000, 100)  # 614 MB between layers, in pieces
        assert server.infer("mean", body, headers=headers).status == 200
    assert max(seen) - seen[0] < 64 << 20


@pytest.mark.parametrize("wrong", ["model", "name", "outputs", "answer"])
def test_nothing_stays_of_a_request_that_fails(start: Start, store_url: str, wrong: str) -> None:
    server = start(store_url)
    size = 48 << 20
    head: dict[str, Any] = {
        "inputs": [
            {
                "name": "a" if wrong == "name" else "ids",
                "datatype": "UINT8",
                "shape": [size, 1],
                "parameters": {"binary_data_size": size},
            }
        ]
    }
    if wrong == "outputs":
        head["outputs"] = 5
    text = json.dumps(head).encode()
    body, headers = text + bytes(size), {"Inference-Header-Content-Length": str(len(text))}
    with watched(server) as seen:
        for _ in range(8):  # one at a time
            answer = server.infer("no" if wrong == "model" else "words", body, headers=headers)
            assert answer.status == {"model": 404, "answer": 413}.get(wrong, 400)
    assert max(seen) - seen[0] < 4 * size


def test_only_so_many_bytes_of_answers_are_held(start: Start, store_url: str) -> None:
    server = start(store_url, "--max-answer", "16MiB")
    body, headers = words_body(900_000, 1)
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # whose answers nobody reads
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), 60)
            )
            connection.sendall(head_of("words", body, headers) + body)
        until(lambda: server.metric("pydedup_answer_bytes") == 4 * 17 * 900_000)
        answer = server.infer("words", body, headers=headers)
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert server.infer("dense", GOOD).status == 200
    until(lambda: server.metric("pydedup_answer_bytes") == 0)
    assert server.infer("words", body, headers=headers).status == 200


@pytest.mark.parametrize("line", [b"", b"X: " + b"a" * 70_000, b"X: y\r\n" * 20_000 + b"X: y"])
def test_headers_that_are_too_large_are_told(server: Server, line: bytes) -> None:
    """Whether or not they end in the bytes that come together."""
    path = b"/v2" if line else b"/" + b"a" * 70_000
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % (path, line))
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 431")
    assert answer.endswith(b'{"error":"the headers have more than 65536 bytes"}')


def test_headers_that_never_end(server: Server) -> None:
    for text in (b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 100_000, b"GET /" + b"a" * 1_000_000):
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(text)
            answer = b"".join(iter(lambda: connection.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 431")  # also while the client was still sending
    assert server.infer("dense", GOOD).status == 200


def test_a_database_that_goes_away(start: Start, own_postgres: Any) -> None:
    url = own_postgres.new_place()
    with pydedup.open(url) as store:
        graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
        store.add("dense@1", {"w": np.ones((3, 4), np.float32)}, graph=graph)
    server = start(url, "--timeout", 100)  # it tries for ten seconds, each time
    assert server.infer("dense", GOOD).status == 200
    own_postgres.kill()
    answer = server.ask("GET", "/v2/health/ready")
    assert answer.status == 503
    assert "retry-after" in answer.headers
    assert answer.error
    answer = server.infer("dense", GOOD)
    assert answer.status == 503
    assert answer.error == "the database cannot be reached; try again soon"
    until(lambda: server.errors)
    assert "Error: postgresql:" in server.errors[0]  # the log says more
    assert server.ask("GET", "/v2/health/live").status == 200
    assert server.metric("pydedup_requests_total", model="", outcome="unavailable") == 1
    own_postgres.start()
    until(lambda: server.ask("GET", "/v2/health/ready").status == 200)
    assert server.infer("dense", GOOD).status == 200


def test_a_database_that_is_restored_under_a_server(start: Start, tmp_path: Path) -> None:
    """Pages in memory are of models that are lost: it says so, and is ready no more."""
    live, dump = tmp_path / "store.db", tmp_path / "dump.db"
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))

    def add(name: str, value: float) -> None:
        with pydedup.open(live) as store:
            store.add(name, {"w": np.full((3, 4), value, np.float32)}, graph=graph)

    def copy(source: Path, target: Path) -> None:
        with (
            contextlib.closing(sqlite3.connect(source)) as read,
            contextlib.closing(sqlite3.connect(target)) as written,
        ):
            read.backup(written)

    add("first", 1.0)
    copy(live, dump)
    server = start(str(live))
    add("lost", 2.0)
    for name in ("first", "lost"):
        assert server.infer(name, GOOD).status == 200
    copy(dump, live)
    add("twin", 1.0)  # has the number of the model that is lost, and no page
    add("new", 3.0)
    assert server.infer("first", GOOD).status == 200
    assert server.ask("GET", "/v2/health/ready").status == 200
    assert server.infer("new", GOOD).status == 503
    until(lambda: any("restored to what they were earlier" in line for line in server.errors))
    assert server.ask("GET", "/v2/health/ready").status == 503
    assert server.ask("GET", "/v2/health/live").status == 200
