# SPDX-License-Identifier: Apache-2.0
"""Flipped bits in pages: what is said, what is still served, and how it is restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import policies
from pydedup.adapter import LIVE
from pydedup.errors import (
    CorruptStoreError,
    NotAStoreError,
    NotFoundError,
    ReadOnlyError,
    UnsupportedFormatError,
)
from pydedup.layout import block_costs, map_places, pages_read
from pydedup.testing.pages import small_pages
from pydedup.types import DType

from .conftest import assert_holds, assert_sound, family, fill, flip_half, pages_of, ruin

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


def check_reads_but(store: pydedup.Store, damaged: int) -> None:
    """As `check_reads`, but for the bytes on a damaged page, which nobody can know."""
    for info in store.models():
        maps = store._catalog.model(info.address).block_maps()
        places = np.unique(np.concatenate([map_places(m) for m in maps]))
        rows = {page: blocks for _, page, blocks, _ in store._adapter.model_pages(info.id)}
        pages, counts = np.unique(places >> 20, return_counts=True)
        assert rows == dict(zip(pages.tolist(), counts.tolist(), strict=True))
        sound = places[places >> 20 != damaged]
        wanted = list(pages_read(sound, block_costs(store._pool, sound)))
        rows_of = store._adapter.model_pages(info.id)
        assert [row[1:] for row in rows_of if row[1] != damaged] == wanted


def flip(at: int, bit: int = 0) -> Callable[[bytearray], None]:
    def change(payload: bytearray) -> None:
        payload[at] ^= 1 << bit

    return change


def clear(payload: bytearray) -> None:
    payload[:] = b""


def misname(payload: bytearray) -> None:
    """Say that the first block is of another dtype of the same size."""
    others = {DType.F32.code: DType.I32.code, DType.F16.code: DType.BF16.code}
    payload[65] = others[payload[65]]


def test_a_flipped_bit_is_told_with_page_and_models(store_url: str, change_page: Change) -> None:
    fill(store_url)
    (own_page,) = pages_of(store_url, "own")
    base_page = min(pages_of(store_url, "base"))
    change_page(store_url, base_page, flip_half)
    touched = ["base@1", "near@1", "nearer@1", "shares@1"]
    with pydedup.open(store_url) as store:
        for name in ("base", "near", "nearer"):
            with pytest.raises(CorruptStoreError) as caught:
                store.load(name)
            assert f"page {base_page}: corrupt page: its bytes do not match their checksum" in str(
                caught.value
            )
            assert ", ".join(touched) in str(caught.value)
            assert "verify --repair-from" in str(caught.value)
        with pytest.raises(CorruptStoreError, match=f"page {base_page}"):
            store.tensor("base", "w").matmul(np.ones((1, 256), np.float32))
        assert_holds(store, "own")
        with pytest.raises(CorruptStoreError, match="shares@1"):
            store.load("shares")
        report = store.verify()
        assert report.damaged_pages == {base_page: touched}
        assert report.errors == [
            f"page {base_page}: corrupt page: its bytes do not match their checksum; "
            f"read by {', '.join(touched)}"
        ]
        assert report.notes == [], "bases of deltas that are damaged are not gone"
        assert report.repair is None
    change_page(store_url, own_page, flip_half)
    with pydedup.open(store_url, mode="r") as store:
        report = store.verify()
        assert report.damaged_pages == {base_page: touched, own_page: ["own@1"]}
        assert len(report.errors) == 2


def test_a_flipped_bit_in_any_page(store_url: str, change_page: Change) -> None:
    """Its readers are told of it by name, all others are served, and flipped back all is well."""
    fill(store_url)
    rng = np.random.default_rng(11)
    with pydedup.open(store_url, mode="r") as store:
        addresses = [info.address for info in store.models()]
        readers = {row["page_id"]: row["models"] for row in store._adapter.view("page_owners")}
        sizes = {row.id: row.payload_bytes for row in store._adapter.page_rows(state=LIVE)}
    assert readers.keys() == sizes.keys()
    assert len(sizes) > 3
    for page, size in sizes.items():
        for at in rng.integers(0, size, 2).tolist():
            change = flip(at, int(rng.integers(8)))
            change_page(store_url, page, change)
            touched = str(readers[page]).split(", ")
            with pydedup.open(store_url, mode="r") as store:
                for address in addresses:
                    if address not in touched:
                        assert_holds(store, address)
                        continue
                    with pytest.raises(CorruptStoreError, match=f"page {page}: ") as caught:
                        store.load(address)
                    assert f"read by {', '.join(touched)};" in str(caught.value)
                assert store.verify().damaged_pages == {page: touched}
            change_page(store_url, page, change)
            with pydedup.open(store_url, mode="r") as store:
                assert store.verify().ok


@pytest.mark.parametrize(
    "change",
    [
        *(flip(at) for at in (0, 4, 6, 8, 23, 24, 28, 32, 39, 40, 63)),  # header
        *(flip(at, 2) for at in (64, 65, 66, 68, 72, 76, 80, 88)),  # slot table
        misname,
        flip_half,
        flip(-1),
        ruin,
        clear,
    ],
)
def test_a_flip_anywhere_is_mended(
    change: Callable[[bytearray], None], tmp_path: Path, healthy: str, change_page: Change
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    fill(url)
    for page in pages_of(url, "base", "near", "nearer", "shares", "own"):
        change_page(url, page, change)
        with pydedup.open(url) as store:
            report = store.verify(repair_from=healthy)
            assert report.ok
            assert report.repair is not None
            assert report.repair.damaged_pages == report.repair.replaced_pages == 1
            assert report.repair.missing == ()
            assert report.repair.kept_blocks + report.repair.found_blocks > 0
        assert_sound(url)


def test_most_blocks_need_no_source(store_url: str, change_page: Change, tmp_path: Path) -> None:
    """A bit of a header or of a slot's tag: no block is looked for. One of a block: only that."""
    fill(store_url)
    empty = f"sqlite:///{tmp_path}/empty.db"
    pydedup.open(empty).close()
    for change in (flip(9), flip(88, 7)):
        change_page(store_url, min(pages_of(store_url, "base")), change)
        with pydedup.open(store_url) as store:
            repaired = store.verify(repair_from=empty).repair
        assert repaired is not None
        assert (repaired.found_blocks, repaired.missing) == (0, ())
        assert_sound(store_url)
    page = min(pages_of(store_url, "base"))
    change_page(store_url, page, flip_half)
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=empty)
        assert report.repair is not None
        (missing,) = report.repair.missing
        assert (missing.page, missing.blocks) == (page, 1)
        assert missing.models == ("base@1", "near@1", "nearer@1", "shares@1")
        assert report.damaged_pages == {page: list(missing.models)}
        check_reads_but(store, page)


