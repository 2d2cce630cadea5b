# SPDX-License-Identifier: Apache-2.0
"""What a real server makes of the bytes of a connection: where requests begin and end."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path

import pytest

from pydedup.testing.serving import Server, Start, until

GOOD = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
INDEX = b"POST /v2/repository/index HTTP/1.1\r\n"


def test_pipelined_and_chunked_requests(server: Server) -> None:
    body = json.dumps({"inputs": [GOOD]}).encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:]))
    head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\n"
    one = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    two = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        last = one.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
        connection.sendall(one + two + last)
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = [json.loads(found) for found in re.findall(rb'\{"model_name".*?\]\}\]\}', text)]
    assert len(answers) == 3
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["model_name"] == "dense"


@pytest.mark.parametrize(
    ("behind", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 70_000), b"431"),
        (INDEX + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (INDEX + b"Content-Length: -1\r\n\r\n", b"400"),
        (INDEX + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"501"),
        (INDEX + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", b"501"),
        (INDEX + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}", b"417"),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_is_no_request_is_answered_in_its_turn(
    server: Server, before: int, behind: bytes, status: bytes
) -> None:
    """Its error stood in the place of the answers before it, which never came."""
    body = json.dumps({"inputs": [GOOD]}).encode()
    head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall((head % len(body) + body) * before + behind)
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"] * before + [status]
    assert text.count(b'{"model_name"') == before
    assert text.count(b'{"error"') == 1


@pytest.mark.parametrize("behind", [b"", b"GET", b"garbage\r\n\r\n"])
@pytest.mark.parametrize("requests", [1, 3])
def test_who_sends_no_more_is_answered(server: Server, requests: int, behind: bytes) -> None:
    """As nc does at the end of its input: the connection was closed without an answer."""
    body = json.dumps({"inputs": [GOOD]}).encode()
    head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall((head % len(body) + body) * requests + behind)
        connection.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    refused = [b"400"] if b"\r\n" in behind else []
    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"] * requests + refused
    assert text.count(b'{"model_name"') == requests


def test_who_sends_no_more_within_a_request_is_not_waited_for(server: Server) -> None:
    for sent in (b"GET /v2", b"POST /v2/models/dense/infer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(65536) == b""
    until(lambda: server.metric("pydedup_open_requests") == 1)  # that of the metrics


def test_trailers_are_no_headers(start: Start, store_url: str, tmp_path: Path) -> None:
    """What came with the body was taken for a header, what came later was not."""
    (tmp_path / "token").write_text("abc")
    server = start(store_url, "--token-file", tmp_path / "token")
    body = json.dumps({"inputs": [GOOD]}).encode()
    request = (
        b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n%s\r\n"
    )
    token, other = b"Authorization: Bearer abc\r\n", b"Content-Encoding: gzip\r\n"
    for header, trailer, status in ((token, other, b"200"), (other, token, b"401")):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(request % (header, len(body), body, trailer))
            text = b"".join(iter(lambda: connection.recv(65536), b""))
        assert text.startswith(b"HTTP/1.1 " + status), text


@pytest.mark.parametrize("step", [1, 40, 1 << 20])
def test_an_offer_of_another_protocol_is_passed_over(server: Server, step: int) -> None:
    """Java's client makes one with each request, as long as it is not told to speak HTTP/1.1."""
    body = json.dumps({"inputs": [GOOD]}).encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:]))
    head = (
        b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n"
    )
    one = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    two = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
    none = head.replace(b"POST /v2/models/dense/infer", b"GET /v2") + b"\r\n"
    last = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    sent = one + none + two + one + last
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        for at in range(0, len(sent), step):
            connection.sendall(sent[at : at + step])
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"] * 5
    answers = re.findall(rb'\{"model_name".*?\]\}\]\}', text)
    assert len(answers) == 3
    assert json.loads(answers[0]) == server.infer("dense", body).json
    assert answers[0] == answers[1] == answers[2]


def test_trailers_that_never_end(server: Server) -> None:
    head = b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for trailers in (b"X: y\r\n" * 100_000, b"X: " + b"a" * 1_000_000):
        with (
            socket.create_connection(("127.0.0.1", server.port), 60) as connection,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),
        ):
            connection.sendall(head + b"1\r\n{\r\n0\r\n" + trailers)
            assert connection.recv(12) == b"HTTP/1.1 431"
    assert server.infer("dense", {"inputs": [GOOD]}).status == 200
