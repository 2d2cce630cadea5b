# SPDX-License-Identifier: Apache-2.0
"""Models on small pages, whose rows are lost or changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies

SIDE = 32
Model = dict[str, np.ndarray]


def blocks(*seeds: int) -> Model:
    """A model of these blocks."""
    rows = [np.random.default_rng(seed).standard_normal((SIDE, SIDE)) for seed in seeds]
    return {"w": np.concatenate(rows).astype(np.float32)}


def near(model: Model) -> Model:
    """A model whose blocks become deltas on those of another."""
    rng = np.random.default_rng(9)
    return {"w": (model["w"] * (1 + 1e-4 * rng.standard_normal(model["w"].shape))).astype("f4")}


MODELS = {
    "one": blocks(1, 2),
    "two": blocks(1, 2, 3),
    "near": near(blocks(1, 2)),
    "lossy": {"w": near(blocks(4))["w"] + blocks(4)["w"]},
}


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            policy = policies.Bounded(0.01) if name == "lossy" else policies.Lossless()
            store.add(name, model, policy=policy, block_shape=(SIDE, SIDE))


@pytest.fixture
def store(store_url: str) -> Iterator[pydedup.Store]:
    """A store of the models, on each back end in turn."""
    fill(store_url)
    with pydedup.open(store_url) as opened:
        yield opened


@pytest.fixture
def healthy(tmp_path: Path) -> str:
    """Another store of the models, to repair from."""
    url = f"sqlite:///{tmp_path}/healthy.db"
    fill(url)
    return url


def pages_of(store: pydedup.Store, name: str) -> list[int]:
    """The pages that a model is recorded to read."""
    return [row[1] for row in store._adapter.model_pages(store.info(name).info.id)]


def loaded(store: pydedup.Store) -> dict[str, bytes]:
    return {info.name: store.load(info.address)["w"].tobytes() for info in store.models()}


def is_sound(store: pydedup.Store) -> None:
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def stays_sound(store: pydedup.Store, models: dict[str, bytes]) -> None:
    """A vacuum takes nothing of the models, and nothing is found wrong after it."""
    store.vacuum()
    assert loaded(store) == models
    is_sound(store)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file to repair from that has none of the blocks."""
    path = tmp_path / "other.npz"
    np.savez(path, **blocks(77))
    return path
