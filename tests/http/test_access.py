# SPDX-License-Identifier: Apache-2.0
"""Tokens, TLS and the access log of a real server, and what it needs to start."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pydedup.testing.program import run_here
from pydedup.testing.serving import Server, Start, until

GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


@pytest.mark.parametrize("place", ["file", "environment"])
def test_token(start: Start, store_url: str, tmp_path: Path, place: str) -> None:
    token = tmp_path / "a token"
    token.write_text("s3cret-token\n")
    server = (
        start(store_url, "--access-log", "--token-file", token)
        if place == "file"
        else start(store_url, "--access-log", env={"PYDEDUP_TOKEN": "s3cret-token"})
    )
    said = f"$(cat '{token}')" if place == "file" else "$PYDEDUP_TOKEN"
    assert f'curl -H "Authorization: Bearer {said}" {server.url}/' in server.hello[2]
    assert server.ask("GET", "/v2/health/live").status == 200
    assert server.ask("GET", "/v2/health/ready").status == 200
    wrong = ["", "Bearer", "Bearer ", "Bearer s3cret", "Bearer s3cret-token2", "Basic s3cret-token"]
    for given in [*wrong, "s3cret-token", "Bearer \xff"]:
        for method, path in (
            ("GET", "/v2"),
            ("GET", "/metrics"),
            ("POST", "/v2/models/dense/infer"),
        ):
            answer = server.ask(method, path, b"{}", {"Authorization": given} if given else {})
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert "s3cret" not in answer.error
    for given in ("Bearer s3cret-token", "bearer s3cret-token"):
        headers = {"Authorization": given}
        assert server.infer("dense", GOOD, headers=headers).status == 200
        assert server.ask("GET", "/metrics", None, headers).status == 200
    assert server.stop() == 0
    assert "s3cret" not in "".join(server.hello)
    until(lambda: len(server.errors) >= 28)
    assert "s3cret" not in "".join(server.errors)


def test_what_cannot_start_says_why(
    store_url: str, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    locked = tmp_path / "locked.key"
    encrypt = ["openssl", "pkey", "-in", certificate[1], "-out", locked, "-aes256"]
    subprocess.run([*encrypt, "-passout", "pass:secret"], check=True)
    cert, key = certificate
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for status, words, arguments in (
            (3, ["no.db"], ["sqlite:///" + str(tmp_path / "no.db")]),
            (4, ["listen", str(port)], [store_url, "--port", port]),
            (4, ["listen on no.invalid, port 8000"], [store_url, "--host", "no.invalid"]),
            (2, ["'a..b' is no name of a host"], [store_url, "--host", "a..b"]),
            (2, ["host is ''", "0.0.0.0"], [store_url, "--host", ""]),  # as of an unset variable
            # An address that nobody has, as it is written in a URL.
            (4, ["listen on 2001:db8::1, port 8000"], [store_url, "--host", "[2001:db8::1]"]),
            (3, ["--token-file", "'none'"], [store_url, "--token-file", "none"]),
            (3, ["--tls-cert"], [store_url, "--tls-cert", "none", "--tls-key", key]),
            (2, ["empty"], [store_url, "--token-file", tmp_path / "empty"]),
            (2, ["latin", "ASCII"], [store_url, "--token-file", tmp_path / "latin"]),
            (2, ["--tls-key"], [store_url, "--tls-cert", cert]),
            (2, ["certificate"], [store_url, "--tls-cert", key, "--tls-key", cert]),
            (2, ["has a password"], [store_url, "--tls-cert", cert, "--tls-key", locked]),
            (2, ["--max-batch"], [store_url, "--max-batch", 0]),
            (2, ["12 parsecs"], [store_url, "--max-body", "12 parsecs"]),
            (2, ["--token"], [store_url, "--token", "abc"]),
        ):
            done = run_here("serve", *arguments)
            assert done.returncode == status, (arguments, done.stderr)
            assert "Traceback" not in done.stderr
            assert all(word in done.stderr for word in words), done.stderr
        # It served, was ready, and called each request wrong.
        command = [sys.executable, "-P", "-m", "pydedup", "serve", store_url, "--port", str(port)]
        for name in ("PYDEDUP_KERNEL", "PYDEDUP_THREADS"):
            env = {**os.environ, name: "none"}
            ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            assert ended.returncode == 2
            assert f"error: {name}: " in ended.stderr
    done = run_here("serve", store_url, env={"PYDEDUP_TOKEN": "has space"})
    assert done.returncode == 2
    assert "has space" not in done.stderr
    assert not (tmp_path / "no.db").exists()


def test_packages_that_are_missing_are_named(store_url: str) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; from pydedup.cli import main; "
        f"sys.exit(main(['serve', {store_url!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "serving needs something that is not installed (import of uvicorn" in done.stderr
    assert "pydedup[serve]" in done.stderr


def test_tls(start: Start, store_url: str, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = start(store_url, "--tls-cert", cert, "--tls-key", key)
    assert server.url.startswith("https://")
    connection = server.connect(trust=cert)
    for _ in range(3):
        answer = server.ask("POST", "/v2/models/dense/infer", GOOD, connection=connection)
        assert answer.status == 200
    connection.close()
    with socket.create_connection(("127.0.0.1", server.port), 60) as plain:
        plain.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP/1.1 200")


def test_access_log(start: Start, store_url: str) -> None:
    server = start(store_url, "--access-log")
    server.infer("dense", GOOD)
    server.infer("none", GOOD)
    server.ask("GET", "/v2/models/%C3%A9%0A?token=a")
    server.infer("dense", {"inputs": [{**GOOD["inputs"][0], "name": "z"}]})
    until(lambda: len(server.errors) >= 4)
    *_, fourth = map(json.loads, server.errors)
    assert (fourth["status"], fourth["model"]) == (400, "dense@2")
    first, second, third = (json.loads(line) for line in server.errors[:3])
    wanted = {"method": "POST", "path": "/v2/models/dense/infer", "status": 200, "model": "dense@2"}
    assert first.items() >= wanted.items()
    assert first["received"] == len(json.dumps(GOOD))
    assert first["ms"] > 0
    assert second["status"] == 404
    assert third["path"] == "/v2/models/%C3%A9%0A"


def test_no_access_log_by_default(server: Server) -> None:
    server.infer("dense", GOOD)
    assert server.errors == []
