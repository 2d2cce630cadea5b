# SPDX-License-Identifier: Apache-2.0
"""SQLite and the file system: files that are not ours, full disks, damage."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import (
    ArgumentError,
    CorruptStoreError,
    NotAStoreError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)
from pydedup.testing._contract_base import in_thread
from pydedup.testing.disks import SmallDisk

from .conftest import add_pages, open_store

MIB = 1 << 20


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_belongs_to_a_model_fills_its_pages(tmp_path: Path) -> None:
    # Of a row of more than a quarter of a page, SQLite keeps the rest on a page of its own.
    adapter = open_store(tmp_path / "m.db")
    sizes = []
    payload = random.Random(0).randbytes(20_000)
    for number in range(2):
        with adapter.transaction():
            for model_id in range(1 + 100 * number, 101 + 100 * number):
                adapter.insert_artifacts(model_id, [("graph", "application/json", payload)])
        adapter.checkpoint()
        sizes.append((tmp_path / "m.db").stat().st_size)
    assert adapter.artifact(150, "graph") == payload
    assert sizes[1] - sizes[0] < 1.1 * 100 * len(payload)
    adapter.close()


# ---- files that are not ours --------------------------------------------------------------------


def foreign_database(path: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def foreign_log(path: Path) -> None:
    """A database whose program was killed: its log lies beside it."""
    there = path.with_name("original")
    with contextlib.closing(sqlite3.connect(there)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (x)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.executescript("INSERT INTO t VALUES (1)")
        for end in ("", "-wal"):
            shutil.copy(f"{there}{end}", f"{path}{end}")
    there.unlink()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("hello, world\n" * 100),
    "one letter": lambda path: path.write_text("x"),
    "binary": lambda path: path.write_bytes(random.Random(1).randbytes(100_000)),
    "database": lambda path: foreign_database(path, "CREATE TABLE t (x)"),
    "database with our names": lambda path: foreign_database(
        path, "CREATE TABLE pydedup_meta (name, value); CREATE TABLE pydedup_pages (id)"
    ),
    "database with a mark": lambda path: foreign_database(path, "PRAGMA application_id = 7"),
    "database with a log": foreign_log,
    "start of a database": lambda path: path.write_bytes(b"SQLite format 3\0"),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "models.db"
    FOREIGN[kind](path)
    special = kind in ("folder", "pipe")
    before = sorted(os.listdir(tmp_path)) if special else contents(tmp_path)  # noqa: PTH208
    stamp = path.stat().st_mtime_ns
    with pytest.raises(NotAStoreError, match=r"models\.db"):
        registry.connect(f"sqlite:///{path}", mode=mode)
    after = sorted(os.listdir(tmp_path)) if special else contents(tmp_path)  # noqa: PTH208
    assert after == before
    assert path.stat().st_mtime_ns == stamp


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("missing.db", "missing/missing.db"):
        with pytest.raises(NotAStoreError, match=name):
            registry.connect(f"sqlite:///{tmp_path}/{name}", mode="r")
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_that_no_shell_wrote_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice was to create a folder called ~."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"write your home folder out, ~ is no name for it"):
        registry.connect("sqlite:///~/models.db", mode="a")
    with pytest.raises(NotAStoreError, match=r"write your home folder out"):
        registry.connect("sqlite:///~/models.db", mode="r")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_a_place_for_a_store(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    path.touch()
    reader = registry.connect(f"sqlite:///{path}", mode="r")
    assert reader.schema_version() is None
    reader.close()
    assert path.stat().st_size == 0
    open_store(path).close()
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "table"),
    [
        ("ALTER TABLE pydedup_pages DROP COLUMN checksum", "pages"),
        ("DROP TABLE pydedup_jobs", "jobs"),
    ],
)
def test_a_store_that_lost_a_table_is_to_be_restored(
    tmp_path: Path, change: str, table: str
) -> None:
    """It was told to take another place, as if its tables were somebody else's."""
    path = tmp_path / "models.db"
    open_store(path).close()
    foreign_database(path, f"DROP VIEW pydedup_model_sizes; {change}")
    said = rf"models\.db is no whole store: its table pydedup_{table},.* missing; restore a backup"
    for mode in ("a", "r"):
        with pytest.raises(NotAStoreError, match=said):
            pydedup.open(path, mode=mode)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE pydedup_pages DROP COLUMN checksum",
        "ALTER TABLE pydedup_meta RENAME COLUMN value TO wert",
        "DROP TABLE pydedup_jobs",
        "DROP TABLE pydedup_meta",
        "DELETE FROM pydedup_meta",
        "UPDATE pydedup_meta SET value = '-1' WHERE name = 'schema_version'",
        "UPDATE pydedup_meta SET value = 'x' WHERE name = 'schema_version'",
    ],
)
def test_tables_that_are_not_ours(tmp_path: Path, change: str) -> None:
    path = tmp_path / "models.db"
    open_store(path).close()
    foreign_database(path, f"DROP VIEW pydedup_model_sizes; {change}")
    adapter = registry.connect(f"sqlite:///{path}", mode="a")
    try:
        with pytest.raises(NotAStoreError, match="pydedup_"):
            adapter.schema_version()
        with pytest.raises(NotAStoreError):
            adapter.create_schema({})
    finally:
        adapter.close()


