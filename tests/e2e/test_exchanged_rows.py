# SPDX-License-Identifier: Apache-2.0
"""Rows that are sound, in the place of others: nothing is answered with other weights for that."""

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
from pydedup.errors import CorruptStoreError, DuplicateError, NotFoundError
from pydedup.graph import Graph, Node

from .damage import change, forget_maps

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 64), np.float32)
MODELS = {
    name: {key: RNG.standard_normal((64, 64), np.float32) for key in ("a", "b")}
    for name in ("one", "two", "three")
}
GRAPH = Graph(
    ("x",),
    ("z",),
    (
        Node("linear", ("x",), "y", {"weight": "a"}),
        Node("linear", ("y",), "z", {"weight": "b"}),
    ),
)
TELLS = "its block map is not the one that was recorded"


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model, graph=GRAPH)


def is_there(store: pydedup.Store, *names: str) -> None:
    for name in names:
        loaded = store.load(name)
        assert all(np.array_equal(loaded[key], array) for key, array in MODELS[name].items())


def exchange_maps(url: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Exchange the block maps of two tensors, each an id of a model and an ordinal."""
    told = "UPDATE {block_maps} SET model_id = ?, ordinal = ? WHERE model_id = ? AND ordinal = ?"
    for new, old in (((999, 9), first), (first, second), (second, (999, 9))):
        change(url, told, *new, *old)


def replace_map(url: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Give the second tensor the block map of the first, too."""
    with pydedup.open(url) as store:
        (part,) = store._adapter.block_map(*first)
    told = "UPDATE {block_maps} SET payload = ? WHERE model_id = ? AND ordinal = ?"
    change(url, told, part, *second)


@pytest.mark.parametrize("damage", [exchange_maps, replace_map])
@pytest.mark.parametrize("other", [(2, 0), (1, 1)])
def test_a_block_map_of_another_tensor(
    damage: Callable[..., None], other: tuple[int, int], store_url: str, tmp_path: Path
) -> None:
    """All fits, and other weights were loaded, served, copied and taken for a next version."""
    fill(store_url)
    damage(store_url, other, (2, 1))
    with pydedup.open(store_url) as store:
        for work in (
            lambda: store.load("two"),
            lambda: store.predict("two", X),
            lambda: store.tensor("two", "b").matmul(X),
            lambda: store.export("two", tmp_path / "two.npz"),
            lambda: store.copy_to(tmp_path / "copy.db", ["two"]),
            lambda: store.backup(tmp_path / "backup.db"),
            lambda: store.explain("two"),
            store.vacuum if damage is replace_map else lambda: store.load("two"),
        ):
            with pytest.raises(CorruptStoreError, match=f"tensor '[ab]': {TELLS}"):
                work()
        assert not (tmp_path / "two.npz").exists()
        assert any(TELLS in error for error in store.verify().errors)
        # Of its next version, nothing is taken from it.
        store.add("two", MODELS["two"], graph=GRAPH)
        is_there(store, "two", "three")
        store.remove("two@1")
        if other[0] == 1:
            store.remove("one")
        store.vacuum()
        assert store.verify().errors == []
        is_there(store, "two", "three")


@pytest.mark.parametrize("certificate", ["''", "substr(certificate, 1, 40)"])
def test_tensors_exchanged_where_the_certificate_is_damaged(
    certificate: str, store_url: str
) -> None:
    """Nothing was left to hold them against; an empty certificate was taken for one of before."""
    fill(store_url)
    change(store_url, f"UPDATE {{models}} SET certificate = {certificate} WHERE id = 2")  # noqa: S608
    with pydedup.open(store_url) as store:
        assert "the certificate of two@1 cannot be read" in store.verify().errors[0]
        is_there(store, *MODELS)  # its tensors are sound
    named = "UPDATE {tensors} SET name = ? WHERE model_id = 2 AND ordinal = ?"
    for ordinal, name in enumerate("ba"):
        change(store_url, named, name, ordinal)
    with pydedup.open(store_url) as store:
        for work in (store.load, lambda name: store.predict(name, X)):
            with pytest.raises(CorruptStoreError, match="two@1: its tensors are not those"):
                work("two")
        is_there(store, "one", "three")


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


def test_a_page_that_all_but_its_readers_know_for_what_it_is(
    store_url: str, tmp_path: Path
) -> None:
    """It is refused to them, which `verify` must tell, too; a repair records it anew."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.backup(tmp_path / "before.db")
        row = store._adapter.models(name="two")[0]
        certificate = json.loads(row.certificate)
        certificate["pages"] = dict.fromkeys(certificate["pages"], "AAAA")
        with store._adapter.transaction():
            store._adapter.update_model(row.id, certificate=json.dumps(certificate))
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


def test_a_model_of_before_block_maps_were_told_apart(store_url: str) -> None:
    fill(store_url)
    forget_maps(store_url)
    with pydedup.open(store_url) as store:
        is_there(store, *MODELS)
        store.remove("one")
        store.vacuum()
        is_there(store, "two", "three")
        assert store.verify().ok


def test_models_whose_names_are_exchanged(store_url: str) -> None:
    """One was loaded for the other."""
    fill(store_url)
    of = bytes if "mysql" in store_url else bytes.decode
    for new, old in ((b"between", b"one"), (b"one", b"two"), (b"two", b"between")):
        change(store_url, "UPDATE {models} SET name = ? WHERE name = ?", of(new), of(old))
    with pydedup.open(store_url) as store:
        for name, other in (("one", "two"), ("two", "one")):
            with pytest.raises(CorruptStoreError, match=f"{name}@1 was added as {other}@1"):
                store.load(name)
        assert sum("was added as" in error for error in store.verify().errors) == 2
        is_there(store, "three")


def exchange_hashes(url: str, which: str) -> None:
    told = {
        "models": "UPDATE {source_hashes} SET model_id = ? WHERE model_id = ?",
        "tensors": "UPDATE {source_hashes} SET ordinal = ? WHERE ordinal = ?",
    }
    first, second = (1, 2) if which == "models" else (0, 1)
    for new, old in ((999, first), (first, second), (second, 999)):
        change(url, told[which], new, old)


@pytest.mark.parametrize("which", ["models", "tensors"])
def test_source_hashes_of_another(which: str, store_url: str) -> None:
    """Blocks of a next version that are those of the other were taken for unchanged."""
    fill(store_url)
    exchange_hashes(store_url, which)
    one = MODELS["one"]
    other = MODELS["two"] if which == "models" else {"a": one["b"], "b": one["a"]}
    with pydedup.open(store_url) as store:
        store.add("one", other)
        loaded = store.load("one")
        assert all(np.array_equal(loaded[key], array) for key, array in other.items())
        assert not [error for error in store.verify().errors if "one@2" in error]


@pytest.mark.parametrize("which", ["models", "tensors"])
def test_no_page_is_restored_by_source_hashes_of_another(
    which: str, tmp_path: Path, change_page: Callable[..., None]
) -> None:
    """Blocks of another model, or tensor, would be in the place of those that are damaged."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    fill(url)
    with pydedup.open(url) as store:
        store.backup(tmp_path / "before.db")
    exchange_hashes(url, which)
    change_page(url, 1, bytearray.clear)
    with pydedup.open(url) as store:
        report = store.verify(repair_from=tmp_path / "before.db")
        assert report.repair is not None
        assert report.repair.found_blocks == 2
        is_there(store, "one", "two", "three")


@pytest.mark.parametrize(("column", "called"), [("version", "two@x"), ("name", "x@1")])
def test_a_damaged_address_is_removed_by_what_it_was_added_as(
    column: str, called: str, store_url: str
) -> None:
    """An add of it said that it is there and to be removed, which found nothing."""
    fill(store_url)
    value = b"x" if "mysql" in store_url else "x"
    told = {
        "version": "UPDATE {models} SET version = ? WHERE id = 2",
        "name": "UPDATE {models} SET name = ? WHERE id = 2",
    }
    change(store_url, told[column], value)
    with pydedup.open(store_url) as store:
        with pytest.raises(CorruptStoreError, match=f"{called} was added as two@1"):
            store.load(called)
        if column == "version":
            with pytest.raises(DuplicateError, match=r"two@1 .* remove it first"):
                store.add("two@1", MODELS["two"])
        with pytest.raises(NotFoundError):
            store.remove("two@2")
        assert store.remove("two@1") == ["two@1"]
        assert store.verify().ok
        store.add("two@1", MODELS["two"])
        is_there(store, *MODELS)
        assert [model.name for model in store.models()] == ["one", "three", "two"]


def test_metadata_of_another_model(store_url: str) -> None:
    """It says whose model it is, by which a quota goes."""
    with pydedup.open(store_url) as store:
        for name, model in MODELS.items():
            store.add(name, model, metadata={"tenant": name})
        change(store_url, "UPDATE {models} SET metadata = ? WHERE id = 2", '{"tenant": "one"}')
        (error,) = store.verify().errors
        assert error.startswith("the metadata of two@1 are not those that it was added with")
        is_there(store, *MODELS)


def test_aliases_that_are_lost_or_moved(store_url: str, tmp_path: Path) -> None:
    """A lost one was told by nobody, and one that points elsewhere gave another version."""
    copy = tmp_path / "copy.db"
    with pydedup.open(store_url) as store:
        for version in MODELS:
            store.add(f"m@{version}", MODELS[version])
        for alias, version in (("prod", "one"), ("prod", "two"), ("nächst", "two"), ("old", "one")):
            store.alias("m", alias, version)
        store.alias("m", "old", None)
        assert store.verify().ok
        store.copy_to(copy)
    for url in (store_url, f"sqlite:///{copy}"):
        change(url, "UPDATE {aliases} SET model_id = ? WHERE alias = 'prod'", 3)
        change(url, "DELETE FROM {aliases} WHERE alias = ?", "nächst")
        with pydedup.open(url) as store:
            for alias, said in (
                ("prod", "points at version three, to which"),
                ("nächst", "is lost"),
            ):
                with pytest.raises(CorruptStoreError, match=f"the alias m@{alias} {said}"):
                    store.load(f"m@{alias}")
            # Whatever is copied gets none that means something else there.
            with pytest.raises(
                CorruptStoreError, match=r"the alias m@(prod|nächst) .*skip_damaged"
            ):
                store.copy_to(tmp_path / "none.db")
            report = store.copy_to(tmp_path / f"{url == store_url}.db", skip_damaged=True)
            assert len(report.damaged) == 3
            with pydedup.open(tmp_path / f"{url == store_url}.db") as other:
                assert [model.aliases for model in other.models()] == [()] * 3
            assert store.verify().errors == [
                "alias m@nächst is lost, which was set to version two",
                "alias m@prod points at a version that it was not set to",
            ]
            store.alias("m", "prod", "one")
            store.alias("m", "nächst", None)
            assert store.verify().ok
            assert np.array_equal(store.load("m@prod")["a"], MODELS["one"]["a"])
            store.vacuum()
            store.alias("m", "prod", None)
            assert store.remove("m@one") == ["m@one"]
            assert store.verify().ok


def test_aliases_of_before_they_were_recorded(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        for version in MODELS:
            store.add(f"m@{version}", MODELS[version])
        for alias in ("prod", "next"):
            store.alias("m", alias, "one")
    change(
        store_url, "UPDATE {models} SET certificate = replace(certificate, '\"aliases\"', '\"x\"')"
    )
    with pydedup.open(store_url) as store:
        assert store.verify().ok
        is_there_by = {alias: store.load(f"m@{alias}") for alias in ("prod", "next")}
        assert all(np.array_equal(w["a"], MODELS["one"]["a"]) for w in is_there_by.values())
        store.alias("m", "prod", "two")
        store.alias("m", "old", "one")
        assert store.verify().ok
        assert np.array_equal(store.load("m@next")["a"], MODELS["one"]["a"])
        assert np.array_equal(store.load("m@prod")["a"], MODELS["two"]["a"])
