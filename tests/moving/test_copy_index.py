# SPDX-License-Identifier: Apache-2.0
"""The similarity index of a copy: what the source has indexed comes along, and is found there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.adapter import LIVE
from pydedup.ingest.candidates import Candidates
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import split_places
from pydedup.maintenance import orphans
from pydedup.moving.signatures import SourceIndex
from pydedup.signatures import Segment
from pydedup.store import Store
from pydedup.types import DType

from .test_copy import checksums

New = Callable[[str], str]


def segments(store: Store) -> set[tuple[bytes, int]]:
    """What a store has indexed: per page that is covered its checksum, and how much of it."""
    candidates = Candidates(store._adapter, store._pool, StoredTable())
    index = candidates._index((DType.F32, 64, 64))
    page_ids = split_places(index.ids)[0].tolist()
    assert not set(page_ids).intersection(candidates._uncovered)
    sums = {row.id: row.checksum for row in store._adapter.page_rows(state=LIVE)}
    return set(Counter(sums[page_id] for page_id in page_ids).items())


@pytest.mark.parametrize("has_others", [False, True])  # then no page goes as it is
def test_what_the_source_has_not_indexed_is_found_there_nevertheless(
    has_others: bool, new_store: New
) -> None:
    """Of a model with what is indexed and what is not, as under a policy without deltas."""
    rng = np.random.default_rng(0)
    indexed, other = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    url = new_store("sqlite")
    if has_others:
        with pydedup.open(url) as target:
            target.add("others", {"w": rng.standard_normal((64, 64)).astype(np.float32)})
    with pydedup.open(new_store("sqlite")) as store:
        store.add("indexed", {"w": indexed})
        store.add("m", {"v": indexed, "w": other}, policy=policies.Exact())
        assert store.copy_to(url, "m").copied == 1
    near = other * (1 + 1e-4 * rng.standard_normal(other.shape)).astype(np.float32)
    with pydedup.open(url) as target:
        report = target.add("near", {"u": near})  # of another name, so not found by its place
        assert report.delta_blocks == report.blocks


@pytest.mark.parametrize("vacuumed", [False, True])
def test_the_similarity_index_comes_along(
    new_store: New,
    family: Callable[..., Any],
    assert_same: Callable[..., None],
    vacuumed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orphans, "_LEAST_OF_BLOCKS", 1.0)  # the vacuum is to move bases, too
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        for number in range(6):
            store.add(f"m{number}", family(number, root=number // 2))
        if vacuumed:
            for number in (0, 2, 4):  # what others were near to
                store.remove(f"m{number}")
            assert store.vacuum().repacked_pages > 0
            store.add("m6", family(6))  # indexes all that the vacuum wrote
        store.copy_to(url)
        wanted = segments(store)
    assert_same(source_url, url)
    assert checksums(url) == checksums(source_url), "pages that a vacuum wrote go whole as well"
    with pydedup.open(url) as store:
        assert segments(store) == wanted
        assert len(wanted) > 1
        found = store.add("new", family(8))
    with pydedup.open(source_url) as store:
        expected = store.add("new", family(8))
    assert found.delta_blocks == expected.delta_blocks > 12
    assert found.stored_bytes == pytest.approx(expected.stored_bytes, rel=0.02)


def test_segments_are_found_by_their_pages() -> None:
    """Each model asks for its own; a store of thousands has as many."""
    rng = np.random.default_rng(0)
    pages = [np.unique(rng.integers(1, 60, size)) for size in (5, 0, 1, 9, 3)]
    segments = [Segment(range(10 * n, 10 * n + 2), ids) for n, ids in enumerate(pages)]
    index = SourceIndex(segments)
    for asked in ([], [7], range(20, 40), range(100)):
        found = index.about(np.array(asked, np.int64))
        wanted = [one for one in segments if np.isin(one.page_ids, asked).any()]
        assert [one.rows for one in found] == [one.rows for one in wanted]
    assert SourceIndex([]).about(np.array([1])) == []
