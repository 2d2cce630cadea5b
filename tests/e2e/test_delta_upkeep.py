# SPDX-License-Identifier: Apache-2.0
"""Stores that hold deltas, after they were written: reading, verify, vacuum, explain, diff."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies, registry
from pydedup.blocks import BlockMap
from pydedup.errors import PageNotFoundError
from pydedup.layout import split_places
from pydedup.store import Store
from pydedup.testing.pages import small_pages

from .damage import forget_maps

Model = dict[str, NDArray[Any]]
SHAPE = (320, 256)


def base_model(seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    return {"weight": rng.standard_normal(SHAPE).astype(np.float32)}


def near(model: Model, seed: int) -> Model:
    """Every block changed, by little."""
    rng = np.random.default_rng(seed)
    weight = model["weight"].copy()
    weight[rng.random(SHAPE) < 0.02] *= np.float32(1.01)
    return {"weight": weight}


def add_family(store: pydedup.Store) -> dict[str, Model]:
    base = base_model()
    models = {"base": base, "one": near(base, 1), "two": near(base, 2)}
    for name, model in models.items():
        report = store.add(name, model)
        assert (report.delta_blocks > 0) == (name != "base")
    return models


def assert_loads(store: pydedup.Store, models: dict[str, Model]) -> None:
    x = np.random.default_rng(9).standard_normal((3, SHAPE[1])).astype(np.float32)
    for name, model in models.items():
        want = model["weight"]
        assert store.load(name)["weight"].tobytes() == want.tobytes(), name
        tensor = store.tensor(name, "weight")
        assert tensor.take([0, 319]).tobytes() == want[[0, 319]].tobytes()
        assert np.allclose(tensor.matmul(x), x @ want.T, rtol=1e-3, atol=1e-3)


def sql(path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


def test_reading_within_any_budget(store: pydedup.Store, path: Path) -> None:
    models = add_family(store)
    assert_loads(store, models)
    sizes = sorted(row[0] for row in sql(path, "SELECT length(payload) FROM pydedup_pages"))
    memory = 2 * sum(sizes[-2:])  # half of it is for pages
    # Of small pages; for those of the usual size, opening refuses so little.
    with Store(registry.connect(f"sqlite:///{path}", mode="r"), memory) as little:
        assert_loads(little, models)
        assert little.verify().errors == []


def test_verify_of_exact_and_bounded_deltas(store: pydedup.Store) -> None:
    models = add_family(store)
    rng = np.random.default_rng(3)
    weight = models["base"]["weight"] * (1 + 1e-3 * rng.standard_normal(SHAPE)).astype(np.float32)
    assert store.add("lossy", {"weight": weight}, policy=policies.Bounded(1e-3)).delta_blocks > 0
    assert not (store.load("lossy")["weight"] == weight).all()
    report = store.verify()
    assert report.errors == []
    assert report.notes == []
    assert report.models == 4


def test_a_base_outlives_its_model(store: pydedup.Store) -> None:
    models = add_family(store)
    store.remove("base")
    del models["base"]
    store.vacuum()
    assert_loads(store, models)
    assert store.verify().errors == []
    store.remove("one")
    store.remove("two")
    store.vacuum()
    assert store.stats().pages == 0


def test_a_new_layout_takes_deltas_and_bases_along(store: pydedup.Store, path: Path) -> None:
    models = add_family(store)
    for number in range(6):  # one page each, far from full: worth packing
        models[f"small-{number}"] = near(models["base"], 10 + number)
        store.add(f"small-{number}", models[f"small-{number}"])
    store.remove("two")
    del models["two"]
    before = sql(path, "SELECT count(*) FROM pydedup_distinct_blocks WHERE base_id IS NOT NULL")
    plan = store.vacuum(dry_run=True)
    report = store.vacuum()
    assert report.repacked_pages == plan.repacked_pages > 0
    assert report.models == plan.models
    assert_loads(store, models)
    verified = store.verify()
    assert verified.errors == []
    assert verified.notes == []
    after = sql(path, "SELECT count(*) FROM pydedup_distinct_blocks WHERE base_id IS NOT NULL")
    assert 0 < after[0][0] < before[0][0]  # those of "two" are gone
    pages = {row[0] for row in sql(path, "SELECT id FROM pydedup_pages")}
    places = sql(path, "SELECT base_id FROM pydedup_distinct_blocks WHERE base_id IS NOT NULL")
    assert {place[0] >> 20 for place in places} <= pages
    with pydedup.open(f"sqlite:///{path}") as again:
        assert_loads(again, models)
        assert again.add("late", near(models["base"], 99)).delta_blocks > 0
        assert again.verify().errors == []


def test_explain_counts_bases_as_used(store: pydedup.Store) -> None:
    add_family(store)
    one = store.explain("one")
    (tensor,) = one.tensors
    base_bytes = store.explain("base").used_bytes
    assert one.used_bytes > base_bytes
    assert tensor.used_bytes == one.used_bytes
    assert tensor.blocks == tensor.distinct_blocks
    assert tensor.shared_blocks == 0
    assert one.shared_bytes == base_bytes
    assert one.removal_frees_bytes == one.used_bytes - base_bytes
    assert {shared.model for shared in one.shared_with} == {"base@1", "two@1"}


def test_diff_of_deltas(store: pydedup.Store) -> None:
    models = add_family(store)
    (tensor,) = store.diff("one", "two").tensors
    a, b = (models[name]["weight"].astype(np.float64) for name in ("one", "two"))
    assert tensor.status == "changed"
    assert tensor.max_abs == np.abs(b - a).max()
    assert store.diff("one", "one").same


# ---- damage -------------------------------------------------------------------------------------


def some_delta(path: Path) -> tuple[int, int, int, int]:
    """Return row id, page, slot and base place of a delta."""
    (row,) = sql(
        path,
        "SELECT id, page_id, slot, base_id FROM pydedup_distinct_blocks "
        "WHERE base_id IS NOT NULL ORDER BY id LIMIT 1",
    )
    return row


def no_base_recorded(path: Path) -> None:
    sql(path, "UPDATE pydedup_distinct_blocks SET base_id = NULL WHERE id = ?", some_delta(path)[0])


def base_of_a_raw_block(path: Path) -> None:
    base = some_delta(path)[3]
    sql(
        path,
        "UPDATE pydedup_distinct_blocks SET base_id = ? WHERE page_id = ? AND slot = ?",
        base + 1,
        base >> 20,
        base & 0xFFFFF,
    )


def another_base(path: Path) -> None:
    number, _, _, base = some_delta(path)
    sql(path, "UPDATE pydedup_distinct_blocks SET base_id = ? WHERE id = ?", base ^ 1, number)


def base_is_a_delta(path: Path) -> None:
    number, page, slot, _ = some_delta(path)
    place = (page << 20) | slot
    sql(path, "UPDATE pydedup_distinct_blocks SET base_id = ? WHERE id = ?", place, number)


def no_such_slot(path: Path) -> None:
    number, _, _, base = some_delta(path)
    last = "SELECT max(slot) FROM pydedup_distinct_blocks WHERE page_id = ?"
    place = (base & ~0xFFFFF) + sql(path, last, base >> 20)[0][0] + 1
    sql(path, "UPDATE pydedup_distinct_blocks SET base_id = ? WHERE id = ?", place, number)


def base_page_is_gone(path: Path) -> None:
    sql(path, "DELETE FROM pydedup_pages WHERE id = ?", some_delta(path)[3] >> 20)


def base_page_was_never_there(path: Path) -> None:
    page = some_delta(path)[3] >> 20
    sql(path, "DELETE FROM pydedup_pages WHERE id = ?", page)
    sql(path, "DELETE FROM pydedup_model_pages WHERE page_id = ?", page)


def base_page_is_retired(path: Path) -> None:
    page = some_delta(path)[3] >> 20
    sql(path, "UPDATE pydedup_pages SET state = 'retired' WHERE id = ?", page)


def base_page_is_not_the_models(path: Path) -> None:
    _, page, _, base = some_delta(path)
    (owner,) = sql(path, "SELECT model_id FROM pydedup_model_pages WHERE page_id = ? LIMIT 1", page)
    sql(
        path,
        "DELETE FROM pydedup_model_pages WHERE page_id = ? AND model_id = ?",
        base >> 20,
        owner[0],
    )


def change_map(path: Path, change: Callable[[BlockMap], tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """Give the map of "one" other bases."""
    with pydedup.open(f"sqlite:///{path}", mode="r") as store:
        model = store._catalog.model("one")
        block_map = model.block_map("weight")
        number = model.row.id
    bases = change(block_map)
    new = BlockMap(block_map.grid, block_map.dtype, block_map.page_ids, block_map.slots, *bases)
    (part,) = new.parts()
    sql(path, "UPDATE pydedup_block_maps SET payload = ? WHERE model_id = ?", part, number)
    forget_maps(f"sqlite:///{path}")


def map_without_a_base(path: Path) -> None:
    def change(block_map: BlockMap) -> tuple[NDArray[Any], NDArray[Any]]:
        assert block_map.bases is not None
        pages, slots = (column.copy() for column in block_map.bases)
        first = int(np.flatnonzero(pages != -1)[0])
        pages[first], slots[first] = -1, 0
        return pages, slots

    change_map(path, change)


def map_with_another_base(path: Path) -> None:
    def change(block_map: BlockMap) -> tuple[NDArray[Any], NDArray[Any]]:
        assert block_map.bases is not None
        return block_map.bases[0], block_map.bases[1] ^ np.uint32(1)

    change_map(path, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_base_recorded, "it is a delta, but no base is recorded"),
        (base_of_a_raw_block, "it is no delta, but a base is recorded"),
        (another_base, "its base is another than recorded"),
        (base_is_a_delta, "its base is another than recorded"),
        (no_such_slot, "its base is another than recorded"),
        (base_page_is_gone, "missing"),
        (base_page_was_never_there, "bases of blocks on page"),
        (base_page_is_retired, "it is retired"),
        (base_page_is_not_the_models, "what it reads is recorded wrongly for pages"),
        (map_without_a_base, "have other bases than recorded"),
        (map_with_another_base, "have other bases than recorded"),
    ],
)
def test_verify_finds_damage_to_bases(
    damage: Callable[[Path], None], message: str, path: Path
) -> None:
    with pydedup.open(f"sqlite:///{path}") as store:
        add_family(store)
        assert store.verify().ok
    damage(path)
    with pydedup.open(f"sqlite:///{path}", mode="r") as store:
        errors = store.verify().errors
    assert any(message in error for error in errors), errors


def test_a_base_that_is_gone_is_an_error_for_readers(path: Path) -> None:
    with pydedup.open(f"sqlite:///{path}") as store:
        add_family(store)
    base_page_is_gone(path)
    with pydedup.open(f"sqlite:///{path}", mode="r") as store, pytest.raises(PageNotFoundError):
        store.load("one")


def test_a_delta_that_nobody_uses_may_lose_its_base(store: pydedup.Store) -> None:
    """Its page stays for others, its base's page does not: no damage."""
    base, own = base_model(), base_model(77)
    store.add("base", base)
    mixed = {"weight": near(base, 5)["weight"], "own": own["weight"]}
    deltas = store.add_many({"mixed": mixed, "other": {"own": own["weight"]}})[0].delta_blocks
    assert deltas > 0
    store.remove("base")
    store.remove("mixed")
    report = store.verify()
    assert report.errors == []
    (note,) = [note for note in report.notes if "base is gone" in note]
    assert f"has {deltas} deltas whose base is gone, which no model is known to use: no" in note
    assert store.load("other")["own"].tobytes() == own["weight"].tobytes()
    store.vacuum()
    assert store.verify().errors == []


