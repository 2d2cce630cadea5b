# SPDX-License-Identifier: Apache-2.0
"""Values that their columns cannot have, in every table: told, left out, repaired."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.adapter_options import only_sound_rows
from pydedup.errors import CorruptStoreError, DuplicateError, NotAStoreError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.jobs import Job

from .damage import flip_last, put

TABLES = {
    "aliases": ["name", "alias", "model_id"],
    "artifacts": ["model_id", "name", "part", "media_type", "payload"],
    "block_maps": ["model_id", "ordinal", "part", "payload"],
    "distinct_blocks": ["hash128", "page_id", "slot", "base_id"],
    "jobs": ["id", "spec", "cursor", "state"],
    "meta": ["name", "value"],
    "model_pages": ["model_id", "page_id", "blocks", "bytes"],
    "models": [
        *("name", "version", "state", "created_at", "policy", "certificate", "metadata"),
        *("logical_bytes", "digest"),
    ],
    "pages": ["state", "retired_at", "checksum", "payload"],
    "signatures": ["segment", "grp", "payload"],
    "source_hashes": ["model_id", "ordinal", "part", "payload"],
    "tensors": ["model_id", "ordinal", "name", "dtype", "shape", "block_shape"],
}


@pytest.mark.parametrize("table", TABLES)
def test_values_that_their_columns_cannot_have(table: str, tmp_path: Path) -> None:
    """SQLite keeps the type of a value beside it, so a flipped bit makes it another."""
    rng = np.random.default_rng(0)
    models = {str(k): {"w": rng.standard_normal((40, 40))} for k in range(2)}
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    path, other = tmp_path / "store.db", tmp_path / "other.db"
    with pydedup.open(path) as store:
        for version, model in models.items():
            store.add("m", model, version=version, metadata={"t": "x"}, graph=graph)
        store.alias("m", "prod", "1")
        with store._adapter.transaction():
            Job(store._adapter, "add").beat()
    wrong = ("x'fffe'", "CAST(x'fffe' AS TEXT)", "'text'", "1.5")
    for number, column in enumerate(TABLES[table]):
        for value in ("NULL", wrong[number % len(wrong)]):
            other.unlink(missing_ok=True)
            shutil.copy(path, other)
            if put(other, f"pydedup_{table}", column, value):
                told = look_at_all(other, models, f"{column} = {value}")
                may_be = value == "NULL" and column in ("base_id", "retired_at")
                may_be |= value == "1.5" and column in ("created_at", "retired_at")
                assert told or may_be or value not in ("NULL", "1.5"), (column, value)


@pytest.mark.parametrize("value", [1 << 20, 1 << 31, 1 << 40, -1])
@pytest.mark.parametrize("column", ["page_id", "slot"])
def test_an_add_shares_nothing_with_a_place_that_cannot_be(
    column: str, value: int, tmp_path: Path
) -> None:
    """Of a slot beyond all that a page has, an add asked for an entry of each before it: 32 GiB."""
    path = tmp_path / "store.db"
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    with pydedup.open(path) as store:
        store.add("a", {"w": w})
    one = "id = (SELECT min(id) FROM pydedup_distinct_blocks)"
    assert put(path, "pydedup_distinct_blocks", column, str(value), one)
    with pydedup.open(path) as store:
        report = store.add("b", {"w": w})
        assert report.damaged_pages == (value if column == "page_id" else 1,)
        np.testing.assert_array_equal(store.load("b")["w"], w)


@pytest.mark.parametrize(
    ("column", "value", "where"),
    [
        ("payload", "NULL", "grp = 0"),
        ("payload", "'text'", "grp > 0"),
        ("segment", str((1 << 63) - 1), "grp = 0"),
    ],
)
def test_rows_of_the_index_that_are_damaged_are_left_out(
    column: str, value: str, where: str, tmp_path: Path
) -> None:
    """It is made anew, and nothing of a model depends on it."""
    rng = np.random.default_rng(0)
    models = {name: {"w": rng.standard_normal((40, 40))} for name in ("one", "two")}
    near = {"w": models["one"]["w"] * (1 + 1e-6)}
    path, copy = tmp_path / "store.db", tmp_path / "copy.db"
    with pydedup.open(path) as store:
        store.add_many(models)
    assert put(path, "pydedup_signatures", column, value, where)
    with pydedup.open(path) as store:
        store.backup(tmp_path / "backup.db")
        store.copy_to(copy)
        store.add("near", near)
        store.remove("two")
        store.vacuum()
        for name in ("one", "near"):
            assert np.array_equal(store.load(name)["w"], {**models, "near": near}[name]["w"])
    with pydedup.open(copy) as store:
        assert store.verify().ok
        assert store.add("near", near).delta_blocks == 1


NAMES = ("one", "two", "three")
ROWS = {  # of the second of two models: where its row is, what is said of it, what a repair mends
    "aliases": ("name = 'two'", "model_id", "name 'two', alias 'prod'", False),
    "distinct_blocks": ("id = 2", "hash128", "id 2", True),
    "model_pages": ("model_id = 2", "bytes", "model_id 2, page_id 2", True),
    "models": ("id = 2", "created_at", "id 2, name 'two', version '1'", False),
    "pages": ("id = 2", "checksum", "id 2", True),
    "source_hashes": ("model_id = 2", "payload", "ordinal 0", False),
    "tensors": ("model_id = 2", "shape", "model_id 2, ordinal 0", False),
}


@pytest.mark.parametrize("table", ROWS)
def test_one_row_with_a_value_that_its_column_cannot_have(table: str, tmp_path: Path) -> None:
    """It is told, and all else is verified."""
    where, column, row, is_mended = ROWS[table]
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        for name, model in models.items():
            store.add(name, model, policy=policies.Bounded(0.1) if name == "two" else None)
        store.alias("two", "prod", "1")
    shutil.copy(path, healthy)
    assert put(path, f"pydedup_{table}", column, "NULL", where)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_tensors SET shape = '[9]' WHERE model_id = 3")
    with pydedup.open(path) as store:
        errors = store.verify().errors
        (said,) = [error for error in errors if error.startswith("column ")]
        assert re.fullmatch(
            f"column {column} of pydedup_{table} has NULL where .* must be, in the row of {row}",
            said,
        )
        other = [error for error in errors if "three@1" in error]
        assert other == [
            "three@1 has tensors of 36 bytes where 324 are recorded: rows of them are missing; "
            "restore a backup"
        ]
        mended = [error for error in store.verify(repair_from=healthy).errors if error not in other]
        assert (mended == []) is is_mended
        for name in ("one", "two") if is_mended else ("one",):
            assert np.array_equal(store.load(name)["w"], models[name]["w"])


@pytest.mark.parametrize(
    ("column", "value"), [("payload", "'text'"), ("payload", "5"), ("checksum", "'text'")]
)
def test_a_page_with_a_value_of_another_type_is_repaired(
    column: str, value: str, tmp_path: Path
) -> None:
    """SQLite refuses to change such a row in any way, which ended repairs and vacuums."""
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        for name, model in models.items():
            store.add(name, model)
    shutil.copy(path, healthy)
    assert put(path, "pydedup_pages", column, value, "id = 2")
    with pydedup.open(path) as store:
        assert list(store.verify().damaged_pages.values()) == [["two@1"]]
        assert store.verify(repair_from=healthy).errors == []
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])
    assert put(path, "pydedup_pages", "payload", "CAST(payload AS TEXT)", "id = 1")
    with pydedup.open(path) as store:
        store.remove("one")
        store.vacuum()
        assert store.verify().errors == []


@pytest.mark.parametrize(("column", "value"), [("created_at", "NULL"), ("metadata", "x'7bff'")])
def test_a_page_is_repaired_beside_a_damaged_row_of_a_model(
    column: str, value: str, tmp_path: Path, change_page: Callable[..., None]
) -> None:
    """A damaged row of a model ended the repair; one that is no UTF-8 ended verify, too."""
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        store.add_many(models)  # on one page
        before = store.info("two").info
    shutil.copy(path, healthy)
    text = value if value == "NULL" else f"CAST({value} AS TEXT)"
    assert put(path, "pydedup_models", column, text, "id = 2")
    change_page(f"sqlite:///{path}", 1, flip_last)
    with pydedup.open(path) as store:
        row = [error for error in store.verify().errors if error.startswith("column ")]
        assert re.fullmatch(f"column {column} .* in the row of id 2, name 'two', version '1'", *row)
        repair = store.verify(repair_from=healthy).repair
        assert repair is not None
        ((page, readers),) = [(one.page, one.models) for one in repair.missing]
        assert (page, readers) == (1, ("the model with id 2",)), "it is kept for that one"
        for name in ("one", "three"):
            assert np.array_equal(store.load(name)["w"], models[name]["w"])
    was = repr(before.created_at) if column == "created_at" else "'{}'"
    assert put(path, "pydedup_models", column, was, "id = 2")
    with pydedup.open(path) as store:
        assert store.verify(repair_from=healthy).errors == []
        assert store.info("two").info == before
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])


def look_at_all(path: Path, models: dict[str, dict[str, np.ndarray]], what: str) -> bool:
    """Call all there is of a damaged store: what is given is right, and errors say what is wrong.

    Returns whether opening it, or `verify`, told.
    """
    copy, x = path.with_name("copy.db"), np.ones((1, 40), np.float32)
    calls: list[Callable[[pydedup.Store], object]] = [
        *(pydedup.Store.models, pydedup.Store.stats, pydedup.Store.sizes, pydedup.Store.sharing),
        lambda store: store.stats(by="t"),
        lambda store: store.info("m@1"),
        lambda store: store.explain("m@1"),
        lambda store: store.diff("m@0", "m@1"),
        lambda store: store.predict("m@prod", x),
        lambda store: store.vacuum(dry_run=True),
        lambda store: store.copy_to(copy),
        lambda store: store.add("m", models["1"]),
        lambda store: store.remove("m@0"),
        lambda store: store.vacuum(),
    ]
    told = True
    with contextlib.suppress(CorruptStoreError, NotAStoreError), pydedup.open(path) as store:
        for version, model in models.items():
            with contextlib.suppress(CorruptStoreError, NotFoundError):
                found = store.load(f"m@{version}")
                # A name that is another text is a name; of tensors, verify knows.
                assert [w.tolist() for w in found.values()] == [model["w"].tolist()], what
        with contextlib.suppress(CorruptStoreError):
            told = not store.verify().ok
        for call in calls:
            copy.unlink(missing_ok=True)
            with contextlib.suppress(CorruptStoreError, NotFoundError, DuplicateError):
                call(store)
    return told


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_schema_that_is_no_text(mode: str, tmp_path: Path) -> None:
    """What SQLite says of it is none either, which Python's module refuses to tell."""
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", {"w": np.ones(9)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"CREATE TABLE pydedup_m", b"CREATE T\xffBLE pydedup_m"))
    with pytest.raises(CorruptStoreError, match=r"near \"T\ufffdBLE\": syntax error; .*backup"):
        pydedup.open(path, mode=mode)


