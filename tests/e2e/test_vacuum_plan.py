# SPDX-License-Identifier: Apache-2.0
"""What a dry run of vacuum says is what vacuum then does."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.adapter import LIVE, STAGING
from pydedup.errors import CorruptStoreError, ReadOnlyError
from pydedup.maintenance import repack as repack_module
from pydedup.maintenance.repack import plan_repack
from pydedup.maintenance.vacuum import VacuumReport
from pydedup.testing.program import run_here

from .damage import change


def add_family(store: pydedup.Store, count: int, *, rows: int = 24000) -> None:
    """Tables that differ in a tenth of their rows, added one by one: their pages fill badly."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, 50)).astype(np.float32)
    for number in range(count):
        mine = table.copy()
        changed = rng.choice(rows // 4, rows // 40, replace=False)
        mine[changed] += 0.1
        store.add(f"tenant-{number}", {"embedding": mine}, policy=policies.Exact())


def same_but_for_the_file(dry: VacuumReport, wet: VacuumReport) -> None:
    assert dry.dry_run
    assert not wet.dry_run
    foreseen = dataclasses.replace(dry, dry_run=False, stored_bytes_after=wet.stored_bytes_after)
    assert foreseen == wet


def content(path: Path) -> bytes:
    return path.read_bytes()


def live_pages(store: pydedup.Store) -> set[int]:
    return {row.id for row in store._adapter.page_rows(state=LIVE)}


def test_pages_that_bring_nothing_stay(store: pydedup.Store, url: str) -> None:
    rng = np.random.default_rng(0)
    large, small = rng.random((24_000, 256), np.float32), rng.random((600, 128), np.float32)
    store.add("large", {"w": large}, policy=policies.Exact(), block_shape=(64, 64))
    full = live_pages(store)
    store.add("one", {"w": small[:400]}, policy=policies.Exact())
    store.add("two", {"w": small}, policy=policies.Exact())  # on the page of one, and its own
    before = live_pages(store)
    assert len(full) == 24
    dry = store.vacuum(dry_run=True)
    assert dry.rewritten_pages <= 3
    assert {m.model: (m.before, m.after) for m in dry.models}["two@1"] == (2, 1)
    said = run("vacuum", url, "--dry-run")
    assert f"{dry.rewritten_pages} of {len(before)} pages, into" in said
    wet = store.vacuum()
    same_but_for_the_file(dry, wet)
    assert len(live_pages(store) & full) >= 23
    assert len(before - live_pages(store)) == wet.rewritten_pages
    for name, table in (("large", large), ("one", small[:400]), ("two", small)):
        np.testing.assert_array_equal(store.load(name)["w"], table)
    assert store.verify().ok
    assert store.vacuum(dry_run=True).repacked_pages == 0


def test_one_page_less_is_not_worth_all_of_them(store: pydedup.Store) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):  # each on a page of its own, full to 95 %: 23 would do
        store.add(f"m{number}", {"w": rng.random((500, 500), np.float32)}, policy=policies.Exact())
    pages = len(live_pages(store))
    assert pages == 24
    assert plan_repack(store._adapter, store._pool, live_pages=pages) is None


def test_what_a_removed_model_leaves_on_a_page_of_others_is_freed(
    store: pydedup.Store, url: str
) -> None:
    """The number of pages stays, so that vacuum left half of one unused."""
    rng = np.random.default_rng(0)
    store.add("large", {"w": rng.random((4000, 512), np.float32)}, policy=policies.Exact())
    full = live_pages(store)
    models = {name: {"w": rng.random((320, 320), np.float32)} for name in "ab"}
    store.add_many(models, policy=policies.Exact())
    assert len(live_pages(store) - full) == 1
    promised = store.explain("b").removal_frees_bytes
    stored = store.stats().page_bytes
    store.remove("b")
    dry = store.vacuum(dry_run=True)
    said = run("vacuum", url)
    assert stored - store.stats().page_bytes == pytest.approx(promised, rel=0.01)
    assert (dry.rewritten_pages, dry.repacked_pages) == (1, 1)
    assert dry.page_bytes_after == store.stats().page_bytes
    assert full < live_pages(store)
    # One page went and one came: what is freed is the difference.
    assert "0 pages, 400.8 KiB" in said
    np.testing.assert_array_equal(store.load("a")["w"], models["a"]["w"])
    assert store.verify().ok
    assert store.vacuum(dry_run=True).repacked_pages == 0


