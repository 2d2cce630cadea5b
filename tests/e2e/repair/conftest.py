# SPDX-License-Identifier: Apache-2.0
"""A family of models in a store, whose pages are damaged and repaired."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.layout import block_costs, map_places, pages_read

Model = dict[str, NDArray[Any]]


@functools.cache
def family() -> dict[str, Model]:
    """A base, two fine-tunes that become deltas on it, one that shares, one of its own."""
    rng = np.random.default_rng(7)
    base = {
        "w": rng.standard_normal((512, 256)).astype(np.float32),
        "b": rng.standard_normal(512).astype(np.float32),
    }
    models = {"base": base}
    for name in ("near", "nearer"):
        moved = base["w"] * (1 + 1e-4 * rng.standard_normal((512, 256)))
        models[name] = {"w": moved.astype(np.float32), "b": base["b"]}
    shares = {"w": base["w"].copy(), "b": base["b"] + 1}
    shares["w"][:64] = rng.standard_normal((64, 256))
    models["shares"] = shares
    models["own"] = {"w": rng.standard_normal((256, 256)).astype(np.float16)}
    for model in models.values():
        for array in model.values():
            array.flags.writeable = False
    return models


ALL = ("base", "near", "nearer", "shares", "own")


def fill(url: str, names: tuple[str, ...] = ALL) -> None:
    if url.startswith("sqlite:"):
        Path(url.removeprefix("sqlite:///")).write_bytes(file_with(names))
    else:
        add_all(url, names)


@functools.cache
def file_with(names: tuple[str, ...]) -> bytes:
    """A store in a file, which is made once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        add_all(f"sqlite:///{path}", names)
        return path.read_bytes()


def add_all(url: str, names: tuple[str, ...]) -> None:
    models = family()
    with pydedup.open(url) as store:
        for name in names:
            policy = policies.Exact() if name == "base" else policies.Lossless()
            store.add(name, models[name], policy=policy)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another store with the same models, from which others are repaired."""
    url = f"sqlite:///{tmp_path_factory.mktemp('healthy')}/healthy.db"
    add_all(url, ALL)
    return url


def assert_holds(store: pydedup.Store, name: str) -> None:
    wanted = family()[name.partition("@")[0]]
    loaded = store.load(name)
    assert {key: array.tobytes() for key, array in loaded.items()} == {
        key: array.tobytes() for key, array in wanted.items()
    }


def assert_sound(url: str, notes: bool = False) -> None:
    """All models are what they were, and all tables agree."""
    with pydedup.open(url) as store:
        report = store.verify()
        assert report.errors == []
        assert notes or report.notes == []
        for info in store.models():
            assert_holds(store, info.address)
        check_reads(store)
        store.add("again", family()["base"])
        assert_holds_as(store, "again", "base")
        store.remove("again")


def assert_holds_as(store: pydedup.Store, name: str, wanted: str) -> None:
    loaded = store.load(name)
    assert all(loaded[key].tobytes() == a.tobytes() for key, a in family()[wanted].items())


def check_reads(store: pydedup.Store) -> None:
    """What is recorded of who reads what is what block maps and pages say."""
    for info in store.models():
        model = store._catalog.model(info.address)
        places = np.concatenate([map_places(m) for m in model.block_maps()])
        wanted = list(pages_read(places, block_costs(store._pool, places)))
        assert [row[1:] for row in store._adapter.model_pages(info.id)] == wanted


def pages_of(url: str, *names: str) -> list[int]:
    """The pages that hold blocks, or bases of blocks, of exactly these models' maps."""
    with pydedup.open(url, mode="r") as store:
        return sorted(
            {
                page
                for name in names
                for _, page, _, _ in store._adapter.model_pages(store.info(name).info.id)
            }
        )


def flip_half(payload: bytearray) -> None:
    payload[len(payload) // 2] ^= 16


def ruin(payload: bytearray) -> None:
    payload[:] = np.random.default_rng(1).bytes(len(payload))
