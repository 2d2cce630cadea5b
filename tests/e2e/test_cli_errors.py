# SPDX-License-Identifier: Apache-2.0
"""What the program says and how it ends when something is wrong: one line, a status, no secrets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.cli import progress
from pydedup.graph import Graph, Node
from pydedup.testing.program import PROGRAM, clean_environment, run_here, run_process

Run = Callable[..., subprocess.CompletedProcess[str]]

#: Run the program where nothing but its output and its status counts.
run_program = run_here


def fail(*arguments: object, status: int, run: Run = run_here, **options: Any) -> str:
    """Run a command that must fail with one line on standard error, and return the line."""
    done = run(*arguments, **options)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert re.fullmatch(r"pydedup: error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().isprintable()
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({"w": np.arange(4096, dtype=np.float32).reshape(64, 64)}, path)
    return path


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of m@1 and m@2 that tests leave as it is."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'kept.db'}"
    with pydedup.open(url) as store:
        store.add("m@1", model)
        store.add("m@2", {"w": np.ones((64, 64), np.float32)})
    return url


@pytest.fixture
def url(kept: str, tmp_path: Path) -> str:
    """A copy of that store, to be changed."""
    path = tmp_path / "copy.db"
    shutil.copy(kept.removeprefix("sqlite:///"), path)
    return f"sqlite:///{path}"


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


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
        (["load", "m.db", "a", "--dtype", "int8"], "loaded as 'int8'; choose one of: f64, f32"),
        (["export", "m.db", "a", "x", "--format", "gguf"], "gguf"),
        (["predict", "m.db", "a", "x.npy", "y.npy"], "INPUT="),
        (["predict", "m.db", "a", "x.npy", "-o", "y.txt"], ".json"),
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
    done = run_program("sql")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_program("sql", "--help").stdout
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
    done = subprocess.run(
        [*map(os.fsencode, PROGRAM), b"info", kept.encode(), b"\xff"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"pydedup: error: ")
    assert done.stderr.count(b"\n") == 1


def test_names_that_look_hostile_are_names(url: str, model: Path) -> None:
    names = [
        "a'b\"; DROP TABLE pydedup_models; --",
        *("模型 é 🙂", "[red]x[/red]", "-v", "../../etc", "%s{}\\n"),
    ]
    pairs = [word for name in names for word in (f"{name}@1", model)]
    add = run_program("add", url, "--", *pairs)
    assert add.returncode == 0, add.stderr
    listed = run_program("ls", url, "--json")
    assert listed.stdout.isascii()
    models = [found["model"] for found in json.loads(listed.stdout)["models"]]
    for name in names:
        assert f"{name}@1" in add.stdout
        assert f"{name}@1" in models
        assert run_program("info", url, "--", name).stdout.startswith(f"{name}@1\n")
    assert run_program("rm", url, "--", names[0]).stdout == f"removed {names[0]}@1\n"
    assert run_program("verify", url).returncode == 0


def test_names_from_files_cannot_steer_the_terminal(url: str, tmp_path: Path) -> None:
    hostile = {"a\u202eb": np.zeros(3, np.float32), "[bold]b[/bold]": np.zeros(3, np.float32)}
    save_file(hostile, tmp_path / "h.safetensors")
    assert run_program("add", url, "h", tmp_path / "h.safetensors").returncode == 0
    shown = run_program("info", url, "h", "--tensors").stdout
    assert "\\u202e" in shown
    assert "\u202e" not in shown
    assert "[bold]b[/bold]" in shown
    name = json.loads(run_program("info", url, "h", "--tensors", "--json").stdout)["tensors"][0][
        "name"
    ]
    assert name in hostile
    assert "\x1b" not in fail("info", url, "--", "\x1b[31m", status=2)


# ---- 3: not found -------------------------------------------------------------------------------


def test_not_found(kept: str, tmp_path: Path) -> None:
    assert "did you mean 'm'" in fail("info", kept, "mm", status=3, run=run_process)
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
        fail("ls", tmp_path / name, status=4, run=run_process)
        fail("add", tmp_path / name, "m", model, status=4)
        fail("add", tmp_path / name, "m", model, "--dry-run", status=4)
        assert (tmp_path / name).read_bytes() == before


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
    done = run_process("verify", url)
    assert done.returncode == 1
    assert f"damaged: page {page}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("DAMAGED: 2 models")
    found = run_program("verify", url, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["ok"] is False
    fail("load", url, "m@1", status=4, run=run_process)


def test_a_mistyped_kernel_is_no_damage(kept: str) -> None:
    for options in ([], ["--json"]):
        mistyped = {"PYDEDUP_KERNEL": "foo"}
        said = fail("verify", kept, *options, status=2, run=run_process, env=mistyped)
        assert "kernel 'foo' is unknown" in said


def test_a_mistyped_kernel_is_no_fault_of_a_layer(tmp_path: Path) -> None:
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("m", {"w": np.ones((2, 3), np.float32)}, graph=graph)
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    words = ("predict", tmp_path / "m.db", "m", tmp_path / "x.json")
    said = fail(*words, status=2, run=run_process, env={"PYDEDUP_KERNEL": "foo"})
    assert said.startswith("pydedup: error: PYDEDUP_KERNEL: kernel 'foo' is unknown")


# ---- 5 and 6: files, duplicates -----------------------------------------------------------------


def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status was 2, and 5 of all other extras."""
    for module in ("psycopg", "pydedup.adapters.postgres"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install -U 'pydedup[postgres]'" in fail("ls", "postgresql://host/db", status=5)


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
    fail("export", url, "m", tmp_path / "m.unknown", status=5, run=run_process)
    assert not (tmp_path / "pwned").exists()
    listed = json.loads(run_program("ls", url, "--json").stdout)["models"]
    assert [found["model"] for found in listed] == ["m@1", "m@2"]
    assert run_program("verify", url).returncode == 0


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
    done = run_program(*arguments, env={"PYDEDUP_TRACEBACK": traceback}, cwd=tmp_path)
    assert done.returncode in (2, 4)
    assert "s3cret" not in done.stdout + done.stderr


def test_a_traceback_when_it_is_asked_for(kept: str) -> None:
    done = run_process("info", kept, "x", env={"PYDEDUP_TRACEBACK": "1"})
    assert done.returncode == 3
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-1].startswith("pydedup: error: no model 'x'")


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


