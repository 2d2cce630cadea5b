# SPDX-License-Identifier: Apache-2.0
"""The numbered blocks of an add against a plain dict."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import block_place, split_place

# Few pages and slots, so that places come again; large ones, so that a page's room grows.
PLACE = st.tuples(
    st.one_of(st.integers(1, 4), st.sampled_from([10**6, 2**40])),
    st.one_of(st.integers(0, 5), st.sampled_from([63, 64, 65, 200, 5000])),
)
CALLS = st.lists(st.lists(PLACE, max_size=12), max_size=12)


@settings(max_examples=200)
@given(CALLS, st.data())
def test_it_is_a_dict_of_places(calls: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    table = StoredTable()
    number_of: dict[tuple[int, int], int] = {}
    costs: list[int] = []
    bases: list[int] = []
    for call, places in enumerate(calls):
        at = np.array([block_place(*place) for place in places], np.int64)
        guesses = np.arange(len(places)) + 100 * call
        references = table.references_at(at, guesses)
        for place, guess in zip(places, guesses.tolist(), strict=True):
            if place not in number_of:
                number_of[place] = len(number_of)
                costs.append(guess)
                bases.append(NO_BASE)
        assert references.tolist() == [-1 - number_of[place] for place in places]
        if places and data.draw(st.booleans()):
            changed, base = references[:1], data.draw(st.integers(0, 3))
            table.set_bases(changed, np.array([base]))
            table.set_costs(changed, 7)
            bases[-1 - int(changed[0])], costs[-1 - int(changed[0])] = base, 7
    every = np.array([-1 - number for number in number_of.values()], np.int64)
    assert list(map(split_place, table.places(every).tolist())) == list(number_of)
    assert table.costs_of(every).tolist() == costs
    assert table.bases_of(every).tolist() == bases
