# SPDX-License-Identifier: Apache-2.0
"""Sets of whole numbers: ids, places, references, a million of them at a time; lists in parts.

numpy's own hash since 2.3: of a million different numbers `numpy.unique` takes 40 times as long as
sorting them does, and `numpy.isin` and the functions of sets are made of it. Where counts or places
are asked for, it sorts, and is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["common", "distinct", "find_among", "in_parts", "is_among", "union", "without"]

_T = TypeVar("_T", bound=np.generic)


class _Long(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


_List = TypeVar("_List", bound=_Long)


def in_parts(values: _List, size: int) -> Iterator[_List]:
    """Yield so many of the values at a time, in their order, and then what is left."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def distinct(values: NDArray[_T]) -> NDArray[_T]:
    """Return the different ones among numbers of any shape, ascending, (n,)."""
    ordered = np.sort(values, axis=None)
    is_new = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return ordered[is_new]


def find_among(
    ascending: NDArray[Any], values: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where each of these numbers is among ascending ones, and whether it is there at all.

    Both in the shape of ``values``.
    """
    if not len(ascending):
        return np.zeros(values.shape, np.int64), np.zeros(values.shape, np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return at, ascending[at] == values


def is_among(values: NDArray[Any], others: ArrayLike) -> NDArray[np.bool_]:
    """Return which of these numbers are among others, in the shape of ``values``."""
    return find_among(distinct(np.asarray(others)), values)[1]


def common(one: NDArray[_T], other: NDArray[_T]) -> NDArray[_T]:
    """Return what is in both, ascending."""
    mine = distinct(one)
    return mine[is_among(mine, other)]


def without(one: NDArray[_T], other: NDArray[_T]) -> NDArray[_T]:
    """Return what is in the one and not in the other, ascending."""
    mine = distinct(one)
    return mine[~is_among(mine, other)]


def union(one: NDArray[_T], other: NDArray[_T]) -> NDArray[_T]:
    """Return what is in either, ascending."""
    return distinct(np.concatenate([one, other]))
