# SPDX-License-Identifier: Apache-2.0
"""What is recorded of one model, or of a job, is damaged: all others stay usable, and it can go."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.cli.app import main
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.testing._contract_base import with_option

from .damage import change, put

NAMES = ("one", "two", "three")
MODELS = {
    name: {"w": np.random.default_rng(seed).standard_normal((64, 64), np.float32)}
    for seed, name in enumerate(NAMES)
}


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model)
        store.alias("two", "prod", "1")
        store.alias("one", "prod", "1")


def others_are_usable(store: pydedup.Store) -> None:
    """Look at those that are not damaged, and add some."""
    assert {size.info.name for size in store.sizes()} == {"one", "three"}
    near = {"w": MODELS["two"]["w"] * np.float32(1.0001)}
    for name in ("one", "four"):
        store.add(name, near)
        assert np.array_equal(store.load(name)["w"], near["w"])
        store.remove(f"{name}@{store.versions(name)[-1].version}")
    for name in ("one", "three"):
        assert np.array_equal(store.load(f"{name}@1")["w"], MODELS[name]["w"])


def is_removed(store: pydedup.Store) -> None:
    """Remove the damaged model, after which all is sound."""
    with pytest.raises(ArgumentError, match="alias 'prod' points at two@1"):
        store.remove("two@1")
    store.alias("two", "prod", None)
    assert store.remove("two@1") == ["two@1"]
    store.vacuum()
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])
    assert [info.address for info in store.models()] == ["one@1", "three@1"]


@pytest.mark.parametrize("column", ["created_at", "metadata", "logical_bytes", "digest", "policy"])
def test_a_row_with_a_value_that_its_column_cannot_have(
    column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, "pydedup_models", column, "NULL", "id = 2")
    row = "in the row of id 2, name 'two', version '1'"
    assert main(["ls", str(path)]) == 4
    out, err = capsys.readouterr()
    assert "one@1" in out
    assert "three@1" in out
    assert re.search(f"{column} .* {row}; remove that model, or restore a backup", err)
    assert main(["ls", str(path), "one", "--json"]) == 4
    assert [model["model"] for model in json.loads(capsys.readouterr().out)["models"]] == ["one@1"]
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError, match=row):
            store.models()
        told = [error for error in store.verify().errors if not error.startswith("database")]
        assert [error.endswith(row) for error in told] == [True]
        others_are_usable(store)
        store.quotas.set("tenant", "a", "1GB")
        others_are_usable(store)  # which are not those that a quota is of
        with pytest.raises(CorruptStoreError, match=row):
            store.add("four", MODELS["one"], metadata={"tenant": "a"})
        assert {size.info.name for size in store.sizes()} == {"one", "three"}
    for command in (["alias", str(path), "two", "prod", "--delete"], ["rm", str(path), "two@1"]):
        assert main(command) == 0
    with pydedup.open(path) as store:
        store.vacuum()
        assert store.verify().ok
        assert [info.address for info in store.models()] == ["one@1", "three@1"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("UPDATE {models} SET created_at = ? WHERE name = 'two'", 1e300),
        ("UPDATE {models} SET metadata = ? WHERE name = 'two'", "["),
    ],
)
def test_a_value_that_says_nothing(
    setting: str, value: object, store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store_url)
    change(store_url, setting, value)
    assert main(["ls", store_url]) == 4
    out, err = capsys.readouterr()
    assert "one@1" in out
    assert "two@1" in err
    with pydedup.open(store_url) as store:
        if value == "[":
            (told,) = store.stats(by="tenant").damaged
            assert told.startswith("the metadata of two@1 cannot be read")
        others_are_usable(store)
        is_removed(store)


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM {tensors} WHERE model_id = ?",
        "DELETE FROM {block_maps} WHERE model_id = ?",
        "UPDATE {tensors} SET shape = '[1e999]' WHERE model_id = ?",
        "UPDATE {tensors} SET block_shape = '[1e999, 2]' WHERE model_id = ?",
    ],
)
def test_adds_go_on_beside_a_model_whose_rows_are_lost(loss: str, store_url: str) -> None:
    """They ended in its damage: it is one of those in which similar blocks are looked for."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        model_id = store.info("two").info.id
    change(store_url, loss, model_id)
    with pydedup.open(store_url) as store:
        with pytest.raises(CorruptStoreError, match="two@1"):
            store.load("two@1")
        for name in ("four", "two"):  # another, and its next version
            store.add(name, MODELS["two"])
            assert np.array_equal(store.load(name)["w"], MODELS["two"]["w"])
            store.remove(f"{name}@{store.versions(name)[-1].version}")
        is_removed(store)


