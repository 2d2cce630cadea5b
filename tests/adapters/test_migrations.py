# SPDX-License-Identifier: Apache-2.0
"""Stores of an older schema: what opening them does, with definitions of tables, on every back end.

There is one version so far, so the older one is made up: version 0 has no table `later`, and
metadata that say nothing. The rest of the mechanism is in the contract of adapters.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.adapters import _migrations
from pydedup.adapters._migrations import Migration
from pydedup.adapters._schema import Dialect
from pydedup.cli.app import main
from pydedup.errors import ReadOnlyError, SchemaVersionError, StoreError

MODEL = {"w": np.arange(4096, dtype=np.float32)}


def later(dialect: Dialect) -> list[str]:
    name = f"{dialect.qualifier}{dialect.prefix}later"
    return [
        f"CREATE TABLE {name} (number {dialect.types['int']} NOT NULL PRIMARY KEY)",
        f"CREATE INDEX pydedup_later_number ON {name} (number)",
    ]


def fill(adapter: Any) -> None:
    name = f"{adapter._sql.dialect.qualifier}{adapter._sql.dialect.prefix}later"
    adapter._write(f"INSERT INTO {name} (number) VALUES (7)")  # noqa: S608


def rows(adapter: Any) -> list[Any]:
    name = f"{adapter._sql.dialect.qualifier}{adapter._sql.dialect.prefix}later"
    return list(adapter._query(f"SELECT number FROM {name}"))  # noqa: S608


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Migration], None]:
    """Let this be what makes version 0 version 1."""

    def put(migration: Migration) -> None:
        monkeypatch.setattr(_migrations.SchemaCalls, "migrations", {0: migration})

    return put


@pytest.fixture
def older(store_url: str) -> str:
    """The URL of a store of version 0 with a model."""
    with pydedup.open(store_url) as store:
        store.add("m", MODEL)
        make_older(store._adapter)
    return store_url


def make_older(adapter: Adapter) -> None:
    with adapter.transaction():
        adapter.set_meta("schema_version", "0")


def version_of(url: str) -> int | None:
    adapter = registry.connect(url, mode="a")
    try:
        return adapter.schema_version()
    finally:
        adapter.close()


def test_every_version_has_its_migration() -> None:
    assert sorted(_migrations.MIGRATIONS) == list(range(1, SCHEMA_VERSION))


def test_opening_migrates(older: str, install: Callable[[Migration], None]) -> None:
    install(Migration(later, fill))
    with pytest.raises(SchemaVersionError, match=r"schema 0, .* open it once for writing"):
        pydedup.open(older, mode="r")
    assert version_of(older) == 0, "reading migrates nothing"
    with pydedup.open(older) as store:
        assert rows(store._adapter) == [(7,)]
        assert store._adapter.schema_version() == SCHEMA_VERSION
        assert store.load("m")["w"].tobytes() == MODEL["w"].tobytes()
        store.add("n", MODEL)
        assert store.verify().ok
    with pydedup.open(older, mode="r") as store:
        assert len(store.models()) == 2


def test_the_program_migrates(
    older: str, install: Callable[[Migration], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(Migration(later, fill))
    assert main(["ls", older]) == 4
    assert "`pydedup vacuum`) as the user who created it" in capsys.readouterr().err
    assert main(["vacuum", older, "-q"]) == 0
    assert main(["ls", older]) == 0


def test_a_failure_halfway_leaves_the_older_version(
    older: str, install: Callable[[Migration], None]
) -> None:
    def fail(adapter: Any) -> None:
        fill(adapter)
        adapter.set_meta("quotas", "[1]")
        raise RuntimeError("in the middle")

    def broken(dialect: Dialect) -> list[str]:
        return [later(dialect)[0], "CREATE NONSENSE"]

    for migration, error in (
        (Migration(broken, fill), StoreError),
        (Migration(later, fail), RuntimeError),
    ):
        install(migration)
        with pytest.raises(error) as caught:
            pydedup.open(older)
        told = "could not be migrated to schema 1, and is as it was"
        assert (error is RuntimeError) != (told in str(caught.value))
        adapter = registry.connect(older, mode="a")
        assert adapter.schema_version() == 0
        assert "quotas" not in adapter.meta()
        assert [row.name for row in adapter.models()] == ["m"]
        adapter.close()
    install(Migration(later, fill))
    with pydedup.open(older) as store:  # what is left of definitions is in nobody's way
        assert rows(store._adapter) == [(7,)]
        assert store.verify().ok


def test_processes_that_open_at_once_migrate_once(
    older: str, install: Callable[[Migration], None]
) -> None:
    install(Migration(later, fill))  # a second 7 would be refused
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                pydedup.open(older).close()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0, 0]
    with pydedup.open(older, mode="r") as store:
        assert rows(store._adapter) == [(7,)]


def test_a_killed_migration_is_begun_again(
    older: str, install: Callable[[Migration], None]
) -> None:
    def die(adapter: Any) -> None:
        fill(adapter)
        os.kill(os.getpid(), signal.SIGKILL)

    install(Migration(later, die))
    child = os.fork()
    if child == 0:
        try:
            pydedup.open(older)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert version_of(older) == 0
    install(Migration(later, fill))
    with pydedup.open(older) as store:
        assert rows(store._adapter) == [(7,)]
        assert store.verify().ok


def test_a_newer_schema_is_refused(store_url: str) -> None:
    with pydedup.open(store_url) as store, store._adapter.transaction():
        store._adapter.set_meta("schema_version", str(SCHEMA_VERSION + 1))
    for mode in ("a", "r"):
        with pytest.raises(SchemaVersionError, match=r"newer pydedup .* upgrade pydedup"):
            pydedup.open(store_url, mode=mode)
    assert version_of(store_url) == SCHEMA_VERSION + 1


# ---- who may ------------------------------------------------------------------------------------


@pytest.fixture
def writer_of_postgres(
    postgres_user: tuple[str, str], postgres_url: str, postgres_schema: str
) -> str:
    """The URL of a store of version 0, as a role that may write it but did not create it."""
    role, url = postgres_user
    with pydedup.open(postgres_url, schema=postgres_schema) as store:
        make_older(store._adapter)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA {postgres_schema} TO {role}")
        everything = f"ALL TABLES IN SCHEMA {postgres_schema}"
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {everything} TO {role}")
    return url


@pytest.fixture
def writer_of_mysql(
    mysql_user: tuple[str, str], mysql_database: str, mysql_run: Callable[..., object]
) -> str:
    """The same in MariaDB."""
    name, url = mysql_user
    with pydedup.open(mysql_database) as store:
        make_older(store._adapter)
    database = urlsplit(mysql_database).path.strip("/")
    mysql_run(mysql_database, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {database}.* TO {name}")
    return url


@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_who_did_not_create_a_store_does_not_migrate_it(
    backend: str, request: pytest.FixtureRequest, install: Callable[[Migration], None]
) -> None:
    url: str = request.getfixturevalue(f"writer_of_{backend}")
    install(Migration(later, fill))
    with pytest.raises(StoreError, match=r"whoever created the store may \(docs/sql.md, Roles\)"):
        pydedup.open(url)
    assert version_of(url) == 0


def test_a_reader_of_postgres_is_told_who_migrates(
    writer_of_postgres: str, postgres_url: str, postgres_schema: str
) -> None:
    role = urlsplit(writer_of_postgres).username
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        everything = f"ALL TABLES IN SCHEMA {postgres_schema}"
        connection.execute(f"REVOKE INSERT ON {everything} FROM {role}")
    with pytest.raises(SchemaVersionError, match="as the user who created it"):
        pydedup.open(writer_of_postgres)


def test_read_only_media_are_not_migrated(tmp_path: Any) -> None:
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        make_older(store._adapter)
    adapter = registry.connect(str(path), mode="r")
    with pytest.raises(ReadOnlyError):
        adapter.migrate_schema()
    adapter.close()
