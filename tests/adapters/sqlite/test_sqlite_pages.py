# SPDX-License-Identifier: Apache-2.0
"""SQLite's own pages: small ones in a new file, large ones once much is to be written."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.adapter_options import ExpectingAdapter
from pydedup.errors import ReadOnlyError
from pydedup.policies import Exact

from .conftest import add_pages, open_store
from .test_sqlite import ask

MIB = 1 << 20
SMALL, LARGE = 16384, 65536


def expect(adapter: Adapter, nbytes: int) -> None:
    assert isinstance(adapter, ExpectingAdapter)
    adapter.expect(nbytes)


def shape(path: Path) -> tuple[int, int, str]:
    names = ("page_size", "auto_vacuum", "journal_mode")
    page_size, auto_vacuum, journal_mode = (ask(path, f"PRAGMA {name}") for name in names)
    return page_size, auto_vacuum, journal_mode


def test_a_new_store_is_small(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", {"w": np.ones((4, 4), np.float32)})
    assert path.stat().st_size < 400_000


def test_a_file_that_much_is_written_to_gets_large_pages(adapter: Adapter, path: Path) -> None:
    ids = add_pages(adapter, 2)
    before = dict(adapter.read_pages(ids))
    expect(adapter, 32 * MIB)
    assert shape(path) == (LARGE, 2, "wal")
    assert ask(path, "PRAGMA integrity_check") == "ok"
    assert ask(path, "PRAGMA application_id") == int.from_bytes(b"pydd", "big")
    assert dict(adapter.read_pages(ids)) == before
    assert add_pages(adapter, 2) == [ids[-1] + 1, ids[-1] + 2]  # no id is given again
    inode = path.stat().st_ino
    expect(adapter, 1 << 40)  # has them already
    assert (path.stat().st_ino, shape(path)) == (inode, (LARGE, 2, "wal"))


def test_ids_of_deleted_pages_are_not_given_again(adapter: Adapter, path: Path) -> None:
    ids = add_pages(adapter, 2)
    with adapter.transaction():
        adapter.delete_pages(ids)
    expect(adapter, 64 * MIB)
    assert shape(path)[0] == LARGE
    assert add_pages(adapter, 1) == [ids[-1] + 1]


@pytest.mark.parametrize(("pages", "nbytes"), [(0, 32 * MIB - 1), (5, 40 * MIB), (33, 1 << 40)])
def test_little_beside_what_is_there_changes_nothing(
    pages: int, nbytes: int, adapter: Adapter, path: Path
) -> None:
    if pages:
        add_pages(adapter, pages)
    expect(adapter, nbytes)
    assert shape(path) == (SMALL, 2, "wal")


def test_a_file_with_tables_of_the_user_stays(adapter: Adapter, path: Path) -> None:
    """Rows without a key of their own would get other numbers."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE mine (x); INSERT INTO mine VALUES (1), (2), (3);"
            "DELETE FROM mine WHERE x = 2"
        )
        rows = connection.execute("SELECT rowid, x FROM mine").fetchall()
    expect(adapter, 1 << 40)
    assert shape(path) == (SMALL, 2, "wal")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT rowid, x FROM mine").fetchall() == rows


def test_a_file_of_several_names_stays(adapter: Adapter, path: Path) -> None:
    """It was written anew by one of them, whose journal and lock the others do not see."""
    adapter.checkpoint()
    before = path.read_bytes()
    path.with_name("other.db").hardlink_to(path)
    with pytest.raises(ReadOnlyError, match=r"store\.db is one of 2 names"):
        expect(adapter, 1 << 40)
    assert path.read_bytes() == before


def test_a_file_that_another_has_open_stays(adapter: Adapter, path: Path) -> None:
    other = registry.connect(f"sqlite:///{path}", mode="r")
    epoch = other.epoch()
    expect(adapter, 1 << 40)
    assert shape(path) == (SMALL, 2, "wal")
    ids = add_pages(adapter, 2)
    assert other.epoch() == epoch + 1
    assert dict(other.read_pages(ids)).keys() == set(ids)
    other.close()
    expect(adapter, 1 << 40)
    assert shape(path) == (LARGE, 2, "wal")


