# SPDX-License-Identifier: Apache-2.0
"""A new, empty database takes the place of a shard that is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.adapter import LIVE, SCHEMA_VERSION
from pydedup.adapters import _shards_list
from pydedup.adapters._shard import Shard
from pydedup.adapters.postgres_shards import ShardedAdapter
from pydedup.catalog import page_readers
from pydedup.cli.app import main
from pydedup.cli.errors import Exit
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    NotAStoreError,
    SchemaVersionError,
    StoreError,
    UnavailableError,
)
from pydedup.testing.servers import unused_name, unused_port
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
    lost_and_new,
    model_of,
    name_of,
    run,
    serves,
)

pytestmark = pytest.mark.usefixtures("known_places")


# ---- replacing a lost shard ----------------------------------------------------------------------


def test_a_lost_shard_is_replaced_and_refilled(
    place: ShardedPlace, new_place: NewPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    new, url = lost_and_new(place, new_place, "database")
    with pytest.raises(ArgumentError, match="no pages of any store") as told:
        pydedup.open(place.url(2, shards=[0, new]))  # of the others, one alone may be lost
    assert "--replace" not in str(told.value)
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
    refused(place.url(2, shards=[0, new, down]), name_of(new), "is empty or down too")
    refused(place.url(2, shards=[0, new, down, 2]), "the list has 4 shards", "has 3 shards")
    refused(place.url(2, shards=[0, new]), "the list has 2 shards")
    refused(url.replace("replicas=2", "replicas=1"), "replicas=2, not 1")
    refused(
        place.url(2).replace(place.schema, unused_name()), "holds no store", error=NotAStoreError
    )
    for version, said in (
        (SCHEMA_VERSION + 1, "newer pydedup"),
        (SCHEMA_VERSION, "is empty or down too"),
    ):
        place.rows(0, "UPDATE {}.meta SET value = %s WHERE name = 'schema_version'", str(version))
        error = SchemaVersionError if version > SCHEMA_VERSION else ArgumentError
        refused(place.url(2, shards=[0, new, second]), said, error=error)
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
        report = store.verify()
        assert report.damaged_pages
        assert any(error.endswith("; there is no other") for error in report.errors)
        assert store.verify(repair_from=tmp_path / "other.db").ok
    serves(place.url(1))


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_shard_with_the_only_copies_is_not_replaced(
    comes_back: bool,
    place: ShardedPlace,
    new_place: NewPlace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another was replaced and not filled yet: what both should have is on this one alone."""
    monkeypatch.setattr(_shards_list, "_ROWS_AT_ONCE", 3)
    second, away, third = new_place(), new_place(), new_place()
    fill(place.url(2, shards=[0, second, away]))
    drop(second)
    second = new_place()
    pydedup.Store.replace_lost(place.url(2, shards=[0, second, away]))
    only = len(
        set(run(away, f"SELECT id FROM {name_of(away)}.page_payloads"))  # noqa: S608 - ours
        - set(place.rows(0, "SELECT id FROM {}.page_payloads"))
    )
    assert only
    replacing = place.url(2, shards=[0, second, third])
    refused(
        replacing,
        f"{only} of the pages",
        name_of(away),
        f"no copy on {pydedup.registry.redact(second).partition('?')[0]}",
        "pydedup refill",
        "m0@1",
    )
    assert is_empty(third)
    # Both of what is advised can be done.
    if comes_back:
        with pydedup.open(place.url(2, shards=[0, second, away])) as store:
            assert store.refill().ok
        drop(away)
    else:
        drop(away)
        nobody = f"postgresql://postgres@127.0.0.1:{unused_port()}/postgres"
        with pydedup.open(place.url(2, shards=[0, second, nobody])) as store:
            for model in MODELS:
                store.remove(model)
            store.vacuum()
    assert pydedup.Store.replace_lost(replacing) is not None
    with pydedup.open(replacing) as store:
        assert store.refill().ok
        if not comes_back:
            store.add_many(dict(MODELS), policy=POLICY)
    is_sound(replacing)


def test_pages_that_a_vacuum_deletes_meanwhile_are_none_to_miss(
    place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, new = new_place(), new_place()
    with pydedup.open(place.url(2, shards=[0, lost, 2])) as store, store._adapter.transaction():
        dead = set(store._adapter.insert_pages([(bytes(16), b"x" * 100)] * 8, state=LIVE))
    drop(lost)
    present = Shard.present_payloads

    def emptied(self: Shard, ids: Sequence[int]) -> set[int]:
        place.rows(0, "DELETE FROM {}.pages WHERE id = ANY(%s)", sorted(dead))
        return present(self, ids) - dead

    monkeypatch.setattr(Shard, "present_payloads", emptied)
    assert pydedup.Store.replace_lost(place.url(2, shards=[0, new, 2])) is not None


def test_a_database_that_another_store_takes_meanwhile_is_refused(
    place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, url = lost_and_new(place, new_place)
    others = "postgresql+shards://" + "|".join(
        one.partition("://")[2] for one in (new_place(), new)
    )
    looked = ShardedAdapter._refuse_only_copies

    def late(*state: Any) -> None:
        looked(*state)
        pydedup.open(others).close()

    monkeypatch.setattr(ShardedAdapter, "_refuse_only_copies", late)
    refused(url, name_of(new), "holds pages already")
    with pydedup.open(others) as store:
        store.add("its", model_of(7), policy=POLICY)


def test_of_two_shards_that_are_replaced_at_once_one_is(
    place: ShardedPlace, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What both of them had would be out of reach, had each looked before the other began."""
    first, second, instead_of_first, instead_of_second = (new_place() for _ in range(4))
    fill(place.url(2, shards=[0, first, second]))
    other = place.url(2, shards=[0, first, instead_of_second])
    looked = ShardedAdapter._refuse_only_copies

    def late(*state: Any) -> None:
        looked(*state)
        monkeypatch.undo()
        pydedup.Store.replace_lost(other)

    monkeypatch.setattr(ShardedAdapter, "_refuse_only_copies", late)
    late_one = place.url(2, shards=[0, instead_of_first, second])
    refused(late_one, "another process has replaced a shard", error=ConflictError)
    assert is_empty(instead_of_first)
    with pydedup.open(other) as store:
        assert store.refill().ok
    is_sound(other)


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


@pytest.mark.parametrize("ending", [UnavailableError("away"), KeyboardInterrupt()])
def test_a_refill_that_fails_leaves_what_was_replaced(
    ending: BaseException,
    place: ShardedPlace,
    new_place: NewPlace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was not said that the replacement is done, nor what is left to do."""
    new, url = lost_and_new(place, new_place)
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise ending

        patch.setattr(pydedup.Store, "refill", fail)
        assert main(["refill", url, "--replace", "-q"]) in (Exit.STORE, Exit.INTERRUPTED)
    said = capsys.readouterr().err
    assert f"{name_of(new)} took the place of" in said
    assert "run `pydedup refill` again, --replace is not needed" in said
    assert main(["refill", url, "-q"]) == 0
    is_sound(url)


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
