# SPDX-License-Identifier: Apache-2.0
"""The SQL of docs/sharding.md for foreign partitions, run as it stands, and a store on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies
from pydedup.errors import StoreError

DOCUMENT = Path(__file__).parents[3] / "docs" / "sharding.md"


def scripts() -> list[str]:
    """The two blocks of SQL: of the other servers, and of the store's."""
    text = DOCUMENT.read_text(encoding="utf-8")
    part = text[text.index("## Foreign partitions") :]
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", part, re.S)
    assert len(blocks) == 2
    return blocks


@pytest.fixture
def partitioned(shard_servers: list[Any]) -> Iterator[str]:
    """The URL of a store with a model, whose pages lie on two other servers."""
    home, *others = shard_servers
    with psycopg.connect(home.url) as connection:
        if connection.info.server_version < 140000:
            pytest.skip("postgres_fdw knows async_capable from PostgreSQL 14 on")
    on_others, at_home = scripts()
    for number, other in enumerate(others, 1):
        with psycopg.connect(other.url, autocommit=True) as connection:
            connection.execute(on_others)
        at_home = at_home.replace(
            f"host 'db{number}', port '5432'", f"host '127.0.0.1', port '{other.port}'"
        )
    with pydedup.open(home.url) as store:
        store.add("before@1", {"w": weights(0)}, policy=policies.Exact())
    with psycopg.connect(home.url, autocommit=True) as connection:
        connection.execute(at_home)
        yield home.url
        connection.execute("DROP SCHEMA pydedup CASCADE")
        connection.execute("DROP EXTENSION postgres_fdw CASCADE")
    for other in others:
        with psycopg.connect(other.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA pydedup_part CASCADE")


def weights(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1024, 1500)).astype(np.float32)


def counts(servers: list[Any]) -> list[int]:
    found = []
    for server in servers:
        with psycopg.connect(server.url) as connection:
            row = connection.execute("SELECT COUNT(*) FROM pydedup_part.pages").fetchone()
            found.append(int(row[0]) if row else 0)
    return found


def test_a_store_on_foreign_partitions(partitioned: str, shard_servers: list[Any]) -> None:
    with pydedup.open(partitioned) as store:
        assert store.load("before")["w"].tobytes() == weights(0).tobytes()
        changed = weights(0)
        changed[:64] += 1
        store.add("after@1", {"w": changed}, policy=policies.Exact())
        assert store.load("after")["w"].tobytes() == changed.tobytes()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        there = counts(shard_servers[1:])
        assert min(there) > 0
        store.remove("before")
        store.vacuum()
        assert store.verify().ok
        assert sum(counts(shard_servers[1:])) < sum(there)
        assert store.load("after")["w"].tobytes() == changed.tobytes()
    # As the document says: with one of the servers down, pages cannot even be listed.
    shard_servers[2].kill()
    try:
        with pydedup.open(partitioned) as store, pytest.raises(StoreError):
            store.stats()
    finally:
        shard_servers[2].start()