def test_a_thread_that_reads_keeps_what_it_sees(adapter: Adapter, path: Path) -> None:
    """Its connection is in use; that of a thread that does nothing is closed, and it gets a new."""
    ids = add_pages(adapter, 1)
    begun, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def read() -> None:
        with adapter.snapshot():
            seen.append(adapter.epoch())
            begun.set()
            done.wait(60)
            seen.append(adapter.epoch())
        done.clear()
        begun.set()
        done.wait(60)
        seen.append(len(dict(adapter.read_pages(ids))))

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(60)
    expect(adapter, 1 << 40)
    assert shape(path)[0] == SMALL
    begun.clear()
    done.set()
    begun.wait(60)
    expect(adapter, 1 << 40)
    assert shape(path)[0] == LARGE
    done.set()
    reader.join(60)
    assert seen[0] == seen[1]
    assert seen[2] == 1


def test_in_a_transaction_nothing_happens(adapter: Adapter, path: Path) -> None:
    with adapter.transaction():
        ids = adapter.insert_pages([(bytes(16), b"payload")], state=LIVE)
        expect(adapter, 1 << 40)
    assert dict(adapter.read_pages(ids)).keys() == set(ids)
    assert shape(path)[0] == SMALL


@pytest.mark.parametrize("workers", [1, 3])
def test_an_add(workers: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = {f"w{i}": rng.standard_normal((1024, 1024)).astype(np.float32) for i in range(10)}
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("small", {"w": large["w0"][:64]}, policy=Exact())
        assert ask(path, "PRAGMA page_size") == SMALL
        store.add("large", large, policy=Exact(), workers=workers)
        assert shape(path) == (LARGE, 2, "wal")
        assert store.verify().ok
        assert all(np.array_equal(store.load("large")[name], w) for name, w in large.items())
    with pydedup.open(path, mode="r") as store:
        store.copy_to(tmp_path / "copy.db")
        store.backup(tmp_path / "backup.db")
        store.copy_to(tmp_path / "part.db", "small")
    assert [ask(tmp_path / f"{name}.db", "PRAGMA page_size") for name in ("copy", "backup")] == [
        LARGE,
        LARGE,
    ]
    assert ask(tmp_path / "part.db", "PRAGMA page_size") == SMALL


_EXPECT = """
import sys
from pydedup import registry
adapter = registry.connect("sqlite:///" + sys.argv[1], mode="a")
adapter.epoch()
print("ready", flush=True)
sys.stdin.readline()
adapter.expect(1 << 40)
print("done", flush=True)
sys.stdin.readline()
"""


def test_who_is_killed_meanwhile_leaves_a_whole_store(tmp_path: Path) -> None:
    """At random times, from the first moment to the last; the next who connects goes on."""
    path = tmp_path / "store.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 4)
    pages = dict(adapter.read_pages(ids))
    adapter.close()
    original = path.read_bytes()
    chance, shapes = random.Random(0), set()
    for number in range(12):
        for end in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        path.write_bytes(original)
        with subprocess.Popen(
            [sys.executable, "-c", _EXPECT, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("\n")
            child.stdin.flush()
            if number == 0:
                assert child.stdout.readline() == "done\n"
            else:
                time.sleep(chance.uniform(0, 0.03))
            os.kill(child.pid, signal.SIGKILL)
        if number % 2:
            reading = registry.connect(f"sqlite:///{path}", mode="r")
            assert dict(reading.read_pages(ids)) == pages
            reading.close()
        adapter = registry.connect(f"sqlite:///{path}", mode="a")
        assert adapter.integrity_errors() == []
        assert dict(adapter.read_pages(ids)) == pages
        assert add_pages(adapter, 1) == [ids[-1] + 1]
        adapter.close()
        page_size, auto_vacuum, journal_mode = shape(path)
        assert (auto_vacuum, journal_mode) == (2, "wal")
        shapes.add(page_size)
    assert LARGE in shapes
    assert shapes <= {SMALL, LARGE}