@pytest.mark.parametrize("vacuum", [False, True])
def test_a_delta_whose_base_is_gone_is_not_shared(store: pydedup.Store, vacuum: bool) -> None:
    base, own = base_model(), base_model(77)
    store.add("base", base)
    mixed = {"weight": near(base, 5)["weight"], "own": own["weight"]}
    store.add_many({"mixed": mixed, "other": {"own": own["weight"]}})
    store.remove("base")
    store.remove("mixed")
    if vacuum:
        store.vacuum()
    store.add("mixed", mixed, version="2")
    assert store.verify().errors == []
    store.vacuum()
    assert store.load("mixed")["weight"].tobytes() == mixed["weight"].tobytes()
    assert store.verify().errors == []


def test_places_of_bases_are_page_and_slot(store: pydedup.Store, path: Path) -> None:
    add_family(store)
    base_map = store._catalog.model("base").block_map("weight")
    places = sql(path, "SELECT base_id FROM pydedup_distinct_blocks WHERE base_id IS NOT NULL")
    pages, slots = split_places(np.array([place[0] for place in places], np.int64))
    known = set(zip(base_map.page_ids.tolist(), base_map.slots.tolist(), strict=True))
    assert set(zip(pages.tolist(), slots.tolist(), strict=True)) <= known


