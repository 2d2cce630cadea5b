# SPDX-License-Identifier: Apache-2.0
"""What a store over several servers does beyond the contract: its list, copies, leftovers."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.adapter import LIVE, Adapter
from pydedup.adapters._shard import Shard
from pydedup.adapters._shards_url import places_of
from pydedup.errors import ArgumentError, StoreError
from pydedup.testing._contract_base import add_random_pages, in_thread, open_store
from pydedup.testing.shards import ShardedPlace, ids_on

# ---- where pages are ---------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [3, 7])
def test_pages_are_spread_evenly_and_few_move(shards: int) -> None:
    names = [f"{number:032x}" for number in range(shards)]
    before = {page: places_of(page, names, 2) for page in range(1, 4000)}
    for place in (0, 1):
        counts = Counter(places[place] for places in before.values())
        assert min(counts.values()) > 0.85 * 4000 / shards
    assert all(len(set(places)) == 2 for places in before.values())
    assert before == {page: places_of(page, names[::-1], 2) for page in before}
    moved = sum(
        len(set(places_of(page, [*names, "f" * 32], 2)).difference(places))
        for page, places in before.items()
    )
    assert moved == pytest.approx(2 * 4000 / (shards + 1), rel=0.15)


def test_pages_stay_where_they_are() -> None:
    """These places are part of the format: with others, no page of a store would be found."""
    names = ("00", "5a", "ff", "e3")
    assert {page: places_of(page, names, 2) for page in (1, 2, 255, 1 << 16, 1 << 40)} == {
        1: ["e3", "00"],
        2: ["ff", "5a"],
        255: ["ff", "e3"],
        1 << 16: ["ff", "00"],
        1 << 40: ["ff", "5a"],
    }


def test_payloads_are_in_the_shards_alone(store: Adapter, place: ShardedPlace) -> None:
    pages = add_random_pages(store, 30, size=2000)
    assert place.rows(0, "SELECT SUM(octet_length(payload)), SUM(payload_bytes) FROM {}.pages") == [
        (0, 60_000)
    ]
    assert place.payloads() == {number: {payload} for number, payload in pages.items()}
    there = [len(place.rows(number, "SELECT id FROM {}.page_payloads")) for number in range(3)]
    assert sum(there) == 30
    assert min(there) > 0


def test_servers_that_publish_all_their_tables(place: ShardedPlace) -> None:
    """What has no key cannot be changed there, as the row by which a shard says whose it is."""
    place.rows(1, "CREATE PUBLICATION everything FOR ALL TABLES")
    try:
        store = open_store(place.url(replicas=2))
        pages = add_random_pages(store, 4, size=2000)
        with store.transaction():
            store.delete_pages(list(pages)[:2])
        store.compact()
        assert sorted(place.payloads()) == list(pages)[2:]
        store.close()
    finally:
        place.rows(1, "DROP PUBLICATION everything")


def test_what_a_shard_keeps_is_on_its_disk_before_the_coordinator_commits(
    store: Adapter, place: ShardedPlace
) -> None:
    """Also where a shard's own setting is not to wait for the disk: the page would be lost."""
    noted = (
        "CREATE TABLE {}.seen (setting text)",
        "CREATE FUNCTION {0}.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO "
        "{0}.seen VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$",
        "CREATE TRIGGER see BEFORE INSERT ON {0}.page_payloads FOR EACH ROW "
        "EXECUTE FUNCTION {0}.see()",
    )
    for number, statement in itertools.product(range(3), noted):
        place.rows(number, statement)
    for number in range(3):
        place.rows(number, "ALTER DATABASE postgres SET synchronous_commit = off")
    try:
        in_thread(lambda: add_random_pages(store, 12, size=500))  # with new connections
    finally:
        for number in range(3):
            place.rows(number, "ALTER DATABASE postgres RESET synchronous_commit")
    seen = [value for number in range(3) for (value,) in place.rows(number, "TABLE {}.seen")]
    assert set(seen) == {"on"}
    assert len(seen) == 12


def test_what_was_interrupted_on_a_shard_is_read_by_nobody_else(store: Adapter) -> None:
    pages = add_random_pages(store, 30, size=2000)
    for shard in store._shards:  # type: ignore[attr-defined]
        with shard._pool.acquire() as session:
            session.connection.pgconn.send_query(b"SELECT 17")
    assert dict(store.read_pages(list(pages))) == pages


# ---- the list of shards ------------------------------------------------------------------------


def refused(url: str, *words: str, mode: str = "a") -> str:
    """Open a store, which is refused in these words; return all that is said."""
    with pytest.raises(ArgumentError) as told:
        registry.connect(url, mode=mode)
    for word in words:
        assert word in str(told.value)
    return str(told.value)


# ---- copies ------------------------------------------------------------------------------------


