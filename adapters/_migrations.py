# SPDX-License-Identifier: Apache-2.0
"""The tables of a store: making and recognising them, and those of one version into the next.

Migrations go forward only, and are never changed. There is one version so far, so there is none. A
new one raises `pydedup.adapter.SCHEMA_VERSION`, adds its row to `MIGRATIONS` (what it runs is
written out, since `_schema.TABLES` goes on changing) and a golden dump of each database
(tests/golden).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from pydedup.adapter import SCHEMA_VERSION
from pydedup.adapter_options import hidden_rows
from pydedup.errors import (
    NotAStoreError,
    ReadOnlyError,
    SchemaVersionError,
    StoreError,
    UnavailableError,
)

from ._catalog import CatalogCalls
from ._errors import DeniedError
from ._schema import TABLES, VIEWS, Dialect, create_statements
from ._values import as_number, text

__all__ = ["MIGRATIONS", "Migration", "SchemaCalls"]


def _nothing(adapter: Any) -> None:
    """Change no row."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step.

    Attributes
    ----------
    define
        Returns statements that define what is new: tables, indexes, views, columns with a default.
        Where a database cannot take a definition back, some may stay behind by themselves, so the
        older pydedup must go on working beside them; nothing is dropped or renamed here.
    change
        Changes rows, given the adapter, in the transaction that raises the version.
    """

    define: Callable[[Dialect], Sequence[str]]
    change: Callable[[Any], object] = _nothing


#: Version of the tables -> what makes them those of the next.
MIGRATIONS: Final[Mapping[int, Migration]] = {}


class SchemaCalls(CatalogCalls):
    """The part of the adapter protocol that is about the tables themselves."""

    #: As `MIGRATIONS`; a test may put others here.
    migrations: Mapping[int, Migration] = MIGRATIONS

    def schema_version(self) -> int | None:
        """Return the version of the store's tables, or ``None`` when there are none."""
        there = {text(name) for (name,) in self._query(self._sql.dialect.list_tables)}
        prefix = self._sql.dialect.prefix
        ours = [table for table in TABLES if prefix + table in there]
        if not ours:
            return None
        if "meta" not in ours or not self._has_shape("meta"):
            self._refuse_tables("meta")
        found = self._recorded("meta", self._sql.meta_value, ["schema_version"], ["value"])
        version = as_number(found[0][0]) if found else None
        if not found and (hidden := hidden_rows(self)):
            raise UnavailableError(
                f"{self._url} shows no row of {self._sql.dialect.name('meta')}: "
                f"{'; '.join(hidden)}, or a policy show this user all rows"
            )
        if version is None:
            self._refuse_tables("meta")
        if version == SCHEMA_VERSION:
            for table in TABLES:
                if table not in ours or not self._has_shape(table):
                    self._refuse_tables(table, is_store=True)
        return version

    def _has_shape(self, table: str) -> bool:
        columns = self._ask(self._sql.columns_of(table), (), _column_names)
        return columns.issuperset((TABLES.get(table) or VIEWS[table]).names)

    def _missing_views(self) -> list[str]:
        """Return a complaint of each view for people that is not there, or is another."""
        found = []
        for view in VIEWS:
            try:
                if self._has_shape(view):
                    continue
            except DeniedError:  # which is no matter of the store
                continue
            except StoreError as error:
                if type(error) not in (StoreError, NotAStoreError):  # the former in SQLite
                    raise
            found.append(
                f"the view {self._sql.dialect.name(view)} is missing, or a column of it; the store "
                "that `pydedup copy` or a restored backup makes has it"
            )
        return found

    def _refuse_tables(self, table: str, *, is_store: bool = False) -> NoReturn:
        """Say what is wrong with a table; ``is_store`` when ``meta`` tells that it is ours."""
        name = self._sql.dialect.name(table)
        if is_store:
            raise NotAStoreError(
                f"{self._url} is no whole store: its table {name}, or a column of it, is missing; "
                "restore a backup"
            )
        raise NotAStoreError(
            f"{self._url} has tables named like those of pydedup that are not its own (see "
            f"{name}); give the store another place"
        )

    def create_schema(self, meta: Mapping[str, str]) -> None:
        """Create tables and views and fill ``meta``; a no-op when they exist."""
        with self.transaction():
            for statement in self._sql.dialect.lock_schema:
                self._write(statement)
            if self.schema_version() is not None:
                return
            self._create_tables()
            self._fill_meta(meta)

    def _create_tables(self) -> None:
        for statement in create_statements(self._sql.dialect):
            self._write(statement)

    def _fill_meta(self, meta: Mapping[str, str]) -> None:
        first = {"schema_version": str(SCHEMA_VERSION), "epoch": "0"}
        self._insert_many("meta", list({**first, **meta}.items()))

    def migrate_schema(self) -> None:
        """Make older tables those of this pydedup, in one transaction; a no-op when they are.

        Raises SchemaVersionError when they are too old, or of a newer pydedup. The
        tables are as they were after ReadOnlyError, ConflictError, StorageFullError, StoreError.
        """
        with self._told_whose(), self.transaction():
            for statement in self._sql.dialect.lock_schema:
                self._write(statement)
            for version, step in self._steps():
                for statement in step.define(self._sql.dialect):
                    self._write(statement)
                self._finish(version, step)

    def _steps(self) -> list[tuple[int, Migration]]:
        """Return what is to be done, with the version that each step begins from."""
        version = self.schema_version()
        versions = range(SCHEMA_VERSION if version is None else version, SCHEMA_VERSION)
        missing = [number for number in versions if number not in self.migrations]
        if missing or (version is not None and version > SCHEMA_VERSION):
            raise SchemaVersionError(
                f"{self._url} is of schema {version}, which this pydedup cannot make one of schema "
                f"{SCHEMA_VERSION}"
            )
        return [(number, self.migrations[number]) for number in versions]

    def _finish(self, version: int, step: Migration) -> None:
        """Change rows and raise the version; inside of a transaction."""
        self.bump_epoch()  # who matched against older tables looks again before it publishes
        step.change(self)
        self.set_meta("schema_version", str(version + 1))

    @contextlib.contextmanager
    def _told_whose(self) -> Iterator[None]:
        """Say with errors that a migration failed, and who may do it."""
        try:
            yield
        except SchemaVersionError:
            raise
        except StoreError as error:
            refused = isinstance(error, DeniedError | ReadOnlyError)
            whose = "; whoever created the store may (docs/sql.md, Roles)" if refused else ""
            raise type(error)(
                f"{self._url} could not be migrated to schema {SCHEMA_VERSION}, and is as it was"
                f"{whose}: {error}"
            ) from error


def _column_names(cursor: Any) -> set[str]:
    names = {text(column[0]) for column in cursor.description}
    cursor.fetchall()
    return names
