# SPDX-License-Identifier: Apache-2.0
"""Hints for the system of what SQLite will read: they are right, and never more than hints."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydedup.adapters._sqlite_ahead import PagesAhead

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
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pages'")
        yield connection, PagesAhead(str(path), lambda: root)


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


def is_in_memory(path: Path, at: int) -> bool:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def forget(path: Path) -> None:
    """Have the system drop the file from memory, or skip where it does not."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    try:
        if any(is_in_memory(path, at) for at in range(1 << 20, size, 1 << 20)):
            pytest.skip("the file system keeps the file in memory")
    except OSError:
        pytest.skip("the file system does not say what is in memory")


def test_what_is_asked_for_comes_and_nothing_else(tmp_path: Path) -> None:
    payloads = {number: os.urandom(1 << 20) for number in range(1, 41)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 65536):
        pass
    forget(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pages'")
        ahead = PagesAhead(str(path), lambda: root)
        walk = ahead.walk([10, 20, 30])
        assert next(walk) == 10
        places = {number: ahead.place(number) for number in payloads}
    deadline = time.monotonic() + 20
    while True:
        here = {
            number
            for number, place in places.items()
            if place is not None
            and is_in_memory(path, place[0])
            and is_in_memory(path, place[1] - 1)
        }
        if here >= {10, 20, 30} or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert here == {10, 20, 30}
    assert list(walk) == [20, 30]


def test_what_is_asked_for_of_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ahead = PagesAhead(str(tmp_path / "none.db"), lambda: 0)
    monkeypatch.setattr(ahead, "ask", asked.extend)
    ids = [3, *range(100, 140), 500, 509, 517, 900, *range(2000, 2400, 10)]
    assert list(ahead.walk(ids)) == ids
    assert asked == [3, 500, 509, 517, 900, *range(2000, 2400, 10)]


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
        assert set(again) == left.intersection(ids)
        assert all(again[number] == first[number] for number in again)
        for name, arrays in before.items():
            for array, found in zip(arrays, store.load(name).values(), strict=True):
                np.testing.assert_array_equal(array, found)
