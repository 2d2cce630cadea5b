# SPDX-License-Identifier: Apache-2.0
"""What makes the tables of one schema version those of the next. Forward only, and never changed.

There is one version so far, so the table is empty. A new one raises
`pydedup.adapter.SCHEMA_VERSION`, adds its row here (what it runs is written out, since
`_schema.TABLES` goes on changing) and a golden dump of each database (tests/golden).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydedup.adapter import SCHEMA_VERSION
from pydedup.errors import ReadOnlyError, SchemaVersionError, StoreError

from ._base import DeniedError
from ._catalog import CatalogCalls
from ._schema import Dialect

__all__ = ["MIGRATIONS", "MigratingCalls", "Migration"]


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


class MigratingCalls(CatalogCalls):
    """The part of the adapter protocol that migrates older tables.

    Attributes
    ----------
    migrations
        As `MIGRATIONS`; a test may put others here.
    """

    migrations: Mapping[int, Migration] = MIGRATIONS

    def migrate_schema(self) -> None:
        """Make older tables those of this pydedup, in one transaction; a no-op when they are.

        Raises
        ------
        SchemaVersionError
            When they are too old, or of a newer pydedup.
        ReadOnlyError, ConflictError, StorageFullError, StoreError
            The tables are as they were.
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
