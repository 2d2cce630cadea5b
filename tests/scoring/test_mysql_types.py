# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""MySQL and MariaDB: tables that users made, with keys of types that we would not make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from mysql.connector import HAVE_CEXT

import pydedup
from pydedup import registry
from pydedup.adapter_options import RangeAdapter
from pydedup.errors import ArgumentError
from pydedup.testing._contract_base import with_option
from pydedup.testing.mysql_servers import mysql_connection
from pydedup.testing.rows_contract import read_ranges
from pydedup.testing.servers import unused_name

from .conftest import linear

#: Types of keys -> values in no order, whatever it is by.
KEYS = {
    "ENUM('zeal', 'glad', 'a sad one')": ["glad", "a sad one", "zeal"],
    "CHAR(9) CHARACTER SET latin1": ["b", "\u00e4b", "a b", "a"],
    "VARBINARY(9)": [b"b", b"\0", b"a ", b"a"],
    "INT UNSIGNED": [7, 4000000000, 0],
}


@pytest.fixture
def cursor(mysql_database: str) -> Iterator[Any]:
    with mysql_connection(mysql_database) as connection, connection.cursor() as cursor:
        yield cursor


@pytest.fixture
def store(mysql_database: str) -> Iterator[pydedup.Store]:
    """A store of a model of three inputs."""
    model, graph = linear()
    with pydedup.open(mysql_database) as store:
        store.add("m@1", model, graph=graph)
        yield store


def ranges_of(
    database: str, kind: str, keys: Sequence[object], every: int, *, zeros: bool = False
) -> tuple[list[Any], list[list[Any]]]:
    """Return the bounds and parts of a table of keys and their numbers; dates may be ``zeros``."""
    source = unused_name().replace("pydedup", "t")
    with mysql_connection(database) as connection, connection.cursor() as cursor:
        if zeros:
            cursor.execute("SET sql_mode = ''")
        cursor.execute(f"CREATE TABLE {source} (k {kind}, n INTEGER)")
        cursor.executemany(
            f"INSERT INTO {source} VALUES (%s, %s)", [[k, n] for n, k in enumerate(keys)]
        )
        rows = registry.connect_rows(database)
        try:
            assert isinstance(rows, RangeAdapter)
            return read_ranges(rows, f"SELECT k, n FROM {source}", every)
        finally:
            rows.close()
            cursor.execute(f"DROP TABLE {source}")


def test_ranges_of_dates_of_zeros_have_each_row_once(mysql_database: str) -> None:
    """Drivers have no value for them, and one that bounded a range was taken for no bound."""
    days = ["0000-00-00", "2020-01-01", "0000-00-00", "2020-01-02"]
    _, parts = ranges_of(mysql_database, "DATE", days, 1, zeros=True)
    assert sorted(n for part in parts for _, n in part) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KEYS)
def test_ranges_of_keys_have_each_row_once(mysql_database: str, kind: str) -> None:
    keys = KEYS[kind] * 3
    bounds, parts = ranges_of(mysql_database, kind, keys, 2)
    assert len(bounds) == len(keys) // 2
    found = sorted((n, bytes(k) if isinstance(k, bytearray) else k) for p in parts for k, n in p)
    assert found == list(enumerate(keys))


