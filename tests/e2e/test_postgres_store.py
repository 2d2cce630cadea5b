# SPDX-License-Identifier: Apache-2.0
"""A whole life of a store in PostgreSQL: add, load, compute, share, remove, vacuum, verify."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup.errors import DuplicateError, NotAStoreError, ReadOnlyError
from pydedup.graph import Graph, Node


@pytest.fixture
def schema(postgres_url: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    yield name
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


def family() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A two-layer network, and a fine-tune of it: all weights moved a little, one layer not."""
    rng = np.random.default_rng(5)
    base = {
        "0.weight": rng.standard_normal((256, 128)).astype(np.float32),
        "0.bias": rng.standard_normal(256).astype(np.float32),
        "2.weight": rng.standard_normal((16, 256)).astype(np.float32),
        "2.bias": rng.standard_normal(16).astype(np.float32),
    }
    tuned = {name: array.copy() for name, array in base.items()}
    tuned["0.weight"] *= 1 + 1e-4 * rng.standard_normal((256, 128)).astype(np.float32)
    tuned["2.bias"] += 1
    return base, tuned


GRAPH = Graph(
    inputs=("x",),
    outputs=("y",),
    nodes=(
        Node("linear", ("x",), "h", {"weight": "0.weight", "bias": "0.bias"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "2.weight", "bias": "2.bias"}),
    ),
)


def answer(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ weights["0.weight"].T + weights["0.bias"], 0)
    return np.asarray(hidden @ weights["2.weight"].T + weights["2.bias"])


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def test_a_store_lives_in_postgres(postgres_url: str, schema: str) -> None:
    base, tuned = family()
    x = np.random.default_rng(6).standard_normal((7, 128)).astype(np.float32)
    with pytest.raises(NotAStoreError, match="mode 'a'"):
        pydedup.open(postgres_url, mode="r", schema=schema)
    with pydedup.open(postgres_url, schema=schema) as store:
        store.add("net@1", base, graph=GRAPH)
        report = store.add("net@2", tuned, graph=GRAPH)
        assert report.delta_blocks > 0, "the fine-tune is near to its base"
        assert report.shared_blocks > 0, "a layer did not change"
        assert report.stored_bytes < report.logical_bytes * 0.8
        with pytest.raises(DuplicateError):
            store.add("net@2", base)
        store.alias("net", "prod", "2")
        assert same(store.load("net@1"), base)
        assert same(store.load("net@prod"), tuned)
        for version, weights in (("1", base), ("2", tuned)):
            predicted = store.predict(f"net@{version}", x)
            np.testing.assert_allclose(predicted, answer(weights, x), rtol=1e-4, atol=1e-4)
            product = store.tensor(f"net@{version}", "0.weight").matmul(x)
            np.testing.assert_allclose(product, x @ weights["0.weight"].T, rtol=1e-4, atol=1e-4)
        assert store.verify().ok

    with pydedup.open(postgres_url, mode="r", schema=schema) as reader:
        assert same(reader.load("net"), tuned)
        with pytest.raises(ReadOnlyError):
            reader.add("net@3", base)
        with pydedup.open(postgres_url, schema=schema) as store:
            store.remove("net@1")
            store.vacuum()
            # The bases that deltas of the other need are still there.
            assert same(store.load("net@2"), tuned)
            assert store.verify().ok
            store.add("net@3", base)
            assert same(store.load("net@3"), base)
        assert same(reader.load("net@2"), tuned), "a reader goes on over a vacuum"
        np.testing.assert_allclose(reader.predict("net@2", x), answer(tuned, x), 1e-4, 1e-4)
        assert reader.verify().ok


def test_the_program_takes_the_url(postgres_url: str, schema: str) -> None:
    base, tuned = family()
    url = f"{postgres_url}{'&' if '?' in postgres_url else '?'}schema={schema}"
    with pydedup.open(url) as store:
        store.add_many({"a": base, "b": tuned})

    def run(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-P", "-m", "pydedup", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    assert '"a"' in json.dumps(run("ls", url))
    run("verify", url)
    run("rm", url, "a")
    run("vacuum", url)
    with pydedup.open(url) as store:
        assert [model.name for model in store.models()] == ["b"]
        assert same(store.load("b"), tuned)
