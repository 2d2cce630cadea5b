# SPDX-License-Identifier: Apache-2.0
"""The documents of ``--json`` are what docs/cli.md says, name by name, and all that is printed."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.cli.errors import Exit
from pydedup.graph import Graph, Node
from pydedup.testing.program import run_here

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")

#: What is run, after which item of the page it is named.
COMMANDS = {
    "add": ["add models.db c@1 w.npz d@1 w.npz"],
    "load": ["load models.db net", "load models.db net --tensor w"],
    "load -o": ["load models.db net -o out.npz"],
    "export": ["export models.db net out.safetensors"],
    "predict": ["predict models.db net x.npy"],
    "predict -o": ["predict models.db net x.npy -o y.json"],
    "score": ["score models.db --model net --into t --query QUERY --on-error skip"],
    "ls": ["ls models.db", "ls models.db net"],
    "info": ["info models.db net", "info models.db net --tensors"],
    "stats": ["stats models.db"],
    "stats --by": ["stats models.db --by tenant"],
    "explain": ["explain models.db net"],
    "diff": ["diff models.db net other"],
    "report": ["report models.db"],
    "alias": ["alias models.db net prod 1", "alias models.db net prod --delete"],
    "copy": ["copy models.db copy.db"],
    "backup": ["backup models.db models.backup"],
    "restore": ["restore models.backup restored.db"],
    "verify": ["verify models.db"],
    "refill": ["refill models.db"],
    "vacuum": ["vacuum models.db --dry-run", "vacuum models.db"],
    "quota SIZE": ["quota models.db tenant=a 1GB"],
    "quota": ["quota models.db"],
    "quota --delete": ["quota models.db tenant=a --delete"],
    "rm": ["rm models.db other --yes"],
    "kernels": ["kernels"],
}
#: What takes a server, which other tests start.
ELSEWHERE = {"top", "sql install", "sql show", "sql uninstall"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store of two models, and a table beside them."""
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    weights = np.arange(8192, dtype=np.float32).reshape(64, 128)
    graph = Graph(
        inputs=("x",), outputs=("y",), nodes=(Node("linear", ("x",), "y", {"weight": "w"}),)
    )
    with pydedup.open("models.db") as store:
        for name in ("net", "other"):
            store.add(name, {"w": weights}, graph=graph, metadata={"tenant": "a"})
            weights = weights + np.eye(64, 128, dtype=np.float32)
    with closing(sqlite3.connect("models.db")) as connection, connection:
        connection.execute("CREATE TABLE f (id INTEGER PRIMARY KEY, x TEXT)")
        rows = [(1, json.dumps([0.5] * 128)), (2, None)]
        connection.executemany("INSERT INTO f VALUES (?, ?)", rows)
    np.savez("w.npz", w=weights)
    np.save("x.npy", np.ones((2, 128), np.float32))
    return tmp_path


def described() -> dict[str, dict[str, Any]]:
    """Return what the page says of the document of each command: names, and what is below them."""
    found = {}
    for item in re.findall(r"^- (`.*(?:\n  .*)*)", PAGE, re.MULTILINE):
        commands, _, fields = item.partition(":")
        for command in re.findall(r"`([^`]+)`", commands):
            found[command] = fields_of(
                iter(re.findall(r"`[^`]+`|[()]", fields.partition("(as ")[0]))
            )
    return found


def fields_of(words: Iterator[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    name = ""
    for word in words:
        if word == ")":
            break
        if word == "(":
            fields[name] = fields_of(words)
        elif not word.startswith("`-"):  # an option that brings what stands before it
            name = word.strip("`")
            fields[name] = None
    return fields


def check(value: Any, fields: dict[str, Any], where: str) -> None:
    optional = {name.rstrip("?[]{}") for name in fields if "?" in name}
    wanted = {name.rstrip("?[]{}") for name in fields}
    assert wanted - optional <= set(value) <= wanted, where
    for name, below in fields.items():
        plain = name.rstrip("?[]{}")
        held = value.get(plain)
        if held is None:
            continue
        kind = list if "[]" in name else dict if "{}" in name else (str, int, float, bool, dict)
        assert isinstance(held, kind), f"{where}.{plain}"
        for one in held if "[]" in name else held.values() if "{}" in name else [held]:
            if below:
                check(one, below, f"{where}.{plain}")


def test_each_document_is_as_described(folder: Path) -> None:
    pages = described()
    assert set(pages) == set(COMMANDS) | ELSEWHERE
    pages["ls"]["store"] = {name: below for name, below in pages["stats"].items() if name != "url"}
    for item, lines in COMMANDS.items():
        for line in lines:
            words = [word.replace("QUERY", "SELECT id, x FROM f") for word in line.split(" ")]
            done = run_here(*words, "--json")
            assert done.returncode == (1 if item == "diff" else 0), done.stderr
            assert done.stdout.isascii()
            check(json.loads(done.stdout), pages[item], line)


def test_each_status_is_described() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [(str(status.value), status.meaning) for status in Exit]


def test_adds_tell_what_is_kept_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a version with a tokenizer of 5 MB, "36 B new" was all that was said."""
    monkeypatch.chdir(tmp_path)
    for name, n_bytes in (("large", 2 << 20), ("small", 1000)):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_bytes(bytes(n_bytes))
        done = run_here("add", "models.db", f"{name}@1", name)
        assert (f"{name}@1: 2.0 MiB beside its weights" in done.stdout) == (name == "large")
        done = run_here("add", "models.db", f"{name}@2", name, "--json")
        (report,) = json.loads(done.stdout)["models"]
        # With the layout of the folder, which is kept once more.
        assert n_bytes < report["artifact_bytes"] < n_bytes + 1000
        assert report["stored_artifact_bytes"] < 1000 + n_bytes * (name == "small")
