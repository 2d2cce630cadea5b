# SPDX-License-Identifier: Apache-2.0
"""Tables of predictions on PostgreSQL, where others create the same ones at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pydedup.adapter_options import RowAdapter, RowColumn
from pydedup.errors import ArgumentError
from pydedup.testing._contract_base import open_store

KEY = RowColumn("id", "BIGINT")
COLUMNS = [("prediction", "float")]
WAITING = "SELECT 1 FROM pg_locks WHERE relation = 'pg_class'::regclass AND NOT granted"


@pytest.fixture
def rows(url: str) -> Iterator[RowAdapter]:
    adapter = open_store(url)
    assert isinstance(adapter, RowAdapter)
    yield adapter
    adapter.close()


def test_a_table_that_comes_after_it_was_looked_for(
    rows: RowAdapter, postgres_url: str, schema: str
) -> None:
    """As of two workers of a scoring: PostgreSQL looks twice, and the other commits in between."""
    table = f"{schema}.p"
    with (
        psycopg.connect(postgres_url) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        other.execute("LOCK TABLE pg_class IN SHARE ROW EXCLUSIVE MODE")
        creating = thread.submit(rows.create_predictions, table, KEY, COLUMNS)
        until = time.monotonic() + 60
        while not other.execute(WAITING).fetchall():
            assert time.monotonic() < until, "it does not wait for the other one"
            time.sleep(0.01)
        other.execute(f'CREATE TABLE "{schema}".p (id BIGINT PRIMARY KEY, prediction FLOAT8)')
        other.commit()
        creating.result()
    assert rows.table_columns(table, "id") == ("id", "prediction")


def test_many_create_tables_at_once(url: str, schema: str) -> None:
    """What PostgreSQL tells those who come second depends on how far the first one is."""
    adapters: list[Any] = [open_store(url), *(open_store(url) for _ in range(3))]
    start = threading.Barrier(len(adapters))

    def create(adapter: Any) -> None:
        for number in range(50):
            start.wait(60)
            adapter.create_predictions(f"{schema}.p{number}", KEY, COLUMNS)

    with ThreadPoolExecutor(len(adapters)) as threads:
        done = [threads.submit(create, adapter) for adapter in adapters]
        for one in done:
            one.result()
    for adapter in adapters:
        assert adapter.table_columns(f"{schema}.p49", "id") == ("id", "prediction")
        adapter.close()


def test_a_type_of_the_name_of_a_table(rows: RowAdapter, schema: str, sql: Any) -> None:
    sql(f"CREATE TYPE \"{schema}\".p AS ENUM ('a')")
    with pytest.raises(ArgumentError, match=r'creating table \S*p: type "p" already exists'):
        rows.create_predictions(f"{schema}.p", KEY, COLUMNS)


def test_an_index_that_lets_a_key_occur_twice_makes_none_unique(
    rows: RowAdapter, schema: str, sql: Any
) -> None:
    """One of some rows, one that is looked at when a transaction ends, and one that failed."""
    table = f"{schema}.p"
    sql(f"CREATE TABLE {table} (id BIGINT, prediction FLOAT8)")
    sql(f"INSERT INTO {table} VALUES (1, 1), (1, 2)")  # noqa: S608
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(f"CREATE UNIQUE INDEX CONCURRENTLY failed ON {table} (id)")
    sql(f"CREATE UNIQUE INDEX partial ON {table} (id) WHERE prediction > 1")
    with pytest.raises(ArgumentError, match="not unique by itself"):
        rows.table_columns(table, "id")
    sql(f"TRUNCATE {table}")
    sql(f"DROP INDEX {schema}.failed")
    sql(f"ALTER TABLE {table} ADD UNIQUE (id) DEFERRABLE")
    with pytest.raises(ArgumentError, match="not unique by itself"):
        rows.table_columns(table, "id")
    sql(f"CREATE UNIQUE INDEX whole ON {table} (id) INCLUDE (prediction)")
    assert rows.table_columns(table, "id") == ("id", "prediction")


def test_what_the_driver_has_no_value_for_is_told_as_the_server_writes_it(
    rows: RowAdapter, sql: Any
) -> None:
    """Of each such type: ranges, one and several, intervals, and times with their zone."""
    ranges = ["int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange"]
    ((version,),) = sql("SHOW server_version_num")
    if int(version) >= 140000:
        ranges += [kind.replace("range", "multirange") for kind in ranges]
    empty = ["{}" if "multi" in kind else "empty" for kind in ranges]
    casts = [f"'{value}'::{kind}" for value, kind in zip(empty, ranges, strict=True)]
    casts += ["interval '1 month'", "timetz '04:05+06'"]
    with rows.read_rows(f"SELECT {', '.join(casts)}", 1) as stream:
        assert list(stream) == [[(*empty, "1 mon", "04:05:00+06")]]
