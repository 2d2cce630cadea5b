# SPDX-License-Identifier: Apache-2.0
"""A whole life of a store in MySQL/MariaDB: add, load, compute, share, remove, vacuum, verify."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import DuplicateError, NotAStoreError, ReadOnlyError
from pydedup.graph import Graph, Node

GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h", {"weight": "0.weight", "bias": "0.bias"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "2.weight", "bias": "2.bias"}),
    ),
)


@pytest.fixture
def schema(mysql_url: str) -> Iterator[str]:
    """The name of an empty database."""
    name = f"pydedup_{secrets.token_hex(6)}"
    adapter = registry.connect(mysql_url, mode="a")
    try:
        adapter._define(f"CREATE DATABASE {name}")  # type: ignore[attr-defined]
        yield name
        adapter._define(f"DROP DATABASE {name}")  # type: ignore[attr-defined]
    finally:
        adapter.close()


def family() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
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


def answer(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ weights["0.weight"].T + weights["0.bias"], 0)
    return np.asarray(hidden @ weights["2.weight"].T + weights["2.bias"])


def assert_holds(store: pydedup.Store, name: str, wanted: dict[str, np.ndarray]) -> None:
    loaded = store.load(name)
    assert {key: array.tobytes() for key, array in loaded.items()} == {
        key: array.tobytes() for key, array in wanted.items()
    }
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_allclose(store.predict(name, x), answer(wanted, x), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(
        store.tensor(name, "0.weight").matmul(x), x @ wanted["0.weight"].T, rtol=1e-4, atol=1e-3
    )


def test_a_whole_life(mysql_url: str, schema: str) -> None:
    base, tuned = family()
    with pytest.raises(NotAStoreError, match="mode 'a'"):
        pydedup.open(mysql_url, mode="r", schema=schema)
    with pydedup.open(mysql_url, schema=schema) as store:
        first = store.add("net@1", base, graph=GRAPH)
        second = store.add("tuned@1", tuned, graph=GRAPH)
        assert second.stored_bytes < 0.6 * first.stored_bytes
        assert second.shared_blocks > 0
        assert second.delta_blocks > 0
        store.alias("net", "prod", "1")
        with pytest.raises(DuplicateError, match="net@1"):
            store.add("net@1", tuned)
        (shared,) = store.sharing()
        assert (shared["name"], shared["other_name"]) == ("net", "tuned")

    with pydedup.open(mysql_url, mode="r", schema=schema) as store:
        assert_holds(store, "net@prod", base)
        assert_holds(store, "tuned", tuned)
        with pytest.raises(ReadOnlyError):
            store.remove("net")

    with pydedup.open(mysql_url, schema=schema) as store:
        before = store.stats()
        store.alias("net", "prod", None)
        store.remove("net@1")
        store.vacuum(grace_seconds=0)
        assert [model.name for model in store.models()] == ["tuned"]
        assert_holds(store, "tuned", tuned)
        report = store.verify()
        assert report.ok, report
        assert store.stats().page_bytes <= before.page_bytes
