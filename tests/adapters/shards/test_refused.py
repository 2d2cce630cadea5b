# SPDX-License-Identifier: Apache-2.0
"""A shard that answers, and refuses: that is told, and it is not taken for one that is down."""

from __future__ import annotations

import contextlib
import re
from typing import Any, cast

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.adapters._shard import Shard
from pydedup.adapters.postgres import PostgresAdapter
from pydedup.errors import ConflictError, StorageFullError, StoreError, UnavailableError
from pydedup.testing._contract_base import add_random_pages, open_store, with_option
from pydedup.testing.servers import as_user, unused_name
from pydedup.testing.shards import ShardedPlace


def test_who_may_not_read_on_a_shard_is_told_so(place: ShardedPlace) -> None:
    """Whoever read the other copies instead would learn of it when another shard is down."""
    with contextlib.closing(open_store(place.url(2))) as store:
        pages = add_random_pages(store, 30, size=500)
    role = unused_name()
    place.rows(1, f"CREATE ROLE {role} LOGIN")
    url = place.url(2, shards=[0, as_user(place.servers[1], role), 2])
    try:
        with pytest.raises(StoreError, match=r"permission denied for .*GRANT USAGE"):
            registry.connect(url, mode="r")
        place.rows(1, f"GRANT USAGE ON SCHEMA {{}} TO {role}")
        place.rows(1, f"GRANT SELECT ON {{}}.shard_identity TO {role}")
        with contextlib.closing(registry.connect(url, mode="r")) as reader:
            with pytest.raises(StoreError, match=r"permission denied for .*GRANT USAGE"):
                list(reader.read_pages(list(pages)))
            place.rows(1, f"GRANT SELECT ON {{}}.page_payloads TO {role}")
            assert dict(reader.read_pages(list(pages))) == pages
    finally:
        place.rows(1, f"DROP OWNED BY {role}")
        place.rows(1, f"DROP ROLE {role}")


def test_what_could_not_be_collected_is_told(place: ShardedPlace) -> None:
    """The first shard that refused kept the others from being collected."""
    shards = [0, with_option(place.servers[1], "timeout=0.2"), 2]
    with contextlib.closing(open_store(place.url(1, shards=shards))) as store:
        for number in range(3):
            left = "INSERT INTO {}.page_payloads VALUES (%s, 'left by a killed writer')"
            place.rows(number, left, 1_000_000 + number)
        with psycopg.connect(place.servers[1]) as other:
            other.execute(f"LOCK TABLE {place.schema}.page_payloads IN SHARE MODE")
            with pytest.raises(ConflictError, match="another process or thread is writing"):
                store.compact()
        assert place.payloads().keys() == {1_000_001}
        store.compact()
        assert place.payloads() == {}


def test_of_a_full_shard_the_planner_is_told_later(
    place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no room for statistics, and what was deleted kept its room."""
    asked: list[str] = []

    def query(shard: Shard, sql: str, values: Any = ()) -> Any:
        asked.append(sql)
        if sql.startswith("VACUUM (ANALYZE)"):
            raise StorageFullError("could not extend file")
        return PostgresAdapter._query(shard, sql, values)

    with contextlib.closing(open_store(place.url(1))) as store:
        place.rows(1, "INSERT INTO {}.page_payloads VALUES (1000000, 'left by a killed writer')")
        monkeypatch.setattr(Shard, "_query", query)
        store.compact()
        assert place.payloads() == {}
    assert asked.count(f'VACUUM "{place.schema}".page_payloads') == 3


def test_a_shard_that_answers_again_is_down_no_more(store: Adapter) -> None:
    """Of one that is taken for down for long, its next failure is not waited out."""
    pages = add_random_pages(store, 60, size=500)
    sharded = cast(Any, store)

    def all_fail() -> None:
        for shard in sharded._shards:
            shard.failed()
        assert not sharded.size_is_exact()

    all_fail()
    assert store.stored_bytes() > 0
    assert sharded.size_is_exact()
    all_fail()
    assert dict(store.read_pages(list(pages))) == pages
    assert sharded.size_is_exact()


@pytest.mark.parametrize("number", range(3))
def test_who_loses_a_connection_while_pages_are_written_is_told_which(
    number: int, store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are written to at once, and each of them could be taken for the lost one."""
    sharded, write = cast(Any, store), Shard.write
    lost = sharded._shards[number]

    def cut(self: Shard, *row: Any) -> None:
        monkeypatch.undo()
        place.cut(number, sharded._mine.touched[lost.id].connection.info.backend_pid)
        write(self, *row)

    def insert() -> None:
        with store.transaction():
            store.insert_pages([(bytes(16), bytes(100)) for _ in range(60)], state=LIVE)
            monkeypatch.setattr(Shard, "write", cut)
            store.insert_pages([(bytes(16), bytes(1 << 20)) for _ in range(24)], state=LIVE)

    with pytest.raises(UnavailableError, match=re.escape(lost.shown)):
        insert()
    assert place.payloads() == {}
    add_random_pages(store, 3)
