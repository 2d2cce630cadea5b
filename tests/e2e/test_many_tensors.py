# SPDX-License-Identifier: Apache-2.0
"""Models of many small tensors, which are matched together (pydedup/ingest/tensors.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.policies import Bounded, Exact, Lossless, Policy

Model = dict[str, NDArray[np.generic]]


def model(seed: int = 0) -> Model:
    """Return 400 tensors of all kinds of shapes and dtypes; many of the same kind."""
    rng = np.random.default_rng(seed)
    arrays: Model = {}
    for i in range(80):
        arrays[f"{i}.weight"] = rng.standard_normal((40 + i % 3, 48), np.float32)
        arrays[f"{i}.bias"] = np.zeros(48, np.float32)
        arrays[f"{i}.scale"] = np.ones(48, np.float32)
        arrays[f"{i}.count"] = np.array(i, np.int64)
        arrays[f"{i}.half"] = rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16)
    arrays["empty"] = np.empty((0, 7), np.float32)
    arrays["ragged"] = rng.standard_normal((150, 130), np.float32)
    arrays["large"] = rng.standard_normal((300, 300), np.float32)
    arrays["mask"] = rng.integers(0, 2, (33, 9)).astype(bool)
    return arrays


def same(got: Model, expected: Model) -> bool:
    return list(got) == list(expected) and all(
        got[name].dtype == array.dtype
        and got[name].shape == array.shape
        and got[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


@pytest.mark.parametrize("policy", [Exact(), Lossless()])
def test_all_come_back_in_order_and_equal_ones_are_stored_once(
    store: pydedup.Store, policy: Policy
) -> None:
    arrays = model()
    report = store.add("m", arrays, policy=policy)
    assert same(store.load("m"), arrays)
    # All 80 biases are one block, and so are all scales.
    assert report.shared_blocks >= 2 * 79
    assert report.logical_bytes == sum(array.nbytes for array in arrays.values())
    assert store.verify().ok


def test_tied_tensors_may_wait_or_be_matched_already(store: pydedup.Store) -> None:
    small = np.random.default_rng(1).standard_normal((20, 48)).astype(np.float32)
    large = np.random.default_rng(2).standard_normal((300, 300)).astype(np.float32)
    arrays: Model = {"a": small, "b": small, "x": large, "y": large, "z": small}
    report = store.add("m", arrays)
    assert same(store.load("m"), arrays)
    assert report.stored_bytes < small.nbytes + large.nbytes + 1000


def test_a_new_version_shares_what_did_not_change(store: pydedup.Store) -> None:
    first = model()
    store.add("m", first)
    second = dict(first)
    second["7.weight"] = first["7.weight"] + np.float32(1)
    second["ragged"] = first["ragged"].copy()
    second["ragged"][149, 129] = 5  # in the last, smallest block
    report = store.add("m", second)
    assert same(store.load("m"), second)
    assert same(store.load("m@1"), first)
    assert report.blocks - report.shared_blocks <= 2
    assert store.verify().ok


def moved_by_one_percent(base: Model, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return {
        name: array + np.float32(0.01) * rng.standard_normal(array.shape, np.float32)
        if name.endswith("weight")
        else array
        for name, array in base.items()
    }


def test_a_relative_becomes_deltas_at_the_same_places(store: pydedup.Store) -> None:
    base = model()
    store.add("base", base)
    moved = moved_by_one_percent(base, 9)
    report = store.add("moved", moved)
    assert same(store.load("moved"), moved)
    assert report.delta_blocks == 80


def test_each_tensor_keeps_its_own_error(store: pydedup.Store) -> None:
    base = model()
    store.add("base", base)
    moved = moved_by_one_percent(base, 10)
    report = store.add("bounded", moved, policy=Bounded(0.05))
    assert report.stored_bytes == 0  # all are within the bound of what is stored
    explained = _explained(store, "bounded")
    for name, array in store.load("bounded").items():
        if not name.endswith("weight"):
            assert array.tobytes() == moved[name].tobytes()
            assert explained[name].largest_error == 0
            continue
        away = np.linalg.norm(array - moved[name]) / np.linalg.norm(moved[name])
        assert 0 < away <= 0.05
        assert explained[name].largest_error == pytest.approx(away, rel=1e-3)


def _explained(store: pydedup.Store, name: str) -> dict[str, pydedup.report.compare.TensorSharing]:
    return {sharing.tensor.name: sharing for sharing in store.explain(name).tensors}


def test_source_hashes_are_read_once(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of more blocks than are asked for at once were read twice: for the digest of all."""
    monkeypatch.setattr("pydedup.catalog.model._HASHES_PER_READ", 32)
    with pydedup.open(store_url) as store:
        store.add("m", model())
        adapter, read = store._adapter, list[int]()
        source_hashes = adapter.source_hashes

        def noting(model_id: int, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
            read.extend(range(first, stop))
            return source_hashes(model_id, first, stop)

        monkeypatch.setattr(adapter, "source_hashes", noting)
        for use in (
            store.verify,
            lambda: store.copy_to(tmp_path / "copy.db"),
            lambda: store.add("m", model()),
        ):
            read.clear()
            use()
            assert read == list(range(len(model())))
