# SPDX-License-Identifier: Apache-2.0
"""The segments of the similarity index, as they are read from their table."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import CorruptStoreError
from pydedup.signatures import group_of, load_piece, new_index, read_segments, segment_rows
from pydedup.similarity import L2LSH
from pydedup.types import DType


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


def test_a_piece_of_integers_is_taken_for_one_of_floats_by_nobody() -> None:
    """An older pydedup copies what it can read into the index of its dtype."""
    kind = DType.I8, 32, 32
    index = new_index(kind)
    index.add(np.ones((1, 32, 32), np.float32), [7])
    (_, group, payload), _ = segment_rows(1, [1], [(kind, index)])
    assert group == group_of(kind)
    with pytest.raises(CorruptStoreError):
        L2LSH.load(payload)
    read, loaded = load_piece(group, payload)
    assert (read, loaded.save()) == (kind, index.save())


@pytest.mark.parametrize(
    "group",
    [99 << 56, 0, group_of((DType.F32, 32, 16)), group_of((DType.F64, 32, 32)), (9 << 56) + 3],
)
def test_a_piece_of_another_group_is_damaged(group: int) -> None:
    index = new_index((DType.F32, 32, 32))
    index.add(np.ones((1, 32, 32), np.float32), [7])
    for payload in (index.save(), b"PDLN" + index.save()):
        with pytest.raises(CorruptStoreError):
            load_piece(group, payload)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_signatures_of_integers_are_those_of_their_differences_to_the_mean(
    tmp_path: Path, dtype: type[np.integer[Any]]
) -> None:
    """A second form of what docs/format.md says."""
    span = np.iinfo(dtype)
    block = np.random.default_rng(3).integers(span.min // 2, span.max // 3, (32, 32), dtype)
    mean = float(Fraction(sum(block.ravel().tolist()), block.size))
    if block.itemsize < 4:
        numbers = block.astype(np.float32) - np.float32(mean)
    else:
        numbers = (block.astype(np.float64) - mean).astype(np.float32)
    with pydedup.open(tmp_path / "a.db") as store:
        store.add("m", {"w": block})
        kind = DType.of(np.dtype(dtype)), 32, 32
        ((_, payload),) = store._adapter.signatures(group_of(kind))
    want = L2LSH((32, 32), np.float32)
    want.add(numbers[None], load_piece(group_of(kind), payload)[1].ids)
    assert payload == b"PDLN" + want.save()
