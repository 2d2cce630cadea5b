# SPDX-License-Identifier: Apache-2.0
"""What the Tab key offers in a shell: stores, and the models, aliases and tensors in them."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.cli import completing
from pydedup.cli.app import main

#: What an interactive bash splits words at.
BREAKS = " \t\n\"'@><=;|&(:"
#: The program, where a machine that is slow does not matter.
PATIENT = (
    "import sys; from pydedup.cli import completing, main; completing._PATIENCE = 60; "
    "sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store, and with files that are none."""
    monkeypatch.chdir(tmp_path)
    with pydedup.open("models.db") as store:
        store.add_many({name: {"w": np.ones(3)} for name in ("net@1", "net@2", "né t", "other@1")})
        store.alias("net", "prod", "1")
    (tmp_path / "models.txt").write_text("no store")
    (tmp_path / "more").mkdir()
    return tmp_path


def offered(
    line: str, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> list[str]:
    """Return what the program tells bash at the end of a line."""
    monkeypatch.setattr(completing, "_PATIENCE", 60)
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_WORDBREAKS", BREAKS)
    monkeypatch.setenv("_PYDEDUP_COMPLETE", "bash_complete")
    assert main([]) == 0
    found = capsysbinary.readouterr()
    assert found.err == b""
    return [line for line in found.out.decode().splitlines() if line]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("pydedup info models.db ", [r"plain,net", r"plain,né\ t", "plain,other"]),
        ("pydedup info sqlite:///models.db o", ["plain,other", "plain,other@1"]),
        ("X=1 pydedup ls models.db net", ["plain,net", *(f"plain,net@{s}" for s in "12"), "prod"]),
        ("pydedup ls models.db net@p", ["plain,@prod"]),
        ("pydedup ls 'models.db' 'net@p", ["plain,net@prod"]),
        ('pydedup ls models.db "né', ["plain,né t", "plain,né t@1"]),
        ("pydedup diff models.db net@1 oth", ["plain,other", "plain,other@1"]),
        ("pydedup score models.db --model ot", ["plain,other", "plain,other@1"]),
        ("pydedup copy models.db x.db other ot", ["plain,other", "plain,other@1"]),
        ("pydedup add models.db other@2 mod", ["file,mod"]),
        ("pydedup add models.db other@2 x.npz ot", ["plain,other", "plain,other@1"]),
        ("pydedup alias models.db net ", ["plain,prod"]),
        ("pydedup alias models.db net prod ", ["plain,1", "plain,2"]),
        ("pydedup load models.db net --tensor ", ["plain,w"]),
        ("pydedup ls sqlite:///mo", ["plain,///models.db", "part,///more/"]),
        ("pydedup restore x.backup 'sqlite:///mod", ["plain,sqlite:///models.db"]),
        ("pydedup ls mod", ["file,mod"]),
        ("pydedup ls missing.db ", []),
        ("pydedup ls models.txt ", []),
        ("pydedup ls nothing://models ", []),
    ],
)
def test_what_is_offered(
    line: str,
    wanted: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    wanted = [word if "," in word else f"plain,net@{word}" for word in wanted]
    assert offered(line, monkeypatch, capsysbinary) == wanted
    assert sorted(path.name for path in folder.iterdir() if "missing" in path.name) == []


def test_versions_are_those_of_one_model_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Whatever the store has beside it, damaged or in thousands."""
    with contextlib.closing(sqlite3.connect("models.db")) as database, database:
        database.execute("UPDATE pydedup_models SET created_at = 1e300 WHERE name = 'other'")
    found = offered("pydedup ls models.db net@", monkeypatch, capsysbinary)
    assert found == ["plain,@1", "plain,@2", "plain,@prod"]
    found = offered("pydedup alias models.db net prod ", monkeypatch, capsysbinary)
    assert found == ["plain,1", "plain,2"]


def test_a_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The shell would hang at the Tab key for as long as a connection is tried."""
    pytest.importorskip("psycopg")
    monkeypatch.setattr(completing, "_PATIENCE", 0.2)
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=3"
        monkeypatch.setenv("COMP_LINE", f"pydedup ls {url} ")
        monkeypatch.setenv("_PYDEDUP_COMPLETE", "bash_complete")
        main([])
    assert ended == [0]


def test_bash_completes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words end at each ':' and '@': no URL, and no version, was completed."""
    (folder / "pydedup").write_text(f"#!/bin/sh\nexec {sys.executable} -P -c '{PATIENT}' \"$@\"\n")
    (folder / "pydedup").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in {
        "PS1": "> ",
        "TERM": "dumb",
        "HISTFILE": "",
        "INPUTRC": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    terminal, inner = pty.openpty()
    command = ["bash", "--norc", "--noprofile", "-i"]
    shell = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    try:
        said(terminal, "> ")
        os.write(terminal, b'eval "$(_PYDEDUP_COMPLETE=bash_source pydedup)"; echo re""ady\n')
        said(terminal, "ready\r\n> ")
        os.write(terminal, b"pydedup ls sqlite:///mod\t")
        said(terminal, "sqlite:///models.db ")
        os.write(terminal, b"net@p\t")
        said(terminal, "net@prod ")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def said(terminal: int, wanted: str) -> None:
    """Wait until a terminal shows something."""
    shown, end = b"", time.monotonic() + 60
    while wanted not in re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\x07", "", shown.decode(errors="replace")):
        assert select.select([terminal], [], [], max(end - time.monotonic(), 0))[0], shown
        shown += os.read(terminal, 4096)
