# SPDX-License-Identifier: Apache-2.0
"""Names, versions and aliases that are taken at the destination."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.adapter import LIVE
from pydedup.errors import ArgumentError, DuplicateError, QuotaError
from pydedup.graph import Graph, Node

New = Callable[[str], str]
BACKENDS = ("sqlite", "postgres", "mysql")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_that_is_taken(
    filled: New, new_store: New, family: Callable[..., Any], assert_same: Any, backend: str
) -> None:
    source_url, url = filled("sqlite"), new_store(backend)
    mine = family(20)
    with pydedup.open(url) as store:
        store.add("near@1", mine)
        store.alias("near", "mine", "1")
        store.add("alone@1", family(21))
    with pydedup.open(source_url, mode="r") as store:
        with pytest.raises(DuplicateError, match=r"something else: near@1 \(another model\);"):
            store.copy_to(url)
        with pydedup.open(url) as target:
            assert {info.address for info in target.models()} == {"near@1", "alone@1"}
        report = store.copy_to(url, on_conflict="skip")
        status = {model.model: model.status for model in report.models}
        assert status.pop("near@1") == "skip"
        assert set(status.values()) == {"copied"}
        with pydedup.open(url) as target:
            assert np.array_equal(target.load("near@1")["w"], mine["w"])
            assert target.info("near@1").info.aliases == ("mine",)
            assert target.verify().ok
        with pytest.raises(DuplicateError, match="near@1"):
            store.copy_to(url, ["near@1"])
        report = store.copy_to(url, on_conflict="replace")
        assert {m.model: m.status for m in report.models if m.is_new} == {"near@1": "replaced"}
        with pydedup.open(url) as target:
            assert target.info("near@1").info.aliases == ("mine", "prod"), "who pointed there, does"
            target.alias("near", "mine", None)
            target.vacuum()
    assert_same(source_url, url)


def test_a_model_that_an_earlier_version_stored_is_the_same(
    new_store: New, family: Callable[..., Any]
) -> None:
    url, other = new_store("sqlite"), new_store("sqlite")
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    for place in (url, other):
        with pydedup.open(place) as store:
            store.add("m@1", {"w": family(20)["w"]}, graph=graph)
    connection = sqlite3.connect(other.removeprefix("sqlite:///"))
    with contextlib.closing(connection), connection:
        connection.execute(
            "UPDATE pydedup_models SET "
            "certificate = json_remove(certificate, '$.artifacts', '$.tensors')"
        )
    with pydedup.open(url) as store:
        assert [model.status for model in store.copy_to(other).models] == ["there"]
    with pydedup.open(other) as store:
        assert store.verify().ok
        assert [model.status for model in store.copy_to(url).models] == ["there"]


def test_an_alias_that_is_taken(filled: New, new_store: New, family: Callable[..., Any]) -> None:
    url = new_store("sqlite")
    with pydedup.open(filled("sqlite")) as store:
        store.copy_to(url, ["near"], all_versions=True)
        store.alias("near", "prod", "2")
        store.alias("near", "fresh", "1")
        with pytest.raises(DuplicateError, match=r"near@prod \(an alias of another version\)"):
            store.copy_to(url)
        with pydedup.open(url) as target:
            assert len(target.models()) == 2
        store.copy_to(url, ["near"], all_versions=True, on_conflict="skip")
        with pydedup.open(url) as target:
            assert target.info("near@prod").info.version == "1"
            assert target.info("near@fresh").info.version == "1"
        store.copy_to(url, ["near"], all_versions=True, on_conflict="replace")
        with pydedup.open(url) as target:
            assert target.info("near@prod").info.version == "2"


def test_an_alias_and_a_version_of_one_name(new_store: New, family: Callable[..., Any]) -> None:
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("m@1", family(0))
        store.add("m@live", family(1))
        store.alias("m", "best", "1")
    with pydedup.open(url) as store:
        store.add("m@best", family(2))
        store.alias("m", "live", "best")
    with pydedup.open(source_url) as store:
        for how in ("error", "replace"):
            with pytest.raises(DuplicateError, match=r"m@(live|best)"):
                store.copy_to(url, on_conflict=how)
        report = store.copy_to(url, on_conflict="skip")
        assert [(m.model, m.status) for m in report.models] == [
            ("m@1", "copied"),
            ("m@live", "skip"),
        ]
    with pydedup.open(url) as store:
        assert store.info("m@1").info.aliases == ()
        assert store.info("m@live").info.version == "best"


@pytest.mark.parametrize("alias_at", ["source", "destination"])
def test_an_alias_for_a_version_replaces_nothing(
    alias_at: str, new_store: New, family: Callable[..., Any]
) -> None:
    """It is said before anything is copied."""
    urls = {"source": new_store("sqlite"), "destination": new_store("sqlite")}
    for place, url in urls.items():
        with pydedup.open(url) as store:
            store.add("m@1", family(1))
            if place == "source":
                store.add("a@1", family(0))
            if place == alias_at:
                store.alias("m", "live", "1")
            else:
                store.add("m@live", family(2))
    refused = pytest.raises(
        DuplicateError, match=r"m@live.* (delete|rename) (or rename )?the alias"
    )
    with pydedup.open(urls["source"]) as store, refused:
        store.copy_to(urls["destination"], on_conflict="replace")
    with pydedup.open(urls["destination"]) as store:
        assert "a@1" not in {info.address for info in store.models()}


def test_another_policy_is_another_model(new_store: New, family: Callable[..., Any]) -> None:
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(url) as store:
        store.add("m@1", family(0), policy=pydedup.policies.Exact())
    with pydedup.open(source_url) as store:
        store.add("m@1", family(0))
        with pytest.raises(DuplicateError, match="m@1"):
            store.copy_to(url)
        (model,) = store.copy_to(url, on_conflict="replace").models
        assert (model.status, model.stored_bytes) == ("replaced", 0)
    with pydedup.open(url) as store:
        assert store.info("m").certificate["policy"] == "lossless"
        assert (store.verify().errors, store.verify().notes) == ([], [])


def test_another_promise_is_another_model(new_store: New, family: Callable[..., Any]) -> None:
    """Of one policy and the same content, which would keep the one that promised less."""
    url, other = new_store("sqlite"), new_store("sqlite")
    for place, error in ((url, 0.001), (other, 0.1)):
        with pydedup.open(place) as store:
            store.add("m@1", family(20), policy=pydedup.policies.Bounded(error))
    with pydedup.open(url) as store:
        with pytest.raises(DuplicateError, match=r"m@1 \(another model\)"):
            store.copy_to(other)
        store.copy_to(other, on_conflict="replace")
    with pydedup.open(other) as store:
        assert store.info("m@1").certificate["max_rel_error"] == 0.001


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_graph_is_another_model(
    new_store: New, family: Callable[..., Any], tmp_path: Path, backend: str
) -> None:
    source_url, url = new_store("sqlite"), new_store(backend)
    with pydedup.open(url) as store:
        store.add("m@1", family(0))
    with pydedup.open(source_url) as store:
        node = Node("linear", ("x",), "y", {"weight": "w", "bias": "b"})
        store.add("m@1", family(0), graph=Graph(("x",), ("y",), (node,)))
        store.backup(tmp_path / "backup")
        with pytest.raises(DuplicateError, match=r"m@1 \(another model\)"):
            store.copy_to(url)
        with pydedup.open(url) as target, pytest.raises(ArgumentError, match=r"other models.*m@1"):
            target.restore(tmp_path / "backup")
        (model,) = store.copy_to(url, on_conflict="replace").models
        assert (model.status, model.stored_bytes) == ("replaced", 0)
        (model,) = store.copy_to(url).models
        assert model.status == "there"
        x = np.ones((1, 256), np.float32)
        with pydedup.open(url) as target:
            np.testing.assert_array_equal(target.predict("m@1", x), store.predict("m@1", x))


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("has_others", [False, True])  # then no page goes as it is
def test_a_quota_holds_for_copies(
    has_others: bool, filled: New, new_store: New, family: Callable[..., Any]
) -> None:
    url = new_store("sqlite")
    with pydedup.open(url) as store:
        if has_others:
            store.add("other@1", family(1, root=9))
        there = [info.address for info in store.models()]
        store.quotas.set("task", "Ω\n'\"", "740KiB")
    with pydedup.open(filled("sqlite"), mode="r") as source:
        with pytest.raises(QuotaError, match="over its quota"):
            source.copy_to(url)
        with pydedup.open(url) as store:
            copied = [info.address for info in store.models() if info.address not in there]
            assert copied == ["base@1"], "near@1 was too much"
            store.quotas.set("task", "Ω\n'\"", "1280KiB")
        source.copy_to(url)


def test_a_quota_does_not_count_what_is_replaced(new_store: New) -> None:
    rng = np.random.default_rng(1)
    old, new = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    metadata = {"tenant": "a"}
    for measure in ("logical", "marginal"):
        url = new_store("sqlite")
        with pydedup.open(url) as target:
            target.add("m@1", {"w": old}, metadata=metadata)
            target.quotas.set("tenant", "a", "300KiB", measure=measure)
        with pydedup.open(new_store("sqlite")) as store:
            store.add("m@1", {"w": new}, metadata=metadata)
            assert store.copy_to(url, on_conflict="replace").copied == 1
            with pydedup.open(url, mode="r") as target:
                live = {row.id for row in target._adapter.page_rows(state=LIVE)}
                assert live == {page for _, page, _, _ in target._adapter.model_pages()}
            store.add("m@2", {"w": old}, metadata=metadata)
            with pytest.raises(QuotaError):
                store.copy_to(url, on_conflict="replace")
        with pydedup.open(url) as target:
            assert np.array_equal(target.load("m@1")["w"], new)
