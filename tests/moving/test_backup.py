# SPDX-License-Identifier: Apache-2.0
"""Whole stores to one file and back."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.adapters import sqlite
from pydedup.errors import ArgumentError, ConflictError, NotAStoreError, ReadOnlyError
from pydedup.moving import backup

New = Callable[[str], str]
BACKENDS = ("sqlite", "postgres", "mysql")


def test_quotas_that_are_set_where_a_backup_is_restored_stay(
    filled: New, new_store: New, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    with pydedup.open(filled("sqlite")) as store:
        store.quotas.set("task", None, "512KiB", measure="logical")
        store.backup(file)
    with pydedup.open(new_store("sqlite")) as store:
        store.quotas.set("task", None, "1GiB", measure="logical")
        before = list(store.quotas)
        assert store.restore(file).copied == 8
        assert list(store.quotas) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_and_back(
    filled: New, new_store: New, tmp_path: Path, assert_same: Any, backend: str
) -> None:
    source_url, url, file = filled(backend), new_store(backend), tmp_path / "backup.pydedup"
    with pydedup.open(source_url) as store:
        store.quotas.set("task", None, "512KiB", measure="logical")
        report = store.backup(file)
        assert (report.copied, report.target) == (8, f"sqlite:///{file}")
        quotas = list(store.quotas)
    assert [path.name for path in tmp_path.glob("backup*")] == ["backup.pydedup"], "one file"
    assert_same(source_url, str(file))
    file.chmod(0o444)
    with pydedup.open(url) as store:
        assert store.restore(file).copied == 8
        assert list(store.quotas) == quotas
        assert store.restore(file).copied == 0, "what is there is not copied again"
    assert_same(source_url, url)
    assert [path.name for path in tmp_path.glob("backup*")] == ["backup.pydedup"]


def test_a_backup_of_a_store_that_is_in_use(
    filled: New, tmp_path: Path, family: Callable[..., Any], assert_same: Any
) -> None:
    source_url = filled("sqlite")
    first, second = tmp_path / "first", tmp_path / "second"
    with pydedup.open(source_url) as store:
        store.backup(first)

        def add(stage: str, done: int, total: int) -> None:
            if not any(info.name == "late" for info in store.models()):
                with pydedup.open(source_url) as other:
                    other.add("late", family(30))

        report = store.backup(second, progress=add)
        assert "late@1" not in {model.model for model in report.models}
        store.remove("late")
    assert_same(source_url, str(second))
    with pydedup.open(first) as one, pydedup.open(second) as other:
        assert one._adapter.meta()["store_id"] != other._adapter.meta()["store_id"]


def test_a_disk_that_does_not_sync_folders(
    filled: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refused(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    with pydedup.open(filled("sqlite")) as store:
        assert store.backup(tmp_path / "backup").copied == 8
    assert [path.name for path in tmp_path.glob("backup*")] == ["backup"]


def test_a_file_is_replaced_only_on_demand(
    filled: New, tmp_path: Path, family: Callable[..., Any], assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "backup"
    with pydedup.open(source_url) as store:
        store.backup(file)
        before = file.read_bytes()
        store.add("late", family(30))
        with pytest.raises(ArgumentError, match=r"exists; give the backup another name"):
            store.backup(file)
        with pytest.raises(ArgumentError, match="is a folder; name a file in it"):
            store.backup(tmp_path)
        assert file.read_bytes() == before
        store.backup(file, replace=True)
    assert_same(source_url, str(file))
    source_file = Path(source_url.removeprefix("sqlite:///"))
    notes = tmp_path / "notes"
    notes.write_text("notes " * 1000)
    link = tmp_path / "link"
    link.symlink_to(source_file)
    with pydedup.open(source_url) as store:
        for where, said in [
            (source_file, "is the store itself"),
            (link, "is the store itself"),
            (notes, "is no backup"),
            (tmp_path, "is no backup"),
            (tmp_path / "missing" / "backup", "there is no folder"),
            (tmp_path / "what?", "cannot be the name"),
        ]:
            with pytest.raises(ArgumentError, match=said):
                store.backup(where, replace=True)
        with pydedup.open(file), pytest.raises(ArgumentError, match="is in use"):
            store.backup(file, replace=True)
        assert store.verify().ok
    assert notes.read_text() == "notes " * 1000


def test_a_backup_goes_into_an_empty_store(
    filled: New, new_store: New, tmp_path: Path, family: Callable[..., Any]
) -> None:
    file = tmp_path / "backup"
    with pydedup.open(filled("sqlite")) as store:
        store.backup(file)
    with pydedup.open(new_store("sqlite")) as store:
        store.add("mine", family(0))
        with pytest.raises(ArgumentError, match=r"has other models than .*: mine@1;"):
            store.restore(file)
        with pytest.raises(NotAStoreError, match="there is no file"):
            store.restore(tmp_path / "missing")
        assert [info.address for info in store.models()] == ["mine@1"]
    with pydedup.open(new_store("sqlite")) as store:
        store.add("base@1", family(9))
        with pytest.raises(ArgumentError, match=r"has other models than .*: base@1;"):
            store.restore(file)
    with pydedup.open(file, mode="r") as store, pytest.raises(ReadOnlyError):
        store.restore(file)


SCRIPT = """
import sys, time
import pydedup
from pydedup.ingest import pages
from pydedup.moving import together
pages.PAGES_PER_TRANSACTION = together._MOST_MODELS = 1
count = 0
def slowly(stage, done, total):
    global count
    count += 1
    if count == int(sys.argv[3]):
        print("now", flush=True)
        time.sleep(60)
