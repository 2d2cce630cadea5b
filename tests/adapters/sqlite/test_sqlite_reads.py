# SPDX-License-Identifier: Apache-2.0
"""Files that do not fit in memory are read past the system's cache: rightly, leaving it alone."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import pydedup
from pydedup.adapters import _sqlite_reads as reads
from pydedup.adapters._sqlite_places import PagePlaces
from pydedup.adapters._sqlite_reads import SystemCache
from pydedup.errors import StoreError
from pydedup.policies import Exact
from pydedup.testing._contract_base import add_random_pages, open_store

from .sqlite_rows import finding, forget, in_memory, read, rows_of, rows_out_of_memory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "O_DIRECT") or not hasattr(os, "posix_fadvise"),
    reason="this system has one way to read",
)

MIB = 1 << 20


def look_up(places: PagePlaces, path: Path, ids: Iterable[int]) -> None:
    """Have the rows found, and the file forgotten: of what is looked at, the system reads more."""
    places.find(list(ids))
    forget(path)


def share_past(cache: SystemCache, count: int = 6400) -> float:
    """Return the share of reads that leaves the cache alone."""
    return sum(not cache.fill()[1] for _ in range(count)) / count


def test_what_was_lost_decides_how_the_next_is_read() -> None:
    cache = SystemCache()
    assert cache.is_roomy
    assert share_past(cache) == 0.0
    cache.lost()
    assert not cache.is_roomy
    assert share_past(cache) == pytest.approx(63 / 64, abs=1e-3)
    for _ in range(100):
        cache.kept()
    assert 0.8 < share_past(cache) < 0.95
    for _ in range(150):
        cache.kept()
    assert cache.is_roomy
    cache.lost()
    assert not cache.is_roomy


@pytest.mark.parametrize("page_bytes", [512, 4096, 65536])
@pytest.mark.parametrize("how", ["past_cache", "through_cache", "_at_once"])
def test_each_way_reads_the_same(tmp_path: Path, how: str, page_bytes: int) -> None:
    payloads = {n: os.urandom(n * 17_011 % (48 * page_bytes) + page_bytes) for n in range(1, 60)}
    with rows_of(tmp_path / "rows.db", payloads, page_bytes) as (_, places):
        handle, pages = places.find(list(payloads))
        assert len(pages) == len(payloads)
        found = 0
        for page in pages:
            payload = page.read(
                handle, lambda nbytes: memoryview(bytearray(nbytes)), getattr(reads, how)
            )
            if payload is not None:
                assert bytes(payload) == payloads[page.id]
                found += 1
        assert found > 40


def test_a_file_that_memory_does_not_keep_is_read_past_it_until_it_does(tmp_path: Path) -> None:
    payloads = {number: os.urandom(MIB) for number in range(1, 61)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as places:
        look_up(places, path, payloads)
        assert read(places, payloads) == payloads
        # But for what the system read ahead of the first one, and what shows whether there is room.
        assert in_memory(path).mean() < 0.5
        for _ in range(40):
            assert read(places, payloads) == payloads
            if in_memory(path).all():
                break
        assert in_memory(path).mean() > 0.95


def test_the_locks_of_sqlite_outlive_such_reads(tmp_path: Path) -> None:
    """To close a handle releases the locks of all others of the process."""
    payloads = {number: os.urandom(MIB) for number in range(1, 9)}
    path = tmp_path / "rows.db"
    write = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    )

    def other_process_writes() -> bool:
        done = subprocess.run([sys.executable, "-c", write, str(path)], capture_output=True)
        assert done.returncode == 0 or b"locked" in done.stderr
        return done.returncode == 0

    with rows_out_of_memory(path, payloads) as places, contextlib.ExitStack() as stack:
        look_up(places, path, payloads)
        assert other_process_writes()
        connection = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
        connection.execute("BEGIN IMMEDIATE")
        assert read(places, payloads) == payloads
        assert any(reads.reads_past_cache(handle) for handle in handles_of(path))
        del places
        assert not other_process_writes()
        # Another one, which takes the same handle, and a thread that ends.
        assert read(finding(connection, path), payloads) == payloads
        assert not other_process_writes()


def handles_of(path: Path) -> list[int]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).removesuffix(" (deleted)") == str(path):
                found.append(int(entry.name))
    return found


def test_files_that_are_gone_are_not_held_for_ever(tmp_path: Path) -> None:
    payloads = {number: os.urandom(MIB) for number in range(1, 5)}
    one, two, kept = tmp_path / "one.db", tmp_path / "two.db", tmp_path / "so is this (deleted)"
    with rows_out_of_memory(kept, payloads) as places:
        look_up(places, kept, payloads)
        assert read(places, payloads) == payloads
    (past,) = [h for h in (int(x.name) for x in Path("/proc/self/fd").iterdir()) if is_of(h, kept)]
    with rows_out_of_memory(one, payloads) as places:
        look_up(places, one, payloads)
        assert read(places, payloads) == payloads
    assert len(handles_of(one)) == 1
    one.unlink()
    with rows_out_of_memory(two, payloads) as places:
        look_up(places, two, payloads)
        assert handles_of(one) == []
        assert read(places, payloads) == payloads
    assert len(handles_of(two)) == 1
    assert reads.reads_past_cache(past)
    assert is_of(past, kept), "it has a name"
    kept.unlink()
    reads.close_gone()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(past)


def is_of(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def test_a_handle_that_somebody_else_closed_is_not_taken_for_the_file(tmp_path: Path) -> None:
    payloads = {number: os.urandom(MIB) for number in range(1, 5)}
    path, other = tmp_path / "rows.db", tmp_path / "other"
    other.write_bytes(bytes(8 * MIB))
    with rows_out_of_memory(path, payloads) as places, contextlib.ExitStack() as stack:
        look_up(places, path, payloads)
        assert read(places, payloads) == payloads
        (past,) = [handle for handle in handles_of(path) if reads.reads_past_cache(handle)]
        os.close(past)
        file = stack.enter_context(other.open("rb"))
        stack.callback(lambda: os.fstat(file.fileno()))  # still open at the end
        assert file.fileno() == past
        other.unlink()
        forget(path)
        assert read(places, payloads) == payloads
        assert not reads.reads_past_cache(past)
        assert any(reads.reads_past_cache(handle) for handle in handles_of(path))
        reads.close_gone()
        assert file.read(1) == b"\0"


def test_a_child_reads_as_its_parent_does(tmp_path: Path) -> None:
    payloads = {number: os.urandom(MIB) for number in range(1, 9)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as places:
        look_up(places, path, payloads)
        assert read(places, payloads) == payloads
        assert any(reads.reads_past_cache(handle) for handle in handles_of(path))
        child = os.fork()
        if child == 0:
            os._exit(0 if read(places, payloads) == payloads else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert read(places, payloads) == payloads


def test_where_there_is_no_such_way_the_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems that refuse it, which is found out once."""
    payloads = {number: os.urandom(MIB) for number in range(1, 31)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as places:
        look_up(places, path, payloads)
        refused: list[str] = []

        def refuse(name: str, flags: int) -> int:
            refused.append(name)
            raise OSError(22, "Invalid argument")

        # What is found out is remembered by the file's number, which a later file may get.
        monkeypatch.setattr(reads, "_handles", {})
        monkeypatch.setattr(os, "open", refuse)
        assert read(places, payloads) == payloads
        assert len(refused) == 1


def test_where_one_cannot_ask_for_what_is_in_memory_alone_it_is_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some file systems of a network."""
    payloads = {number: os.urandom(MIB) for number in range(1, 9)}
    path = tmp_path / "rows.db"
    preadv, asked = os.preadv, []

    def ask(handle: int, pieces: Sequence[memoryview], at: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return preadv(handle, pieces, at, flags)

    with rows_of(path, payloads, 65536) as (_, places):
        monkeypatch.setattr(os, "preadv", ask)
        for _ in range(3):
            assert read(places, payloads) == payloads
        assert os.RWF_NOWAIT in asked
        assert places._cache.is_roomy
        assert not any(reads.reads_past_cache(handle) for handle in handles_of(path))


def test_a_store_that_is_read_past_memory_gives_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    rng = np.random.default_rng(4)
    weights = {f"w{i}": rng.standard_normal((512, 1024), np.float32) for i in range(12)}
    with pydedup.open(path) as store:
        store.add("m", weights, policy=Exact())
    with pydedup.open(path, memory="3MiB") as store:  # each use reads
        for _ in range(4):
            forget(path)
            for name, array in store.load("m").items():
                np.testing.assert_array_equal(array, weights[name])
        assert any(reads.reads_past_cache(handle) for handle in handles_of(path))
        with pydedup.open(path, memory="3MiB") as other:  # finds a handle that takes other reads
            for _ in range(3):
                other.load("m")
            assert not reads.reads_past_cache(other._adapter._places._handle)
        store.add("n", {name: array + 1 for name, array in weights.items()}, policy=Exact())
        store.remove("m")
        store.vacuum(grace_seconds=0)
        for _ in range(3):
            forget(path)
            for name, array in store.load("n").items():
                np.testing.assert_array_equal(array, weights[name] + 1)
        assert store.verify().errors == []


def test_places_are_remembered_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.adapters._sqlite_places._MOST_KNOWN", 8)
    payloads = {number: bytes([number]) * 9000 for number in range(1, 41)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 1024) as (connection, places):
        for first in range(1, 41, 4):
            some = range(first, first + 4)
            assert [page.id for page in places.find(some)[1]] == list(some)  # as hints do
            assert len(places._known) <= 8
            assert 3 <= len(read(places, some)) <= 4  # one may be in pieces
            assert len(places._known) <= 8
        read(places, payloads)
        assert len(places._known) <= 8
        others = finding(connection, path)
        for first in range(1, 41, 4):  # what is met once is not looked for
            assert list(others.read(range(first, first + 4), memoryview)) == []
            assert len(others._known) <= 8


@pytest.mark.parametrize("error", [StoreError("the file is locked"), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("asked", ["root", "checksums"])
def test_what_cannot_be_looked_up_is_left_to_sqlite(
    tmp_path: Path, error: Exception, asked: str
) -> None:
    path, payloads = tmp_path / "rows.db", {number: bytes(9000) for number in range(1, 9)}

    def fail(*_: object) -> Any:
        raise error

    with rows_of(path, payloads, 1024) as (_, places):
        setattr(places, f"_{asked}", fail)
        assert read(places, payloads) == {}


def test_what_the_disk_does_not_give_is_left_to_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    payloads = {number: os.urandom(700_000) for number in range(1, 5)}
    with rows_out_of_memory(tmp_path / "rows.db", payloads) as places:
        monkeypatch.setattr(SystemCache, "fill", lambda self: (fail, True))
        monkeypatch.setattr("pydedup.adapters._sqlite_places.out_of_cache", fail)
        assert read(places, payloads) == {}
        monkeypatch.undo()
        assert len(read(places, payloads)) >= 2  # it is tried again


def test_a_file_that_was_moved_while_its_store_is_open(tmp_path: Path) -> None:
    """What is done where it lies is left, to SQLite, which has it open."""
    path = tmp_path / "s.db"
    with contextlib.closing(open_store(f"sqlite:///{path}")) as adapter:
        pages = add_random_pages(adapter, 3)
        path.rename(tmp_path / "elsewhere.db")
        cast(Any, adapter).settle()
        for _ in range(2):
            assert list(cast(Any, adapter).read_pages_into(list(pages), memoryview)) == []
            assert dict(adapter.read_pages(list(pages))) == pages
