# SPDX-License-Identifier: Apache-2.0
"""What the tables say that a model has of each page, against what is on the pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.catalog import StoredModel
from pydedup.layout import block_costs, joined, map_places, pages_read
from pydedup.policies import Bounded, Exact, Lossless, Policy


def assert_exact(store: pydedup.Store) -> None:
    adapter = store._adapter
    for row in adapter.models():
        places = joined(map(map_places, StoredModel(adapter, row).block_maps()))
        on_pages = [
            (row.id, *page) for page in pages_read(places, block_costs(store._pool, places))
        ]
        assert [tuple(page) for page in adapter.model_pages(row.id)] == on_pages


def changed(array: np.ndarray, rng: np.random.Generator, how: str) -> np.ndarray:
    """Change rows here and there, a little; or a run of them, or all of a run to something else."""
    new = array.copy()
    if how == "scattered":
        new[:: len(new) // 5] += 1
    else:
        new[: len(new) // 3] = rng.permuted(new[: len(new) // 3], axis=1)
    return new


@pytest.mark.parametrize("how", ["scattered", "together"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize(
    "policies",
    [
        (Lossless(), Lossless()),
        (Exact(), Exact()),
        (Lossless(), Exact()),
        (Exact(), Lossless()),
        (Bounded(0.01), Bounded(0.01)),
    ],
    ids=lambda both: "-".join(type(one).__name__ for one in both),
)
def test_of_what_a_new_version_takes_over(
    tmp_path: Path, policies: tuple[Policy, Policy], dtype: type, how: str
) -> None:
    """Blocks that did not change are not read, and yet it is known what they take."""
    rng = np.random.default_rng(0)
    url = f"sqlite:///{tmp_path}/store.db"
    # Blocks of unequal sizes: those at an edge, and those that save more by planes than others.
    first = {
        "w": (rng.standard_normal((3001, 200)) * 100).astype(dtype),
        "even": (rng.standard_normal((700, 256)) * 100).round().astype(dtype),
        "gone": np.arange(50_000).reshape(500, 100).astype(dtype),
    }
    second = {"w": changed(first["w"], rng, how), "even": first["even"], "new": first["w"][:99] * 2}
    third = second | {"even": changed(second["even"], rng, how)}
    with pydedup.open(url) as store:
        store.add("m@1", first, policy=policies[0])
    for number, arrays in ((2, second), (3, third)):
        with pydedup.open(url) as store:  # nothing is in memory
            store.add(f"m@{number}", arrays, policy=policies[1])
            assert_exact(store)
            assert store.verify().errors == []
    with pydedup.open(url) as store:
        used = [store.explain(f"m@{number}").used_bytes for number in (1, 2, 3)]
        assert [store.info(f"m@{number}").used_bytes for number in (1, 2, 3)] == used
        store.vacuum()
        assert_exact(store)
        assert [store.info(f"m@{number}").used_bytes for number in (1, 2, 3)] == used


def test_raw_pages_are_not_read_for_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    url = f"sqlite:///{tmp_path}/store.db"
    weights = rng.standard_normal((4000, 256)).astype(np.float32)
    with pydedup.open(url) as store:
        store.add("m@1", {"w": weights}, policy=Exact())
    with pydedup.open(url) as store:
        store.add("m@2", {"w": changed(weights, rng, "scattered")}, policy=Exact())
        assert store._pool.stats()["misses"] == 0
        assert_exact(store)
        assert store._pool.stats()["misses"] > 0


def test_pages_that_did_not_change_are_not_read_for_it(tmp_path: Path) -> None:
    """Their blocks are compressed, each by another amount, and only the sum is known."""
    rng = np.random.default_rng(3)
    url = f"sqlite:///{tmp_path}/store.db"
    weights = {f"w{n}": rng.standard_normal((500, 256)).round(n) for n in range(4)}
    with pydedup.open(url) as store:
        store.add("m@1", weights, policy=Lossless())
    with pydedup.open(url) as store:
        store.add("m@2", weights | {"new": np.ones(3, np.float32)}, policy=Lossless())
        assert store._pool.stats()["misses"] == 0
        assert_exact(store)


def test_of_a_block_that_another_model_has_of_the_same_page(tmp_path: Path) -> None:
    """A next version has as many blocks of the page as before, and not the same ones."""
    rng = np.random.default_rng(4)
    url = f"sqlite:///{tmp_path}/store.db"
    mine, other = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    other[::2, ::3] = 0  # takes less
    both = rng.standard_normal((128, 64)).astype(np.float32)
    with pydedup.open(url) as store:
        store.add_many(
            {"m": {"a": mine, "b": both}, "other": {"a": other, "b": both}}, policy=Lossless()
        )
        pages = [list(store._catalog.model(name).page_ids()) for name in ("m", "other")]
        assert pages[0] == pages[1]  # else this test is of nothing
    with pydedup.open(url) as store:
        store.add("m", {"a": other, "b": both}, policy=Lossless())
        assert_exact(store)


@pytest.mark.parametrize(
    "names",
    [("m", "part"), ("part", "m"), ("m", "new"), ("new", "m"), ("m", "part", "new")],
    ids="-".join,
)
def test_of_versions_added_together_that_share_blocks_of_a_page(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """None of them is read, and the sum that one knows says nothing of what another has of it."""
    rng = np.random.default_rng(2)
    url = f"sqlite:///{tmp_path}/store.db"
    table = rng.standard_normal((3001, 256)).astype(np.float32)
    table[::7, ::3] = 0  # blocks that take less than raw, each by another amount
    table[1000:1400] = (table[1000:1400] * 10).round()
    with pydedup.open(url) as store:
        store.add("m", {"w": table})
        store.add("part", {"w": table[:1280], "b": table[0]})
    models = {
        "m": {"w": np.concatenate([table[:2900], table[2900:] * 2])},
        "part": {"w": table[:1280], "b": table[0] + 1},
        "new": {"w": table[:640]},
    }
    with pydedup.open(url) as store:  # nothing is in memory
        store.add_many({name: models[name] for name in names})
        assert_exact(store)
        assert store.verify().ok