with pydedup.open(sys.argv[1], mode="r") as store:
    store.backup(sys.argv[2], progress=slowly)
"""


@pytest.mark.parametrize(
    ("backend", "moment"),
    [("sqlite", 2), ("sqlite", 6), ("sqlite", 12), ("postgres", 6), ("mysql", 6)],
)
def test_a_killed_backup_leaves_no_file_and_is_gone_on_with(
    filled: New, tmp_path: Path, assert_same: Any, backend: str, moment: int
) -> None:
    source_url, file = filled(backend), tmp_path / "backup"
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT, source_url, str(file), str(moment)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    partial = file.with_name("backup.partial")
    with pydedup.open(source_url, mode="r") as store:
        with pytest.raises(ConflictError, match="another backup is being written"):
            store.backup(file)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not file.exists()
        with pydedup.open(partial, mode="r") as left:
            there = {info.address for info in left.models()}
        report = store.backup(file)
        status = {model.model: model.status for model in report.models}
    assert {address for address, what in status.items() if what == "there"} == there
    assert bool(there) == (moment > 2)
    assert [path.name for path in tmp_path.glob("backup*")] == ["backup"]
    assert_same(source_url, str(file))


def interrupted(source_url: str, file: Path) -> None:
    """Leave an unfinished backup behind that has a model."""

    def stop(stage: str, done: int, total: int) -> None:
        with pydedup.open(f"{file}.partial", mode="r") as partial:
            if partial.models():
                raise KeyboardInterrupt

    with pydedup.open(source_url, mode="r") as store, pytest.raises(KeyboardInterrupt):
        store.backup(file, progress=stop)


def test_what_is_left_of_another_backup_is_not_used(
    filled: New, tmp_path: Path, family: Callable[..., Any], assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "backup"
    partial = tmp_path / "backup.partial"
    with pydedup.open(tmp_path / "other.db") as other:
        other.add_many({"stranger": family(3)})
        other.add_many({"another": family(4)})
    interrupted(f"sqlite:///{tmp_path / 'other.db'}", file)
    assert partial.exists()
    with pydedup.open(source_url, mode="r") as store:
        store.backup(file)
    assert_same(source_url, str(file))
    assert not partial.exists()
    partial.write_text("notes " * 1000)
    with pydedup.open(source_url, mode="r") as store, pytest.raises(NotAStoreError):
        store.backup(tmp_path / "backup", replace=True)
    assert partial.read_text() == "notes " * 1000


def test_what_is_left_is_not_used_where_the_order_of_versions_has_changed(
    tmp_path: Path, family: Callable[..., Any]
) -> None:
    url, file = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "backup"
    with pydedup.open(url) as store:
        store.add("m@1", family(1))
        store.add("m@2", family(2))
    interrupted(url, file)
    with pydedup.open(url) as store:
        store.remove("m@1")
        store.add("m@1", family(1))
        store.backup(file)
        assert store.info("m").info.version == "1"
    with pydedup.open(file, mode="r") as kept:
        assert kept.info("m").info.version == "1", "the one that was added last"
        assert [info.version for info in kept.versions("m")] == ["2", "1"]


def test_an_interrupted_backup_can_be_started_again_at_once(
    filled: New, tmp_path: Path, assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "backup"

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pydedup.open(source_url, mode="r") as store:
        with pytest.raises(KeyboardInterrupt):
            store.backup(file, progress=stop)
        assert not file.exists()
        store.backup(file)
    assert_same(source_url, str(file))


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_backup_that_ended_before_its_file_had_a_table_can_be_started_again(
    filled: New, tmp_path: Path, assert_same: Any, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """All later ones under that name were refused: its file "holds no store"."""
    source_url, file = filled("sqlite"), tmp_path / "backup"
    make_ours = sqlite.make_ours

    def interrupted(connection: Any) -> None:
        if done:
            make_ours(connection)
        raise KeyboardInterrupt

    with pydedup.open(source_url, mode="r") as store:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite, "make_ours", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.backup(file)
        assert (file.with_name("backup.partial").stat().st_size > 0) == done
        store.backup(file)
    assert [path.name for path in tmp_path.glob("backup*")] == ["backup"]
    assert_same(source_url, str(file))


def test_a_store_with_the_name_of_an_unfinished_backup_is_kept(
    filled: New, tmp_path: Path, family: Callable[..., Any]
) -> None:
    file, partial = tmp_path / "backup", tmp_path / "backup.partial"
    with pydedup.open(filled("sqlite"), mode="r") as store:
        store.backup(file)
        before = file.read_bytes()
        with pydedup.open(partial) as precious:
            precious.add("precious", family(3))
        with pytest.raises(ArgumentError, match=r"backup\.partial is a store and no unfinished"):
            store.backup(file, replace=True)
        assert file.read_bytes() == before
        file.unlink()
        with pytest.raises(ArgumentError, match=r"backup\.partial is a store and no unfinished"):
            store.backup(file)
    with pydedup.open(partial) as precious:
        assert [info.address for info in precious.models()] == ["precious@1"]
        assert precious.verify().ok


def test_names_that_no_backup_can_have(filled: New, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with pydedup.open(filled("sqlite"), mode="r") as store:
        with pytest.raises(ArgumentError, match=r"k\.partial would be the unfinished backup 'k'"):
            store.backup(here / "k.partial")
        for end in ("-wal", "-shm", "-journal"):  # which SQLite would take for its own
            with pytest.raises(ArgumentError, match=r"what SQLite keeps beside 'm\.db'"):
                store.backup(here / f"m.db{end}")
        with pytest.raises(ArgumentError, match="has at most 239 bytes"):
            store.backup(here / ("ü" * 120))
        assert list(here.iterdir()) == []
        store.backup(here / ("u" * 239))
        assert [path.name for path in here.iterdir()] == ["u" * 239]


def test_a_file_that_appears_during_a_backup_is_kept(
    filled: New, tmp_path: Path, family: Callable[..., Any], assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "late.db"

    def appear(stage: str, done: int, total: int) -> None:
        if not file.exists():
            with pydedup.open(file) as late:
                late.add("late", family(3))

    with pydedup.open(source_url) as store:
        store.quotas.set("task", None, "512KiB", measure="logical")
        with pytest.raises(ArgumentError, match=r"late\.db appeared while its backup was made"):
            store.backup(file, progress=appear)
        with pydedup.open(file) as late:
            assert [info.address for info in late.models()] == ["late@1"]
        assert_same(source_url, f"{file}.partial")
        file.unlink()
        quota = store.quotas.set("task", None, "1GiB", measure="logical")
        assert store.backup(file).copied == 0, "it was complete"
    assert_same(source_url, str(file))
    with pydedup.open(file, mode="r") as kept:
        assert list(kept.quotas) == [quota], "as they are by now"


def test_a_backup_that_is_opened_during_the_next_one_is_kept(
    filled: New, tmp_path: Path, family: Callable[..., Any]
) -> None:
    file, opened = tmp_path / "backup", list[pydedup.Store]()

    def hold(stage: str, done: int, total: int) -> None:
        if not opened:
            opened.append(pydedup.open(file))
            opened[0].add("late", family(30))

    with pydedup.open(filled("sqlite"), mode="r") as store:
        store.backup(file)
        with pytest.raises(ArgumentError, match=r"backup is in use \(backup-wal lies beside it\)"):
            store.backup(file, replace=True, progress=hold)
    opened[0].close()
    with pydedup.open(file) as kept:
        assert kept.load("late")["step"] == family(30)["step"]


def test_what_is_left_of_a_store_that_had_more_is_not_used(
    filled: New, tmp_path: Path, assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "backup"
    with pydedup.open(source_url) as store:
        store.backup(file)
        file.rename(f"{file}.partial")
        last = max(store.models(), key=lambda info: info.id)
        store.remove(last.address)
        assert store.backup(file).copied == 7
    assert_same(source_url, str(file))


def test_what_is_left_of_a_backup_that_had_not_begun_is_used(
    filled: New, tmp_path: Path, assert_same: Any
) -> None:
    source_url, file = filled("sqlite"), tmp_path / "backup"
    with pydedup.open(f"{file}.partial"):
        pass  # tables, and nothing that says of what
    with pydedup.open(source_url, mode="r") as store:
        assert store.backup(file).copied == 8
    assert_same(source_url, str(file))


class Rival:
    """Another backup of the same store to the same file, in a thread of its own."""

    def __init__(self, source_url: str, file: Path) -> None:
        self.result: BaseException | None = None
        self._place = source_url, file
        self._writes, self._goes_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """Start it; give it time to come as far as it can before it writes a model."""
        self._thread.start()
        self._writes.wait(2)

    def _run(self) -> None:
        def wait(stage: str, done: int, total: int) -> None:
            self._writes.set()
            self._goes_on.wait(30)

        try:
            with pydedup.open(self._place[0], mode="r") as store:
                store.backup(self._place[1], progress=wait)
        except BaseException as error:  # looked at by the test
            self.result = error

    def end(self) -> BaseException | None:
        """Let it go on to its end; return what went wrong with it."""
        self._goes_on.set()
        self._thread.join(60)
        return self.result


def test_backups_that_begin_at_once(
    filled: New,
    tmp_path: Path,
    family: Callable[..., Any],
    assert_same: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rival begins when the first has seen that what is left there is useless."""
    with pydedup.open(tmp_path / "other.db") as other:
        other.add_many({"stranger": family(3)})
        other.add_many({"another": family(4)})
    file = tmp_path / "backup"
    interrupted(f"sqlite:///{tmp_path / 'other.db'}", file)
    source_url = filled("sqlite")
    rival, original, begun = Rival(source_url, file), backup._by_version, []

    def looked(adapter: Any) -> Any:
        if not begun and threading.current_thread() is threading.main_thread():
            begun.append(True)
            with pydedup.open(f"{file}.partial", mode="r") as left:
                assert left.models()
            rival.begin()
        return original(adapter)

    monkeypatch.setattr(backup, "_by_version", looked)
    with pydedup.open(source_url, mode="r") as store:
        store.backup(file)
    assert begun
    assert isinstance(rival.end(), ConflictError | ArgumentError)
    assert_same(source_url, str(file))


def test_a_backup_that_begins_while_another_ends(
    filled: New, tmp_path: Path, assert_same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is complete is not opened any more by who would go on with it."""
    source_url, file = filled("sqlite"), tmp_path / "backup"
    rival, original = Rival(source_url, file), backup._publish

    def publish(*arguments: Any, **options: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            rival.begin()
        original(*arguments, **options)

    monkeypatch.setattr(backup, "_publish", publish)
    with pydedup.open(source_url, mode="r") as store:
        assert store.backup(file).copied == 8
    assert_same(source_url, str(file))
    assert isinstance(rival.end(), ArgumentError), "the file appeared"
    assert_same(source_url, str(file))
