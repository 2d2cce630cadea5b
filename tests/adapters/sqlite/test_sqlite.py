# SPDX-License-Identifier: Apache-2.0
"""SQLite: the adapter contract, and how the database is set up."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.adapter_options import StagingAdapter
from pydedup.errors import ArgumentError, StoreError
from pydedup.policies import Exact
from pydedup.testing.adapter_contract import AdapterContract

from .conftest import add_pages, open_store

MIB = 1 << 20


class TestSqlite(AdapterContract):
    def make_url(self, folder: Path) -> str:
        return f"sqlite:///{folder}/store.db"

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return f"{url}?timeout={seconds}"

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        path = url.removeprefix("sqlite:///")
        query = f"SELECT {', '.join(columns)} FROM pydedup_{table} ORDER BY 1"  # noqa: S608
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return connection.execute(query).fetchall()


def ask(path: Path, sql: str) -> Any:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchone()[0]


# ---- how it is set up ---------------------------------------------------------------------------


def test_the_file_is_shaped_for_pages(adapter: Adapter, path: Path) -> None:
    assert ask(path, "PRAGMA page_size") == 16384
    assert ask(path, "PRAGMA auto_vacuum") == 2
    assert ask(path, "PRAGMA journal_mode") == "wal"
    assert ask(path, "PRAGMA application_id") == int.from_bytes(b"pydd", "big")
    tables = "SELECT group_concat(sql) FROM sqlite_master WHERE type = 'table'"
    assert ask(path, tables).count("AUTOINCREMENT") == 3
    with contextlib.closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.Error):
        connection.execute("UPDATE pydedup_meta SET value = x'00'")  # STRICT


def test_an_empty_database_of_another_shape_is_adopted(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; VACUUM")
    assert ask(path, "PRAGMA page_size") == 4096
    assert path.stat().st_size > 0
    open_store(path).close()
    assert ask(path, "PRAGMA page_size") == 16384
    assert ask(path, "PRAGMA auto_vacuum") == 2


def synced(adapter: Adapter) -> int:
    return int(adapter._query("PRAGMA synchronous")[0][0])  # type: ignore[attr-defined]


def test_every_connection_syncs_commits(adapter: Adapter) -> None:
    found: list[int] = []

    def look() -> None:
        with adapter.transaction():
            found.append(synced(adapter))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2, 2, 2]  # FULL


def test_checkpoints_are_synced_whatever_the_library_is_built_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def careless(*args: Any, **settings: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **settings)
        connection.execute("PRAGMA synchronous = OFF")  # SQLITE_DEFAULT_SYNCHRONOUS=0
        return connection

    monkeypatch.setattr(sqlite3, "connect", careless)
    with pydedup.open(f"sqlite:///{path}") as store:
        found: list[int] = []
        reader = threading.Thread(target=lambda: found.append(synced(store._adapter)))
        reader.start()
        reader.join()
    assert found == [2]


def test_what_is_staged_is_synced_with_what_publishes_it(adapter: Adapter) -> None:
    assert isinstance(adapter, StagingAdapter)
    with adapter.staging():
        assert synced(adapter) == 1  # NORMAL
        adapter.set_meta("staged", "yes")
    with pytest.raises(ZeroDivisionError), adapter.staging():
        adapter.set_meta("staged", str(1 // 0))
    with pytest.raises(StoreError), adapter.staging(), adapter.transaction():
        pass
    for scope in (adapter.publishing, adapter.transaction):
        with scope():
            assert synced(adapter) == 2
            assert adapter.meta()["staged"] == "yes"
        with adapter.staging():
            assert synced(adapter) == 1


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that SQLite is told from now on."""
    said: list[str] = []
    connect = sqlite3.connect

    def told(*args: Any, **settings: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **settings)
        connection.set_trace_callback(said.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", told)
    return said


def test_versions_are_not_listed_once_for_each(path: Path, statements: list[str]) -> None:
    # With thousands of versions of a model, that took nearly all of the time.
    def listings() -> int:
        start = "SELECT id, name, version"
        found = [said for said in statements if said.startswith(start) and "name = 'm'" in said]
        statements.clear()
        return sum("LIMIT" not in said for said in found)

    def versions(*numbers: int) -> dict[str, dict[str, NDArray[np.float32]]]:
        return {f"m@{number}": {"w": np.full((4, 4), number, np.float32)} for number in numbers}

    with pydedup.open(f"sqlite:///{path}") as store:
        store.add_many(versions(*range(10)))
        assert listings() == 1
        store.add_many(versions(*range(10, 12)))
        assert listings() == 1
        assert store.load("m")["w"][0, 0] == 11
        assert listings() == 0
        store.copy_to(f"sqlite:///{path}.copy")
        assert listings() == 0
    with pydedup.open(f"sqlite:///{path}.copy") as other:
        assert [info.version for info in other.versions("m")] == [str(i) for i in range(12)]


def test_an_add_ends_with_a_synced_commit(path: Path, statements: list[str]) -> None:
    rng = np.random.default_rng(0)
    with pydedup.open(f"sqlite:///{path}") as store:
        statements.clear()
        store.add("m", {"w": rng.standard_normal((2048, 2048), np.float32)}, policy=Exact())
    mark = "PRAGMA synchronous = "
    modes = [said.removeprefix(mark) for said in statements if said.startswith(mark)]
    assert modes[-1] == "FULL"  # the one that publishes
    assert modes.count("NORMAL") >= 2


def test_capabilities_are_those_of_the_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the library's limit at 16 MiB, the contract's test writes a payload of that size.
    from pydedup.adapters import sqlite

    original = sqlite.open_file

    def limited(*args: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = original(*args)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 16 * MIB)
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 100)
        return connection

    monkeypatch.setattr(sqlite, "open_file", limited)
    adapter = open_store(path)
    try:
        capabilities = adapter.capabilities
        assert 15 * MIB < capabilities.max_payload_bytes < 16 * MIB
        assert capabilities.max_parameters == 100
        assert not capabilities.concurrent_writers
        TestSqlite().test_the_largest_payload(adapter)
        with adapter.transaction():
            adapter.delete_pages([row.id for row in adapter.page_rows()])
        TestSqlite().test_many_values_at_once(adapter)
    finally:
        adapter.close()


