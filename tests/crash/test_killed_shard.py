# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of one server of a sharded store at a random time: adding, serving, vacuuming.

Nothing that was published is lost, an add is there whole or not at all, and with two copies of each
page whoever predicts notices nothing. ``PYDEDUP_CRASH_ROUNDS`` says how often (`make crash`).
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies
from pydedup.errors import DuplicateError, UnavailableError
from pydedup.graph import Graph, Node
from pydedup.testing.shards import ShardedPlace

ROUNDS = int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "1"))
Model = dict[str, np.ndarray]
GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
POLICY = policies.Exact()


def model_of(seed: int) -> Model:
    return {"w": np.random.default_rng(seed).standard_normal((1024, 2048)).astype(np.float32)}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {f"m{seed}@1": model_of(seed) for seed in range(3)}


@pytest.fixture
def new_place(shard_servers: list[Any]) -> Iterator[Callable[[], ShardedPlace]]:
    made: list[ShardedPlace] = []

    def make() -> ShardedPlace:
        made.append(ShardedPlace([server.url for server in shard_servers]))
        return made[-1]

    yield make
    for server in shard_servers:
        with psycopg.connect(server.url, autocommit=True) as connection:
            for place in made:
                connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")


@contextlib.contextmanager
def killed(server: Any, delay: float) -> Iterator[threading.Event]:
    """Kill a server after some seconds, and start it again a moment later; tell of the kill."""
    struck = threading.Event()

    def kill() -> None:
        time.sleep(delay)
        server.kill()
        struck.set()
        time.sleep(0.3)
        server.start()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield struck
    finally:
        killer.join()


def check(place: ShardedPlace, url: str, models: dict[str, Model]) -> None:
    """All models are there to the bit, and after a vacuum each page has its copies, and no more."""
    with pydedup.open(url) as store:
        assert {info.address for info in store.models()} == models.keys()
        for address, model in models.items():
            assert store.load(address)["w"].tobytes() == model["w"].tobytes()
        store.vacuum(lease_seconds=0)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
    pages = {number for (number,) in place.rows(0, "SELECT id FROM {}.pages")}
    copies = place.payloads()
    assert copies.keys() == pages
    assert all(len(payloads) == 1 for payloads in copies.values())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("work", ["add", "vacuum"])
def test_a_server_that_is_killed_while_the_store_changes(
    work: str, shard_servers: list[Any], models: dict[str, Model], new_place: Any
) -> None:
    for number in range(ROUNDS):
        chance = random.Random(f"{work} {number}")
        place, copies = new_place(), 2 - number % 2
        url = place.url(replicas=copies)
        kept = dict(list(models.items())[:2])
        with pydedup.open(url) as store:
            store.add_many(dict(models.items()), policy=POLICY)
            store.remove("m2")
        server, delay = chance.choice(shard_servers), chance.random() * 0.4
        with pydedup.open(url) as store, killed(server, delay) as struck:
            told = False
            with contextlib.suppress(UnavailableError):
                while not struck.is_set():
                    if work == "vacuum":
                        store.vacuum(lease_seconds=0)
                        continue
                    store.add("m2@1", models["m2@1"], policy=POLICY)
                    told = True
                    if not struck.is_set():
                        told = False
                        store.remove("m2")
        with pydedup.open(url) as store:
            there = {info.address for info in store.models()}
            assert kept.keys() <= there
            if work == "add" and not told:
                with contextlib.suppress(DuplicateError):  # struck in the removal, or the commit
                    store.add("m2@1", models["m2@1"], policy=POLICY)
                there.add("m2@1")
        check(place, url, {address: models[address] for address in there})


@pytest.mark.timeout(3600)
def test_a_shard_that_is_killed_while_models_are_served(
    shard_servers: list[Any], models: dict[str, Model], new_place: Any
) -> None:
    """With two copies all answers are right, and none waits for the server's return."""
    place = new_place()
    url = place.url(replicas=2)
    x = np.random.default_rng(9).standard_normal((2, 2048)).astype(np.float32)
    # Not in the thread: OpenBLAS stands still for ever when another one forks while it multiplies.
    answers_of = {address: x @ model["w"].T for address, model in models.items()}
    with pydedup.open(url) as store:
        for address, model in models.items():
            store.add(address, model, graph=GRAPH, policy=POLICY)
    done = threading.Event()
    failures: list[BaseException] = []
    answers, longest = 0, 0.0

    def serve() -> None:
        nonlocal answers, longest
        try:
            # Three pages fit into memory, so every answer is read from the servers anew.
            with pydedup.open(url, mode="r", memory="3MiB") as store:
                while not done.is_set():
                    began = time.monotonic()
                    for address, expected in answers_of.items():
                        np.testing.assert_allclose(store.predict(address, x), expected, 1e-3, 1e-2)
                    answers, longest = answers + 1, max(longest, time.monotonic() - began)
        except BaseException as error:  # shown below
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for number in range(ROUNDS):
            chance = random.Random(f"serve {number}")
            # The first server has the coordinator, without which nothing is served.
            with killed(chance.choice(shard_servers[1:]), chance.random() * 0.3) as struck:
                struck.wait(60)
                before, end = answers, time.monotonic() + 60
                while answers < before + 3 and time.monotonic() < end and not failures:
                    time.sleep(0.02)
            assert answers >= before + 3 or failures
    finally:
        done.set()
        thread.join(60)
    assert not failures, failures
    assert longest < 10
    check(place, url, models)
