# SPDX-License-Identifier: Apache-2.0
"""SQLite: keys of views whose columns have not one type."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter_options import RangeAdapter
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
