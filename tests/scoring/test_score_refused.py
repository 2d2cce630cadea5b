# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` on each back end: rows, queries, names and arguments that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, ConflictError, NotFoundError, ReadOnlyError
from pydedup.graph import Graph, Node

from .conftest import Tables, add, assert_right, features, predictions, query_of

Make = Callable[..., str]


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


def test_without_a_prediction_there_is_no_table(
    tables: Tables, source: Make, new_name: Make
) -> None:
    square = Node("reshape", ("x",), "y", attrs={"shape": [-1, 7, 7]})
    with pydedup.open(tables.url) as store:
        store.add("m@1", {"w": np.ones(1, np.float32)}, graph=Graph(("x",), ("y",), (square,)))
        table, into = source(features(3)), new_name()
        said = f"no row was predicted, and so table .*{into} was not created.*'reshape'"
        for more in ("", "WHERE 1 = 0"):
            with pytest.raises(ArgumentError, match=said):
                store.score(query_of(table, more), "m@1", into=into, on_error="skip")
    tables.run(f"CREATE TABLE {into} (id INTEGER)")  # there is none


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
        "SELECT 1 AS id, 'a' AS f0, 2 AS f1, 3 AS f2": "f0 is no number but the text 'a'",
        "SELECT 1 AS id, 1e300 AS f0, 2 AS f1, 3 AS f2": "beyond what float32 holds",
        "SELECT 1 AS id, '[1, 2' AS v": "v is a text that is no JSON array of numbers",
        "SELECT 1 AS id, '{\"a\": 1}' AS v": "v is JSON, and no array of numbers",
        "SELECT 1 AS id, '[1, [2], 3]' AS v": "the lists in v differ in length",
        "SELECT 1 AS id, '[]' AS v": "v is an empty array",
        "SELECT 1 AS id, '[1, null, 3]' AS v": "v is NULL",
        "SELECT 1 AS id, '[1, NaN, 3]' AS v": "v is nan",
        "SELECT NULL AS id, 1 AS f0, 2 AS f1, 3 AS f2": "row with id NULL: the key 'id' is NULL;",
    }
    if not tables.kind.startswith("postgres"):
        cases[f"SELECT 1 AS id, X'{blob.hex()}' AS v"] = "v holds nan at place 1"
        cases["SELECT 1 AS id, X'0102' AS v"] = "v has 2 bytes, which is no number of float32"
        cases["SELECT 1 AS id, X'' AS v"] = "v has 0 bytes, which is no number of float32"
    into = new_name()
    with pydedup.open(tables.url) as store:
        for query, reason in cases.items():
            with pytest.raises(ArgumentError) as caught:
                store.score(query, "m@1", into=into)
            assert reason in str(caught.value), query


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_text_that_is_no_utf8_is_told_with_its_row(mode: str, tmp_path: Path) -> None:
    """SQLite keeps any bytes as a text; another journal has the rows copied first."""
    url, source = f"sqlite:///{tmp_path / 'store.db'}", Tables(f"sqlite:///{tmp_path / 'rows.db'}")
    w = add(url, "m@1")
    source.run(f"PRAGMA journal_mode = {mode}")
    source.run("CREATE TABLE t (id PRIMARY KEY, f0, f1, f2)")
    bad = "CAST(x'61ff' AS TEXT)"
    source.run(
        f"INSERT INTO t VALUES ('a', 1, 2, 3), ('b', {bad}, 2, 3), ({bad}, 1, 2, 3), ('é', 1, 2, 3)"
    )
    with pydedup.open(url) as store:
        with pytest.raises(ArgumentError, match=r"row with id 'a\\udcff', and 1 more"):
            store.score(query_of("t"), "m@1", into="p", source=source.url)
        report = store.score(query_of("t"), "m@1", into="p", source=source.url, on_error="skip")
    assert [(failure.key, failure.reason) for failure in report.failures] == [
        ("a\udcff", "the key 'id' is no UTF-8"),
        ("b", "f0 is no number but the text 'a\\udcff'"),
    ]
    wanted = float((w @ [1, 2, 3])[0])
    assert predictions(source, "p") == pytest.approx({"a": wanted, "é": wanted}, rel=1e-5)


