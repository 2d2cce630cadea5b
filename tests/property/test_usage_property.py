# SPDX-License-Identifier: Apache-2.0
"""Bytes by group against the same on Python sets, whatever who uses of which page."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup.layout import block_places, pages_read
from pydedup.usage import Readers, bytes_by_group, marginal_bytes

#: (page, slot) of what a model uses; slots beyond those used most make tables grow.
blocks = st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 3, 4, 5, 40]))
uses = st.lists(st.tuples(st.integers(0, 3), st.lists(blocks, max_size=20)), max_size=7)


def cost_of(place: int) -> int:
    """What a block takes: blocks of a page differ, and some sums of them are equal."""
    return 96 + 64 * (place * 7 % 3)


def costs(places: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array([cost_of(place) for place in places.tolist()], np.int64)


@settings(max_examples=300)
@given(uses=uses)
def test_bytes_are_those_of_sets(uses: list[tuple[int, list[tuple[int, int]]]]) -> None:
    groups = np.array([group for group, _ in uses], np.int64)
    places = [
        block_places(np.array([p for p, _ in b], np.int64), np.array([s for _, s in b], np.int64))
        for _, b in uses
    ]
    rows = [
        (number, *row)
        for number, used in enumerate(places)
        for row in pages_read(used, costs(used))
    ]
    asked: list[int] = []

    def counted(some: NDArray[np.int64]) -> NDArray[np.int64]:
        asked.extend(some.tolist())
        return costs(some)

    readers = Readers(np.array(rows, np.int64).reshape(-1, 4), lambda n: places[n], counted)
    used, marginal, shared = bytes_by_group(readers, groups, 4)
    sets = [
        {
            place
            for of, some in zip(groups, places, strict=True)
            if of == group
            for place in some.tolist()
        }
        for group in range(4)
    ]
    for group, mine in enumerate(sets):
        others = set[int]().union(*(s for i, s in enumerate(sets) if i != group))
        alone = sum(map(cost_of, mine - others))
        assert used[group] == sum(map(cost_of, mine))
        assert marginal[group] == alone
        assert marginal_bytes(readers, groups == group) == alone
    assert shared + marginal.sum() == sum(map(cost_of, set[int]().union(*sets)))
    pages = {}
    for number, page, _, _ in rows:
        pages.setdefault(page, set()).add(number)
    assert all(len(pages[place >> 20]) > 1 for place in asked), "a page of one reader was read"
