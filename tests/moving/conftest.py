# SPDX-License-Identifier: Apache-2.0
"""A family of models as the tests of moving have it, and what must hold of a copy."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pydedup
from pydedup import policies, registry
from pydedup.adapter import LIVE, STAGING, Adapter
from pydedup.graph import Graph, Node
from pydedup.layout import block_costs, map_places, pages_read
from pydedup.moving import together
from pydedup.store import Store

Model = dict[str, np.ndarray]

GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w", "bias": "b"}),))


def member(seed: int, root: int = 0) -> Model:
    """One of a family: some rows of the table are its own, its weights are near to the others'."""
    rng, base = np.random.default_rng(1000 + seed), np.random.default_rng(root)
    table = base.standard_normal((3_000, 64)).astype(np.float32)
    weights = base.standard_normal((96, 256)).astype(np.float32)
    bias = base.standard_normal(96).astype(np.float32)
    if seed:
        table[rng.integers(0, 3_000, 150)] += 1
        weights *= 1 + 1e-4 * rng.standard_normal(weights.shape).astype(np.float32)
    return {"table": table, "w": weights, "b": bias, "step": np.array(seed, np.int64)}


def fill(store: Store) -> None:
    """Add models of all policies, with all that may belong to a model."""
    store.add_many({"base@1": member(0), "near@1": member(1)}, metadata={"task": "Ω\n'\""})
    store.add("near@2", member(2), graph=GRAPH)
    store.add("close@1", member(3), policy=policies.Bounded(0.001))
    store.add("exact@1", member(4), policy=policies.Exact())
    store.add("kept@1", member(5), policy=policies.Accuracy(lambda arrays: 1.0, max_drop=0.5))
    store.add("nothing@0", torch.nn.Sequential(torch.nn.ReLU()))
    store.add("hollow@0", {"none": np.empty((0, 3), np.float32), "one": np.array(True)})
    store.alias("near", "prod", "1")
    store.alias("near", "next", "2")


@pytest.fixture(autouse=True)
def _pages_for_the_family(small_pages: None) -> None:
    """Its models have several pages each."""


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are copied each by itself, small ones too."""
    monkeypatch.setattr(together, "_MOST_MODELS", 1)


@pytest.fixture
def family() -> Callable[..., Model]:
    """:func:`member`."""
    return member


@pytest.fixture(scope="session")
def filled_for_all(new_lasting_store: Callable[[str], str]) -> Callable[[str], str]:
    """Return the URL of a store with the family in it, on the back end named, which no test
    may change: it is one for all.
    """

    @functools.cache
    def make(backend: str) -> str:
        url = new_lasting_store(backend)
        with pydedup.open(url) as store:
            fill(store)
        return url

    return make


@pytest.fixture
def filled(
    new_store: Callable[[str], str], filled_for_all: Callable[[str], str]
) -> Callable[[str], str]:
    """Return the URL of a new store with the family in it, on the back end named."""

    def make(backend: str) -> str:
        url = new_store(backend)
        if backend == "sqlite":
            source, path = (
                place.removeprefix("sqlite:///") for place in (filled_for_all(backend), url)
            )
            shutil.copy(source, path)
            return url
        with pydedup.open(url) as store:
            fill(store)
        return url

    return make


def rows_of(adapter: Adapter) -> dict[str, Any]:
    """Return all that is recorded of models, but for ids, and for what has ids in it."""
    found: dict[str, Any] = {}
    for row in adapter.models():
        tensors = adapter.tensors(row.id)
        found[f"{row.name}@{row.version}"] = (
            [getattr(row, name) for name in row.__slots__ if name not in ("id", "certificate")],
            {
                key: said
                for key, said in json.loads(row.certificate).items()
                if key not in ("maps", "pages", "aliases")
            },
            [(t.ordinal, t.name, t.dtype, t.shape, t.block_shape) for t in tensors],
            adapter.source_hashes(row.id, 0, len(tensors)),
            [
                (name, kind, adapter.artifact(row.id, name))
                for name, kind in adapter.artifacts(row.id)
            ],
            sorted(alias for _, alias, model in adapter.aliases(row.name) if model == row.id),
        )
    return found


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Check that models are in a store exactly as in another, and that it is sound."""

    def check(source_url: str, url: str, *, names: set[str] | None = None) -> None:
        source, target = (registry.connect(place, mode="r") for place in (source_url, url))
        with Store(source, 64 << 20) as wanted, Store(target, 64 << 20) as found:
            report = found.verify()
            assert (report.errors, report.notes) == ([], [])
            before, after = rows_of(source), rows_of(target)
            for address in before if names is None else names:
                assert after[address] == before[address]
                loaded, expected = found.load(address), wanted.load(address)
                assert list(loaded) == list(expected)
                for name, array in expected.items():
                    assert loaded[name].dtype == array.dtype
                    assert loaded[name].shape == array.shape
                    assert loaded[name].tobytes() == array.tobytes()
            assert target.jobs() == []
            assert target.models(state=STAGING) == []
            assert {row.state for row in target.page_rows()} <= {LIVE}
            for row in target.models():
                json.loads(row.certificate)
                maps = found._catalog.of_row(row).block_maps()
                places = np.concatenate([np.empty(0, np.int64), *map(map_places, maps)])
                reads = list(pages_read(places, block_costs(found._pool, places)))
                assert [figures for _, *figures in target.model_pages(row.id)] == [
                    *map(list, reads)
                ]

    return check
