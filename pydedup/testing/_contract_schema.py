# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for older schemas: they are migrated once, as a whole or not at all.

There is one version of the tables so far. What is migrated here is a store that says it is of
version 0, by a migration that a test made up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pydedup import registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.errors import SchemaVersionError
from pydedup.testing._contract_base import ContractBase, add_pages, in_thread

__all__ = ["SchemaContract"]

Migrations = Callable[[dict[int, Callable[[Any], object]]], None]


class SchemaContract(ContractBase):
    """What opening an older store for writing does to it."""

    @pytest.fixture
    def migrations(self, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> Migrations:
        """Replace the migrations of the adapter by these changes, for the test."""

        def replace(changes: dict[int, Callable[[Any], object]]) -> None:
            steps = {
                number: SimpleNamespace(define=lambda dialect: (), change=change)
                for number, change in changes.items()
            }
            monkeypatch.setattr(type(adapter), "migrations", steps)

        return replace

    @pytest.fixture
    def older(self, adapter: Adapter) -> Adapter:
        """Give a store of version 0, with a few pages."""
        add_pages(adapter, 3)
        with adapter.transaction():
            adapter.set_meta("schema_version", "0")
        return adapter

    def test_there_is_a_migration_from_every_version(self, adapter: Adapter) -> None:
        """And none from a version that there was not."""
        migrations: Any = getattr(adapter, "migrations", {})
        assert sorted(migrations) == list(range(1, SCHEMA_VERSION))

    def test_tables_of_today_are_left_alone(self, adapter: Adapter) -> None:
        """Nothing is written."""
        before = adapter.meta()
        adapter.migrate_schema()
        assert adapter.meta() == before

    def test_an_older_schema_is_migrated(self, older: Adapter, migrations: Migrations) -> None:
        """Version, rows and epoch change together."""
        epoch, pages = older.epoch(), older.page_rows()
        migrations({0: lambda adapter: adapter.set_meta("migrated", "yes")})
        older.migrate_schema()
        assert older.schema_version() == SCHEMA_VERSION
        assert older.meta()["migrated"] == "yes"
        assert older.epoch() > epoch, "adds that began before match again"
        assert older.page_rows() == pages

    def test_a_migration_that_fails_changes_nothing(
        self, older: Adapter, migrations: Migrations
    ) -> None:
        """Neither rows nor the version; the next one begins anew."""
        before = older.meta(), older.page_rows()

        def fail(adapter: Adapter) -> None:
            adapter.set_meta("migrated", "halfway")
            adapter.delete_pages([row.id for row in adapter.page_rows()])
            raise RuntimeError("in the middle")

        migrations({0: fail})
        with pytest.raises(RuntimeError, match="in the middle"):
            older.migrate_schema()
        assert (older.meta(), older.page_rows()) == before
        assert older.schema_version() == 0
        migrations({0: lambda adapter: adapter.set_meta("migrated", "whole")})
        older.migrate_schema()
        assert older.meta()["migrated"] == "whole"
        assert older.schema_version() == SCHEMA_VERSION

    def test_two_that_open_at_once_migrate_once(
        self, older: Adapter, url: str, migrations: Migrations
    ) -> None:
        """The second waits, and finds nothing to do."""
        calls = []
        never, at_it = threading.Event(), threading.Event()

        def change(adapter: Adapter) -> None:
            calls.append(adapter)
            at_it.set()
            never.wait(0.5)  # time for the other to come

        migrations({0: change})
        with registry.opened(url, mode="a") as other:
            first = threading.Thread(target=older.migrate_schema)
            first.start()
            assert at_it.wait(30)
            in_thread(other.migrate_schema)
            first.join(30)
            assert len(calls) == 1
            assert other.schema_version() == older.schema_version() == SCHEMA_VERSION

    def test_what_cannot_be_migrated_is_told(self, older: Adapter, migrations: Migrations) -> None:
        """Too old, or too new."""
        migrations({})
        with pytest.raises(SchemaVersionError, match="schema 0"):
            older.migrate_schema()
        with older.transaction():
            older.set_meta("schema_version", str(SCHEMA_VERSION + 1))
        with pytest.raises(SchemaVersionError, match=f"schema {SCHEMA_VERSION + 1}"):
            older.migrate_schema()
        assert older.schema_version() == SCHEMA_VERSION + 1
