# SPDX-License-Identifier: Apache-2.0
"""Repairs while others serve, write, remove and vacuum, and repairs that fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.adapter import LIVE, STAGING
from pydedup.errors import ConflictError, CorruptStoreError, StorageFullError
from pydedup.jobs import Job
from pydedup.testing.faults import Fault, inject

from .conftest import assert_holds, assert_sound, family, fill, flip_half, pages_of, ruin

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


def test_serving_and_writing_go_on(store_url: str, change_page: Change, healthy: str) -> None:
    """Readers of other models never fail; a writer publishes, removes and repacks meanwhile."""
    fill(store_url)
    page = min(pages_of(store_url, "base"))
    served = pydedup.open(store_url)
    assert_holds(served, "base")  # its block maps are known, its pages in the pool
    served._pool.clear()
    change_page(store_url, page, flip_half)
    with pytest.raises(CorruptStoreError):
        served.load("base")
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            with pydedup.open(store_url, mode="r") as reader:
                while not done.is_set():
                    assert_holds(reader, "own")
                    reader._pool.clear()
        except BaseException as error:  # shown below
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    meddled = False

    def meddle(stage: str, finished: int, total: int) -> None:
        nonlocal meddled
        if stage == "restoring blocks" and not meddled:
            meddled = True
            with pydedup.open(store_url) as writer:
                writer.remove("shares")
                writer.add("new", {"w": np.random.default_rng(99).standard_normal((64, 64))})
                writer.remove("new")

    try:
        with pydedup.open(store_url) as store:
            assert store.verify(repair_from=healthy, progress=meddle).ok
    finally:
        done.set()
        thread.join(60)
    assert meddled
    assert not failures, failures
    for name in ("base", "near", "nearer"):
        assert_holds(served, name)
    served.close()
    assert_sound(store_url, notes=True)  # pages that the writer retired


def test_nothing_is_kept_of_a_model_that_is_removed_meanwhile(
    store_url: str, change_page: Change, healthy: str
) -> None:
    fill(store_url)
    (page,) = pages_of(store_url, "own")
    change_page(store_url, page, flip_half)

    def meddle(stage: str, finished: int, total: int) -> None:
        if stage == "restoring blocks":
            with pydedup.open(store_url) as other:
                other.remove("own")

    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=healthy, progress=meddle)
        assert report.repair is not None
        assert (report.repair.new_pages, report.repair.missing) == (0, ())
        assert store._adapter.page_rows(state=STAGING) == []
        assert store._adapter.page_rows(ids=[page]) == []
    assert_sound(store_url)


def test_an_add_that_matched_before_a_repair_names_no_page_that_went(
    store_url: str, change_page: Change, healthy: str
) -> None:
    fill(store_url, ("base",))
    pages = pages_of(store_url, "base")
    repaired = False

    def meddle(stage: str, finished: int, total: int) -> None:
        nonlocal repaired
        if stage == "writing" and not repaired:  # so all is matched
            repaired = True
            for page in pages:
                change_page(store_url, page, flip_half)
            with pydedup.open(store_url) as other:
                assert other.verify(repair_from=healthy).ok
                assert not other._adapter.page_rows(ids=pages)

    with pydedup.open(store_url) as store:
        report = store.add("shares", family()["shares"], progress=meddle)
        assert repaired
        assert report.shared_blocks
    assert_sound(store_url)


@pytest.mark.parametrize(
    ("method", "call"), [("insert_pages", 2), ("replace_block_maps", 1), ("set_page_state", 1)]
)
def test_a_repair_that_fails_changes_nothing(
    method: str, call: int, store_url: str, change_page: Change, healthy: str
) -> None:
    fill(store_url)
    pages = pages_of(store_url, "base", "near", "nearer", "shares", "own")
    for page in pages:
        change_page(store_url, page, flip_half)
    with pydedup.open(store_url) as store:
        before = store._adapter.model_pages(), store._adapter.page_rows(state=LIVE)
        whole = store._adapter
        store._adapter, _ = inject(whole, Fault(method, StorageFullError("no space"), call=call))
        with pytest.raises(StorageFullError):
            store.verify(repair_from=healthy)
        store._adapter = whole
        assert (whole.model_pages(), whole.page_rows(state=LIVE)) == before
        report = store.verify()
        assert sorted(report.damaged_pages) == pages
        assert report.notes == [], "what was staged is gone"
        assert store.verify(repair_from=healthy).ok
    assert_sound(store_url)


def test_a_repair_that_does_not_hear_of_a_commit_deletes_nothing_that_is_read(
    tmp_path: Path, change_page: Change, healthy: str
) -> None:
    interrupted = 0
    for call in range(1, 20):
        url = f"sqlite:///{tmp_path}/{call}.db"
        fill(url)
        page = min(pages_of(url, "base"))
        change_page(url, page, flip_half)
        with pydedup.open(url) as store:
            whole, fault = store._adapter, Fault("commit", KeyboardInterrupt(), call, after=True)
            store._adapter, _ = inject(whole, fault)
            try:
                store.verify(repair_from=healthy)
            except KeyboardInterrupt:
                interrupted += 1
            else:
                break  # there was no such commit any more
            store._adapter = whole
            assert store.verify().damaged_pages.keys() <= {page}
            assert store.verify(repair_from=healthy).ok
            assert_holds(store, "base")
    assert 2 < interrupted < 19


@pytest.mark.parametrize("grace_seconds", [0.0, 3600.0])
def test_a_repair_that_a_vacuum_collected_changes_nothing(
    grace_seconds: float,
    store_url: str,
    change_page: Change,
    healthy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the repair had been silent for too long after it had staged."""
    # The vacuum is to collect, not to repack: it would find the damage.
    monkeypatch.setattr("pydedup.maintenance.vacuum._wants_repack", lambda *_: False)
    fill(store_url)
    pages = pages_of(store_url, "base", "near", "nearer", "shares", "own")
    for page in pages:
        change_page(store_url, page, flip_half)
    collected = 0

    def collect(stage: str, finished: int, total: int) -> None:
        nonlocal collected
        if stage == "restoring blocks":
            with pydedup.open(store_url) as other:
                report = other.vacuum(lease_seconds=0, grace_seconds=grace_seconds)
                collected += report.freed_pages + report.waiting_pages

    with pydedup.open(store_url) as store:
        adapter = store._adapter
        damage = store.verify()
        before = adapter.model_pages(), adapter.page_rows()
        with pytest.raises(
            ConflictError, match=r"collected by a vacuum.*slept.*clock.*run it again"
        ):
            store.verify(repair_from=healthy, progress=collect)
        assert collected
        assert (adapter.model_pages(), adapter.page_rows()) == before
        assert adapter.jobs() == []
        report = store.verify()
        assert (report.errors, report.notes) == (damage.errors, damage.notes)
        assert sorted(report.damaged_pages) == pages
        assert store.verify(repair_from=healthy).ok
    assert_sound(store_url)


@pytest.mark.parametrize("kind", ["store", "file"])
def test_a_repair_that_finds_nothing_for_long_says_that_it_lives(
    kind: str,
    tmp_path: Path,
    change_page: Change,
    healthy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    fill(url, ("own",))
    (page,) = pages_of(url, "own")
    change_page(url, page, ruin)
    source = healthy
    if kind == "file":
        source = str(tmp_path / "zeros.safetensors")
        save_file({name: np.zeros((256, 256), np.float16) for name in "ab"}, source)
    monkeypatch.setattr("pydedup.jobs._BEAT_SECONDS", 0.0)
    beats = 0
    beat = Job.beat

    def counted(self: Job, *args: Any) -> None:
        nonlocal beats
        beats += 1
        beat(self, *args)

    monkeypatch.setattr(Job, "beat", counted)
    with pydedup.open(url) as store:
        blocks = len(store._catalog.model("own").block_map("w").slots)
        assert store.verify(repair_from=source).ok == (kind == "store")
        assert store._adapter.jobs() == []
    # One for each block that is looked at on its page, then one for each block or tensor there.
    assert beats >= blocks + (blocks if kind == "store" else 2)
