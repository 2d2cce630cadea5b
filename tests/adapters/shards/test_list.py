# SPDX-License-Identifier: Apache-2.0
"""Which servers a store is over: its list, how it is given, and stores on them already."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapters._shard import CLAIMING
from pydedup.errors import ArgumentError, MissingStoreError, NotAStoreError
from pydedup.testing._contract_base import add_random_pages, in_thread, open_store
from pydedup.testing.serving import until
from pydedup.testing.shards import NewPlace, ShardedPlace, drop, fill, serves

from .test_shards import refused


def test_the_order_of_shards_means_nothing(store: Adapter, place: ShardedPlace) -> None:
    pages = add_random_pages(store, 12, size=500)
    clients = "SELECT pid, backend_start FROM pg_stat_activity WHERE application_name <> ''"
    before = [set(place.rows(number, clients)) for number in range(3)]
    other = registry.connect(place.url(shards=[2, 0, 1]), mode="r")
    assert dict(other.read_pages(list(pages))) == pages
    other.close()
    # Of those before, some may be of a test that has ended.
    until(
        lambda: all(before[number].issuperset(place.rows(number, clients)) for number in range(3))
    )


@pytest.mark.usefixtures("store")
def test_a_list_that_is_not_the_stores_is_refused(place: ShardedPlace) -> None:
    for mode in "ar":
        refused(place.url(shards=[0, 2]), "the list has 2 shards", "has 3 shards", mode=mode)
        refused(place.url(shards=[0]), "the list has 1 shard;", mode=mode)
        refused(place.url(shards=[0, 1, 1]), "listed twice", mode=mode)
        refused(place.url(replicas=2), "replicas=1, not 2", mode=mode)
    again = place.servers[1].replace("postgres@/", "postgres@localhost/")  # the same by other words
    refused(place.url(shards=[0, 1]) + "|" + again.partition("://")[2], "are the same shard")
    port = place.servers[1].rpartition("port=")[2]
    empty = f"postgres@127.0.0.1:{port}/template1"
    said = refused(place.url(shards=[0, 2]) + "|" + empty, "holds no pages of any store")
    assert "--replace" not in said  # what a lost shard had, no other has
    place.rows(1, "DELETE FROM {}.shard_identity")
    refused(place.url(), f"port={port}", "holds no pages of any store")


def test_shards_of_another_store_are_refused(place: ShardedPlace) -> None:
    def other(letter: str) -> str:
        """The URL of a store with another coordinator, on the shard that is left."""
        url = place.url(shards=[2]).replace(place.schema, place.schema + letter)
        return f"{url}&schema={place.schema}"

    mine = open_store(place.url(shards=[0, 1]))
    open_store(other("b")).close()
    refused(place.url(shards=[0, 2]), "is of another store", place.schema)
    adapter = registry.connect(other("c"), mode="a")
    with pytest.raises(ArgumentError, match="is a shard of another store"):
        adapter.create_schema({})
    assert adapter.schema_version() is None
    for one in (mine, adapter):
        one.close()
    place.rows(0, "DROP SCHEMA {}b CASCADE")


def test_a_new_store_on_one_shard_by_two_names_is_refused(place: ShardedPlace) -> None:
    """It was made, and no list of two or three shards opened it any more."""
    again = place.servers[1].replace("postgres@/", "postgres@localhost/")
    with pytest.raises(ArgumentError, match="is listed twice as a shard, in other words"):
        pydedup.open(place.url(shards=[0, 1, again]))
    pydedup.open(place.url(shards=[0, 1])).close()


def test_pages_that_nobody_calls_theirs_are_no_place_for_a_new_store(place: ShardedPlace) -> None:
    """As where of a lost shard the payloads alone were restored: a vacuum would delete them."""
    place.rows(1, "CREATE SCHEMA {}")
    table = "CREATE TABLE {}.page_payloads (id bigint PRIMARY KEY, payload bytea NOT NULL)"
    place.rows(1, table)
    place.rows(1, "INSERT INTO {}.page_payloads VALUES (1, 'x')")
    with pytest.raises(ArgumentError, match="is a shard of another store"):
        pydedup.open(place.url())
    assert place.rows(1, "SELECT id FROM {}.page_payloads") == [(1,)]


def test_who_makes_a_shard_waits_for_who_does_so_already(place: ShardedPlace) -> None:
    """What another has not committed is not seen, and would be taken for an empty place."""
    with psycopg.connect(place.servers[1]) as other, ThreadPoolExecutor(1) as thread:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [CLAIMING])
        other.execute(f"CREATE SCHEMA {place.schema}")
        opening = thread.submit(pydedup.open, place.url())
        until(lambda: place.rows(1, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        table = f"{place.schema}.page_payloads"
        other.execute(f"CREATE TABLE {table} AS SELECT 1::bigint AS id, 'x'::bytea AS payload")
        other.commit()
        with pytest.raises(ArgumentError, match="is a shard of another store"):
            opening.result()


def test_a_shard_that_is_exchanged_later_is_told(store: Adapter, place: ShardedPlace) -> None:
    pages = add_random_pages(store, 12, size=500)
    for number, other in ((1, 2), (2, 1)):
        ((name,),) = place.rows(other, "SELECT id FROM {}.shard_identity")
        place.rows(number, "ALTER TABLE {}.shard_identity ADD new text DEFAULT '" + name + "'")
    for number in (1, 2):
        place.rows(number, "UPDATE {}.shard_identity SET id = new")
    with pytest.raises(ArgumentError, match="was a database exchanged"):
        in_thread(lambda: list(store.read_pages(list(pages))))  # with new connections


def test_a_shard_that_another_takes_the_place_of_where_it_was_is_told(
    place: ShardedPlace, new_place: NewPlace
) -> None:
    """Who has the store open was told that another shard is there, by the same name."""
    there = new_place()
    url = place.url(2, shards=[0, there, 2])
    fill(url)
    with pydedup.open(url, mode="r") as store:
        drop(there)
        assert pydedup.Store.replace_lost(url) is not None
        shard = cast(Any, store._adapter)._shards[1]
        with pytest.raises(ArgumentError, match="is another database of that shard, from before"):
            in_thread(lambda: shard.payload_ids(0, 1))  # on a new connection
    with pydedup.open(url) as store:
        assert store.refill().ok
    serves(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+shards://u:secret@h/d", "lists its shards"),
        ("postgresql+shards://u:secret@h/d|", "lists its shards"),
        ("postgresql+shards://u:secret@h/d?replicas=3|h1/d|h2/d|h3/d", "replicas=3 cannot be"),
        ("postgresql+shards://u:secret@h/d?replicas=2|h1/d", "1 of them are listed"),
        ("postgresql+shards://u:secret@h/d?replicas=two|h1/d", "must be 1 or 2"),
        ("postgresql+shards://u:secret@h/d?replicas=²|h1/d|h2/d", "must be 1 or 2"),
        (
            "postgresql+shards://h/d|u:secret@h1/d?replicas=1",
            r"of the first database.*\?replicas=2",
        ),
        ("postgresql+shards://u:secret@h/d?replcas=1|h1/d", r"'replcas'.*mean replicas\?"),
        ("postgresql+shards://u:secret@h/d|h1/d?replcas=1", r"shard 1.*'replcas'.*mean replicas\?"),
        ("postgresql+shards://h/d|u:secret@h/d?shema=x|h2/d", "shard 1 of the list"),
        ("postgresql+shards://h/d|u:sec/ret@h/d|h2/d", "shard 1 of the list"),
        # These were taken for hosts that are down.
        ("postgresql+shards://u:secret@h/d|h1/d|sqlite:///s.db", "sqlite:// in the list"),
        ("postgresql+shards://postgresql+shards://h/d|h1/d", r"postgresql\+shards:// in the list"),
    ],
)
def test_a_url_that_cannot_be_read(url: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as told:
        registry.connect(url, mode="a")
    assert "secret" not in str(told.value)
    assert "ret@" not in str(told.value)


def test_no_credentials_are_shown() -> None:
    several = "postgresql+shards://a:se@cret1@c:5432/d?replicas=2|b:secret2@s1/d|postgresql://s2/e"
    shown = registry.redact(several)
    assert shown == "postgresql+shards://a:***@c:5432/d?replicas=2|b:***@s1/d|postgresql://s2/e"
    halved = "postgresql+shards://c/d|b:sec|ret@s1/d"
    for url in (halved, halved.replace("sec|ret", "12|34")):
        assert registry.redact(url) == "postgresql+shards://***"


def test_no_credentials_in_what_an_open_store_says(place: ShardedPlace) -> None:
    url = place.url().replace("postgres@", "postgres:secret@")
    adapter = open_store(url)
    kept = "".join(adapter.meta().values())
    assert "secret" not in adapter.url + repr(adapter) + kept
    assert adapter.url.count("|") == 3
    adapter.close()
    with pytest.raises(ArgumentError) as told:
        registry.connect(url.rpartition("|")[0], mode="a")
    assert "secret" not in str(told.value)


def test_each_kind_of_url_opens_its_kind_of_store(store: Adapter, place: ShardedPlace) -> None:
    plain = f"{place.servers[0]}&schema={place.schema}"
    with pytest.raises(NotAStoreError, match=r"postgresql\+shards://"):
        pydedup.open(plain)
    store.close()
    place.rows(0, "DROP SCHEMA {} CASCADE")
    open_store(plain).close()
    with pytest.raises(NotAStoreError, match="without shards"):
        pydedup.open(place.url())


def test_reading_alone_creates_nothing(place: ShardedPlace) -> None:
    with pytest.raises(MissingStoreError):
        pydedup.open(place.url(), mode="r")
    assert all(
        place.rows(number, "SELECT to_regnamespace('{}')") == [(None,)] for number in range(3)
    )


def test_a_creation_that_was_killed_is_done_again(place: ShardedPlace) -> None:
    without_replicas = place.url(1).replace("&replicas=1", "")
    adapter: Any = registry.connect(without_replicas, mode="a")
    with pytest.raises(ZeroDivisionError), adapter.transaction():
        adapter._create_tables() or 1 / 0  # the shards have it, the coordinator will not
    adapter.create_schema({})
    pages = add_random_pages(adapter, 9, size=10)
    assert dict(adapter.read_pages(list(pages))) == pages
    assert adapter.copies == 1
    adapter.close()


def test_a_creation_that_was_killed_before_its_shards_had_joined(place: ShardedPlace) -> None:
    open_store(place.url()).close()

    def joined() -> list[bool]:
        rows = [place.rows(number, "SELECT joined FROM {}.shard_identity") for number in range(3)]
        return [one for ((one,),) in rows]

    place.rows(1, "UPDATE {}.shard_identity SET joined = false")
    for mode, after in (("r", [True, False, True]), ("a", [True] * 3)):
        pydedup.open(place.url(), mode=mode).close()  # type: ignore[arg-type]
        assert joined() == after
