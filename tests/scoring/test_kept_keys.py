# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`Store.score` into tables that do not keep a key as it was written, which is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.errors import ArgumentError, ConflictError

from .conftest import Tables, add

Make = Callable[..., str]

WHOLE = "SELECT 7 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 8, 1, 2, 3"


def assert_not_kept(tables: Tables, query: str, into: str, key: str, **options: Any) -> None:
    with (
        pydedup.open(tables.url) as store,
        pytest.raises(ArgumentError, match=f"has no row with the key {key} that was written"),
    ):
        store.score(query, "m@1", into=into, **options)
    assert tables.run(f"SELECT id FROM {into}") == []


def test_a_key_that_the_table_does_not_keep(tables: Tables, new_name: Make) -> None:
    """It was written as another one, or not at all, and counted; the next run met it again."""
    add(tables.url, "m@1")
    into, column = new_name(), "model VARCHAR(9)"
    if tables.kind == "sqlite":  # which keeps 1.25 in any column
        column = "model TEXT UNIQUE ON CONFLICT IGNORE"
    tables.run(
        f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction DOUBLE PRECISION, {column})"
    )
    query = "SELECT 7 AS id, 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 1.25, 1, 2, 3"
    assert_not_kept(tables, query, into, r"1\.25", on_error="skip")


def test_a_trigger_that_takes_a_whole_key(tables: Tables, new_name: Make) -> None:
    """Without one they are kept in such a column, and not asked for."""
    add(tables.url, "m@1")
    into, drops = new_name(), new_name()
    tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction FLOAT)")
    head = f"CREATE TRIGGER {drops} BEFORE INSERT ON {into}"
    if tables.kind == "sqlite":
        # To SQLite, names are the same in capitals.
        tables.run(f"{head.upper()} WHEN new.id = 8 BEGIN SELECT RAISE(IGNORE); END")
    elif tables.kind == "mysql":
        tables.run(f"{head} FOR EACH ROW SET NEW.id = IF(NEW.id = 8, 9, NEW.id)")
    else:
        tables.run(
            f"CREATE FUNCTION {drops}() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN IF new.id = 8 THEN RETURN NULL; END IF; RETURN new; END'"
        )
        tables.run(f"{head} FOR EACH ROW EXECUTE FUNCTION {drops}()")
    assert_not_kept(tables, WHOLE, into, "8")


def test_a_whole_key_that_a_constraint_of_sqlite_drops(tmp_path: Path) -> None:
    tables = Tables(f"sqlite:///{tmp_path / 'store.db'}")
    add(tables.url, "m@1")
    tables.run("CREATE TABLE mine (id INTEGER PRIMARY KEY, prediction UNIQUE on conflict ignore)")
    assert_not_kept(tables, WHOLE, "mine", "8")


def test_whole_keys_in_a_column_of_floats(tmp_path: Path) -> None:
    """Servers take the nearest one for the same, SQLite does not."""
    tables = Tables(f"sqlite:///{tmp_path / 'store.db'}")
    add(tables.url, "m@1")
    tables.run("CREATE TABLE mine (id REAL PRIMARY KEY, prediction)")
    assert_not_kept(tables, WHOLE.replace("8", str(2**53 + 1)), "mine", str(2**53 + 1))


@pytest.mark.parametrize("blank", [" ", "\t"])
def test_texts_whose_blanks_a_column_has_no_room_for(
    tables: Tables, new_name: Make, blank: str
) -> None:
    """PostgreSQL leaves out spaces, and MariaDB tabs as well; to it, a space behind is nothing."""
    add(tables.url, "m@1")
    into, mine = new_name(), new_name()
    for name, length in ((mine, 9), (into, 1)):
        tables.run(f"CREATE TABLE {name} (id VARCHAR({length}) PRIMARY KEY, prediction FLOAT)")
    tables.run(f"INSERT INTO {mine} VALUES (?, 1)", [[f"a{blank}"]])
    query = f"SELECT id, 1 AS a, 2 AS b, 3 AS c FROM {mine}"
    if (tables.kind, blank) in {("postgresql", " "), ("mysql", "\t")}:
        assert_not_kept(tables, query, into, "'a.*'")
        return
    with pydedup.open(tables.url) as store:
        if tables.kind == "postgresql":
            with pytest.raises(ArgumentError, match="value too long"):
                store.score(query, "m@1", into=into)
        else:
            for rows in (1, 0):
                assert store.score(query, "m@1", into=into).rows == rows


