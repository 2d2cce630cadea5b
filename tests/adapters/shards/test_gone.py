# SPDX-License-Identifier: Apache-2.0
"""A shard whose database was dropped on a server that runs, and which one an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

import pydedup
from pydedup.adapters._shards_url import is_same_place
from pydedup.catalog import page_readers
from pydedup.cli.app import main
from pydedup.cli.errors import Exit
from pydedup.errors import PageNotFoundError, UnavailableError
from pydedup.testing.servers import PostgresServer, unused_name, unused_port
from pydedup.testing.shards import (
    MODELS,
    POLICY,
    NewPlace,
    ShardedPlace,
    drop,
    fill,
    ids_on,
    is_sound,
    model_of,
    name_of,
    run,
    serves,
)

pytestmark = pytest.mark.usefixtures("known_places")


def test_what_was_dropped_is_a_shard_that_is_down(
    place: ShardedPlace, new_place: NewPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its server says so at once; opening the store was an error then, though all can be served."""
    lost = new_place("database")
    url = place.url(2, shards=[0, lost, 2])
    fill(url)
    drop(lost)
    serves(url)
    # Whoever connects as another user is at the same place.
    run(place.servers[1], f"CREATE ROLE {name_of(lost)} LOGIN")
    try:
        other = lost.replace("postgres@", f"{name_of(lost)}@")
        serves(place.url(2, shards=[0, other, 2]))
    finally:
        run(place.servers[1], f"DROP ROLE {name_of(lost)}")
    with pydedup.open(url) as store:
        assert store.stats().pages
        with pytest.raises(UnavailableError) as told:
            store.add("late@1", model_of(7), policy=POLICY)
        for word in (name_of(lost), "is gone", "new, empty database", "refill --replace"):
            assert word in str(told.value)
        assert {info.address for info in store.models()} == MODELS.keys()
        assert f"/{name_of(lost)}" in "".join(store.verify().errors)
        store.remove("m2")
        repacking = store.vacuum()
        assert repacking.freed_pages
        assert "is gone" in str(repacking.not_repacked)
        assert {info.address for info in store.models()} == {"m0@1", "m1@1"}
        assert f"/{name_of(lost)}" in "".join(store.refill().failed)
    assert main(["refill", url, "--replace", "-q"]) == 1
    said = capsys.readouterr().out
    assert "nothing to replace" in said
    assert "is gone" in said
    # What is advised can be done.
    new = new_place("database")
    url = place.url(2, shards=[0, new, 2])
    assert main(["refill", url, "--replace", "-q"]) == 0
    with pydedup.open(url) as store:
        store.add("m2@1", MODELS["m2@1"], policy=POLICY)
    is_sound(url)


def test_of_what_was_dropped_with_the_only_copy_the_models_fail(
    place: ShardedPlace, new_place: NewPlace
) -> None:
    lost = new_place("database")
    url = place.url(1, shards=[0, lost, 2])
    fill(url)
    on_it = run(lost, f"SELECT id FROM {place.schema}.page_payloads")  # noqa: S608 - ours
    drop(lost)
    with pydedup.open(url, mode="r") as store:
        readers = page_readers(store._adapter)
        gone = {model for (page,) in on_it for model in readers[page]}
        assert gone
        for address in gone:
            with pytest.raises(UnavailableError, match=f"is gone.*read by .*{address}"):
                store.load(address)
    serves(url, *MODELS.keys() - gone)


def test_of_a_shard_from_an_older_backup_the_models_are_named(place: ShardedPlace) -> None:
    """Of a copy that it lacks it was said that the page does not exist, and not whose it is."""
    url = place.url(1)
    fill(url)
    number = place.fullest()
    (page, *_) = ids_on(place, number)
    place.rows(number, "DELETE FROM {}.page_payloads WHERE id = %s", page)
    with pydedup.open(url, mode="r") as store:
        (reader,) = page_readers(store._adapter)[page]
        told = f"1 page does not exist: {page}; read by {reader}; verify --repair-from restores it"
        with pytest.raises(PageNotFoundError, match=told):
            store.load(reader)
    serves(url, *MODELS.keys() - {reader})


def test_a_database_that_never_was_the_stores_is_a_slip(
    place: ShardedPlace, new_place: NewPlace
) -> None:
    lost = new_place("database")
    fill(place.url(2, shards=[0, lost, 2]))
    slip = lost.replace(name_of(lost), unused_name())
    with pytest.raises(UnavailableError, match="create the database first") as told:
        pydedup.open(place.url(2, shards=[0, slip, 2]))
    assert "has 3 shards: postgresql://" in str(told.value)
    assert f"/{name_of(lost)}" in str(told.value)


def test_of_two_that_do_not_answer_the_one_at_its_place_is_known(
    place: ShardedPlace, shard_servers: list[PostgresServer]
) -> None:
    """The other has moved. Once it answers, the first is read."""
    fill(place.url(2))
    moved = f"postgresql://postgres@127.0.0.1:{unused_port()}/postgres"
    shard_servers[1].kill()
    try:
        store = pydedup.open(place.url(2, shards=[0, moved, 1]), mode="r")
    finally:
        shard_servers[1].start()
    with store:
        for address, model in MODELS.items():
            assert store.load(address)["w"].tobytes() == model["w"].tobytes()


def test_the_same_place_by_another_user() -> None:
    one = "postgresql://me@h:1/d?host=a&user=me&schema=s"
    assert is_same_place(one, "postgresql://you@h:1/d?schema=s&host=a")
    for other in (one.replace("h:1", "h:2"), one.replace("/d", "/e"), one.replace("=s", "=t")):
        assert not is_same_place(one, other)


@pytest.mark.parametrize("down", ["coordinator", "shard"])
def test_the_database_that_cannot_be_reached_is_named(
    down: str,
    place: ShardedPlace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the coordinator's the list was told, cut behind its last user."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    fill(place.url(1))
    port, options = unused_port(), f"schema={place.schema}&connect_timeout=1"
    nobody = f"joe:geheim@127.0.0.1:{port}/there?{options}"
    url = place.url(1, shards=[0, 1, f"postgresql://{nobody}"])
    wanted = f"127.0.0.1:{port}/there?schema={place.schema}"
    if down == "coordinator":
        url = f"postgresql+shards://{nobody}|{url.partition('|')[2]}"
        wanted += " (the coordinator)"
    with pytest.raises(UnavailableError) as told:
        load_all(url)
    assert str(told.value).startswith(f"postgresql://joe@{wanted}: connection to server")
    target = str(tmp_path / "x.safetensors")
    assert Exit.STORE in [main(["export", url, address, target, "-q"]) for address in MODELS]
    said = capsys.readouterr().err
    assert f"error: postgresql://***@{wanted}: connection to server" in said
    assert "geheim" not in said + str(told.value)


def load_all(url: str) -> None:
    with pydedup.open(url, mode="r") as store:
        for address in MODELS:
            store.load(address)