# ---- interrupted, and nobody listening -----------------------------------------------------------


def test_ctrl_c_leaves_the_store_as_it_was(url: str, model: Path) -> None:
    blocker = sqlite3.connect(path_of(url), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # the add has to wait for this one, so it is under way
    code = (
        "import sys; from pydedup.cli import main, progress\n"
        "progress._DELAY_SECONDS, progress._LINE_SECONDS = 0, 0.1\n"  # by itself after 5 s
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "add", f"{url}?timeout=60", "n@1", str(model)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while "matching 100.0 %" not in line:  # then comes what has to wait
        line = process.stderr.readline()
        assert re.match(r"pydedup: \w+", line), line  # progress: not on a terminal, lines
    process.send_signal(signal.SIGINT)
    # It tidies up, for which it must wait for the blocker as well; who is impatient asks again.
    for _ in range(20):
        try:
            out, err = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    blocker.execute("ROLLBACK")
    blocker.close()
    # The last may come when all but the exit of Python is done.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1].startswith(
        "pydedup: interrupted, either everything was added or nothing"
    )
    assert "Traceback" not in err
    assert out == ""
    assert run_program("verify", url).returncode == 0
    listed = json.loads(run_program("ls", url, "--json").stdout)["models"]
    assert [found["model"] for found in listed] == ["m@1", "m@2"]


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_within_a_callback_is_neither_lost_nor_a_traceback(name: str, status: int) -> None:
    """Python ignores what is raised there; it showed that, and the command went on."""
    code = f"""
import os, signal, sys, time, weakref
from pydedup.cli import app, main

class Thing:
    pass

def struck(_):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1_000_000):  # the signal's exception comes at some step of these
        pass

def work(**_):
    thing = Thing()
    seen = weakref.ref(thing, struck)
    del thing
    time.sleep(60)

app.looking.kernels.callback = work
sys.exit(main(["kernels"]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=50
    )
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


@pytest.mark.parametrize("words", ["alias URL m prod 1", "rm URL m@2 -y", "add URL m@3 FILE"])
def test_ctrl_c_when_all_is_done_does_not_deny_it(words: str, url: str, model: Path) -> None:
    """It said that the store was as before, while what prints the result was loaded."""
    code = """
import sys

class Finder:
    def find_spec(self, name, *more):
        if name == "rich":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from pydedup.cli import main
sys.exit(main(sys.argv[1:]))
"""
    given = {"URL": url, "FILE": str(model)}
    arguments = [given.get(word, word) for word in words.split()]
    before = run_program("ls", url, "--json").stdout
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    said = r"pydedup: interrupted, .*(or nothing|may have changed); `pydedup ls` shows \w+\n"
    assert re.fullmatch(said, done.stderr)
    assert run_program("ls", url, "--json").stdout != before


def test_a_command_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file as large as the model stayed, under a hidden name."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("m", {"w": np.random.default_rng(0).standard_normal((8000, 1000))})
    out = tmp_path / "out"
    out.mkdir()
    words = [*PROGRAM, "export", url, "m", str(out / "m.npz")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(out.iterdir()):
            time.sleep(0.001)
        process.terminate()
        _, said = process.communicate()
    if process.returncode:  # it may have been done by then
        assert process.returncode == 143
        assert said == "pydedup: interrupted, the store is as it was before\n"
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("words", ["alias m prod 1", "rm m@2 -y", "quota t=a 5"])
def test_a_change_that_waits_for_another_writer_says_so(
    words: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for half a minute."""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.1)
    command, *rest = words.split()
    with contextlib.closing(sqlite3.connect(path_of(url), isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        done = run_here(command, f"{url}?timeout=1", *rest)
    assert done.returncode == 4
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("pydedup: waiting for the database, which others may be writing to, ")
    assert "database is locked" in last


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of a model whose list of tensors is longer than a pipe holds."""
    url = f"sqlite:///{tmp_path_factory.mktemp('long') / 'long.db'}"
    with pydedup.open(url) as store:
        store.add("many", {f"layer.{n}.weight": np.zeros(1, np.float32) for n in range(2000)})
    return url


@pytest.mark.parametrize("command", ["--help", "info", "info --json", "ls", "load"])
def test_a_reader_that_goes_away_is_no_error(command: str, long: str) -> None:
    url = long
    words = {
        "info": f"info {url} many --tensors",
        "info --json": f"info {url} many --tensors --json",
        "ls": f"ls {url}",
        "load": f"load {url} many -q",
    }.get(command, command)
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(PROGRAM)} {words} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)
    assert done.stdout.count("\n") == 1
    if command in ("info", "info --json", "load"):
        assert done.returncode == 141


def test_standard_error_that_cannot_be_written(kept: str) -> None:
    """The status was 1 then, as if `verify` had found damage."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*PROGRAM, "info", kept, "x"], stderr=full, check=False)
    assert done.returncode == 3
    gone = f"{' '.join(PROGRAM)} info {kept} x 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", gone], check=False).returncode == 3


def test_standard_output_that_cannot_be_written(kept: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "ls", kept], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert re.fullmatch(r"pydedup: error: No space left on device[^\n]*\n", done.stderr)
    closed = subprocess.run(["bash", "-c", f"{' '.join(PROGRAM)} ls {kept} >&-"], check=False)
    assert closed.returncode == 0
