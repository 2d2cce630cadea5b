# SPDX-License-Identifier: Apache-2.0
"""``pydedup serve --on``: what it says of who may use the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pydedup.cli import main
from pydedup.ray.serving import running

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
    warned = f"pydedup: everybody who reaches {open_to} may use this server; PYDEDUP_TOKEN sets a"
    if open_to is None or token is not None:
        assert err == ""
    else:
        assert warned in err
