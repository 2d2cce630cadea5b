# SPDX-License-Identifier: Apache-2.0
"""What lies beside the candidates of other blocks (`Similar`)."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pydedup.ingest.candidates import Candidates
from pydedup.ingest.pairs import Pairs
from pydedup.ingest.places import BlockReader, stacked
from pydedup.ingest.similar import Similar
from pydedup.types import DType


class Counting:
    """Of which the blocks beside one another have references that are."""

    def beside(self, references: NDArray[np.int64], steps: NDArray[np.int64]) -> Any:
        return references + steps


def test_beside_a_pair_that_cannot_be_measured() -> None:
    """An infinity that was pruned leaves a pair that is near, but at no distance."""
    rows = np.arange(2)
    bases = stacked(2, DType.F32, (32, 32))
    pairs = Pairs(rows, np.array([500, 900]), np.array([0.1, np.inf]), bases, rows)
    similar = Similar(cast(BlockReader, Counting()), cast(Candidates, None))
    found = similar._beside([pairs], np.arange(3))
    assert found.max(axis=0)[1:].tolist() == [501, 502]
