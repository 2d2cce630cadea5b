# SPDX-License-Identifier: Apache-2.0
"""Three servers for sharded stores: the first has the coordinator, all of them have a shard."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pydedup.testing.servers import PostgresServer
from pydedup.testing.shards import ShardedPlace


@pytest.fixture
def place(shard_servers: list[PostgresServer]) -> Iterator[ShardedPlace]:
    """An empty place for a sharded store over three servers."""
    place = ShardedPlace([server.url for server in shard_servers])
    yield place
    for server in shard_servers:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")
