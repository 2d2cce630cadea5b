# SPDX-License-Identifier: Apache-2.0
"""Copies of pages that are put back, and databases that take the place of a lost shard."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from pydedup.adapters import _shards_refill

import pydedup
from pydedup import policies, registry
from pydedup.adapter import LIVE
from pydedup.catalog import page_readers
from pydedup.cli.app import main
from pydedup.errors import ArgumentError, NotAStoreError, ReadOnlyError, StoreError
from pydedup.maintenance import refill
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import unused_name, unused_port
from pydedup.testing.shards import ShardedPlace, give_known_places

Model = dict[str, np.ndarray]
NewPlace = Callable[..., str]
POLICY = policies.Exact()
#: Changes one byte of what it is put behind.
FLIP = (
    "UPDATE {}.page_payloads SET payload = set_byte(payload, 9000, 255 - get_byte(payload, 9000))"
)


def model_of(seed: int) -> Model:
    return {"w": np.random.default_rng(seed).standard_normal((640, 1024)).astype(np.float32)}


MODELS = {f"m{seed}@1": model_of(seed) for seed in range(3)}


@pytest.fixture(autouse=True)
def _known_places(monkeypatch: pytest.MonkeyPatch) -> None:
    give_known_places(monkeypatch)


@pytest.fixture
def new_place(place: ShardedPlace) -> Iterator[NewPlace]:
    """Gives the URL of a new, empty place on the second server each time: a schema.

    Or a database, which takes longer to make.
    """
    made: list[str] = []

    def make(kind: str = "schema") -> str:
        made.append(unused_name())
        if kind == "schema":
            return with_option(place.servers[1], f"schema={made[-1]}")
        run(place.servers[1], f"CREATE DATABASE {made[-1]}")
        return place.servers[1].replace("/postgres?", f"/{made[-1]}?")

    yield make
    for name in made:
        run(place.servers[1], f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        run(place.servers[1], f"DROP SCHEMA IF EXISTS {name} CASCADE")


def name_of(url: str) -> str:
    """The name of a new place."""
    if "schema=" in url:
        return url.rpartition("schema=")[2]
    return url.partition("?")[0].rpartition("/")[2]


def run(url: str, query: str) -> list[tuple[Any, ...]]:
    url = url.partition("&schema=")[0]
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def drop(url: str) -> None:
    """Lose the place of a shard."""
    if "schema=" in url:
        run(url, f"DROP SCHEMA {name_of(url)} CASCADE")
    else:
        again = url.replace(f"/{name_of(url)}?", "/postgres?")
        run(again, f"DROP DATABASE {name_of(url)} WITH (FORCE)")


def is_empty(url: str) -> bool:
    """Whether nothing was made in a new place."""
    return run(url, f"SELECT to_regnamespace('{name_of(url)}')") == [(None,)]


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        store.add_many(dict(MODELS), policy=POLICY)


def serves(url: str, *models: str) -> None:
    """Each model is there, to the bit."""
    with pydedup.open(url, mode="r") as store:
        assert {info.address for info in store.models()} == MODELS.keys()
        for address in models or MODELS:
            assert store.load(address)["w"].tobytes() == MODELS[address]["w"].tobytes()


def is_sound(url: str) -> None:
    """All is as it was, on all shards, and nothing is left to do."""
    serves(url)
    with pydedup.open(url) as store:
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        done = store.refill()
        assert (done.ok, done.copies, done.pages) == (True, 2, report.pages)
        assert (done.missing, done.damaged, done.written_bytes, done.places) == (0, 0, 0, {})


def lost_and_new(place: ShardedPlace, new_place: NewPlace, kind: str = "schema") -> tuple[str, str]:
    """Make a store one of whose shards is lost; return a new place for it, and the URL with it."""
    lost = new_place(kind)
    fill(place.url(2, shards=[0, lost, 2]))
    drop(lost)
    new = new_place(kind)
    return new, place.url(2, shards=[0, new, 2])


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


def ids_on(place: ShardedPlace, number: int) -> list[int]:
    return [page for (page,) in place.rows(number, "SELECT id FROM {}.page_payloads")]


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
    place.rows(1, "DELETE FROM {}.page_payloads WHERE id % 2 = 0")
    place.rows(2, "DELETE FROM {}.page_payloads WHERE id % 2 = 1")
    back = threading.Timer(0.3, shard_servers[2].start)
    with pydedup.open(url) as store:
        shard_servers[2].kill()
        try:
            with monkeypatch.context() as patch:
                patch.setattr("pydedup.adapters._postgres_base.AGAIN_SECONDS", 0.2)
                report = store.refill()
        finally:
            back.start()
        try:
            later = store.refill()
        finally:
            back.join()
    (down,) = report.failed
    assert f"port={shard_servers[2].port}" in down
    assert (report.ok, report.lost) == (False, {})
    assert (later.ok, later.failed) == (True, {})
    assert min(report.missing, later.missing) > 0
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


# ---- replacing a lost shard ----------------------------------------------------------------------


def test_a_lost_shard_is_replaced_and_refilled(
    place: ShardedPlace, new_place: NewPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    new, url = lost_and_new(place, new_place, "database")
    for mode in ("a", "r"):
        with pytest.raises(ArgumentError, match=r"no pages of any store.*pydedup refill --replace"):
            pydedup.open(url, mode=mode)
    assert run(new, "SELECT 1 FROM pg_namespace WHERE nspname LIKE 'pydedup%'") == []
    assert main(["refill", url, "--replace", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert name_of(new) in report["replaced"]["now"]
    assert report["replaced"]["was"] != report["replaced"]["now"]
    assert report["missing"] == report["places"][report["replaced"]["now"]] > 0
    assert report["ok"]
    with pydedup.open(url) as store:
        listed = json.loads(store._adapter.meta()["shards"])
        assert report["replaced"]["now"] in listed["shards"].values()
        assert report["replaced"]["was"] not in listed["shards"].values()
        assert len(listed["shards"]) == 3
    is_sound(url)
    assert pydedup.Store.replace_lost(url) is None
    assert main(["refill", url, "--replace", "-q"]) == 0
    said = capsys.readouterr().out
    assert "nothing to replace" in said
    assert "nothing to refill" in said
    # Once more, in another order; the new one has the name of what it replaces.
    drop(new)
    run(place.servers[1], f"CREATE DATABASE {name_of(new)}")
    url = place.url(2, shards=[2, new, 0])
    assert pydedup.Store.replace_lost(url) is not None
    with pydedup.open(url) as store:
        assert store.refill().missing == report["missing"]
    is_sound(url)


def test_before_it_is_filled_all_is_served_and_adds_work(
    place: ShardedPlace, new_place: NewPlace
) -> None:
    _, url = lost_and_new(place, new_place)
    pydedup.Store.replace_lost(url)
    serves(url)
    with pydedup.open(url) as store:
        store.add("late@1", model_of(7), policy=POLICY)
        assert store.load("late")["w"].tobytes() == model_of(7)["w"].tobytes()
        assert "lacks its copy" in "".join(store.verify().errors)
        store.remove("late")
        store.vacuum()
        assert store.refill().ok
    is_sound(url)


def refused(url: str, *words: str, error: type[Exception] = ArgumentError) -> None:
    with pytest.raises(error) as told:
        pydedup.Store.replace_lost(url)
    for word in words:
        assert word in str(told.value)


def test_what_cannot_be_replaced_is_refused(place: ShardedPlace, new_place: NewPlace) -> None:
    new, url = lost_and_new(place, new_place)
    meta = place.rows(0, "SELECT value FROM {}.meta WHERE name = 'shards'")
    second = new_place()
    down = f"postgresql://postgres@127.0.0.1:{unused_port()}/postgres"
    refused(place.url(2, shards=[0, new, second]), name_of(new), "is empty or down too")
    refused(place.url(2, shards=[0, new, down]), name_of(new), "is empty or down too")
    refused(place.url(2, shards=[0, new, down, 2]), "the list has 4 shards", "has 3 shards")
    refused(place.url(2, shards=[0, new]), "the list has 2 shards")
    refused(url.replace("replicas=2", "replicas=1"), "replicas=2, not 1")
    refused(
        place.url(2).replace(place.schema, unused_name()), "holds no store", error=NotAStoreError
    )
    # A payload and nothing that says whose, another store, the shard of one, and its coordinator.
    run(second, f"CREATE SCHEMA {name_of(second)}")
    table = f"{name_of(second)}.page_payloads"
    run(second, f"CREATE TABLE {table} (id bigint PRIMARY KEY, payload bytea NOT NULL)")
    run(second, f"INSERT INTO {table} VALUES (1, 'x')")  # noqa: S608 - a name of ours
    with_second = place.url(2, shards=[0, second, 2])
    refused(with_second, name_of(second), "holds pages already")
    drop(second)
    pydedup.open(second).close()
    refused(with_second, name_of(second), "holds another store")
    drop(second)
    others = new_place()
    pydedup.open(
        "postgresql+shards://" + "|".join(u.partition("://")[2] for u in (others, second))
    ).close()
    refused(with_second, name_of(second), "is of another store")
    refused(place.url(2, shards=[0, others, 2]), name_of(others), "holds another store")
    assert place.rows(0, "SELECT value FROM {}.meta WHERE name = 'shards'") == meta
    assert is_empty(new)
    # Nothing of that has spoilt the right way.
    assert pydedup.Store.replace_lost(url) is not None
    with pydedup.open(url) as store:
        store.refill()
    is_sound(url)


def test_no_shard_is_replaced_that_answers(place: ShardedPlace, new_place: NewPlace) -> None:
    fill(place.url(2))
    new = new_place()
    refused(place.url(2, shards=[0, 1, 2, new]), "all of them answer, none is lost")
    is_sound(place.url(2))


def test_with_one_copy_the_pages_are_lost(
    place: ShardedPlace, new_place: NewPlace, tmp_path: Path
) -> None:
    """And what is advised then can be done."""
    fill(place.url(1))
    fill(str(tmp_path / "other.db"))
    tiny = {"w": np.ones((4, 4), np.float32)}
    with pydedup.open(place.url(1)) as store:
        for number in range(8):
            store.add(f"tiny{number}@1", {"w": tiny["w"] * number})
        readers = page_readers(store._adapter)
        on_one = {model for page in ids_on(place, 1) for model in readers[page]}
        left = sorted({f"tiny{number}@1" for number in range(8)} - on_one)
    refused(
        place.url(1, shards=[0, 2, new_place()]),
        "replicas=1",
        "is on no other shard",
        "verify --repair-from",
        "pydedup copy",
    )
    nobody = f"postgresql://postgres@127.0.0.1:{unused_port()}/postgres"
    with pydedup.open(place.url(1, shards=[0, nobody, 2]), mode="r") as store:
        assert left
        store.copy_to(tmp_path / "new.db", left)
    with pydedup.open(place.url(1)) as store:
        for number in range(8):
            store.remove(f"tiny{number}")
        store.vacuum()
        place.rows(1, "DELETE FROM {}.page_payloads WHERE id % 2 = 0")  # as of an older backup
        assert store.verify().damaged_pages
        assert store.verify(repair_from=tmp_path / "other.db").ok
    serves(place.url(1))


def test_a_lost_shard_that_comes_back_is_refused(place: ShardedPlace, new_place: NewPlace) -> None:
    lost, new = new_place(), new_place()
    before, url = (place.url(2, shards=[0, one, 2]) for one in (lost, new))
    fill(before)
    with pydedup.open(before) as late, pydedup.open(before) as refilling:
        pydedup.Store.replace_lost(url)  # it was only away
        with pydedup.open(url) as store:
            store.refill()
        for mode in ("a", "r"):
            with pytest.raises(ArgumentError, match="has taken its place") as told:
                pydedup.open(before, mode=mode)
            assert name_of(new) in str(told.value)
            assert name_of(lost) in str(told.value)
        refused(before, "has taken its place")
        # Who had it open goes on reading, and can put nothing where nobody looks for it.
        for address, model in MODELS.items():
            assert late.load(address)["w"].tobytes() == model["w"].tobytes()
        with pytest.raises(StoreError, match="took the place of"):
            late.add("m9", model_of(9), policy=POLICY)
        with pytest.raises(StoreError, match="took the place of"):
            refilling.refill()
    is_sound(url)


def test_what_holds_the_list_waits_for_who_writes(place: ShardedPlace, new_place: NewPlace) -> None:
    """An add that has begun ends before the list changes, or is told; none is in between."""
    lost, new = new_place(), new_place()
    before, url = (place.url(2, "timeout=0.3", shards=[0, one, 2]) for one in (lost, new))
    fill(before)
    with pydedup.open(before) as store:
        with store._adapter.transaction():
            store._adapter.insert_pages([(bytes(16), b"x" * 100)], state=LIVE)
            with pytest.raises(pydedup.errors.ConflictError):
                pydedup.Store.replace_lost(url)
        assert is_empty(new)
        store.vacuum()
    assert pydedup.Store.replace_lost(url) is not None


# ---- replacements that are cut off ---------------------------------------------------------------


@pytest.mark.parametrize("again", ["refill", "replace"])
def test_a_claim_without_the_list_is_read_and_finished(
    again: str, place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = lost_and_new(place, new_place)
    cut_off(url, monkeypatch)
    serves(url)
    with pydedup.open(url) as store:
        with pytest.raises(StoreError, match="run `pydedup refill` to finish it"):
            store.add("m9", model_of(9), policy=POLICY)
        if again == "replace":
            assert pydedup.Store.replace_lost(url) is not None
        else:
            assert store.refill().missing > 0
        store.add("m9@1", model_of(9), policy=POLICY)
    with pydedup.open(url) as store:
        assert (store.refill().missing > 0) == (again == "replace")
        store.remove("m9")
        store.vacuum()
    is_sound(url)


def cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a shard, and end between the claim in its database and the list."""
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("pydedup.adapters.postgres_shards.ShardedAdapter.set_meta", fail)
        with pytest.raises(KeyboardInterrupt):
            pydedup.Store.replace_lost(url)


def test_of_two_claims_one_is_taken(
    place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = lost_and_new(place, new_place)
    url = place.url(2, shards=[0, 2, new_place()])
    cut_off(first, monkeypatch)
    with pydedup.open(first) as late:
        assert pydedup.Store.replace_lost(url) is not None
        with pytest.raises(StoreError):
            late.refill()
    refused(first, "has taken its place")
    with pydedup.open(url) as store:
        assert store.refill().ok
    is_sound(url)
