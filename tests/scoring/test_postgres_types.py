# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""PostgreSQL: tables that users made, with keys and columns of types that we would not make."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from urllib.parse import quote

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter_options import RangeAdapter, RowAdapter
from pydedup.errors import ArgumentError, UnavailableError
from pydedup.testing._contract_base import with_option
from pydedup.testing.rows_contract import read_ranges
from pydedup.testing.servers import as_user, password_of, unused_name

from .conftest import linear

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
    "char(5)": ("'a'", "'abcde'"),
    "bpchar": ("'a '", "'abcde'"),
    '"char"': ("'a'", "'b'"),
    "name": ("'a'", "'b'"),
    "macaddr": ("'08:00:2b:01:02:03'", "'08:00:2b:01:02:04'"),
    "bit(3)": ("B'101'", "B'010'"),
    "int4range": ("'[1,3)'", "'empty'"),
    "tsrange": ("'[2026-02-03 04:05, 2026-02-03 04:06)'", "'(,)'"),
    'varchar(3) COLLATE "C"': ("'a '", "'a'"),
    'types_of."Mo""od"': ("'glad'", "'a sad\"''{one,'"),
    "types_of.code": ("'ab'", "'a'"),
    "types_of.pair": ("ROW(1, 'a \"b,')", "ROW(-2, NULL)"),
}

#: What is said of an array that is nested 2,000 deep: Python reads one since 3.12.
TOO_DEEP = (
    "x is nested 2000 deep; 31 is the most"
    if sys.version_info >= (3, 12)
    else "x is a text that is no JSON array of numbers"
)


@pytest.fixture(scope="module", autouse=True)
def types(postgres_url: str) -> Iterator[None]:
    """Make an enum, and domains over that and a padded text, where no search path finds them.

    And a type of two parts, and two that come with operators of their own.
    """
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA types_of")
        connection.execute(
            """CREATE TYPE types_of."Mo""od" AS ENUM ('zeal', 'glad', 'a sad"''{one,')"""
        )
        connection.execute("""CREATE DOMAIN types_of.feeling AS types_of."Mo""od" """)
        connection.execute("CREATE DOMAIN types_of.code AS char(4) CHECK (value <> '')")
        connection.execute("CREATE TYPE types_of.pair AS (a integer, b text)")
        for name in ("citext", "ltree"):
            connection.execute(f"CREATE EXTENSION {name} SCHEMA types_of")
        yield
        connection.execute("DROP SCHEMA types_of CASCADE")


@pytest.fixture
def rows(postgres_url: str) -> Iterator[RowAdapter]:
    """Give the adapter of a database whose tables are a user's."""
    found = registry.connect_rows(postgres_url)
    assert isinstance(found, RowAdapter)
    yield found
    found.close()


@pytest.fixture(scope="module")
def store(postgres_url: str) -> Iterator[pydedup.Store]:
    """A store of a model of three inputs and, as ``one``, of one."""
    model, graph = linear()
    with pydedup.open(postgres_url, schema=unused_name()) as store:
        store.add("m@1", model, graph=graph)
        store.add("one@1", {"w": np.ones((1, 1), np.float32)}, graph=graph)
        yield store


#: What the driver makes values of two types of, in both orders.
TWO_TYPES = [("inet", ("'10.0.0.0/8'", "'10.1.2.3'")), ("inet", ("'10.1.2.3'", "'10.0.0.0/8'"))]


#: What the driver would make 365 days of, which the server takes for 5 more than a year.
YEARS = ("interval", ("'1 year'", "'-3 mons 2 days 00:00:00.5'"))
SEVERAL_RANGES = ("int4multirange", ("'{[1,3), [5,7)}'", "'{}'"))


