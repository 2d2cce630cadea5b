# SPDX-License-Identifier: Apache-2.0
"""Blocks by their hash, which several may have: as met in an add, and among those that are new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByHash", "leaders_of"]


class ByHash:
    """References of blocks by hash, in an order.

    There are several of one hash only where hashes collide, or the same bytes exist under two
    dtypes. So most need no list, of which Python's garbage collector would visit each again and
    again.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._others: dict[bytes, list[int]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._first

    def get(self, key: bytes, number: int) -> int | None:
        """Return the reference with this hash and number, if there is one."""
        if number == 0:
            return self._first.get(key)
        others = self._others.get(key, ())
        return others[number - 1] if number <= len(others) else None

    def add(self, key: bytes, reference: int, *, first: bool = False) -> None:
        """Add a reference after, or ``first`` before, those that are there; one of them: not."""
        known = self._first.setdefault(key, reference)
        if known == reference:
            return
        others = self._others.setdefault(key, [])
        if reference in others:
            return
        if first:
            self._first[key], reference = reference, known
        others.insert(0 if first else len(others), reference)


def leaders_of(
    fresh: Mapping[bytes, Sequence[int]], block: Callable[[int], NDArray[Any]]
) -> dict[int, int]:
    """Return of blocks by hash the first that has the same shape and bytes, by number."""
    leader_of: dict[int, int] = {}
    for blocks in fresh.values():
        leaders: list[int] = []
        for i in blocks:
            leader = next((one for one in leaders if np.array_equal(block(one), block(i))), None)
            if leader is None:
                leaders.append(i)
                leader = i
            leader_of[i] = leader
    return leader_of
