# SPDX-License-Identifier: Apache-2.0
"""Pages that are sound, in the place of others: what is recorded of pages tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.catalog import page_tags, tags_in
from pydedup.errors import CorruptStoreError

from .damage import change, forget_maps
from .exchanged import MODELS, RNG, TELLS, X, exchange_maps, fill, is_there


def exchange_pages(url: str, *rows: tuple[int, int]) -> None:
    """Give pages the payloads of others."""
    with pydedup.open(url) as store:
        payloads = dict(store._adapter.read_pages([old for _, old in rows]))
    for page_id, old in rows:
        change(url, "UPDATE {pages} SET payload = ? WHERE id = ?", payloads[old], page_id)


def test_pages_in_the_place_of_others(store_url: str, tmp_path: Path) -> None:
    """Each is sound by itself: other weights were loaded, served, exported and shared."""
    fill(store_url)
    with pydedup.open(store_url, mode="r") as store:
        store.backup(tmp_path / "before.db")
        (first,), (second,) = (store._adapter.model_pages(number) for number in (1, 2))
    exchange_pages(store_url, (first[1], second[1]), (second[1], first[1]))
    for _ in range(2):  # a page that was met before is read otherwise, and so is a copy in memory
        with pydedup.open(store_url) as store:
            for name, work in [
                ("one", lambda: store.load("one")),
                ("two", lambda: store.predict("two", X)),
                ("two", lambda: store.tensor("two", "b").matmul(X)),
                ("two", lambda: store.export("two", tmp_path / "two.npz")),
                ("two", lambda: store.copy_to(tmp_path / "copy.db", ["two"])),
                ("one", lambda: store.backup(tmp_path / "backup.db")),
            ] * 2:
                told = (
                    rf"page \d+: its checksum is not the one of its row; read by {name}@1; verify"
                )
                with pytest.raises(CorruptStoreError, match=told):
                    work()
            assert not (tmp_path / "two.npz").exists()
            is_there(store, "three")
    with pydedup.open(store_url) as store:
        assert store.verify().damaged_pages.keys() == {first[1], second[1]}
        assert store.add("again", MODELS["one"]).shared_blocks == 0
        assert store.load("again")["a"].tobytes() == MODELS["one"]["a"].tobytes()
        store.remove("again")
        store.verify(repair_from=tmp_path / "before.db")
        assert store.verify().ok
        is_there(store, *MODELS)


def exchange_rows(url: str, first: int, second: int) -> None:
    """Exchange all of two pages but their ids."""
    with pydedup.open(url) as store:
        checksums = {row.id: row.checksum for row in store._adapter.page_rows()}
    exchange_pages(url, (first, second), (second, first))
    for page_id, old in ((first, second), (second, first)):
        change(url, "UPDATE {pages} SET checksum = ? WHERE id = ?", checksums[old], page_id)


def test_whole_rows_of_pages_exchanged(store_url: str, tmp_path: Path) -> None:
    """Each fits its own checksum: other weights were served, and repacked for good."""
    fill(store_url)
    with pydedup.open(store_url, mode="r") as store:
        store.backup(tmp_path / "before.db")
        (first,), (second,) = (store._adapter.model_pages(number) for number in (1, 2))
    exchange_rows(store_url, first[1], second[1])
    told = rf"page ({first[1]}|{second[1]}): its row is that of another page; read by "
    for is_known in (False, True):  # by another model that reads the same pages
        with pydedup.open(store_url) as store:
            if is_known:
                store.add("again", MODELS["one"])
            for work in (
                lambda: store.load("one"),
                lambda: store.predict("two", X),
                lambda: store.tensor("two", "b").matmul(X),
                lambda: store.export("two", tmp_path / "two.npz"),
            ):
                with pytest.raises(CorruptStoreError, match=told):
                    work()
            is_there(store, "three")
    with pydedup.open(store_url) as store:
        assert store.verify().damaged_pages.keys() == {first[1], second[1]}
        is_there(store, "three")
        store.remove("three")
        with pytest.raises(CorruptStoreError, match=told):
            store.vacuum()
        # Nothing changed, and none of its pages is looked at: it read the same ones, and was lost.
        assert store.add("two", MODELS["two"]).shared_blocks == 0
    with pydedup.open(store_url) as store:
        is_there(store, "two")
        store.verify(repair_from=tmp_path / "before.db")
        assert store.verify().ok
        is_there(store, "one", "two")
        store.vacuum()
    with pydedup.open(store_url) as store:
        is_there(store, "one", "two")
        assert np.array_equal(store.load("two@1")["a"], MODELS["two"]["a"])
        assert np.array_equal(store.load("again")["b"], MODELS["one"]["b"])


def test_whole_rows_of_pages_exchanged_in_a_store_of_before(tmp_path: Path) -> None:
    """No certificate knows, but all blocks are others than recorded: the pages are wrong."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    fill(url)
    with pydedup.open(url) as store:
        store.backup(tmp_path / "before.db")
    forget_maps(url)
    exchange_rows(url, 1, 2)
    with pydedup.open(url) as store:
        report = store.verify()
        assert report.damaged_pages.keys() == {1, 2}
        assert report.surplus_blocks == []
        store.verify(repair_from=tmp_path / "before.db")
    with pydedup.open(url) as store:
        assert store.verify().ok
        is_there(store, *MODELS)


