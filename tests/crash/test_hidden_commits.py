# SPDX-License-Identifier: Apache-2.0
"""Interrupts and lost answers around every commit: before it, and after it as if it had failed.

A commit that happened but was never heard of (Ctrl-C inside of it, a connection that broke) must
not be undone by whoever made it, and one that did not happen must leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.errors import ConflictError, UnavailableError
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject

MEMORY = 64 * 1024 * 1024


def family() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((6000, 50)).astype(np.float32)
    models = {}
    for number in range(3):
        mine = table.copy()
        mine[rng.choice(6000, 900, replace=False)] += 0.1
        models[f"m{number}"] = {"embedding": mine}
    return models


MODELS = family()


def prepared(url: str) -> None:
    """Leave m0 and m2 in a new store, and what m1 had alone for a vacuum, which repacks it."""
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model, policy=policies.Exact())
        store.remove("m1")


def add(store: Store) -> None:
    store.add("new", {"embedding": MODELS["m1"]["embedding"] * 2}, policy=policies.Exact())


def vacuum(store: Store) -> None:
    store.vacuum()


def remove(store: Store) -> None:
    store.remove("m2")


def assert_sound(url: str) -> None:
    with pydedup.open(url) as store:
        assert store.verify().errors == []
        names = {info.name for info in store.models()}
        assert names >= {"m0"}
        for name in names & MODELS.keys():
            loaded = store.load(name)["embedding"]
            assert np.array_equal(loaded, MODELS[name]["embedding"])
        if "new" in names:
            assert np.array_equal(store.load("new")["embedding"], MODELS["m1"]["embedding"] * 2)
        store.vacuum(lease_seconds=0)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        assert store.stats().retired_pages == 0


STOPPED, LOST = KeyboardInterrupt(), UnavailableError("gone")


@pytest.mark.parametrize(
    ("backend", "error", "after"),
    [
        pytest.param("sqlite", STOPPED, False, id="sqlite-^C-before"),
        pytest.param("sqlite", STOPPED, True, id="sqlite-^C-after"),
        pytest.param("sqlite", LOST, False, id="sqlite-lost-before"),
        pytest.param("sqlite", LOST, True, id="sqlite-lost-after"),
        # Of servers, where answers get lost: the rest is the same code above the adapter.
        pytest.param("postgres", LOST, True, id="postgres-lost-after"),
        pytest.param("mysql", LOST, True, id="mysql-lost-after"),
    ],
)
@pytest.mark.parametrize("work", [add, vacuum, remove])
def test_every_commit_may_be_interrupted(
    new_store: Callable[[str], str],
    backend: str,
    work: Callable[[Store], None],
    after: bool,
    error: BaseException,
) -> None:
    interrupted = 0
    for call in range(1, 40):
        url = new_store(backend)
        prepared(url)
        adapter = registry.connect(url, mode="a")
        faulty, _ = inject(adapter, Fault("commit", error, call=call, after=after))
        with Store(faulty, MEMORY) as store:
            try:
                work(store)
            except type(error):
                interrupted += 1
            else:
                break  # there was no such commit any more
        assert_sound(url)
    assert interrupted >= 1
    assert interrupted < 39


def test_what_was_published_stays_though_nobody_was_told(store_url: str) -> None:
    """Others may have seen it by then, and share its pages."""
    prepared(store_url)
    seen: set[str] = set()

    def look() -> BaseException:
        with pydedup.open(store_url, mode="r") as other:
            seen.update(info.name for info in other.models())
        return UnavailableError("gone")

    for call in range(1, 40):
        adapter = registry.connect(store_url, mode="a")
        faulty, _ = inject(adapter, Fault("commit", look, call=call, after=True))
        with Store(faulty, MEMORY) as store, pytest.raises(UnavailableError):
            store.add("new", {"embedding": MODELS["m1"]["embedding"] * 2})
        if "new" in seen:
            break
    with pydedup.open(store_url) as store:
        assert "new" in {info.name for info in store.models()}
    assert_sound(store_url)


def test_a_staging_that_a_vacuum_collected_leaves_nothing(store_url: str) -> None:
    prepared(store_url)
    with pydedup.open(store_url) as writer, pydedup.open(store_url) as other:

        def collect(stage: str, done: int, total: int) -> None:
            if stage == "writing":
                other.vacuum(lease_seconds=0)  # as if this writer had slept for long

        with pytest.raises(
            ConflictError, match=r"collected by a vacuum.*slept.*clock.*start again"
        ):
            writer.add("new", {"embedding": MODELS["m0"]["embedding"] * 3}, progress=collect)
    assert_sound(store_url)
    with pydedup.open(store_url) as store:
        for info in store.models():
            store.remove(info.address)
        store.vacuum()
        assert store.stats().pages == 0, "no row of the lost staging keeps a page alive"


def test_what_a_lost_race_shares_is_counted(store_url: str) -> None:
    model = {"w": np.random.default_rng(1).standard_normal((600, 300)).astype(np.float32)}
    with pydedup.open(store_url) as loser, pydedup.open(store_url) as winner:
        raced = False

        def race(stage: str, done: int, total: int) -> None:
            nonlocal raced
            if stage == "writing" and not raced:
                raced = True
                winner.add("winner", model)

        # Between two of its transactions another writer publishes the same blocks.
        loser.add_many({"loser": model, "own": {"w": model["w"] + 1}}, progress=race)
        assert raced
        report = loser.verify()
        assert (report.errors, report.notes) == ([], [])
        assert loser.info("loser").used_bytes == loser.info("winner").used_bytes > 0