@pytest.mark.parametrize(("kind", "values"), [*KEYS.items(), *TWO_TYPES, YEARS, SEVERAL_RANGES])
def test_a_key_that_was_read_is_written(
    postgres_url: str, rows: RowAdapter, kind: str, values: tuple[str, str]
) -> None:
    """And found again, as equal to what it was read from."""
    source, into = unused_name(), unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        if kind == "int4multirange" and connection.info.server_version < 140000:
            pytest.skip("PostgreSQL 14 has several ranges in one")
        connection.execute(f"CREATE TABLE {source} (id {kind})")
        connection.execute(f"INSERT INTO {source} VALUES ({values[0]}), ({values[1]})")
        connection.execute(
            f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction numeric, model varchar(9))"
        )
        table = rows.full_table_name(into)
        with rows.read_rows(f"SELECT id FROM {source}", 10) as stream:
            keys = [row[0] for batch in stream for row in batch]
        lines = [(key, number + 0.5, "m@1") for number, key in enumerate(keys)]
        assert rows.insert_predictions(table, ["id", "prediction", "model"], lines)
        assert not rows.insert_predictions(table, ["id", "prediction", "model"], lines[:1])
        assert rows.present_keys(table, "id", keys) == set(keys)
        same = f"SELECT count(*) FROM {source} JOIN {into} USING (id) WHERE model = 'm@1'"
        assert connection.execute(same).fetchone() == (2,)
        connection.execute(f"DROP TABLE {source}, {into}")


def test_json_and_rows_without_a_type_are_no_keys(postgres_url: str, store: pydedup.Store) -> None:
    """A table for it was made before that was seen, and stayed."""
    into = unused_name().replace("pydedup", "t")
    query = "SELECT CAST('{\"a\": 1}' AS jsonb) AS id, 1 AS a, 2 AS b, 3 AS c"
    row = "SELECT ROW(1, 2) AS id, 1 AS a, 2 AS b, 3 AS c"
    for said in (query, query.replace("""{"a": 1}""", "1"), row):
        with pytest.raises(ArgumentError, match=r"'id' .*can be no key|is a list, a set or JSON"):
            store.score(said, "m@1", into=into)
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT to_regclass(%s)", [into]).fetchone() == (None,)


def test_a_table_made_anew_with_other_types_is_looked_at_again(
    postgres_url: str, rows: RowAdapter
) -> None:
    """The next scoring begins with its columns, after which texts are of their new types."""
    into = unused_name()
    table = rows.full_table_name(into)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for kind, text in (("text", "no number"), ("integer", "007"), ("uuid", "no uuid")):
            connection.execute(f"DROP TABLE IF EXISTS {into}")
            connection.execute(f"CREATE TABLE {into} (id {kind} PRIMARY KEY)")
            assert rows.table_columns(table, "id") == ("id",)
            if text == "no uuid":
                with pytest.raises(ArgumentError, match="uuid"):
                    rows.present_keys(table, "id", [text])
            else:
                assert rows.present_keys(table, "id", [text]) == set()
                assert rows.insert_predictions(table, ["id"], [(text,)])
                assert rows.present_keys(table, "id", [text]) == {text}
        connection.execute(f"DROP TABLE {into}")


@pytest.mark.parametrize(
    ("kind", "key", "there"),
    [
        ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc999c0b4ef8bb6d6bb9bd380a11"),
        ("integer", "007", "7"),
        ("types_of.citext", "GLAD", "Glad"),
    ],
)
def test_a_text_is_found_however_it_is_written(
    postgres_url: str, rows: RowAdapter, kind: str, key: str, there: str
) -> None:
    """By what it means to the column's type, which writes it in another way."""
    into = unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction float)")
        table = rows.full_table_name(into)
        assert rows.insert_predictions(table, ["id", "prediction"], [(there, 0.5)])
        assert rows.present_keys(table, "id", [key]) == {key}
        connection.execute(f"DROP TABLE {into}")


@pytest.mark.parametrize("kind", ["real", "double precision", "numeric(20, 10)", "integer"])
def test_a_prediction_takes_the_type_of_its_column(
    postgres_url: str, rows: RowAdapter, kind: str
) -> None:
    into = unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {into} (id bigint PRIMARY KEY, prediction {kind})")
        table = rows.full_table_name(into)
        assert rows.insert_predictions(table, ["id", "prediction"], [(1, 2.0), (2, -3.0)])
        found = connection.execute(f"SELECT id, prediction FROM {into} ORDER BY id").fetchall()
        assert [(key, float(value)) for key, value in found] == [(1, 2.0), (2, -3.0)]
        connection.execute(f"DROP TABLE {into}")


