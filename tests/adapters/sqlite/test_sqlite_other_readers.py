# SPDX-License-Identifier: Apache-2.0
"""The file of an open store, given to what reads and writes files of models.

Whoever closes another handle of it gives up the locks that SQLite has on it in this process.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, UnsupportedFormatError
from pydedup.store import Store

from .conftest import open_store

WEIGHTS = {"w": np.ones((4, 4), np.float32)}


def add_it(store: Store, path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="is a SQLite database, maybe a store"):
        store.add("x", path)


def add_its_link(store: Store, path: Path) -> None:
    (path.parent / "link").mkdir()
    (path.parent / "link" / "model.pt").symlink_to(path)
    add_it(store, path.parent / "link" / "model.pt")


def add_its_folder(store: Store, path: Path) -> None:
    store.export("first", path.parent / "model.safetensors")
    report = store.add("folder", path.parent)
    assert report.left_out == (path.name, f"{path.name}-shm", f"{path.name}-wal")
    assert not store.artifacts("folder")


def export_there(store: Store, path: Path) -> None:
    with pytest.raises(ArgumentError, match="is a SQLite database, maybe a store"):
        store.export("first", path, format="npz")


@pytest.mark.parametrize("use", [add_it, add_its_link, add_its_folder, export_there])
def test_an_open_store_keeps_its_locks(use: Callable[[Store, Path], None], path: Path) -> None:
    """Another process took itself for the last one then, and deleted the log of this one."""
    code = "import pydedup, sys\nwith pydedup.open(sys.argv[1]) as store: print(store.models())"
    with pydedup.open(path) as store:
        store.add("first", WEIGHTS)
        use(store, path)
        log = Path(f"{path}-wal").stat().st_ino
        subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=True)
        assert Path(f"{path}-wal").stat().st_ino == log


#: A process that gives its locks up, and then lets another one come and go.
CARELESS = """
import subprocess, sys
import numpy as np
import pydedup
from pydedup import registry
from pydedup.errors import UnavailableError

path, when = sys.argv[1:]
visit = [sys.executable, "-P", "-c", "import pydedup, sys; pydedup.open(sys.argv[1]).close()", path]

def lose_the_log():
    open(path, "rb").close()
    subprocess.run(visit, check=True)

def refused(call):
    try:
        call()
    except UnavailableError as error:
        print(error)
    else:
        print("NOT REFUSED")

def weights(value):
    return {"w": np.full((64, 64), value, np.float32)}

def write_over_the_end():
    with adapter.transaction():
        adapter.set_meta("m", "1")
        lose_the_log()

other = pydedup.open(path)
store = pydedup.open(path)
store.add("first", weights(1))
assert other.models()
adapter = registry.connect("sqlite:///" + path, mode="a")
adapter.page_ids("live")
if when == "meanwhile":
    refused(write_over_the_end)
else:
    lose_the_log()
refused(lambda: store.add("second", weights(2)))
refused(lambda: other.remove("first"))
refused(adapter.compact)
refused(lambda: pydedup.open(path))
print(flush=True)
input()
store.close()
"""


@pytest.mark.parametrize("when", ["between", "meanwhile"])
def test_who_lost_the_log_is_told_and_harms_nobody(path: Path, when: str) -> None:
    """It went on to add models to a file without a name, and at its end destroyed what others
    had added."""
    command = [sys.executable, "-P", "-c", CARELESS, str(path), when]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as careless:
        assert careless.stdout is not None
        said = list(takewhile(str.strip, careless.stdout))
        with pydedup.open(path) as store:
            assert [model.name for model in store.models()] == ["first"]
            store.add("third", {"w": np.full((64, 64), 3, np.float32)})
            careless.communicate("go on and end", timeout=60)
            assert careless.returncode == 0
            assert store.verify().errors == []
    assert len(said) == (5 if when == "meanwhile" else 4)
    assert all("gave up its locks" in line and str(path) in line for line in said), said
    with pydedup.open(path) as store:
        assert [model.name for model in store.models()] == ["first", "third"]
        assert store.verify().errors == []
        assert (store.load("third")["w"] == 3).all()


def test_who_lost_the_log_to_rm_is_told(path: Path) -> None:
    code = """
import pathlib, sys
import numpy as np
import pydedup
with pydedup.open(sys.argv[1]) as store:
    store.add("first", {"w": np.ones((4, 4), np.float32)})
    pathlib.Path(sys.argv[1] + "-wal").unlink()
    try:
        store.add("second", {"w": np.zeros((4, 4), np.float32)})
    except pydedup.errors.UnavailableError as error:
        print(error)
"""
    command = [sys.executable, "-P", "-c", code, str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "no longer has the log that this process writes" in said


def test_who_closes_the_store_loses_no_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may, just as a transaction has ended: the log goes with the last one."""
    adapter = open_store(path)
    run = adapter._run  # type: ignore[attr-defined]

    def run_and_close(session: object, sql: str, *rest: object) -> object:
        result = run(session, sql, *rest)
        if sql == "COMMIT":
            adapter.close()
        return result

    monkeypatch.setattr(adapter, "_run", run_and_close)
    with adapter.transaction():
        adapter.set_meta("m", "1")
    assert not Path(f"{path}-wal").exists()
    with closing(open_store(path)) as again:
        assert again.meta()["m"] == "1"


def test_a_store_is_no_file_of_the_model_in_whose_folder_it_lies(tmp_path: Path) -> None:
    """Each version had all of the store so far beside its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    with pydedup.open(folder / "models.db") as store:
        store.add("first", WEIGHTS)
        store.export("first", folder / "model.safetensors")
    with sqlite3.connect(folder / "other.db") as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    with pydedup.open(tmp_path / "new.db") as store:
        assert store.add("m", folder).left_out == ("models.db",)
        assert set(store.artifacts("m")) == {"other.db"}
