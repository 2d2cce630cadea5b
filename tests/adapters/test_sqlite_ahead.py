# SPDX-License-Identifier: Apache-2.0
"""Hints for the system of what SQLite will read: they are right, and never more than hints."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydedup.adapters._sqlite_ahead import PagesAhead, _NoHintError, _Tree

import pydedup
from pydedup.policies import Exact

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system takes no hints"
)


@contextlib.contextmanager
def rows_of(
    path: Path, payloads: dict[int, bytes], page_bytes: int, vacuum: str = "INCREMENTAL"
) -> Iterator[tuple[sqlite3.Connection, PagesAhead]]:
    """Make a database with a table like ours; yield a connection and who asks ahead."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            f"PRAGMA page_size = {page_bytes}; PRAGMA auto_vacuum = {vacuum};"
            "CREATE TABLE before (x); CREATE TABLE pages (id INTEGER PRIMARY KEY, "
            "state TEXT, pad BLOB, payload BLOB)"
        )
        with connection:
            connection.executemany(
                "INSERT INTO pages VALUES (?, 'live', x'00', ?)", payloads.items()
            )
        yield connection, asking(connection, path)


def asking(connection: sqlite3.Connection, path: Path) -> PagesAhead:
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pages'")
    return PagesAhead(str(path), lambda: root)


def content(data: bytes, start: int, page_bytes: int) -> bytes | None:
    """Return what these pages hold, `None` where they are no chain that ends with the last."""
    chain = [data[at : at + page_bytes] for at in range(0, len(data), page_bytes)]
    numbers = [int.from_bytes(page[:4], "big") for page in chain]
    first = start // page_bytes + 2
    if numbers != [*range(first, first + len(chain) - 1), 0]:
        return None
    return b"".join(page[4:] for page in chain)


@pytest.mark.parametrize("vacuum", ["NONE", "INCREMENTAL"])
@pytest.mark.parametrize(("page_bytes", "largest"), [(512, 6000), (1024, 9000), (65536, 1 << 20)])
def test_places_are_where_rows_go_on(
    tmp_path: Path, page_bytes: int, largest: int, vacuum: str
) -> None:
    chance = random.Random(page_bytes)
    numbers = chance.sample(range(1, 1 << 40), 3000 if page_bytes < 65536 else 60)
    payloads = {number: chance.randbytes(chance.randrange(largest)) for number in sorted(numbers)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, page_bytes, vacuum) as (_, ahead):
        places = {number: ahead.place(number) for number in payloads}
        assert ahead.place(max(numbers) + 1) is None
        assert ahead.place(-5) is None
    data = path.read_bytes()  # no connection is open any more
    right = apart = 0
    for number, payload in payloads.items():
        place = places[number]
        assert place is not None
        if payload in data[slice(*place)]:  # it is on its leaf as a whole
            continue
        found = content(data[slice(*place)], place[0], page_bytes)
        if found is None:
            apart += 1
            continue
        assert (payload[page_bytes:] or payload[-16:]) in found, number
        right += 1
    assert right > 0.9 * (right + apart) > 40


def in_memory(path: Path) -> NDArray[np.bool_]:
    """Return which pages of a file the system has in memory; to ask brings none in."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = len(mapped)
        found = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (
            ctypes.c_void_p(start),
            ctypes.c_size_t(size),
            ctypes.c_void_p(found.ctypes.data),
        )
        assert libc.mincore(*arguments) == 0, os.strerror(ctypes.get_errno())
        return (found & 1).astype(bool)


def of_place(found: NDArray[np.bool_], place: tuple[int, int] | None) -> NDArray[np.bool_]:
    assert place is not None
    return found[place[0] // mmap.PAGESIZE : place[1] // mmap.PAGESIZE]


def partly_here(path: Path, places: dict[int, tuple[int, int] | None]) -> set[int]:
    """Return the rows of which something is in memory, but for the first in the file."""
    found = in_memory(path)  # to open a file brings in where it begins
    return {row for row, place in places.items() if row > 2 and of_place(found, place).any()}


def wait_for(path: Path, places: list[tuple[int, int] | None]) -> None:
    """Wait until these parts of a file are in memory."""
    deadline = time.monotonic() + 20
    while not all(of_place(in_memory(path), place).all() for place in places):
        assert time.monotonic() < deadline, "what was asked for did not come"
        time.sleep(0.01)


def forget(path: Path) -> None:
    """Have the system drop the file from memory, or skip where it does not."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > 1 << 20 and in_memory(path)[(1 << 20) // mmap.PAGESIZE :].any():
        pytest.skip("the file system keeps the file in memory")
    try:
        handle = os.open(path, os.O_RDONLY)
        os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        pytest.skip("the file system does not say what is in memory")
    finally:
        os.close(handle)


