# SPDX-License-Identifier: Apache-2.0
"""``pydedup copy``, ``backup`` and ``restore`` as a person, and a program, runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.testing.program import run_here

New = Callable[[str], str]


def run(*words: object, status: int = 0) -> tuple[str, str]:
    done = run_here(*words)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_copy_says_what_it_did(filled: New, new_store: New, assert_same: Any) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    out, err = run("copy", source_url, url, "base", "near@prod")
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["Model", "Size", "New", "bytes", "Blocks", "Shared", "New", "pages"]
    assert lines[1].startswith("base@1 ")
    assert lines[3].startswith("copied 2 models: 1.7 MiB of weights, ")
    assert lines[4].startswith(f"to {url}, read back and checked, in ")
    out, _ = run("copy", source_url, url)
    assert out.count("was there") == 2
    assert "copied 6 models: " in out
    assert "; 2 models were there\n" in out
    out, _ = run("copy", source_url, url)
    assert "copied 0 models; 8 models were there\n" in out
    assert_same(source_url, url)


def test_copy_for_programs(filled: New, new_store: New) -> None:
    source_url, url = filled("sqlite"), new_store("postgres")
    out, _ = run("copy", source_url, url, "near", "--all-versions", "--json")
    document = json.loads(out)
    assert [model["model"] for model in document["models"]] == ["near@1", "near@2"]
    assert {model["status"] for model in document["models"]} == {"copied"}
    assert document["copied"] == 2
    assert document["stored_bytes"] > 0


def test_what_goes_wrong_is_one_line(filled: New, new_store: New, family: Any) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    with pydedup.open(url) as store:
        store.add("near@1", family(20))
    for words, status, said in [
        ((source_url, url), 6, "near@1 (another model)"),
        ((source_url, url, "missing"), 3, "no model 'missing'"),
        ((source_url, url, "near", "--on-conflict", "ask"), 2, "--on-conflict"),
        ((source_url, url, "--all-versions"), 2, "--all-versions goes with a NAME"),
        ((source_url, source_url), 2, "are one store"),
        ((url + "x", url), 3, "there is no file"),
    ]:
        out, err = run("copy", *words, status=status)
        assert out == ""
        assert err.count("\n") == 1
        assert said in err
    out, _ = run("copy", source_url, url, "--on-conflict", "skip")
    assert "left out: its name is taken" in out
    out, _ = run("copy", source_url, url, "near@1", "--on-conflict", "replace")
    assert "in the place of another" in out


@pytest.mark.parametrize("backend", ["sqlite", "mysql"])
def test_backup_and_restore(
    filled: New, new_store: New, tmp_path: Path, assert_same: Any, backend: str
) -> None:
    source_url, url, file = filled(backend), new_store(backend), tmp_path / "all.backup"
    out, err = run("backup", source_url, file)
    assert err == ""
    assert "backed up 8 models" in out
    assert str(file) in out
    _, err = run("backup", source_url, file, status=2)
    assert "--replace" in err
    run("backup", source_url, file, "--replace", "--json")
    out, _ = run("restore", file, url)
    assert "restored 8 models" in out
    assert_same(source_url, url)
    out, _ = run("restore", file, url, "--json")
    assert {model["status"] for model in json.loads(out)["models"]} == {"there"}
    run("rm", url, "base", "-y")
    _, err = run("restore", tmp_path / "missing", tmp_path / "new.db", status=3)
    assert "there is no file" in err
    assert not (tmp_path / "new.db").exists()


INTERRUPTED = """
import os, signal, sys
from pydedup.cli.app import main
from pydedup.moving import copy, together
from pydedup.store import Store
together._MOST_MODELS = 1
original = copy.check_arrival
count = 0
def check(*arguments):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments)
copy.check_arrival = check
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["copy", "backup"])
def test_ctrl_c(
    filled: New, new_store: New, tmp_path: Path, assert_same: Any, command: str
) -> None:
    source_url = filled("sqlite")
    url = new_store("sqlite") if command == "copy" else str(tmp_path / "file")
    words = [sys.executable, "-P", "-c", INTERRUPTED, command, source_url, url]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "run it again to continue" in done.stderr
    assert "Traceback" not in done.stderr
    out, _ = run(command, source_url, url)
    assert "; 2 models were there" in out
    assert_same(source_url, url)
