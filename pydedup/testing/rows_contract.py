# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""The suites for the optional protocols of tables of users: what `pydedup score` works with.

An adapter that is a :class:`pydedup.adapter_options.RowAdapter` passes
:class:`RowAdapterContract`; one that is a :class:`pydedup.adapter_options.RangeAdapter` as well,
:class:`RangeAdapterContract`, which has all of it. Subclass, give the place and the database's own
driver, and pytest does the rest::

    class TestRowsOfMyDatabase(RangeAdapterContract):
        def make_url(self, folder): ...
        def run(self, url, statement, rows=None): ...
"""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydedup import registry
from pydedup.adapter_options import KeyRange, RangeAdapter, RowAdapter, RowColumn
from pydedup.errors import ArgumentError
from pydedup.testing.servers import unused_name

__all__ = ["RangeAdapterContract", "RowAdapterContract"]

_KIND = "BIGINT NOT NULL PRIMARY KEY"


class RowAdapterContract(abc.ABC):
    """Queries of users, and tables of predictions."""

    @abc.abstractmethod
    def make_url(self, folder: Path) -> str:
        """Return the URL of a database; ``folder`` is empty and writable."""

    @abc.abstractmethod
    def run(
        self, url: str, statement: str, rows: Sequence[Sequence[object]] | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a statement by the driver, once for each of ``rows``, and return what it finds.

        ``?`` marks values.
        """

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        """Give a database."""
        folder = tmp_path / "database"
        folder.mkdir()
        url = self.make_url(folder)
        self.run(url, "SELECT 1")  # a database in a file is one from now on
        return url

    @pytest.fixture
    def adapter(self, url: str) -> Iterator[RowAdapter]:
        """Give the adapter of a database in which there is no store."""
        adapter = registry.connect_rows(url)
        yield adapter
        adapter.close()

    @pytest.fixture
    def table(self, url: str) -> Iterator[str]:
        """Give a name that no table has; what is made of it goes away."""
        name = unused_name().replace("pydedup", "t")
        yield name
        with contextlib.suppress(Exception):
            self.run(url, f"DROP TABLE {name}")

    def fill(self, url: str, table: str, count: int) -> None:
        """Create a table of ``count`` rows: id from 1 on, and its square."""
        self.run(url, f"CREATE TABLE {table} (id {_KIND}, square BIGINT)")
        self.run(
            url, f"INSERT INTO {table} VALUES (?, ?)", [[i, i * i] for i in range(1, count + 1)]
        )

    # ---- queries --------------------------------------------------------------------------------

    def test_rows_come_in_batches(self, adapter: RowAdapter, url: str, table: str) -> None:
        """All of them, in the order of the query, no batch larger than asked for."""
        self.fill(url, table, 25)
        with adapter.read_rows(f"SELECT id, square AS s FROM {table} ORDER BY id DESC", 10) as rows:
            assert [column.name for column in rows.columns] == ["id", "s"]
            batches = list(rows)
        assert [len(batch) for batch in batches] == [10, 10, 5]
        assert [tuple(row) for batch in batches for row in batch] == [
            (i, i * i) for i in range(25, 0, -1)
        ]

    def test_nothing_found_has_columns(self, adapter: RowAdapter, url: str, table: str) -> None:
        """A query may find nothing, and a value be NULL."""
        self.fill(url, table, 1)
        with adapter.read_rows(f"SELECT id, square FROM {table} WHERE id > 5", 10) as rows:
            assert [column.name for column in rows.columns] == ["id", "square"]
            assert list(rows) == []
        with adapter.read_rows(f"SELECT id, NULLIF(id, 1) AS n FROM {table}", 10) as rows:
            assert [tuple(row) for batch in rows for row in batch] == [(1, None)]

    def test_a_query_may_be_given_up(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Whoever leaves halfway, by an error too, can ask again."""
        self.fill(url, table, 500)
        query = f"SELECT id FROM {table}"
        with contextlib.suppress(ZeroDivisionError), adapter.read_rows(query, 10) as rows:
            assert len(next(iter(rows))) == 10
            raise ZeroDivisionError
        with adapter.read_rows(query, 1000) as rows:
            assert sum(map(len, rows)) == 500

    def test_other_calls_go_on_meanwhile(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Predictions are written while rows are still being read, and the reader sees none."""
        self.fill(url, table, 300)
        made = f"{table}_p"
        done = adapter.full_table_name(made)
        try:
            with adapter.read_rows(f"SELECT id FROM {table} ORDER BY id", 100) as rows:
                adapter.create_predictions(done, rows.columns[0], [("prediction", "float")])
                for batch in rows:
                    found = [[row[0], float(row[0]) / 2] for row in batch]  # type: ignore[arg-type]
                    assert adapter.insert_predictions(done, ["id", "prediction"], found)
                    assert adapter.present_keys(done, "id", [row[0] for row in batch]) == {
                        row[0] for row in batch
                    }
            assert self.run(url, f"SELECT COUNT(*), SUM(prediction) FROM {made}") == [
                (300, 22575.0)
            ]
        finally:
            self.run(url, f"DROP TABLE {made}")

    def test_only_one_select_is_run(self, adapter: RowAdapter, url: str, table: str) -> None:
        """What would change something is refused, and changes nothing."""
        self.fill(url, table, 3)
        for query in (
            f"DELETE FROM {table}",
            f"INSERT INTO {table} VALUES (9, 9)",
            f"SELECT id FROM {table}; DELETE FROM {table}",
            f"/* SELECT */ DROP TABLE {table}",
            f"WITH gone AS (DELETE FROM {table} RETURNING id) SELECT id FROM gone",
            "",
            "  -- nothing",
            f"SELECT id FROM {table} WHERE id = 1\0",
        ):
            with pytest.raises(ArgumentError), adapter.read_rows(query, 10) as rows:
                list(rows)
            assert self.run(url, f"SELECT COUNT(*) FROM {table}") == [(3,)], query

    def test_the_database_says_what_is_wrong(
        self, adapter: RowAdapter, url: str, table: str
    ) -> None:
        """A mistake in a query is reported in the words of the database, which name the culprit."""
        self.fill(url, table, 1)
        query = f"SELECT missing_one FROM {table}"
        with pytest.raises(ArgumentError, match="missing_one"), adapter.read_rows(query, 10):
            pass
        with pytest.raises(ArgumentError), adapter.read_rows(f"SELECT * FROM {table}_no", 10):
            pass
        with adapter.read_rows(f"SELECT id FROM {table}", 10) as rows:
            assert sum(map(len, rows)) == 1

    # ---- tables of predictions ------------------------------------------------------------------

    def test_a_table_is_made_once(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Its columns are those that were asked for; a table that exists stays as it is."""
        full = adapter.full_table_name(table)
        with adapter.read_rows("SELECT 1 AS id", 1) as rows:
            key = rows.columns[0]
        assert adapter.table_columns(full, "id") is None
        columns = [("a", "float"), ("b", "text"), ("c", "vector")]
        adapter.create_predictions(full, key, columns)
        assert adapter.table_columns(full, "id") == ("id", "a", "b", "c")
        vector = adapter.vector(np.array([1.5, -2.0], "<f4").tobytes())
        assert adapter.insert_predictions(full, ["id", "a", "b", "c"], [[7, 0.5, "ü%s'?", vector]])
        adapter.create_predictions(full, key, [("other", "float")])
        assert adapter.table_columns(full, "id") == ("id", "a", "b", "c")
        assert self.run(url, f"SELECT id, a, b FROM {table}") == [(7, 0.5, "ü%s'?")]

    def test_a_key_is_taken_once(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Of rows one of which is there already, none is inserted."""
        full = adapter.full_table_name(table)
        self.fill(url, table, 3)
        columns = ["id", "square"]
        assert adapter.insert_predictions(full, columns, [[5, 25], [6, 36]])
        assert not adapter.insert_predictions(full, columns, [[8, 64], [6, 0], [9, 81]])
        assert not adapter.insert_predictions(full, columns, [[10, 1], [10, 2]])
        assert self.run(url, f"SELECT id, square FROM {table} ORDER BY id") == [
            (1, 1),
            (2, 4),
            (3, 9),
            (5, 25),
            (6, 36),
        ]
        assert adapter.insert_predictions(full, columns, [[8, 64]])

    def test_keys_that_are_present(self, adapter: RowAdapter, url: str, table: str) -> None:
        """However many are asked for at once, and however often."""
        full = adapter.full_table_name(table)
        self.fill(url, table, 2000)
        asked = [*range(1000, 40_000), 1000]
        assert adapter.present_keys(full, "id", asked) == set(range(1000, 2001))
        assert adapter.present_keys(full, "id", []) == set()

    def test_keys_of_another_type_are_found(
        self, adapter: RowAdapter, url: str, table: str
    ) -> None:
        """What is equal, the column says, and they are returned as they were asked."""
        full = adapter.full_table_name(table)
        self.fill(url, table, 2000)
        asked = [str(number) for number in range(1500, 3000)]
        assert adapter.present_keys(full, "id", asked) == set(asked[:501])
        assert adapter.present_keys(full, "id", ["007", "70000", "7", "7"]) == {"007", "7"}

    def test_a_key_must_be_unique(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Otherwise nobody knows which row is done."""
        full = adapter.full_table_name(table)
        self.run(url, f"CREATE TABLE {table} (id BIGINT, other BIGINT NOT NULL, x BIGINT)")
        with pytest.raises(ArgumentError, match="id"):
            adapter.table_columns(full, "id")
        self.run(url, f"CREATE UNIQUE INDEX {table}_two ON {table} (id, other)")
        with pytest.raises(ArgumentError, match="id"):
            adapter.table_columns(full, "id")
        self.run(url, f"CREATE UNIQUE INDEX {table}_one ON {table} (other)")
        assert adapter.table_columns(full, "other") == ("id", "other", "x")
        assert adapter.table_columns(full, "none") == ("id", "other", "x")
        self.run(url, f"DROP TABLE {table}")
        self.run(url, f"CREATE TABLE {table} (id BIGINT, part BIGINT, PRIMARY KEY (id, part))")
        with pytest.raises(ArgumentError, match="id"):
            adapter.table_columns(full, "id")

    def test_names_are_no_statements(self, adapter: RowAdapter, url: str, table: str) -> None:
        """What is no plain name is refused before it is sent, wherever one is taken."""
        full, named = adapter.full_table_name(table), adapter.full_table_name
        other = named(f"{table}_x")
        self.fill(url, table, 1)
        key = RowColumn("id", "BIGINT")
        calls: list[Callable[[str], object]] = [
            lambda bad: adapter.table_columns(named(bad), "id"),
            lambda bad: adapter.create_predictions(named(bad), key, [("p", "float")]),
            lambda bad: adapter.create_predictions(other, key, [(bad, "float")]),
            lambda bad: adapter.present_keys(named(bad), "id", [1]),
            lambda bad: adapter.present_keys(full, bad, [1]),
            lambda bad: adapter.insert_predictions(named(bad), ["id"], [[2]]),
            lambda bad: adapter.insert_predictions(full, ["id", bad], [[2, 4]]),
        ]
        for bad in ("", "a b", "a;--", "a; DROP TABLE a", 'a"b', "a`b", "1a", "a\0"):
            for call in calls:
                with pytest.raises(ArgumentError):
                    call(bad)
        assert self.run(url, f"SELECT id, square FROM {table}") == [(1, 1)]
        assert adapter.table_columns(other, "id") is None


_KEYS: dict[str, tuple[str, list[object]]] = {
    "whole numbers": ("BIGINT", [-(2**62), *range(0, 400, 7), 2**62]),
    "numbers": ("DOUBLE PRECISION", [i / 3 - 20 for i in range(120)]),
    "decimals": ("DECIMAL(20, 2)", [f"{i}.25" for i in range(90)]),
    "texts": ("VARCHAR(40)", [f"{'aÄzß'[i % 4]}{i % 10}%s?'\\" for i in range(150)]),
    "days": ("DATE", [f"20{i:02d}-03-{i % 27 + 1:02d}" for i in range(90)]),
    "moments": ("TIMESTAMP", [f"2024-03-05 10:{i % 60:02d}:{i // 60:02d}" for i in range(120)]),
    "one of many rows": ("INTEGER", [*[5] * 100, 6]),
    "none": ("INTEGER", []),
}


class RangeAdapterContract(RowAdapterContract):
    """A query of a user in ranges of its key: together they have each row once."""

    @pytest.mark.parametrize("name", _KEYS)
    def test_ranges_have_each_row_once(
        self, adapter: RowAdapter, url: str, table: str, name: str
    ) -> None:
        """Whatever the key is; rows without one are of the first."""
        assert isinstance(adapter, RangeAdapter)
        kind, keys = _KEYS[name]
        self.run(url, f"CREATE TABLE {table} (k {kind} NULL, n INTEGER)")
        values = [*keys, None, None]
        self.run(url, f"INSERT INTO {table} VALUES (?, ?)", [[k, n] for n, k in enumerate(values)])
        self.run(url, f"CREATE INDEX {table}_k ON {table} (k)")
        query = f"SELECT k, n FROM {table} WHERE '%(key0)s %s' LIKE '%(key0)s %' -- all"
        bounds, parts = read_ranges(adapter, query, 20)
        assert Counter(row[1] for part in parts for row in part) == Counter(range(len(values)))
        assert len(bounds) == len(keys) // 20
        assert sum(row[0] is None for row in parts[0]) == 2
        if len(set(keys)) == len(keys):
            assert [len(part) for part in parts[1:-1]] == [20] * (len(bounds) - 1)

    def test_a_query_may_be_of_any_form(self, adapter: RowAdapter, url: str, table: str) -> None:
        """Grouped, with tables of its own, or of several SELECTs."""
        assert isinstance(adapter, RangeAdapter)
        self.fill(url, table, 100)
        digit = "square % 10"
        for query in (
            f"SELECT {digit} AS k, COUNT(*) AS n FROM {table} GROUP BY {digit};",
            f"WITH t AS (SELECT * FROM {table}) SELECT id AS k, 2 AS n FROM t ORDER BY id LIMIT 9",
            f"SELECT id AS k, square AS n FROM {table} UNION SELECT id + 1000, 1 FROM {table}",
            f"SELECT id AS k, '; -- x' AS n FROM {table}; -- all\n -- of them",
            f"SELECT id AS k, 3 AS n FROM {table} /* ; -- x */",
        ):
            with adapter.read_rows(query.split("; -- all")[0].rstrip(";"), 1000) as stream:
                assert list(adapter.query_columns(query)) == list(stream.columns)
                whole = [row for found in stream for row in found]
            _, parts = read_ranges(adapter, query, 4)
            assert sorted(row for part in parts for row in part) == sorted(whole)
        with pytest.raises(ArgumentError, match="must be one SELECT"):
            adapter.key_bounds(f"DELETE FROM {table}", "k", 4)
        with pytest.raises(ArgumentError, match="query failed"):
            adapter.key_bounds(f"SELECT id FROM {table}_nothing", "id", 4)


def read_ranges(adapter: RangeAdapter, query: str, every: int) -> tuple[list[Any], list[list[Any]]]:
    """Return the bounds of a query's key, its first column, and the rows of each range."""
    with adapter.read_rows(query.split("; -- all")[0].rstrip(";"), 10) as stream:
        key = stream.columns[0]
    bounds = adapter.key_bounds(query, key.name, every)
    parts = []
    for above, up_to in itertools.pairwise([None, *bounds, None]):
        with adapter.read_range(query, 10, KeyRange(key, above, up_to)) as stream:
            assert [column.name for column in stream.columns] == ["k", "n"]
            parts.append([row for found in stream for row in found])
    return bounds, parts
