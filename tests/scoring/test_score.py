# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: what is read, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, ReadOnlyError
from pydedup.graph import Graph, Node
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import as_user, password_of, unused_name

from .conftest import Tables, add, assert_right, features, linear, predictions, query_of

Make = Callable[..., str]


def test_each_row_is_predicted_and_written(tables: Tables, source: Make, new_name: Make) -> None:
    w, x, into = add(tables.url, "m@1"), features(2500), new_name()
    told: list[tuple[str, int, int]] = []
    table = source(x)
    with pydedup.open(tables.url) as store:
        report = store.score(
            query_of(table), "m@1", into=into, batch=1000, progress=lambda *s: told.append(s)
        )
        again = store.score(query_of(table), "m", into=into)
    assert (report.model, report.rows, report.skipped, report.failed) == ("m@1", 2500, 0, 0)
    assert report.table.endswith(into)
    assert report.seconds > 0
    assert [done for _, done, _ in told] == [1000, 2000, 2500]
    assert_right(predictions(tables, into), x, w)
    assert {row[0] for row in tables.run(f"SELECT DISTINCT model FROM {into}")} == {"m@1"}
    assert (again.rows, again.skipped) == (0, 2500)


def test_the_key_may_be_any_column_and_any_kind(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w, x, into = add(tables.url, "m@1"), features(5), new_name()
    table = source(x)
    as_text = "CONCAT('k', id)" if tables.kind != "sqlite" else "'k' || id"
    with pydedup.open(tables.url) as store:
        query = f"SELECT f0, {as_text} AS name, f1, f2 FROM {table}"
        store.score(query, "m@1", into=into, key="name")
        assert store.score(query, "m@1", into=into, key="name").skipped == 5
        with pytest.raises(
            ArgumentError, match="no column 'other' for the key; there is: f0, name"
        ):
            store.score(query, "m@1", into=new_name(), key="other")
    found = dict(tables.run(f"SELECT name, prediction FROM {into}"))
    assert_right({int(name[1:]): value for name, value in found.items()}, x, w)


def test_several_outputs_are_columns_and_many_one_value(
    tables: Tables, source: Make, new_name: Make
) -> None:
    x, few, many = features(4), new_name(), new_name()
    w32, w33 = add(tables.url, "few@1", outputs=32), add(tables.url, "many@1", outputs=33)
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table), "few@1", into=few)
        store.score(query_of(table), "many@1", into=many)
        # What was written is itself what a query may read.
        back = new_name()
        _, graph = linear()
        store.add("narrow@1", {"w": np.ones((1, 33), np.float32)}, graph=graph)
        store.score(f"SELECT id, prediction FROM {many}", "narrow@1", into=back)
    columns = ", ".join(f"prediction_{i}" for i in range(32))
    rows = tables.run(f"SELECT {columns} FROM {few} ORDER BY id")
    np.testing.assert_allclose(np.array(rows), x @ w32.T, rtol=1e-5, atol=1e-6)
    found = predictions(tables, many)
    for i, row in enumerate(x @ w33.T):
        value = found[i + 1]
        vector = value if isinstance(value, list) else np.frombuffer(value, "<f4")
        np.testing.assert_allclose(vector, row, rtol=1e-5, atol=1e-6)
    sums = predictions(tables, back)
    wanted = (x @ w33.T).sum(axis=1)
    np.testing.assert_allclose([sums[i + 1] for i in range(4)], wanted, rtol=1e-4, atol=1e-5)


def test_several_named_outputs_are_json(tables: Tables, source: Make, new_name: Make) -> None:
    x, into = features(3), new_name()
    w = np.eye(3, dtype=np.float32)
    nodes = (
        Node("linear", ("x",), "y", {"weight": "w"}),
        Node("relu", ("y",), "z"),
    )
    with pydedup.open(tables.url) as store:
        store.add("m@1", {"w": w}, graph=Graph(("x",), ("y", "z"), nodes))
        table = source(x)
        store.record(1000)
        store.score(query_of(table), "m@1", into=into, batch=1)
        # One batch shows that it is none of arrays, and is predicted again; no other one is.
        assert len(store.recorded().owners) == 4
    for key, text in tables.run(f"SELECT id, prediction FROM {into}"):
        named = json.loads(text)
        np.testing.assert_allclose(named["y"], x[key - 1], rtol=1e-6)
        np.testing.assert_allclose(named["z"], np.maximum(x[key - 1], 0), rtol=1e-6)


