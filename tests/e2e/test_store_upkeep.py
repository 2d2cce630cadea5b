# SPDX-License-Identifier: Apache-2.0
"""A store over time: vacuum, verify, damage, read-only media, forks, threads, interrupts."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.adapters._schema import TABLES
from pydedup.errors import ArgumentError, CorruptStoreError, ReadOnlyError, SchemaVersionError
from pydedup.jobs import Job

from .test_store import assert_same, variants


def test_vacuum_repacks_to_low_read_amplification(store: pydedup.Store) -> None:
    models = variants(6, rows=30000)
    for name, model in models.items():
        store.add(name, model, policy=policies.Exact())
    for name in list(models)[:3]:
        store.remove(name)
        del models[name]
    report = store.vacuum()
    assert report.stored_bytes_after < report.stored_bytes_before
    for name, model in models.items():
        assert_same(store.load(name), model)
        info = store.info(name)
        assert info.pages <= max(1.1 * info.least_pages, info.least_pages + 1)
    assert store.verify().errors == []
    assert store.verify().notes == []
    assert store.vacuum().repacked_pages == 0, "a second vacuum has nothing to do"


def test_pages_of_small_models_become_one(store: pydedup.Store) -> None:
    """Each reads one page, as few as it can, and there are far too many of them."""
    rng = np.random.default_rng(0)
    models = {f"m{n}": {"w": rng.standard_normal((64, 64), np.float32)} for n in range(8)}
    for name, model in models.items():
        store.add(name, model)
    assert (store.stats().pages, store.vacuum().repacked_pages, store.stats().pages) == (8, 1, 1)
    for name, model in models.items():
        assert_same(store.load(name), model)


def test_removing_everything_gives_the_space_back(store: pydedup.Store, tmp_path: Path) -> None:
    empty = store.stats().stored_bytes
    store.add_many(variants(4, rows=20000))
    full = store.stats().stored_bytes
    for info in store.models():
        store.remove(info.address)
    store.vacuum()
    assert store.stats().pages == 0
    assert store.stats().stored_bytes < empty + 0.1 * full


def test_nothing_is_left_of_what_was_removed(url: str) -> None:
    """Nor of an add that died: rows of the similarity index stayed unseen, and grew for ever."""
    models = variants(3, rows=2000)
    with pydedup.open(url) as store:
        store.add_many(models, metadata={"tenant": "x"})
        store.add("last", models["tenant-0"])
        store.alias("last", "prod", "1")
        with store._adapter.transaction():
            Job(store._adapter, "add").beat()
        store.alias("last", "prod", None)
        for info in store.models():
            store.remove(info.address)
        store.vacuum(lease_seconds=0)
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        tables = {table: f"SELECT COUNT(*) FROM pydedup_{table}" for table in TABLES}  # noqa: S608
        left = {table: connection.execute(sql).fetchone()[0] for table, sql in tables.items()}
    assert {table for table, count in left.items() if count} == {"meta"}


def test_what_waits_for_a_vacuum_is_a_note(store: pydedup.Store) -> None:
    store.add("gone", {"w": np.ones((3, 3))})
    store.remove("gone")
    assert store.verify().notes == ["1 retired page"]  # it said "1 retired pages"


def test_read_only_media(url: str, tmp_path: Path) -> None:
    model = {"w": np.arange(100.0)}
    with pydedup.open(url) as store:
        store.add("m", model)
    path = tmp_path / "store.db"
    before = path.read_bytes()
    names = sorted(p.name for p in tmp_path.iterdir())
    with pydedup.open(url, mode="r") as store:
        assert_same(store.load("m"), model)
        for change in (
            lambda: store.add("n", model),
            lambda: store.remove("m"),
            lambda: store.alias("m", "prod", "1"),
            store.vacuum,
        ):
            with pytest.raises(ReadOnlyError, match="reading only: it was opened with mode 'r'"):
                change()
        assert store.add("n", model, dry_run=True).stored_bytes == 0
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("name", "told"),
    [("schema_version", "99"), ("hash_version", "hash_version 99, this one knows 1")],
)
def test_a_store_of_another_version_is_refused(
    url: str, tmp_path: Path, name: str, told: str
) -> None:
    """By other hashes no block was found: each was stored once more, in silence."""
    pydedup.open(url).close()
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute("UPDATE pydedup_meta SET value = '99' WHERE name = ?", [name])
    raw.close()
    for mode in ("a", "r"):
        with pytest.raises(SchemaVersionError, match=told):
            pydedup.open(url, mode=mode)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM pydedup_tensors WHERE model_id = 1 AND ordinal = 0", "lacks its tensor"),
        ("UPDATE pydedup_tensors SET shape = '[64' WHERE model_id = 1", "cannot be read"),
        ("UPDATE pydedup_tensors SET shape = '[-64, 4]' WHERE model_id = 1", "cannot be read"),
        ("UPDATE pydedup_tensors SET block_shape = '[]' WHERE model_id = 1", "cannot be read"),
        ("UPDATE pydedup_tensors SET block_shape = '[8, 8, 2]' WHERE model_id = 1", "cannot be"),
        ("UPDATE pydedup_tensors SET block_shape = '\"abc\"' WHERE model_id = 1", "cannot be read"),
        ("UPDATE pydedup_tensors SET dtype = 'f99' WHERE model_id = 1", "cannot be read"),
    ],
)
def test_damage_to_what_is_recorded_of_a_tensor(
    url: str, tmp_path: Path, statement: str, said: str
) -> None:
    """It was an error of Python's, also of `verify`, or one tensor was loaded as another."""
    models = variants(2, rows=64)
    with pydedup.open(url) as store:
        store.add_many(models)
        store.backup(tmp_path / "before.backup")
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute(statement)
        ((page,),) = raw.execute("SELECT page_id FROM pydedup_model_pages WHERE model_id = 2")
        raw.execute("UPDATE pydedup_pages SET payload = zeroblob(9) WHERE id = ?", (page,))
    raw.close()
    with pydedup.open(url) as store:
        with pytest.raises(CorruptStoreError, match=f"tenant-0@1.*{said}"):
            store.load("tenant-0")
        report = store.verify(repair_from=tmp_path / "before.backup")
        (error,) = [error for error in report.errors if "page" not in error]
        assert "tenant-0@1" in error
        assert said in error
        assert_same(store.load("tenant-1"), models["tenant-1"])