@pytest.mark.parametrize("made", [*KEYS, "by us"])
def test_a_scoring_goes_on_by_such_keys(cursor: Any, store: pydedup.Store, made: str) -> None:
    """Whether the table of predictions is ours, or a user's with a key of its type."""
    kind = next(iter(KEYS)) if made == "by us" else made
    source, into = (unused_name().replace("pydedup", "t") for _ in range(2))
    cursor.execute(f"CREATE TABLE {source} (id {kind}, f0 REAL, f1 REAL, f2 REAL)")
    lines = [(key, n, n + 1, n + 2) for n, key in enumerate(KEYS[kind])]
    cursor.executemany(f"INSERT INTO {source} VALUES (%s, %s, %s, %s)", lines)
    if made != "by us":
        cursor.execute(f"CREATE TABLE {into} (id {kind} PRIMARY KEY, prediction REAL)")
    query = f"SELECT * FROM {source} ORDER BY f0"
    first = store.score(f"{query} LIMIT 1", "m@1", into=into)
    then = store.score(query, "m@1", into=into)
    assert (first.rows, then.rows, then.skipped) == (1, len(lines) - 1, 1)
    cursor.execute(f"SELECT COUNT(*) FROM {source} JOIN {into} USING (id)")
    assert cursor.fetchall() == [(len(lines),)]
    cursor.execute(f"DROP TABLE {source}, {into}")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("TINYINT", -7),
        ("SMALLINT", 300),
        ("MEDIUMINT", 70_000),
        ("BIGINT UNSIGNED", 2**64 - 1),
        ("YEAR", 1999),
        ("TIMESTAMP", "2024-05-06 07:08:09"),
        ("DATETIME(3)", "2024-05-06 07:08:09.125"),
        ("DATE", "2024-05-06"),
        ("TEXT", "a b"),
        ("BLOB", b"\0a"),
    ],
)
def test_a_table_of_ours_takes_keys_of_each_type(
    cursor: Any, store: pydedup.Store, kind: str, key: object
) -> None:
    cursor.execute(f"CREATE TABLE source (id {kind}, f0 REAL, f1 REAL, f2 REAL)")
    cursor.execute("INSERT INTO source VALUES (%s, 1, 2, 3)", [key])
    for rows in (1, 0):
        report = store.score("SELECT * FROM source", "m@1", into="p")
        assert (report.rows, report.skipped) == (rows, 1 - rows)
    cursor.execute("SELECT COUNT(*) FROM source JOIN p USING (id)")
    assert cursor.fetchall() == [(1,)]


def test_a_key_of_which_the_beginning_is_unique_is_none(cursor: Any, store: pydedup.Store) -> None:
    cursor.execute("CREATE TABLE mine (id VARCHAR(9) NOT NULL, prediction DOUBLE, UNIQUE (id(3)))")
    with pytest.raises(ArgumentError, match="not unique by itself"):
        store.score("SELECT 'abcd' AS id, 1 AS a, 2 AS b, 3 AS c", "m@1", into="mine")


def kept_keys(cursor: Any, store: pydedup.Store, first_key: str, second_key: str) -> list[Any]:
    """Score rows with these keys (SQL) into table p twice, and return its keys."""
    query = (
        f"SELECT {first_key} AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT {second_key}, 4, 5, 6"
    )
    first = store.score(query, "m@1", into="p")
    again = store.score(query, "m@1", into="p")
    assert (first.rows, again.rows, again.skipped) == (2, 0, 2)
    cursor.execute("SELECT id FROM p ORDER BY id")
    found: list[Any] = cursor.fetchall()
    return found


def test_a_key_of_zero_stays_zero(cursor: Any, store: pydedup.Store) -> None:
    """Also in a table that counts its keys itself, which took it for the next number."""
    cursor.execute("CREATE TABLE p (id BIGINT AUTO_INCREMENT PRIMARY KEY, prediction REAL)")
    assert kept_keys(cursor, store, "5", "0") == [(0,), (5,)]


def test_a_set_is_no_key(mysql_database: str, cursor: Any, store: pydedup.Store) -> None:
    cursor.execute("CREATE TABLE sets (id SET('a', 'b'), f0 REAL, f1 REAL, f2 REAL)")
    cursor.execute("INSERT INTO sets VALUES ('a,b', 1, 2, 3)")
    with pytest.raises(ArgumentError, match="the key 'id' is a list, a set or JSON"):
        store.score("SELECT * FROM sets", "m@1", into="p")
    with (
        contextlib.closing(registry.connect_rows(mysql_database)) as rows,
        pytest.raises(ArgumentError, match=r"the key 'id' is a SET.* its text, CONCAT\(id\)"),
    ):
        rows.key_bounds("SELECT * FROM sets", "id", 1)


def test_a_table_may_have_a_set_for_the_key(cursor: Any, store: pydedup.Store) -> None:
    """What the driver gave of it was a TypeError."""
    cursor.execute("CREATE TABLE p (id SET('a', 'b') PRIMARY KEY, prediction REAL)")
    assert kept_keys(cursor, store, "'a,b'", "'b'") == [({"b"},), ({"a", "b"},)]


