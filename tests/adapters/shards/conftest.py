# SPDX-License-Identifier: Apache-2.0
"""Three servers for sharded stores: the first has the coordinator, all of them have a shard."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pydedup.adapter import Adapter
from pydedup.testing._contract_base import open_store, with_option
from pydedup.testing.servers import PostgresServer, unused_name
from pydedup.testing.shards import NewPlace, ShardedPlace, give_known_places, run


@pytest.fixture
def place(shard_servers: list[PostgresServer]) -> Iterator[ShardedPlace]:
    """An empty place for a sharded store over three servers."""
    place = ShardedPlace([server.url for server in shard_servers])
    yield place
    for server in shard_servers:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")


@pytest.fixture
def store(place: ShardedPlace) -> Iterator[Adapter]:
    """An open store on it, each page on one shard."""
    adapter = open_store(place.url(replicas=1))
    yield adapter
    adapter.close()


@pytest.fixture
def known_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the shards of the next store known ids."""
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
