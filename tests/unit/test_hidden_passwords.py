# SPDX-License-Identifier: Apache-2.0
"""Tracebacks show no password of a URL, even those that show the variables of each function."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.traceback import Traceback

import pydedup
from pydedup.errors import PydedupError
from pydedup.http.served import ServedStore

_PASSWORD = "hunter2"
# Nobody listens on port 1.
_URLS = [
    f"postgresql://me:{_PASSWORD}@127.0.0.1:1/m",
    f"postgresql://me:{_PASSWORD}@127.0.0.1:1/{'m' * 80}",
    f"postgresql://127.0.0.1:1/m?user=me&password={_PASSWORD}",
    f"postgresql://me:{_PASSWORD}%zz@127.0.0.1:1/m",
    f"postgresql://me:{_PASSWORD}/x@127.0.0.1:1/m",
    f"postgresql://me:{_PASSWORD}@127.0.0.1:1/m?sslmode=none",
    f"postgresql://me:{_PASSWORD}@127.0.0.1:1/m?sslmod=none",
    f"postgresql+shards://me:{_PASSWORD}@127.0.0.1:1/m|127.0.0.1:1/n",
    f"mysql://me:{_PASSWORD}@127.0.0.1:1/m",
    f"mysql://me:{_PASSWORD}@127.0.0.1:1/m?use_pure=true",
    f"mysql://me:{_PASSWORD}/x@127.0.0.1:1/m",
    f"mysql://me:{_PASSWORD}@127.0.0.1:1/m?tls_versions=none",
    f"mysql://me:{_PASSWORD}@127.0.0.1:1/m?foo=1",
    f"unknown://me:{_PASSWORD}@127.0.0.1:1/m",
    f"postgresql:me:{_PASSWORD}@127.0.0.1:1/m",
]


# None of these has the URL in a variable: where a user's own code does, that is shown.
def _open(_: Path) -> object:
    return pydedup.open(os.environ["STORE_URL"])


def _copy(folder: Path) -> object:
    with pydedup.open(folder / "m.db") as store:
        return store.copy_to(os.environ["STORE_URL"])


def _score(folder: Path) -> object:
    with pydedup.open(folder / "m.db") as store:
        return store.score("SELECT 1", "m", into="p", source=os.environ["STORE_URL"])


def _serve(_: Path) -> object:
    return ServedStore.connect(os.environ["STORE_URL"], "64MiB")


def _said(use: Callable[[Path], object], folder: Path) -> str:
    """Return all that may be shown of the error that comes, with variables as rich shows them."""
    try:
        use(folder)
    except PydedupError as error:
        shown = io.StringIO()
        shown.write(repr(error))
        kept = traceback.TracebackException.from_exception(error, capture_locals=True)
        shown.writelines(kept.format())
        told = Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True)
        Console(file=shown, width=400).print(told)
        return shown.getvalue()
    raise AssertionError("it was opened")


@pytest.mark.parametrize(
    ("use", "url"),
    [*((_open, url) for url in _URLS), *((use, _URLS[0]) for use in (_copy, _score, _serve))],
)
def test_no_traceback_shows_a_password(
    use: Callable[[Path], object], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mysql.connector" if url.startswith("mysql") else "psycopg")
    monkeypatch.setenv("STORE_URL", url)
    said = _said(use, tmp_path)
    assert "url = " in said  # variables are shown
    leaks = [line for line in said.splitlines() if _PASSWORD in line]
    assert not leaks, leaks