def test_verify_compares_tensors_and_aliases_with_what_was_added(url: str, tmp_path: Path) -> None:
    with pydedup.open(url) as store:
        for name in ("short", "renamed", "whole"):
            store.add(name, {"a": np.ones((3, 3)), "b": np.zeros(4)})
        store.alias("whole", "prod", "1")
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute("DELETE FROM pydedup_tensors WHERE model_id = 1 AND ordinal = 1")
        raw.execute("UPDATE pydedup_tensors SET name = 'c' WHERE model_id = 2 AND ordinal = 1")
        raw.execute("UPDATE pydedup_aliases SET model_id = 2")
    raw.close()
    with pydedup.open(url) as store:
        assert store.verify().errors == [
            "short@1 has tensors of 72 bytes where 104 are recorded: rows of them are missing; "
            "restore a backup",
            "renamed@1: its tensors are not those that it was added with; restore a backup",
            "alias whole@prod points at a model of another name",
        ]


@pytest.mark.parametrize("lost", ["ordinal = 1", "1 = 1"])
def test_a_model_of_which_a_tensor_is_missing_is_not_given_as_whole(
    url: str, tmp_path: Path, lost: str
) -> None:
    """What damages the rows of tensors made a smaller model of it, and verify saw none of it."""
    with pydedup.open(url) as store:
        store.add("m", {"a": np.ones((4, 4)), "b": np.ones((2, 4))})
        store.add("n", {"a": np.ones((4, 4))})
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute(f"DELETE FROM pydedup_tensors WHERE model_id = 1 AND {lost}")  # noqa: S608
    raw.close()
    told = r"m@1 has tensors of .* bytes where 192 are recorded"
    with pydedup.open(url) as store:
        for use in (
            lambda: store.load("m"),
            lambda: store.tensor("m", "a"),
            lambda: store.export("m", tmp_path / "m.npz"),
            lambda: store.copy_to(f"sqlite:///{tmp_path / 'copy.db'}"),
        ):
            with pytest.raises(CorruptStoreError, match=told):
                use()
        assert any(re.search(told, error) for error in store.verify().errors)
        assert store.load("n")["a"].shape == (4, 4)
    assert not (tmp_path / "m.npz").exists()


def test_use_after_fork(url: str) -> None:
    model = {"w": np.arange(10000.0).reshape(100, 100)}
    with pydedup.open(url) as store:
        store.add("m", model)
        assert_same(store.load("m"), model)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert_same(store.load("m"), model)
                store.add("from-child", model)
                status = 0
            finally:
                os._exit(status)
        os.close(reader)
        os.close(writer)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert {info.name for info in store.models()} == {"m", "from-child"}
        assert_same(store.load("from-child"), model)
        assert store.verify().errors == []


@pytest.mark.parametrize("spread", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_reads_a_store_is_not_copied(url: str, spread: Callable[[object], object]) -> None:
    """As who gives it to a process pool does: the error was one of the pickle module."""
    with pydedup.open(url) as store:
        store.add("m", {"w": np.ones((2, 2))})
        for one in (store, store.tensor("m", "w")):
            with pytest.raises(ArgumentError, match=r"cannot be pickled or copied.*open"):
                spread(one)


def test_many_threads_share_a_store(store: pydedup.Store) -> None:
    models = variants(4)
    store.add_many(models)
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(5):
                assert_same(store.load(name), models[name])
            store.add(f"again-{name}", models[name])
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.models()) == 8
    assert store.verify().errors == []


def test_no_temporary_file_or_staging_is_left(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setenv("TMPDIR", str(spool))
    store.add_many(variants(2))
    assert list(spool.iterdir()) == []
    assert store.verify().notes == []


def test_interrupt_in_the_middle_of_an_add(store: pydedup.Store) -> None:
    models = variants(2, rows=30000)
    store.add("base", models["tenant-0"])

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add("second", models["tenant-1"], progress=interrupt)
    assert [info.name for info in store.models()] == ["base"]
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])
    store.add("second", models["tenant-1"])
    assert_same(store.load("second"), models["tenant-1"])
