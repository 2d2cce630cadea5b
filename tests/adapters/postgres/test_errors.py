# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: errors of a server that runs, and what they mean to a user."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.adapters._errors import (
    CancelledError,
    ConnectionLostError,
    CrowdedError,
    DeniedError,
    KeyTakenError,
)
from pydedup.adapters._postgres_errors import MissingDatabaseError
from pydedup.adapters._postgres_said import said
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
    without_frames,
)
from pydedup.testing._contract_base import add_random_pages, with_option
from pydedup.testing.servers import as_user, unused_port

#: Codes of the server -> what they are to a user, and a part of the advice.
CODES: dict[str, tuple[type[PydedupError], str]] = {
    "08006": (ConnectionLostError, "server runs"),
    "0A000": (StoreError, "13 or newer"),
    "22003": (ArgumentError, "value"),
    "23502": (ArgumentError, "value"),
    "23505": (KeyTakenError, "a row of this key"),
    "25006": (ReadOnlyError, "primary"),
    "25P03": (ConnectionLostError, "raise idle_in_transaction_session_timeout"),
    "25P04": (ConnectionLostError, "raise transaction_timeout"),
    "28000": (UnavailableError, "user and password"),
    "3D000": (MissingDatabaseError, "createdb"),
    "3F000": (NotAStoreError, "open the store again"),
    "40001": (CancelledError, "try again"),
    "40P01": (CancelledError, "try again"),
    "42501": (DeniedError, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"),
    "42P01": (NotAStoreError, "were dropped"),
    "53100": (StorageFullError, "free some space"),
    "53200": (UnavailableError, "short of resources"),
    "53300": (CrowdedError, "max_connections"),
    "53400": (UnavailableError, "raise this limit"),
    "54000": (ArgumentError, "smaller pieces"),
    "55P03": (ConflictError, "timeout="),
    "57014": (UnavailableError, "statement_timeout"),
    "57P01": (ConnectionLostError, "server runs"),
    "57P05": (ConnectionLostError, "idle_session_timeout"),
    "58030": (UnavailableError, "disks"),
    "XX000": (StoreError, "server's log"),
    "XX001": (CorruptStoreError, "verify"),
    "XX002": (CorruptStoreError, "REINDEX SCHEMA"),
    "P0001": (StoreError, "P0001"),
}


def test_codes_of_the_server_have_a_meaning(adapter: Adapter, schema: str, sql: Any) -> None:
    function = f"CREATE OR REPLACE FUNCTION {schema}.fail() RETURNS trigger LANGUAGE plpgsql AS "
    sql(f"{function} 'BEGIN RETURN NEW; END'")
    sql(
        f"CREATE TRIGGER fail BEFORE INSERT ON {schema}.pages FOR EACH ROW "
        f"EXECUTE FUNCTION {schema}.fail()"
    )
    for code, (kind, advice) in CODES.items():
        raised = f"RAISE EXCEPTION 'it went wrong' USING ERRCODE = '{code}'"
        sql(f"{function} $$BEGIN {raised}; END$$")
        with pytest.raises(kind, match="it went wrong") as caught, adapter.transaction():
            _change(adapter)
        assert (type(caught.value), advice in str(caught.value)) == (kind, True), code
        assert isinstance(caught.value.__cause__, psycopg.Error)
        assert "PL/pgSQL" not in str(caught.value), "where in the server it came about"
        assert adapter.jobs() == []
    with adapter.transaction():
        adapter.put_job("j", "", "", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (  # the latter where passwords are asked for
            "ALTER ROLE {role} RENAME TO {role}_x",
            "role .* does not exist; check the user|authentication failed .*; check the user",
        ),
        ("ALTER ROLE {role} NOLOGIN", "not permitted to log in; let it"),
        ("ALTER ROLE {role} CONNECTION LIMIT 0", "too many connections for role .*; raise its"),
        ("REVOKE CONNECT ON DATABASE {database} FROM PUBLIC", "permission denied .*GRANT CONNECT"),
    ],
)
def test_users_that_are_not_let_in_are_told_why(
    postgres_url: str, role: str, sql: Any, change: str, said: str
) -> None:
    database = f"{role}_db"
    sql(f"CREATE DATABASE {database}")
    try:
        sql(change.format(role=role, database=database))
        place = urlsplit(as_user(postgres_url, role))._replace(path=f"/{database}")
        with pytest.raises(UnavailableError, match=said) as caught:
            registry.connect(place.geturl(), mode="a")
        assert "server runs" not in str(caught.value)
    finally:
        sql(f"DROP DATABASE {database}")
        if "RENAME" in change:
            sql(f"ALTER ROLE {role}_x RENAME TO {role}")


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

    waits = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"

    def wait_for_ours() -> None:
        held.wait(30)
        told.append(other.execute(f"UPDATE {schema}.jobs SET spec = 'x' WHERE id = 'a'").rowcount)  # noqa: S608

    def lock_in_turn() -> None:
        adapter.put_job("a", "mine", "", "")
        held.set()
        latest = time.monotonic() + 20
        with psycopg.connect(postgres_url, autocommit=True) as looking:
            while not looking.execute(waits, [other.info.backend_pid]).fetchall():
                assert time.monotonic() < latest, "the other one does not wait for ours"
                time.sleep(0.01)
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


