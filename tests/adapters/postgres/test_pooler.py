# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL behind pgbouncer, in each way in which that shares sessions of the server."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.errors import StoreError, UnavailableError
from pydedup.testing._contract_base import in_thread, with_option
from pydedup.testing.servers import PostgresServer, ServerMissingError, unused_name


@pytest.fixture
def pooled(own_postgres: PostgresServer, server_folder: Path) -> Iterator[Callable[..., str]]:
    """Start a pooler with these settings, and return its URL with a schema of the test's own."""
    with ExitStack() as poolers:

        def start(*settings: str) -> str:
            folder = server_folder / f"pooler-{secrets.token_hex(3)}"
            try:
                pooler = poolers.enter_context(own_postgres.pooled(folder, *settings))
            except ServerMissingError as error:
                pytest.skip(str(error))
            return with_option(pooler.url, f"schema={unused_name()}")

        yield start


def settings_of(url: str) -> list[Any]:
    """Return what others meet who use the pooler."""
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        return [
            connection.execute(f"SHOW {name}").fetchall()
            for name in ("search_path", "default_transaction_read_only", "lock_timeout")
        ]


def test_a_pooler_that_keeps_sessions_is_worked_through(pooled: Callable[..., str]) -> None:
    url = pooled("pool_mode = session", "default_pool_size = 20")
    before = settings_of(url)
    weights = {
        f"layer{i}": np.random.default_rng(i).standard_normal((512, 512)).astype(np.float32)
        for i in range(4)
    }
    with pydedup.open(url) as store, pydedup.open(url, mode="a") as other:
        store.add("net@1", weights)
        other.add("net@2", {**weights, "layer0": weights["layer1"]})
        with pydedup.open(url, mode="r") as reader:
            for name, array in reader.load("net@1").items():
                np.testing.assert_array_equal(array, weights[name])
        other.remove("net@2")
        store.vacuum()
        assert store.verify().ok
    assert settings_of(url) == before


@pytest.mark.parametrize(
    "settings",
    [("transaction",), ("transaction", "max_prepared_statements = 0"), ("statement",)],
    ids=" ".join,
)
def test_a_pooler_that_keeps_none_is_refused(
    pooled: Callable[..., str], settings: tuple[str, ...]
) -> None:
    url = pooled(f"pool_mode = {settings[0]}", *settings[1:])
    before = settings_of(url)
    for mode in ("a", "r"):
        with pytest.raises(StoreError, match="pool_mode = session"):
            pydedup.open(url, mode=mode)
    assert settings_of(url) == before


def test_a_pooler_with_too_few_sessions_says_so(pooled: Callable[..., str]) -> None:
    url = pooled("pool_mode = session", "default_pool_size = 1", "query_wait_timeout = 1")
    with pydedup.open(url) as store:
        store.add("net@1", {"w": np.ones((8, 8), np.float32)})
        with pytest.raises(UnavailableError, match="raise default_pool_size"):
            in_thread(store.models)
