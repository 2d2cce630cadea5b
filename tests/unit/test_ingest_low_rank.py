# SPDX-License-Identifier: Apache-2.0
"""How often it is looked for adapters in models that have none, and what ends that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.ingest import differences
from pydedup.ingest.factors import Difference

TENSORS = 10
LARGE, SMALL, TALL = (384, 192), (128, 96), (4096, 512)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What came of each look."""
    found: list[bool] = []
    seems = differences.seems_low_rank

    def noted(sample: Difference, error: float, *, twice: bool = False) -> bool:
        found.append(seems(sample, error, twice=twice))
        return found[-1]

    monkeypatch.setattr(differences, "seems_low_rank", noted)
    return found


def drawn(shape: tuple[int, int], tensors: int = TENSORS) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(71)
    return {f"l{i}": rng.normal(0, 0.02, shape).astype(np.float32) for i in range(tensors)}


def trained(weight: NDArray[Any], seed: int, rank: int | None = None) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    by = rng.normal(0, 2e-4, weight.shape)
    if rank is not None:
        by = rng.normal(0, 2e-4, (len(weight), rank)) @ rng.normal(size=(rank, weight.shape[1]))
    return (weight + by).astype(np.float32)


@pytest.mark.parametrize(("shape", "most"), [(LARGE, 6), (SMALL, 4)], ids=str)
def test_of_a_model_that_was_trained_whole_few_tensors_are_looked_at(
    tmp_path: Path, looks: list[bool], shape: tuple[int, int], most: int
) -> None:
    base = drawn(shape)
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", base)
        store.add("m", {key: trained(w, 72 + i) for i, (key, w) in enumerate(base.items())})
    assert looks == [False] * most


def test_of_a_large_tensor_few_parts_are_looked_at(tmp_path: Path, looks: list[bool]) -> None:
    base = drawn(TALL, tensors=1)
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", base)
        store.add("m", {"l0": trained(base["l0"], 73)})
    assert looks == [False, False]


def test_of_a_large_tensor_that_was_exported_few_parts_are_looked_at(
    tmp_path: Path, looks: list[bool]
) -> None:
    """The other way round as well, once the export of something else is there under its name."""
    base = drawn(TALL[::-1], tensors=1)["l0"]
    exports = [{"MatMul_1": np.ascontiguousarray(trained(base, i).T)} for i in (75, 76, 77)]
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", {"l0": base})
        for number, export in enumerate(exports):
            looks.clear()
            store.add(f"m{number}", export)
            assert len(looks) <= 2 + 2 + 4  # each way; and whether it had better be a base
    assert not any(looks)


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=str)
def test_an_adapter_behind_tensors_that_were_trained_whole_is_found(
    tmp_path: Path, looks: list[bool], shape: tuple[int, int]
) -> None:
    base = drawn(shape)
    model = {
        key: trained(weight, 74 + i, None if i < 3 else 2)
        for i, (key, weight) in enumerate(base.items())
    }
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", base)
        report = store.add("m", model)
    assert looks[:4] == [False] * 3 + [True]
    assert report.stored_bytes < (0.3 * 0.7 + 0.7 * 0.1) * report.logical_bytes