def test_a_time_that_is_no_number(postgres_url: str, postgres_schema: str) -> None:
    """It is not what it was, and so the model was taken for that of another store."""
    url = with_option(postgres_url, f"schema={postgres_schema}")
    fill(url)
    change(url, "UPDATE {models} SET created_at = ? WHERE name = 'two'", math.nan)
    with pydedup.open(url) as store:
        assert store.verify().errors == [
            "when two@1 was added cannot be read (nan); restore a backup"
        ]
        for _ in range(2):
            for name, model in MODELS.items():
                assert np.array_equal(store.load(name)["w"], model["w"])


@pytest.mark.parametrize("size", [0, 1 << 40])
def test_the_size_of_a_page_that_its_row_has(
    size: int, mysql_database: str, tmp_path: Path
) -> None:
    """It is a column of its own in MariaDB, and what `stats` and vacuums go by."""
    healthy = f"sqlite:///{tmp_path}/healthy.db"
    for url in (healthy, mysql_database):
        fill(url)
    change(mysql_database, "UPDATE {pages} SET payload_bytes = ? WHERE id = 2", size)
    with pydedup.open(mysql_database) as store:
        said = "page 2: its size is not the one of its row; read by two@1"
        assert store.verify().errors == [said]
        assert store.verify(repair_from=healthy).errors == []
        store.vacuum()
        pages = store._adapter.read_pages([row.id for row in store._adapter.page_rows()])
        assert store.stats().page_bytes == sum(len(payload) for _, payload in pages)
        for name, model in MODELS.items():
            assert np.array_equal(store.load(name)["w"], model["w"])


def test_a_job_that_cannot_be_read_is_dead(store_url: str) -> None:
    """A vacuum ended in them, or they lived for ever."""
    process = {"boot": "another", "namespace": "n", "pid": 1, "started": "1"}
    sound = json.dumps({"kind": "add", "models": [], "process": process})
    now = repr(time.time())
    damaged = [('{"models": [1e999]}', now), ("[" * 9, now)]
    damaged += [(sound, cursor) for cursor in ("nan", "inf", "1e300", "")]
    with pydedup.open(store_url) as store:
        with store._adapter.transaction():
            store._adapter.put_job("sound", sound, now, "running")
            for number, (spec, cursor) in enumerate(damaged):
                store._adapter.put_job(f"damaged{number}", spec, cursor, "running")
        store.vacuum()
        assert [job[0] for job in store._adapter.jobs()] == ["sound"]