def test_a_rule_of_postgresql_that_drops_a_key(
    postgres_url: str, postgres_schema: str, new_name: Make
) -> None:
    tables = Tables(f"{postgres_url}&schema={postgres_schema}")
    add(tables.url, "m@1")
    into = f"{postgres_schema}.mine"
    tables.run(f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction FLOAT8)")
    tables.run(f"CREATE RULE drops AS ON INSERT TO {into} WHERE new.id = 8 DO INSTEAD NOTHING")
    assert_not_kept(tables, WHOLE, into, "8")


def test_rows_that_a_policy_of_postgresql_hides(
    postgres_url: str, postgres_schema: str, postgres_user: tuple[str, str], tmp_path: Path
) -> None:
    """The next run would not see that they are done."""
    user, source = postgres_user
    url, into = f"sqlite:///{tmp_path / 'models.db'}", f"{postgres_schema}.mine"
    add(url, "m@1")
    tables = Tables(postgres_url)
    for statement in (
        f"CREATE SCHEMA {postgres_schema}",
        f"CREATE TABLE {into} (id BIGINT PRIMARY KEY, prediction FLOAT8)",
        f"GRANT USAGE ON SCHEMA {postgres_schema} TO {user}",
        f"GRANT SELECT, INSERT ON {into} TO {user}",
        f"ALTER TABLE {into} ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY reads ON {into} FOR SELECT USING (id <> 8)",
        f"CREATE POLICY writes ON {into} FOR INSERT WITH CHECK (true)",
    ):
        tables.run(statement)
    with (
        pydedup.open(url) as store,
        pytest.raises(
            ArgumentError, match=r"has no row with the key 8 .* row-level security hides"
        ),
    ):
        store.score(WHOLE, "m@1", into=into, source=source)
    assert tables.run(f"SELECT id FROM {into}") == []
    tables.run(f"INSERT INTO {into} VALUES (8, 0)")
    with (
        pydedup.open(url) as store,
        pytest.raises(ConflictError, match=r"same: 7, 8; .* row-level security hides rows"),
    ):
        store.score(WHOLE, "m@1", into=into, source=source)


def test_a_trigger_of_mariadb_that_a_user_is_not_told_of(
    mysql_database: str, mysql_user: tuple[str, str], tmp_path: Path
) -> None:
    """Who may not make triggers sees none in MySQL, and in MariaDB before MDEV-37474."""
    user, source = mysql_user
    url = f"sqlite:///{tmp_path / 'models.db'}"
    add(url, "m@1")
    tables = Tables(mysql_database)
    tables.run("CREATE TABLE mine (id BIGINT PRIMARY KEY, prediction DOUBLE)")
    tables.run("CREATE TRIGGER t BEFORE INSERT ON mine FOR EACH ROW SET NEW.id = NEW.id + 1")
    tables.run(f"GRANT SELECT, INSERT ON mine TO {user}")
    with (
        pydedup.open(url) as store,
        pytest.raises(ArgumentError, match="has no row with the key 7 that was written"),
    ):
        store.score(WHOLE, "m@1", into="mine", source=source)
    assert tables.run("SELECT id FROM mine") == []


def test_a_table_of_mariadb_that_keeps_nothing(mysql_database: str) -> None:
    tables = Tables(mysql_database)
    try:
        tables.run("INSTALL PLUGIN IF NOT EXISTS blackhole SONAME 'ha_blackhole'")
    except Exception as error:
        pytest.skip(f"the server has no engine BLACKHOLE: {error}")
    add(tables.url, "m@1")
    tables.run("CREATE TABLE mine (id BIGINT PRIMARY KEY, prediction DOUBLE) ENGINE=BLACKHOLE")
    assert_not_kept(tables, WHOLE, "mine", "7")
