# SPDX-License-Identifier: Apache-2.0
"""How many relatives, and for how many tensors, are asked whether blocks had better be bases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.blocks import BlockGrid
from pydedup.ingest import families
from pydedup.ingest.differences import sample_of
from pydedup.types import DType

TENSORS = 5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of blocks that deltas were measured on."""
    found: list[int] = []
    measure = families._Probe._measured

    def counted(
        self: Any, given: Sequence[NDArray[np.int64]], dtype: DType, *how: bool
    ) -> list[float]:
        found.extend(len(references) for references in given)
        return measure(self, given, dtype, *how)

    monkeypatch.setattr(families._Probe, "_measured", counted)
    return found


def trained(base: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {name: w + rng.normal(0, 2e-4, w.shape).astype(np.float32) for name, w in base.items()}


def test_a_family_of_fine_tunes_is_not_asked_for_long(tmp_path: Path, measured: list[int]) -> None:
    rng = np.random.default_rng(61)
    base = {f"l{i}": rng.normal(0, 0.02, (384, 192)).astype(np.float32) for i in range(TENSORS)}
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", base)
        store.add("t0", trained(base, 62))
        assert not measured  # there are no deltas yet
        for number in range(1, 12):
            store.add(f"t{number}", trained(base, 62 + number))
        measured.clear()
        report = store.add("last", trained(base, 90))
    assert report.delta_blocks == report.blocks
    # Of two tensors: their common base, and the newest relatives, fewer the smaller these are.
    assert len(measured) == 2 * (1 + 4)
    assert max(measured) <= 8


def test_a_family_of_small_models_is_asked_as_little(tmp_path: Path, measured: list[int]) -> None:
    rng = np.random.default_rng(64)
    base = {f"l{i}": rng.normal(0, 0.02, (96, 128)).astype(np.float32) for i in range(TENSORS)}
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", base)
        for number in range(12):
            store.add(f"t{number}", trained(base, 62 + number))
        measured.clear()
        little = base["l4"].copy()
        little[-1, -1] += 1
        store.add("frozen", base | {"l4": little})
        assert not measured  # too little is new
        store.add("last", trained(base, 90))
    # Of the two shapes of blocks: their base, and the newest relatives.
    assert len(measured) <= 2 * (1 + 3)
    assert max(measured) <= 4


def test_strangers_are_not_asked(tmp_path: Path, measured: list[int]) -> None:
    rng = np.random.default_rng(63)
    with pydedup.open(tmp_path / "store.db") as store:
        for number in range(4):
            model = {"w": rng.normal(0, 0.02, (384, 192)).astype(np.float32)}
            store.add(f"m{number}", model)
    assert not measured


@pytest.mark.parametrize(
    ("rows", "sample"),
    [(range(9), [4, 5]), ([0, 8], [8]), ([0, 1, 8], [0, 1]), ([2, 4, 5, 7, 8], [7, 8]), ([], [])],
    ids=str,
)
def test_rows_of_a_sample_follow_one_another(rows: Sequence[int], sample: Sequence[int]) -> None:
    """Else all of the matrix that lies between two of them would be in memory."""
    grid = BlockGrid(rows=9 * 64, cols=5 * 64, block_rows=64, block_cols=64)
    given = np.zeros((9, 5), np.bool_)
    given[list(rows), :4] = True
    expected = [5 * row + col for row in sample for col in range(4)]
    assert sample_of(grid, given.ravel()).tolist() == expected


@pytest.mark.parametrize(
    ("edges", "sample"), [([0, 9], [4, 5]), ([0, 5, 9], [3, 4]), (range(10), [4])], ids=str
)
def test_rows_of_a_sample_are_of_one_matrix(edges: Sequence[int], sample: Sequence[int]) -> None:
    grid = BlockGrid(rows=9 * 64, cols=64, block_rows=64, block_cols=64)
    given = np.ones(9, np.bool_)
    assert sample_of(grid, given, np.array(edges)).tolist() == list(sample)
