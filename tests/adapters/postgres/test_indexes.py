# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: which indexes are complained of, and which others are only busy with."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from pydedup.adapter import Adapter
from pydedup.errors import ConflictError, StoreError, UnavailableError
from pydedup.testing._contract_base import add_pages


def test_invalid_indexes_are_complained_of(adapter: Adapter, schema: str, sql: Any) -> None:
    assert adapter.integrity_errors() == []
    index = f"{schema}.pydedup_distinct_blocks_hash128"
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", index)
    (complaint,) = adapter.integrity_errors()
    assert "pydedup_distinct_blocks_hash128" in complaint
    assert "REINDEX" in complaint
    sql(f"REINDEX SCHEMA {schema}")
    assert adapter.integrity_errors() == []


@pytest.mark.parametrize(
    ("statement", "isolation"),
    [
        ("REINDEX TABLE CONCURRENTLY {}.pages", "REPEATABLE READ"),  # the new one is not valid yet
        ("REINDEX TABLE CONCURRENTLY {}.pages", "READ COMMITTED"),  # the old one is not any more
        ("CREATE INDEX CONCURRENTLY more ON {}.pages (checksum)", "REPEATABLE READ"),
        ("DROP INDEX CONCURRENTLY {}.by_time", "READ COMMITTED"),
    ],
)
def test_an_index_that_is_being_made_is_not_complained_of(
    adapter: Adapter, schema: str, postgres_url: str, sql: Any, statement: str, isolation: str
) -> None:
    """Beside a REINDEX CONCURRENTLY a store was called damaged, though others went on using it."""
    sql(f"CREATE INDEX by_time ON {schema}.pages (retired_at)")

    def work() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as working:
            working.execute(statement.format(schema))

    thread = threading.Thread(target=work)
    with psycopg.connect(postgres_url) as other:  # whose end is waited for
        other.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
        other.execute(f"SELECT FROM {schema}.pages")
        thread.start()
        latest = time.monotonic() + 60
        waits = "SELECT 1 FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted"
        while not sql("SELECT 1 FROM pg_index WHERE NOT indisvalid") or not sql(waits):
            assert time.monotonic() < latest, "nobody waits"
            time.sleep(0.01)
        assert adapter.integrity_errors() == []
    thread.join(60)
    assert adapter.integrity_errors() == []


def test_an_index_whose_making_was_given_up_is_complained_of(
    adapter: Adapter, schema: str, postgres_url: str, sql: Any
) -> None:
    """Also while somebody vacuums the table, which takes the same lock of it."""
    add_pages(adapter, 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(f"CREATE UNIQUE INDEX CONCURRENTLY given_up ON {schema}.pages (state)")
    with psycopg.connect(postgres_url) as other:
        other.execute(f"LOCK TABLE {schema}.pages IN SHARE UPDATE EXCLUSIVE MODE")
        (complaint,) = adapter.integrity_errors()
    assert "index given_up is not valid" in complaint


def test_an_index_that_is_dropped_while_it_is_checked_is_not_damaged(
    adapter: Adapter, schema: str, sql: Any
) -> None:
    """As the old one by a REINDEX CONCURRENTLY; there was no such relation, which was told."""
    sql(f"CREATE EXTENSION amcheck SCHEMA {schema}")

    def drop() -> None:
        checking = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        latest = time.monotonic() + 60
        while not sql(checking) and time.monotonic() < latest:
            time.sleep(0.01)
        sql(f"DROP INDEX {schema}.by_time")
        sql("SELECT pg_advisory_unlock(17)")

    thread = threading.Thread(target=drop)
    try:
        sql(f"CREATE INDEX by_time ON {schema}.pages (retired_at)")
        sql(f"ALTER FUNCTION {schema}.bt_index_check(regclass) RENAME TO real_check")
        sql(
            f"CREATE FUNCTION {schema}.bt_index_check(index regclass) RETURNS void "
            f"LANGUAGE plpgsql AS $$BEGIN IF index = to_regclass('{schema}.by_time') THEN "
            f"PERFORM pg_advisory_xact_lock(17); END IF; PERFORM {schema}.real_check(index); END$$"
        )
        sql("SELECT pg_advisory_lock(17)")
        thread.start()
        assert adapter.integrity_errors() == []
        thread.join(60)
    finally:
        sql("DROP EXTENSION amcheck CASCADE")


def test_amcheck_is_asked_where_it_is_installed(adapter: Adapter, schema: str, sql: Any) -> None:
    add_pages(adapter, 3)
    sql(f"CREATE EXTENSION amcheck SCHEMA {schema}")
    try:
        assert adapter.integrity_errors() == []
        sql(f"ALTER FUNCTION {schema}.bt_index_check(regclass) RENAME TO real_check")
        sql(
            f"CREATE FUNCTION {schema}.bt_index_check(regclass) RETURNS void LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION 'item order invariant violated' USING ERRCODE = 'XX002'; END$$"
        )
        complaints = adapter.integrity_errors()
        assert any("pages_pkey" in complaint for complaint in complaints)
        assert all("item order invariant violated" in complaint for complaint in complaints)
    finally:
        sql("DROP EXTENSION amcheck CASCADE")


def test_an_index_of_another_kind_is_not_for_amcheck(
    adapter: Adapter, schema: str, sql: Any
) -> None:
    sql(f"CREATE EXTENSION amcheck SCHEMA {schema}")
    try:
        sql(f"CREATE INDEX by_name ON {schema}.models USING hash (name)")
        sql(f"CREATE INDEX by_time ON {schema}.models USING brin (created_at)")
        assert adapter.integrity_errors() == []
    finally:
        sql("DROP EXTENSION amcheck CASCADE")


@pytest.mark.parametrize(("code", "kind"), [("57014", UnavailableError), ("55P03", ConflictError)])
def test_an_index_that_could_not_be_checked_is_not_damaged(
    adapter: Adapter, schema: str, sql: Any, code: str, kind: type[StoreError]
) -> None:
    sql(f"CREATE EXTENSION amcheck SCHEMA {schema}")
    try:
        sql(f"ALTER FUNCTION {schema}.bt_index_check(regclass) RENAME TO real_check")
        sql(
            f"CREATE FUNCTION {schema}.bt_index_check(regclass) RETURNS void LANGUAGE plpgsql AS "
            f"$$BEGIN RAISE EXCEPTION 'too long' USING ERRCODE = '{code}'; END$$"
        )
        with pytest.raises(kind, match=r"index .*_pkey: .*too long"):
            adapter.integrity_errors()
    finally:
        sql("DROP EXTENSION amcheck CASCADE")
