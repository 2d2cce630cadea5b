# SPDX-License-Identifier: Apache-2.0
"""Stores of many models: what is about a few of them asks the database about no others.

Counted are the rows that it answers with, so that no clock is needed; the plans of its own are
those of SQLite. What is about all models of a family asks for several of them at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.adapter import LIVE, ModelRow
from pydedup.catalog import ahead, aliases, catalog
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.policies import Exact

Ask = Callable[[pydedup.Store], object]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a small and a larger store of unrelated models; ``m`` has as many versions."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64), np.float32)}
    folder = tmp_path_factory.mktemp("filled")
    copies = {7: folder / "small.db", 23: folder / "large.db"}
    with pydedup.open(folder / "all.db") as store:
        for number in range(24):
            store.add(f"m{number}", {"w": rng.standard_normal((64, 64), np.float32)})
            store.add("m", {**weights, "b": np.float32(number)})
            if number in copies:
                store.alias("m", "prod", "3")
                store.backup(copies[number])
    return list(copies.values())


def statements(
    store: pydedup.Store, run: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, Any]]:
    """Return what a method of the adapter was given first for what is asked, and its answers."""
    adapter: Any = store._adapter
    noted: list[tuple[str, Any]] = []
    original = getattr(adapter, run)

    def noting(first: Any, *others: Any) -> Any:
        answer = original(first, *others)
        noted.append((first, answer))
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(adapter, run, noting)
        ask(store)
    return noted


def rows_read(store: pydedup.Store, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many rows the database gave for what is asked."""
    return sum(len(rows) for _, rows in statements(store, "_query", ask, monkeypatch))


ABOUT_ONE: dict[str, Ask] = {
    "load": lambda store: store.load("m@prod"),
    "info": lambda store: store.info("m5"),
    "alias": lambda store: store.alias("m", "prod", "4"),
    "remove": lambda store: store.remove("m5"),
    "remove a version": lambda store: store.remove("m@2"),
    "diff": lambda store: store.diff("m1", "m2"),
}