def test_a_newer_schema_is_told(tmp_path: Path) -> None:
    # Its tables may look different, so only the version is asked for.
    path = tmp_path / "models.db"
    open_store(path).close()
    foreign_database(
        path,
        "UPDATE pydedup_meta SET value = '99' WHERE name = 'schema_version';"
        "DROP TABLE pydedup_jobs",
    )
    adapter = registry.connect(f"sqlite:///{path}", mode="r")
    assert adapter.schema_version() == 99
    adapter.close()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM pydedup_meta WHERE name = 'epoch'",
        "UPDATE pydedup_meta SET value = 'x' WHERE name = 'epoch'",
    ],
)
def test_a_lost_epoch_is_told(tmp_path: Path, change: str) -> None:
    path = tmp_path / "models.db"
    open_store(path).close()
    foreign_database(path, change)
    adapter = open_store(path)
    with pytest.raises(CorruptStoreError, match="epoch"):
        adapter.epoch()
    with pytest.raises(CorruptStoreError, match="epoch"), adapter.transaction():
        adapter.bump_epoch(0)
    adapter.close()


# ---- damage -------------------------------------------------------------------------------------


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    adapter = open_store(path)
    add_pages(adapter, 2)
    with adapter.transaction():
        adapter.insert_blocks((os.urandom(16), i % 7 + 1, i, None) for i in range(20_000))
    adapter.close()
    with path.open("r+b") as file:
        for place in range(1 << 17, path.stat().st_size, 16384):
            file.seek(place)
            file.write(b"\xa5" * 64)
    adapter = registry.connect(f"sqlite:///{path}", mode="a")
    assert adapter.integrity_errors()
    with pytest.raises(CorruptStoreError, match=r"models\.db"):
        adapter.blocks_on_pages([1, 2, 3])
    adapter.close()


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_file_in_the_middle_of_a_checkpoint_is_no_damage(tmp_path: Path, mode: str) -> None:
    """Its first page says already how many there are; the others are still in the log."""
    path, other = tmp_path / "models.db", tmp_path / "other.db"
    adapter = open_store(path)
    adapter.checkpoint()
    before = path.read_bytes()
    ids = add_pages(adapter, 3)
    shutil.copy(f"{path}-wal", f"{other}-wal")
    adapter.checkpoint()
    other.write_bytes(path.read_bytes()[:16384] + before[16384:])
    adapter.close()
    adapter = registry.connect(f"sqlite:///{other}", mode=mode)
    assert dict(adapter.read_pages(ids)).keys() == set(ids)
    assert adapter.integrity_errors() == []
    adapter.close()


