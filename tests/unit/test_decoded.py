# SPDX-License-Identifier: Apache-2.0
"""What encoded blocks decode to is kept in the pool: the same answers, within the budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node
from pydedup.store import Store

Array = NDArray[np.float32]
GRAPH = Graph(
    ("x",),
    ("out",),
    (
        Node("linear", ("x",), "h", weights={"weight": "up", "bias": "b1"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "out", weights={"weight": "down", "bias": "b2"}),
    ),
)


def _weights(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"up": (768, 512), "down": (256, 768), "words": (6000, 64), "b1": (768,), "b2": (256,)}
    return {name: rng.normal(0, 0.05, shape).astype("f4") for name, shape in shapes.items()}


def _near(weights: dict[str, Array], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: (w + rng.normal(0, 0.0005, w.shape)).astype("f4") if w.ndim == 2 else w
        for name, w in weights.items()
    }


@pytest.fixture(scope="module")
def near() -> dict[str, Array]:
    return _near(_weights(1), 2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, near: dict[str, Array]) -> str:
    """A store of a base, and of a model all of whose matrices are deltas on it."""
    where = f"sqlite:///{tmp_path_factory.mktemp('decoded')}/models.db"
    with pydedup.open(where) as store:
        store.add("base", _weights(1), policy=policies.Exact())
        report = store.add("near", near, policy=policies.Lossless(), graph=GRAPH)
        assert report.delta_blocks > 0.9 * report.blocks
    return where


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with pydedup.open(url, mode="r", memory="64MiB") as opened:
        yield opened


def _pool(store: Store) -> dict[str, int]:
    return store.stats().pool


def _expected(near: dict[str, Array], x: Array) -> Array:
    hidden = np.maximum(x.astype("f8") @ near["up"].T.astype("f8") + near["b1"], 0)
    out: Array = (hidden @ near["down"].T + near["b2"]).astype("f4")
    return out


@pytest.mark.parametrize("batch", [1, 16, 300])
def test_products_are_the_same_bits_from_kept_blocks(
    store: Store, near: dict[str, Array], batch: int
) -> None:
    x = np.random.default_rng(batch).normal(0, 1, (batch, 512)).astype("f4")
    cold = store.predict("near", x)
    np.testing.assert_allclose(cold, _expected(near, x), rtol=1e-4, atol=1e-4)
    for _ in range(3):  # the second one keeps blocks, the third one uses them
        assert np.array_equal(store.predict("near", x), cold)
    matrices = near["up"].nbytes + near["down"].nbytes
    assert 0.9 * matrices < _pool(store)["decoded_bytes"] < 1.5 * matrices


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_rows_and_bags_are_the_same_bits_from_kept_blocks(
    store: Store, near: dict[str, Array], mode: str
) -> None:
    words = store.tensor("near", "words")
    ids = np.random.default_rng(3).integers(0, 6000, (40, 100))
    cold = words.bag(ids, mode=mode)
    for _ in range(3):
        assert np.array_equal(words.take(ids), near["words"][ids])
        assert np.array_equal(words.bag(ids, mode=mode), cold)
    assert _pool(store)["decoded_bytes"] > 0


def test_the_budget_holds_and_answers_stay_right_where_little_fits(
    url: str, near: dict[str, Array]
) -> None:
    x = np.random.default_rng(4).normal(0, 1, (8, 512)).astype("f4")
    with pydedup.open(url, mode="r", memory="64MiB") as roomy:
        expected = roomy.predict("near", x)
    for memory in ("5MiB", "7MiB", "9MiB"):
        with pydedup.open(url, mode="r", memory=memory) as store:
            for _ in range(4):
                assert np.array_equal(store.predict("near", x), expected), memory
                found = _pool(store)
                assert found["bytes"] + found["reserved_bytes"] <= found["budget_bytes"], memory


def test_threads_share_what_is_kept(url: str, near: dict[str, Array]) -> None:
    x = np.random.default_rng(5).normal(0, 1, (4, 512)).astype("f4")
    ids = np.arange(0, 6000, 7)
    wrong: list[str] = []
    with pydedup.open(url, mode="r", memory="12MiB") as store:
        expected = store.predict("near", x)

        def work(number: int) -> None:
            for turn in range(15):
                if not np.array_equal(store.predict("near", x), expected):
                    wrong.append(f"product {number} {turn}")
                taken = store.tensor("near", "words").take(ids)
                if not np.array_equal(taken, near["words"][ids]):
                    wrong.append(f"rows {number} {turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = _pool(store)
        assert found["bytes"] + found["reserved_bytes"] <= found["budget_bytes"]
    assert wrong == []


def test_a_load_keeps_nothing(store: Store, near: dict[str, Array]) -> None:
    loaded = store.load("near")
    assert np.array_equal(loaded["up"], near["up"])
    assert _pool(store)["decoded_bytes"] == 0