def test_bases_and_deltas_at_once(store_url: str, change_page: Change, healthy: str) -> None:
    """Every page is damaged in the middle, so bases and deltas on them are lost."""
    fill(store_url)
    pages = pages_of(store_url, "base", "near", "nearer", "shares", "own")
    for page in pages:
        change_page(store_url, page, flip_half)
    with pydedup.open(store_url) as store:
        before = store.stats(by="none").used_bytes
        report = store.verify(repair_from=healthy)
        assert report.ok
        repaired = report.repair
        assert repaired is not None
        assert repaired.replaced_pages == len(pages)
        assert repaired.kept_blocks > repaired.found_blocks > 0
        assert store.stats(by="none").used_bytes >= before
        assert store._adapter.page_rows(ids=pages) == [], "damaged pages are gone"
        assert {row.state for row in store._adapter.page_rows()} == {LIVE}
        deltas = [
            b for b in store._adapter.blocks_on_pages(pages_of(store_url, "near")) if b.base_id
        ]
        assert deltas, "deltas that were sound still are deltas"
    assert_sound(store_url)
    with pydedup.open(store_url) as store:
        store.vacuum()
    assert_sound(store_url)


def test_everything_is_lost(store_url: str, change_page: Change, healthy: str) -> None:
    """Bases that nobody uses by themselves are found, too, or what stands on them is."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.remove("base")
        store.remove("shares")
    pages = pages_of(store_url, "near", "nearer", "own")
    for page in pages:
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=healthy)
        assert report.ok
        assert report.repair is not None
        assert report.repair.kept_blocks == 0
    assert_sound(store_url, notes=True)  # what was removed is retired


def test_a_delta_outlives_its_base(store_url: str, change_page: Change, tmp_path: Path) -> None:
    """The source has what a delta stands for, but not its base: it is stored by itself.

    Also by a process that still has the base in its memory, where nobody else reads it.
    """
    fill(store_url, ("base", "near", "own"))
    base_pages = set(pages_of(store_url, "base"))
    other = f"sqlite:///{tmp_path}/other.db"
    fill(other, ("near",))
    with pydedup.open(store_url) as store:
        store.remove("base")
        assert_holds(store, "near")
        for page in base_pages & set(pages_of(store_url, "near")):
            change_page(store_url, page, ruin)
        report = store.verify(repair_from=other)
        assert report.errors == []
        assert report.repair is not None
        assert report.repair.missing == ()
    assert_sound(store_url, notes=True)  # a delta that nobody uses has no base
    with pydedup.open(store_url) as store:
        store.vacuum()
    assert_sound(store_url, notes=True)


def test_the_file_of_a_base_that_was_removed_restores_deltas_on_it(
    change_page: Change, tmp_path: Path
) -> None:
    url, file = f"sqlite:///{tmp_path}/store.db", tmp_path / "base.safetensors"
    fill(url, ("base", "near"))
    save_file(family()["base"], file)
    pages = pages_of(url, "base")
    with pydedup.open(url) as store:
        store.remove("base")
    for page in pages:
        change_page(url, page, ruin)
    with pydedup.open(url) as store, small_pages():
        report = store.verify(repair_from=file)
        assert report.ok
        assert report.repair is not None
        assert report.repair.new_pages > 1, "none has more than a page can have"
    assert_sound(url)


def test_what_is_not_found_is_listed(store_url: str, change_page: Change, tmp_path: Path) -> None:
    fill(store_url)
    (own_page,) = pages_of(store_url, "own")
    base_page = min(pages_of(store_url, "base"))
    change_page(store_url, own_page, ruin)
    change_page(store_url, base_page, flip_half)
    other = f"sqlite:///{tmp_path}/other.db"
    fill(other, ("base",))
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=other)
        assert not report.ok
        repaired = report.repair
        assert repaired is not None
        assert (repaired.damaged_pages, repaired.replaced_pages) == (2, 1)
        (missing,) = repaired.missing
        assert (missing.page, missing.models) == (own_page, ("own@1",))
        assert missing.blocks == len(store._catalog.model("own").block_map("w").slots)
        assert list(report.damaged_pages) == [own_page]
        for name in ("base", "near", "nearer", "shares"):
            assert_holds(store, name)
        with pytest.raises(CorruptStoreError, match=f"page {own_page}: .*own@1"):
            store.load("own")
    complete = f"sqlite:///{tmp_path}/complete.db"
    fill(complete, ("own",))
    with pydedup.open(store_url) as store:
        assert store.verify(repair_from=complete).ok
    assert_sound(store_url)


def test_notes_of_repairs_in_parts_say_that_nothing_is_damaged(
    store_url: str, change_page: Change, tmp_path: Path
) -> None:
    """What a first source made raw, the base of a second makes readable as deltas once more."""
    fill(store_url, ("base", "near", "own"))
    for name in ("base", "near"):
        fill(f"sqlite:///{tmp_path}/{name}.db", (name,))
    for page in pages_of(store_url, "base"):
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        notes = store.verify(repair_from=f"sqlite:///{tmp_path}/near.db").notes
        report = store.verify(repair_from=f"sqlite:///{tmp_path}/base.db")
        assert report.ok
        assert notes or report.notes
        for note in (*notes, *report.notes):
            assert "no damage, and a vacuum may free the room" in note
        store.vacuum()
        assert store.verify().notes == []


def test_part_of_a_page_is_missing(tmp_path: Path, change_page: Change) -> None:
    """What was found is moved, what was not stays where it was, and comes another time."""
    url = f"sqlite:///{tmp_path}/store.db"
    fill(url)
    page = min(pages_of(url, "base"))
    change_page(url, page, ruin)
    other = f"sqlite:///{tmp_path}/other.db"
    fill(other, ("shares",))  # has all of base but 64 rows and the bias
    with pydedup.open(url) as store:
        report = store.verify(repair_from=other)
        repaired = report.repair
        assert repaired is not None
        assert repaired.replaced_pages == 0
        assert repaired.found_blocks > 0
        (missing,) = repaired.missing
        assert missing.page == page
        assert missing.models == ("base@1", "near@1", "nearer@1")
        assert 0 < missing.blocks < repaired.found_blocks
        assert len(store._adapter.blocks_on_pages([page])) == missing.blocks, "others are not here"
        assert_holds(store, "shares")
        again = store.verify(repair_from=other)
        assert again.repair is not None
        assert again.repair.found_blocks == 0
        assert again.repair.missing == repaired.missing
    with pydedup.open(url) as store:
        with pytest.raises(NotFoundError):
            store.verify(repair_from=tmp_path / "base.safetensors")
        save_file(family()["base"], tmp_path / "base.safetensors")
        assert store.verify(repair_from=tmp_path / "base.safetensors").ok
    assert_sound(url)


def test_the_models_file_restores_it(store_url: str, change_page: Change, tmp_path: Path) -> None:
    fill(store_url)
    for page in pages_of(store_url, "base"):
        change_page(store_url, page, ruin)
    save_file(family()["base"], tmp_path / "base.safetensors")
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=tmp_path / "base.safetensors")
        assert report.ok, report
        page = store._pool.pages(pages_of(store_url, "base"))[0]
        assert set(page.slots["encoding"].tolist()) == {0}, "what was exact is raw again"
    assert_sound(store_url)


def test_pages_that_are_gone(tmp_path: Path, healthy: str) -> None:
    """Also where what was recorded of their blocks is gone with them."""
    for with_rows in (False, True):
        url = f"sqlite:///{tmp_path}/gone-{with_rows}.db"
        fill(url)
        gone = pages_of(url, "base")[:1]
        with pydedup.open(url) as store:
            rows = store._adapter.blocks_on_pages(gone)
            with store._adapter.transaction():
                store._adapter.delete_pages(gone)
                if with_rows:
                    store._adapter.insert_blocks(
                        (row.hash128, row.page_id, row.slot, row.base_id) for row in rows
                    )
            report = store.verify()
            assert f"page {gone[0]}: it is missing; read by base@1" in report.errors[0]
            assert store.verify(repair_from=healthy).ok
            assert not store._adapter.blocks_on_pages(gone)
        assert_sound(url)


def test_lossy_models_come_back_as_they_were(
    store_url: str, change_page: Change, tmp_path: Path
) -> None:
    models = family()
    copies = []
    for url in (store_url, f"sqlite:///{tmp_path}/copy.db"):
        with pydedup.open(url) as store:
            store.add("base", models["base"])
            store.add("near", models["near"], policy=policies.Bounded(0.01))
            copies.append({k: a.tobytes() for k, a in store.load("near").items()})
    assert copies[0] == copies[1]
    for page in pages_of(store_url, "near"):
        change_page(store_url, page, flip_half)
    with pydedup.open(store_url) as store:
        assert store.verify(repair_from=f"sqlite:///{tmp_path}/copy.db").ok
        assert {k: a.tobytes() for k, a in store.load("near").items()} == copies[0]


def test_what_cannot_be_repaired_from(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    fill(url, ("own",))
    (tmp_path / "notes.md").write_text("no model")
    with pydedup.open(url) as store:
        with pytest.raises(UnsupportedFormatError, match="neither a store nor a model"):
            store.verify(repair_from=tmp_path / "notes.md")
        with pytest.raises(NotAStoreError):
            store.verify(repair_from=f"sqlite:///{tmp_path}/none.db")
        report = store.verify(repair_from=url)
        assert report.ok
        assert report.repair is not None
        assert report.repair.damaged_pages == 0
    with pydedup.open(url, mode="r") as store, pytest.raises(ReadOnlyError):
        store.verify(repair_from=url)
