# SPDX-License-Identifier: Apache-2.0
"""What adds of one open store keep, of its similarity index and of the models that they compared
with: as right as what is read anew.

Two stores get the same models in the same order, one from stores that stay open, the other from
stores that are opened for each step: what is stored must be the same, byte by byte.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.adapter import LIVE
from pydedup.errors import PydedupError
from pydedup.ingest.stored_index import KeptIndex, StoredIndex
from pydedup.ingest.stored_models import NEWEST
from pydedup.signatures import read_segments
from pydedup.testing.faults import Fault, inject

Model = dict[str, NDArray[Any]]
Step = Callable[[pydedup.Store], object]

TABLES = ("pages", "signatures", "block_maps", "distinct_blocks", "model_pages", "tensors")


def base(seed: int, rows: int = 192) -> Model:
    """Return the weights of a model that is related to none of another seed."""
    rng = np.random.default_rng(seed)
    return {
        f"{seed}.w": rng.standard_normal((rows, 128)).astype(np.float32),
        f"{seed}.v": rng.standard_normal((96, 160)).astype(np.float32),
    }


def tuned(seed: int, tune: int, share: float = 0.01) -> Model:
    """Return a fine-tune of `base`, whose tensors are called otherwise: found by likeness alone."""
    rng = np.random.default_rng(1000 + tune)
    return {
        f"{tune}.{name}": w + (share * rng.standard_normal(w.shape)).astype(np.float32)
        for name, w in base(seed).items()
    }


class Stop(Exception):  # noqa: N818 - not an error of anybody's
    """Raised in the middle of an add."""


def stopped(store: pydedup.Store) -> None:
    """Break an add off, after it looked for what is like its blocks."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "writing":
            raise Stop

    with contextlib.suppress(Stop):
        store.add("broken", base(77) | tuned(2, 78), progress=progress)


def overtaken(store: pydedup.Store) -> None:
    """Add a model while another one is staged: its segment comes first, and is live last."""
    with pydedup.open(store.url) as slow:
        adapter, _ = inject(
            slow._adapter, Fault("publishing", lambda: store.add("fast", tuned(1, 50)) and None)
        )
        slow._adapter = adapter
        slow.add("slow", base(5))
        slow._adapter = adapter._adapter  # type: ignore[attr-defined]


#: Who makes each step, of two stores that are open on the same tables, and the step.
STEPS: Sequence[tuple[int, Step]] = (
    (0, lambda store: store.add("a", base(1))),
    (0, lambda store: store.add("b", base(2))),
    (0, lambda store: store.add("a1", tuned(1, 1))),
    (1, lambda store: store.add("c", base(3))),
    (0, lambda store: store.add("c1", tuned(3, 2))),
    (0, lambda store: store.add("dry", base(4) | tuned(2, 3), dry_run=True)),
    (0, stopped),
    (0, lambda store: store.add("b1", tuned(2, 4) | base(6))),
    (0, overtaken),
    (0, lambda store: store.add("d1", tuned(5, 5))),  # of what was staged before, and live after
    (0, lambda store: store.add_many({"e": base(8), "e1": tuned(8, 6), "f": base(9)})),
    (1, lambda store: store.remove("c")),
    (0, lambda store: store.add("c2", tuned(3, 7))),
    (1, lambda store: store.remove("b")),
    (1, lambda store: store.remove("b1")),
    (0, lambda store: store.add("b2", tuned(2, 8), policy=policies.Bounded(0.001))),
    (1, lambda store: store.vacuum()),
    (0, lambda store: store.add("e2", tuned(8, 9) | base(11))),
    (0, lambda store: store.add("x", base(10), policy=policies.Exact())),
    (0, lambda store: store.add("x1", tuned(10, 10))),
    (1, lambda store: store.add("f1", tuned(9, 11))),
    (0, lambda store: store.remove("a")),
    (0, lambda store: store.vacuum()),
    (1, lambda store: store.add("f2", tuned(9, 12))),
    (0, lambda store: store.add("a2", tuned(1, 13))),
)


def contents(store: pydedup.Store) -> dict[str, list[Any]]:
    """Return all that does not depend on when it was made."""
    adapter: Any = store._adapter
    found = {name: adapter._query(adapter._sql.select(name)) for name in TABLES[1:]}
    rows = [(row.id, row.state, row.checksum) for row in adapter.page_rows()]
    return {"pages": rows, **{name: sorted(rows) for name, rows in found.items()}}


