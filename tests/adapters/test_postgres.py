# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: the adapter contract on a real server, and what is special to it.

Each test has a schema of its own, which is dropped at its end. How it takes a server that goes
away, refuses or is full is in test_postgres_faults.py.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter import LIVE, RETIRED, Adapter
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)
from pydedup.testing.adapter_contract import AdapterContract


def with_parameter(url: str, parameter: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{parameter}"


@pytest.fixture
def schema(postgres_url: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    yield name
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


class TestPostgres(AdapterContract):
    @pytest.fixture(autouse=True)
    def _place(self, postgres_url: str, schema: str) -> None:
        self.server, self.schema = postgres_url, schema

    def make_url(self, folder: Path) -> str:
        return with_parameter(self.server, f"schema={self.schema}")

    def with_lock_wait(self, url: str, seconds: float) -> str:
        return with_parameter(url, f"timeout={seconds}")

    def raw_rows(self, url: str, table: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(columns)} FROM {self.schema}.{table} ORDER BY 1"  # noqa: S608
        with psycopg.connect(self.server) as connection:
            return connection.execute(query, binary=True).fetchall()


@pytest.fixture
def url(postgres_url: str, schema: str) -> str:
    return with_parameter(postgres_url, f"schema={schema}")


@pytest.fixture
def adapter(url: str) -> Iterator[Adapter]:
    adapter = open_store(url)
    yield adapter
    adapter.close()


@pytest.fixture
def sql(postgres_url: str) -> Iterator[Any]:
    """Run a statement as the superuser, and get its rows."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:

        def run(statement: str, *parameters: Any) -> list[Any]:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
def role(sql: Any) -> Iterator[str]:
    """A user that may do nothing yet."""
    name = f"role_{secrets.token_hex(6)}"
    sql(f'CREATE ROLE "{name}" LOGIN')
    yield name
    sql(f'DROP OWNED BY "{name}" CASCADE')
    sql(f'DROP ROLE "{name}"')


def as_role(url: str, role: str) -> str:
    return with_parameter(url, f"user={role}")


def open_store(url: str) -> Adapter:
    adapter = registry.connect(url, mode="a")
    adapter.create_schema({})
    return adapter


def add_pages(adapter: Adapter, count: int, size: int = 1 << 20) -> list[int]:
    with adapter.transaction():
        return adapter.insert_pages(
            [(bytes(16), random.Random(i).randbytes(size)) for i in range(count)], state=LIVE
        )


# ---- how it is set up ---------------------------------------------------------------------------


def test_payloads_are_stored_apart_and_not_compressed(
    adapter: Adapter, schema: str, sql: Any
) -> None:
    columns = "SELECT c.relname, a.attstorage FROM pg_attribute a JOIN pg_class c ON c.oid = "
    columns += "a.attrelid WHERE c.relnamespace = %s::regnamespace AND a.attname = 'payload'"
    found = dict(sql(columns, schema))
    assert found == dict.fromkeys(
        ("artifacts", "block_maps", "pages", "signatures", "source_hashes"), "e"
    )
    with adapter.transaction():
        adapter.insert_pages([(bytes(16), bytes(1 << 20))], state=LIVE)  # would compress well
    assert sql(f"SELECT pg_column_size(payload) FROM {schema}.pages") == [(1 << 20,)]  # noqa: S608
    assert adapter.stored_bytes() > 1 << 20


def test_names_are_compared_by_their_bytes(adapter: Adapter, schema: str, sql: Any) -> None:
    collations = "SELECT DISTINCT l.collname FROM pg_attribute a JOIN pg_collation l ON l.oid = "
    collations += "a.attcollation JOIN pg_class c ON c.oid = a.attrelid "
    collations += "WHERE c.relnamespace = %s::regnamespace AND c.relkind = 'r' AND a.attnum > 0"
    assert sql(collations, schema) == [("C",)]


def test_a_page_is_published_without_writing_its_payload(adapter: Adapter, schema: str) -> None:
    ids = add_pages(adapter, 8)
    before = adapter.stored_bytes()
    for retired_at in (1.0, 2.0, 3.0):
        with adapter.transaction():
            adapter.set_page_state(ids, RETIRED, retired_at)
    assert adapter.stored_bytes() < before + (1 << 20), "8 MiB of payloads were written again"


def test_freed_space_is_used_again(adapter: Adapter) -> None:
    add_pages(adapter, 4)
    sizes = []
    for _ in range(3):
        ids = add_pages(adapter, 16)
        sizes.append(adapter.stored_bytes())
        with adapter.transaction():
            adapter.delete_pages(ids)
        adapter.compact()
    assert max(sizes) < sizes[0] + (2 << 20), sizes
    with pytest.raises(StoreError, match="inside of a transaction"), adapter.transaction():
        adapter.compact()


def test_invalid_indexes_are_complained_of(adapter: Adapter, schema: str, sql: Any) -> None:
    assert adapter.integrity_errors() == []
    index = f"{schema}.pydedup_distinct_blocks_hash128"
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", index)
    (complaint,) = adapter.integrity_errors()
    assert "pydedup_distinct_blocks_hash128" in complaint
    assert "REINDEX" in complaint
    sql(f"REINDEX SCHEMA {schema}")
    assert adapter.integrity_errors() == []


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


# ---- schemas and roles --------------------------------------------------------------------------


def test_stores_live_beside_each_other(postgres_url: str, schema: str, url: str, sql: Any) -> None:
    sql(f"CREATE SCHEMA {schema}")
    sql(f"CREATE TABLE {schema}.customers (name text)")
    first = open_store(url)
    second = registry.connect(postgres_url, mode="a", schema=f"{schema}_2")
    try:
        second.create_schema({})
        add_pages(first, 2, size=10)
        assert (len(first.page_rows()), len(second.page_rows())) == (2, 0)
        assert f"schema={schema}_2" in second.url
        assert sql(f"SELECT * FROM {schema}.customers") == []  # noqa: S608
        public = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert sql(public) == []
        again = registry.connect(url, mode="r", schema=schema)
        assert len(again.page_rows()) == 2
        again.close()
    finally:
        first.close()
        second.close()
        sql(f"DROP SCHEMA {schema}_2 CASCADE")


def test_tables_of_somebody_else_are_left_alone(schema: str, url: str, sql: Any) -> None:
    sql(f"CREATE SCHEMA {schema}")
    sql(f"CREATE TABLE {schema}.models (id int)")
    with pytest.raises(NotAStoreError, match="not its own"):
        open_store(url)
    tables = "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace"
    assert sql(tables, schema) == [("models",)]


def test_a_missing_store_says_how_to_make_one(schema: str, url: str, sql: Any) -> None:
    with pytest.raises(NotAStoreError, match=f"schema={schema}.* mode 'a'.*schema="):
        registry.connect(url, mode="r")
    assert sql("SELECT to_regnamespace(%s)::text", schema) == [(None,)]


def test_a_user_without_rights_is_told_what_to_ask_for(
    schema: str, url: str, role: str, sql: Any
) -> None:
    mine = as_role(url, role)
    for _ in range(2):  # first the schema is missing, then the right to create in it
        with pytest.raises(ReadOnlyError, match="administrator") as caught:
            open_store(mine)
        sql(str(caught.value).rpartition(": ")[2])
        if "CREATE SCHEMA" in str(caught.value):
            sql(f"ALTER SCHEMA {schema} OWNER TO CURRENT_USER")
    adapter = open_store(mine)
    assert len(adapter.page_rows(ids=add_pages(adapter, 1, size=9))) == 1
    adapter.close()


def test_a_reader_role_reads(adapter: Adapter, schema: str, url: str, role: str, sql: Any) -> None:
    ids = add_pages(adapter, 3, size=5000)
    for mode in ("a", "r"):
        with pytest.raises(StoreError, match=f"GRANT USAGE ON SCHEMA {schema}"):
            registry.connect(as_role(url, role), mode=mode).epoch()
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    for mode in ("a", "r"):
        reader = registry.connect(as_role(url, role), mode=mode)
        assert reader.read_only
        assert len(list(reader.read_pages(ids))) == 3
        assert reader.view("sharing") == []
        assert reader.integrity_errors() == []
        with pytest.raises(ReadOnlyError), reader.transaction():
            pass
        reader.close()


def test_a_writer_role_writes(adapter: Adapter, schema: str, url: str, role: str, sql: Any) -> None:
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    sql(f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO "{role}"')
    writer = open_store(as_role(url, role))
    ids = add_pages(writer, 2, size=10)
    with writer.transaction():
        writer.delete_pages(ids)
        assert writer.bump_epoch()
    writer.close()


def test_reading_alone_is_held_by_the_server_too(adapter: Adapter, url: str) -> None:
    reader = registry.connect(url, mode="r")
    with pytest.raises(ReadOnlyError, match="read-only"):
        reader._query("CREATE TABLE x (y int)")  # type: ignore[attr-defined]
    reader.close()


# ---- URLs ---------------------------------------------------------------------------------------

SECRET = "tops3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}/{SECRET}@localhost/db",
        f"postgresql://u:1/{SECRET}@localhost/db",
        f"postgresql://u:{SECRET}@{SECRET}@localhost/db",
        f"postgresql://u:x?{SECRET}@localhost/db",
        f"postgresql://u:x?{SECRET}=@localhost/db",
        f"postgresql://u:%zz{SECRET}@localhost/db",
        f"postgresql://u@localhost:{SECRET}/db",
        f"postgresql://u:{SECRET}@localhost/db?passwort={SECRET}",
        f"postgresql://u:{SECRET}",
        f"postgresql://u:{SECRET}@localhost/db?timeout",
        f"postgresql://u:{SECRET}@localhost/db?schema=a%20b",
        f"postgresql://u:{SECRET}@localhost/db?timeout=soon",
        f"postgresql://u:{SECRET}@[::1/db",
    ],
)
def test_urls_that_mean_nothing_show_no_secret(url: str) -> None:
    with pytest.raises(PydedupError) as caught:
        registry.connect(url, mode="a")
    error: BaseException | None = caught.value
    assert isinstance(error, ArgumentError | UnavailableError)
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__


@pytest.mark.parametrize(
    "name", ["", "a b", 'a"b', "a'b", "1a", "pg_mine", "information_schema", "x" * 64, "ä", "a%s"]
)
def test_schemas_that_cannot_be(postgres_url: str, name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot hold a store"):
        registry.connect(postgres_url, mode="a", schema=name)


def test_one_schema_is_meant(url: str) -> None:
    with pytest.raises(ArgumentError, match="other"):
        registry.connect(url, mode="a", schema="other")


@pytest.mark.parametrize("timeout", ["soon", "-1", "nan", "", "1e9"])
def test_timeouts_that_cannot_be(url: str, timeout: str) -> None:
    with pytest.raises(ArgumentError, match="timeout="):
        registry.connect(with_parameter(url, f"timeout={timeout}"), mode="a")


def test_a_password_is_never_shown(url: str) -> None:
    adapter = open_store(with_parameter(url, f"password={SECRET}&sslpassword={SECRET}"))
    try:
        assert SECRET not in f"{adapter.url} {adapter!r} {vars(adapter)}"
        with pytest.raises(StoreError) as caught:
            adapter.bump_epoch()
        assert SECRET not in str(caught.value)
    finally:
        adapter.close()


def test_parameters_reach_libpq(url: str) -> None:
    options = "application_name=mine&options=-c%20work_mem%3D7MB%20-c%20lock_timeout%3D1234"
    adapter = open_store(with_parameter(url, options))
    shown = "SELECT current_setting('application_name'), current_setting('work_mem'), "
    shown += "current_setting('lock_timeout')"
    assert adapter._query(shown) == [("mine", "7MB", "1234ms")]  # type: ignore[attr-defined]
    adapter.close()
    adapter = open_store(with_parameter(url, "timeout=2.5"))
    assert adapter._query(shown)[0] == ("pydedup", "4MB", "2500ms")  # type: ignore[attr-defined]
    adapter.close()


# ---- errors of the server -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        ("53100", StorageFullError, "free some space"),
        ("40001", ConflictError, "try again"),
        ("40P01", ConflictError, "try again"),
        ("55P03", ConflictError, "timeout="),
        ("25006", ReadOnlyError, "primary"),
        ("57014", UnavailableError, "statement_timeout"),
        ("53300", UnavailableError, "max_connections"),
        ("57P01", UnavailableError, "server runs"),
        ("58030", UnavailableError, "disks"),
        ("XX001", CorruptStoreError, "verify"),
        ("22003", ArgumentError, "value"),
        ("P0001", StoreError, "P0001"),
    ],
)
def test_codes_of_the_server_have_a_meaning(
    adapter: Adapter, schema: str, sql: Any, code: str, kind: type[StoreError], advice: str
) -> None:
    sql(
        f"CREATE FUNCTION {schema}.fail() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$BEGIN RAISE EXCEPTION 'it went wrong' USING ERRCODE = '{code}'; END$$"
    )
    sql(
        f"CREATE TRIGGER fail BEFORE INSERT ON {schema}.pages FOR EACH ROW "
        f"EXECUTE FUNCTION {schema}.fail()"
    )
    with pytest.raises(kind, match="it went wrong") as caught, adapter.transaction():
        _change(adapter)
    assert advice in str(caught.value)
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert adapter.jobs() == []
    with adapter.transaction():
        adapter.put_job("j", "", "", "")


def _change(adapter: Adapter) -> None:
    adapter.put_job("j", "", "", "")
    adapter.insert_pages([(bytes(16), bytes(100_000))], state=LIVE)


def test_a_deadlock_is_a_conflict(adapter: Adapter, schema: str, postgres_url: str) -> None:
    with adapter.transaction():
        adapter.put_job("a", "", "", "")
        adapter.put_job("b", "", "", "")
    held, told = threading.Event(), []
    # The other one waits for long before it looks for deadlocks, so ours is the one to give way.
    other = psycopg.connect(postgres_url, options="-c deadlock_timeout=20s")

    def wait_for_ours() -> None:
        held.wait(30)
        told.append(other.execute(f"UPDATE {schema}.jobs SET spec = 'x' WHERE id = 'a'").rowcount)  # noqa: S608

    def lock_in_turn() -> None:
        adapter.put_job("a", "mine", "", "")
        held.set()
        time.sleep(0.5)
        adapter.put_job("b", "mine", "", "")

    thread = threading.Thread(target=wait_for_ours)
    thread.start()
    with other:
        other.execute(f"UPDATE {schema}.jobs SET spec = 'x' WHERE id = 'b'")  # noqa: S608
        with pytest.raises(ConflictError, match="deadlock"), adapter.transaction():
            lock_in_turn()
        thread.join(30)
        assert told == [1]
    assert [job[1] for job in adapter.jobs()] == ["x", "x"]


def test_a_statement_timeout_says_so(adapter: Adapter, url: str) -> None:
    hasty = registry.connect(with_parameter(url, "options=-c%20statement_timeout%3D200"), mode="a")
    with adapter.transaction():
        adapter.bump_epoch()
        with pytest.raises(UnavailableError, match="statement_timeout"), hasty.transaction():
            hasty.bump_epoch()
    hasty.close()


def test_text_that_the_server_cannot_hold(adapter: Adapter) -> None:
    with pytest.raises(ArgumentError, match="0x00"), adapter.transaction():
        adapter.put_job("a\0b", "", "", "")
    assert adapter.jobs() == []


def test_tables_that_were_dropped(adapter: Adapter, schema: str, sql: Any) -> None:
    sql(f"DROP TABLE {schema}.jobs CASCADE")
    with pytest.raises(NotAStoreError, match=schema):
        adapter.jobs()
    with pytest.raises(NotAStoreError, match="jobs"):
        adapter.schema_version()
