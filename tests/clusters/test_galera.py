# SPDX-License-Identifier: Apache-2.0
"""A store in a Galera cluster of two nodes: what one node publishes, the other serves."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import mysql.connector
import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.errors import ConflictError, UnavailableError
from pydedup.testing.servers import unused_name

POLICY = policies.Exact()


def weights(seed: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(seed).standard_normal((1024, 1500)).astype(np.float32)}


def same(store: pydedup.Store, name: str, seed: int) -> bool:
    return store.load(name)["w"].tobytes() == weights(seed)["w"].tobytes()


@pytest.fixture
def urls(galera: Any, run: Any) -> list[str]:
    """The same empty database, at each node."""
    name = unused_name()
    run(galera[0].url(""), f"CREATE DATABASE {name}")
    # Each node applies what others commit a moment later; reads wait for it.
    return [node.url(name) for node in galera]


@pytest.fixture(autouse=True)
def wait_for_writes(galera: Any, run: Any) -> None:
    for node in galera:
        run(node.url(""), "SET GLOBAL wsrep_sync_wait = 15")


def test_the_nodes_are_one_cluster(galera: Any) -> None:
    assert [node.status("wsrep_cluster_size") for node in galera] == ["2", "2"]


def test_what_one_node_publishes_the_other_serves(urls: list[str]) -> None:
    with pydedup.open(urls[0]) as here, pydedup.open(urls[1]) as there:
        here.add("a@1", weights(1), policy=POLICY)
        assert same(there, "a", 1)
        there.add("b@1", weights(2), policy=POLICY)
        there.add("a@2", weights(1), policy=POLICY)  # the same weights again
        assert same(here, "b", 2)
        assert here.stats().pages == there.stats().pages
        here.remove("b")
        there.vacuum()
        for store in (here, there):
            report = store.verify()
            assert (report.errors, report.notes) == ([], [])
            assert same(store, "a", 1)


def test_writers_on_both_nodes(urls: list[str]) -> None:
    """Galera lets one of two that publish at once commit; the other is told to try again."""
    pydedup.open(urls[0]).close()
    done: list[str] = []
    failures: list[BaseException] = []

    def add(number: int) -> None:
        try:
            with pydedup.open(urls[number]) as store:
                for version in range(4):
                    for _ in range(20):
                        try:
                            address = f"m{number}@{version}"
                            store.add(address, weights(10 * number + version), policy=POLICY)
                            done.append(address)
                            break
                        except ConflictError:
                            continue
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures
    assert len(done) == 8
    for url in urls:
        with pydedup.open(url) as store:
            assert sorted(info.address for info in store.models()) == sorted(done)
            assert all(
                same(store, f"m{number}@{version}", 10 * number + version)
                for number in range(2)
                for version in range(4)
            )
            assert store.verify().errors == []


@pytest.mark.parametrize("later", ["read", "write", "commit"])
def test_a_transaction_that_another_node_ended(urls: list[str], later: str) -> None:
    """It is told as a conflict, whatever its next statement is, and nothing of it is kept."""
    pydedup.open(urls[0]).close()
    with contextlib.ExitStack() as stack:
        here, beside, there = (
            stack.enter_context(contextlib.closing(registry.connect(url, mode="a")))
            for url in (urls[0], urls[0], urls[1])
        )
        before = here.epoch()
        with pytest.raises(ConflictError), here.transaction():  # noqa: PT012 (which one, varies)
            here.bump_epoch()
            here.set_meta("of", "here")
            with there.transaction():
                there.bump_epoch()
            assert beside.epoch() == before + 1  # so it has come to this node
            if later == "read":
                here.page_rows()
            elif later == "write":
                here.set_meta("of", "later")
        assert (here.epoch(), "of" in here.meta()) == (before + 1, False)
        with here.transaction():
            here.bump_epoch()
        assert there.epoch() == before + 2


def bootstrap(node: Any, run: Any) -> None:
    """Let a node go on alone, as an administrator does; the option has two names, see below."""
    with contextlib.suppress(mysql.connector.Error):
        # Read-only where Galera gives each of its options a variable of its own (26.4.23 does).
        run(node.url(""), "SET GLOBAL wsrep_provider_options = 'pc.bootstrap=true'")
    if node.status("wsrep_cluster_status") != "Primary":
        with contextlib.suppress(mysql.connector.Error):
            run(node.url(""), "SET GLOBAL wsrep_provider_pc_bootstrap = ON")
    wait_for(node, "wsrep_ready", "ON")


def wait_for(node: Any, name: str, value: str) -> None:
    end = time.monotonic() + 60
    while node.status(name) != value:
        assert time.monotonic() < end, f"{name} is {node.status(name)}"
        time.sleep(0.1)


def test_a_node_that_is_killed(galera: Any, urls: list[str], run: Any) -> None:
    """The node that is left has all; while it is not sure to be the majority, it refuses."""
    with pydedup.open(urls[0]) as store:
        store.add("a@1", weights(1), policy=POLICY)
        galera[1].kill()
        try:
            wait_for(galera[0], "wsrep_ready", "OFF")
            run(galera[0].url(""), "SET GLOBAL wsrep_sync_wait = 0")
            with pytest.raises(UnavailableError, match=r"WSREP.*majority"):
                pydedup.open(urls[0])
            # Who waits for the cluster in vain is told so by the number of a lock's wait.
            run(galera[0].url(""), "SET GLOBAL wsrep_sync_wait = 15")
            with pytest.raises(ConflictError, match="Galera"):
                pydedup.open(urls[0])
            for refused in (lambda: store.load("a"), lambda: store.add("b", weights(2))):
                with pytest.raises((UnavailableError, ConflictError), match="Galera"):
                    refused()
        finally:
            # Of two nodes one is no majority; an administrator says that it goes on.
            bootstrap(galera[0], run)
            galera[1].start()
        assert same(store, "a", 1)
    for url in urls:
        with pydedup.open(url) as store:
            assert same(store, "a", 1)
            assert store.verify().ok