def test_pages_of_which_little_is_unused_stay(store: pydedup.Store) -> None:
    rng = np.random.default_rng(0)
    first = rng.random((1984, 512), np.float32)  # four pages of blocks of 64 rows
    second = {"a": first[:448], "b": first[512:960], "c": first[1024:]}
    store.add("first", {"w": first}, policy=policies.Exact())
    full = live_pages(store)
    assert store.add("second", second, policy=policies.Exact()).stored_bytes == 0
    halves = {name: {"w": rng.random((240, 512), np.float32)} for name in "ab"}
    store.add_many(halves, policy=policies.Exact())
    for name in ("first", "b"):
        store.remove(name)
    assert store.vacuum().rewritten_pages == 1  # that of "a"
    assert full < live_pages(store)
    for name, tensor in second.items():
        np.testing.assert_array_equal(store.load("second")[name], tensor)
    assert store.verify().ok


def test_deltas_on_what_is_no_base_stay_as_they_are(store: pydedup.Store, url: str) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (512, 384)).astype(np.float32)
    models = {"base": base, "tuned": base + rng.normal(0, 2e-5, base.shape).astype(np.float32)}
    store.add_many({name: {"w": rng.random((300, 500), np.float32)} for name in "ab"})
    for name, tensor in models.items():
        report = store.add(name, {"w": tensor})
    assert report.delta_blocks == report.blocks
    store.remove("b")  # half of a page, for which there is a new layout
    change(url, "UPDATE {distinct_blocks} SET base_id = ? WHERE base_id IS NOT NULL", 1 << 40)
    with pytest.raises(CorruptStoreError, match="is a delta on one that no block map names"):
        store.vacuum()
    for name, tensor in models.items():
        np.testing.assert_array_equal(store.load(name)["w"], tensor)


def test_what_is_left_beside_blocks_that_others_share_is_freed(store: pydedup.Store) -> None:
    """What two models use of a page counted twice, so that vacuum left half of it unused."""
    rng = np.random.default_rng(0)
    store.add("large", {"w": rng.random((6000, 512), np.float32)}, policy=policies.Exact())
    full = live_pages(store)
    shared = {"w": rng.random((320, 320), np.float32)}
    models = {"gone": {"w": rng.random((380, 320), np.float32)}, "a": shared, "b": shared}
    store.add_many(models, policy=policies.Exact())
    assert len(live_pages(store) - full) == 1
    promised = store.explain("gone").removal_frees_bytes
    stored = store.stats().page_bytes
    store.remove("gone")
    dry = store.vacuum(dry_run=True)
    wet = store.vacuum()
    assert stored - store.stats().page_bytes == pytest.approx(promised, rel=0.01)
    same_but_for_the_file(dry, wet)
    for name in "ab":
        np.testing.assert_array_equal(store.load(name)["w"], shared["w"])
    assert store.verify().ok