@pytest.mark.parametrize(("kept_rows", "removed"), [(12_000, ()), (11_400, ("fine",))])
def test_full_pages_of_deltas_move_only_with_their_bases(
    store: pydedup.Store, kept_rows: int, removed: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((12_000, 128)).astype(np.float32)
    fine = base + rng.standard_normal(base.shape).astype(np.float32) * np.float32(1e-4)
    own = rng.standard_normal((900, 128)).astype(np.float32)
    tables = {
        "base": base,
        "fine": fine,  # pages of deltas
        "part": fine[:kept_rows],  # the deltas that stay in use when fine is removed
        "head": base[:1000],  # reads little of a page of bases
        "own": own,
        "mixed": np.concatenate([own[:300], rng.random((100, 128), np.float32)]),
    }
    for name, table in tables.items():  # cut alike, however long they are
        store.add(name, {"w": table}, block_shape=(64, 64))
    for name in removed:
        store.remove(name)
    plan = store.vacuum(dry_run=True)
    report = store.vacuum()
    assert plan.rewritten_pages == report.rewritten_pages > 0
    assert (report.rewritten_pages < report.pages_before) == bool(removed)
    assert store.verify().ok
    for name in removed:  # matches what nobody uses, too
        store.add(name, {"w": tables[name]}, block_shape=(64, 64))
    assert store.verify().ok
    for name, table in tables.items():
        np.testing.assert_array_equal(store.load(name)["w"], table)


def test_pages_move_with_bases_that_move_with_theirs(store: pydedup.Store) -> None:
    """Of three pages: that of deltas on blocks which lie beside deltas on what is moved."""

    def blocks(count: int, seed: int) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((32 * count, 32)).astype(np.float32)

    def close(array: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        noise = np.random.default_rng(seed).standard_normal(array.shape)
        return (array * (1 + 1e-5 * noise)).astype(np.float32)

    first, own = blocks(4, 1), blocks(3, 3)
    models = {
        "base": {"w": first, "removed": blocks(4, 2)},
        "mixed": {"w": close(first, 4), "own": own},
        "far": {f"w{number}": close(own, 10 + number) for number in range(40)},
    }
    with small_pages(32):
        for name, model in models.items():
            store.add(name, model, block_shape=(32, 32))
        (beside,) = set(store._catalog.model("mixed").page_ids()) - {1}
        bases = store._catalog.model("far").block_map("w3").bases
        assert bases is not None
        assert set(bases[0].tolist()) == {beside}
        store.remove("base")
        report = store.vacuum()
    assert report.rewritten_pages == report.pages_before
    assert store.verify().ok
    for name in ("mixed", "far"):
        for tensor, array in store.load(name).items():
            np.testing.assert_array_equal(array, models[name][tensor])
