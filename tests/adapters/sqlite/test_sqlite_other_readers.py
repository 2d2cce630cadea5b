# SPDX-License-Identifier: Apache-2.0
"""The file of an open store, given to what reads and writes files of models.

Whoever closes another handle of it gives up the locks that SQLite has on it in this process.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, UnsupportedFormatError
from pydedup.store import Store

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
