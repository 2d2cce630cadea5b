# SPDX-License-Identifier: Apache-2.0
"""Copies of pages that are missing or damaged are put back on their shards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapters import _shards_refill
from pydedup.catalog import page_readers
from pydedup.cli.app import main
from pydedup.errors import ArgumentError, ReadOnlyError, StoreError
from pydedup.maintenance import refill
from pydedup.testing._contract_base import in_thread
from pydedup.testing.shards import (
    MODELS,
    POLICY,
    NewPlace,
    ShardedPlace,
    drop,
    fill,
    ids_on,
    is_empty,
    is_sound,
    model_of,
    serves,
)
from pydedup.types import Progress

pytestmark = pytest.mark.usefixtures("known_places")

#: Changes one byte of what it is put behind.
FLIP = (
    "UPDATE {}.page_payloads SET payload = set_byte(payload, 9000, 255 - get_byte(payload, 9000))"
)


# ---- putting copies back -------------------------------------------------------------------------


def test_what_is_missing_or_damaged_is_put_back(place: ShardedPlace) -> None:
    """Half of what one shard has is gone; another has a byte flipped in the other half, or ends."""
    url = place.url(2)
    fill(url)
    there = place.payloads()
    missing = len(place.rows(1, "DELETE FROM {}.page_payloads WHERE id % 2 = 0 RETURNING id"))
    flipped = len(place.rows(2, f"{FLIP} WHERE id % 2 = 1 RETURNING id"))
    # One is too short, and one is that of another page.
    on = [set(ids_on(place, number)) for number in range(3)]
    (cut, *_) = sorted(page for page in on[0] & on[1] if page % 2)
    (mixed, *_) = sorted(page for page in on[0] & on[2] if not page % 2)
    change = "UPDATE {}.page_payloads SET payload = %s WHERE id = %s"
    for page, payload in ((cut, min(there[cut])[:5000]), (mixed, min(there[cut]))):
        place.rows(0, change, payload, page)
    assert min(missing, flipped) > 0
    told: list[tuple[str, int, int]] = []
    with pydedup.open(url) as store:
        report = store.refill(progress=lambda *state: told.append(state))
        shown = [shard.shown for shard in store._adapter._shards]  # type: ignore[attr-defined]
    assert report.ok
    assert (report.missing, report.damaged) == (missing, flipped + 2)
    assert report.places == dict(zip(shown, (2, missing, flipped), strict=True))
    ends = [stage for stage, done, total in told if done == total]
    assert ends == ["refilling", "checking copies"]
    assert place.payloads() == there
    is_sound(url)


def test_a_page_without_a_whole_copy_is_told_and_left(
    place: ShardedPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, other = place.url(2), tmp_path / "other.db"
    fill(url)
    fill(str(other))
    with pydedup.open(url, mode="r") as store:
        page = next(n for n, models in page_readers(store._adapter).items() if models == ["m1@1"])
    for number in range(3):
        place.rows(number, f"{FLIP} WHERE id = %s", page)
    place.rows(1, "DELETE FROM {}.page_payloads WHERE id <> %s", page)
    damaged = place.payloads()[page]
    assert main(["refill", url, "-q"]) == 1
    said = capsys.readouterr().out
    assert f"page {page} has no whole copy left; read by m1@1" in said
    assert "--repair-from" in said
    assert "NOT COMPLETE" in said
    assert place.payloads()[page] == damaged
    serves(url, "m0@1", "m2@1")
    with pydedup.open(url) as store:
        assert store.refill().lost == {page: ["m1@1"]}
        assert store.verify(repair_from=other).ok
        assert store.refill().lost == {}
    is_sound(url)


def test_memory_is_bounded(place: ShardedPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(refill, "_BYTES_AT_ONCE", 3 << 20)
    sizes: list[int] = []
    read = _shards_refill.ShardedCopies.read_copies

    def noted(self: Any, wanted: Any) -> Any:
        found = read(self, wanted)
        sizes.append(sum(len(one) for copies in found[0].values() for one in copies.values()))
        return found

    monkeypatch.setattr(_shards_refill.ShardedCopies, "read_copies", noted)
    url = place.url(2)
    fill(url)
    place.rows(1, "DELETE FROM {}.page_payloads")
    with pydedup.open(url) as store:
        assert store.refill().ok
    assert 4 << 20 < max(sizes) <= 2 * (3 << 20)
    is_sound(url)


def test_of_two_that_put_the_same_copies_back_one_waits(place: ShardedPlace, store: Any) -> None:
    """In the order that they were asked for, each could wait for the other."""
    shard, first, second = store._shards[0], 10**6, 10**6 + 1
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid IS NOT NULL"
    taken = "INSERT INTO {}.page_payloads VALUES (%s, 'x')"
    with psycopg.connect(place.servers[0]) as other:
        other.execute(taken.format(place.schema), [first])
        putting = threading.Thread(
            target=shard.put_payloads, args=({second: b"second", first: b"first"},)
        )
        putting.start()
        while place.rows(0, waits) == [(0,)]:
            assert putting.is_alive()
            time.sleep(0.01)
        other.execute("SET lock_timeout = '100ms'")
        other.execute(taken.format(place.schema), [second])
        other.rollback()
        putting.join(60)
    assert shard.present_payloads([first, second]) == {first, second}


def test_where_there_are_no_copies_there_is_nothing_to_refill(
    place: ShardedPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in (str(tmp_path / "a.db"), place.url(1)):
        pydedup.open(url).close()
        assert main(["refill", url]) == 0
        assert "nothing to refill: this store keeps one copy" in capsys.readouterr().out
        with pydedup.open(url) as store:
            assert store.refill().copies == 1
        with pydedup.open(url, mode="r") as store, pytest.raises(ReadOnlyError):
            store.refill()
    with pydedup.open(url, mode="r") as store, pytest.raises(ReadOnlyError):
        store._adapter.begin_refill()  # type: ignore[attr-defined]
    assert main(["refill", str(tmp_path / "a.db"), "--replace"]) == 2
    assert "a store of sqlite:// is in one place" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="not known"):
        registry.replace_lost("nonsense://x")


def test_a_shard_that_is_down_is_told_or_waited_for(
    place: ShardedPlace, shard_servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place.url(2)
    fill(url)
    there = place.payloads()
    place.rows(1, f"{FLIP} WHERE id % 2 = 0")
    place.rows(2, "DELETE FROM {}.page_payloads WHERE id % 2 = 1")
    monkeypatch.setattr(refill, "_PAGES_AT_ONCE", 2)
    starts: list[threading.Timer] = []

    def start() -> None:
        starts.append(threading.Timer(0.3, shard_servers[2].start))
        starts[-1].start()

    def goes_down(then: Callable[[], object]) -> Progress:
        """Kill it while copies are read, and do something."""
        left = [then]

        def told(stage: str, *_: int) -> None:
            if stage == "checking copies" and left:
                shard_servers[2].kill()
                left.pop()()

        return told

    with pydedup.open(url) as store:
        try:
            with monkeypatch.context() as patch:
                patch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.6)
                report = store.refill(progress=goes_down(lambda: None))
        finally:
            start()
        try:
            # It may take its time to recover, and has been down for a while already.
            monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 120.0)
            # Who asks just after a wait in vain is not made to wait, and this is at once.
            monkeypatch.setattr("pydedup.adapters._again.IN_VAIN_SECONDS", 0.0)
            later = store.refill(progress=goes_down(start))
        finally:
            for timer in starts:
                timer.join()
    (down,) = report.failed
    assert f"port={shard_servers[2].port}" in down
    assert (report.ok, report.lost) == (False, {})
    assert (later.ok, later.failed) == (True, {})
    assert min(report.missing, report.damaged, later.damaged) > 0
    assert place.payloads() == there
    is_sound(url)


def test_a_shard_that_takes_no_changes_is_read_and_the_others_are_refilled(
    place: ShardedPlace, shard_servers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url, unwritable, other = place.url(2), 1, 2
    fill(url)
    there = place.payloads()
    on = [set(ids_on(place, number)) for number in range(3)]
    left, needed = min(on[0] & on[unwritable]), min(on[unwritable] & on[other])
    place.rows(unwritable, "DELETE FROM {}.page_payloads WHERE id = %s", left)
    place.rows(other, "DELETE FROM {}.page_payloads WHERE id = %s", needed)
    place.rows(other, f"{FLIP} WHERE id <> %s", needed)
    with place.taking_no_changes(unwritable):
        with pydedup.open(url) as store:
            report = store.refill()
        assert (report.ok, report.lost) == (False, {})
        assert (report.missing, report.damaged) == (1, len(on[other]) - 1)
        ((failed, why),) = report.failed.items()
        assert f"port={shard_servers[unwritable].port}" in failed
        assert main(["refill", url, "-q"]) == 1
        said = capsys.readouterr().out
        assert f"not refilled: {failed}" in said
        assert "read-only" in why
    assert main(["refill", url, "-q"]) == 0
    assert place.payloads() == there
    is_sound(url)


def test_a_shard_whose_statements_are_cut_short_is_told_and_the_others_are_refilled(
    place: ShardedPlace, shard_servers: Any
) -> None:
    """It says what it has, and takes longer to give it than it may."""
    url, slow, other = place.url(2), 1, 2
    fill(url)
    there = place.payloads()
    missing = min({*ids_on(place, 0)} & {*ids_on(place, other)})
    place.rows(other, "DELETE FROM {}.page_payloads WHERE id = %s", missing)
    for statement in (
        "ALTER TABLE {}.page_payloads RENAME TO whole",
        "CREATE FUNCTION {}.late(payload bytea) RETURNS bytea LANGUAGE plpgsql STABLE AS $$BEGIN "
        "RAISE 'too late' USING ERRCODE = '57014'; END$$",
        "CREATE VIEW {0}.page_payloads AS SELECT id, {0}.late(payload) AS payload FROM {0}.whole",
    ):
        place.rows(slow, statement)
    with pydedup.open(url) as store:
        report = store.refill()
    ((failed, why),) = report.failed.items()
    assert f"port={shard_servers[slow].port}" in failed
    assert "too late; raise statement_timeout" in why
    assert (report.ok, report.missing, report.damaged) == (False, 1, 0)
    place.rows(slow, "DROP VIEW {}.page_payloads")
    place.rows(slow, "ALTER TABLE {}.whole RENAME TO page_payloads")
    assert place.payloads() == there
    is_sound(url)


@pytest.mark.parametrize("what", ["database", "schema"])
def test_what_is_dropped_under_readers_is_read_elsewhere(
    what: str, place: ShardedPlace, new_place: NewPlace
) -> None:
    lost = new_place(what)
    url = place.url(2, shards=[0, lost, 2])
    fill(url)
    with pydedup.open(url) as store:
        assert dict(store._adapter.read_pages([1])) != {}
        drop(lost)
        for address, model in MODELS.items():
            assert store.load(address)["w"].tobytes() == model["w"].tobytes()
        with pytest.raises(StoreError, match=r"was it dropped|is gone"):  # with new connections
            in_thread(lambda: store.add("late", model_of(9), policy=POLICY))
        report = store.refill()
        assert (report.ok, report.lost, len(report.failed)) == (False, {}, 1)


# ---- beside others -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["read_copies", "write_copies"])
def test_what_is_left_of_a_deleted_page_is_seen_by_nobody(
    before: str, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that go just before their copies are read, or put back."""
    url = place.url(2)
    fill(url)
    pages = place.payloads().keys()
    if before == "write_copies":
        place.rows(1, "DELETE FROM {}.page_payloads")
    call = getattr(_shards_refill.ShardedCopies, before)
    with pydedup.open(url) as store, pydedup.open(url) as other:

        def late(self: Any, *args: Any) -> Any:
            if other.models():
                for address in MODELS:
                    other.remove(address)
                other.vacuum()
            return call(self, *args)

        monkeypatch.setattr(_shards_refill.ShardedCopies, before, late)
        report = store.refill()
        assert (report.lost, report.failed) == ({}, {})
        assert (report.missing > 0) == (len(place.payloads()) > 0) == (before == "write_copies")
        assert store.models() == []
        assert dict(store._adapter.read_pages(list(pages))) == {}
        assert store.verify().errors == []
        store.vacuum()
        assert place.payloads() == {}


