# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""SIGKILL of a database server at a random moment of a scoring on Ray: each row is there once.

Of a single server, and of any one of those of a sharded store. As often as PYDEDUP_CRASH_ROUNDS
says (`make crash`), 50 times at most.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
import pydedup.ray
from pydedup.errors import ClusterError, UnavailableError
from pydedup.testing.servers import unused_name
from pydedup.testing.shards import ShardedPlace, run

from ..scoring.conftest import Tables, add, features
from .conftest import slowly

ROUNDS = min(50, int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "1")))
ROWS = 600
#: How a round went in which the work was done before the server was killed, on a busy machine.
TOO_LATE = "done before"


class Killer(threading.Thread):
    """Kills a server when rows are read, and starts it again a moment later."""

    def __init__(self, server: Any, delay: float, pause: float) -> None:
        super().__init__()
        self._server, self._delay, self._pause = server, delay, pause
        self.reading = threading.Event()
        self.struck = False
        self.failed: Exception | None = None

    def run(self) -> None:
        self.reading.wait(60)
        time.sleep(self._delay)
        self.struck = True
        try:
            self._server.kill()
            time.sleep(self._pause)
            self._server.start()
        except Exception as error:  # told by the test, not by a thread
            self.failed = error


def scored_while_killed(url: str, home: str, servers: list[Any], chance: random.Random) -> str:
    """Score a table while one of the servers is killed, again until it is done; say how it went."""
    tables, into = Tables(home), unused_name().replace("pydedup", "t")
    table, x = f"{into}_x", features(ROWS)
    tables.run(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, f0 FLOAT, f1 FLOAT, f2 FLOAT)")
    rows = [[i, *map(float, row)] for i, row in enumerate(x)]
    tables.run(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
    # So slow that a kill is in the middle.
    query = f"SELECT id, f0, f1, {slowly(tables)} AS f2 FROM {table}"
    killer = Killer(chance.choice(servers), chance.random(), 0.2 + chance.random())
    killer.start()
    told, in_the_middle, met = "done at once", False, ""
    try:
        for _ in range(5):
            try:
                report = pydedup.ray.score(
                    query,
                    url,
                    "m@1",
                    into=into,
                    workers=2,
                    part_rows=50,
                    batch=10,
                    progress=lambda *_: killer.reading.set(),
                )
                in_the_middle = killer.struck
                break
            except (UnavailableError, ClusterError) as error:  # the latter of a worker's database
                if not killer.struck:
                    raise AssertionError("nobody was killed yet") from error
                # Who is refused at once would try for less time than a busy machine takes to start.
                killer.join()
                if killer.failed is not None:
                    raise killer.failed from error
                told, met = "told, and done again", f"{type(error).__name__}: {error}"
        else:
            raise AssertionError(f"it does not come to an end: {met}")
    finally:
        killer.reading.set()
        killer.join()
    assert killer.failed is None, killer.failed
    assert report.rows + report.skipped == ROWS
    found = tables.run(f"SELECT id, prediction FROM {into}")
    assert sorted(key for key, _ in found) == list(range(ROWS))
    with pydedup.open(url) as store:
        wanted = store.load("m@1")["w"]
        assert store._adapter.jobs() == []
        assert store.verify().errors == []
    got = [value for _, value in sorted(found)]
    np.testing.assert_allclose(got, (x @ wanted.T)[:, 0], rtol=1e-4, atol=1e-5)
    for name in (into, table):
        tables.run(f"DROP TABLE {name}")
    return told if in_the_middle else TOO_LATE


def rounds(scored: Callable[[], str]) -> Counter[str]:
    """Kill so often in the middle, and return how often it went how."""
    told: Counter[str] = Counter()
    while told.total() - told[TOO_LATE] < ROUNDS:
        told[scored()] += 1
        assert told[TOO_LATE] <= ROUNDS // 2 + 2, told
    return told


@pytest.mark.timeout(300 + 60 * ROUNDS)
def test_a_server_that_is_killed_while_ray_scores(own_server: Any, connected: Any) -> None:
    url = own_server.new_place()
    add(url, "m@1", seed=1)
    chance, begun = random.Random(os.getpid()), time.monotonic()
    told = rounds(lambda: scored_while_killed(url, url, [own_server], chance))
    print(f"{Tables(url).kind}: {told}, in {time.monotonic() - begun:.0f} s")


@pytest.mark.timeout(300 + 60 * ROUNDS)
def test_any_server_of_a_sharded_store_is_killed_while_ray_scores(
    shard_servers: list[Any], connected: Any
) -> None:
    place = ShardedPlace([server.url for server in shard_servers])
    url = place.url(2)
    add(url, "m@1", seed=1)
    chance, begun = random.Random(os.getpid()), time.monotonic()
    home = shard_servers[0].url
    told = rounds(lambda: scored_while_killed(url, home, shard_servers, chance))
    print(f"shards: {told}, in {time.monotonic() - begun:.0f} s")
    for server in shard_servers:
        run(server.url, f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")
