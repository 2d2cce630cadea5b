# SPDX-License-Identifier: Apache-2.0
"""``pydedup serve --on``: what it says of who may use the server, and why it does not start."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.cli import main
from pydedup.ray.cluster import Secret
from pydedup.ray.serving import running
from pydedup.ray.serving.source import models
from pydedup.testing.program import PROGRAM, run_process

from .conftest import Cluster

TOKEN = "token-0815"
INTERRUPTED = "pydedup: interrupted, the store is as it was before"


@pytest.mark.parametrize(
    ("address", "open_to"),
    [
        ("http://0.0.0.0:8000", "0.0.0.0"),
        ("https://[::]:8000", "::"),
        ("http://127.0.0.1:8000", None),
        ("http://[::1]:8000", None),
        ("http://localhost:8000", None),
        ("http://127.8.0.1:8000", None),
        ("http://localhost.example:8000", "localhost.example"),
        ("http://127.example:8000", "127.example"),
    ],
)
@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_server_that_all_may_use_is_told(
    address: str,
    open_to: str | None,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of plain ``serve``; of the address that Ray Serve has, which others may have begun."""

    def run(*given: Any, **_: Any) -> None:
        started: Callable[[str, list[str]], None] = given[3]
        started(address, ["m"])

    monkeypatch.setattr(running, "run", run)
    monkeypatch.delenv("PYDEDUP_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("PYDEDUP_TOKEN", token)
    assert main(["serve", "sqlite:///m.db", "--on", "auto", "--host", "127.0.0.1"]) == 0
    out, err = capsys.readouterr()
    assert address in out
    warned = f"pydedup: anybody who can reach {open_to} may use this server; PYDEDUP_TOKEN sets a"
    if open_to is None or token is not None:
        assert err == ""
    else:
        assert warned in err


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'm.db'}"
    with pydedup.open(url) as store:
        store.add("m@1", {"w": np.ones((2, 2), np.float32)})
    return url


def test_a_port_that_is_taken_is_told_before_ray_begins(url: str) -> None:
    """Also by another Ray Serve, which shares it: the two had each some of the requests."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        done = run_process("serve", url, "--on", "local", "--port", str(port))
    said = f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another port"
    assert (done.returncode, done.stderr) == (4, f"pydedup: error: {said}\n")


def test_a_store_that_is_missing_is_told_before_ray_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the words and the status of plain ``serve``; a worker told it, after some 15 seconds."""
    monkeypatch.setattr(running, "attached", None)
    missing = tmp_path / "none.db"
    assert main(["serve", f"sqlite:///{missing}", "--on", "local", "--port", "0"]) == 3
    said = f"there is no file {missing}; `pydedup add` creates one"
    assert capsys.readouterr().err == f"pydedup: error: {said}\n"
    # Of a cluster's machine that has none, a worker tells the command.
    assert models(Secret(f"sqlite:///{missing}")) == said


@pytest.mark.long
def test_why_it_does_not_start_is_told_in_a_line(url: str) -> None:
    code = (
        "import socket, sys; from pydedup.cli import main; from pydedup.ray.serving import running;"
        "running.listen = lambda *_: socket.socket(); sys.exit(main(sys.argv[1:]))"
    )
    options = ["--on", "local", "--replicas", "1", "--host", "a..b", "--port", "0"]
    command = [sys.executable, "-P", "-c", code, "serve", url, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    told = done.stderr.splitlines()[-1]
    assert told.startswith("pydedup: error: Ray Serve does not start it: ")
    assert "a..b" in told
    assert "File" not in told


def test_one_that_waits_for_cpus_can_be_stopped(url: str, cluster: Cluster, connected: Any) -> None:
    """It took no notice of any signal until the cluster had them."""

    def is_served() -> bool:
        named = connected.util.list_named_actors(all_namespaces=True)
        return any(actor["name"].startswith("SERVE_REPLICA::pydedup#") for actor in named)

    options = ["--on", cluster.address, "--replicas", "5", "--port", "0"]
    with subprocess.Popen([*PROGRAM, "serve", url, *options], stderr=subprocess.PIPE) as serving:
        try:
            end = time.monotonic() + 100
            while not is_served():
                assert time.monotonic() < end
                time.sleep(0.1)
            serving.terminate()
            _, said = serving.communicate(timeout=100)
        finally:
            serving.kill()
    told = said.decode().splitlines()
    assert (serving.returncode, told[-1]) == (128 + signal.SIGTERM, INTERRUPTED)
    assert not is_served()
