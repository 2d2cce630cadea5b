# SPDX-License-Identifier: Apache-2.0
"""Hostile requests to a real server: each gets an answer below 500, or its connection is closed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from http.client import HTTPException
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.testing.serving import Server

ENTRY = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
JSON_BODY = json.dumps({"id": "a", "inputs": [{**ENTRY, "data": [1, 2, 3, 4]}]}).encode()
HEAD = json.dumps({"inputs": [{**ENTRY, "parameters": {"binary_data_size": 16}}]}).encode()
BINARY_BODY = HEAD + np.ones(4, np.float32).tobytes()
LENGTH = "Inference-Header-Content-Length"
FUZZ = settings(max_examples=150)


def is_alive(server: Server) -> bool:
    return server.process.poll() is None and server.infer("dense", JSON_BODY).status == 200


def check(answer: Any) -> None:
    assert 200 <= answer.status < 500, answer.body
    if answer.status >= 400:
        assert answer.error


@FUZZ
@given(
    at=st.integers(0, len(BINARY_BODY)),
    new=st.binary(max_size=4),
    cut=st.integers(0, 4),
    slip=st.sampled_from([0, 0, 0, 1, -1, -100, 10**9, None]),
    binary=st.booleans(),
)
def test_spoilt_requests(
    server: Server, at: int, new: bytes, cut: int, slip: int | None, binary: bool
) -> None:
    body = BINARY_BODY if binary else JSON_BODY
    body = body[:at] + new + body[at + cut :]
    headers = {LENGTH: str(len(HEAD) + slip)} if binary and slip is not None else {}
    check(server.infer("dense", body, headers=headers))


@FUZZ
@given(
    shape=st.lists(st.integers(-1, 6) | st.integers(0, 2**65), max_size=5),
    datatype=st.sampled_from(["FP32", "FP64", "INT64", "UINT8", "BOOL", "BF16", "BYTES", "FP8"]),
    data=st.lists(
        st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers(0, 60))
    ),
    model=st.sampled_from(["dense", "words", "bags"]),
    names=st.lists(st.sampled_from(["x", "ids", "offsets"]), min_size=1, max_size=3, unique=True),
)
def test_any_tensor_for_any_model(
    server: Server, shape: list[int], datatype: str, data: list[Any], model: str, names: list[str]
) -> None:
    entries = [{"name": n, "datatype": datatype, "shape": shape, "data": data} for n in names]
    check(server.infer(model, {"inputs": entries}))


@FUZZ
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
    model=st.sampled_from(["dense", "words", "bags"]),
)
def test_any_fitting_tensor_for_any_model(
    server: Server, shape: list[int], data: st.DataObject, model: str
) -> None:
    count = int(np.prod(shape))
    numbers = data.draw(st.lists(st.integers(-60, 60), min_size=count, max_size=count))
    names = {"dense": ["x"], "words": ["ids"], "bags": ["ids", "offsets"]}[model]
    kind = data.draw(st.sampled_from(["INT64", "INT8", "FP32"]))
    entries = [{"name": n, "datatype": kind, "shape": shape, "data": numbers} for n in names]
    check(server.infer(model, {"inputs": entries}))


@FUZZ
@given(
    path=st.text(st.sampled_from("/v2modelsinferready%0025FF.@é?#: -"), max_size=40),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
)
def test_any_path(server: Server, path: str, method: str) -> None:
    raw = f"{method} /v2/models/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(raw.encode())
        status = connection.recv(12)
    assert status.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), status


def test_bytes_that_are_hardly_http(server: Server) -> None:
    chance = random.Random(0)
    good = (
        b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(JSON_BODY), JSON_BODY)
    )
    for number in range(400):
        spoilt = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(spoilt))
            spoilt[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        with (
            socket.create_connection(("127.0.0.1", server.port), 10) as connection,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),
        ):
            connection.sendall(spoilt)
            connection.shutdown(socket.SHUT_WR)
            status = connection.recv(12)
            assert status == b"" or status.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), spoilt
        if number % 100 == 0:
            assert is_alive(server)
    assert is_alive(server)


def test_requests_that_stop_in_the_middle(server: Server) -> None:
    good = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        len(JSON_BODY),
        JSON_BODY,
    )
    for at in range(0, len(good), 7):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(good[:at])
    assert is_alive(server)
    assert server.metric("pydedup_body_bytes") == 0


def test_upgrades_and_other_protocols(server: Server) -> None:
    for text in (
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://other/v2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/0.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                status = connection.recv(12)
                assert status == b"" or status.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), text
    assert is_alive(server)


def test_hostile_json(server: Server) -> None:
    deep = b"[" * 1_000_000
    bodies = [
        deep,
        b'{"inputs":' * 100_000,
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":' + deep + b"}]}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[' + b"[" * 300_000,
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":['
        + b"1," * 500_000
        + b"1]}]}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":['
        + b" " * 500_000
        + b"]}]}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":["'
        + b"a" * 500_000
        + b'"]}]}',
        b"{" + b",".join(b'"k%d":1' % n for n in range(200_000)) + b"}",
        b'{"inputs":[' + b",".join([b'{"data":[' + b"1," * 3000 + b"1]}"] * 50) + b"]}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1e999999,1,1,1]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[%s,1,1,1]}]}'
        % (b"9" * 10_000),
        b'{"data":' * 30_000 + b"[1]",
        b'"data":[1' * 30_000,
        b"\xef\xbb\xbf{}",
        b"\x00" * 100_000,
    ]
    for body in bodies:
        with contextlib.suppress(HTTPException, ConnectionError):
            check(server.infer("dense", body))
    assert is_alive(server)