def test_what_is_recorded_of_exchanged_pages_stays(store_url: str, tmp_path: Path) -> None:
    """Of deltas and others, it was made anew of the wrong page, and a repair found that by it."""
    base = RNG.standard_normal((128, 64), np.float32)
    near = (base * (1 + 1e-3 * RNG.standard_normal(base.shape))).astype(np.float32)
    with pydedup.open(store_url) as store:
        for name, weights, policy in (
            ("base", base, policies.Lossless()),
            ("near", near, policies.Bounded(0.0005)),
            ("far", MODELS["one"]["a"], policies.Lossless()),
        ):
            store.add(name, {"w": weights}, policy=policy, block_shape=(64, 64))
        before = {name: store.load(name)["w"] for name in ("base", "near", "far")}
        assert not np.array_equal(before["near"], near)
        store.backup(tmp_path / "before.db")
        first, second = (store._adapter.model_pages(number)[-1][1] for number in (2, 3))
    exchange_rows(store_url, first, second)
    with pydedup.open(store_url) as store:
        report = store.verify()
        assert report.damaged_pages.keys() == {first, second}
        assert (report.surplus_blocks, report.unrecorded_blocks) == ([], {})
        assert store.verify(repair_from=tmp_path / "before.db").errors == []
    with pydedup.open(store_url) as store:
        for name, weights in before.items():
            assert np.array_equal(store.load(name)["w"], weights)


def add_by_workers(url: str, tmp_path: Path) -> str:
    """Add on two threads, more pages than are written at once."""
    large = {f"{n}": RNG.standard_normal((512, 512), np.float32) for n in range(24)}
    with pydedup.open(url) as store:
        store.add("one", large, workers=2)
        store.add("two", {key: -array for key, array in large.items()}, workers=2)
    return url


def vacuum(url: str, tmp_path: Path) -> str:
    """Move what is left of models to other pages."""
    with pydedup.open(url) as store:
        for name in ("one", "two"):
            store.add(name, {**MODELS[name], "c": RNG.standard_normal((64, 64), np.float32)})
        for name in ("one", "two"):
            store.add(name, {"a": MODELS[name]["a"]})
            store.remove(f"{name}@1")
        assert store.vacuum().repacked_pages
        store.add("three", MODELS["three"])
    return url


def copy(url: str, tmp_path: Path) -> str:
    """Copy models to another store."""
    fill(url)
    with pydedup.open(url) as store:
        store.copy_to(tmp_path / "copy.db", ["two", "one"])
    return f"sqlite:///{tmp_path / 'copy.db'}"


def repair(url: str, tmp_path: Path) -> str:
    """Restore damaged pages."""
    fill(url)
    with pydedup.open(url) as store:
        store.backup(tmp_path / "before.db")
    exchange_pages(url, (1, 2), (2, 3), (3, 1))
    with pydedup.open(url) as store:
        store.verify(repair_from=tmp_path / "before.db")
        store.add("four", {"a": RNG.standard_normal((64, 64), np.float32)})
    return url


@pytest.mark.parametrize("work", [add_by_workers, vacuum, copy, repair])
def test_all_that_writes_pages_records_them(
    work: Callable[[str, Path], str], tmp_path: Path
) -> None:
    url = work(f"sqlite:///{tmp_path / 'store.db'}", tmp_path)
    with pydedup.open(url) as store:
        assert store.verify().ok
        page_ids = sorted(row.id for row in store._adapter.page_rows(state="live"))
    exchange_rows(url, page_ids[0], page_ids[-1])
    with pydedup.open(url) as store:
        for model in store.models():
            store._catalog.model(model.address)
        for page_id in (page_ids[0], page_ids[-1]):
            with pytest.raises(CorruptStoreError, match="its row is that of another page"):
                store._pool.pages([page_id])


