# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: what is written, what is refused, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, NotFoundError, ReadOnlyError
from pydedup.graph import Graph, Node
from pydedup.jobs import SCORING
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import unused_name

from .conftest import Tables, add, features, linear

Make = Callable[..., str]


def query_of(table: str, more: str = "") -> str:
    return f"SELECT id, f0, f1, f2 FROM {table} {more}"


def predictions(tables: Tables, table: str) -> dict[Any, float]:
    rows = tables.run(f"SELECT id, prediction FROM {table}")
    found = dict(rows)
    assert len(found) == len(rows)
    return found


def assert_right(found: dict[Any, float], x: np.ndarray, w: np.ndarray) -> None:
    assert sorted(found) == list(range(1, len(x) + 1))
    wanted = (x @ w.T)[:, 0]
    np.testing.assert_allclose([found[i + 1] for i in range(len(x))], wanted, rtol=1e-5, atol=1e-6)


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


def test_new_rows_alone_are_written_the_next_time(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w, x, into = add(tables.url, "m@1"), features(300), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table, "WHERE id <= 200"), "m@1", into=into, batch=64)
        tables.run(f"UPDATE {into} SET prediction = 7 WHERE id = 3")
        report = store.score(query_of(table, "ORDER BY id DESC"), "m@1", into=into, batch=64)
    assert (report.rows, report.skipped) == (100, 200)
    found = predictions(tables, into)
    assert found.pop(3) == 7  # what is there is left alone
    assert_right({**found, 3: float((x @ w.T)[2, 0])}, x, w)


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
        with pytest.raises(ArgumentError, match="no column 'other' for the key; it has: f0, name"):
            store.score(query, "m@1", into=new_name(), key="other")
    found = dict(tables.run(f"SELECT name, prediction FROM {into}"))
    assert_right({int(name[1:]): value for name, value in found.items()}, x, w)


def test_several_outputs_are_columns_and_many_one_value(
    tables: Tables, source: Make, new_name: Make
) -> None:
    x, few, many = features(4), new_name(), new_name()
    w5, w40 = add(tables.url, "few@1", outputs=5), add(tables.url, "many@1", outputs=40)
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table), "few@1", into=few)
        store.score(query_of(table), "many@1", into=many)
        # What was written is itself what a query may read.
        back = new_name()
        _, graph = linear()
        store.add("narrow@1", {"w": np.ones((1, 40), np.float32)}, graph=graph)
        store.score(f"SELECT id, prediction FROM {many}", "narrow@1", into=back)
    columns = ", ".join(f"prediction_{i}" for i in range(5))
    rows = tables.run(f"SELECT {columns} FROM {few} ORDER BY id")
    np.testing.assert_allclose(np.array(rows), x @ w5.T, rtol=1e-5, atol=1e-6)
    found = predictions(tables, many)
    for i, row in enumerate(x @ w40.T):
        value = found[i + 1]
        vector = value if isinstance(value, list) else np.frombuffer(value, "<f4")
        np.testing.assert_allclose(vector, row, rtol=1e-5, atol=1e-6)
    sums = predictions(tables, back)
    wanted = (x @ w40.T).sum(axis=1)
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
        store.score(query_of(table), "m@1", into=into)
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


def test_a_row_that_cannot_be_predicted(tables: Tables, source: Make, new_name: Make) -> None:
    w, x, into = add(tables.url, "m@1"), features(30), new_name()
    table = source(x)
    tables.run(f"UPDATE {table} SET f1 = NULL WHERE id IN (15, 17)")
    ordered = query_of(table, "ORDER BY id")
    with pydedup.open(tables.url) as store:
        with pytest.raises(
            ArgumentError,
            match=r"row with id 15, and 1 more of its batch: f1 is NULL; nothing of this batch was "
            r"written, 10 rows before it were",
        ):
            store.score(ordered, "m@1", into=into, batch=10)
        assert set(predictions(tables, into)) == set(range(1, 11))
        report = store.score(ordered, "m@1", into=into, batch=10, on_error="skip")
    assert (report.rows, report.skipped, report.failed) == (18, 10, 2)
    assert [(f.key, f.reason) for f in report.failures] == [(15, "f1 is NULL"), (17, "f1 is NULL")]
    found = predictions(tables, into)
    wanted = (x @ w.T)[:, 0]
    found |= {15: float(wanted[14]), 17: float(wanted[16])}
    assert_right(found, x, w)
    for key, value in tables.run(f"SELECT id, f1 FROM {table} WHERE id = 15"):
        assert (key, value) == (15, None)