def test_a_serialisation_failure_is_a_conflict(
    adapter: Adapter, schema: str, postgres_url: str
) -> None:
    """Of the server's own making, at a level where it has them."""
    statements = adapter._sql  # type: ignore[attr-defined]
    begin = ("BEGIN ISOLATION LEVEL SERIALIZABLE",)
    statements.dialect = dataclasses.replace(statements.dialect, begin_write=begin)

    def change_beside_another() -> None:
        assert adapter.epoch() == 0
        with psycopg.connect(postgres_url) as other:
            other.execute(f"UPDATE {schema}.meta SET value = '5' WHERE name = 'epoch'")  # noqa: S608
        adapter.put_job("mine", "", "", "")
        adapter.bump_epoch()

    said = r"could not serialize access .*try again"
    with pytest.raises(ConflictError, match=said), adapter.transaction():
        change_beside_another()
    assert (adapter.epoch(), adapter.jobs()) == (5, [])
    with adapter.transaction():
        assert adapter.bump_epoch(5)


def test_what_is_read_alone_is_read_again_after_a_conflict(
    adapter: Adapter, schema: str, role: str, sql: Any, url: str
) -> None:
    """As on a standby, which ends statements that are in the way of what it replays.

    The last of them when a page has come.
    """
    pages = add_random_pages(adapter, 3)
    sql(f"CREATE SEQUENCE {schema}.tries")
    sql(
        f"CREATE FUNCTION {schema}.is_shown() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('{schema}.tries') IN (1, 2, 4) THEN "
        "RAISE 'as a standby' USING ERRCODE = '40001'; END IF; RETURN true; END $$"
    )
    sql(f"ALTER TABLE {schema}.pages ENABLE ROW LEVEL SECURITY")
    sql(f"CREATE POLICY shown ON {schema}.pages USING ({schema}.is_shown())")
    sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
    sql(f"GRANT USAGE ON SEQUENCE {schema}.tries TO {role}")
    reader = registry.connect(as_user(url, role), mode="a")
    try:
        assert dict(reader.read_pages(list(pages))) == pages
        sql(f"ALTER SEQUENCE {schema}.tries RESTART")
        assert len(reader.page_rows()) == 3
    finally:
        reader.close()


