# SPDX-License-Identifier: Apache-2.0
"""Who is asked what the blocks of a matrix may be near to, beside the similarity index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import MatrixView

__all__ = ["ByPosition", "ByTransposition", "GiveBlock", "Nobody"]

#: The block with that index among some, stacked alone.
GiveBlock: TypeAlias = Callable[[int], MatrixView]


class ByPosition(Protocol):
    """What gives candidates for the blocks of a matrix."""

    def __call__(self, numbers: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return references of k candidates for each of these n blocks, int64 (k, n).

        None of a delta; `NO_BASE` where there is none.
        """

    def note(self, helped: NDArray[np.bool_], /) -> None:
        """Say which of the candidates that were returned last were of help, bool (k, n)."""


class Nobody:
    """No candidates (a `ByPosition`)."""

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return none for each of these blocks."""
        return np.empty((0, len(numbers)), np.int64)

    def note(self, helped: NDArray[np.bool_]) -> None:
        """Take no notice."""


class ByTransposition(Protocol):
    """What gives bases to transpose for the blocks of a matrix (transposed.py)."""

    @property
    def is_likely(self) -> bool:
        """Whether another one of the same model is the transpose of something."""

    def __call__(self, numbers: NDArray[np.int64], block: GiveBlock, /) -> NDArray[np.int64]:
        """Return references for these blocks (n,), or `NO_BASE`; ``block`` gives what one holds."""
