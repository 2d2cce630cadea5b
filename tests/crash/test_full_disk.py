# SPDX-License-Identifier: Apache-2.0
"""The disk of a store fills up in the middle of an add, on each back end.

SQLite's file and PostgreSQL's tablespace are on a small disk of their own. MariaDB ends itself
when a disk is full; what it tells a client is that its own tablespace is at its limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies
from pydedup.errors import StorageFullError
from pydedup.testing.disks import SmallDisk

MIB = 1 << 20

#: The URL of an empty place with little room, and what makes more.
Place = tuple[str, Callable[[], object]]


@pytest.fixture
def small_disk(server_folder: Path, new_disk: Callable[[Path, int], SmallDisk]) -> Path:
    """A folder on a disk of its own, of 64 MiB, most of which is taken by a file ``ballast``."""
    folder = new_disk(server_folder / "small-disk", 64).folder
    (folder / "ballast").write_bytes(bytes(44 * MIB))
    return folder


@pytest.fixture
def sqlite_place(small_disk: Path) -> Place:
    return f"sqlite:///{small_disk / 'store.db'}", (small_disk / "ballast").unlink


@pytest.fixture
def postgres_place(small_disk: Path, own_postgres: Any) -> Iterator[Place]:
    tables = small_disk / "tables"
    tables.mkdir(mode=0o700)
    shutil.chown(tables, own_postgres.folder.owner())
    with psycopg.connect(own_postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{tables}'")
        connection.execute("CREATE DATABASE small TABLESPACE small")
        yield own_postgres.url.replace("/postgres?", "/small?"), (small_disk / "ballast").unlink
        connection.execute("DROP DATABASE small")
        connection.execute("DROP TABLESPACE small")


@pytest.fixture
def mysql_place(own_mysql: Any, mysql_run: Callable[..., object]) -> Iterator[Place]:
    url = own_mysql.new_place()
    # What is created from now on lies in the system's tablespace, which has its limit.
    mysql_run(url, "SET GLOBAL innodb_file_per_table = OFF")
    try:
        pydedup.open(url).close()
        mysql_run(url, "CREATE TABLE ballast (payload LONGBLOB)")
        for _ in range(12):
            mysql_run(url, "INSERT INTO ballast VALUES (REPEAT('x', 1048576))")
    finally:
        mysql_run(url, "SET GLOBAL innodb_file_per_table = ON")
    yield url, lambda: mysql_run(url, "DROP TABLE ballast")
    mysql_run(own_mysql.url, f"DROP DATABASE {url.partition('?')[0].rpartition('/')[2]}")


def test_a_backup_to_a_full_disk_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    """It left an empty file, and told to delete it."""
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = sorted(small_disk.iterdir())
    with pydedup.open(tmp_path / "store.db") as store:
        with pytest.raises(StorageFullError, match=r"free some space and run it again$"):
            store.backup(small_disk / "backup.db")
        with pytest.raises(StorageFullError, match=r"no room for a new store in .*copy\.db"):
            store.copy_to(small_disk / "copy.db")
    assert sorted(small_disk.iterdir()) == before


def test_a_backup_that_fills_the_disk_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    """It told to vacuum, or to open, the file that is not yet a backup."""
    rng = np.random.default_rng(0)
    model = {f"w{n}": rng.standard_normal((1024, 1024), np.float32) for n in range(5)}
    target = small_disk / "backup.db"
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("m", model, policy=policies.Exact())
        with pytest.raises(StorageFullError) as caught:
            store.backup(target)
        assert str(caught.value) == (
            f"no room for the backup {target}: its disk is full; free some space and run it "
            "again, which goes on with backup.db.partial, or delete that file"
        )
        assert not target.exists()
        (small_disk / "ballast").unlink()
        store.backup(target)
    assert not target.with_name("backup.db.partial").exists()
    with pydedup.open(target, mode="r") as backup:
        assert backup.verify().ok
        assert (backup.load("m")["w4"] == model["w4"]).all()


@pytest.mark.parametrize("back_end", ["sqlite", "postgres", "mysql"])
def test_a_full_disk(back_end: str, request: pytest.FixtureRequest) -> None:
    url, make_room = request.getfixturevalue(f"{back_end}_place")
    rng = np.random.default_rng(0)
    good = {"w": rng.standard_normal((1000, 100))}
    large = {"w": rng.standard_normal((5000, 1000))}  # 40 MB
    part = {"w": large["w"][:500]}
    with pydedup.open(url) as store:
        store.add("good", good)
        for _ in range(2):
            with pytest.raises(StorageFullError, match="free some space"):
                store.add("large", large, policy=policies.Exact())
            assert [info.name for info in store.models()] == ["good"]
            assert store.verify().errors == []
            assert np.array_equal(store.load("good")["w"], good["w"])
        make_room()
        store.vacuum(lease_seconds=0)  # what there was no room to delete
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        store.add("part", part, policy=policies.Exact())
        assert np.array_equal(store.load("part")["w"], part["w"])
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


def test_a_copy_that_fills_the_disk_says_what_is_there(sqlite_place: Place, tmp_path: Path) -> None:
    """It said that the store was as before, with one model by then; and to vacuum it."""
    url, make_room = sqlite_place
    models = {
        "good": {"w": np.random.default_rng(0).standard_normal((1000, 100))},
        "large": {"w": np.random.default_rng(1).standard_normal((5000, 1000))},
    }
    with pydedup.open(f"sqlite:///{tmp_path / 'source.db'}") as source:
        for name, tensors in models.items():
            source.add(name, tensors, policy=policies.Exact())
        with pytest.raises(
            StorageFullError,
            match=r"restore again, which .*what was complete is there, and nothing",
        ):
            source.copy_to(url)
        with pydedup.open(url, mode="r") as store:
            assert [info.name for info in store.models()] == ["good"]
        make_room()
        assert [one.is_new for one in source.copy_to(url).models] == [False, True]


def test_a_little_room_is_enough_for_a_vacuum(sqlite_place: Place, small_disk: Path) -> None:
    """It wanted about as much room as it was to free, and so did nothing."""
    url, _ = sqlite_place
    rng = np.random.default_rng(0)
    with pydedup.open(url) as store:
        store.add("good", {"w": rng.standard_normal((1000, 100))})
        with pytest.raises(StorageFullError, match=r"free some space.* `pydedup vacuum`"):
            store.add("large", {"w": rng.standard_normal((5000, 1000))}, policy=policies.Exact())
        full = store.stats().stored_bytes
        os.truncate(small_disk / "ballast", 40 * MIB)
        store.vacuum(lease_seconds=0)
        assert store.stats().stored_bytes < full / 4
        assert store.verify().errors == []


@pytest.mark.parametrize("back_end", ["sqlite", "postgres"])
def test_a_vacuum_of_a_full_disk_frees_before_it_repacks(
    back_end: str, small_disk: Path, request: pytest.FixtureRequest
) -> None:
    """There was no room for the new layout, and so what nobody used was never freed."""
    url, make_room = request.getfixturevalue(f"{back_end}_place")
    make_room()
    whole, other = np.random.default_rng(0).standard_normal((2, 1024, 1024))
    part = np.concatenate([whole[row : row + 64] for row in range(0, 1024, 256)])
    with pydedup.open(url) as store:
        for name, weights in {"whole": whole, "other": other, "part": part}.items():
            added = store.add(name, {"w": weights}, policy=policies.Exact(), block_shape=(64, 64))
        assert added.stored_bytes == 0
        store.remove("whole")
        store.remove("other")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - MIB))
    with pydedup.open(url) as store:
        report = store.vacuum()
        assert report.not_repacked is None
        assert report.repacked_bytes == report.page_bytes_after > MIB
        assert report.freed_bytes > 15 * MIB
        assert store.verify().notes == []
        assert np.array_equal(store.load("part")["w"], part)
    assert shutil.disk_usage(small_disk).free > 10 * MIB


def test_a_vacuum_without_room_for_a_new_layout_frees_all_the_same(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_no_room(*_: object, **__: object) -> None:
        raise StorageFullError("the disk is full")

    with pydedup.open(store_url) as store:
        store.add("m", {"w": np.ones((64, 64), np.float32)})
        store.remove("m")
        monkeypatch.setattr("pydedup.maintenance.vacuum._repack_in_peace", has_no_room)
        with pytest.raises(
            StorageFullError, match=r"^1 page freed, and none repacked: the disk is full$"
        ):
            store.vacuum()
        assert store._adapter.page_rows() == []


@pytest.mark.parametrize("ballast", [700 * 1024, 1000 * 1024])
def test_no_room_for_a_new_store(
    ballast: int, new_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    """The advice was to vacuum, where there is nothing yet."""
    disk = new_disk(tmp_path / "disk", 1)
    (disk.folder / "ballast").write_bytes(bytes(ballast))
    with pytest.raises(
        StorageFullError, match=r"no room for a new store in .*free some space"
    ) as told:
        pydedup.open(disk.folder / "store.db")
    assert "vacuum" not in str(told.value)
    disk.remount("size=16m")
    with pydedup.open(disk.folder / "store.db") as store:
        store.add("m", {"w": np.ones((64, 64), np.float32)})
        assert store.verify().ok


@pytest.mark.parametrize("mode", ["a", "r"])
def test_no_room_to_open_a_store(
    mode: Any, new_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    """The advice was to vacuum, and that something was not written, to who was about to read."""
    disk = new_disk(tmp_path / "disk", 4)
    path = disk.folder / "store.db"
    weights = np.ones((64, 64), np.float32)
    with pydedup.open(path) as store:
        store.add("m", {"w": weights})
    ballast = disk.folder / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk.folder).free - 8192))
    with pytest.raises(
        StorageFullError, match=r"also to read it, needs .*free some space.* open it again"
    ) as told:
        pydedup.open(path, mode=mode)
    assert "vacuum" not in str(told.value)
    ballast.unlink()
    with pydedup.open(path, mode=mode) as store:
        assert np.array_equal(store.load("m")["w"], weights)


def said_by(script: str, url: str, **variables: str) -> str:
    """Return what a script prints in a process of its own, which ends well."""
    command = [sys.executable, "-c", script, url]
    environment = {**os.environ, **variables}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout


_LIMITED = """
import resource, sys
import numpy as np
import pydedup
from pydedup import policies
from pydedup.ingest import add