@pytest.mark.parametrize("form", ["blob", "json", "array"])
def test_features_in_one_column(tables: Tables, new_name: Make, form: str) -> None:
    if form == "array" and not tables.kind.startswith("postgres"):
        pytest.skip("arrays are PostgreSQL's")
    w, x, table, into = add(tables.url, "m@1"), features(50), new_name(), new_name()
    blob = {"sqlite": "BLOB", "mysql": "LONGBLOB"}.get(tables.kind, "BYTEA")
    kind = {"blob": blob, "json": "TEXT", "array": "REAL[]"}[form]
    value: dict[str, Callable[[np.ndarray], object]] = {
        "blob": lambda row: row.tobytes(),
        "json": lambda row: json.dumps(row.tolist()),
        "array": lambda row: row.tolist(),
    }
    tables.run(f"CREATE TABLE {table} (id BIGINT, v {kind})")
    rows = [[i + 1, value[form](row)] for i, row in enumerate(x)]
    tables.run(f"INSERT INTO {table} VALUES (?, ?)", rows)
    short = value[form](x[0, :2])
    tables.run(f"INSERT INTO {table} VALUES (?, ?)", [[51, short], [52, None]])
    with pydedup.open(tables.url) as store:
        report = store.score(f"SELECT id, v FROM {table}", "m@1", into=into, on_error="skip")
    assert_right(predictions(tables, into), x, w)
    assert {f.key: f.reason for f in report.failures} == {
        51: "v holds 2 numbers, and the model takes 3",
        52: "v is NULL",
    }


