# SPDX-License-Identifier: Apache-2.0
"""SQLite: keys of more than one type, or of a wrong one, that are no UTF-8, or not unique."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter_options import KeyRange, RangeAdapter, RowColumn
from pydedup.errors import ArgumentError
from pydedup.testing.rows_contract import read_ranges


@pytest.mark.parametrize("first", ["numbers", "texts"])
def test_ranges_of_texts_and_numbers_have_each_row_once(tmp_path: Path, first: str) -> None:
    """Bounds were made texts for the texts, and -7 was in no range: above 20, and below '20'."""
    path = tmp_path / "own.db"
    second = "texts" if first == "numbers" else "numbers"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE numbers (k INTEGER, n INTEGER)")
        connection.execute("CREATE TABLE texts (k TEXT, n INTEGER)")
        keys = [1, 2, 3, 13, 14, 20, -5, "12", "13", "30", "abc", "-7"]
        for n, key in enumerate(keys):
            table = "texts" if isinstance(key, str) else "numbers"
            connection.execute(f"INSERT INTO {table} VALUES (?, ?)", (key, n))  # noqa: S608
        connection.execute(
            f"CREATE VIEW both AS SELECT * FROM {first} UNION ALL SELECT * FROM {second}"  # noqa: S608
        )
    rows = registry.connect_rows(f"sqlite:///{path}")
    try:
        assert isinstance(rows, RangeAdapter)
        _, parts = read_ranges(rows, "SELECT k, n FROM both", 1)
        assert Counter(n for part in parts for _, n in part) == Counter(range(len(keys)))
        bounds, _ = read_ranges(rows, "SELECT k, n FROM texts", 1)
        assert bounds == ["-7", "12", "13", "30", "abc"]
    finally:
        rows.close()


@contextlib.contextmanager
def rows_of(folder: Path, *statements: str) -> Iterator[RangeAdapter]:
    """Make a database of a user's and yield its tables."""
    path = folder / "own.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    rows = registry.connect_rows(f"sqlite:///{path}")
    try:
        assert isinstance(rows, RangeAdapter)
        yield rows
    finally:
        rows.close()


def test_a_bound_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    """It cannot be given back to SQLite, which gave it."""
    insert = "INSERT INTO t VALUES ('a'), (CAST(x'ff41' AS TEXT))"
    with rows_of(tmp_path, "CREATE TABLE t (k TEXT)", insert) as rows:
        assert rows.key_bounds("SELECT k FROM t", "k", 1) == ["a", "\udcffA"]
        within = KeyRange(RowColumn("k", ""), None, "\udcffA")
        with (
            pytest.raises(ArgumentError, match=r"a key that is no UTF-8: '\\udcffA'; leave it out"),
            rows.read_range("SELECT k FROM t", 10, within),
        ):
            pass


@pytest.mark.parametrize("columns", ["k) WHERE n > 0", "upper(k))", "k, upper(k))"])
def test_an_index_that_leaves_keys_twice_is_none(tmp_path: Path, columns: str) -> None:
    table, index = "CREATE TABLE t (k TEXT, n INTEGER)", f"CREATE UNIQUE INDEX one ON t ({columns}"
    with (
        rows_of(tmp_path, table, index) as rows,
        pytest.raises(ArgumentError, match="'k' of table t is not unique by itself"),
    ):
        rows.table_columns("t", "k")


def test_a_number_beyond_those_of_sqlite_is_told(tmp_path: Path) -> None:
    with rows_of(tmp_path, "CREATE TABLE t (k INTEGER PRIMARY KEY)") as rows:
        for call in (
            lambda: rows.present_keys("t", "k", [1 << 63]),
            lambda: rows.insert_predictions("t", ["k"], [[-1 << 64]]),
        ):
            with pytest.raises(ArgumentError, match=r"table t: a number is beyond .*; make a text"):
                call()


@pytest.mark.parametrize("key", ["abc", 1.5, b"7", "1_0", "9999999999999999999"])
def test_a_key_that_is_no_whole_number_is_told(tmp_path: Path, key: object) -> None:
    """SQLite says "datatype mismatch", and neither which column nor which row."""
    with rows_of(tmp_path, "CREATE TABLE t (k INTEGER PRIMARY KEY)") as rows:
        said = f"'k' of table t is an INTEGER PRIMARY KEY, .* not the key {re.escape(repr(key))};"
        with pytest.raises(ArgumentError, match=said):
            rows.insert_predictions("t", ["k"], [[7], ["8"], [" 9e0 "], [key], [10.0]])
        assert rows.present_keys("t", "k", [7, 8, 9, 10]) == set()
        assert rows.insert_predictions("t", ["k"], [[7], ["8"], [" 9e0 "], [10.0]])
        assert rows.present_keys("t", "k", [7, 8, 9, 10]) == {7, 8, 9, 10}


@pytest.mark.parametrize(
    ("column", "index", "equal"), [("NOCASE", "BINARY", set()), ("BINARY", "NOCASE", {"A"})]
)
def test_what_keys_are_equal_the_unique_index_says(
    tmp_path: Path, column: str, index: str, equal: set[str]
) -> None:
    """The column was asked: rows were left out that the table takes, or it took some for written.

    Texts that look like numbers are found in a column of numbers as before.
    """
    table = f"CREATE TABLE t (k TEXT COLLATE {column}, n INTEGER)"
    unique = f"CREATE UNIQUE INDEX one ON t (k COLLATE {index})"
    numbers = ("CREATE TABLE u (k INTEGER UNIQUE, n INTEGER)", "INSERT INTO u VALUES (7, 1)")
    with rows_of(tmp_path, table, unique, "INSERT INTO t VALUES ('a', 1)", *numbers) as rows:
        assert rows.present_keys("t", "k", ["A", "b"]) == equal
        assert rows.insert_predictions("t", ["k"], [["A"]]) == (not equal)
        assert rows.present_keys("u", "k", ["7", "8"]) == {"7"}


def test_a_generated_key_is_a_column_that_is_not_written(tmp_path: Path) -> None:
    """The table was told to have no such column."""
    table = "CREATE TABLE t (n INTEGER, k INTEGER AS (n * 2) UNIQUE)"
    with rows_of(tmp_path, table) as rows:
        assert rows.table_columns("t", "k") == ("n", "k")
        with pytest.raises(ArgumentError, match='cannot INSERT into generated column "k"'):
            rows.insert_predictions("t", ["k"], [[1]])


def test_no_index_is_made_on_a_virtual_table(tmp_path: Path) -> None:
    """Its key was to be made its primary key, which nobody can."""
    with (
        rows_of(tmp_path, "CREATE VIRTUAL TABLE t USING fts5(k, prediction)") as rows,
        pytest.raises(ArgumentError, match="t is a virtual table, and no index makes its column"),
    ):
        rows.table_columns("t", "k")