_ODD = " UNION ALL ".join(
    f"SELECT {number} AS id, '{features}' AS v"
    for number, features in enumerate(("[[1, 2, 3], [4, 5, 6]]", "[1, 2, 3]", "[[1, 2, 3]]"), 1)
)


@pytest.mark.parametrize("batch", [1, 100])
def test_a_row_with_another_number_of_predictions(
    batch: int, tables: Tables, new_name: Make
) -> None:
    """It fails by itself, also where it comes first: the table is as of a plain row."""
    w, into = add(tables.url, "m@1"), new_name()
    with pydedup.open(tables.url) as store:
        with pytest.raises(ArgumentError, match="row with id 1: the model gives 2 numbers"):
            store.score(_ODD, "m@1", into=into, batch=batch)
        for rows in (2, 0):
            report = store.score(_ODD, "m@1", into=into, batch=batch, on_error="skip")
            assert (report.rows, report.skipped, report.failed) == (rows, 2 - rows, 1)
            assert report.failures[0].key == 1
            assert report.failures[0].reason == (
                "the model gives 2 numbers for it, and the table takes 1 of each row"
            )
        wanted = float((w @ [1, 2, 3])[0])
        assert predictions(tables, into) == pytest.approx({2: wanted, 3: wanted}, rel=1e-5)
        # A table of the user's says itself what it is for.
        tables.run(f"DROP TABLE {into}")
        columns = "prediction_0 DOUBLE PRECISION, prediction_1 DOUBLE PRECISION"
        tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, {columns})")
        report = store.score(_ODD, "m@1", into=into, batch=100, on_error="skip")
        assert [failure.key for failure in report.failures] == [2, 3]
    assert [row[0] for row in tables.run(f"SELECT id FROM {into}")] == [1]