@pytest.mark.parametrize("bad", ["'NaN'", "'Infinity'"])
def test_numbers_that_are_none(tables: Tables, source: Make, new_name: Make, bad: str) -> None:
    if not tables.kind.startswith("postgres"):
        pytest.skip("of these databases only PostgreSQL keeps NaN; see the next test for others")
    add(tables.url, "m@1")
    table = source(features(2))
    tables.run(f"UPDATE {table} SET f2 = {bad} WHERE id = 2")
    with pydedup.open(tables.url) as store:
        report = store.score(query_of(table), "m@1", into=new_name(), on_error="skip")
    assert report.rows == 1
    assert report.failures[0].reason in ("f2 is nan", "f2 is inf")


def test_values_that_are_no_numbers(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    blob = np.array([1, np.nan, 2], "<f4").tobytes()
    cases: dict[str, str] = {
        "SELECT 1 AS id, 'a' AS f0, 2 AS f1, 3 AS f2": "f0 is no number but str",
        "SELECT 1 AS id, 1e300 AS f0, 2 AS f1, 3 AS f2": "beyond what float32 holds",
        "SELECT 1 AS id, '[1, 2' AS v": "v is a text that is no JSON array of numbers",
        "SELECT 1 AS id, '{\"a\": 1}' AS v": "v is JSON, and no array of numbers",
        "SELECT 1 AS id, '[1, [2], 3]' AS v": "the lists in v differ in length",
        "SELECT 1 AS id, '[]' AS v": "v is an empty array",
        "SELECT 1 AS id, '[1, null, 3]' AS v": "v is NULL",
        "SELECT 1 AS id, '[1, NaN, 3]' AS v": "v is nan",
        "SELECT NULL AS id, 1 AS f0, 2 AS f1, 3 AS f2": "the key 'id' is NULL",
    }
    if not tables.kind.startswith("postgres"):
        cases[f"SELECT 1 AS id, X'{blob.hex()}' AS v"] = "v holds nan at place 1"
        cases["SELECT 1 AS id, X'0102' AS v"] = "v has 2 bytes, which is no number of float32"
    into = new_name()
    with pydedup.open(tables.url) as store:
        for query, reason in cases.items():
            with pytest.raises(ArgumentError) as caught:
                store.score(query, "m@1", into=into)
            assert reason in str(caught.value), query


def test_a_key_that_is_not_unique_is_told(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 1, 4, 5, 6"
    with (
        pydedup.open(tables.url) as store,
        pytest.raises(ArgumentError, match="row with id 1: the key 'id' occurs twice"),
    ):
        store.score(query, "m@1", into=new_name())


def test_a_query_that_finds_nothing_makes_the_table(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", outputs=2)
    into, table = new_name(), source(features(1))
    with pydedup.open(tables.url) as store:
        report = store.score(query_of(table, "WHERE id < 0"), "m@1", into=into)
    assert (report.rows, report.skipped, report.failed) == (0, 0, 0)
    assert tables.run(f"SELECT id, prediction_0, prediction_1, model FROM {into}") == []


def test_wrong_columns_are_told_before_any_row(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1")
    table = source(features(3))
    with pydedup.open(tables.url) as store:
        with pytest.raises(ArgumentError, match=r"m@1 takes 3 features, and the query has 2 col"):
            store.score(f"SELECT id, f0, f1 FROM {table}", "m@1", into=new_name())
        with pytest.raises(ArgumentError, match="no column but the key 'id'"):
            store.score(f"SELECT id FROM {table}", "m@1", into=new_name())
        with pytest.raises(NotFoundError, match="no model 'other'"):
            store.score(query_of(table), "other", into=new_name())
        store.add("plain@1", {"w": np.ones((2, 2), np.float32)})
        with pytest.raises(NotFoundError, match="no graph to predict with"):
            store.score(query_of(table), "plain@1", into=new_name())


REFUSED = (
    "DELETE FROM {t}",
    "UPDATE {t} SET f0 = 1",
    "INSERT INTO {t} VALUES (9, 1, 2, 3)",
    "DROP TABLE {t}",
    "CREATE TABLE evil (id INTEGER)",
    "SELECT id, f0, f1, f2 FROM {t}; DELETE FROM {t}",
    "SELECT id, f0, f1, f2 FROM {t}; COMMIT; DELETE FROM {t}",
    "WITH x AS (SELECT 1) DELETE FROM {t}",
    "/* SELECT */ DELETE FROM {t}",
    "-- SELECT\nDELETE FROM {t}",
    "COMMIT",
    "PRAGMA writable_schema = 1",
    "",
    ";",
    "SELECT",
    "SELECT nothing FROM {t}",
    "SELECT * FROM no_such_table",
    "SELECT id, f0, f1, f2 FROM {t} WHERE",
    "EXPLAIN SELECT 1",
    "SELECT 1\0",
)


def test_what_is_no_single_select_is_refused(tables: Tables, source: Make, new_name: Make) -> None:
    add(tables.url, "m@1")
    x = features(3)
    table, into = source(x), new_name()
    with pydedup.open(tables.url) as store:
        for query in REFUSED:
            with pytest.raises((ArgumentError, ReadOnlyError)):
                store.score(query.format(t=table), "m@1", into=into)
        assert store.verify().errors == []
        # Comments, an end and a % are a user's own.
        query = f"/* a */ -- b\n SELECT id, f0, f1, f2 FROM {table} WHERE id % 2 = 1; -- the end"
        assert store.score(query, "m@1", into=into).rows == 2
    assert len(tables.run(f"SELECT f0 FROM {table}")) == 3


@pytest.mark.parametrize(
    "into",
    ["", " ", "a b", "a;b", 'a"b', "a`b", "a'b", "1a", "a-b", "x" * 64, "a\0", "a.b.c", ".a", "a."],
)
def test_hostile_names_of_tables_are_refused(tables: Tables, into: str) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    with pydedup.open(tables.url) as store, pytest.raises(ArgumentError):
        store.score(query, "m@1", into=into)


def test_hostile_names_of_keys_are_refused(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    quote = "`" if tables.kind == "mysql" else '"'
    into = new_name()
    with pydedup.open(tables.url) as store:
        for name in ("a b", "x); DROP TABLE y; --", "prediction", "model"):
            query = f"SELECT 1 AS {quote}{name}{quote}, 1 AS a, 2 AS b, 3 AS c"
            with pytest.raises(ArgumentError, match=r"no name for a column|cannot be called"):
                store.score(query, "m@1", into=into)


def test_tables_of_the_store_are_refused(tables: Tables) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    if tables.kind.startswith("postgres"):
        schema = tables.url.partition("schema=")[2]
        names = [f"{schema}.models", f"{schema}.sharing"]
    else:
        names = ["pydedup_models", "PYDEDUP_sharing", "pydedup_new"]
    with pydedup.open(tables.url) as store:
        for name in names:
            with pytest.raises(ArgumentError, match="belongs to the store"):
                store.score(query, "m@1", into=name)


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
        with pytest.raises(ArgumentError, match="has no column 'k' for the key"):
            store.score(f"SELECT id AS k, f0, f1, f2 FROM {table}", "m@1", into=own)
    found = predictions(tables, own)
    np.testing.assert_allclose([found[i + 1] for i in range(5)], (x @ w.T)[:, 0], rtol=1e-4)


def test_an_alias_is_what_it_was_until_the_work_is_done(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w1, w2 = add(tables.url, "m@1", seed=1), add(tables.url, "m@2", seed=2)
    x = features(30)
    table, into = source(x), new_name()
    ordered = query_of(table, "ORDER BY id")
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")
        tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 25")
        with pytest.raises(ArgumentError, match="row with id 25"):
            store.score(ordered, "m@prod", into=into, batch=10)
        store.alias("m", "prod", "2")
        store.vacuum(lease_seconds=0.0)  # which leaves work that is to go on alone
        assert [job[3] for job in store._adapter.jobs()] == [SCORING]
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 25")
        report = store.score(ordered, "m@prod", into=into, batch=10)
        assert (report.model, report.rows, report.skipped, report.resumed) == ("m@1", 10, 20, True)
        assert store._adapter.jobs() == []
        x[24, 0] = 0
        assert_right(predictions(tables, into), x, w1)
        # Work that begins after that takes the alias as it is now.
        tables.run(f"DELETE FROM {into} WHERE id <= 15")
        report = store.score(ordered, "m@prod", into=into, batch=10)
        assert (report.model, report.rows, report.resumed) == ("m@2", 15, False)
    found = predictions(tables, into)
    assert_right({k: v for k, v in found.items() if k <= 15}, x[:15], w2)
    by_model = dict(tables.run(f"SELECT model, COUNT(*) FROM {into} GROUP BY model"))
    assert by_model == {"m@1": 15, "m@2": 15}


def test_an_alias_moved_in_the_middle_changes_nothing(
    tables: Tables, source: Make, new_name: Make
) -> None:
    w1 = add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    x, into = features(30), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.alias("m", "prod", "1")

        def move(stage: str, done: int, total: int) -> None:
            store.alias("m", "prod", "2")

        store.score(query_of(table), "m@prod", into=into, batch=10, progress=move)
    assert_right(predictions(tables, into), x, w1)


def test_the_version_of_work_that_was_removed_is_told(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1", seed=1)
    table, into = source(features(3)), new_name()
    tables.run(f"UPDATE {table} SET f0 = NULL WHERE id = 2")
    with pydedup.open(tables.url) as store, pytest.raises(ArgumentError):
        store.score(query_of(table), "m", into=into)
    add(tables.url, "m@2", seed=2)
    with pydedup.open(tables.url) as store:
        store.remove("m@1")
        with pytest.raises(NotFoundError, match=r"began with m@1, which was removed.*: m@2"):
            store.score(query_of(table), "m", into=into)
        tables.run(f"UPDATE {table} SET f0 = 0 WHERE id = 2")
        assert store.score(query_of(table), "m@2", into=into).rows == 3


def test_two_at_once_write_each_row_once(tables: Tables, source: Make, new_name: Make) -> None:
    w, x, into = add(tables.url, "m@1"), features(200), new_name()
    table = source(x)
    with pydedup.open(tables.url) as first, pydedup.open(tables.url) as second:
        inner: list[Any] = []

        def interrupt(stage: str, done: int, total: int) -> None:
            if not inner:
                inner.append(None)
                inner[0] = second.score(query_of(table), "m@1", into=into, batch=50)

        report = first.score(query_of(table), "m@1", into=into, batch=50, progress=interrupt)
    assert report.rows + inner[0].rows == 200
    assert inner[0].skipped == report.rows == 50
    assert_right(predictions(tables, into), x, w)


def test_a_key_that_others_take_between_look_and_write(
    tables: Tables, source: Make, new_name: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x, into = add(tables.url, "m@1"), features(20), new_name()
    table = source(x)
    with pydedup.open(tables.url) as store:
        store.score(query_of(table, "WHERE id < 0"), "m@1", into=into)
        real = type(store._adapter).insert_predictions
        taken: list[int] = []

        def late(self: Any, name: str, columns: Any, rows: Any) -> bool:
            if not taken:
                taken.append(7)
                tables.run(f"INSERT INTO {into} (id, prediction, model) VALUES (7, 1, 'other')")
            return bool(real(self, name, columns, rows))

        monkeypatch.setattr(type(store._adapter), "insert_predictions", late)
        report = store.score(query_of(table), "m@1", into=into)
    assert (report.rows, report.skipped) == (19, 1)
    found = predictions(tables, into)
    assert found.pop(7) == 1
    assert_right({**found, 7: float((x @ w.T)[6, 0])}, x, w)


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
            with pytest.raises(pydedup.errors.NotAStoreError):
                store.score(query_of(table), "m", into=into, source=str(tmp_path / "none.db"))
    assert report.rows == 100
    assert_right(predictions(tables, into), x, w)
    if tables.kind == "sqlite":
        assert before == tables.run("PRAGMA journal_mode") == [("delete",)]
        assert tables.run("PRAGMA application_id") == [(0,)]


def test_arguments_that_are_wrong(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    with pydedup.open(tables.url) as store:
        with pytest.raises(ArgumentError, match="on_error is 'ignore'"):
            store.score(query, "m@1", into=new_name(), on_error="ignore")
        with pytest.raises(ArgumentError, match="batch is 0"):
            store.score(query, "m@1", into=new_name(), batch=0)


def test_a_role_that_may_only_read_the_store(postgres_url: str, postgres_schema: str) -> None:
    """Predictions go to a schema of its own; the store is only read."""
    url = with_option(postgres_url, f"schema={postgres_schema}")
    w, x, role = add(url, "m@1"), features(5), unused_name()
    as_role = url.replace("postgres:@", f"{role}@", 1).replace("postgres@", f"{role}@", 1)
    tables = Tables(url)
    for statement in (
        f"CREATE ROLE {role} LOGIN",
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
    x = features(20)
    x[3] = [1, 2, 3]  # a row of whole numbers is one of numbers all the same
    table, sines, cosines = source(x), new_name(), new_name()
    with pydedup.open(tables.url) as store:
        store.score(query_of(table), "sine@1", into=sines)
        store.score(f"SELECT id, id - 1 AS n FROM {table}", "ids@1", into=cosines)
        with pytest.raises(ArgumentError):
            store.score(f"SELECT id, f0, f1 FROM {table}", "sine@1", into=new_name())
    found = predictions(tables, sines)
    np.testing.assert_allclose(
        [found[i + 1] for i in range(20)], np.sin(x @ w)[:, 0], rtol=1e-4, atol=1e-5
    )
    found = predictions(tables, cosines)
    np.testing.assert_allclose(
        [found[i + 1] for i in range(20)], np.cos(table_of_ids), rtol=1e-4, atol=1e-5
    )
