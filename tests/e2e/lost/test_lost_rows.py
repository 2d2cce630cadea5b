# SPDX-License-Identifier: Apache-2.0
"""Rows that follow from others are lost or wrong: nothing is deleted for that, and all comes back.

What models read (`model_pages`) follows from their block maps, and where each distinct block is
from the pages. And what is recorded of one model beside its weights: that is told, of it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pydedup
from pydedup.errors import CorruptStoreError, PageNotFoundError
from pydedup.testing._contract_base import in_thread

from ..damage import change, flip_last, forget_maps
from .conftest import MODELS, fill, is_sound, loaded, pages_of, stays_sound


@pytest.mark.parametrize("name", ["two", "near", "lossy"])
@pytest.mark.parametrize("is_seen", [False, True])
def test_a_page_that_a_block_map_names_is_not_deleted(
    name: str, is_seen: bool, store: pydedup.Store, store_url: str, other: Path
) -> None:
    """The row of one reader is lost, and the model that shares its page is removed."""
    before = loaded(store)
    model_id = store.info(name).info.id
    pages = {*pages_of(store, name)}
    page = min(pages & {*pages_of(store, "one")} or pages)
    change(
        store_url,
        "DELETE FROM {model_pages} WHERE model_id = ? AND page_id = ?",
        model_id,
        page,
    )
    assert f"{name}@1: what it reads is recorded wrongly for pages {page}" in store.verify().errors
    if is_seen:
        assert store.verify(repair_from=other).ok
    gone = {"one", "two", "near"} - {name} if name != "lossy" else set()
    for each in gone:
        store.remove(each)
        before.pop(each)
    if not is_seen:
        for dry_run in (True, False):
            with pytest.raises(CorruptStoreError, match=f"{name}@1 uses 1 page .*run verify"):
                store.vacuum(dry_run=dry_run)
        assert loaded(store) == before
        report = store.verify(repair_from=other)
        assert report.errors == []
        assert report.repair is not None
        assert report.repair.recorded_models == 1
    stays_sound(store, before)


def test_a_page_in_use_that_was_given_up_is_not_deleted(
    store: pydedup.Store, store_url: str, other: Path
) -> None:
    before = loaded(store)
    (page,) = pages_of(store, "lossy")
    change(store_url, "UPDATE {pages} SET state = 'retired' WHERE id = ?", page)
    with pytest.raises(CorruptStoreError, match=rf"lossy@1 uses 1 page \({page}\) that were"):
        store.vacuum()
    assert store.verify(repair_from=other).errors == []
    stays_sound(store, before)


@pytest.mark.parametrize("name", ["near", "lossy"])
def test_a_page_whose_row_is_lost_is_restored(
    name: str, store: pydedup.Store, healthy: str, store_url: str
) -> None:
    """Of a model within a bound, what a repair looks for is said by its distinct blocks alone."""
    before = loaded(store)
    page = max(pages_of(store, name))
    change(store_url, "DELETE FROM {pages} WHERE id = ?", page)
    said = f"page {page}: it is missing; read by {name}@1"
    assert [error for error in store.verify().errors if error.startswith("page")] == [said]
    # It was not said whose page it is, nor that a repair brings it back.
    told = rf"^1 page does not exist: {page}; read by {name}@1; verify --repair-from restores it in"
    with (
        pydedup.open(store_url, mode="r") as afresh,
        pytest.raises(PageNotFoundError, match=told),
    ):
        afresh.load(name)
    report = store.verify(repair_from=healthy)
    assert report.errors == []
    assert report.repair is not None
    assert report.repair.recorded_blocks == 0
    assert loaded(store) == before
    stays_sound(store, before)


def test_a_damaged_page_is_repaired_for_who_is_not_recorded(
    store_url: str, healthy: str, change_page: Callable[..., None]
) -> None:
    fill(store_url)
    with pydedup.open(store_url) as store:
        before = loaded(store)
        (page,) = pages_of(store, "one")
        two = store.info("two").info.id
        change(store_url, "DELETE FROM {model_pages} WHERE model_id = ? AND page_id = ?", two, page)
    change_page(store_url, page, flip_last)
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=healthy)
        assert (report.errors, report.notes) == ([], [])
        assert loaded(store) == before
        stays_sound(store, before)


def test_wrong_figures_are_seen_and_mended(
    store: pydedup.Store, store_url: str, other: Path
) -> None:
    usage = store.stats(by="tenant")
    model_id = store.info("two").info.id
    for column in ("blocks", "bytes"):
        more = f"SET {column} = {column} + 1"
        change(store_url, f"UPDATE {{model_pages}} {more} WHERE model_id = ?", model_id)
        assert any("two@1: what it reads is" in error for error in store.verify().errors)
        report = store.verify(repair_from=other)
        assert report.errors == []
        assert store.stats(by="tenant") == usage
    lossy = store.info("lossy").info.id
    change(store_url, "UPDATE {model_pages} SET bytes = 0 WHERE model_id <> ?", lossy)
    assert {size.info.name for size in store.sizes() if size.share_bytes} == {"lossy"}
    change(store_url, "UPDATE {model_pages} SET blocks = ? WHERE model_id < ?", 1 << 60, lossy)
    with pytest.raises(CorruptStoreError, match=r"1,152,921,504,606,846,976 blocks of page .*"):
        store.stats(by="tenant")
    assert store.verify(repair_from=other).errors == []
    assert store.stats(by="tenant") == usage
    for size in (-1, 1 << 62):  # of which sums were wrong, or warnings of numpy
        change(store_url, "UPDATE {model_pages} SET bytes = ? WHERE model_id = ?", size, model_id)
        with pytest.raises(CorruptStoreError, match=f"{size:,} bytes, which cannot be"):
            store.stats(by="tenant")
    assert store.verify(repair_from=other).errors == []
    assert store.stats(by="tenant") == usage
    page, *_ = pages_of(store, "lossy")
    change(store_url, "INSERT INTO {model_pages} VALUES (?, ?, ?, ?)", model_id, page, 1, 1)
    assert f"two@1: what it reads is recorded wrongly for pages {page}" in store.verify().errors
    assert store.verify(repair_from=other).errors == []
    is_sound(store)


def test_a_model_whose_row_is_lost_is_told_and_its_pages_are_kept(
    store: pydedup.Store, store_url: str, other: Path
) -> None:
    model_id = store.info("two").info.id
    pages = store._adapter.page_rows()
    change(store_url, "UPDATE {models} SET state = 'lost' WHERE id = ?", model_id)
    with pytest.raises(CorruptStoreError, match=f"the model with id {model_id} is damaged"):
        store.vacuum()
    change(store_url, "DELETE FROM {models} WHERE id = ?", model_id)
    said = [
        f"the row of the model with id {model_id} is lost, but its pages are there; restore a "
        "backup"
    ]
    assert store.verify().errors == said
    assert store.verify(repair_from=other).errors == said
    for dry_run in (True, False):
        with pytest.raises(CorruptStoreError, match=f"the model with id {model_id} .* verify"):
            store.vacuum(dry_run=dry_run)
    assert store._adapter.page_rows() == pages


def test_a_repair_keeps_pages_of_a_model_whose_row_is_lost(
    store_url: str, healthy: str, change_page: Callable[..., None]
) -> None:
    """It deleted them once all that is known of had what was theirs."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        before = loaded(store)
        (page,) = pages_of(store, "one")
        two = store.info("two").info.id
    change(store_url, "UPDATE {models} SET state = 'lost' WHERE id = ?", two)
    change_page(store_url, page, flip_last)
    with pydedup.open(store_url) as store:
        repair = store.verify(repair_from=healthy).repair
        assert repair is not None
        assert [(one.page, one.models) for one in repair.missing] == [
            (page, (f"the model with id {two}",))
        ]
        assert loaded(store) == {name: found for name, found in before.items() if name != "two"}
        change(store_url, "UPDATE {models} SET state = 'live' WHERE id = ?", two)
        report = store.verify(repair_from=healthy)
        assert (report.errors, report.repair and report.repair.missing) == ([], ())
        assert loaded(store) == before
        store.vacuum()
        assert loaded(store) == before
        assert store.verify().errors == []