@pytest.mark.parametrize("kind", ["char(8)", "varchar(8)", 'types_of."Mo""od"'])
def test_ranges_of_keys_have_each_row_once(postgres_url: str, kind: str) -> None:
    """Enums are in the order of their definition, which is none of texts."""
    source = unused_name()
    keys = ["glad", "a sad\"'{one,", "zeal"] if "Mo" in kind else ["b", "ab", "a", "x%s", "ba c"]
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {source} (k {kind}, n int)")
        with connection.cursor() as cursor:
            lines = [(key, n) for n, key in enumerate(keys * 3)]
            cursor.executemany(f"INSERT INTO {source} VALUES (%s, %s)", lines)
        rows = registry.connect_rows(postgres_url)
        try:
            assert isinstance(rows, RangeAdapter)
            bounds, parts = read_ranges(rows, f"SELECT k, n FROM {source};", 2)
        finally:
            rows.close()
        assert len(bounds) == len(keys) * 3 // 2
        found = sorted((n, key.rstrip()) for part in parts for key, n in part)
        assert found == list(enumerate(keys * 3))
        connection.execute(f"DROP TABLE {source}")


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        *(
            (kind, made)
            for kind in ("char(5)", 'types_of."Mo""od"', "types_of.citext", "types_of.ltree")
            for made in (kind, None, "text")
        ),
        *(("text", made) for made in ("char(5)", "types_of.feeling")),
        ('types_of."Mo""od"', "char(5)"),
    ],
)
def test_a_scoring_goes_on_by_such_keys(
    postgres_url: str, store: pydedup.Store, kind: str, made: str | None
) -> None:
    """Whether the table of predictions is ours, or a user's with a key of another type."""
    source, into = unused_name(), unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {source} (id {kind}, f0 real, f1 real, f2 real)")
        connection.execute(f"INSERT INTO {source} VALUES ('glad', 1, 2, 3), ('zeal', 4, 5, 6)")
        if made is not None:
            connection.execute(f"CREATE TABLE {into} (id {made} PRIMARY KEY, prediction real)")
        query = f"SELECT * FROM {source} ORDER BY id"
        first = store.score(f"{query} LIMIT 1", "m@1", into=into)
        then = store.score(query, "m@1", into=into)
        assert (first.rows, then.rows, then.skipped) == (1, 1, 1)
        found = connection.execute(f"SELECT prediction FROM {into} ORDER BY prediction").fetchall()
        wanted = sorted((np.array([[1, 2, 3], [4, 5, 6]]) @ linear()[0]["w"].T)[:, 0])
        np.testing.assert_allclose([value for (value,) in found], wanted, rtol=1e-5)
        connection.execute(f"DROP TABLE {source}, {into}")


@pytest.mark.parametrize("batch", [1, 10])
def test_the_hour_that_a_clock_shows_twice(postgres_url: str, batch: int) -> None:
    """Instants are keys, not what the clock of the session's time zone says of them."""
    store_url = f"{postgres_url}&options=-c%20timezone%3DEurope/Berlin"
    with pydedup.open(store_url, schema=unused_name()) as store:
        store.add("m", {"w": np.array([[1.0, 10.0]], np.float32)}, graph=linear()[1])
        into = unused_name()
        values = "('2024-10-27 00:30Z', 1), ('2024-10-27 01:30Z', 2)"
        query = f"SELECT t::timestamptz AS id, a, a AS b FROM (VALUES {values}) AS v(t, a)"
        first = store.score(f"{query} WHERE a = 2", "m", into=into, batch=batch)
        rest = store.score(query, "m", into=into, batch=batch)
        assert (first.rows, rest.rows, rest.skipped) == (1, 1, 1)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        found = connection.execute(f"SELECT prediction FROM {into} ORDER BY id").fetchall()
        assert found == [(11.0,), (22.0,)]
        connection.execute(f"DROP TABLE {into}")


def test_times_of_two_zones_are_two_keys(postgres_url: str) -> None:
    """Python takes 12:00+01 and 11:00+00 for one, and so the second was told as a twin."""
    into = unused_name()
    with pydedup.open(postgres_url, schema=unused_name()) as store:
        store.add("m", {"w": np.array([[1.0, 10.0]], np.float32)}, graph=linear()[1])
        values = "('12:00+01', 1), ('11:00+00', 2), ('24:00-03', 3)"
        query = f"SELECT t::timetz AS id, a, a AS b FROM (VALUES {values}) AS v(t, a)"
        first = store.score(query, "m", into=into)
        again = store.score(query, "m", into=into)
        assert (first.rows, again.rows, again.skipped) == (3, 0, 3)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        found = connection.execute(
            f"SELECT prediction FROM {into} JOIN (VALUES {values}) AS v(t, a) "
            "ON id = t::timetz ORDER BY a"
        ).fetchall()
        assert found == [(11.0,), (22.0,), (33.0,)]
        connection.execute(f"DROP TABLE {into}")


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ("Infinity", "numeric", "x is inf"),
        ("9" * 5000, "numeric", "x is inf"),
        (f"[{'9' * 5000}]", "jsonb", "x is a text that is no JSON array of numbers"),
        ("[" * 2000 + "1" + "]" * 2000, "jsonb", TOO_DEEP),
        ("[" * 70 + "1" + "]" * 70, "text", "x is nested 70 deep; 31 is the most"),
    ],
)
def test_one_value_that_is_beyond_python_is_of_one_row(
    postgres_url: str, store: pydedup.Store, value: str, kind: str, reason: str
) -> None:
    with psycopg.connect(postgres_url) as connection:
        if value == "Infinity" and connection.info.server_version < 140000:
            pytest.skip("PostgreSQL 14 has numbers without an end")
    good = "[1]" if kind != "numeric" else "1"
    query = f"SELECT 1 AS id, CAST('{value}' AS {kind}) AS x UNION ALL SELECT 2, '{good}'"
    into = unused_name()
    report = store.score(query, "one@1", into=into, on_error="skip")
    assert (report.rows, [one.reason for one in report.failures]) == (1, [reason])
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP TABLE {into}")


@pytest.mark.parametrize(
    "value",
    [
        "date 'infinity'",
        "timestamptz '-infinity'",
        "timestamp '0044-03-15 BC'",
        "time '24:00'",
    ],
)
def test_a_date_that_python_lacks_is_told(rows: RowAdapter, value: str) -> None:
    with (
        rows.read_rows(f"SELECT {value} AS id", 10) as stream,
        pytest.raises(ArgumentError, match=r"Python has none for.*cast the column to text"),
    ):
        list(stream)
    with rows.read_rows(f"SELECT CAST({value} AS text) AS id", 10) as stream:
        assert len(list(stream)) == 1