def test_where_rows_of_one_store_are_left_out_those_of_another_are_an_error(tmp_path: Path) -> None:
    """As in a copy between two of them."""
    for name in ("one", "other"):
        with pydedup.open(tmp_path / f"{name}.db") as store:
            store.add("m", {"w": np.ones(3)})
        assert put(tmp_path / f"{name}.db", "pydedup_models", "created_at", "x'fffe'")
    with pydedup.open(tmp_path / "one.db") as one, pydedup.open(tmp_path / "other.db") as other:
        told: list[str] = []
        with only_sound_rows(one._adapter, lambda table, *_: told.append(table)):
            assert one._adapter.models() == []
            assert told == ["models"]
            with pytest.raises(CorruptStoreError, match="column created_at"):
                other._adapter.models()
        assert told == ["models"]


@pytest.mark.parametrize(
    ("table", "row"), [("models", "id 1, version '1'"), ("model_sizes", "version '1'")]
)
def test_a_row_is_named_by_those_of_its_keys_that_are_sound(
    table: str, row: str, tmp_path: Path
) -> None:
    """Also one of a view, of which people read."""
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", {"w": np.ones(3)})
    assert put(path, "pydedup_models", "name", "x'fffe'")
    with pydedup.open(path) as store:
        adapter = store._adapter
        read = adapter.models if table == "models" else lambda: adapter.view(table)
        with pytest.raises(CorruptStoreError) as caught:
            read()
    said = rf"column name of pydedup_{table} has b'\xff\xfe' where text must be, in the row of "
    assert said + row + ";" in str(caught.value)


@pytest.mark.parametrize("value", ["", "?", "01", "9" * 5000])
def test_a_version_of_the_tables_that_is_no_number(value: str, tmp_path: Path) -> None:
    """One of many digits was a ValueError."""
    path = tmp_path / "store.db"
    pydedup.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE pydedup_meta SET value = ? WHERE name = 'schema_version'", [value]
        )
    for mode in ("a", "r"):
        with pytest.raises(NotAStoreError, match=r"not its own \(see pydedup_meta"):
            pydedup.open(path, mode=mode)
