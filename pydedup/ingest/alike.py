# SPDX-License-Identifier: Apache-2.0
"""Tensors of one model that have one shape and are cut alike, asked about one place together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pydedup.layout import joined

__all__ = ["Alike", "Find"]

#: References at the places of some blocks: of what the deltas among them are of, or of these too.
Find: TypeAlias = Callable[[NDArray[np.int64], bool], NDArray[np.int64]]


class Alike:
    """Such tensors: what each is called, and what finds its blocks. More may be added."""

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Find]] = []
        # By the number of a block: that of all tensors there were when somebody asked. Of a mixture
        # of experts there may be thousands, each of which is looked for among all others.
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, which: int) -> tuple[str, Find]:
        return self._tensors[which]

    def add(self, name: str, find: Find) -> None:
        """Add a tensor."""
        self._tensors.append((name, find))

    def blocks(self, number: int) -> NDArray[np.int64]:
        """Return references of what each tensor has at that block, or of its base, int64 (n,)."""
        known = self._blocks.get(number, np.empty(0, np.int64))
        if len(known) < len(self._tensors):
            at = np.array([number], np.int64)
            known = joined([known, *(find(at, False) for _, find in self._tensors[len(known) :])])
            self._blocks[number] = known
        return known