def flip(place: ShardedPlace, number: int, _: dict[int, set[bytes]]) -> None:
    place.rows(
        number,
        "UPDATE {}.page_payloads "
        "SET payload = set_byte(payload, 9000, 255 - get_byte(payload, 9000))",
    )


def exchange(place: ShardedPlace, number: int, pages: dict[int, set[bytes]]) -> None:
    """Let a shard have another page in the place of each one: sound, but not the one."""
    others = dict(zip(pages, [*list(pages)[1:], *pages], strict=False))
    told = "UPDATE {}.page_payloads SET payload = %s WHERE id = %s"
    for page in ids_on(place, number):
        place.rows(number, told, min(pages[others[page]]), page)


@pytest.mark.parametrize("damage", [flip, exchange])
def test_of_a_damaged_copy_the_other_is_read(
    place: ShardedPlace, damage: Callable[[ShardedPlace, int, dict[int, set[bytes]]], None]
) -> None:
    model = {"w": np.random.default_rng(1).standard_normal((512, 1024)).astype(np.float32)}
    url = place.url(replicas=2)
    with pydedup.open(url) as store:
        store.add("m@1", model, policy=policies.Exact())
        assert store.verify().ok
    first, pages = place.fullest(), place.payloads()
    damage(place, first, pages)
    with pydedup.open(url, mode="r") as store:
        assert store.load("m")["w"].tobytes() == model["w"].tobytes()
        report = store.verify()
        assert report.damaged_pages == {}
        assert report.errors
        assert any("a copy of it is damaged" in error for error in report.errors)
        assert all("copy of" in error for error in report.errors)
    for number in {0, 1, 2} - {first}:
        damage(place, number, pages)
    with pydedup.open(url, mode="r") as store, pytest.raises(StoreError, match="read by m@1"):
        store.load("m")


def test_adds_and_repairs_read_the_other_copy_too(place: ShardedPlace, tmp_path: Path) -> None:
    model = {"w": np.random.default_rng(1).standard_normal((512, 1024)).astype(np.float32)}
    other = tmp_path / "other.db"
    for url in (place.url(replicas=2), other):
        with pydedup.open(url) as store:
            store.add("m@1", model, policy=policies.Exact())
    pages = list(place.payloads())
    for number in range(3):  # in one of these turns the copy that is asked for first
        with contextlib.closing(sqlite3.connect(other)) as connection, connection:
            connection.execute("UPDATE pydedup_pages SET payload = substr(payload, 1, 9000)")
        damage = "UPDATE {}.page_payloads SET payload = "
        damage += "set_byte(payload, 9000, 255 - get_byte(payload, 9000)) WHERE id = ANY(%s)"
        place.rows(number, damage, pages)
        near = {"w": model["w"] + np.float32(1e-6 * (number + 1))}
        with pydedup.open(place.url(replicas=2)) as store:
            assert store.add(f"near{number}", near).delta_blocks
            assert store.load(f"near{number}")["w"].tobytes() == near["w"].tobytes()
        with pydedup.open(other) as store:
            assert store.verify(repair_from=place.url(replicas=2)).ok
            assert store.load("m")["w"].tobytes() == model["w"].tobytes()
        place.rows(number, damage, pages)  # as it was


def test_of_a_lost_copy_the_other_is_read(place: ShardedPlace) -> None:
    adapter = open_store(place.url(replicas=2))
    pages = add_random_pages(adapter, 20, size=3000)
    place.rows(1, "DELETE FROM {}.page_payloads WHERE id % 2 = 0")
    assert sorted(adapter.read_pages(list(pages))) == sorted(pages.items())  # each of them once
    (complaint,) = adapter.integrity_errors()
    assert "lacks its copy of" in complaint
    assert complaint.endswith("; the other copy is read")
    adapter.close()


# ---- the rest of pydedup -----------------------------------------------------------------------