def test_a_file_that_is_deleted_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    adapter = open_store(path)
    errors: list[Exception] = []

    def read() -> None:
        try:
            adapter.models()
        except StoreError as error:
            errors.append(error)

    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink()
    thread = threading.Thread(target=read)  # needs a new connection
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [UnavailableError]
    assert str(path) in str(errors[0])
    with pytest.raises(UnavailableError):
        adapter.stored_bytes()
    adapter.close()
    assert not path.exists()


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_file_that_another_takes_the_place_of_is_told(tmp_path: Path, mode: str) -> None:
    """Pages were read from the new one as those of the old, and what was added was lost."""
    path, other = tmp_path / "models.db", tmp_path / "other.db"
    rng = np.random.default_rng(5)
    models = [{"w": rng.standard_normal((2048, 2048), np.float32)} for _ in range(2)]
    for place, order in ((path, (0, 1)), (other, (1, 0))):
        with pydedup.open(place) as store:
            for number in order:
                store.add(f"m{number}", models[number])
    with pydedup.open(path, mode=mode) as store:
        assert len(store.models()) == 2
        other.replace(path)
        with contextlib.suppress(UnavailableError):
            assert store.load("m0")["w"].tobytes() == models[0]["w"].tobytes()
        with pytest.raises(UnavailableError, match=r"models\.db was moved.*open it again"):
            in_thread(lambda: store.load("m0"))  # by a new connection
        if mode == "a":
            with pytest.raises(UnavailableError, match="open it again"):
                store.add("m2", models[0])
    with pydedup.open(path) as store:
        for number, model in enumerate(models):
            assert store.load(f"m{number}")["w"].tobytes() == model["w"].tobytes()


def test_a_file_of_several_names_is_read_alone(tmp_path: Path) -> None:
    """Each had a log of its own: what one added the other did not see, and called damaged."""
    path, other = tmp_path / "models.db", tmp_path / "other.db"
    weights = np.arange(70_000, dtype=np.float32)
    with pydedup.open(path) as store:
        store.add("m", {"w": weights})
        other.hardlink_to(path)
        for change in (lambda: store.add("n", {"w": -weights}), lambda: store.remove("m")):
            with pytest.raises(ReadOnlyError, match=r"models\.db is one of 2 names"):
                change()
    with pydedup.open(other) as store:
        assert (store.load("m")["w"] == weights).all()
        with pytest.raises(ReadOnlyError, match=r"other\.db is one of 2 names"):
            store.add("n", {"w": -weights})
        path.unlink()
        store.add("n", {"w": -weights})
        assert store.verify().ok


# ---- full disks ---------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(disk: SmallDisk) -> None:
    path = disk.folder / "models.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 2)
    adapter.checkpoint()
    for _ in range(3):
        with pytest.raises(StorageFullError, match=r"models\.db.*space"):
            add_pages(adapter, 20)
        assert adapter.epoch() == 1
        assert [row.id for row in adapter.page_rows()] == ids
        assert adapter.integrity_errors() == []
    adapter.close()
    adapter = open_store(path)
    assert [payload for _, payload in adapter.read_pages(ids)] == [
        random.Random(i).randbytes(MIB) for i in range(2)
    ]
    add_pages(adapter, 1)  # as much as does fit
    assert adapter.epoch() == 2
    adapter.close()


def test_a_new_store_that_fills_the_disk_is_there(disk: SmallDisk) -> None:
    """As long as its tables were in the log alone, there was said to be no room for a store."""
    adapter = open_store(disk.folder / "models.db")
    with pytest.raises(StorageFullError, match=r"run `pydedup vacuum`"):
        add_pages(adapter, 20)
    assert adapter.epoch() == 0
    adapter.close()


def test_a_disk_that_tells_no_size_is_not_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=0, free=0))
    open_store(path).close()


def test_a_disk_that_is_full_already(disk: SmallDisk) -> None:
    filler = disk.folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(StorageFullError, match=r"no room for a new store in .*models\.db"):
        open_store(disk.folder / "models.db")
    assert list(disk.folder.iterdir()) == [filler], "an empty file was left"
    filler.unlink()
    adapter = open_store(disk.folder / "models.db")
    assert adapter.epoch() == 0
    adapter.close()


# ---- open files ---------------------------------------------------------------------------------


def test_a_process_without_files_left_is_told_so(path: Path) -> None:
    """It was told to check that the file exists, and that it may read it."""
    open_store(path).close()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, most))
        lowest = stack.enter_context(open(os.devnull))  # noqa: PTH123
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, most))
        with pytest.raises(UnavailableError, match="as many files open as it may"):
            registry.connect(f"sqlite:///{path}", mode="r").epoch()