def test_a_backup_that_may_have_a_model_whose_row_is_lost_is_kept(
    store_url: str, tmp_path: Path
) -> None:
    fill(store_url)
    kept, new = tmp_path / "kept", tmp_path / "new"
    with pydedup.open(store_url) as store:
        before = loaded(store)
        store.backup(kept)
        model_id = store.info("two").info.id
        change(store_url, "DELETE FROM {models} WHERE id = ?", model_id)
        with pytest.raises(CorruptStoreError, match=f"with id {model_id} .* not replaced.*verify"):
            store.backup(kept, replace=True)
        with pytest.raises(CorruptStoreError, match=f"model with id {model_id} is lost.*--skip"):
            store.backup(new)
        assert len(store.backup(new, skip_damaged=True).damaged) == 1
    with pydedup.open(kept, mode="r") as backup:
        assert loaded(backup) == before
    with pydedup.open(new, mode="r") as backup:
        assert loaded(backup) == {name: one for name, one in before.items() if name != "two"}


def test_what_a_model_takes_of_a_page_that_cannot_be_read_stays_as_recorded(
    store_url: str, other: Path, change_page: Callable[..., None]
) -> None:
    fill(store_url)
    with pydedup.open(store_url) as store:
        model_id = store.info("two").info.id
        before = store._adapter.model_pages(model_id)
        fine, damaged = (row[1] for row in before)  # which has one block
        one_more = "UPDATE {model_pages} SET blocks = blocks + 1 WHERE page_id = ?"
        change(store_url, one_more, fine)
    change_page(store_url, damaged, flip_last)
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=other)
        assert list(report.damaged_pages) == [damaged]
        assert report.repair is not None
        assert report.repair.recorded_models == 3
        assert store._adapter.model_pages(model_id) == before