def check_kept(store: pydedup.Store) -> int:
    """Compare what a store has kept with what is read anew; returns how many kinds of block."""
    if store._kept is None:
        return 0
    kept, adapter = store._kept.index, store._adapter
    index, other = kept.take(adapter.meta()["store_id"]), StoredIndex(None)
    live = np.array(adapter.page_ids(LIVE), np.int64)
    for kind in list(index._kinds):
        found = index.of_kind(adapter, kind, live)
        assert found.save() == other.of_kind(adapter, kind, live).save(), kind
    assert sorted(index.covered(adapter)) == sorted(other.covered(adapter))
    kept.keep(index, 1 << 30)
    return len(index._kinds)


def test_the_store_is_the_same_as_when_all_is_read_anew(tmp_path: Path) -> None:
    kept, anew = tmp_path / "kept.db", tmp_path / "anew.db"
    checked: set[int] = set()
    with pydedup.open(kept) as first, pydedup.open(kept) as second:
        for number, (who, step) in enumerate(STEPS):
            step((first, second)[who])
            with pydedup.open(anew) as store:
                step(store)
                assert contents(first) == contents(store), f"step {number}"
            checked.update((check_kept(first), check_kept(second)))
        assert max(checked) > 2
        assert first.verify().ok
        assert {model.name for model in first.models()} >= {"a2", "d1", "e2", "slow", "fast"}


def test_segments_may_come_and_go_anywhere(tmp_path: Path) -> None:
    """As those of an add that began first and is live last, or whose rows are damaged."""
    with pydedup.open(tmp_path / "a.db") as store:
        for number in range(3):
            store.add(f"m{number}", base(number))
        adapter: Any = store._adapter
        rows = adapter._query(adapter._sql.select("signatures", order=("segment",)))
        numbers = sorted({row[0] >> 20 for row in rows})
        second = [row for row in rows if row[0] >> 20 == numbers[1]]
        for change in (
            lambda: adapter.delete_signatures([row[0] for row in second]),
            lambda: adapter.insert_signatures(second),
            lambda: adapter.delete_signatures([numbers[2] << 20]),  # what pages it covers
        ):
            with adapter.transaction():
                change()
            assert check_kept(store) > 2
            store.add("near", tuned(1, len(store.models())) | base(len(store.models()) + 20))
            assert check_kept(store) > 2
        assert store.verify().ok


@contextlib.contextmanager
def counted(store: pydedup.Store) -> Iterator[list[int]]:
    """Count the rows of the similarity index that are read, payloads and all."""
    adapter: Any = store._adapter
    read: list[int] = []
    signatures = adapter.signatures

    def counting(grp: int, segments: Sequence[int] | None = None) -> Iterator[tuple[int, bytes]]:
        for row in signatures(grp, segments):
            read.append(row[0])
            yield row

    adapter.signatures = counting
    try:
        yield read
    finally:
        del adapter.signatures


def test_an_add_reads_what_is_new_of_the_index(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "a.db") as store, pydedup.open(tmp_path / "a.db") as other:
        for number in range(12):
            store.add(f"m{number}", base(number))
        with counted(store) as read:
            store.add("one", base(50))
        assert 0 < len(read) < 10  # of the one before
        with counted(other) as read:
            other.add("two", base(51))
        assert len(read) > 12  # it looks for the first time
        with counted(store) as read:
            found = store.add("three", tuned(51, 1))
        assert 0 < len(read) < 20
        assert found.delta_blocks == found.blocks
        store.add("four", base(60), dry_run=True)
        with counted(store) as read:
            store.add("four", base(60), dry_run=True)
        assert not read