def test_what_a_repair_does_not_find_stays_damaged(tmp_path: Path) -> None:
    """What was recorded of its page is not taken anew from the row, which is another's."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model)
        store.add("both", {**MODELS["one"], "c": MODELS["two"]["a"]})
        store.copy_to(tmp_path / "one.db", "one")
    exchange_rows(url, 1, 2)
    with pydedup.open(url) as store:
        assert store.verify(repair_from=tmp_path / "one.db").repair.missing
    with pydedup.open(url) as store:
        is_there(store, "one", "three")
        for name in ("both", "two"):
            with pytest.raises(CorruptStoreError, match="its row is that of another page"):
                store.load(name)


@pytest.mark.parametrize(
    ("damage", "reader"),
    [
        ("DELETE FROM {block_maps} WHERE model_id = 2 AND ordinal = 0", "two@1"),
        ("UPDATE {models} SET state = 'odd' WHERE id = 2", "the model with id 2"),
    ],
)
def test_a_damaged_page_of_a_model_that_is_damaged_itself_stays(
    damage: str, reader: str, tmp_path: Path
) -> None:
    """Nobody knows what that model uses of it, and its map, or its row, may come back."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    fill(url)
    with pydedup.open(url) as store:
        store.backup(tmp_path / "before.db")
    exchange_pages(url, (1, 2), (2, 1))
    change(url, damage)
    with pydedup.open(url) as store:
        report = store.verify(repair_from=tmp_path / "before.db")
        assert report.repair is not None
        assert [(one.page, one.models) for one in report.repair.missing] == [(2, (reader,))]
        assert {row.id for row in store._adapter.page_rows(ids=[1, 2])} == {2}
        is_there(store, "one", "three")


def forget_pages(store: pydedup.Store, name: str) -> None:
    """Let a model's record say of its pages that they are others."""
    row = store._adapter.models(name=name)[0]
    certificate = json.loads(row.certificate)
    certificate["pages"] = dict.fromkeys(certificate["pages"], "AAAA")
    with store._adapter.transaction():
        store._adapter.update_model(row.id, certificate=json.dumps(certificate))


def test_a_page_that_all_but_its_readers_know_for_what_it_is(
    store_url: str, tmp_path: Path
) -> None:
    """It is refused to them, which `verify` must tell, too; a repair records it anew."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.backup(tmp_path / "before.db")
        forget_pages(store, "two")
    with pydedup.open(store_url) as store:
        told = r"page \d+: its row is that of another page; read by two@1"
        with pytest.raises(CorruptStoreError, match=told):
            store.load("two")
        assert re.match(told, *store.verify().errors)
        is_there(store, "one", "three")
        store.verify(repair_from=tmp_path / "before.db")
    with pydedup.open(store_url) as store:
        assert store.verify().ok
        is_there(store, *MODELS)


def test_what_one_reader_of_several_knows_wrong(store_url: str, tmp_path: Path) -> None:
    """Its siblings were refused as of another store, and so was an add; `verify` saw nothing."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.backup(tmp_path / "before.db")
        store.add("like two", MODELS["two"])
        forget_pages(store, "two")
    with pydedup.open(store_url) as store:
        told = r"page \d+: its row is that of another page; read by like two@1, two@1"
        with pytest.raises(CorruptStoreError, match=told):
            store.load("two")
        is_there(store, "one", "three")
        for name, array in store.load("like two").items():
            assert array.tobytes() == MODELS["two"][name].tobytes()
        (error,) = store.verify().errors
        assert re.match(told, error)
        assert store.add("new", MODELS["two"]).shared_blocks > 0
        store.verify(repair_from=tmp_path / "before.db")
    with pydedup.open(store_url) as store:
        assert store.verify().ok
        is_there(store, *MODELS)


def test_what_is_recorded_of_pages_is_one_entry_for_a_run() -> None:
    tags = {page_id: bytes([page_id, 0, 255]) for page_id in (7, 3, 4, 5, 100, 101)}
    assert tags_in(page_tags(tags)) == tags
    assert page_tags(tags).keys() == {"3", "7", "100"}
    for nothing in (None, [], "x", 3, {"1": 5}, {"x": "AAAA"}, {"1": "A"}, {}):
        assert tags_in(nothing) == {}


def test_what_a_vacuum_moves_is_recorded(store_url: str, tmp_path: Path) -> None:
    """Also for who read, before, what was recorded."""
    with pydedup.open(store_url) as store, pydedup.open(store_url) as reader:
        for name, model in MODELS.items():
            store.add(name, {**model, "c": RNG.standard_normal((64, 64), np.float32)})
        for name, model in MODELS.items():
            store.add(name, model)
            store.remove(f"{name}@1")
        is_there(reader, *MODELS)
        assert store.vacuum().repacked_pages
        is_there(reader, *MODELS)
        is_there(store, *MODELS)
        assert reader.verify().ok
        store.copy_to(tmp_path / "copy.db")
    with pydedup.open(tmp_path / "copy.db") as copy:
        is_there(copy, *MODELS)
        assert copy.verify().ok
    exchange_maps(store_url, (5, 0), (5, 1))
    with pydedup.open(store_url) as store, pytest.raises(CorruptStoreError, match=TELLS):
        store.load("two")
