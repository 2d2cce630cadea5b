# SPDX-License-Identifier: Apache-2.0
"""Places for sharded stores on private servers of PostgreSQL, and a look behind the adapter."""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import unused_name

__all__ = [
    "MODELS",
    "POLICY",
    "NewPlace",
    "ShardedPlace",
    "drop",
    "fill",
    "give_known_places",
    "ids_on",
    "is_empty",
    "is_sound",
    "lost_and_new",
    "model_of",
    "name_of",
    "run",
    "serves",
]

NewPlace = Callable[..., str]
POLICY = policies.Exact()


def give_known_places(patch: pytest.MonkeyPatch) -> None:
    """Give the shards of the next store known ids, and so each page a known place.

    Of three shards with ``replicas=2``, each two have an even and an odd page of the first eight.
    """
    numbers = itertools.count(500)
    known = SimpleNamespace(uuid4=lambda: uuid.UUID(int=next(numbers)))
    patch.setattr("pydedup.adapters.postgres_shards.uuid", known)


class ShardedPlace:
    """A schema on several servers; the first has the coordinator, all of them a shard.

    Attributes
    ----------
    servers
        URLs of the servers.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        self.servers = list(servers)
        self.schema = unused_name()

    def url(
        self, replicas: int = 1, *options: str, shards: Sequence[int | str] | None = None
    ) -> str:
        """Return the URL of the store; ``shards`` are those to list, as numbers or URLs."""
        coordinator = with_option(self.servers[0], f"schema={self.schema}&replicas={replicas}")
        for option in options:
            coordinator = with_option(coordinator, option)
        which = range(len(self.servers)) if shards is None else shards
        listed = [coordinator, *(self.servers[n] if isinstance(n, int) else n for n in which)]
        return "postgresql+shards://" + "|".join(url.partition("://")[2] for url in listed)

    def rows(self, number: int, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return what a query finds on one server, in which ``{}`` stands for the schema."""
        import psycopg

        with psycopg.connect(self.servers[number], autocommit=True) as connection:
            cursor = connection.execute(query.format(self.schema), values or None, binary=True)
            return cursor.fetchall() if cursor.description else []

    def cut(self, number: int, pid: int) -> None:
        """End a connection to one server, and wait until it is gone."""
        self.rows(number, "SELECT pg_terminate_backend(%s)", pid)
        # PostgreSQL 13 cannot be told to wait for it.
        while self.rows(number, "SELECT pid FROM pg_stat_activity WHERE pid = %s", pid):
            time.sleep(0.01)

    @contextlib.contextmanager
    def taking_no_changes(self, number: int) -> Iterator[None]:
        """Let connections to one server that are opened meanwhile only read."""
        self.rows(number, "ALTER SYSTEM SET default_transaction_read_only = on")
        try:
            self._reloaded(number, "on")
            yield
        finally:
            self.rows(number, "ALTER SYSTEM RESET default_transaction_read_only")
            self._reloaded(number, "off")

    def _reloaded(self, number: int, wanted: str) -> None:
        """Make a server read its configuration, and wait until it has."""
        self.rows(number, "SELECT pg_reload_conf()")
        while self.rows(number, "SHOW default_transaction_read_only") != [(wanted,)]:
            time.sleep(0.01)

    def fullest(self) -> int:
        """Return the number of the server that has most pages, but for the first.

        Which pages a shard has is drawn anew for each store: of a few, one may have none.
        """

        def pages(number: int) -> int:
            return len(self.rows(number, "SELECT id FROM {}.page_payloads"))

        return max(range(1, len(self.servers)), key=pages)

    def payloads(self) -> dict[int, set[bytes]]:
        """Return what the shards have of each page."""
        found: dict[int, set[bytes]] = {}
        for number in range(len(self.servers)):
            for page_id, payload in self.rows(number, "TABLE {}.page_payloads"):
                found.setdefault(page_id, set()).add(payload)
        return found


def model_of(seed: int) -> dict[str, np.ndarray]:
    """Return a model of two pages and a half."""
    return {"w": np.random.default_rng(seed).standard_normal((640, 1024)).astype(np.float32)}


MODELS = {f"m{seed}@1": model_of(seed) for seed in range(3)}


def ids_on(place: ShardedPlace, number: int) -> list[int]:
    """Return the pages that a shard has."""
    return [page for (page,) in place.rows(number, "SELECT id FROM {}.page_payloads")]


def name_of(url: str) -> str:
    """Return the name of a new place."""
    if "schema=" in url:
        return url.rpartition("schema=")[2]
    return url.partition("?")[0].rpartition("/")[2]


def run(url: str, query: str) -> list[tuple[Any, ...]]:
    """Return what a statement finds in the database of a place."""
    import psycopg

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
    """Whether nothing was made in a place that is a schema."""
    return run(url, f"SELECT to_regnamespace('{name_of(url)}')") == [(None,)]


def fill(url: str) -> None:
    """Make a store of the models."""
    with pydedup.open(url) as store:
        store.add_many(dict(MODELS), policy=POLICY)


def serves(url: str, *models: str) -> None:
    """Hold each model against what was added."""
    with pydedup.open(url, mode="r") as store:
        assert {info.address for info in store.models()} == MODELS.keys()
        for address in models or MODELS:
            assert store.load(address)["w"].tobytes() == MODELS[address]["w"].tobytes()


def is_sound(url: str) -> None:
    """Hold the store against what was added: all is there, and nothing is left to do."""
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