add._SPOOL_BYTES = add._SHARED_SPOOL_BYTES = 1 << 20
store = pydedup.open(sys.argv[1])
store.add("good", {"w": np.ones((8, 8), np.float32)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).standard_normal((4096, 1024))
try:
    store.add("large", {"w": noise}, policy=policies.Exact())
except pydedup.PydedupError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_limit_of_files(tmp_path: Path) -> None:
    """Of `ulimit -f`, the temporary file of an add met an OSError of Python's."""
    url = str(tmp_path / "store.db")
    said = said_by(_LIMITED, url)
    assert said.startswith("StorageFullError: no space left for the temporary file")
    assert "`ulimit -f`" in said
    with pydedup.open(url) as store:
        assert [info.name for info in store.models()] == ["good"]
        assert store.verify().ok


_LIMITED_STORE = """
import resource, sys
import pydedup

adapter = pydedup.open(sys.argv[1])._adapter
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    with adapter.transaction():
        adapter.insert_pages([(bytes(16), bytes(2 << 20))], state="staging")
except pydedup.PydedupError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_limit_of_files_for_the_store_itself(tmp_path: Path) -> None:
    """The advice was to check the medium."""
    url = str(tmp_path / "store.db")
    assert said_by(_LIMITED_STORE, url) == (
        f"StorageFullError: {url}: disk I/O error; a file of this process may have no more than "
        "1048576 bytes: raise `ulimit -f`\n"
    )
    with pydedup.open(url) as store:
        assert store.verify().ok


_REMOVED = """
import sys
import pydedup

with pydedup.open(sys.argv[1]) as store:
    try:
        store.remove("large")
    except pydedup.PydedupError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_no_room_for_temporary_files(
    new_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    """The advice was to free some space where the store is, which had enough."""
    url, disk = str(tmp_path / "store.db"), new_disk(tmp_path / "disk", 1)
    (disk.folder / "ballast").write_bytes(bytes(shutil.disk_usage(disk.folder).free))
    weights = np.random.default_rng(0).standard_normal((4096, 1024))
    with pydedup.open(url) as store:
        store.add("large", {"w": weights}, policy=policies.Exact())
    said = said_by(_REMOVED, url, TMPDIR=str(disk.folder))
    assert said.startswith(
        f"StorageFullError: {url}: database or disk is full; that is {disk.folder},"
    )
    assert "or set TMPDIR" in said
    with pydedup.open(url) as store:
        assert np.array_equal(store.load("large")["w"], weights)
    assert said_by(_REMOVED, url, TMPDIR=str(tmp_path)) == ""