def test_publishing_does_not_write_payloads_again(adapter: Adapter, path: Path) -> None:
    log = Path(f"{path}-wal")
    ids = add_pages(adapter, 48, STAGING)
    for state, retired_at in ((LIVE, None), (RETIRED, 1_700_000_000.5), (LIVE, None)):
        adapter.checkpoint()
        assert log.stat().st_size == 0
        with adapter.transaction():
            adapter.bump_epoch()
            adapter.set_page_state(ids, state, retired_at)
        assert log.stat().st_size < 10 * MIB, "48 MiB of payloads were rewritten"
    assert len({payload for _, payload in adapter.read_pages(ids)}) == 48


def test_a_log_that_nobody_settles_is_bounded(adapter: Adapter, path: Path) -> None:
    """A copy of 3,000 small models left 2.4 GiB of it beside a file of 48 MiB."""
    assert isinstance(adapter, StagingAdapter)
    payload, sizes = random.Random(1).randbytes(MIB), []
    for _ in range(160):
        with adapter.staging():
            ids = adapter.insert_pages([(b"c" * 16, payload)], state=STAGING)
        with adapter.publishing():
            adapter.delete_pages(ids)
        sizes.append(Path(f"{path}-wal").stat().st_size)
    assert max(sizes) < 80 * MIB, "4,000 pages of the file are 62.5 MiB"


def test_the_file_shrinks(adapter: Adapter, path: Path) -> None:
    ids = add_pages(adapter, 40)
    adapter.checkpoint()
    assert path.stat().st_size > 40 * MIB
    with adapter.transaction():
        adapter.delete_pages(ids[::2])  # holes: the rest has to be moved
    adapter.compact()
    assert path.stat().st_size < 24 * MIB
    assert Path(f"{path}-wal").stat().st_size == 0
    assert adapter.stored_bytes() == path.stat().st_size
    kept = dict(adapter.read_pages(ids))
    assert kept == {ids[i]: random.Random(i).randbytes(MIB) for i in range(1, 40, 2)}


def test_giving_space_back_takes_little(
    adapter: Adapter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be freed went through the log, so that a full disk stayed full."""
    ids = add_pages(adapter, 60)
    adapter.checkpoint()
    with adapter.transaction():
        adapter.delete_pages(ids[1:])
    log = Path(f"{path}-wal")
    before, sizes = log.stat().st_size, []
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "checkpoint", lambda: sizes.append(log.stat().st_size))
        adapter.compact()
    assert sizes[0] - before < 4 * MIB
    adapter.checkpoint()
    assert path.stat().st_size < 4 * MIB
    assert adapter.integrity_errors() == []


def test_a_busy_reader_does_not_hold_up_a_checkpoint(adapter: Adapter) -> None:
    add_pages(adapter, 1)
    begun, done = threading.Event(), threading.Event()

    def read() -> None:
        with adapter.snapshot():
            begun.set()
            done.wait(30)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert begun.wait(30)
        add_pages(adapter, 1)
        start = time.monotonic()
        adapter.checkpoint()
        assert time.monotonic() - start < 10
    finally:
        done.set()
        thread.join()


# ---- URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlite:///:memory:", "memory"),
        ("sqlite://", "memory"),
        ("sqlite:///", "memory"),
        ("sqlite:///?timeout=1", "memory"),
        ("sqlite://models.db", "sqlite:////absolute.db"),
        ("sqlite://host/models.db", "sqlite:////absolute.db"),
        ("sqlite:///x.db?mode=ro", "'mode'"),
        ("sqlite:///x.db?timeout=soon", "soon"),
        ("sqlite:///x.db?timeout=-1", "-1"),
        ("sqlite:///x.db?timeout=nan", "nan"),
        ("sqlite:///x.db?timeout=", "timeout="),
        ("sqlite:///x\0.db", "names no file"),
        ("sqlite:///missing/folder/x.db", "missing/folder"),
    ],
)
def test_urls_that_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=complaint):
        registry.connect(url, mode="a")
    assert list(tmp_path.iterdir()) == []


def test_there_are_no_schemas(path: Path) -> None:
    with pytest.raises(ArgumentError, match="mine"):
        registry.connect(f"sqlite:///{path}", mode="a", schema="mine")
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["a b.db", "a%41#b.db", "\N{SNOWMAN}'\".db", "file:x.db", "x" * 200], ids=ascii
)
def test_any_name_of_a_file_will_do(tmp_path: Path, name: str) -> None:
    adapter = open_store(tmp_path / name)
    add_pages(adapter, 1)
    adapter.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    reader = registry.connect(f"sqlite:///{tmp_path / name}", mode="r")
    assert len(reader.page_rows()) == 1
    reader.close()


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.db")
    adapter = open_store(Path(path))
    assert adapter.epoch() == 0
    adapter.close()
    assert Path(path).stat().st_size > 0


def test_a_relative_path_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = registry.connect("sqlite:///here.db", mode="a")
    adapter.create_schema({})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    thread = threading.Thread(target=lambda: add_pages(adapter, 1))  # opens a connection
    thread.start()
    thread.join()
    assert len(adapter.page_rows()) == 1
    adapter.close()
    assert (tmp_path / "here.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []
