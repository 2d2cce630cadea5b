# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""PostgreSQL: tables that users made, with keys and columns of types that we would not make."""

from __future__ import annotations

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter_options import RowAdapter
from pydedup.testing.servers import unused_name

#: Types of keys -> two values as literals.
KEYS = {
    "smallint": ("1", "-2"),
    "integer": ("1", "2000000000"),
    "bigint": ("1", "9000000000000000000"),
    "numeric(40, 3)": ("1.5", "123456789012345678901234567890.125"),
    "real": ("0.1", "2.5"),
    "double precision": ("0.1", "1e300"),
    "text": ("'a'", "'ü%s{\",'"),
    "varchar(10)": ("'a'", "'{}'"),
    "bytea": (r"'\x00ff'", r"'\x'"),
    "boolean": ("true", "false"),
    "date": ("'2026-02-03'", "'0001-01-01'"),
    "time": ("'10:20:30.5'", "'00:00'"),
    "timestamp": ("'2026-02-03 04:05:06.789'", "'1900-01-01'"),
    "timestamptz": ("'2026-02-03 04:05:06.789+05'", "'1900-01-01 00:00+00'"),
    "interval": ("'3 days 4 hours'", "'-1 second'"),
    "uuid": ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "'00000000-0000-0000-0000-000000000000'"),
    "inet": ("'10.1.2.3'", "'::1'"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_was_read_is_written(postgres_url: str, kind: str) -> None:
    """And found again, as equal to what it was read from."""
    source, into = unused_name(), unused_name()
    values = KEYS[kind]
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {source} (id {kind})")
        connection.execute(f"INSERT INTO {source} VALUES ({values[0]}), ({values[1]})")
        connection.execute(
            f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction numeric, model varchar(9))"
        )
        rows = registry.connect_rows(postgres_url)
        try:
            assert isinstance(rows, RowAdapter)
            table = rows.full_table_name(into)
            with rows.read_rows(f"SELECT id FROM {source}", 10) as stream:
                keys = [row[0] for batch in stream for row in batch]
            lines = [(key, number + 0.5, "m@1") for number, key in enumerate(keys)]
            assert rows.insert_predictions(table, ["id", "prediction", "model"], lines)
            assert not rows.insert_predictions(table, ["id", "prediction", "model"], lines[:1])
            assert rows.present_keys(table, "id", keys) == set(keys)
        finally:
            rows.close()
        same = f"SELECT count(*) FROM {source} JOIN {into} USING (id) WHERE model = 'm@1'"
        assert connection.execute(same).fetchone() == (2,)
        connection.execute(f"DROP TABLE {source}, {into}")


@pytest.mark.parametrize("kind", ["real", "double precision", "numeric(20, 10)", "integer"])
def test_a_prediction_takes_the_type_of_its_column(postgres_url: str, kind: str) -> None:
    into = unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {into} (id bigint PRIMARY KEY, prediction {kind})")
        rows = registry.connect_rows(postgres_url)
        try:
            assert isinstance(rows, RowAdapter)
            table = rows.full_table_name(into)
            assert rows.insert_predictions(table, ["id", "prediction"], [(1, 2.0), (2, -3.0)])
        finally:
            rows.close()
        found = connection.execute(f"SELECT id, prediction FROM {into} ORDER BY id").fetchall()
        assert [(key, float(value)) for key, value in found] == [(1, 2.0), (2, -3.0)]
        connection.execute(f"DROP TABLE {into}")
