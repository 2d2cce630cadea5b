# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of `refill` in each phase and at random moments, a lost shard's replacement included.

After the kill the store is served from the copies that are left; run again, the rest is put back,
and nothing of the first is left. 10 kills in `make test`, 200 in `make crash`
(PYDEDUP_CRASH_ROUNDS).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies
from pydedup.adapters._shard import Shard
from pydedup.adapters.postgres_shards import ShardedAdapter
from pydedup.errors import ArgumentError
from pydedup.maintenance import refill
from pydedup.testing._contract_base import with_option
from pydedup.testing.crash import ROUNDS, kills, run_and_kill
from pydedup.testing.shards import ShardedPlace, give_known_places

MODELS = {
    f"m{seed}@1": {"w": np.random.default_rng(seed).standard_normal((768, 1024), np.float32)}
    for seed in range(3)
}
#: Name of a phase -> the class and method in which the child is killed, in which call, and whether
#: that call has had its effect.
PHASES: Final[dict[str, tuple[type, str, int, bool]]] = {
    "before the claim": (Shard, "take_place", 1, False),
    "claimed": (Shard, "take_place", 1, True),
    "in the list": (ShardedAdapter, "match_shards", 1, False),
    "first piece read": (Shard, "put_payloads", 1, False),
    "first piece written": (Shard, "put_payloads", 1, True),
    "within a piece": (Shard, "_write_many", 4, True),
}


@pytest.fixture
def place(shard_servers: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardedPlace]:
    give_known_places(monkeypatch)
    place = ShardedPlace([server.url for server in shard_servers])
    yield place
    for server in shard_servers:
        with psycopg.connect(server.url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT nspname FROM pg_namespace WHERE nspname LIKE %s", [f"{place.schema}%"]
            )
            for (schema,) in found.fetchall():
                connection.execute(f"DROP SCHEMA {schema} CASCADE")


def replace_and_refill(url: str, phase: str | None, tell: Callable[[], object]) -> None:
    """What the child does, and where it dies."""
    if phase is not None:
        owner, method, number, after = PHASES[phase]
        wanted, calls = getattr(owner, method), 0

        def strike(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = wanted(self, *args, **kwargs)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, method, strike)
    refill._PAGES_AT_ONCE = 2
    tell()
    pydedup.Store.replace_lost(url)
    with pydedup.open(url) as store:
        assert store.refill().ok


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_a_killed_refill_is_done_again(place: ShardedPlace) -> None:
    def url_with(number: int) -> str:
        """The URL of the store with the database of this number as its second shard."""
        shard = with_option(place.servers[1], f"schema={place.schema}_{number}")
        return place.url(2, shards=[0, shard, 2])

    def payloads(number: int) -> list[tuple[int, bytes]]:
        """What all shards have, in the order of pages: two of each."""
        tables = ("{}.page_payloads", f"{{}}_{number}.page_payloads", "{}.page_payloads")
        return sorted(
            row
            for server, table in enumerate(tables)
            for row in place.rows(server, f"TABLE {table}")
        )

    def lose(number: int) -> None:
        """Lose the second shard, and of what the others share one copy each."""
        place.rows(1, f"DROP SCHEMA {{}}_{number} CASCADE")
        there = [{n for (n,) in place.rows(k, "SELECT id FROM {}.page_payloads")} for k in (0, 2)]
        missing, damaged = sorted(there[0] & there[1])[:2]
        place.rows(2, "DELETE FROM {}.page_payloads WHERE id = %s", missing)
        place.rows(
            0, "UPDATE {}.page_payloads SET payload = substr(payload, 9) WHERE id = %s", damaged
        )

    with pydedup.open(url_with(0)) as store:
        store.add_many(dict(MODELS), policy=policies.Exact())
    there = payloads(0)
    lose(0)
    begun = time.monotonic()
    assert not run_and_kill(lambda tell: replace_and_refill(url_with(1), None, tell), 60.0)
    seconds = time.monotonic() - begun
    assert payloads(1) == there
    for kill in kills(PHASES, seconds):
        number, phase, url = kill.number, kill.phase, url_with(kill.number + 2)
        lose(number + 1)
        kill.killed = run_and_kill(
            lambda tell, url=url, phase=phase: replace_and_refill(url, phase, tell),  # type: ignore[misc]
            None if phase else kill.delay,
        )
        ((is_there,),) = place.rows(
            1, f"SELECT to_regclass('{{}}_{number + 2}.shard_identity') IS NOT NULL"
        )
        assert is_there or phase in (None, "before the claim")
        if not is_there:
            with pytest.raises(ArgumentError, match="refill --replace"):
                pydedup.open(url)
            assert pydedup.Store.replace_lost(url) is not None
        with pydedup.open(url) as store:
            served(store)
            assert store.refill().ok
            served(store)
            report = store.verify()
            assert (report.errors, report.notes) == ([], [])
        assert payloads(number + 2) == there


def served(store: pydedup.Store) -> None:
    for address, model in MODELS.items():
        assert store.load(address)["w"].tobytes() == model["w"].tobytes()