def test_a_server_that_dies_in_a_copy_is_told_once(
    adapter: Adapter, schema: str, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """psycopg logged a line of its own, which a terminal showed above the error."""
    sql(
        f"CREATE FUNCTION {schema}.dies() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$"
    )
    sql(
        f"CREATE TRIGGER dies BEFORE INSERT ON {schema}.pages FOR EACH ROW "
        f"EXECUTE FUNCTION {schema}.dies()"
    )
    many = [(bytes(16), bytes(1 << 20))] * 32  # more than is on its way when it dies
    with pytest.raises(UnavailableError), adapter.transaction():
        adapter.insert_pages(many, state=LIVE)
    assert [record.getMessage() for record in caplog.records] == []


def test_of_many_rows_one_of_which_is_refused_it_is_told_once(
    adapter: Adapter, schema: str, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a full disk: psycopg logged that it could not end what it was sending."""
    sql(f"ALTER TABLE {schema}.model_pages ADD CHECK (blocks <> 1)")
    rows = [(1, page, page, 100) for page in range(1, 4000)]  # the error comes meanwhile
    many: Any = adapter
    with pytest.raises(ArgumentError, match="violates check constraint"), adapter.transaction():
        many._write_many(
            f"INSERT INTO {schema}.model_pages (model_id, page_id, blocks, bytes) "  # noqa: S608
            "VALUES (%b, %b, %b, %b)",
            rows,
        )
    assert [record.getMessage() for record in caplog.records] == []


def test_a_stricter_level_of_the_server_makes_no_conflicts(
    adapter: Adapter, schema: str, postgres_url: str, url: str
) -> None:
    option = "options=-c%20default_transaction_isolation%3Dserializable"
    strict = registry.connect(with_option(url, option), mode="a")
    with strict.transaction():
        assert strict.epoch() == 0
        with psycopg.connect(postgres_url) as other:
            other.execute(f"UPDATE {schema}.meta SET value = '5' WHERE name = 'epoch'")  # noqa: S608
        strict.bump_epoch()
    strict.close()
    assert adapter.epoch() == 6


def test_no_wait_for_another_writer_is_none_and_not_for_ever(adapter: Adapter, url: str) -> None:
    option = "timeout=0&options=-c%20statement_timeout%3D20000"
    hasty = registry.connect(with_option(url, option), mode="a")
    with adapter.transaction():
        adapter.bump_epoch()
        with pytest.raises(ConflictError, match="timeout="), hasty.transaction():
            hasty.bump_epoch()
    hasty.close()


def test_a_statement_timeout_says_so(adapter: Adapter, url: str) -> None:
    hasty = registry.connect(with_option(url, "options=-c%20statement_timeout%3D1000"), mode="a")
    with adapter.transaction():
        adapter.bump_epoch()
        with pytest.raises(UnavailableError, match="statement_timeout"), hasty.transaction():
            hasty.bump_epoch()
    hasty.close()


def test_a_statement_timeout_within_verify_says_so(url: str, schema: str, sql: Any) -> None:
    """It was taken for a page that is out of reach, and what was told was the next statement's."""
    with pydedup.open(url) as store:
        store.add("m", {"w": np.arange(9.0)})
    sql(f"ALTER TABLE {schema}.pages RENAME TO all_pages")
    sql(
        f"CREATE FUNCTION {schema}.slow(payload bytea) RETURNS bytea LANGUAGE plpgsql AS $$BEGIN "
        "IF current_query() LIKE 'COPY%' AND current_setting('transaction_read_only') = 'on' "
        "THEN PERFORM pg_sleep(60); END IF; RETURN payload; END$$"
    )
    sql(
        f"CREATE VIEW {schema}.pages AS SELECT id, state, retired_at, checksum, "  # noqa: S608
        f"{schema}.slow(payload) AS payload FROM {schema}.all_pages"
    )
    hasty = with_option(url, "options=-c%20statement_timeout%3D1500")
    with pydedup.open(hasty) as store, pytest.raises(UnavailableError, match="statement_timeout"):
        store.verify()


def test_what_libpq_says_is_one_sentence_for_each_thing() -> None:
    """It says the same of an attempt with TLS and of one without, and adds hints for a shell."""
    at = 'connection to server at "127.0.0.1", port 5432 failed: '
    refused = 'FATAL:  password authentication failed for user "me"'
    twice = psycopg.OperationalError(f"connection failed: {at}{refused}\n{at}{refused}")
    assert said(twice) == f"{at}{refused.replace('  ', ' ')}"
    down = f"connection failed: {at}Connection refused\n\tIs the server running on that host?"
    assert said(psycopg.OperationalError(down)) == f"{at}Connection refused"
    missing = "root certificate file does not exist\nEither provide it, or change sslmode."
    assert said(psycopg.OperationalError(missing)) == (
        "root certificate file does not exist; Either provide it, or change sslmode"
    )
    assert said(psycopg.OperationalError()) == "OperationalError"


def test_of_several_hosts_it_is_said_once_what_is_wrong_with_each() -> None:
    closed = [unused_port() for _ in range(2)]
    hosts = ",".join(f"127.0.0.1:{port}" for port in closed)
    with pytest.raises(UnavailableError) as caught:
        registry.connect(f"postgresql://me@{hosts}/db", mode="a")
    _, _, told = str(caught.value).partition("/db: ")
    each = [f'server at "127.0.0.1", port {port} failed: Connection refused' for port in closed]
    assert sorted(told.split("; ")[:2]) == sorted(f"connection to {one}" for one in each)
    assert "host: " not in told
    assert "Multiple" not in told


def test_a_server_that_is_not_the_one_that_was_asked_for(url: str) -> None:
    said = "session is not read-only; name another server, or correct target_session_attrs"
    with pytest.raises(UnavailableError, match=said):
        registry.connect(with_option(url, "target_session_attrs=read-only"), mode="r")


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


def test_sequences_that_were_left_behind(url: str, schema: str, sql: Any) -> None:
    """As after logical replication. An add said that there was its model already."""
    weights = np.arange(70_000, dtype=np.float32)
    tables = ("models", "pages", "distinct_blocks")
    with pydedup.open(url) as store:
        store.add("m", {"w": weights})
        for table in tables:
            sql(f"ALTER TABLE {schema}.{table} ALTER COLUMN id RESTART")
            with pytest.raises(StoreError, match=f"{table}_pkey.*a sequence is behind") as caught:
                store.add("n", {"w": -weights})
            assert type(caught.value) is StoreError
            fix = str(caught.value).partition("run ")[2].partition(", and the same")[0]
            sql(fix.replace("distinct_blocks", table))
        assert [model.name for model in store.models()] == ["m"]
        store.add("n", {"w": -weights})
        assert store.verify().errors == []


def test_errors_that_led_to_each_other_are_looked_at_once() -> None:
    """Each is a cause and a context, and to follow both took for ever after some dozens."""
    error = ValueError("first")
    for number in range(100):
        try:
            raise ValueError(number) from error
        except ValueError as raised:
            raised.__context__ = error
            error = raised
    led_to: BaseException | None = without_frames(error)
    while led_to is not None:
        assert led_to.__traceback__ is None
        led_to = led_to.__cause__
