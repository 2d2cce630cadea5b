# SPDX-License-Identifier: Apache-2.0
"""Tensors by name, which others may have under another prefix.

A wrapper puts ``module.`` before all names and its removal takes it away, a head on top puts
``bert.`` there; what a tensor holds tells then whether it is the one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["ByName", "prefixes"]

#: Of so many parts a prefix may be: a name may have 500, and each end of it would be kept.
_MOST_PARTS = 8

_Value = TypeVar("_Value")


class ByName(Generic[_Value]):
    """Something for each of some names."""

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}
        # By the end of a name, behind one of its first dots; None where several names end so.
        self._ends: dict[str, _Value | None] | None = None

    def __setitem__(self, name: str, value: _Value) -> None:
        self._values[name] = value
        self._ends = None

    def values(self) -> Iterable[_Value]:
        """Return all there is, in the order in which it was set first."""
        return self._values.values()

    def get(self, name: str) -> _Value | None:
        """Return what has that name, else the only one whose name has the longest common end."""
        value = self._values.get(name)
        if value is not None:
            return value
        if self._ends is None:
            self._ends = {}
            for full, other in self._values.items():
                for end in _ends(full):
                    self._ends[end] = None if end in self._ends else other
        ends = self._ends
        return next((ends[end] for end in _ends(name) if end in ends), None)


def prefixes(name: str, other: str) -> tuple[str, str]:
    """Return what each of two names has before the parts at their ends that are the same."""
    mine, its = name.split("."), other.split(".")
    while mine and its and mine[-1] == its[-1]:
        mine.pop()
        its.pop()
    return ".".join(mine), ".".join(its)


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what is behind each of its first dots."""
    for _ in range(_MOST_PARTS + 1):
        if not name:
            return
        yield name
        name = name.partition(".")[2]
