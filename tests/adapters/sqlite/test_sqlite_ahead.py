# SPDX-License-Identifier: Apache-2.0
"""Payloads where they lie in the file: found, asked for before they are read, read without a copy.

What is found is right, and where it is not, nothing comes of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.adapters._sqlite_ahead import PagesAhead
from pydedup.adapters._sqlite_places import PagePlaces, StoredPage
from pydedup.adapters._sqlite_tree import NotFoundInFileError, Tree
from pydedup.errors import CorruptStoreError
from pydedup.policies import Exact

from .sqlite_rows import finding, in_memory, read, rows_of, rows_out_of_memory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system takes no hints"
)


def place_of(places: PagePlaces, row: int) -> tuple[int, int] | None:
    """Return where in the file a row goes on."""
    try:
        return next((page.place[:2] for page in places.find([row])[1]), None)
    except NotFoundInFileError:
        return None


@pytest.mark.parametrize("vacuum", ["NONE", "INCREMENTAL"])
@pytest.mark.parametrize(("page_bytes", "largest"), [(512, 6000), (1024, 9000), (65536, 1 << 20)])
def test_payloads_are_read_where_they_lie(
    tmp_path: Path, page_bytes: int, largest: int, vacuum: str
) -> None:
    chance = random.Random(page_bytes)
    numbers = chance.sample(range(1, 1 << 40), 3000 if page_bytes < 65536 else 60)
    payloads = {number: chance.randbytes(chance.randrange(largest)) for number in sorted(numbers)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, page_bytes, vacuum) as (_, places):
        found = {page.id: page.place for page in places.find(numbers)[1]}
        assert place_of(places, max(numbers) + 1) is None
        assert place_of(places, -5) is None
        given = read(places, numbers)
        again = read(places, numbers)
    data = path.read_bytes()  # no connection is open any more
    assert given == again
    assert given == {number: payloads[number] for number in given}
    assert set(found) == set(numbers)
    pieces = 0
    for number, payload in payloads.items():
        place = found[number]
        assert place.nbytes == len(payload)
        here = data[place.value : place.value + max(place.here, 0)]
        assert here == payload[: max(place.here, 0)]
        is_whole = len(payload) == place.here
        assert is_whole or place.stop - place.start >= len(payload) - place.here
        assert not (is_whole and number in given), "SQLite reads what is on a leaf as fast"
        pieces += not is_whole and number not in given
    assert len(given) > 9 * pieces
    assert len(given) > 40


def of_place(found: NDArray[np.bool_], place: tuple[int, int] | None) -> NDArray[np.bool_]:
    assert place is not None
    return found[place[0] // mmap.PAGESIZE : place[1] // mmap.PAGESIZE]


def partly_here(path: Path, places: dict[int, tuple[int, int] | None]) -> set[int]:
    """Return the rows of which something is in memory, but for the first in the file."""
    found = in_memory(path)  # to open a file brings in where it begins
    return {row for row, place in places.items() if row > 2 and of_place(found, place).any()}


def wait_for(path: Path, places: list[tuple[int, int] | None]) -> None:
    """Wait until these parts of a file are in memory."""
    deadline = time.monotonic() + 60
    while not all(of_place(in_memory(path), place).all() for place in places):
        assert time.monotonic() < deadline, "what was asked for did not come"
        time.sleep(0.01)


def test_what_is_asked_for_comes_and_nothing_else(tmp_path: Path) -> None:
    payloads = {number: os.urandom(1 << 20) for number in range(1, 41)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as found:
        walk = PagesAhead(found).walk([10, 20, 30])
        assert next(walk) == 10
        places = {number: place_of(found, number) for number in payloads}
    wait_for(path, [places[number] for number in (10, 20, 30)])
    assert partly_here(path, places) == {10, 20, 30}
    assert list(walk) == [20, 30]


def test_nothing_comes_behind_rows_that_are_in_memory(tmp_path: Path) -> None:
    payloads = {number: os.urandom(1 << 20) for number in range(1, 31)}
    path = tmp_path / "rows.db"
    with rows_out_of_memory(path, payloads) as found:
        ahead = PagesAhead(found)
        some = [10, 11, 12, 13]
        ahead.ask(some)
        places = {number: place_of(found, number) for number in payloads}
        wait_for(path, [places[number] for number in some])
        ahead.ask([14])
        wait_for(path, [places[14]])
    assert partly_here(path, places) == {*some, 14}


def test_what_is_asked_for_of_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ahead = PagesAhead(PagePlaces(str(tmp_path / "none.db"), lambda: 0, lambda _: ()))
    monkeypatch.setattr(ahead, "ask", asked.extend)
    ids = [3, *range(100, 140), 500, 509, 517, 900, *range(2000, 2400, 10)]
    assert list(ahead.walk(ids)) == ids
    assert asked == [3, 500, 509, 517, 900, *range(2000, 2400, 10)]


@pytest.mark.parametrize("count", range(1, 12))
def test_what_is_asked_for_of_the_parts_of_a_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    asked: list[int] = []
    ahead = PagesAhead(PagePlaces(str(tmp_path / "none.db"), lambda: 0, lambda _: ()))
    monkeypatch.setattr(ahead, "ask", asked.extend)
    some = list(range(100, 100 + count))  # as one of several readers gets them
    assert list(ahead.walk(some)) == some
    assert asked == (some if count < 4 else [])
    apart = list(range(100, 100 + 3 * count, 3))
    asked.clear()
    assert list(ahead.walk(apart)) == apart
    assert asked == apart


@pytest.mark.parametrize("damage", ["header", "root", "everything", "short", "shorter"])
def test_a_file_that_is_none_costs_only_the_hint(tmp_path: Path, damage: str) -> None:
    payloads = {number: os.urandom(100_000) for number in range(1, 31)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (connection, places):
        assert read(places, [7]) == {7: payloads[7]}
        again = finding(connection, path)
        chance = random.Random(3)
        data = bytearray(path.read_bytes())
        start, stop = {"header": (0, 100), "root": (4096, 20480)}.get(damage, (0, len(data)))
        data[start:stop] = chance.randbytes(stop - start)
        with path.open("r+b") as file:
            length = {"short": 50, "shorter": 10}.get(damage, len(data))
            file.write(data[:length])
            file.truncate(length)
        assert list(PagesAhead(again).walk([1, 17, 29])) == [1, 17, 29]
        assert place_of(again, 7) is None or damage == "header"
        # What was found before is read, as long as it is there.
        left = [7] if damage in ("header", "root") else []
        assert list(read(places, [7])) == left


def test_rows_that_moved_are_looked_up_anew(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 101)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (connection, places):
        some = [70, 80, 90]
        before = [place_of(places, number) for number in some]
        size = path.stat().st_size
        connection.execute("DELETE FROM pages WHERE id <= 50")
        connection.commit()
        connection.executescript("PRAGMA incremental_vacuum")
        assert path.stat().st_size < size
        with connection:
            rows = [(number, os.urandom(20_000)) for number in range(101, 201)]
            connection.executemany("INSERT INTO pages VALUES (?, 'live', x'00', ?)", rows)
        assert path.stat().st_size > size
        fresh = finding(connection, path)
        found = [place_of(places, number) for number in some]
        assert found == [place_of(fresh, number) for number in some]
        assert found != before
        given = read(places, some)
        assert given == {number: payloads[number] for number in given}


def test_rows_that_moved_within_the_file_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    payloads = {number: os.urandom(20_000) for number in range(1, 301)}
    with rows_of(path, payloads, 4096, "NONE") as (connection, places):
        assert len(read(places, payloads)) > 250
        size = path.stat().st_size
        with connection:  # others come where these were, in a tree of another shape
            connection.execute("DELETE FROM pages WHERE id % 2 = 0")
            rows = [(number, os.urandom(20_000)) for number in range(1001, 1151)]
            connection.executemany("INSERT INTO pages VALUES (?, 'live', x'00', ?)", rows)
        assert path.stat().st_size == size
        fresh = finding(connection, path)
        for number, payload in rows:
            for _ in range(2):
                found = read(places, [number])
                places.look_again(number)
            assert found in ({}, {number: payload})
        new = [number for number, _ in rows]
        found_now = [(page.id, page.place) for page in places.find(new)[1]]
        assert found_now == [(page.id, page.place) for page in fresh.find(new)[1]]
        assert len(found_now) == len(new)


def test_what_is_in_pieces_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.db"
    payloads = {number: os.urandom(50_000) for number in range(1, 41)}
    with rows_of(path, payloads, 4096, "NONE") as (connection, places):
        with connection:  # what is free lies here and there
            connection.execute("DELETE FROM pages WHERE id % 3 = 1 AND id < 40")
            connection.execute("INSERT INTO pages VALUES (99, '', x'00', ?)", [bytes(400_000)])
        assert 99 not in read(places, [99])
        asked: list[int] = []
        monkeypatch.setattr(os, "preadv", lambda *_: asked.append(1) or 0)
        assert read(places, [99]) == {}
        assert asked == []


class Forgetting(dict[int, StoredPage]):
    """Forgets all once it said that it has something, as another thread may make it do."""

    def __contains__(self, key: object) -> bool:
        there = super().__contains__(key)
        self.clear()
        return there


def test_places_that_another_thread_forgets_are_no_error(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 11)}
    with rows_of(tmp_path / "rows.db", payloads, 4096) as (_, places):
        places.find([3, 7])
        places._known = Forgetting(places._known)
        places.find([3, 7])
        assert list(PagesAhead(places).walk([3, 7])) == [3, 7]
        found = read(places, [3, 7])
        assert found == {number: payloads[number] for number in found}


def test_a_file_that_is_cut_meanwhile_is_no_error(tmp_path: Path) -> None:
    payloads = {number: os.urandom(20_000) for number in range(1, 101)}
    path = tmp_path / "rows.db"
    with rows_of(path, payloads, 4096) as (_, places):
        size = path.stat().st_size
        with path.open("r+b") as file:
            tree = Tree(file.fileno(), size)
            leaf = tree._leaf_of(places._root(), 77)
            for left in reversed(range(12)):
                file.truncate((leaf - 1) * 4096 + left)
                with pytest.raises(NotFoundInFileError):
                    tree.find(places._root(), [77])


def test_a_file_that_is_not_open_yet_is_opened_by_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    with rows_of(path, {7: os.urandom(20_000)}, 4096) as (_, places):
        root, place = places._root(), place_of(places, 7)
    with contextlib.ExitStack() as opened:

        def root_of_pages() -> int:
            connection = opened.enter_context(contextlib.closing(sqlite3.connect(path)))
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            return root

        assert place_of(PagePlaces(str(path), root_of_pages, lambda _: [(7, b"")]), 7) == place


def test_other_files_are_not_asked_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "rows.db", []
    with (
        rows_of(path, {7: os.urandom(20_000)}, 4096) as (_, places),
        (tmp_path / "other").open("wb"),
    ):
        fstat = os.fstat

        def note(handle: int) -> os.stat_result:
            asked.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
            return fstat(handle)

        monkeypatch.setattr(os, "fstat", note)
        assert place_of(places, 7) is not None
    assert set(asked) == {str(path)}


# ---- a store ------------------------------------------------------------------------------------


def weights_of(seed: int, count: int = 8) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.standard_normal((512, 1024), np.float32) for i in range(count)}


def given(adapter: Any, ids: Iterable[int]) -> dict[int, bytes]:
    """Return what is read without a copy."""

    def memory(nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    checksums = {row.id: row.checksum for row in adapter.page_rows()}
    found = {}
    for page_id, checksum, payload in adapter.read_pages_into(list(ids), memory):
        assert checksum == checksums[page_id]
        found[page_id] = bytes(payload)
    return found


def test_pages_of_a_store_are_read_without_a_copy(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/models.db"
    with pydedup.open(url) as store:
        store.add("m", weights_of(1), policy=Exact())
        adapter = store._adapter
        ids = [row.id for row in adapter.page_rows()]
        pages = dict(adapter.read_pages(ids))
        large = {number for number, payload in pages.items() if len(payload) > 500_000}
        assert len(large) >= 16
        assert given(adapter, ids) == {}, "what was not met before is left to SQLite"
        found = given(adapter, [*ids, *ids, max(ids) + 1])
        assert found == {number: pages[number] for number in found}
        assert set(found) >= large
        store.remove("m")
        store.vacuum(grace_seconds=0)
        with pydedup.open(url) as other:
            assert given(other._adapter, ids) == {}


def test_pages_that_are_in_the_log_alone_are_read(tmp_path: Path) -> None:
    path, weights = tmp_path / "models.db", weights_of(2)
    with pydedup.open(path) as store, contextlib.closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM sqlite_master").fetchall()  # holds the log back
        store.add("m", weights, policy=Exact())
        adapter = store._adapter
        ids = [row.id for row in adapter.page_rows()]
        assert len(given(adapter, ids)) < len(ids) / 2
        for name, array in store.load("m").items():
            np.testing.assert_array_equal(array, weights[name])
        reader.rollback()


def test_other_bytes_where_a_page_was_are_not_taken_for_it(tmp_path: Path) -> None:
    """Two pages change their places, without the file's size telling; one has a wrong bit."""
    path, weights = tmp_path / "models.db", weights_of(3)
    with pydedup.open(path) as store:
        store.add("m", weights, policy=Exact())
    with pydedup.open(path, memory="2MiB") as store:  # each use reads
        adapter = store._adapter
        ids = [row.id for row in adapter.page_rows()][:2]
        for name, array in store.load("m").items():
            np.testing.assert_array_equal(array, weights[name])
        _, pages = adapter._places.find(ids)
        one, two = pages
        adapter._places._known[one.id] = one._replace(place=two.place)
        adapter._places._known[two.id] = two._replace(place=one.place)
        for _ in range(2):
            for name, array in store.load("m").items():
                np.testing.assert_array_equal(array, weights[name])
        again = [(page.id, page.place) for page in adapter._places.find(ids)[1]]
        assert again == [(page.id, page.place) for page in pages], "they were looked for again"
        assert store.verify().errors == []
        at = two.place.start + 70_000
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CorruptStoreError, match=f"page {two.id}"):
            store.load("m")
    with (
        pydedup.open(path, memory="2MiB") as store,
        pytest.raises(CorruptStoreError, match=f"page {two.id}"),
    ):
        store.load("m")


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