def test_a_refill_writes_nothing_once_a_shard_was_replaced(
    place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refill, "_PAGES_AT_ONCE", 1)
    lost, new = new_place(), new_place()
    url, after = (place.url(2, shards=[0, each, 2]) for each in (lost, new))
    fill(url)
    first, second = sorted({*ids_on(place, 0)} & {*ids_on(place, 2)})  # of none that will be lost
    place.rows(2, "DELETE FROM {}.page_payloads WHERE id IN (%s, %s)", first, second)
    with pydedup.open(url) as store:

        def replace(stage: str, done: int, total: int) -> None:
            if stage == "refilling" and is_empty(new):
                drop(lost)
                pydedup.Store.replace_lost(after)

        with pytest.raises(StoreError, match=r"took the place of .* open it again"):
            store.refill(progress=replace)
    assert first in ids_on(place, 2)
    assert second not in ids_on(place, 2)


def test_refilling_goes_on_beside_adds_and_vacuums(place: ShardedPlace) -> None:
    url = place.url(2)
    fill(url)
    done = threading.Event()
    failures: list[BaseException] = []
    rounds = 0

    def change() -> None:
        nonlocal rounds
        try:
            with pydedup.open(url) as store:
                while not done.is_set():
                    store.add("other", model_of(9 + rounds), policy=POLICY)
                    store.remove("other", all_versions=True)
                    store.vacuum()
                    rounds += 1
        except BaseException as error:  # shown below
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with pydedup.open(url) as store:
            end, refills = time.monotonic() + 60, 0
            while (rounds < 2 or refills < 3) and not failures and time.monotonic() < end:
                place.rows(1, "DELETE FROM {}.page_payloads WHERE id % 2 = 0")
                report = store.refill()
                assert (report.lost, report.failed) == ({}, {})
                for address, model in MODELS.items():
                    assert store.load(address)["w"].tobytes() == model["w"].tobytes()
                refills += 1
    finally:
        done.set()
        thread.join(60)
    assert not failures, failures
    assert rounds >= 2
    with pydedup.open(url) as store:
        store.refill()
        store.vacuum()
    is_sound(url)
    pages = {number for (number,) in place.rows(0, "SELECT id FROM {}.pages")}
    assert place.payloads().keys() == pages