@contextlib.contextmanager
def rows_out_of_memory(path: Path, payloads: dict[int, bytes]) -> Iterator[PagesAhead]:
    """Make such a database that the system has to read; yield who asks ahead."""
    with rows_of(path, payloads, 65536):
        pass
    forget(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield asking(connection, path)


def test_what_is_asked_for_comes_and_nothing_else(tmp_path: Path) -> None:
    payloads = {number: os.urandom(1 << 20) for number in range(1, 41)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as ahead:
        walk = ahead.walk([10, 20, 30])
        assert next(walk) == 10
        places = {number: ahead.place(number) for number in payloads}
    wait_for(path, [places[number] for number in (10, 20, 30)])
    assert partly_here(path, places) == {10, 20, 30}
    assert list(walk) == [20, 30]


def test_nothing_comes_behind_rows_that_are_in_memory(tmp_path: Path) -> None:
    payloads = {number: os.urandom(1 << 20) for number in range(1, 31)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as ahead:
        some = [10, 11, 12, 13]
        ahead.ask(some)
        places = {number: ahead.place(number) for number in payloads}
        wait_for(path, [places[number] for number in some])
        ahead.ask([14])
        wait_for(path, [places[14]])
    assert partly_here(path, places) == {*some, 14}


def test_what_is_asked_for_of_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ahead = PagesAhead(str(tmp_path / "none.db"), lambda: 0)
    monkeypatch.setattr(ahead, "ask", asked.extend)
    ids = [3, *range(100, 140), 500, 509, 517, 900, *range(2000, 2400, 10)]
    assert list(ahead.walk(ids)) == ids
    assert asked == [3, 500, 509, 517, 900, *range(2000, 2400, 10)]


@pytest.mark.parametrize("count", range(1, 12))
def test_what_is_asked_for_of_the_parts_of_a_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    asked: list[int] = []
    ahead = PagesAhead(str(tmp_path / "none.db"), lambda: 0)
    monkeypatch.setattr(ahead, "ask", asked.extend)
    some = list(range(100, 100 + count))  # as one of several readers gets them
    assert list(ahead.walk(some)) == some
    assert asked == (some if count < 4 else [])
    apart = list(range(100, 100 + 3 * count, 3))
    asked.clear()
    assert list(ahead.walk(apart)) == apart
    assert asked == apart


@pytest.mark.parametrize("damage", ["header", "root", "everything", "short"])
def test_a_file_that_is_none_costs_only_the_hint(tmp_path: Path, damage: str) -> None:
    payloads = {number: os.urandom(100_000) for number in range(1, 31)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (connection, ahead):
        assert ahead.place(7) is not None
        again = PagesAhead(str(path), ahead._root)
        chance = random.Random(3)
        data = bytearray(path.read_bytes())
        start, stop = {"header": (0, 100), "root": (4096, 20480)}.get(damage, (0, len(data)))
        data[start:stop] = chance.randbytes(stop - start)
        with path.open("r+b") as file:
            file.write(data[: 50 if damage == "short" else len(data)])
            if damage == "short":
                file.truncate(50)
        assert list(again.walk([1, 17, 29])) == [1, 17, 29]
        assert again.place(7) is None or damage == "header"
        del connection


def test_rows_that_moved_are_looked_up_anew(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 101)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (connection, ahead):
        ahead.ask([70, 80, 90])
        before = [ahead.place(number) for number in (70, 80, 90)]
        size = path.stat().st_size
        connection.execute("DELETE FROM pages WHERE id <= 50")
        connection.commit()
        connection.executescript("PRAGMA incremental_vacuum")
        assert path.stat().st_size < size
        with connection:
            rows = [(number, os.urandom(20_000)) for number in range(101, 201)]
            connection.executemany("INSERT INTO pages VALUES (?, 'live', x'00', ?)", rows)
        assert path.stat().st_size > size
        ahead.ask([70, 80, 90])
        fresh = PagesAhead(str(path), ahead._root)
        places = [ahead.place(number) for number in (70, 80, 90)]
        assert places == [fresh.place(number) for number in (70, 80, 90)]
        assert places != before


class Forgetting(dict[int, tuple[int, int]]):
    """Forgets all once it said that it has something, as another thread may make it do."""

    def __contains__(self, key: object) -> bool:
        there = super().__contains__(key)
        self.clear()
        return there


def test_places_that_another_thread_forgets_are_no_error(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 11)}
    with rows_of(tmp_path / "rows.db", payloads, 4096) as (_, ahead):
        ahead.ask([3, 7])
        ahead._known = Forgetting(ahead._known)
        ahead.ask([3, 7])
        assert list(ahead.walk([3, 7])) == [3, 7]


def test_a_file_that_is_cut_meanwhile_is_no_error(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 101)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (_, ahead):
        size = path.stat().st_size
        with path.open("r+b") as file:
            tree = _Tree(file.fileno(), size)
            leaf = tree._leaf_of(ahead._root(), 77)
            for left in reversed(range(12)):
                file.truncate((leaf - 1) * 4096 + left)
                with pytest.raises(_NoHintError):
                    tree.find(ahead._root(), [77])


def test_a_file_that_is_not_open_yet_is_opened_by_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    with rows_of(path, {7: os.urandom(20_000)}, 4096) as (_, ahead):
        root, place = ahead._root(), ahead.place(7)
    with contextlib.ExitStack() as opened:

        def root_of_pages() -> int:
            connection = opened.enter_context(contextlib.closing(sqlite3.connect(path)))
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            return root

        assert PagesAhead(str(path), root_of_pages).place(7) == place


def test_other_files_are_not_asked_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "rows.db", []
    with (
        rows_of(path, {7: os.urandom(20_000)}, 4096) as (_, ahead),
        (tmp_path / "other").open("wb"),
    ):
        fstat = os.fstat

        def note(handle: int) -> os.stat_result:
            asked.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
            return fstat(handle)

        monkeypatch.setattr(os, "fstat", note)
        assert ahead.place(7) is not None
    assert set(asked) == {str(path)}


def test_pages_are_read_right_while_rows_move(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    weights = {f"w{i}": rng.standard_normal((512, 1024), np.float32) for i in range(8)}
    with pydedup.open(tmp_path / "models.db") as store:
        for number in range(4):
            moved = {name: array + np.float32(number) for name, array in weights.items()}
            store.add(f"m{number}", moved, policy=Exact())
        before = {
            name: [array.copy() for array in store.load(name).values()] for name in ("m1", "m3")
        }
        ids = [row.id for row in store._adapter.page_rows()][::9]
        first = dict(store._adapter.read_pages(ids))
        store.remove("m0")
        store.remove("m2")
        store.vacuum(grace_seconds=0)
    with pydedup.open(tmp_path / "models.db") as store:
        left = {row.id for row in store._adapter.page_rows()}
        again = dict(store._adapter.read_pages(ids))
        assert set(again) == left.intersection(ids) != set()
        assert all(again[number] == first[number] for number in again)
        for name, arrays in before.items():
            for array, found in zip(arrays, store.load(name).values(), strict=True):
                np.testing.assert_array_equal(array, found)