def test_pages_that_several_models_use_whole_are_not_read(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model has three quarters of the page; that all together have it, the tables tell."""
    rng = np.random.default_rng(0)
    tables = [rng.random((220, 320), np.float32) for _ in range(3)]
    models = {str(i): {"w": tables[i], "v": tables[(i + 1) % 3][:64]} for i in range(len(tables))}
    store.add_many(models, policy=policies.Exact())
    assert len(live_pages(store)) == 1
    store.add("large", {"w": rng.random((6000, 512), np.float32)}, policy=policies.Exact())

    def refused(*_: Any) -> Any:
        raise AssertionError("pages were read")

    monkeypatch.setattr(store._pool, "windows", refused)
    assert store.vacuum().rewritten_pages == 0


def test_block_maps_of_what_stays_are_not_written_anew(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else can publish meanwhile."""
    rng = np.random.default_rng(0)
    large = rng.random((4000, 512), np.float32)
    own = {name: rng.random((320, 320), np.float32) for name in "ab"}
    store.add("large", {"w": large}, policy=policies.Exact())
    models = {"a": {"w": large, "own": own["a"]}, "b": {"w": own["b"]}}
    store.add_many(models, policy=policies.Exact())
    store.remove("b")
    adapter, written = store._adapter, list[tuple[int, int]]()
    replace = adapter.replace_block_maps

    def noting(model_id: int, maps: Mapping[int, Sequence[bytes]]) -> None:
        written.extend((model_id, ordinal) for ordinal in maps)
        replace(model_id, maps)

    monkeypatch.setattr(adapter, "replace_block_maps", noting)
    assert store.vacuum().rewritten_pages == 1
    assert written == [(store.info("a").info.id, 1)]
    for tensor, array in store.load("a").items():
        np.testing.assert_array_equal(array, models["a"][tensor])
    assert store.verify().ok


def test_pages_published_before_the_plan_count(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_family(store, 6)
    before = live_pages(store)

    def late(*args: Any, **kwargs: Any) -> Any:
        rng = np.random.default_rng(8)
        store.add("late", {"w": rng.random((600, 500), np.float32)}, policy=policies.Exact())
        before.update(live_pages(store))
        return plan_repack(*args, **kwargs)

    monkeypatch.setattr(repack_module, "plan_repack", late)
    report = store.vacuum()
    assert report.repacked_pages > 0
    assert report.rewritten_pages == len(before - live_pages(store))


def test_files_that_never_shrink_are_not_foreseen_to(store_url: str) -> None:
    """Servers keep what is freed; the new pages come before the old ones go."""
    with pydedup.open(store_url) as store:
        add_family(store, 6)
        for number in (0, 2):
            store.remove(f"tenant-{number}")
        dry = store.vacuum(dry_run=True)
        wet = store.vacuum()
        shrinks = store._adapter.capabilities.shrinks
    same_but_for_the_file(dry, wet)
    assert dry.freed_bytes > dry.repacked_bytes > 0
    freed = dry.freed_bytes if shrinks else 0
    assert dry.stored_bytes_after == dry.stored_bytes_before + dry.repacked_bytes - freed


def test_a_repack_saves_what_was_foreseen(store: pydedup.Store) -> None:
    add_family(store, 6)
    for number in (0, 2):
        store.remove(f"tenant-{number}")
    pages = store.stats().pages
    dry = store.vacuum(dry_run=True)
    assert store.stats().pages == pages
    assert dry.repacked_pages > 0
    assert dry.page_bytes_after < dry.page_bytes_before
    assert [m.model for m in dry.models] == [f"tenant-{n}@1" for n in (1, 3, 4, 5)]
    assert sum(m.after for m in dry.models) < sum(m.before for m in dry.models)
    wet = store.vacuum()
    same_but_for_the_file(dry, wet)
    stats = store.stats()
    assert (stats.pages, stats.page_bytes) == (dry.pages_after, dry.page_bytes_after)
    for model in dry.models:
        assert store.info(model.model).pages == model.after
    assert wet.stored_bytes_before - wet.stored_bytes_after == pytest.approx(
        dry.stored_bytes_before - dry.stored_bytes_after, rel=0.2
    )
    nothing = store.vacuum(dry_run=True)
    assert (nothing.repacked_pages, nothing.freed_pages, nothing.freed_bytes) == (0, 0, 0)
    same_but_for_the_file(nothing, store.vacuum())


def test_pages_in_grace_wait_in_the_plan_too(store: pydedup.Store) -> None:
    add_family(store, 4)
    store.remove("tenant-1")
    dry = store.vacuum(dry_run=True, grace_seconds=3600)
    assert dry.freed_pages == 0
    assert dry.waiting_pages > 0
    same_but_for_the_file(dry, store.vacuum(grace_seconds=3600))
    dry = store.vacuum(dry_run=True)
    assert dry.freed_pages > 0
    assert dry.repacked_pages == 0
    same_but_for_the_file(dry, store.vacuum())


def test_a_clock_that_was_ahead_keeps_no_page(store: pydedup.Store) -> None:
    """What was retired then waited until it was that late."""
    add_family(store, 4)
    store.remove("tenant-1")
    change(store.url, "UPDATE {pages} SET retired_at = retired_at + 1e7 WHERE state = 'retired'")
    dry = store.vacuum(dry_run=True, grace_seconds=60)
    assert dry.freed_pages > 0
    assert store.vacuum(grace_seconds=60).freed_pages == dry.freed_pages


def test_pages_of_nobody_are_foreseen(store: pydedup.Store) -> None:
    add_family(store, 2)
    stored = store.stats().page_bytes
    store.remove("tenant-0")
    store.remove("tenant-1")
    dry = store.vacuum(dry_run=True)
    assert dry.pages_after == dry.page_bytes_after == 0
    assert dry.freed_bytes == stored > 0
    assert dry.models == ()
    same_but_for_the_file(dry, store.vacuum())
    assert store.stats().pages == 0


def test_abandoned_adds_are_foreseen(store: pydedup.Store) -> None:
    add_family(store, 2)
    store.vacuum()
    adapter = store._adapter
    live = adapter.models()[0]
    with adapter.transaction():
        row = dataclasses.replace(live, id=0, name="half-written", state=STAGING)
        staged = adapter.insert_model(row)
        (page,) = adapter.insert_pages([(b"c" * 16, b"left over")], state=STAGING)
        # It read a page of its own, those that live models read too, and of one removed since.
        read = {page for _, page, _, _ in adapter.model_pages()}
        adapter.insert_model_pages((staged, number, 1, 9) for number in (page, *read))
        adapter.put_job("dead", json.dumps({"models": [staged]}), "0", "running")
    store.remove("tenant-1")
    left = read - {page for _, page, _, _ in adapter.model_pages(live.id)}
    sizes = [row.payload_bytes for row in adapter.page_rows(ids=sorted(left), state=LIVE)]
    assert len(sizes) == len(left) > 0
    dry = store.vacuum(dry_run=True)
    assert dry.abandoned_adds == 1
    assert dry.freed_pages == 1 + len(left)
    assert dry.freed_bytes == len(b"left over") + sum(sizes)
    same_but_for_the_file(dry, store.vacuum())


def test_work_in_progress_stays(store: pydedup.Store) -> None:
    add_family(store, 1)
    adapter = store._adapter
    with adapter.transaction():
        adapter.insert_pages([(b"c" * 16, b"soon live")], state=STAGING)
        adapter.put_job("busy", json.dumps({"models": []}), repr(time.time()), "running")
    dry = store.vacuum(dry_run=True)
    assert (dry.abandoned_adds, dry.freed_pages) == (0, 0)
    same_but_for_the_file(dry, store.vacuum())
    assert len(adapter.page_rows(state=STAGING)) == 1


def test_an_empty_store_has_nothing_to_save(store: pydedup.Store) -> None:
    dry = store.vacuum(dry_run=True)
    assert (dry.pages_before, dry.pages_after, dry.amplification_after) == (0, 0, 1.0)
    same_but_for_the_file(dry, store.vacuum())


def test_a_dry_run_needs_no_right_to_write(store: pydedup.Store, url: str, tmp_path: Path) -> None:
    add_family(store, 3)
    store.remove("tenant-0")
    store.close()
    before = content(tmp_path / "store.db")
    with pydedup.open(url, mode="r") as reader:
        assert reader.vacuum(dry_run=True).freed_pages > 0
        with pytest.raises(ReadOnlyError, match="cannot vacuum"):
            reader.vacuum()
    assert content(tmp_path / "store.db") == before


def run(*arguments: str) -> str:
    done = run_here(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_shows_what_it_would_save(store: pydedup.Store, url: str) -> None:
    add_family(store, 6)
    store.remove("tenant-0")
    store.close()
    shown = run("vacuum", url, "--dry-run", "-q")
    foreseen = json.loads(run("vacuum", url, "--dry-run", "--json", "-q"))
    assert foreseen["dry_run"]
    assert "nothing was changed" in shown
    for model in foreseen["models"]:
        line = next((line for line in shown.splitlines() if model["model"] in line), None)
        if model["before"] == model["after"]:
            assert line is None
        else:
            assert line is not None
            assert line.split()[1:] == [str(model[k]) for k in ("before", "after", "least")]
    done = json.loads(run("vacuum", url, "--json", "-q"))
    for key in ("freed_pages", "freed_bytes", "repacked_pages", "page_bytes_after", "models"):
        assert done[key] == foreseen[key], key
