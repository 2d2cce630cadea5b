# SPDX-License-Identifier: Apache-2.0
"""Which models of the same add give candidates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from pydedup.formats.base import TensorEntry
from pydedup.ingest.aligned import Aligned
from pydedup.policies import Lossless
from pydedup.types import DType


class CountedGrid:
    """A grid that counts how often it is compared."""

    compared = 0
    block_shape = 64, 64

    def __eq__(self, other: object) -> bool:
        CountedGrid.compared += 1
        return True

    def __hash__(self) -> int:
        return hash(self.block_shape)


def test_of_many_models_in_one_add_the_newest_are_looked_at() -> None:
    """Each looked at all before it: of 1,500 models a million comparisons, for two candidates."""
    nobody: Any = None
    reader: Any = SimpleNamespace(plain=lambda chosen: chosen)
    store: Any = SimpleNamespace(newest=list)  # has none
    aligned, grid = Aligned(store, nobody, reader), CountedGrid()
    entry = TensorEntry("w", DType.F32, (64, 64), "w")
    for number in range(500):
        other = SimpleNamespace(name=f"m{number}", address=f"m{number}@v1")
        aligned.note(other, entry, grid, np.array([number]))  # type: ignore[arg-type]
    last = SimpleNamespace(name="m", address="m@v1", policy=Lossless())
    found = aligned.neighbours(last, entry, grid)  # type: ignore[arg-type]
    assert found(np.array([0])).tolist() == [[499], [498]]
    assert CountedGrid.compared == 2
