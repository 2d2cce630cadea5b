# SPDX-License-Identifier: Apache-2.0
"""Verifying a store of which a shard is down: nothing there is damaged, and not all is checked."""

from __future__ import annotations

import gc
import json

import pytest

import pydedup
from pydedup import policies
from pydedup.cli.app import main
from pydedup.graph import Graph, Node
from pydedup.testing.servers import PostgresServer
from pydedup.testing.shards import MODELS, POLICY, ShardedPlace, fill, ids_on

PASSWORD = "geheim-4711"


@pytest.mark.usefixtures("known_places")
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_is_on_a_shard_that_is_down_is_unreachable(
    replicas: int,
    place: ShardedPlace,
    shard_servers: list[PostgresServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    # The servers trust everybody, whatever the password.
    shards = [url.replace("postgres@", f"postgres:{PASSWORD}@") for url in place.servers]
    url = place.url(replicas, shards=shards)
    fill(url)
    down = shard_servers[place.fullest()]
    ((there,),) = place.rows(place.fullest(), "SELECT array_agg(id) FROM {}.page_payloads")
    down.kill()
    try:
        with pydedup.open(url, mode="r") as store:
            report = store.verify()
        assert main(["verify", url, "-q"]) == 1
        said = capsys.readouterr().out
        assert main(["verify", url, "--json", "-q"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert main(["stats", url]) == 0
        sizes = capsys.readouterr().out
        refilled = main(["refill", url, "-q"])
        not_refilled = capsys.readouterr().out
    finally:
        down.start()
    assert (report.errors, report.damaged_pages, report.ok) == ([], {}, False)
    assert f"port={down.port}" in report.unreachable[0]
    assert PASSWORD not in said + str(found) + str(report) + sizes + not_refilled
    assert "(a shard does not answer)" in " ".join(sizes.split())
    assert " saved nothing pages " in " ".join(sizes.split())  # and no less than that: "at most"
    assert refilled == (replicas == 2)
    assert not_refilled.count(f"port={down.port}") == (1 if replicas == 2 else 0)  # not twice
    assert report.models == len(MODELS)
    assert "DAMAGED" not in said
    assert "damaged:" not in said
    assert "NOT ALL CHECKED" in said
    assert f"port={down.port}" in said
    assert (found["ok"], found["unreachable"]) == (False, report.unreachable)
    if replicas == 1:
        assert sorted(report.unreachable_pages) == sorted(there)
        models = {name for readers in report.unreachable_pages.values() for name in readers}
        assert models
        assert all(name in report.unreachable[1] for name in models)
        assert "could not be checked; read by" in said
    else:  # other copies of all were
        assert report.unreachable_pages == {}
        assert report.pages
    with pydedup.open(url, mode="r") as store:
        assert store.verify().ok


@pytest.mark.usefixtures("known_places")
def test_a_shard_that_is_lost_keeps_no_pages_in_use(
    place: ShardedPlace, shard_servers: list[PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were read as it failed were in use until Python collected garbage."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    url = place.url(replicas=2)
    fill(url)
    down = shard_servers[place.fullest()]
    with pydedup.open(url, mode="r", memory="8MiB") as store:
        down.kill()
        gc.collect()
        gc.disable()
        try:
            for name, weights in MODELS.items():
                loaded = store.load(name)
                assert all((loaded[key] == weights[key]).all() for key in weights)
            assert store._pool.stats()["pinned_bytes"] == 0
        finally:
            gc.enable()
            down.start()


@pytest.mark.usefixtures("known_places")
def test_large_graphs_on_a_shard_that_is_down_are_unreachable(
    place: ShardedPlace, shard_servers: list[PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error, and nothing was said of all else."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    with pydedup.open(place.url(1)) as store:
        for name, model in MODELS.items():  # a graph for each, as one is kept once
            relus = [Node("relu", (f"{name}{n}",), f"{name}{n + 1}") for n in range(400)]
            last = Node("linear", (f"{name}400",), "y", {"weight": "w"})
            graph = Graph((f"{name}0",), ("y",), (*relus, last))
            assert len(graph.to_json()) > 16_384
            store.add(name, model, graph=graph)
    down = shard_servers[place.fullest()]
    down.kill()
    try:
        with pydedup.open(place.url(1), mode="r") as store:
            report = store.verify()
    finally:
        down.start()
    assert report.unreachable_pages
    assert (report.errors, report.models, report.ok) == ([], len(MODELS), False)


@pytest.mark.usefixtures("known_places")
def test_what_is_on_a_shard_that_is_down_cannot_be_evaluated(
    place: ShardedPlace, shard_servers: list[PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error, and nothing was said of all else."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    judged = policies.Accuracy(lambda _: 1.0, 0.0)
    with pydedup.open(place.url(1)) as store:
        store.add_many(dict(MODELS), policy=judged)
    down = shard_servers[place.fullest()]
    down.kill()
    try:
        with pydedup.open(place.url(1), mode="r") as store:
            report = store.verify(evaluate=dict.fromkeys(MODELS, judged.evaluate))
    finally:
        down.start()
    missed = {name for readers in report.unreachable_pages.values() for name in readers}
    said = [text.partition(" cannot be evaluated: ") for text in report.unreachable]
    assert {name for name, between, _ in said if between} == missed
    assert sum("as certified" in note for note in report.notes) == len(MODELS) - len(missed)
    assert (report.errors, report.ok) == ([], False)


@pytest.mark.usefixtures("known_places")
@pytest.mark.parametrize("packs_anew", [False, True])
def test_a_vacuum_leaves_what_is_on_a_shard_that_takes_no_changes(
    packs_anew: bool, place: ShardedPlace
) -> None:
    url, number, gone = place.url(2), 1, "m0@1"
    with pydedup.open(url) as store:
        if packs_anew:
            store.add_many(dict(MODELS), policy=POLICY)  # pages of several models
        else:
            for name, model in MODELS.items():
                store.add(name, model, policy=POLICY)
    there = set(ids_on(place, number))
    with place.taking_no_changes(number):
        with pydedup.open(url) as store:
            store.remove(gone)
            report = store.vacuum()
        serves_but(url, gone)
        assert report.freed_pages > 0
        assert (report.not_repacked is not None) == packs_anew
        assert set(ids_on(place, number)) == there
    with pydedup.open(url) as store:
        store.vacuum()
        assert store.verify().ok
        assert set(ids_on(place, number)) <= {row.id for row in store._adapter.page_rows()}
    serves_but(url, gone)


def serves_but(url: str, gone: str) -> None:
    with pydedup.open(url, mode="r") as store:
        assert {info.address for info in store.models()} == MODELS.keys() - {gone}
        for name in MODELS.keys() - {gone}:
            assert store.load(name)["w"].tobytes() == MODELS[name]["w"].tobytes()
