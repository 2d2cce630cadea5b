# SPDX-License-Identifier: Apache-2.0
"""How often a model is looked for transposed that is the transpose of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.ingest import transposed


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each block that was looked for."""
    found: list[int] = []
    hash_view = transposed.hash_view

    def noted(*args: Any) -> Any:
        found.append(len(found))
        return hash_view(*args)

    monkeypatch.setattr(transposed, "hash_view", noted)
    return found


@pytest.mark.parametrize(("shapes", "most"), [(1, 6), (10, 16)])
def test_few_matrices_of_each_shape_and_of_all_are_looked_for(
    tmp_path: Path, looks: list[int], shapes: int, most: int
) -> None:
    sides = [(64, 128 + 64 * i) for i in range(shapes)]

    def drawn(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        of = {f"l{i}": side for i, side in enumerate(sides * 8)}
        return {name: rng.normal(0, 0.02, side).astype(np.float32) for name, side in of.items()}

    with pydedup.open(tmp_path / "store.db") as store:
        store.add("base", {name: weight.T.copy() for name, weight in drawn(120).items()})
        looks.clear()
        store.add("m", drawn(121))
    assert len(looks) == most
