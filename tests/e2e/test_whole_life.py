# SPDX-License-Identifier: Apache-2.0
"""A whole life of a store on every back end: add, load, compute, share, remove, vacuum, verify."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import pydedup
from pydedup.errors import DuplicateError, NotAStoreError, ReadOnlyError
from pydedup.graph import Graph, Node
from pydedup.testing.program import run_here, run_process

Model = dict[str, np.ndarray]

GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h", {"weight": "0.weight", "bias": "0.bias"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "2.weight", "bias": "2.bias"}),
    ),
)


@dataclass
class Place:
    """Where a store is: by a URL, and a schema where the database has such a thing."""

    url: str
    schema: str | None

    def open(self, mode: str = "a") -> pydedup.Store:
        return pydedup.open(self.url, mode=mode, schema=self.schema)


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return Place(f"sqlite:///{tmp_path / 'store.db'}", None)
    if request.param == "postgres":
        schema: str = request.getfixturevalue("postgres_schema")
    else:
        schema = urlsplit(request.getfixturevalue("mysql_database")).path.strip("/")
    return Place(request.getfixturevalue(f"{request.param}_url"), schema)


def family() -> tuple[Model, Model]:
    """A two-layer network, and a fine-tune of it: one layer moved a little, a bias much."""
    rng = np.random.default_rng(5)
    base = {
        "0.weight": rng.standard_normal((1024, 512)).astype(np.float32),
        "0.bias": rng.standard_normal(1024).astype(np.float32),
        "2.weight": rng.standard_normal((300, 1024)).astype(np.float32),
        "2.bias": rng.standard_normal(300).astype(np.float32),
    }
    tuned = {name: array.copy() for name, array in base.items()}
    tuned["0.weight"] *= 1 + 1e-4 * rng.standard_normal((1024, 512)).astype(np.float32)
    tuned["2.bias"] += 1
    return base, tuned


def assert_holds(store: pydedup.Store, name: str, wanted: Model) -> None:
    """It loads to the bit, predicts and multiplies."""
    loaded = store.load(name)
    assert {key: (array.dtype, array.tobytes()) for key, array in loaded.items()} == {
        key: (array.dtype, array.tobytes()) for key, array in wanted.items()
    }
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    hidden = np.maximum(x @ wanted["0.weight"].T + wanted["0.bias"], 0)
    answer = hidden @ wanted["2.weight"].T + wanted["2.bias"]
    np.testing.assert_allclose(store.predict(name, x), answer, rtol=1e-4, atol=1e-2)
    product = store.tensor(name, "0.weight").matmul(x)
    np.testing.assert_allclose(product, x @ wanted["0.weight"].T, rtol=1e-4, atol=1e-3)


def test_a_whole_life(place: Place) -> None:
    base, tuned = family()
    with pytest.raises(NotAStoreError, match="mode 'a'"):
        place.open("r")
    with place.open() as store:
        first = store.add("net@1", base, graph=GRAPH)
        second = store.add("tuned@1", tuned, graph=GRAPH)
        assert second.stored_bytes < 0.6 * first.stored_bytes
        assert second.shared_blocks > 0, "a layer did not change"
        assert second.delta_blocks > 0, "the fine-tune is near to its base"
        store.alias("net", "prod", "1")
        with pytest.raises(DuplicateError, match="net@1"):
            store.add("net@1", tuned)
        (shared,) = store.sharing()
        assert (shared["name"], shared["other_name"]) == ("net", "tuned")
        assert_holds(store, "net@prod", base)
        assert_holds(store, "tuned", tuned)
        assert store.verify().ok

    with place.open("r") as reader:
        assert_holds(reader, "tuned", tuned)
        with pytest.raises(ReadOnlyError):
            reader.add("net@3", base)
        with pytest.raises(ReadOnlyError):
            reader.remove("net")
        with place.open() as store:
            before = store.stats()
            store.alias("net", "prod", None)
            store.remove("net@1")
            store.vacuum(grace_seconds=0)
            assert [model.name for model in store.models()] == ["tuned"]
            assert_holds(store, "tuned", tuned)  # with the bases that its deltas need
            assert store.verify().ok
            assert store.stats().page_bytes <= before.page_bytes
            store.add("net@3", base, graph=GRAPH)
            assert_holds(store, "net@3", base)
        assert_holds(reader, "tuned", tuned)  # a reader goes on over a vacuum
        assert reader.verify().ok


def test_the_program_takes_the_url(store_url: str) -> None:
    base, tuned = family()
    with pydedup.open(store_url) as store:
        store.add_many({"a": base, "b": tuned})

    def run(*arguments: str) -> Any:
        # Where something is changed, as users do.
        done = (run_process if arguments[0] == "rm" else run_here)(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert [model["name"] for model in run("ls", store_url)["models"]] == ["a", "b"]
    assert run("verify", store_url)["ok"]
    run("rm", store_url, "a")
    run("vacuum", store_url)
    with pydedup.open(store_url) as store:
        assert [model.name for model in store.models()] == ["b"]
        assert {k: a.tobytes() for k, a in store.load("b").items()} == {
            k: a.tobytes() for k, a in tuned.items()
        }
