# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: rows that fail in one batch or another, or are not there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node

from .conftest import Tables, add, features, predictions, query_of

Make = Callable[..., str]


def test_a_prediction_that_is_not_finite_is_not_written(
    tables: Tables, source: Make, new_name: Make
) -> None:
    x, into = features(4), new_name()
    x[2, 0] = 3e38
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(tables.url) as store:
        store.add("m@1", {"w": np.array([[4, 0, 0]], np.float32)}, graph=graph)
        table = source(x)
        report = store.score(query_of(table), "m@1", into=into, on_error="skip")
        with pytest.raises(ArgumentError, match="row with id 3: the prediction is not finite"):
            store.score(query_of(table), "m@1", into=into)
    assert [(one.key, one.reason) for one in report.failures] == [
        (3, "the prediction is not finite")
    ]
    found = predictions(tables, into)
    assert found == pytest.approx({n: 4 * float(x[n - 1, 0]) for n in (1, 2, 4)}, rel=1e-6)


def test_a_batch_of_rows_that_all_give_another_number_of_predictions(
    tables: Tables, new_name: Make
) -> None:
    """Its rows fail one by one, as they do among others, and do not end the work."""
    table, into = new_name(), new_name()
    graph = Graph(("x",), ("y",), (Node("relu", ("x",), "y"),))
    with pydedup.open(tables.url) as store:
        store.add("m@1", {"w": np.ones(1, np.float32)}, graph=graph)
        blob = "BYTEA" if tables.kind.startswith("postgres") else "BLOB"
        tables.run(f"CREATE TABLE {table} (id BIGINT PRIMARY KEY, v {blob})")
        values = [[1], [2, 3], [4, 5], [6]]
        rows = [[n, np.array(value, "<f4").tobytes()] for n, value in enumerate(values, 1)]
        tables.run(f"INSERT INTO {table} VALUES (?, ?)", rows)
        query = f"SELECT id, v FROM {table} ORDER BY id"
        report = store.score(query, "m@1", into=into, batch=1, on_error="skip")
    assert (report.rows, report.failed) == (2, 2)
    assert [failure.key for failure in report.failures] == [2, 3]
    assert predictions(tables, into) == {1: 1.0, 4: 6.0}


def test_of_failures_in_many_batches_the_first_are_kept(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1")
    table = source(features(35))
    tables.run(f"UPDATE {table} SET f1 = NULL WHERE id > 2")
    with pydedup.open(tables.url) as store:
        query = query_of(table, "ORDER BY id")
        report = store.score(query, "m@1", into=new_name(), batch=8, on_error="skip")
    assert (report.rows, report.failed) == (2, 33)
    assert [failure.key for failure in report.failures] == list(range(3, 23))


def test_no_rows_for_a_model_of_ids_make_the_table(tables: Tables, new_name: Make) -> None:
    into = new_name()
    nodes = (
        Node("embedding", ("ids",), "e", {"weight": "w"}),
        Node("mean", ("e",), "m", attrs={"axis": [1, 2]}),
    )
    with pydedup.open(tables.url) as store:
        store.add("m@1", {"w": np.ones((9, 4), np.float32)}, graph=Graph(("ids",), ("m",), nodes))
        report = store.score("SELECT 1 AS id, 2 AS a WHERE 1 = 0", "m@1", into=into)
    assert (report.rows, report.skipped, report.failed) == (0, 0, 0)
    assert tables.run(f"SELECT id, prediction, model FROM {into}") == []


def test_a_key_that_several_columns_are_called_is_told(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 2 AS id, 3 AS a, 4 AS b"
    with (
        pydedup.open(tables.url) as store,
        pytest.raises(ArgumentError, match="there are several columns 'id' for the key"),
    ):
        store.score(query, "m@1", into=new_name(), key="id")


def test_a_version_stays_where_others_wrote_all_of_a_later_batch(
    tables: Tables, source: Make, new_name: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this run wrote before is of it, so the next one does not take the alias as it is now."""
    add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    table, into = source(features(3)), new_name()
    query = query_of(table, "ORDER BY id")
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 3")
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        real = type(store._adapter).insert_predictions

        def late(self: object, name: str, columns: object, rows: list[tuple[object, ...]]) -> bool:
            if rows[0][0] == 2:
                tables.run(f"INSERT INTO {into} (id, prediction, model) VALUES (2, 1, 'm@1')")
            return bool(real(self, name, columns, rows))

        with monkeypatch.context() as patched:
            patched.setattr(type(store._adapter), "insert_predictions", late)
            with pytest.raises(ArgumentError, match="row with id 3"):
                store.score(query, "m@prod", into=into, batch=1)
        store.alias("m", "prod", "2")
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 3")
        report = store.score(query, "m@prod", into=into, batch=1)
    assert (report.model, report.rows, report.skipped, report.resumed) == ("m@1", 1, 2, True)
