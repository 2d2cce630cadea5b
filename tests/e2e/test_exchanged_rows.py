# SPDX-License-Identifier: Apache-2.0
"""Rows that are sound, in the place of others: nothing is answered with other weights for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import CorruptStoreError, DuplicateError, NotFoundError

from .damage import change, forget_maps
from .exchanged import GRAPH, MODELS, TELLS, X, exchange_maps, fill, is_there


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