def test_models_are_copied_there_and_back(place: ShardedPlace, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((512, 1024)).astype(np.float32)
    models = {"a@1": {"w": base}, "b@1": {"w": base + np.float32(1e-4)}}
    file, back = f"sqlite:///{tmp_path / 'a.db'}", tmp_path / "b.db"
    with pydedup.open(file) as store:
        store.add_many(dict(models.items()))
        store.copy_to(place.url(replicas=2))
    with pydedup.open(place.url(replicas=2)) as store:
        assert store.verify().ok
        assert store.stats().pages == len(place.payloads())
        store.copy_to(f"sqlite:///{back}")
        store.backup(tmp_path / "backup.db")
    for url in (f"sqlite:///{back}", f"sqlite:///{tmp_path / 'backup.db'}"):
        with pydedup.open(url, mode="r") as store:
            for address, model in models.items():
                assert store.load(address)["w"].tobytes() == model["w"].tobytes()


def test_functions_in_the_server_are_refused(store: Any) -> None:
    for call in (store.install_functions, store.function_statements):
        with pytest.raises(StoreError, match="in shards"):
            call(None)


# ---- what is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 1000])
def test_payloads_without_a_page_are_collected(
    at_once: int, store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.adapters._shards_reading.IDS_AT_ONCE", at_once)
    pages = add_random_pages(store, 9, size=500)
    place.rows(1, "INSERT INTO {}.page_payloads VALUES (1000000, 'left by a killed writer')")
    with store.transaction():
        store.delete_pages(list(pages)[:4])
    assert len(place.payloads()) == 10
    store.compact()
    assert place.payloads().keys() == set(list(pages)[4:])


def test_space_of_what_was_collected_is_used_again(store: Adapter, place: ShardedPlace) -> None:
    sizes = []
    for _ in range(3):
        pages = add_random_pages(store, 30, size=20_000)
        asked = "SELECT pg_total_relation_size('{}.page_payloads')"
        sizes.append(sum(place.rows(number, asked)[0][0] for number in range(3)))
        with store.transaction():
            store.delete_pages(list(pages))
        store.compact()
    assert sizes[-1] < 1.5 * sizes[0]


def test_a_coordinator_that_was_restored_is_vacuumed_first(place: ShardedPlace) -> None:
    """As the error says: shards have pages that it knows nothing of, under ids that come next."""
    model = {"w": np.random.default_rng(4).standard_normal((512, 1024)).astype(np.float32)}
    with pydedup.open(place.url()) as store:
        for number in range(3):
            left = "INSERT INTO {}.page_payloads SELECT n, 'left' FROM generate_series(1, 100) n"
            place.rows(number, left)
        with pytest.raises(StoreError, match=r"knows nothing of.* run `pydedup vacuum`"):
            store.add("m@1", model, policy=policies.Exact())
        store.vacuum()
        store.add("m@1", model, policy=policies.Exact())
        assert store.load("m")["w"].tobytes() == model["w"].tobytes()
        assert store.verify().ok


@pytest.mark.parametrize("change", ["add", "delete"])
def test_pages_that_come_or_go_while_copies_are_counted_are_not_missing(
    change: str, store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = add_random_pages(store, 60, size=500)
    listed = Shard.payload_ids
    with contextlib.closing(open_store(place.url())) as other:

        def late(self: Shard, after: int, limit: int) -> list[tuple[int, int]]:
            monkeypatch.undo()
            if change == "delete":
                with other.transaction():
                    other.delete_pages(list(pages))
                other.compact()
            found = listed(self, after, limit)
            if change == "add":
                add_random_pages(other, 60, size=500)
            return found

        monkeypatch.setattr(Shard, "payload_ids", late)
        assert store.integrity_errors() == []


def test_nothing_is_published_where_a_shard_did_not_keep_its_part(
    store: Adapter, place: ShardedPlace
) -> None:
    """Who catches an error of one insertion goes on, but the shard has dropped those before it."""
    for number in range(3):
        left = "INSERT INTO {}.page_payloads SELECT n, 'left' FROM generate_series(61, 200) n"
        place.rows(number, left)

    def write() -> None:
        with store.transaction():
            for refused in (False, True):
                with pytest.raises(StoreError) if refused else contextlib.nullcontext():
                    store.insert_pages([(bytes(16), b"x" * 99)] * 60, state=LIVE)

    with pytest.raises(StoreError, match="did not keep what was written"):
        write()
    assert store.page_rows() == []
    store.compact()
    assert place.payloads() == {}


def test_what_failed_leaves_no_transaction_open(store: Adapter, place: ShardedPlace) -> None:
    def fail() -> None:
        with store.transaction():
            store.insert_pages([(bytes(16), b"x" * 99)] * 60, state=LIVE)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    idle = "SELECT query FROM pg_stat_activity WHERE state LIKE 'idle in %' AND query LIKE '%{}%'"
    assert [place.rows(number, idle) for number in range(3)] == [[]] * 3
    assert place.payloads() == {}


def test_what_is_published_while_leftovers_are_listed_is_kept(
    store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its payload was there then, and its page was not yet."""
    adapter: Any = store
    committed, listed = threading.Event(), threading.Event()
    commit, alone = adapter._commit_shards, adapter._alone

    def commit_and_wait(touched: Any) -> None:
        commit(touched)
        committed.set()
        assert listed.wait(60)

    def alone_after_the_list() -> bool:
        listed.set()
        return bool(alone())

    monkeypatch.setattr("pydedup.adapters._shards_reading.WAIT_SECONDS", 60.0)
    monkeypatch.setattr(adapter, "_commit_shards", commit_and_wait)
    with contextlib.closing(open_store(place.url())) as other, ThreadPoolExecutor() as threads:
        monkeypatch.setattr(other, "_alone", alone_after_the_list)
        adding = threads.submit(add_random_pages, store, 4, size=500)
        assert committed.wait(60)
        other.compact()
        pages = adding.result()
        assert dict(other.read_pages(list(pages))) == pages