def test_a_query_may_take_longer_than_a_transaction_may(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        if connection.info.server_version < 170000:
            pytest.skip("PostgreSQL 17 has transaction_timeout")
        role = unused_name()
        secret = password_of(postgres_url)
        connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{secret}'")
        connection.execute(f"ALTER ROLE {role} SET transaction_timeout = '1s'")
        connection.execute(f"ALTER ROLE {role} SET idle_in_transaction_session_timeout = '800ms'")
        rows = registry.connect_rows(as_user(postgres_url, role))
        try:
            assert isinstance(rows, RowAdapter)
            with rows.read_rows("SELECT * FROM generate_series(1, 3)", 1) as stream:
                next(iter(stream))
                time.sleep(1.3)
                assert len(list(stream)) == 2
            with (
                pytest.raises(UnavailableError, match="raise transaction_timeout for this role"),
                rows.snapshot(),  # type: ignore[attr-defined]
            ):
                rows._query("SELECT pg_sleep(5)")  # type: ignore[attr-defined]
        finally:
            rows.close()
            connection.execute(f"DROP ROLE {role}")


def test_a_table_that_is_made_anew_with_another_type(postgres_url: str) -> None:
    """Statements that the driver had prepared failed for the rest of the session."""
    model, graph = linear()
    schema, name = unused_name(), unused_name().replace("pydedup", "t")
    query = "SELECT i AS id, i AS f0, 2 AS f1, 3 AS f2 FROM generate_series(1, 12) i"
    with (
        psycopg.connect(postgres_url, autocommit=True) as user,
        pydedup.open(postgres_url, schema=schema) as store,
    ):
        store.add("m", model, graph=graph)
        for kind in ("bigint", "numeric", "smallint"):
            user.execute(f"DROP TABLE IF EXISTS {name}")
            user.execute(f"CREATE TABLE {name} (id {kind} PRIMARY KEY, prediction real)")
            for written in (12, 0):
                assert store.score(query, "m@1", into=name, batch=1).rows == written
        user.execute(f"DROP TABLE {name}")
        user.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.mark.parametrize("query", ["SELECT 1 AS id, $1 AS f", "SELECT 1 AS id, 2 AS f FOR UPDATE"])
def test_a_query_that_does_not_only_read_is_no_fault_of_the_server(
    rows: RowAdapter, query: str
) -> None:
    """It was told as a lost connection, and as a server that is no primary."""
    query = query.replace(" FOR", " FROM pg_class FOR")
    with pytest.raises(ArgumentError, match="the query failed"), rows.read_rows(query, 1):
        pass
    with rows.read_rows("SELECT 1 AS id, 2 AS f", 1) as stream:
        assert [row for found in stream for row in found] == [(1, 2)]


def test_what_the_server_advises_is_passed_on(rows: RowAdapter) -> None:
    query = "SELECT oid AS id, relpage AS f FROM pg_class"
    with (
        pytest.raises(ArgumentError, match=r'"relpage" does not exist \(.*"pg_class.relpages"'),
        rows.read_rows(query, 1),
    ):
        pass


def test_a_temporary_table_is_refused(store: pydedup.Store) -> None:
    """It was made, and gone: it "has no column 'id'; it has: "."""
    with pytest.raises(ArgumentError, match=r"'pg_temp.p' would be a temporary table"):
        store.score("SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c", "m@1", into="pg_temp.p")


def test_a_schema_may_be_called_otherwise_than_tables(postgres_url: str) -> None:
    """Where it is the first of the search path, a name of a table alone means one of it."""
    model, graph = linear()
    query, schema = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c", f"{unused_name()}-my app"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f'CREATE SCHEMA "{schema}"')
        path = quote(f'-csearch_path="{schema}"'.replace(" ", "\\ "))
        with pydedup.open(
            with_option(postgres_url, f"options={path}"), schema=unused_name()
        ) as store:
            store.add("m@1", model, graph=graph)
            first = store.score(query, "m@1", into="predictions")
            again = store.score(query, "m@1", into=f"{schema}.predictions")
        assert (first.rows, again.rows, again.skipped) == (1, 0, 1)
        assert connection.execute(f'SELECT id FROM "{schema}".predictions').fetchall() == [(1,)]
        connection.execute(f'DROP SCHEMA "{schema}" CASCADE')


@pytest.mark.parametrize(
    ("kind", "key", "shown"),
    [("text", "1", "1"), ("date", "1", "1"), ("text", r"'\x00'::bytea", "b'")],
)
def test_a_key_that_the_column_is_not_compared_with_is_told(
    postgres_url: str, store: pydedup.Store, kind: str, key: str, shown: str
) -> None:
    """The server says "operator does not exist: text = bigint", and neither the column nor how."""
    into = unused_name()
    said = rf"'id' of table public.{into} is of type {kind}, .* the key {shown}.*CAST\(id AS {kind}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction real)")
        with pytest.raises(ArgumentError, match=said):
            store.score(f"SELECT {key} AS id, 1 AS a, 2 AS b, 3 AS c", "m@1", into=into)
        connection.execute(f"DROP TABLE {into}")
