# SPDX-License-Identifier: Apache-2.0
"""SQLite on media that are read-only, and for users who may only read."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapters import sqlite
from pydedup.adapters._connection import Session
from pydedup.errors import ConflictError, NotAStoreError, ReadOnlyError, UnavailableError
from pydedup.testing.disks import SmallDisk
from pydedup.testing.servers import unused_name

from .conftest import add_pages, open_store
from .test_sqlite_files import contents

MIB = 1 << 20


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 2)
    adapter.close()
    before, stamp = contents(tmp_path), path.stat().st_mtime_ns
    first = registry.connect(f"sqlite:///{path}", mode="r")
    second = registry.connect(f"sqlite:///{path}", mode="r")
    for reader in (first, second):
        assert len(list(reader.read_pages(ids))) == 2
    first.close()
    assert len(list(second.read_pages(ids))) == 2
    second.close()
    assert contents(tmp_path) == before
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("place", ["sqlite.configure", "_base.Statements"])
def test_an_interrupt_while_it_is_opened_to_read_leaves_no_trace(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log stayed beside the file."""
    path = tmp_path / "models.db"
    open_store(path).close()
    before, seen = contents(tmp_path), []
    configure = sqlite.configure

    def read(connection: sqlite3.Connection) -> None:
        configure(connection)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        seen.extend(contents(tmp_path))

    def interrupted(given: object) -> None:
        if isinstance(given, sqlite3.Connection):
            read(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(sqlite, "configure", read)
    monkeypatch.setattr(f"pydedup.adapters.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.connect(f"sqlite:///{path}", mode="r")
    assert "models.db-wal" in seen
    assert contents(tmp_path) == before


def test_an_interrupt_while_it_is_closed_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log stayed beside the file."""
    path = tmp_path / "models.db"
    open_store(path).close()
    before = contents(tmp_path)
    reader = registry.connect(f"sqlite:///{path}", mode="r")
    assert reader.schema_version() is not None
    close = Session.close

    def interrupted(session: Session) -> None:
        close(session)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.close()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_on_read_only_media(disk: SmallDisk, mode: str) -> None:
    path = disk.folder / "models.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 3)
    adapter.close()
    disk.remount("ro")
    before = contents(disk.folder)
    reader = registry.connect(f"sqlite:///{path}", mode=mode)
    assert reader.read_only
    assert reader.schema_version() == 1
    with reader.snapshot():
        assert [payload for _, payload in reader.read_pages(ids)] == [
            random.Random(i).randbytes(MIB) for i in range(3)
        ]
    with pytest.raises(ReadOnlyError, match=r"models\.db"), reader.transaction():
        pass
    with pytest.raises(ReadOnlyError):
        reader.compact()
    reader.checkpoint()
    assert reader.stored_bytes() == path.stat().st_size
    assert reader.integrity_errors() == []
    reader.close()
    assert contents(disk.folder) == before
    for missing, error in (("a", ReadOnlyError), ("r", NotAStoreError)):
        with pytest.raises(error, match=r"new\.db"):
            registry.connect(f"sqlite:///{disk.folder}/new.db", mode=missing)


def test_a_log_on_read_only_media_is_not_passed_over(disk: SmallDisk, tmp_path: Path) -> None:
    # What is in the log is committed; reading the main file alone would lose it silently.
    original = tmp_path / "models.db"
    adapter = open_store(original)
    add_pages(adapter, 1)
    for end in ("", "-wal"):
        shutil.copy(f"{original}{end}", disk.folder)
    adapter.close()
    disk.remount("ro")
    for mode in ("r", "a"):
        with pytest.raises(UnavailableError, match=r"models\.db-wal holds changes"):
            registry.connect(f"sqlite:///{disk.folder}/models.db", mode=mode)


_INTERRUPTED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN IMMEDIATE;")
connection.execute("UPDATE pydedup_meta SET value = 'unfinished' WHERE name = 'epoch'")
connection.execute("UPDATE pydedup_pages SET payload = zeroblob(length(payload))")
os._exit(0)
"""


def test_a_journal_on_read_only_media_is_not_passed_over(disk: SmallDisk) -> None:
    """A program that took the file out of WAL mode was killed in the middle of a change."""
    path = disk.folder / "models.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 3)
    adapter.close()
    subprocess.run([sys.executable, "-c", _INTERRUPTED, str(path)], check=True)
    disk.remount("ro")
    for mode in ("r", "a"):
        with pytest.raises(UnavailableError, match=r"models\.db-journal would undo"):
            registry.connect(f"sqlite:///{path}", mode=mode)
    disk.remount("rw")
    for mode in ("r", "a"):
        adapter = registry.connect(f"sqlite:///{path}", mode=mode)
        assert adapter.epoch() == 1
        assert len(list(adapter.read_pages(ids))) == 3
        adapter.close()
        subprocess.run([sys.executable, "-c", _INTERRUPTED, str(path)], check=True)


def as_nobody(work: Callable[[], object]) -> str:
    """Return the error that somebody meets who is not root, who may do anything."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read()
    os.waitpid(child, 0)
    return said


def test_a_journal_is_left_to_who_may_write(server_folder: Path) -> None:
    folder = server_folder / unused_name()
    folder.mkdir()
    path = folder / "models.db"
    adapter = open_store(path)
    ids = add_pages(adapter, 3)
    adapter.close()
    subprocess.run([sys.executable, "-c", _INTERRUPTED, str(path)], check=True)
    path.chmod(0o444)
    folder.chmod(0o777)  # where SQLite may put its files, but not change that one
    if os.getuid() != 0:
        pytest.skip("only root can take a file away from who runs this")
    before = contents(folder)
    said = as_nobody(lambda: registry.connect(f"sqlite:///{path}", mode="r").models())
    assert said.startswith("UnavailableError")
    assert "open the store once as who may write it" in said
    assert contents(folder) == before
    reading = registry.connect(f"sqlite:///{path}", mode="r")
    assert len(list(reading.read_pages(ids))) == 3
    reading.close()


def test_a_log_that_another_user_left_is_named(server_folder: Path) -> None:
    folder = server_folder / unused_name()  # where anybody may go
    folder.mkdir()
    path = folder / "models.db"
    open_store(path).close()
    for file in (path, folder):
        file.chmod(0o777)
    for end in ("-wal", "-shm"):  # as one who may not write the file leaves it
        Path(f"{path}{end}").touch(mode=0o444)
    said = as_nobody(lambda: open_store(path))
    assert said.startswith("ReadOnlyError")
    assert f"{path}-wal and {path}-shm is what another user left" in said


def test_media_that_were_read_only_may_change(disk: SmallDisk) -> None:
    path = disk.folder / "models.db"
    adapter = open_store(path)
    add_pages(adapter, 1)
    adapter.close()
    disk.remount("ro")
    reader = registry.connect(f"sqlite:///{path}", mode="r")
    assert len(reader.page_rows()) == 1
    disk.remount("rw")
    writer = open_store(path)
    add_pages(writer, 1)
    assert len(reader.page_rows()) == 2, "the log of the writer was not read"
    reader.close()
    writer.close()
    disk.remount("ro")
    reader = registry.connect(f"sqlite:///{path}", mode="r")

    def change() -> None:
        disk.remount("rw")
        writer = open_store(path)
        add_pages(writer, 1)
        writer.close()

    assert len(reader.page_rows()) == 2
    with pytest.raises(ConflictError, match="read again"), reader.snapshot():
        change()
    assert len(reader.page_rows()) == 3
    reader.close()