def test_a_model_that_is_removed_before_what_it_reads_is_recorded(
    store: pydedup.Store, store_url: str, other: Path
) -> None:
    model_id = store.info("two").info.id
    more = "UPDATE {model_pages} SET bytes = bytes + 1 WHERE model_id = ?"
    change(store_url, more, model_id)

    def remove() -> None:
        with pydedup.open(store_url) as another:
            another.remove("two")

    def removing(stage: str, done: int, total: int) -> None:
        if stage == "checking models" and done == total == len(MODELS):
            in_thread(remove)

    report = store.verify(repair_from=other, progress=removing)
    assert report.repair is not None
    assert (report.errors, report.repair.recorded_models) == ([], 0)


def test_a_block_map_that_may_be_wrong_does_not_rule(store_url: str, other: Path) -> None:
    """What is recorded is the only sign of where the blocks of a model within a bound were."""
    fill(store_url)
    forget_maps(store_url)
    with pydedup.open(store_url) as store:
        model_id = store.info("lossy").info.id
        (mine,) = pages_of(store, "lossy")
        ((_, part),) = store._adapter.block_maps(model_id)
        theirs, *_ = pages_of(store, "one")
        wrong = part.replace(mine.to_bytes(8, "little"), theirs.to_bytes(8, "little"))
        assert wrong != part
        change(store_url, "UPDATE {block_maps} SET payload = ? WHERE model_id = ?", wrong, model_id)
        for _ in range(2):
            report = store.verify(repair_from=other)
            assert (
                f"lossy@1: what it reads is recorded wrongly for pages {theirs}, {mine}"
                in report.errors
            )
            assert report.repair is not None
            assert report.repair.recorded_models == 0
        assert pages_of(store, "lossy") == [mine]
        # Nor is what it named given up, and what is recorded changed to fit.
        store.remove("near")
        for dry_run in (True, False):
            with pytest.raises(CorruptStoreError, match=r"lossy@1 reads other .* run verify"):
                store.vacuum(dry_run=dry_run)
        assert pages_of(store, "lossy") == [mine]
        assert mine in {row.id for row in store._adapter.page_rows(state="live")}


def test_what_a_model_reads_is_mended_beside_a_wrong_row_of_its_blocks(
    store: pydedup.Store, store_url: str, other: Path
) -> None:
    """The repair had to be run twice: with that row it was not known whether the model is sound."""
    before, model_id = loaded(store), store.info("near").info.id
    (page,) = set(pages_of(store, "near")) - set(pages_of(store, "one"))
    told = "UPDATE {model_pages} SET page_id = ? WHERE model_id = ? AND page_id <> ?"
    change(store_url, told, 1 << 33, model_id, page)
    change(store_url, "UPDATE {distinct_blocks} SET page_id = -1 WHERE page_id = ?", page)
    assert store.verify(repair_from=other).errors == []
    assert loaded(store) == before
    is_sound(store)