@pytest.mark.parametrize("ask", ABOUT_ONE.values(), ids=ABOUT_ONE)
def test_what_is_about_one_model_looks_at_no_others(
    filled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    found = []
    for path in filled:
        with pydedup.open(shutil.copy(path, tmp_path)) as store:
            found.append(rows_read(store, ask, monkeypatch))
    assert found[0] == found[1]


def test_who_asks_again_is_not_looked_up_until_something_changes(
    filled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(filled[0], tmp_path)
    with pydedup.open(path) as store, pydedup.open(path) as other:

        def asks(address: str, shape: tuple[int, ...], version: str) -> int:
            def ask(store: pydedup.Store) -> None:
                assert store.tensor(address, "b").shape == shape
                assert store._catalog.model(address).row.version == version

            ask(store)
            return rows_read(store, ask, monkeypatch)

        assert asks("m@prod", (), "3") == 0
        for mover, version in ((other, "4"), (store, "5")):
            mover.alias("m", "prod", version)
            assert rows_read(store, lambda store: store.graph("m@prod"), monkeypatch) > 0
            assert asks("m@prod", (), version) == 0
        newest = store.versions("m")[-1].version
        assert asks("m", (), newest) == 0
        other.remove(f"m@{newest}")
        assert asks("m", (), str(int(newest) - 1)) == 0
        other.alias("m", "prod", None)
        with pytest.raises(NotFoundError, match="no version or alias 'prod'"):
            store.tensor("m@prod", "b")
        # More names than are remembered, and what is no name.
        with monkeypatch.context() as patch:
            patch.setattr(catalog, "_FOUND_MODELS", 3)
            for _ in range(2):
                for number in range(6):
                    assert store.tensor(f"m{number}", "w").shape == (64, 64)
        with pytest.raises(ArgumentError):
            store.tensor(["m"], "b")  # type: ignore[arg-type]


def test_a_new_alias_parses_no_certificates_of_other_versions(
    filled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of large models are large: of each page and tensor there is something in them."""
    parsed: list[str] = []
    recorded = aliases.recorded_certificate

    def counting(row: ModelRow) -> dict[str, Any]:
        parsed.append(row.version)
        return recorded(row)

    monkeypatch.setattr(aliases, "recorded_certificate", counting)
    path = shutil.copy(filled[-1], tmp_path / "own.db")
    with pydedup.open(path) as store:
        store.alias("m", "new", "5")
        assert set(parsed) == {"5"}
        assert store.verify().ok
        assert np.array_equal(store.load("m@new")["b"], store.load("m@5")["b"])


def test_pages_are_listed_from_an_index(tmp_path: Path) -> None:
    """Their rows lie beside their payloads, of 1 MiB each."""
    with pydedup.open(tmp_path / "a.db") as store:
        adapter: Any = store._adapter
        for sql in (adapter._sql.page_ids(LIVE), adapter._sql.orphan_pages(0)):
            plan = [row[-1] for row in adapter._query(f"EXPLAIN QUERY PLAN {sql}")]
            assert "USING COVERING INDEX pydedup_pages_state" in plan[0]


@pytest.mark.parametrize("small", [True, False])
def test_block_maps_of_models_asked_for_last_are_remembered(
    filled: list[Path], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Of small models many, of large ones some: those of the first of 256 were read for each."""
    monkeypatch.setattr(catalog, "_CACHED_MODELS", 4)
    if not small:
        monkeypatch.setattr(catalog, "_ROOM_SHARE", 1 << 40)
        monkeypatch.setattr(catalog, "_ROOM_BYTES", 1)
    with pydedup.open(filled[-1], mode="r", memory="2MiB") as store:
        adapter, read = store._adapter, list[int]()
        block_maps = adapter.block_map

        def counting(model_id: int, ordinal: int) -> Any:
            read.append(model_id)
            return block_maps(model_id, ordinal)

        monkeypatch.setattr(adapter, "block_map", counting)

        def ask(*numbers: int) -> int:
            read.clear()
            for number in numbers:
                store.tensor(f"m{number}", "w").take([0])
            return len(read)

        assert ask(*range(20)) == 20
        assert ask(*range(20)) == (0 if small else 20)
        ask(0, 1, 2, 3)
        assert ask(0, 1, 2, 3) == 0
        ask(0, 5, 0, 6, 0, 7, 0, 8)  # the first of them is asked for again and again
        assert ask(0) == 0
        assert ask(1) == (0 if small else 1)


ABOUT_ALL: dict[str, Ask] = {
    "stats": lambda store: store.stats().tensors,
    "stats by": lambda store: store.stats(by="tenant"),
    "explain": lambda store: store.explain("m0"),
    "vacuum": lambda store: store.vacuum(dry_run=True),
}


@pytest.fixture
def family(store_url: str) -> Callable[[int], pydedup.Store]:
    """Return what fills a store with models on one base, of three tenants, up to a number."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((32, 64), np.float32)
    store = pydedup.open(store_url)

    def filled_up_to(number: int) -> pydedup.Store:
        for at in range(len(store.models()), number):
            tensors = {"base": base, "own": rng.standard_normal((8, 64), np.float32)}
            store.add(f"m{at}", tensors, metadata={"tenant": at % 3})
        return store

    return filled_up_to


def of_models(store: pydedup.Store, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many statements ask for tensors or block maps of models."""
    asked = [sql for sql, _ in statements(store, "_query", ask, monkeypatch)]
    columns = ("model_id, ordinal, name, dtype", "payload FROM")
    return sum("ordinal" in sql and any(some in sql for some in columns) for sql in asked)


def maps_read(store: pydedup.Store, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return how often the block map of one tensor was asked for, and those of all of a model."""
    singly: list[Any] = []

    def asks(store: pydedup.Store) -> None:
        singly.extend(statements(store, "block_map", ask, monkeypatch))

    at_once = statements(store, "block_maps", asks, monkeypatch)
    return len(singly), len(at_once)


GOES_THROUGH: dict[str, Callable[[pydedup.Store, str, Any], object]] = {
    "load": lambda store, name, near: store.load(name),
    "add": lambda store, name, near: store.add(f"near {name}", near),
}


@pytest.mark.parametrize("ask", GOES_THROUGH.values(), ids=GOES_THROUGH)
def test_whoever_goes_through_a_model_reads_its_block_maps_at_once(
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[pydedup.Store, str, Any], object],
) -> None:
    """A server was waited for once for each tensor."""
    rng = np.random.default_rng(0)
    asked: list[tuple[int, int]] = []
    for tensors in (8, 24):
        shape = (64, 64 + tensors)  # so that one model is nothing to the other
        base = {f"w{i}": rng.standard_normal(shape, np.float32) for i in range(tensors)}
        near = {name: values + np.float32(1e-3) for name, values in base.items()}
        with pydedup.open(store_url) as store:
            store.add(f"m{tensors}", base)
        goes_through = partial(ask, name=f"m{tensors}", near=near)
        with pydedup.open(store_url) as store:
            asked.append(maps_read(store, goes_through, monkeypatch))
    assert asked[0] == asked[1]
    assert asked[0][1] == 1


def test_block_maps_that_were_read_at_once_may_have_moved_when_they_are_wanted(
    path: Path,
) -> None:
    rng = np.random.default_rng(0)
    kept = {f"w{i}": rng.standard_normal((256, 256), np.float32) for i in range(12)}
    gone = {f"v{i}": rng.standard_normal((256, 256), np.float32) for i in range(12)}
    with pydedup.open(path) as store, pydedup.open(path) as other:
        other.add_many({"kept": kept, "gone": gone}, policy=Exact())
        names = list(kept)
        for name in names[:6]:
            assert np.array_equal(store.tensor("kept", name).numpy(), kept[name])
        before = store._catalog.model("kept").page_ids()
        other.remove("gone")
        other.vacuum()
        assert set(before) != set(other._catalog.model("kept").page_ids())
        for name in names[6:]:
            assert np.array_equal(store.tensor("kept", name).numpy(), kept[name])


def test_models_of_a_family_are_read_several_at_once(
    family: Callable[[int], pydedup.Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server was waited for twice for each: 4,000 times to explain one of 2,000."""
    with family(6) as store:
        few = {name: of_models(store, ask, monkeypatch) for name, ask in ABOUT_ALL.items()}
        family(18)
        many = {name: of_models(store, ask, monkeypatch) for name, ask in ABOUT_ALL.items()}
    assert many == few
    assert min(few.values()) > 0


@pytest.mark.parametrize(("models", "nbytes"), [(4, 1 << 30), (64, 1), (64, 40_000)])
def test_how_many_are_read_at_once_changes_no_answer(
    family: Callable[[int], pydedup.Store],
    monkeypatch: pytest.MonkeyPatch,
    models: int,
    nbytes: int,
) -> None:
    with family(10) as store:
        wanted = [ask(store) for ask in ABOUT_ALL.values()]
        monkeypatch.setattr(ahead, "_MODELS", models)
        monkeypatch.setattr(ahead, "_LOGICAL_BYTES", nbytes)
        assert [ask(store) for ask in ABOUT_ALL.values()] == wanted


def test_block_maps_of_a_model_are_replaced_together(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vacuum keeps other writers out meanwhile; each tensor had a statement of its own."""
    rng = np.random.default_rng(0)
    with pydedup.open(store_url) as store:
        shared = {f"w{n}": rng.standard_normal((32, 32), np.float32) for n in range(20)}
        own = {f"v{n}": rng.standard_normal((32, 32), np.float32) for n in range(20)}
        store.add("a", {**shared, **own})
        store.add("b", {**shared, "own": rng.standard_normal((32, 32), np.float32)})
        store.remove("a")
        reports: list[Any] = []
        asked = statements(store, "_write", lambda s: reports.append(s.vacuum()), monkeypatch)
        assert reports[0].rewritten_pages > 0
        deleted = [sql for sql, _ in asked if "block_maps" in sql and sql.startswith("DELETE")]
        assert len(deleted) == 1
        assert np.array_equal(store.load("b")["w7"], shared["w7"])
        assert store.verify().ok