@pytest.mark.parametrize("column", ["spec", "cursor", "state"])
def test_a_damaged_row_of_a_job(column: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("one", MODELS["one"])
        with store._adapter.transaction():
            for name in ("other", "damaged"):
                store._adapter.put_job(name, '{"models": []}', repr(time.time()), "running")
    assert put(path, "pydedup_jobs", column, "NULL", "id = 'damaged'")
    said = f"column {column} of pydedup_jobs has NULL where text must be, in the row of id 'damaged"
    with pydedup.open(path) as store:
        assert any(error.startswith(said) for error in store.verify().errors)
        shutil.copy(path, tmp_path / "other.db")
        with pytest.raises(ArgumentError, match="are one store"):
            store.copy_to(path, ["one"])
        store.copy_to(tmp_path / "other.db", ["one"])
        with pytest.raises(CorruptStoreError, match=f"{said}'; a vacuum deletes it"):
            store._adapter.jobs()
        store.vacuum()
        assert [job[0] for job in store._adapter.jobs()] == ["other"]
        assert store.verify().ok
        save_file(MODELS["two"], tmp_path / "two.safetensors")
        store.add("two", tmp_path / "two.safetensors")


@pytest.mark.parametrize("row_id", [(1 << 63) - 1, 1 << 45])
@pytest.mark.parametrize("table", ["models", "pages"])
def test_an_id_that_no_new_one_can_follow(table: str, row_id: int, tmp_path: Path) -> None:
    """In SQLite they come behind: an add ended in an OverflowError, a full disk, or was lost."""
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, f"pydedup_{table}", "id", str(row_id), "id = 2")
    far = {"w": np.random.default_rng(9).standard_normal((65, 64), np.float32)}
    with pydedup.open(path) as store:
        assert not store.verify().ok
        for name in ("one", "four"):
            with pytest.raises(CorruptStoreError, match=f"{table} .* id .* restore a backup"):
                store.add(name, far)
        for name in ("one", "three"):
            assert np.array_equal(store.load(name)["w"], MODELS[name]["w"])
        store.copy_to(tmp_path / "other.db", ["one", "three"])


@pytest.mark.parametrize(("column", "value"), [("page_id", "NULL"), ("id", str((1 << 63) - 1))])
def test_a_damaged_row_of_where_a_block_is(column: str, value: str, tmp_path: Path) -> None:
    """A repair ended in it, or did not see it, and adds failed."""
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    fill(f"sqlite:///{path}")
    shutil.copy(path, healthy)
    assert put(path, "pydedup_distinct_blocks", column, value, "id = 2")
    with pydedup.open(path) as store:
        assert any("no distinct block names it" in error for error in store.verify().errors)
        assert store.verify(repair_from=healthy).errors == []
        for name, model in MODELS.items():
            assert store.add(f"{name}@2", model).pages == 0
        store.add("four", {"w": np.random.default_rng(9).standard_normal((65, 64), np.float32)})
        assert store.verify().errors == []


def test_a_lost_id_of_the_store_is_told(store_url: str, tmp_path: Path) -> None:
    fill(store_url)
    change(store_url, "DELETE FROM {meta} WHERE name = ?", "store_id")
    with pydedup.open(store_url) as store:
        (error,) = store.verify().errors
        assert error.endswith("has no store_id in meta; restore a backup")
        store.copy_to(tmp_path / "other.db", ["one"])
        store.add("four", MODELS["one"])
        with pydedup.open(tmp_path / "other.db") as other:
            for copied in (store, other):
                assert np.array_equal(copied.load("one")["w"], MODELS["one"]["w"])


@pytest.mark.parametrize("name", ["store_id", "epoch", "quotas", "page_format"])
def test_a_damaged_row_of_what_is_recorded_of_the_store(name: str, tmp_path: Path) -> None:
    """The store could not even be opened to be read."""
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    with pydedup.open(path) as store:
        store.quotas.set("tenant", "a", "1GB")
    assert put(path, "pydedup_meta", "value", "5", f"name = '{name}'")
    said = f"column value of pydedup_meta has 5 where text must be, in the row of name '{name}'"
    for mode in ("r", "a"):
        with pydedup.open(path, mode=mode) as store:
            assert said in store.verify().errors
            for model, arrays in MODELS.items():
                assert np.array_equal(store.load(model)["w"], arrays["w"])
    with pydedup.open(path) as store:
        if name in ("epoch", "quotas"):
            with pytest.raises(CorruptStoreError, match="column value of pydedup_meta has 5 where"):
                store.add("four", MODELS["one"])