def test_a_text_that_begins_with_a_number_is_not_the_number(
    mysql_database: str, cursor: Any
) -> None:
    """The server takes them for equal, and would count a row as done that is not."""
    cursor.execute("CREATE TABLE whole (id BIGINT PRIMARY KEY, prediction REAL)")
    cursor.execute("CREATE TABLE texts (id VARCHAR(9) PRIMARY KEY, prediction REAL)")
    cursor.execute("INSERT INTO whole VALUES (7, 1), (9007199254740993, 1)")
    cursor.execute("INSERT INTO texts VALUES ('7', 1), ('8a', 1)")
    rows = registry.connect_rows(mysql_database)
    try:
        asked = ["7", "7a", "07", "9007199254740993", "9007199254740992", "a"]
        found = rows.present_keys(rows.full_table_name("whole"), "id", asked)
        assert found == {"7", "07", "9007199254740993"}
        assert rows.present_keys(rows.full_table_name("texts"), "id", [7, 8, 9]) == {7}
    finally:
        rows.close()


@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_a_time_is_written_as_it_is(mysql_database: str, cursor: Any, pure: bool) -> None:
    """Those of more than a day, negative ones and parts of seconds, too."""
    texts = ["08:00:00", "-01:00:00", "838:59:59", "-838:59:58.5", "00:00:00.000001", "-25:30:01"]
    cursor.execute("CREATE TABLE shifts (k TIME(6) PRIMARY KEY, n INTEGER DEFAULT 1)")
    cursor.execute("CREATE TABLE done (id TIME(6) PRIMARY KEY, prediction DOUBLE)")
    cursor.executemany("INSERT INTO shifts (k) VALUES (%s)", [[text] for text in texts])
    rows = registry.connect_rows(with_option(mysql_database, f"use_pure={pure}"))
    try:
        assert isinstance(rows, RangeAdapter)
        with rows.read_rows("SELECT k FROM shifts", 10) as stream:
            keys = [row[0] for batch in stream for row in batch]
        table = rows.full_table_name("done")
        assert rows.insert_predictions(table, ["id", "prediction"], [(key, 1) for key in keys])
        assert rows.present_keys(table, "id", keys) == set(keys)
        bounds, parts = read_ranges(rows, "SELECT k, n FROM shifts", 2)
    finally:
        rows.close()
    assert len(bounds) == 3
    assert [{key for key, _ in part} for part in parts] == [
        *(set(sorted(keys)[at : at + 2]) for at in (0, 2, 4)),
        set(),
    ]
    cursor.execute("SELECT COUNT(*) FROM shifts JOIN done ON k = id")
    assert cursor.fetchall() == [(len(texts),)]
    cursor.execute("DROP TABLE shifts, done")


