# SPDX-License-Identifier: Apache-2.0
"""What the program says and how it ends when something is wrong: one line, a status, no secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing.program import PROGRAM, clean_environment, run_here, run_process

from .conftest import path_of

Run = Callable[..., subprocess.CompletedProcess[str]]


def fail(*arguments: object, status: int, run: Run = run_here, **options: Any) -> str:
    """Run a command that must fail with one line on standard error, and return the line."""
    done = run(*arguments, **options)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert re.fullmatch(r"pydedup: error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().isprintable()
    return done.stderr


# ---- 2: usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lst"], "did you mean 'ls'"),
        (["sqlite:///m.db", "ls"], "pydedup COMMAND STORE ...; see 'pydedup --help'"),
        (
            ["predict", "m.db", "a", "--outptu", "x"],
            "no option '--outptu'; did you mean '--output'?",
        ),
        (["load", "m.db", "a", "--tenso", "x"], "did you mean '--tensor'? See 'pydedup load --h"),
        (["load", "m.db", "a", "--zzz"], "no option '--zzz'; see 'pydedup load --help'"),
        (
            ["sql", "instal", "m.db"],
            "no command 'instal'; did you mean 'install'? See 'pydedup sql",
        ),
        (["sql", "sqlite:///m.db", "show"], "pydedup sql COMMAND STORE ...; see 'pydedup sql --h"),
        (["--wrong"], "--wrong"),
        (["add"], "see 'pydedup add --help'"),
        (["ls"], "STORE"),
        (["add", "m.db", "name"], "pairs"),
        (["add", "m.db", "a", __file__, "a", __file__], "named twice"),
        (["add", "m.db", "a", __file__, "--metadata", "novalue"], "KEY=VALUE"),
        (["add", "m.db", "a", __file__, "--metadata", "{bad"], "JSON"),
        (["add", "m.db", "a", __file__, "--block-shape", "0x8"], "ROWSxCOLUMNS"),
        (["add", "m.db", "a", __file__, "--policy", "loose"], "loose"),
        (["add", "m.db", "a", __file__, "--memory", "lots"], "'--memory': 'lots' is not a size"),
        (["serve", "m.db", "--memory", "1"], "'--memory': '1' is too little memory for a store: g"),
        (["copy", "a.db", "b.db", "--memory", "3MiB"], "two stores; give 4MiB or more"),
        (["serve", "m.db", "--max-body", "lots"], "'--max-body': 'lots' is not a size"),
        (["verify", "m.db", "--evaluate", "a", "f"], "'--evaluate': 'f' is not MODULE:FUNCTION"),
        (["add", "m.db", __file__, "a"], "the name comes before the file"),
        (["alias", "m.db", "a", "prod"], "--delete"),
        (["vacuum", "m.db", "--grace", "-1"], "grace"),
        (["load", "m.db", "a", "-o", "x.onnx"], ".npz"),
        (["load", "m.db", "a", "-o", "x.npy"], "--tensor"),
        (["load", "m.db", "a", "-o", "-"], "--tensor"),
        (["load", "m.db", "a", "-t", "v", "-t", "w"], "2 are given; name one, or leave it out"),
        (["load", "m.db", "a", "-t", "w", "-o", "-", "--json"], "and --json a document"),
        (["load", "m.db", "a", "--dtype", "f33"], "f33"),
        (
            ["load", "m.db", "a", "--dtype", "int8"],
            "no dtype of floats 'int8'; choose one of: f64, f32",
        ),
        (["export", "m.db", "a", "x", "--format", "gguf"], "gguf"),
        (["export", "m.db", "a", "-"], "'PATH': this is not written to standard output"),
        (["backup", "m.db", "-"], "'FILE': this is not written to standard output"),
        (["predict", "m.db", "a", "x.npy", "y.npy"], "INPUT="),
        (["predict", "m.db", "a", "x.npy", "-o", "y.txt"], ".json"),
        (["predict", "m.db", "a", "[[1, 2]]"], "'[[1, 2]]' is none; give '-'"),
        (["predict", "m.db", "a", f"x={[1] * 999}"], "inputs come from files: '[1, 1, 1, "),
        (["ls", "oracle://db"], "oracle"),
        (["ls", "sqlite://host/m.db"], "sqlite:///"),
    ],
)
def test_usage(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in fail(*arguments, status=2, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_imported_is_no_fault_of_ours(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    line = fail("verify", "m.db", "--evaluate", "a", "broken:f", status=2, cwd=tmp_path)
    assert "'--evaluate': importing 'broken' failed: ZeroDivisionError: division by zero" in line


def test_a_group_without_a_command_shows_its_help() -> None:
    """Its help was squeezed into the one line of an error."""
    done = run_here("sql")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_here("sql", "--help").stdout
    assert "  install " in done.stdout


def test_values_that_the_store_refuses(url: str) -> None:
    assert "--all-versions" in fail("rm", url, "m", status=2)
    assert "alias" in fail("alias", url, "m", "1", "2", status=2)
    assert "size" in fail("explain", url, "m", "--memory", "-5", status=2)
    assert "two-tone" in fail(
        "kernels", env={"PYDEDUP_KERNEL": "two-tone"}, status=2, run=run_process
    )


@pytest.mark.parametrize(
    "name", ["", " outer", "a@b@c", "line\nbreak", "bell\x07", "e\u0301", "x" * 300]
)
def test_names_that_cannot_be(name: str, kept: str, model: Path) -> None:
    fail("add", kept, name, model, status=2)


@pytest.mark.skipif(sys.platform != "linux", reason="arguments are bytes on Linux alone")
def test_a_name_that_is_no_text(kept: str) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for env, said in (
        ({"PYTHONUTF8": "1"}, b"not utf-8; write it so"),  # it spoke of surrogate pairs
        (ascii_only, b"not ascii; take a locale of UTF-8, as LC_ALL=C.UTF-8"),
    ):
        done = subprocess.run(
            [*map(os.fsencode, PROGRAM), b"info", kept.encode(), b"\xff"],
            capture_output=True,
            check=False,
            env={**os.environ, **env},
        )
        assert done.returncode == 2
        assert done.stderr.startswith(b"pydedup: error: ")
        assert done.stderr.count(b"\n") == 1
        assert said in done.stderr


def test_names_that_look_hostile_are_names(url: str, model: Path) -> None:
    names = [
        "a'b\"; DROP TABLE pydedup_models; --",
        *("模型 é 🙂", "[red]x[/red]", "-v", "../../etc", "%s{}\\n"),
    ]
    pairs = [word for name in names for word in (f"{name}@1", model)]
    add = run_here("add", url, "--", *pairs)
    assert add.returncode == 0, add.stderr
    listed = run_here("ls", url, "--json")
    assert listed.stdout.isascii()
    models = [found["model"] for found in json.loads(listed.stdout)["models"]]
    for name in names:
        assert f"{name}@1" in add.stdout
        assert f"{name}@1" in models
        assert run_here("info", url, "--", name).stdout.startswith(f"{name}@1\n")
    assert run_here("rm", url, "--", names[0]).stdout.startswith(f"removed {names[0]}@1\n")
    assert run_here("verify", url).returncode == 0


def test_names_from_files_cannot_steer_the_terminal(url: str, tmp_path: Path) -> None:
    hostile = {"a\u202eb": np.zeros(3, np.float32), "[bold]b[/bold]": np.zeros(3, np.float32)}
    save_file(hostile, tmp_path / "h.safetensors")
    assert run_here("add", url, "h", tmp_path / "h.safetensors").returncode == 0
    shown = run_here("info", url, "h", "--tensors").stdout
    assert "\\u202e" in shown
    assert "\u202e" not in shown
    assert "[bold]b[/bold]" in shown
    name = json.loads(run_here("info", url, "h", "--tensors", "--json").stdout)["tensors"][0][
        "name"
    ]
    assert name in hostile
    assert "\x1b" not in fail("info", url, "--", "\x1b[31m", status=2)


# ---- 3: not found -------------------------------------------------------------------------------


def test_not_found(kept: str, tmp_path: Path) -> None:
    assert "did you mean 'm'" in fail("info", kept, "mm", status=3)
    source = "https://example.org/m.safetensors"
    assert f"'{source}' is a URL; download" in fail("add", kept, "n", source, status=3)
    for command in (
        *(("load", kept, "x"), ("export", kept, "x", tmp_path / "x.npz"), ("rm", kept, "x")),
        *(("explain", kept, "x"), ("diff", kept, "m@1", "m@7"), ("ls", kept, "x")),
        *(("alias", kept, "m", "prod", "7"), ("alias", kept, "m", "prod", "--delete")),
        *(("load", kept, "m", "-t", "v"), ("predict", kept, "m", tmp_path / "none.npy")),
    ):
        fail(*command, status=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["ls"], ["rm", "m"], ["vacuum"], ["alias", "m", "a", "1"]])
def test_a_mistyped_store_is_not_created(command: list[str], tmp_path: Path) -> None:
    fail(command[0], "sqlite:///typo.db", *command[1:], status=3, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_file_that_is_missing_is_not_found(kept: str, tmp_path: Path) -> None:
    """It was 2, 3 or 4, by command and option."""
    for command, said in (
        (("add", "m.db", "n", "none.npz"), "no file or folder 'none.npz'"),
        (("predict", kept, "m", "none.npy"), "'none.npy'"),
        (("verify", kept, "--repair-from", "none.npz"), "none.npz does not exist"),
        (("verify", kept, "--repair-from", "sqlite:///none.db"), "there is no file"),
        (("report", kept, "--trace", "none.npz"), "--trace: there is no file 'none.npz'"),
        (("top", "http://127.0.0.1:1", "--token-file", "none"), "--token-file: there is no file"),
        (("restore", "none.bak", "m.db"), "there is no such backup: there is no file"),
        (("copy", "none.db", "m.db"), "none.db; `pydedup add` creates one"),
        (
            ("score", kept, "--source", "none.db", "--model", "m", "--query", "q", "--into", "t"),
            "none.db that is to be read and written",
        ),
    ):
        assert said in fail(*command, status=3, cwd=tmp_path), command
    assert list(tmp_path.iterdir()) == []


def test_a_url_is_no_backup_and_begins_no_store(kept: str, tmp_path: Path) -> None:
    """The store to restore into was created, and stayed."""
    said = fail("restore", kept, "m.db", status=2, cwd=tmp_path)
    assert "FILE must be the path of a file, not a URL" in said
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_followed_is_not_called_missing(kept: str, tmp_path: Path) -> None:
    """A file in a folder that was closed to the user was said not to be there; so is this one."""
    tmp_path.joinpath("loop").symlink_to("loop")
    for command in (
        ("add", "m.db", "n", "loop/m.npz"),
        ("report", kept, "--trace", "loop/m.npz"),
        ("predict", kept, "m@1", "loop/m.npz"),
    ):
        said = fail(*command, status=5, cwd=tmp_path)
        assert "'loop/m.npz' cannot be read: Too many levels of symbolic links" in said
    assert not tmp_path.joinpath("m.db").exists()


def test_a_store_behind_the_name_is_told(kept: str, tmp_path: Path) -> None:
    said = f"the store comes first: {kept!r} 'm@1'"
    assert said in fail("info", "m@1", kept, status=2, cwd=tmp_path)
    assert said in fail("diff", "m@1", kept, "m@2", status=2, cwd=tmp_path)
    said = f"the store comes first: {str(path_of(kept))!r} 'm@1'"
    assert said in fail("rm", "m@1", path_of(kept), status=2, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_creates_no_store(tmp_path: Path) -> None:
    assert "nothing.npz" in fail("add", "new.db", "m", "nothing.npz", status=3, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_no_model_creates_no_store(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    part = model.read_bytes()[:-1]
    contents = {"empty.npz": b"", "t.txt": b"hello\n", "x.npz": b"no zip", "x.safetensors": part}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        fail("add", "new.db", "a", model, "b", tmp_path / name, status=5, cwd=folder)
    fail("add", "new.db", "a", model, "b@1@2", model, status=2, cwd=folder)
    assert list(folder.iterdir()) == []


# ---- 4: the store -------------------------------------------------------------------------------


def test_stores_that_are_not_ours(model: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.db").write_bytes(b"no database at all" * 1000)
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection, connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    for name in ("noise.db", "other.db"):
        before = (tmp_path / name).read_bytes()
        fail("ls", tmp_path / name, status=4)
        fail("add", tmp_path / name, "m", model, status=4)
        fail("add", tmp_path / name, "m", model, "--dry-run", status=4)
        assert (tmp_path / name).read_bytes() == before
    assert "is a folder; name a file in it" in fail("add", tmp_path, "m", model, status=4)
    # The store after the model: its file was "in no format that pydedup knows".
    other = tmp_path / "other.db"
    assert "is a SQLite database, maybe a store" in fail("add", model, "m", other, status=5)


@pytest.mark.parametrize(
    "command",
    [
        ["export", "STORE", "m", "STORE", "--format", "npz"],
        ["load", "STORE", "m", "-o", "STORE"],
        ["report", "STORE", "-o", "STORE"],
        ["serve", "STORE", "--port", "0", "--record", "STORE"],
    ],
    ids=lambda command: command[0],
)
def test_no_output_replaces_a_store(command: list[str], kept: str, tmp_path: Path) -> None:
    """`pydedup report STORE -o STORE` wrote its page in the place of all models."""
    if command[0] in ("report", "serve"):
        pytest.importorskip({"report": "jinja2", "serve": "uvicorn"}[command[0]])
    store = tmp_path / "store.npz"
    shutil.copy(kept.removeprefix("sqlite:///"), store)
    words = [str(store) if word == "STORE" else word for word in command]
    assert "is a SQLite database, maybe a store; choose another" in fail(*words, status=2)
    with pydedup.open(store, mode="r") as reopened:
        assert reopened.verify().ok
        assert [info.address for info in reopened.models()] == ["m@1", "m@2"]


def test_a_store_of_a_newer_schema(url: str) -> None:
    with closing(sqlite3.connect(path_of(url))) as connection, connection:
        connection.execute("UPDATE pydedup_meta SET value = '99' WHERE name = 'schema_version'")
    assert "newer" in fail("ls", url, status=4)


def test_damage_is_found_and_said(url: str) -> None:
    with closing(sqlite3.connect(path_of(url))) as connection, connection:
        ((page, payload),) = connection.execute("SELECT id, payload FROM pydedup_pages LIMIT 1")
        broken = bytearray(payload)
        broken[len(broken) // 2] ^= 1
        connection.execute("UPDATE pydedup_pages SET payload = ? WHERE id = ?", (broken, page))
    done = run_here("verify", url)
    assert done.returncode == 1
    assert f"damaged: page {page}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("DAMAGED (1 page of ")
    found = run_here("verify", url, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["ok"] is False
    fail("load", url, "m@1", status=4)


def test_a_mistyped_kernel_is_no_fault_of_what_is_computed(kept: str, tmp_path: Path) -> None:
    """Such as a page, a layer or a row: with ``skip`` all rows were left out, with status 0."""
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("m", {"w": np.ones((2, 3), np.float32)}, graph=graph)
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    with closing(sqlite3.connect(tmp_path / "m.db")) as rows:
        rows.execute("CREATE TABLE scores (k PRIMARY KEY, prediction_0, prediction_1)")
        rows.commit()
    query = ["--query", "SELECT 1 AS k, 2, 3, 4", "--into", "scores", "--on-error", "skip"]
    for words in (
        ["verify", kept],
        ["verify", kept, "--json"],
        ["predict", tmp_path / "m.db", "m", tmp_path / "x.json"],
        ["score", tmp_path / "m.db", "--model", "m", *query],
        ["copy", kept, tmp_path / "new.db"],
    ):
        said = fail(*words, status=2, run=run_process, env={"PYDEDUP_KERNEL": "foo"})
        assert said.startswith("pydedup: error: PYDEDUP_KERNEL: kernel 'foo' is unknown")
    assert not (tmp_path / "new.db").exists()


# ---- 5 and 6: files, duplicates -----------------------------------------------------------------


def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status was 2, and 5 of all other extras."""
    for module in ("psycopg", "pydedup.adapters.postgres"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'pydedup[postgres]'" in fail("ls", "postgresql://host/db", status=5)


def test_a_file_that_was_cut_off(url: str) -> None:
    """`pydedup verify` itself said to run `pydedup verify`."""
    path = path_of(url)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert "says no more than this, the file cannot be read" in fail("verify", url, status=4)


def test_bad_model_files(url: str, model: Path, tmp_path: Path) -> None:
    bad = {
        "cut.safetensors": model.read_bytes()[:-100],
        "text.txt": b"hello\n",
        "code.pkl": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
        "empty.npz": b"",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        fail("add", url, "bad", tmp_path / name, status=5, cwd=tmp_path)
    fail("add", url, "good@1", model, "bad@1", tmp_path / "cut.safetensors", status=5)
    fail("predict", url, "m", tmp_path, status=5)
    (tmp_path / "in.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    fail("predict", url, "m", tmp_path / "in.npy", status=5)
    fail("predict", url, "m", "-", input="[1, 2", status=5)
    (tmp_path / "in.txt").write_bytes(b"\x08\0\0\0\xff\xff\xff\xff")
    line = fail("predict", url, "m", tmp_path / "in.txt", status=5)
    assert line.endswith("in.txt is neither .npy, .npz nor JSON: it is no text\n")
    fail("export", url, "m", tmp_path / "m.unknown", status=5)
    assert not (tmp_path / "pwned").exists()
    listed = json.loads(run_here("ls", url, "--json").stdout)["models"]
    assert [found["model"] for found in listed] == ["m@1", "m@2"]
    assert run_here("verify", url).returncode == 0


def test_duplicate(url: str, model: Path) -> None:
    assert "m@1" in fail("add", url, "m@1", model, status=6, run=run_process)


# ---- secrets, tracebacks, faults ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "postgresql://ann:s3cret@host/db"],
        ["ls", "oracle://ann:s3cret@host/db"],
        ["postgresql://ann:s3cret@host/db", "ls"],
        ["ls", "a.db", "b", "mysql://ann:s3cret@host/db"],
        ["ls", "mysql://host/db?password=s3cret"],
        ["ls", "mysql://ann:s3cret@/half@host/db"],
    ],
)
@pytest.mark.parametrize("traceback", ["0", "1"])
def test_credentials_are_never_printed(
    arguments: list[str], traceback: str, tmp_path: Path
) -> None:
    done = run_here(*arguments, env={"PYDEDUP_TRACEBACK": traceback}, cwd=tmp_path)
    assert done.returncode in (2, 4)
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "rest", "status"),
    [
        ("export", ["m"], 2),
        ("report", ["-o"], 2),
        ("backup", [], 2),
        ("load", ["m", "-o"], 2),
        ("serve", ["--record"], 2),
        ("predict", ["m"], 3),
    ],
)
def test_a_url_in_the_place_of_a_file_shows_no_password(
    kept: str, command: str, rest: list[str], status: int
) -> None:
    """It was told as a path, with one slash."""
    done = run_here(command, kept, *rest, "postgresql://ann:s3cret@host/db.npz")
    assert (done.returncode, done.stdout) == (status, "")
    assert "s3cret" not in done.stderr