def test_an_add_reads_models_that_it_does_not_know_yet(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "a.db") as store, pydedup.open(tmp_path / "a.db") as other:

        def read_by_add(number: int) -> set[int]:
            near = {name: w + np.float32(number) * 1e-4 for name, w in base(1).items()}
            adapter = store._adapter
            with mock.patch.object(adapter, "tensors", wraps=adapter.tensors) as tensors:
                store.add(f"m{number}", near)
            return {call.args[0] for call in tensors.call_args_list}

        ids = []
        for number in range(4):
            read = read_by_add(number)
            assert read == set(ids[-1:])  # what the add before this one brought
            ids.append(store._catalog.resolve(f"m{number}").id)
        other.add("else", base(2))
        assert len(read_by_add(4)) > 1  # others may have moved blocks
        assert len(read_by_add(5)) == 1
        other.remove("m0")
        other.vacuum()
        assert len(read_by_add(6)) > 1
        assert store.verify().ok


def test_of_models_no_more_is_kept_than_the_last_add_asked_for(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "a.db") as store:
        for number in range(40):
            store.add(f"m{number}", {"w": base(number)[f"{number}.w"]})
        assert store._kept is not None
        epoch = store._adapter.epoch()
        models = store._kept.models.take(store._adapter, store._pool, epoch)
        assert 0 < models.catalog.memory_bytes < 40 * 8192
        assert 0 < len(models.catalog._models) <= NEWEST


def test_rows_of_models_that_were_not_compared_with_are_not_kept(tmp_path: Path) -> None:
    """They have metadata of any size: 24 MB stayed, beside a pool of 16."""
    with pydedup.open(tmp_path / "a.db", memory="16MiB") as store:
        for number in range(24):
            note = {"note": "x" * 1_000_000}
            store.add(f"large{number}", {"w": base(number)[f"{number}.w"]}, metadata=note)
        for number in range(24, 32):
            store.add(f"m{number}", {"w": base(number)[f"{number}.w"]})
        assert store._kept is not None
        tracemalloc.start()
        try:
            store.add("other", {"w": base(50)["50.w"]})
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 4_000_000
        finally:
            tracemalloc.stop()
        assert store._kept.models._kept  # but those that it compared with


def test_what_takes_too_much_memory_is_not_kept(tmp_path: Path) -> None:
    """An eighth of the pool's budget: here 128 KiB."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1024, 640), np.float32)
    with pydedup.open(tmp_path / "a.db", memory="2MiB") as store:
        store.add("m", {"w": weights}, block_shape=(32, 32))
        for number in range(2):
            with counted(store) as read:
                other = weights[32 * number :][:32] + 9
                store.add(f"n{number}", {"w": other}, block_shape=(32, 32))
            assert len(set(read)) >= 2 + number


def test_nothing_is_kept_of_another_store() -> None:
    """Of tables that were made anew: their rows have the numbers of those before."""
    kept = KeptIndex()
    index = kept.take("one")
    kept.keep(index, 1 << 20)
    assert kept.take("one") is index
    assert kept.take("one") is not index  # somebody has it
    kept.keep(index, 1 << 20)
    assert kept.take("two") is not index
    assert StoredIndex("two").memory_bytes == 0


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nor does a closed store hold on to memory."""
    with pydedup.open(tmp_path / "a.db") as store:
        store.add("m", base(1))
        with pytest.raises(PydedupError):
            store.add("m@1", base(2))
        stopped(store)
        found = store.add("n", tuned(1, 1))
        assert found.delta_blocks == found.blocks
    assert store._kept is None


def test_pages_that_no_segment_covers_are_covered_by_the_next_add_that_looks(
    tmp_path: Path,
) -> None:
    """Of `Exact` nothing is indexed, and what a vacuum wrote lies elsewhere: each is read once."""

    def covered(store: pydedup.Store) -> set[int]:
        segments = read_segments(store._adapter)
        return {page for segment in segments for page in segment.page_ids.tolist()}

    def pages(store: pydedup.Store, name: str) -> set[int]:
        return {*store._catalog.model(name).page_ids().tolist()}

    with pydedup.open(tmp_path / "s.db") as store:
        store.add("more", {**base(1), **base(2, 1024)})
        store.add("kept", base(1))
        store.remove("more")
        assert store.vacuum().rewritten_pages > 0
        store.add("exact", base(3), policy=policies.Exact())
        assert covered(store).isdisjoint(pages(store, "kept") | pages(store, "exact"))
        report = store.add("tuned", {**tuned(1, 1), **tuned(3, 2)})
        assert report.delta_blocks == report.blocks
        assert covered(store) == {*store._adapter.page_ids(LIVE)}