def test_models_of_ids_take_integers(tables: Tables, new_name: Make) -> None:
    table, into, lists = new_name(), new_name(), new_name()
    weight = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    nodes = (
        Node("embedding", ("ids",), "e", {"weight": "w"}),
        Node("mean", ("e",), "m", attrs={"axis": [1, 2]}),
    )
    with pydedup.open(tables.url) as store:
        store.add("e@1", {"w": weight}, graph=Graph(("ids",), ("m",), nodes))
    tables.run(f"CREATE TABLE {table} (id INTEGER, a INTEGER, b INTEGER, v TEXT)")
    rows = [[1, 5, 99, "[1, 2, 3]"], [2, 0, 100, "[4]"], [3, -1, 7, "[1.5]"], [4, 8, 8, "[8, 8]"]]
    tables.run(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
    with pydedup.open(tables.url) as store:
        report = store.score(
            f"SELECT id, a, b FROM {table}", "e@1", into=into, on_error="skip", key="id"
        )
        other = store.score(f"SELECT id, v FROM {table}", "e@1", into=lists, on_error="skip")
    found = predictions(tables, into)
    assert report.failed == 2
    assert set(found) == {1, 4}
    assert found[1] == pytest.approx(weight[[5, 99]].mean(), rel=1e-5)
    # One out of range does not take the others of its batch along.
    assert {failure.key for failure in report.failures} == {2, 3}
    found = predictions(tables, lists)
    assert set(found) == {1, 2, 4}
    assert found[1] == pytest.approx(weight[[1, 2, 3]].mean(), rel=1e-5)
    assert [f.reason for f in other.failures] == ["v is 1.5, and the model takes integer ids"]


def test_a_query_that_finds_nothing_makes_the_table(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", outputs=2)
    into, table = new_name(), source(features(1))
    with pydedup.open(tables.url) as store:
        report = store.score(query_of(table, "WHERE id < 0"), "m@1", into=into)
    assert (report.rows, report.skipped, report.failed) == (0, 0, 0)
    assert tables.run(f"SELECT id, prediction_0, prediction_1, model FROM {into}") == []


def test_a_table_of_ones_own(tables: Tables, source: Make, new_name: Make) -> None:
    w, x = add(tables.url, "m@1"), features(5)
    table, own, loose, other = source(x), new_name(), new_name(), new_name()
    tables.run(f"CREATE TABLE {own} (at INTEGER, id BIGINT NOT NULL UNIQUE, prediction REAL)")
    tables.run(f"CREATE TABLE {loose} (id BIGINT NOT NULL, prediction REAL)")
    tables.run(f"CREATE TABLE {other} (id BIGINT PRIMARY KEY, answer REAL)")
    with pydedup.open(tables.url) as store:
        store.score(query_of(table), "m@1", into=own)
        with pytest.raises(ArgumentError, match=r"'id' of table .* is not unique by itself"):
            store.score(query_of(table), "m@1", into=loose)
        with pytest.raises(ArgumentError, match="has no column 'prediction'"):
            store.score(query_of(table), "m@1", into=other)
        # All its keys are there, so that nothing was to be written, and nothing was said.
        with pytest.raises(ArgumentError, match=r"has no column 'prediction'.* it has: id, f0"):
            store.score(query_of(table), "m@1", into=table)
        with pytest.raises(ArgumentError, match="has no column 'k' for the key"):
            store.score(f"SELECT id AS k, f0, f1, f2 FROM {table}", "m@1", into=own)
    found = predictions(tables, own)
    np.testing.assert_allclose([found[i + 1] for i in range(5)], (x @ w.T)[:, 0], rtol=1e-4)


def test_a_view_is_no_table_to_write_to(tables: Tables, new_name: Make) -> None:
    """One was to make the key of a view its primary key, which nobody can."""
    add(tables.url, "m@1")
    table, view = new_name(), new_name().replace("t_", "v_")
    tables.run(f"CREATE TABLE {table} (id BIGINT PRIMARY KEY, prediction REAL)")
    tables.run(f"CREATE VIEW {view} AS SELECT * FROM {table}")
    said = "is a view, and no index makes its column 'id' unique, .*; name the table that it is of,"
    with pydedup.open(tables.url) as store, pytest.raises(ArgumentError, match=said):
        store.score("SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c", "m@1", into=view)
    tables.run(f"DROP VIEW {view}")


def test_a_store_that_is_read_only_writes_elsewhere(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w, x, into = add(tables.url, "m@1"), features(5), new_name()
    table = source(x)
    with pydedup.open(tables.url, mode="r") as store:
        with pytest.raises(ReadOnlyError, match="--source"):
            store.score(query_of(table), "m@1", into=into)
        with pytest.raises(ReadOnlyError, match="name the version: m@1"):
            store.score(query_of(table), "m", into=into, source=tables.url)
        store.score(query_of(table), "m@1", into=into, source=tables.url)
    assert_right(predictions(tables, into), x, w)


def test_another_database_than_the_stores(
    tables: Tables, source: Make, new_name: Make, tmp_path: Path
) -> None:
    models = f"sqlite:///{tmp_path / 'models.db'}"
    w, x, into = add(models, "m@1"), features(100), new_name()
    table = source(x)  # in a database, or a file, that is no store
    before = tables.run("PRAGMA journal_mode") if tables.kind == "sqlite" else None
    with pydedup.open(models) as store:
        report = store.score(query_of(table), "m", into=into, batch=16, source=tables.url)
        assert store.score(query_of(table), "m", into=into, source=tables.url).skipped == 100
        if tables.kind == "sqlite":
            with pytest.raises(pydedup.errors.NotFoundError, match="to be read and written"):
                store.score(query_of(table), "m", into=into, source=str(tmp_path / "none.db"))
    assert report.rows == 100
    assert_right(predictions(tables, into), x, w)
    if tables.kind == "sqlite":
        assert before == tables.run("PRAGMA journal_mode") == [("delete",)]
        assert tables.run("PRAGMA application_id") == [(0,)]


def test_a_role_that_may_only_read_the_store(postgres_url: str, postgres_schema: str) -> None:
    """Predictions go to a schema of its own; the store is only read."""
    url = with_option(postgres_url, f"schema={postgres_schema}")
    w, x, role = add(url, "m@1"), features(5), unused_name()
    as_role = as_user(url, role)
    tables = Tables(url)
    for statement in (
        f"CREATE ROLE {role} LOGIN PASSWORD '{password_of(url)}'",
        f"CREATE SCHEMA {role} AUTHORIZATION {role}",
        f"GRANT USAGE ON SCHEMA {postgres_schema} TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {postgres_schema} TO {role}",
        f"CREATE TABLE {role}.t (id int, f0 float8, f1 float8, f2 float8)",
        f"GRANT SELECT ON {role}.t TO {role}",
    ):
        tables.run(statement)
    try:
        rows = [[i + 1, *map(float, row)] for i, row in enumerate(x)]
        tables.run(f"INSERT INTO {role}.t VALUES (?, ?, ?, ?)", rows)
        query, into = query_of(f"{role}.t"), f"{role}.predictions"
        with pydedup.open(as_role) as store:
            assert store.read_only
            with pytest.raises(ReadOnlyError, match="--source"):
                store.score(query, "m@1", into=into)
            with pytest.raises(ReadOnlyError, match="name the version: m@1"):
                store.score(query, "m", into=into, source=as_role)
            assert store.score(query, "m@1", into=into, source=as_role).table == into
            elsewhere = f"{postgres_schema}.predictions"
            with pytest.raises(ArgumentError, match="permission denied for schema"):
                store.score(query, "m@1", into=elsewhere, source=as_role)
        assert_right(predictions(tables, into), x, w)
    finally:
        tables.run(f"DROP SCHEMA {role} CASCADE")
        tables.run(f"DROP OWNED BY {role}")
        tables.run(f"DROP ROLE {role}")


def test_what_onnx_runtime_runs(
    tables: Tables, source: Make, new_name: Make, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    w = np.random.default_rng(0).standard_normal((3, 1)).astype(np.float32)
    table_of_ids = np.arange(20, dtype=np.float32)

    def save(name: str, nodes: list[Any], array: np.ndarray, kind: int, width: int) -> Path:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, ["b", width])],
            [helper.make_tensor_value_info("y", 1, None)],
            [helper.make_tensor("w", 1, array.shape, array.tobytes(), raw=True)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    sine = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Sin", ["a"], ["y"]),
    ]
    gather = [
        helper.make_node("Gather", ["w", "x"], ["a"]),
        helper.make_node("Cos", ["a"], ["y"]),
    ]
    with pydedup.open(tables.url) as store:
        store.add("sine@1", save("sine.onnx", sine, w, 1, 3))
        store.add("ids@1", save("ids.onnx", gather, table_of_ids, 7, 1))
        assert store.graph("sine@1") is None
        assert store.graph("ids@1") is None
        store.add(
            "known@1", save("known.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], w, 1, 3)
        )
    x = features(20)
    x[3] = [1, 2, 3]  # a row of whole numbers is one of numbers all the same
    table, sines, cosines = source(x), new_name(), new_name()
    with pydedup.open(tables.url) as store:
        store.score(query_of(table), "sine@1", into=sines)
        store.score(f"SELECT id, id - 1 AS n FROM {table}", "ids@1", into=cosines)
        with pytest.raises(ArgumentError):
            store.score(f"SELECT id, f0, f1 FROM {table}", "sine@1", into=new_name())
        # Of layers that pydedup knows, before any row.
        with pytest.raises(
            ArgumentError, match="known@1 takes 3 features, and there are 2 columns"
        ):
            store.score(f"SELECT id, f0, f1 FROM {table}", "known@1", into=new_name())
    found = predictions(tables, sines)
    np.testing.assert_allclose(
        [found[i + 1] for i in range(20)], np.sin(x @ w)[:, 0], rtol=1e-4, atol=1e-5
    )
    found = predictions(tables, cosines)
    np.testing.assert_allclose(
        [found[i + 1] for i in range(20)], np.cos(table_of_ids), rtol=1e-4, atol=1e-5
    )