@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_integers_beyond_64_bits_with_a_sign(mysql_database: str, cursor: Any, pure: bool) -> None:
    keys = [2**64 - 1, 2**64 - 3, 2**63, 5]
    cursor.execute("CREATE TABLE large (k BIGINT UNSIGNED PRIMARY KEY)")
    cursor.execute("CREATE TABLE done (id BIGINT UNSIGNED PRIMARY KEY)")
    cursor.executemany("INSERT INTO large VALUES (%s)", [[str(key)] for key in keys])
    rows = registry.connect_rows(with_option(mysql_database, f"use_pure={pure}"))
    try:
        assert isinstance(rows, RangeAdapter)
        table = rows.full_table_name("done")
        assert rows.insert_predictions(table, ["id"], [(key,) for key in keys])
        asked = [*keys, 2**64 - 2, 2**64, 6]
        assert rows.present_keys(table, "id", asked) == set(keys)
        _, parts = read_ranges(rows, "SELECT k, k AS n FROM large", 1)
    finally:
        rows.close()
    assert parts == [*([(key, key)] for key in sorted(keys)), []]
    cursor.execute("DROP TABLE large, done")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 INTO @x",
        "SELECT 'it\\'s',\"a\"INTO @x",
        "SELECT 1.into OUTFILE '{file}'",
        "SELECT 1 /* 'into */ INTO -- '\n DUMPFILE '{file}'",
        "SELECT 1 /*!INTO OUTFILE '{file}' */",
        "SELECT 1 /*M!99999 INTO @x */",
        "SELECT 5--1 INTO @x",
    ],
)
def test_what_writes_its_rows_elsewhere_is_refused(
    mysql_database: str, query: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows"
    tmp_path.chmod(0o777)
    rows = registry.connect_rows(mysql_database)
    try:
        with (
            pytest.raises(ArgumentError, match="INTO a file or variables"),
            rows.read_rows(query.format(file=file), 10),
        ):
            pass
        assert not file.exists()
        harmless = (
            "SELECT 'into', ' into \\' into ', `a into`, t.into, a$into -- into @x\n"
            "FROM (SELECT 1 AS `a into`, 2 AS `into`, 3 AS a$into) t # into @x"
        )
        with rows.read_rows(harmless, 10) as stream:
            assert list(stream) == [[("into", " into ' into ", 1, 2, 3)]]
    finally:
        rows.close()


def test_a_query_that_locks_is_no_fault_of_the_server(mysql_database: str) -> None:
    """It was told as a server that is no primary."""
    with mysql_connection(mysql_database) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id BIGINT PRIMARY KEY, f REAL)")
    rows = registry.connect_rows(mysql_database)
    try:
        with (
            pytest.raises(ArgumentError, match=r"the query failed: .* READ ONLY transaction\.?$"),
            rows.read_rows("SELECT id, f FROM t FOR UPDATE", 1),
        ):
            pass
    finally:
        rows.close()


@pytest.mark.parametrize("name", ["my-app", "a.b c"])
def test_a_database_may_be_called_otherwise_than_tables(
    mysql_url: str, mysql_run: Any, name: str
) -> None:
    """A name of a table alone means one of the database, and that is often called like my-app."""
    database = f"{unused_name()}{name}"
    mysql_run(mysql_url, f"CREATE DATABASE `{database}`")
    model, graph = linear()
    query = "SELECT 1 AS id, 1 AS a, 2 AS b, 3 AS c"
    url = urlsplit(mysql_url)._replace(path=f"/{quote(database)}").geturl()
    try:
        with pydedup.open(url) as store:
            store.add("m@1", model, graph=graph)
            first = store.score(query, "m@1", into="predictions")
            again = store.score(query, "m@1", into=f"{database}.predictions")
        assert (first.rows, again.rows, again.skipped) == (1, 0, 1)
        assert mysql_run(mysql_url, f"SELECT id FROM `{database}`.predictions") == [(1,)]
    finally:
        mysql_run(mysql_url, f"DROP DATABASE `{database}`")


def test_a_query_is_read_as_the_server_reads_it(
    mysql_database: str, cursor: Any, store: pydedup.Store
) -> None:
    """Where names stand in double quotes, they were taken for texts: no row was found."""
    cursor.execute("CREATE TABLE ours (id ENUM('b', 'a'), f REAL)")
    cursor.execute("INSERT INTO ours VALUES ('b', 1), ('a', 2)")
    query = """SELECT "id" || 'x' AS "k", f, f, f FROM ours WHERE "id" >= 'a'"""
    cursor.execute("SELECT @@GLOBAL.sql_mode")
    ((before,),) = cursor.fetchall()
    cursor.execute("SET GLOBAL sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES'")
    try:
        assert store.score(query, "m@1", into="p").rows == 2
        rows = registry.connect_rows(mysql_database)
        try:
            assert isinstance(rows, RangeAdapter)
            _, parts = read_ranges(rows, """SELECT "id" AS k, f AS n FROM "ours" """, 1)
        finally:
            rows.close()
    finally:
        cursor.execute(f"SET GLOBAL sql_mode = '{before}'")
    assert parts == [[("a", 2)], [("b", 1)], []]
    cursor.execute("SELECT k FROM p ORDER BY k")
    assert cursor.fetchall() == [("ax",), ("bx",)]
