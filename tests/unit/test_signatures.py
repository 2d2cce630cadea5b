# SPDX-License-Identifier: Apache-2.0
"""The segments of the similarity index, as they are read from their table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.signatures import read_segments


def test_segments_are_read_as_they_were_written(tmp_path: Path) -> None:
    """What a segment covers says nothing of the one before or behind it, which may be anything."""
    written = {1: [3, 40, 41], 3: [2], 4: [], 5: [1, 2**62], 9: [7]}
    damaged = {
        0: b"",
        2: bytes(12),
        6: np.array([1, 8, 8], "<i8").tobytes(),
        7: np.array([0, 5, 6, 4], "<i8").tobytes(),
        8: np.array([-1, 5], "<i8").tobytes(),
        10: np.array([1 << 20, 5], "<i8").tobytes(),
    }
    rows = {n: np.array([n % 3, *pages], "<i8").tobytes() for n, pages in written.items()} | damaged
    with pydedup.open(tmp_path / "a.db") as store:
        adapter = store._adapter
        assert read_segments(adapter) == []
        with adapter.transaction():
            adapter.insert_signatures((n << 20, 0, payload) for n, payload in rows.items())
        found = {one.rows[0] >> 20: one for one in read_segments(adapter)}
    assert {n: one.page_ids.tolist() for n, one in found.items()} == written
    assert all(len(one.rows) == 1 + n % 3 for n, one in found.items())
    assert all(one.page_ids.dtype == np.int64 for one in found.values())


@pytest.mark.parametrize("first", [-(2**63), 2**63 - 8])
def test_numbers_of_rows_stay_within_their_column(tmp_path: Path, first: int) -> None:
    """A damaged one leads to no number that a database cannot be asked about."""
    with pydedup.open(tmp_path / "a.db") as store:
        adapter = store._adapter
        with adapter.transaction():
            adapter.insert_signatures([(first, 0, np.array([9, 1], "<i8").tobytes())])
        assert all(max(one.rows) < 2**63 for one in read_segments(adapter))
