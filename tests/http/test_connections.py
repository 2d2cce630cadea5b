# SPDX-License-Identifier: Apache-2.0
"""More connections than a server may have open files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import ssl
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from pydedup.http.tls import Loop
from pydedup.testing.serving import Server, Start

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
OPEN_FILES, CONNECTIONS = 64, 32


def asking(server: Server, stack: contextlib.ExitStack) -> socket.socket:
    """A connection on which half a request has come."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
    head = f"POST /v2/models/dense/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\n\r\n"
    connection.sendall(head.encode() + TEXT[:5])
    return connection


TEXT = json.dumps(BODY).encode()
SIZE = len(TEXT)


def test_connections_leave_files_to_the_store(start: Start, store_url: str) -> None:
    """Each took one until none was left; then no model could be read, and nothing said why."""
    server = start(store_url, "--timeout", 600, open_files=OPEN_FILES)
    with contextlib.ExitStack() as stack:
        busy = [asking(server, stack) for _ in range(CONNECTIONS)]
        for _ in range(CONNECTIONS):
            with socket.create_connection(("127.0.0.1", server.port), 60) as another:
                answer = b"".join(iter(lambda: another.recv(65536), b""))
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"retry-after: 1\r\n" in answer
                assert answer.endswith(b'{"error":"32 connections are open; try again soon"}')
        for connection in busy:
            connection.sendall(TEXT[5:])
            assert connection.recv(12) == b"HTTP/1.1 200"
    server.stop()
    assert "".join(server.errors).count("raise `ulimit -n`") == 1


@pytest.mark.parametrize("is_tls", [False, True])
def test_connections_without_a_request_make_room(
    start: Start, store_url: str, certificate: tuple[Path, Path], is_tls: bool
) -> None:
    """Of TLS each was waited for, 30 s, to say goodbye; no more came in then."""
    cert, key = certificate
    tls = ("--tls-cert", cert, "--tls-key", key) if is_tls else ()
    server = start(store_url, *tls, open_files=OPEN_FILES)
    with contextlib.ExitStack() as stack:
        for _ in range(3 * CONNECTIONS):
            connection: HTTPConnection = stack.enter_context(
                contextlib.closing(server.connect(trust=cert if is_tls else None))
            )
            assert server.infer("dense", BODY, connection=connection).status == 200
    server.stop()
    assert server.errors == []


def test_a_client_that_does_not_begin_with_tls_is_not_waited_for_longer_than_others(
    start: Start, store_url: str, certificate: tuple[Path, Path]
) -> None:
    """Each had a file for a minute; without `--timeout` it is 15 s now."""
    cert, key = certificate
    server = start(store_url, "--timeout", 1, "--tls-cert", cert, "--tls-key", key)
    with socket.create_connection(("127.0.0.1", server.port), 40) as silent:
        assert silent.recv(1) == b""


def test_clients_that_do_not_begin_with_tls_leave_files_to_others(
    start: Start, store_url: str, certificate: tuple[Path, Path]
) -> None:
    """They were not counted among the connections: 64 of them kept all others out for 15 s."""
    cert, key = certificate
    server = start(store_url, "--tls-cert", cert, "--tls-key", key, open_files=OPEN_FILES)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
            for _ in range(2 * OPEN_FILES)
        ]
        with contextlib.closing(server.connect(trust=cert)) as connection:
            assert server.infer("dense", BODY, connection=connection).status == 200
        assert silent[0].recv(1) == b""
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


class Full(socket.socket):
    """A listener for whose first connections there is no file."""

    refusals = 3

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_a_client_of_tls_waits_for_a_file(certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    complaints: list[Any] = []

    async def greet(listener: Full) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, complaint: complaints.append(complaint))
        server = await loop.create_server(asyncio.Protocol, sock=listener, ssl=context)
        port = listener.getsockname()[1]
        transport, _ = await loop.create_connection(
            asyncio.Protocol, "127.0.0.1", port, ssl=trusting
        )
        transport.abort()
        server.close()
        await server.wait_closed()

    with Full() as listener, asyncio.Runner(loop_factory=lambda: Loop(60, 1)) as runner:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        runner.run(greet(listener))
        assert listener.refusals == 0
    assert complaints == []