def test_a_traceback_when_it_is_asked_for(kept: str) -> None:
    done = run_process("info", kept, "x", env={"PYDEDUP_TRACEBACK": "1"})
    assert done.returncode == 3
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-1].startswith("pydedup: error: no model 'x'")


def test_where_there_are_no_more_threads(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was reported as a fault of pydedup."""

    def refuse(*_: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    name = "_start_joinable_thread"  # since Python 3.13
    if not hasattr(threading, name):
        name = "_start_new_thread"
    monkeypatch.setattr(threading, name, refuse)
    assert "`ulimit -u`" in fail("verify", kept, status=4)


def test_a_fault_of_ours_asks_to_be_reported(kept: str) -> None:
    code = (
        "import sys, pydedup\n"
        "def broken(self): raise KeyError('a\\nb')\n"
        "pydedup.Store.stats = broken\n"
        "from pydedup.cli import main\n"
        f"sys.exit(main(['stats', {kept!r}]))"
    )
    for value, lines in (("0", 1), ("1", None)):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            env=clean_environment({"PYDEDUP_TRACEBACK": value}),
            check=False,
        )
        assert done.returncode == 70
        assert "please report it" in done.stderr.splitlines()[-1]
        assert lines is None or len(done.stderr.splitlines()) == lines
        assert ("Traceback" in done.stderr) == (value == "1")