def test_where_the_model_tells_no_width_the_first_row_does(tables: Tables, new_name: Make) -> None:
    into = new_name()
    graph = Graph(("x",), ("y",), (Node("embedding", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(tables.url) as store:
        store.add("ids@1", {"w": np.ones((5, 1), np.float32)}, graph=graph)
        query = "SELECT 1 AS id, '[9]' AS v UNION ALL SELECT 2, '[1]' UNION ALL SELECT 3, '[1, 2]'"
        report = store.score(query, "ids@1", into=into, batch=1, on_error="skip")
    assert [failure.key for failure in report.failures] == [1, 3]
    assert predictions(tables, into) == {2: 1.0}


@pytest.mark.parametrize("columns", [2, 5])
def test_where_the_model_tells_no_width_a_table_does(
    columns: int, tables: Tables, new_name: Make
) -> None:
    """The row that came first did, and had no value for the last column, or no column."""
    into = new_name()
    names = [f"prediction_{n}" for n in range(columns)]
    made = ", ".join(f"{name} DOUBLE PRECISION NOT NULL" for name in names)
    graph = Graph(("x",), ("y",), (Node("embedding", ("x",), "y", {"weight": "w"}),))
    rows = ", ".join(["1"] * 3), ", ".join(["1"] * columns)
    query = f"SELECT 1 AS id, '[{rows[0]}]' AS v UNION ALL SELECT 2, '[{rows[1]}]'"
    with pydedup.open(tables.url) as store:
        store.add("ids@1", {"w": np.ones((5, 1), np.float32)}, graph=graph)
        tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, {made})")
        report = store.score(query, "ids@1", into=into, batch=1, on_error="skip")
        query = "SELECT 3 AS id, 1 AS a, 1 AS b, 1 AS c"
        again = store.score(query, "ids@1", into=into, on_error="skip")
    wanted = f"the model gives 3 numbers for it, and the table takes {columns} of each row"
    assert [(one.key, one.reason) for one in report.failures] == [(1, wanted)]
    assert [(one.key, one.reason) for one in again.failures] == [(3, wanted)]
    assert tables.run(f"SELECT * FROM {into}") == [(2, *[1.0] * columns)]


def test_a_key_that_is_not_unique_is_told(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 1, 4, 5, 6"
    with (
        pydedup.open(tables.url) as store,
        pytest.raises(ArgumentError, match="row with id 1: the key 'id' occurs twice"),
    ):
        store.score(query, "m@1", into=new_name())


def test_keys_that_the_table_takes_for_one(tables: Tables, new_name: Make) -> None:
    """By a collation, or by its type: which they are is told, and the others can be written."""
    add(tables.url, "m@1")
    into, twins = new_name(), ("x", "X")
    kind = {
        "sqlite": "TEXT COLLATE NOCASE",
        "mysql": "VARCHAR(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
    }.get(tables.kind)
    if kind is None:
        kind, twins = "NUMERIC", ("7", "7.0")
    tables.run(f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction DOUBLE PRECISION)")
    keys = [*map(str, range(20, 30)), twins[0], *map(str, range(30, 40)), twins[1]]
    query = " UNION ALL ".join(f"SELECT '{key}' AS id, 1 AS a, 2 AS b, 3 AS c" for key in keys)
    with pydedup.open(tables.url) as store:
        with pytest.raises(
            ConflictError, match="takes some of these keys for the same: '"
        ) as caught:
            store.score(query, "m@1", into=into)
        assert tables.kind.startswith("postgres") or "for the same: 'x', 'X'; try" in str(
            caught.value
        )
        assert tables.run(f"SELECT id FROM {into}") == []
        report = store.score(query, "m@1", into=into, on_error="skip")
        assert (report.rows, report.skipped, report.failed) == (21, 1, 0)
        assert len(tables.run(f"SELECT id FROM {into}")) == 21
        # Also where nobody is beside the two.
        tables.run(f"DELETE FROM {into}")
        pair = " UNION ALL ".join(f"SELECT '{key}' AS id, 1 AS a, 2 AS b, 3 AS c" for key in twins)
        report = store.score(pair, "m@1", into=into, on_error="skip")
        assert (report.rows, report.skipped, report.failed) == (1, 1, 0)


def test_a_unique_index_of_another_column_is_told(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    into = new_name()
    tables.run(
        f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction DOUBLE PRECISION, "
        "model VARCHAR(9) UNIQUE)"
    )
    query = "SELECT 7 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 8, 1, 2, 3"
    with pydedup.open(tables.url) as store:
        with pytest.raises(
            ConflictError, match="breaks a unique index of another column: drop that"
        ):
            store.score(query, "m", into=into)
        assert store._adapter.jobs() == []  # of which version nothing was written


def test_wrong_columns_are_told_before_any_row(
    tables: Tables, source: Make, new_name: Make
) -> None:
    add(tables.url, "m@1")
    table = source(features(3))
    with pydedup.open(tables.url) as store:
        with pytest.raises(ArgumentError, match=r"m@1 takes 3 features, and there are 2 col"):
            store.score(f"SELECT id, f0, f1 FROM {table}", "m@1", into=new_name())
        with pytest.raises(ArgumentError, match="no column but the key 'id'"):
            store.score(f"SELECT id FROM {table}", "m@1", into=new_name())
        with pytest.raises(NotFoundError, match="no model 'other'"):
            store.score(query_of(table), "other", into=new_name())
        store.add("plain@1", {"w": np.ones((2, 2), np.float32)})
        # It told users of `pydedup score` to use `pydedup score`.
        with pytest.raises(NotFoundError, match="no graph to predict with; add it from an ONNX"):
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
    "SELECT '\ud800' AS id, f0, f1, f2 FROM {t}",
)


def test_a_table_that_has_too_few_columns_is_told(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1", outputs=3)
    into = new_name()
    tables.run(f"CREATE TABLE {into} (id INT PRIMARY KEY, prediction_0 FLOAT)")
    message = (
        "has no column 'prediction_1', which predictions of m@1 need; it has: id, prediction_0$"
    )
    with pydedup.open(tables.url) as store, pytest.raises(ArgumentError, match=message):
        store.score("SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c", "m@1", into=into)


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


def test_hostile_names_of_tables_are_refused(tables: Tables) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    names = ("", " ", "a b", "a;b", 'a"b', "a`b", "a'b", "1a", "a-b", "x" * 64, "a\0", "a.b.c")
    with pydedup.open(tables.url) as store:
        for into in (*names, ".a", "a."):
            with pytest.raises(ArgumentError):
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


def test_a_key_called_as_a_column_of_predictions_but_for_case(
    tables: Tables, new_name: Make
) -> None:
    """To PostgreSQL it is another name; so it is to all where a table lacks that column."""
    add(tables.url, "m@1")
    quote = "`" if tables.kind == "mysql" else '"'
    with pydedup.open(tables.url) as store:
        for name in ("MODEL", "Prediction"):
            query = f"SELECT 1 AS {quote}{name}{quote}, 1 AS a, 2 AS b, 3 AS c"
            if tables.kind == "postgresql":
                assert store.score(query, "m@1", into=new_name()).rows == 1
                continue
            with pytest.raises(ArgumentError, match=f"cannot be called '{name}': to this database"):
                store.score(query, "m@1", into=new_name())
        into = new_name()
        tables.run(f"CREATE TABLE {into} (model INT PRIMARY KEY, prediction FLOAT)")
        with pytest.raises(ArgumentError, match="'model', as a column of the predictions is"):
            store.score("SELECT 1 AS model, 1 AS a, 2 AS b, 3 AS c", "m@1", into=into)
        into = new_name()
        tables.run(f"CREATE TABLE {into} ({quote}MODEL{quote} INT PRIMARY KEY, prediction FLOAT)")
        query = f"SELECT 1 AS {quote}MODEL{quote}, 1 AS a, 2 AS b, 3 AS c"
        assert store.score(query, "m@1", into=into).rows == 1


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


def test_arguments_that_are_wrong(tables: Tables, new_name: Make) -> None:
    add(tables.url, "m@1")
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    with pydedup.open(tables.url) as store:
        with pytest.raises(
            ArgumentError, match="unknown on_error 'ignore'; choose one of: fail, skip"
        ):
            store.score(query, "m@1", into=new_name(), on_error="ignore")
        wrong: Any
        for wrong in (0, True, 2.5, "3", None):
            with pytest.raises(ArgumentError, match=f"batch must be an integer.*not {wrong!r}"):
                store.score(query, "m@1", into=new_name(), batch=wrong)
        wrong = 5
        with pytest.raises(ArgumentError, match="query must be a string, not int"):
            store.score(wrong, "m@1", into=new_name())
        with pytest.raises(ArgumentError, match="into must be a string, not int"):
            store.score(query, "m@1", into=wrong)
        for source, said in {"sqlite:///:memory:": "in memory", "": "is no URL of a store"}.items():
            with pytest.raises(ArgumentError, match=said):
                store.score(query, "m@1", into=new_name(), source=source)


@pytest.mark.parametrize("missing", ["INSERT", "SELECT", "CREATE"])
@pytest.mark.parametrize("kind", ["postgres", "mysql"])
def test_a_privilege_that_a_user_lacks(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, missing: str
) -> None:
    """It was a wrong argument in PostgreSQL, and in MariaDB a database that takes no changes."""
    user, source = request.getfixturevalue(f"{kind}_user")
    of_all = {"postgres": "postgres_url", "mysql": "mysql_database"}[kind]
    tables = Tables(request.getfixturevalue(of_all))
    schema = "" if kind == "mysql" else request.getfixturevalue("postgres_schema") + "."
    models, into = f"sqlite:///{tmp_path / 'models.db'}", f"{schema}mine"
    add(models, "m@1")
    if schema:
        tables.run(f"CREATE SCHEMA {schema[:-1]}")
        tables.run(f"GRANT USAGE ON SCHEMA {schema[:-1]} TO {user}")
    # Who may do nothing at all does not see a database of MariaDB.
    tables.run(f"CREATE TABLE {schema}other (id BIGINT)")
    tables.run(f"GRANT SELECT ON {schema}other TO {user}")
    if missing != "CREATE":
        tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction DOUBLE PRECISION)")
        tables.run(f"GRANT {'SELECT' if missing == 'INSERT' else 'INSERT'} ON {into} TO {user}")
    with (
        pydedup.open(models) as store,
        pytest.raises(ArgumentError, match=r"(permission|command) denied"),
    ):
        store.score("SELECT 1 AS id, 1.0, 2.0, 3.0", "m@1", into=into, source=source)
