# SPDX-License-Identifier: Apache-2.0
"""For authors of adapters: the whole protocol, over any DB-API 2 driver that speaks ordinary SQL.

A subclass of :class:`DbApiAdapter` says how its database spells things (:class:`Dialect`), how it
connects (:class:`SessionPool` keeps a connection for each thread, and none over a fork), and what
the driver's errors mean. All else is inherited, and overridden where the database does better.
Where it is a file, :func:`locate_file` reads the URL, and `DatabaseFile.size` says what is amiss.
``examples/duckdb`` is such an adapter; :mod:`pydedup.testing.adapter_contract` tests one.

Names here are public and stay; the modules beside this one are not.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

from pydedup.errors import PydedupError

from . import _dbapi
from ._errors import KeyTakenError
from ._files import DatabaseFile, locate_file
from ._schema import Dialect
from ._sessions import Connection, SessionPool

__all__ = [
    "Connection",
    "DatabaseFile",
    "DbApiAdapter",
    "Dialect",
    "KeyTakenError",
    "SessionPool",
    "locate_file",
]


class DbApiAdapter(_dbapi.DbApiAdapter):
    """All of :class:`pydedup.adapter.Adapter` but the abstract methods here.

    Parameters
    ----------
    url
        What messages and users are shown: without credentials.
    dialect
        How the database spells things. A place in it where two databases differ and yours is not
        foreseen is worth an issue.
    read_only
        Whether changes are refused before the database is asked.
    capabilities
        What the database can do.
    pool
        The connections. The driver must commit each statement by itself: transactions are begun
        by the statements of the dialect and ended with COMMIT and ROLLBACK.

    Attributes
    ----------
    driver_error
        The base class of the driver's exceptions; set it in the class.
    """

    # ---- what a database must say -------------------------------------------------------------

    @abc.abstractmethod
    def translate(self, error: Exception) -> PydedupError:
        """Return the error of :mod:`pydedup.errors` that says what one of the driver's means.

        A unique key that is taken is a :class:`KeyTakenError`. The message names the database and
        what to do, and never holds credentials.
        """

    @abc.abstractmethod
    def stored_bytes(self) -> int:
        """Return what the store occupies in its database, in bytes."""

    @abc.abstractmethod
    def checkpoint(self) -> None:
        """Fold write-ahead data into the main file where there is such a thing."""

    @abc.abstractmethod
    def compact(self) -> None:
        """Give freed space back where the database can."""

    @abc.abstractmethod
    def integrity_errors(self) -> list[str]:
        """Return what the database's own consistency check complains about."""

    # ---- what it may do in a way of its own ---------------------------------------------------

    def create_tables(self) -> None:
        """Create tables, indexes and views, inside of a transaction; they do not exist yet.

        Override it to run :meth:`execute` before or after.
        """
        super()._create_tables()

    def read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (id, payload) of pages that exist; ids come without repetitions."""
        return ((page_id, payload) for page_id, _, payload in super()._read_payloads(ids))

    # ---- for use by subclasses ----------------------------------------------------------------

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows that a SELECT finds."""
        return self._query(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one change, inside of a transaction; return the number of rows it concerned."""
        return self._write(sql, parameters)

    def refuse_when_read_only(self) -> None:
        """Raise ReadOnlyError when changes are refused."""
        self._refuse_when_read_only()

    # ---- where the hooks are called -----------------------------------------------------------

    def _translate(self, error: Exception) -> PydedupError:
        return self.translate(error)

    def _create_tables(self) -> None:
        self.create_tables()

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        checksums = dict(self._checksums(ids))
        for page_id, payload in self.read_payloads(ids):
            if page_id in checksums:  # else it was deleted, or added, in between
                yield page_id, checksums[page_id], payload
