# SPDX-License-Identifier: Apache-2.0
"""Rows of distinct blocks are lost or wrong: all comes back, and hashes are those of the blocks."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.cli.app import main
from pydedup.errors import CorruptStoreError
from pydedup.layout import block_places

from ..damage import change, forget_maps
from .conftest import MODELS, blocks, fill, is_sound, loaded, near, pages_of

SIDE = 32


def test_distinct_blocks_are_recorded_anew(
    store_url: str, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store_url)
    with pydedup.open(store_url) as store:
        before = loaded(store)
        rows = all_blocks(store)
    for row in (rows[0], next(row for row in rows if row.base_id is not None)):
        change(store_url, "DELETE FROM {distinct_blocks} WHERE id = ?", row.id)
    assert main(["verify", store_url, "--repair-from", str(other), "-q"]) == 0
    assert "recorded anew: what 0 models read, and where 2 blocks are" in capsys.readouterr().out
    with pydedup.open(store_url) as store:
        key = lambda row: (row.page_id, row.slot)  # noqa: E731
        now = sorted(all_blocks(store), key=key)
        assert [(*key(row), row.hash128, row.base_id) for row in now] == [
            (*key(row), row.hash128, row.base_id) for row in sorted(rows, key=key)
        ]
        assert loaded(store) == before
        is_sound(store)


@pytest.mark.parametrize("is_delta", [False, True])
@pytest.mark.parametrize("other", ["slot", "page", "no slot", "no page"])
def test_a_row_of_a_distinct_block_that_is_elsewhere_is_forgotten(
    other: str, is_delta: bool, store: pydedup.Store, store_url: str, healthy: str, tmp_path: Path
) -> None:
    """A repair took only the block for lost whose row it had been: copies and adds failed."""
    copy = tmp_path / "copy.db"
    before = loaded(store)
    rows = all_blocks(store)
    row = next(row for row in rows if (row.base_id is not None) == is_delta)
    ours = {each.slot for each in rows if each.page_id == row.page_id}
    page = next(each.page_id for each in rows if each.page_id != row.page_id)
    place = {
        "slot": (row.page_id, max(ours - {row.slot})),
        "page": (page, 0),
        "no slot": (row.page_id, -1),
        "no page": (page + 900, 0),
    }[other]
    move = "UPDATE {distinct_blocks} SET page_id = ?, slot = ? WHERE id = ?"
    change(store_url, move, *place, row.id)
    assert not store.verify().ok
    assert store.verify(repair_from=healthy).errors == []
    is_sound(store)
    assert len(all_blocks(store)) == len(rows)
    store.copy_to(copy)
    store.add("again", MODELS["two"], block_shape=(SIDE, SIDE))
    assert loaded(store) == {**before, "again": before["two"]}
    store.vacuum()
    with pydedup.open(copy, mode="r") as copied:
        assert loaded(copied) == before
        is_sound(copied)


def test_a_block_map_that_names_a_slot_that_its_page_lacks_is_not_copied(
    store_url: str, tmp_path: Path
) -> None:
    fill(store_url)
    forget_maps(store_url)
    with pydedup.open(store_url) as store:
        model_id = store.info("lossy").info.id
        (page,) = pages_of(store, "lossy")
        ((_, part),) = store._adapter.block_maps(model_id)
        wrong = part[:-2] + (900).to_bytes(2, "little")
        change(store_url, "UPDATE {block_maps} SET payload = ? WHERE model_id = ?", wrong, model_id)
        for move, file in ((store.copy_to, "copy.db"), (store.backup, "backup.db")):
            with pytest.raises(CorruptStoreError, match=f"slot 900 of page {page}; run verify"):
                move(tmp_path / file)


def test_a_page_with_a_block_that_is_not_recorded_is_copied(store_url: str, tmp_path: Path) -> None:
    """It cannot go whole: nobody knows what the other block on it is."""
    with pydedup.open(store_url) as store:
        store.add("both", blocks(1, 2), block_shape=(SIDE, SIDE))
        store.add("second", blocks(2), block_shape=(SIDE, SIDE))
        store.remove("both")
        change(store_url, "DELETE FROM {distinct_blocks} WHERE slot = ?", 0)
        store.copy_to(tmp_path / "copy.db")
    with pydedup.open(tmp_path / "copy.db") as copy:
        assert copy.load("second")["w"].tobytes() == blocks(2)["w"].tobytes()
        is_sound(copy)


@pytest.mark.parametrize("is_delta", [False, True])
def test_wrong_rows_of_distinct_blocks_are_made_anew(
    is_delta: bool, store_url: str, other: Path, tmp_path: Path
) -> None:
    fill(store_url)
    key = lambda row: (row.page_id, row.slot, row.hash128, row.base_id)  # noqa: E731
    with pydedup.open(store_url) as store:
        before, rows = loaded(store), sorted(all_blocks(store), key=key)
        row = next(row for row in rows if (row.base_id is not None) == is_delta)
        wrong: list[tuple[str, object]] = [
            ("hash128", bytes([row.hash128[0] ^ 1]) + row.hash128[1:])
        ]
        place = block_places(np.array([row.page_id]), np.array([row.slot])).tolist()[0]
        wrong.append(("base_id", place))  # on itself
        if is_delta:
            wrong += [("base_id", n) for n in (None, row.base_id + 1, row.base_id + 900, 1 << 40)]
        for number, (column, value) in enumerate(wrong):
            (now,) = [r for r in all_blocks(store) if key(r)[:2] == key(row)[:2]]
            statement = {
                "hash128": "UPDATE {distinct_blocks} SET hash128 = ? WHERE id = ?",
                "base_id": "UPDATE {distinct_blocks} SET base_id = ? WHERE id = ?",
            }[column]
            change(store_url, statement, value, now.id)
            with contextlib.suppress(CorruptStoreError):
                store.copy_to(tmp_path / f"{number}.db")
                with pydedup.open(tmp_path / f"{number}.db") as copy:
                    assert loaded(copy) == before
            assert store.verify().errors
            report = store.verify(repair_from=other)
            assert (report.errors, report.notes) == ([], [])
            assert report.repair is not None
            assert (report.repair.recorded_blocks, report.repair.damaged_pages) == (2, 0)
            assert [key(r) for r in sorted(all_blocks(store), key=key)] == [key(r) for r in rows]
        assert loaded(store) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_blocks_that_are_on_no_page_are_told_and_forgotten(
    is_there: bool, store: pydedup.Store, store_url: str, other: Path
) -> None:
    """Of the block that is recorded so every add would fail."""
    before = loaded(store)
    new = blocks(5)
    store.add("new", new, block_shape=(SIDE, SIDE))
    (there,) = pages_of(store, "new")
    (row,) = store._adapter.blocks_on_pages([there])
    store.remove("new")
    store.vacuum()
    page = max(row.id for row in store._adapter.page_rows()) if is_there else 900_000
    columns = "(hash128, page_id, slot) VALUES (?, ?, 70)"
    change(store_url, f"INSERT INTO {{distinct_blocks}} {columns}", row.hash128, page)
    assert store.verify().errors == [f"page {page}, slot 70: recorded, but there is no such block"]
    report = store.verify(repair_from=other)
    assert report.errors == []
    store.add("new", new, block_shape=(SIDE, SIDE))
    assert loaded(store) == before | {"new": new["w"].tobytes()}
    is_sound(store)


def test_a_block_that_is_said_to_be_on_a_page_of_a_distant_number(
    store_url: str, other: Path
) -> None:
    """As a flipped bit makes it, too far away to be looked for there."""
    fill(store_url)
    change(store_url, "UPDATE {distinct_blocks} SET page_id = ? WHERE id = 1", 1 << 40)
    with pydedup.open(store_url) as store:
        (told,) = store.verify().errors
        assert told.endswith("no distinct block names it")
        assert store.verify(repair_from=other).errors == []
        assert store.add("again", MODELS["one"], block_shape=(SIDE, SIDE)).pages == 0
        is_sound(store)


def test_a_page_of_a_distant_number_keeps_no_verify(tmp_path: Path) -> None:
    """As a flipped bit makes it: to ask for the blocks of all numbers up to it would take days."""
    url = f"sqlite:///{tmp_path}/store.db"
    fill(url)
    change(url, "UPDATE {pages} SET state = ? WHERE id = 1", "liv")
    change(url, "UPDATE {pages} SET id = ? WHERE id = 4", 4 + (1 << 40))
    columns = "(hash128, page_id, slot) VALUES (?, 5, 70)"
    change(url, f"INSERT INTO {{distinct_blocks}} {columns}", bytes(16))
    with pydedup.open(url) as store:
        assert "page 5, slot 70: recorded, but there is no such block" in store.verify().errors


def all_blocks(store: pydedup.Store) -> list[Any]:
    pages = [row.id for row in store._adapter.page_rows()]
    return store._adapter.blocks_on_pages(pages)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("metadata", "{", "the metadata of one@1 cannot be read"),
        ("certificate", "[1]", "the certificate of one@1 cannot be read"),
        ("created_at", 1e300, r"when one@1 was added cannot be read \(1e\+300\)"),
        ("created_at", -1.0, r"when one@1 was added cannot be read \(-1\)"),
    ],
)
def test_what_is_recorded_of_one_model_is_told_and_all_else_checked(
    column: str, value: object, said: str, store_url: str, other: Path
) -> None:
    fill(store_url)
    change(store_url, f"UPDATE {{models}} SET {column} = ? WHERE name = 'one'", value)  # noqa: S608
    change(store_url, "DELETE FROM {distinct_blocks} WHERE page_id = 4")
    with pydedup.open(store_url) as store:
        with pytest.raises(CorruptStoreError, match=said):
            _ = store.info("one").certificate
        (told, *errors) = store.verify().errors[::-1]
        assert re.match(f"{said}.*restore a backup", told)
        assert errors
        assert store.verify(repair_from=other).errors == [told]
        store.add("one", near(blocks(1, 2)), block_shape=(SIDE, SIDE))
        for name in ("one@1", "two"):
            assert store.load(name)["w"].tobytes() == MODELS[name.partition("@")[0]]["w"].tobytes()
        store.remove("one@1")
        store.vacuum()
        assert store.verify().errors == []
        assert {info.address for info in store.models()} == {"one@2", "two@1", "near@1", "lossy@1"}


@pytest.mark.parametrize("name", ["two", "lossy", "raw"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_hash_of_another_block_is_recorded(
    name: str, is_damaged: bool, store_url: str, tmp_path: Path
) -> None:
    """A repair took that other block: the model was another then."""
    models = {"lossy": blocks(6, 7), "raw": blocks(8, 9)}
    healthy = f"sqlite:///{tmp_path}/healthy.db"
    for url in (healthy, store_url):
        fill(url)
        with pydedup.open(url) as store:
            for each, model in models.items():
                policy = policies.Bounded(0.01) if each == "lossy" else policies.Exact()
                store.add(f"{each}@2", model, policy=policy, block_shape=(SIDE, SIDE))
    with pydedup.open(store_url) as store:
        before = {info.address: store.load(info.address)["w"].tobytes() for info in store.models()}
        block = store._adapter.blocks_on_pages([max(pages_of(store, name))])[-1]
        other = store._adapter.blocks_on_pages([1])[0]
        assert other.hash128 != block.hash128
        change(
            store_url,
            "UPDATE {distinct_blocks} SET hash128 = ? WHERE id = ?",
            other.hash128,
            block.id,
        )
        if is_damaged:
            if name == "lossy":
                return  # nobody knows any more what it held
            sql = "UPDATE {pages} SET payload = substr(payload, 1, 200) WHERE id = ?"
            change(store_url, sql, block.page_id)
        assert not store.verify().ok
        report = store.verify(repair_from=healthy)
        assert report.errors == []
        assert {
            info.address: store.load(info.address)["w"].tobytes() for info in store.models()
        } == before
        is_sound(store)


def test_rows_of_a_page_that_is_another_are_not_taken_for_wrong(
    store_url: str, tmp_path: Path
) -> None:
    """Where one block of the other is the same: what was recorded of the rest is what is right."""
    rng = np.random.default_rng(0)
    model, other = ({"w": rng.standard_normal((128, 64), np.float32)} for _ in range(2))
    other["w"][:64] = model["w"][:64]
    with pydedup.open(tmp_path / "other.db") as store:
        store.add("one", other, block_shape=(64, 64))
        ((_, payload),) = store._adapter.read_pages([1])
    with pydedup.open(store_url) as store:
        store.add("one", model, block_shape=(64, 64))
        store.backup(tmp_path / "backup.db")
    change(store_url, "UPDATE {pages} SET payload = ? WHERE id = 1", payload)
    with pydedup.open(store_url) as store:
        report = store.verify()
        assert report.damaged_pages.keys() == {1}
        assert report.surplus_blocks == []
        assert store.verify(repair_from=tmp_path / "backup.db").repair.missing == ()
        assert store.verify().ok
        assert np.array_equal(store.load("one")["w"], model["w"])
