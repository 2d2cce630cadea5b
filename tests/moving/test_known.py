# SPDX-License-Identifier: Apache-2.0
"""What a copy remembers of where blocks are, from one model to the next."""

from __future__ import annotations

import numpy as np

from pydedup.layout import NO_PLACE, block_places
from pydedup.moving.known import Known, Whereabouts


def test_what_is_noted_again_is_there_once_and_the_newer_counts() -> None:
    """Models of a family note the blocks that they share, each of them."""
    places = block_places(np.repeat([7, 9], 3), np.tile(np.arange(3), 2))
    known = Known()
    for new, noted in enumerate((places, places[[0, 2, 3]], places[[2]]), 1):
        here = Whereabouts.nowhere(len(noted))
        here.places[:], here.costs[:] = noted + 1000 * new, new
        known.note(noted, here)
    found = known.look_up(places)
    assert found.costs.tolist() == [2, 1, 3, 2, 1, 1]
    assert (found.places == places + 1000 * found.costs).all()
    assert (found.bases == NO_PLACE).all()
    assert [len(noted) for noted, _ in known._pages.values()] == [3, 3]
    known.forget([7])
    assert known.look_up(places).places.tolist() == [NO_PLACE] * 3 + found.places[3:].tolist()
