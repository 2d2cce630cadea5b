# SPDX-License-Identifier: Apache-2.0
"""How the rows of distinct blocks come into a store: together, in the order of their hashes.

Each transaction of pages brought its own, at places all over the index of hashes: 14 GiB were
written for a model of 128 MiB in half a million blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.adapter import Adapter
from pydedup.ingest import write
from pydedup.ingest.pages import PageWriter
from pydedup.ingest.write import Stager
from pydedup.policies import Bounded, Exact

Row = tuple[bytes, int, int, int | None]


@pytest.fixture
def written(store: pydedup.Store, monkeypatch: pytest.MonkeyPatch) -> list[list[Row]]:
    """Rows of blocks that were written in one go, each time."""
    goes: list[list[Row]] = []
    kind = type(store._adapter)
    insert = kind.insert_blocks

    def recorded(self: Adapter, rows: Iterable[Row]) -> None:
        goes.append(list(rows))
        insert(self, goes[-1])

    monkeypatch.setattr(kind, "insert_blocks", recorded)
    return goes


@pytest.mark.usefixtures("small_pages")
def test_adds_copies_and_repacks_write_rows_by_hash(
    store: pydedup.Store, tmp_path: Path, written: list[list[Row]]
) -> None:
    rng = np.random.default_rng(1)
    models = {name: {"w": rng.standard_normal((1024, 1024), np.float32)} for name in "abcd"}
    store.add_many(models, policy=Exact())
    near = {name: {"w": m["w"] * np.float32(1.01)} for name, m in models.items()}
    near["a"]["w"][:, ::2] = rng.standard_normal((1024, 512), np.float32)
    store.add_many({f"{name}-near": model for name, model in near.items()}, policy=Bounded(0.003))
    store.copy_to(f"sqlite:///{tmp_path / 'copy.db'}", ["a", "b"])
    for name in "acd":
        store.remove(name)
    assert store.vacuum().repacked_pages
    # Of two adds, of two models that were copied, and of the vacuum: 1,024 blocks are 64 pages at
    # least, in four transactions.
    assert [len(rows) for rows in written[:4]] == [1024, 1024, 256, 256]
    assert len(written) == 5
    for rows in written:
        hashes = [row[0] for row in rows]
        assert hashes == sorted(hashes)
        pages = [row[1] for row in rows]
        assert pages != sorted(pages)
    assert {row[3] is None for row in written[1]} == {True, False}, "deltas are among them"
    assert store.verify().ok


@pytest.mark.usefixtures("small_pages")
def test_an_add_that_a_vacuum_took_for_abandoned_leaves_nothing_and_begins_again(
    store: pydedup.Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept for long; rows that it wrote after that stayed when it was killed then."""
    write_pages, vacuumed = PageWriter.write, []

    def slept(self: PageWriter) -> None:
        write_pages(self)
        if not vacuumed:
            with pydedup.open(url) as other:
                vacuumed.append(other.vacuum(lease_seconds=0).abandoned_adds)

    monkeypatch.setattr(PageWriter, "write", slept)
    monkeypatch.setattr(Stager, "discard", lambda self: None)  # as if it were killed
    w = np.random.default_rng(2).standard_normal((1024, 1024), np.float32)
    store.add("m", {"w": w}, policy=Exact())
    assert vacuumed == [1]
    store.vacuum(lease_seconds=0)
    report = store.verify()
    assert (report.errors, report.notes, report.models) == ([], [], 1)
    assert np.array_equal(store.load("m")["w"], w)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("side", "batches"), [(32, 1), (1024, 8)])
def test_who_watches_an_add_is_told_of_the_rows(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch, side: int, batches: int
) -> None:
    """A bar stood at all bytes written, for ten seconds of a million blocks."""
    blocks = (side // 8) ** 2
    monkeypatch.setattr(write, "_BYTES_PER_TRANSACTION", write._ROW_BYTES * blocks // batches)
    told: list[tuple[str, int, int]] = []
    w = np.random.default_rng(2).standard_normal((side, side), np.float32)
    store.add(
        "m", {"w": w}, policy=Exact(), block_shape=(8, 8), progress=lambda *now: told.append(now)
    )
    recorded = [(done, total) for stage, done, total in told if stage == "recording blocks"]
    assert recorded == sorted(recorded)
    assert recorded[-1] == (blocks, blocks)
    assert {total for _, total in recorded} == {blocks}
    assert len({done for done, _ in recorded}) == (batches if batches == 1 else batches + 1)
    assert np.array_equal(store.load("m")["w"], w)
