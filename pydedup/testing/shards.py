# SPDX-License-Identifier: Apache-2.0
"""Places for sharded stores on private servers of PostgreSQL, and a look behind the adapter."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import unused_name

__all__ = ["ShardedPlace", "give_known_places"]


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

    def payloads(self) -> dict[int, set[bytes]]:
        """Return what the shards have of each page."""
        found: dict[int, set[bytes]] = {}
        for number in range(len(self.servers)):
            for page_id, payload in self.rows(number, "TABLE {}.page_payloads"):
                found.setdefault(page_id, set()).add(payload)
        return found
