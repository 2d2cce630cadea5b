# SPDX-License-Identifier: Apache-2.0
"""Small models are published together; what becomes of each is as if it had come alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE
from pydedup.errors import CorruptStoreError, QuotaError
from pydedup.moving import together
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import plan_copy
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject
from pydedup.types import CopyReport

New = Callable[[str], str]
Model = dict[str, np.ndarray]
COUNT = 150


def small(seed: int) -> Model:
    """Share a table and most of a layer with the others, and have some weights of its own."""
    rng, base = np.random.default_rng(1000 + seed), np.random.default_rng(0)
    table = base.standard_normal((64, 64)).astype(np.float32)
    layer = base.standard_normal((32, 64)).astype(np.float32)
    layer *= 1 + 1e-4 * rng.standard_normal(layer.shape).astype(np.float32)
    return {"table": table, "layer": layer, "own": rng.standard_normal((8, 64)).astype(np.float32)}


@pytest.fixture(scope="module")
def source_url(new_lasting_store: Callable[[str], str]) -> str:
    """A store with many small models; some share pages, others have pages of their own."""
    url = new_lasting_store("sqlite")
    with pydedup.open(url) as store:
        store.add_many({f"m{n}@1": small(n) for n in range(COUNT - 30)}, metadata={"tenant": "a"})
        for n in range(COUNT - 30, COUNT):
            store.add(f"m{n}@1", small(n))
        store.alias("m7", "prod", "1")
    return url


def copied(source_url: str, url: str, *, progress: Any = None) -> tuple[CopyReport, int]:
    """Copy all models; also return how many transactions published some."""
    adapter, control = inject(registry.connect(url, mode="a"))
    source = registry.connect(source_url, mode="r")
    with Store(source, 64 << 20) as ours, Store(adapter, 64 << 20) as theirs:
        items = plan_copy(source, adapter, None, all_versions=False, on_conflict="error")
        before = control.calls["bump_epoch"]
        report = copy_models(ours._end(), theirs._end(), items, progress=progress)
        return report, control.calls["bump_epoch"] - before


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "mysql"])
def test_a_transaction_publishes_many(
    source_url: str, new_store: New, assert_same: Any, backend: str
) -> None:
    url = new_store(backend)
    with pydedup.open(url):
        pass
    report, transactions = copied(source_url, url)
    assert report.copied == COUNT
    assert transactions == 3
    assert_same(source_url, url)


def test_the_source_is_asked_about_many_at_a_time(source_url: str, new_store: New) -> None:
    url = new_store("sqlite")
    with pydedup.open(url):
        pass
    source, control = inject(registry.connect(source_url, mode="r"))
    target = registry.connect(url, mode="a")
    with Store(source, 64 << 20) as ours, Store(target, 64 << 20) as theirs:
        items = plan_copy(source, target, None, all_versions=False, on_conflict="error")
        control.calls.clear()
        copy_models(ours._end(), theirs._end(), items)
    asked = ("snapshot", "tensors", "block_maps", "tensors_of", "block_maps_of")
    assert sum(control.calls[method] for method in asked) < COUNT // 5


@pytest.mark.parametrize("into", ["empty", "others", "some"])
def test_it_is_what_they_are_one_by_one(
    source_url: str, new_store: New, monkeypatch: pytest.MonkeyPatch, into: str
) -> None:
    found = []
    for most in (together._MOST_MODELS, 1):
        monkeypatch.setattr(together, "_MOST_MODELS", most)
        url = new_store("sqlite")
        with pydedup.open(url) as store:
            if into == "others":  # then no page goes as it is
                store.add("other", {**small(3), "more": np.ones((40, 40), np.float32)})
            if into == "some":
                with pydedup.open(source_url, mode="r") as source:
                    source.copy_to(url, ["m0", "m140"])
        report, _ = copied(source_url, url)
        with pydedup.open(url) as store:
            adapter = store._adapter
            rows = adapter.blocks_on_pages([row.id for row in adapter.page_rows(state=LIVE)])
            assert len(rows) == len({row.hash128 for row in rows}), "a block is stored twice"
            pages = sorted(row.checksum for row in adapter.page_rows())
            assert store.verify().ok
            sharing = [(info.address, info.aliases) for info in store.models()]
        models = [dataclasses.replace(model, seconds=0) for model in report.models]
        found.append((models, pages, sharing))
    assert found[0] == found[1]


def test_bytes_bound_what_comes_together(
    source_url: str, new_store: New, monkeypatch: pytest.MonkeyPatch, assert_same: Any
) -> None:
    logical = sum(array.nbytes for array in small(0).values())
    monkeypatch.setattr(together, "MOST_BYTES", 10 * logical)
    url = new_store("sqlite")
    with pydedup.open(url):
        pass
    _, transactions = copied(source_url, url)
    assert transactions == COUNT // 10
    assert_same(source_url, url)


def test_a_copy_that_ends_goes_on(source_url: str, new_store: New, assert_same: Any) -> None:
    url = new_store("sqlite")

    def stop(stage: str, done: int, total: int) -> None:
        with pydedup.open(url, mode="r") as store:
            if stage == "checking" and store.models():
                raise KeyboardInterrupt

    with pydedup.open(source_url, mode="r") as source:
        with pytest.raises(KeyboardInterrupt):
            source.copy_to(url, progress=stop)
        with pydedup.open(url) as store:
            assert {info.address for info in store.models()} == {f"m{n}@1" for n in range(64)}
            assert store.verify().notes == []
        assert source.copy_to(url).copied == COUNT - 64
    assert_same(source_url, url)


@pytest.mark.parametrize("skip", [False, True])
def test_one_that_is_damaged_is_named_and_leaves_the_others(new_store: New, skip: bool) -> None:
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        for n in range(6):
            store.add(f"m{n}@1", {"w": np.random.default_rng(n).standard_normal((64, 64))})
        adapter = store._adapter
        ids = {row.address: row.id for row in adapter.models()}
        with adapter.transaction():
            (page,) = (page for _, page, _, _ in adapter.model_pages(ids["m4@1"]))
            adapter.delete_pages([page])
    with pydedup.open(source_url, mode="r") as store:
        if skip:
            report = store.copy_to(url, skip_damaged=True)
            (said,) = report.damaged
            assert "m4@1" in said
        else:
            with pytest.raises(CorruptStoreError, match="m4@1"):
                store.copy_to(url)
    with pydedup.open(url) as store:
        there = [info.name for info in store.models()]
        assert there == ["m0", "m1", "m2", "m3", *(["m5"] if skip else [])]
        assert store.verify().ok


def test_one_that_is_damaged_lets_the_pages_of_others_go_whole(
    new_store: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_url = new_store("sqlite")
    models = [{"w": np.random.default_rng(n).standard_normal((64, 64))} for n in range(7)]
    with pydedup.open(source_url) as store:
        store.add_many({"part@1": models[5], "left@1": models[6]})  # no page of these goes whole
        for n in range(5):
            store.add(f"m{n}@1", models[n])
        adapter = store._adapter
        ids = {row.address: row.id for row in adapter.models()}
        with adapter.transaction():
            (page,) = (page for _, page, _, _ in adapter.model_pages(ids["m1@1"]))
            adapter.delete_pages([page])
    found = []
    for most in (2, 1):
        monkeypatch.setattr(together, "_MOST_MODELS", most)
        url = new_store("sqlite")
        with pydedup.open(source_url, mode="r") as store:
            report = store.copy_to(url, ["part", *(f"m{n}" for n in range(5))], skip_damaged=True)
        found.append([(model.model, model.status, model.whole_pages) for model in report.models])
    assert found[0] == found[1]
    assert sum(whole for _, _, whole in found[0]) == 4


def test_a_quota_lets_in_as_many_as_one_by_one(
    source_url: str, new_store: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (together._MOST_MODELS, 1):
        monkeypatch.setattr(together, "_MOST_MODELS", most)
        url = new_store("sqlite")
        with pydedup.open(url) as store:
            store.add("other", small(COUNT + 1))
            store.quotas.set("tenant", "a", "450KiB")
        with pydedup.open(source_url, mode="r") as source, pytest.raises(QuotaError) as caught:
            source.copy_to(url)
        with pydedup.open(url) as store:
            found.append((str(caught.value), [info.address for info in store.models()]))
    assert found[0] == found[1]
    assert 64 < len(found[0][1]) < COUNT - 30


@pytest.mark.parametrize("call", [3, 30])
def test_one_that_is_removed_meanwhile_leaves_the_others(
    source_url: str, new_store: New, call: int
) -> None:
    own_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url, mode="r") as source:
        source.copy_to(own_url, [f"m{n}" for n in range(100, 140)])
    with pydedup.open(url):
        pass

    def remove() -> None:
        with pydedup.open(own_url) as store:
            if "m135" in {info.name for info in store.models()}:
                store.remove("m135")

    source_adapter, control = inject(registry.connect(own_url, mode="r"))
    target = registry.connect(url, mode="a")
    with Store(source_adapter, 64 << 20) as ours, Store(target, 64 << 20) as theirs:
        items = plan_copy(source_adapter, target, None, all_versions=False, on_conflict="error")
        fault = Fault("source_hashes", remove, call=control.calls["source_hashes"] + call)
        control.add_fault(fault)
        report = copy_models(ours._end(), theirs._end(), items)
        assert {model.model for model in report.models if model.status == "gone"} == {"m135@1"}
        assert report.copied == 39
        assert theirs.verify().ok
