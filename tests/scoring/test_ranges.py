# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""A query of a user in ranges of its key: together they have each row once, whatever the key is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pydedup import registry
from pydedup.adapter import KeyRange, RangeAdapter
from pydedup.errors import ArgumentError

from .conftest import Tables

KEYS = {
    "whole numbers": ("BIGINT", [-(2**62), *range(0, 400, 7), 2**62]),
    "numbers": ("DOUBLE PRECISION", [i / 3 - 20 for i in range(120)]),
    "decimals": ("DECIMAL(20, 2)", [f"{i}.25" for i in range(90)]),
    "texts": ("VARCHAR(40)", [f"{'aÄzß'[i % 4]}{i % 10}%s?'" for i in range(150)]),
    "days": ("DATE", [f"20{i:02d}-03-{i % 27 + 1:02d}" for i in range(90)]),
    "moments": ("TIMESTAMP", [f"2024-03-05 10:{i % 60:02d}:{i // 60:02d}" for i in range(120)]),
    "one of many rows": ("INTEGER", [5] * 100 + [6]),
    "none": ("INTEGER", []),
}


def read(rows: RangeAdapter, query: str, every: int) -> tuple[list[Any], list[list[Any]]]:
    """Return the bounds, and the rows of each range."""
    with rows.read_rows(query, 10) as stream:
        key = stream.columns[0]
    bounds = rows.key_bounds(query, key.name, every)
    edges = [None, *bounds, None]
    parts = []
    for above, up_to in itertools.pairwise(edges):
        with rows.read_range(query, 10, KeyRange(key, above, up_to)) as stream:
            assert [column.name for column in stream.columns] == ["k", "n"]
            parts.append([row for found in stream for row in found])
    return bounds, parts


@pytest.mark.parametrize("name", KEYS)
def test_ranges_have_each_row_once(tables: Tables, new_name: Callable[[], str], name: str) -> None:
    kind, keys = KEYS[name]
    table = new_name()
    tables.run(f"CREATE TABLE {table} (k {kind} NULL, n INTEGER)")
    values = [*keys, None, None]
    tables.run(f"INSERT INTO {table} VALUES (?, ?)", [[key, n] for n, key in enumerate(values)])
    tables.run(f"CREATE INDEX {table}_k ON {table} (k)")
    rows = registry.connect_rows(tables.url)
    try:
        assert isinstance(rows, RangeAdapter)
        query = f"SELECT k, n FROM {table} WHERE 'x%' LIKE 'x%' -- all of them"
        bounds, parts = read(rows, query, 20)
    finally:
        rows.close()
    assert Counter(row[1] for part in parts for row in part) == Counter(range(len(values)))
    assert len(bounds) == len(keys) // 20
    assert sum(row[0] is None for row in parts[0]) == 2
    if len(set(keys)) == len(keys):
        assert [len(part) for part in parts[1:-1]] == [20] * (len(bounds) - 1)


def test_a_query_may_be_of_any_form(tables: Tables, new_name: Callable[[], str]) -> None:
    table = new_name()
    tables.run(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, f INTEGER)")
    tables.run(f"INSERT INTO {table} VALUES (?, ?)", [[i, i % 10] for i in range(100)])
    rows = registry.connect_rows(tables.url)
    try:
        assert isinstance(rows, RangeAdapter)
        for query in (
            f"SELECT f AS k, COUNT(*) AS n FROM {table} GROUP BY f;",
            f"WITH t AS (SELECT * FROM {table}) SELECT id AS k, f AS n FROM t ORDER BY f LIMIT 50",
            f"SELECT id AS k, f AS n FROM {table} UNION SELECT id + 1000, f FROM {table}",
        ):
            with rows.read_rows(query.rstrip(";"), 1000) as stream:
                whole = [row for found in stream for row in found]
            _, parts = read(rows, query, 4)
            assert sorted(row for part in parts for row in part) == sorted(whole)
        with pytest.raises(ArgumentError, match="must be one SELECT"):
            rows.key_bounds(f"DELETE FROM {table}", "k", 4)
        with pytest.raises(ArgumentError, match="query failed"):
            rows.key_bounds(f"SELECT id FROM {table}_nothing", "id", 4)
    finally:
        rows.close()
