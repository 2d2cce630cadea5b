# SPDX-License-Identifier: Apache-2.0
"""``pydedup serve --on``: what it says of who may use the server, and why it does not start."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.cli import main
from pydedup.ray.serving import running
from pydedup.testing.program import run_process

TOKEN = "token-0815"


@pytest.mark.parametrize(
    ("address", "open_to"),
    [
        ("http://0.0.0.0:8000", "0.0.0.0"),
        ("https://[::]:8000", "::"),
        ("http://127.0.0.1:8000", None),
        ("http://[::1]:8000", None),
        ("http://localhost:8000", None),
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


@pytest.mark.parametrize("wrong", ["host", "port"])
def test_why_it_does_not_start_is_told_in_a_line(wrong: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'm.db'}"
    with pydedup.open(url) as store:
        store.add("m@1", {"w": np.ones((2, 2), np.float32)})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--host", "a..b", "--port", "0"] if wrong == "host" else ["--port", str(port)]
        done = run_process("serve", url, "--on", "local", "--replicas", "1", *options)
    assert done.returncode == 4
    said = "a..b" if wrong == "host" else f"127.0.0.1:{port}"
    told = done.stderr.splitlines()[-1]
    assert told.startswith("pydedup: error: Ray Serve does not start it: ")
    assert said in told
    assert "File" not in told
