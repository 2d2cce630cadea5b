# SPDX-License-Identifier: Apache-2.0
"""A store read from within the PostgreSQL server that it is in, by PL/Python's module ``plpy``.

Statements are part of the query that called: they see what it sees, with the rights of its user.
So there is no connection, nothing to configure, and nothing is ever written.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from pydedup.adapter import Adapter
from pydedup.errors import PydedupError, StoreError

from ._dbapi import PAYLOADS_PER_READ
from ._postgres_base import CAPABILITIES, PostgresBase, dialect_of
from ._postgres_errors import meaning
from ._postgres_url import Place
from ._sessions import Connection, SessionPool
from ._values import Row

__all__ = ["connect", "memory_setting", "viewer"]

R = TypeVar("R")

_TYPES: Final = {bool: "bool", int: "int8", float: "float8", str: "text", bytes: "bytea"}
_MARK: Final = "%b"
#: A role that is set changes within a session, and what policies of rows ask for at any time.
_VIEWER: Final = (
    "SELECT current_user AS name, "
    "row_security_active(to_regclass($1)) OR row_security_active(to_regclass($2)) AS hides"
)
_SETTING: Final = "SELECT current_setting('pydedup.memory', true) AS memory"


def connect(plpy: Any, schema: str) -> Adapter:
    """Return the store in a schema of the database that this runs in."""
    return _SpiAdapter(plpy, schema)


def memory_setting(plpy: Any) -> str | None:
    """Return what ``pydedup.memory`` is set to in this session."""
    ((setting,),) = _rows_of(plpy.execute(_SETTING), ["memory"])
    return None if setting is None else str(setting)


def viewer(plpy: Any, schema: str) -> Callable[[], str]:
    """Return what tells who asks: the same as long as he may see the same models for certain.

    Where row-level security hides models, that is never: policies depend on settings, and on all
    that they look up.
    """
    plan = plpy.prepare(_VIEWER, ["text", "text"])
    tables = [dialect_of(schema).name(table) for table in ("models", "aliases")]
    asked = itertools.count()

    def tell() -> str:
        ((name, hides),) = _rows_of(plpy.execute(plan, tables), ["name", "hides"])
        return f"{name} {next(asked)}" if hides else str(name)

    return tell


class _SpiAdapter(PostgresBase):
    def __init__(self, plpy: Any, schema: str) -> None:
        self._plpy = plpy
        self._thread = threading.get_ident()
        self.driver_error = plpy.Error
        ((database,),) = _rows_of(plpy.execute("SELECT current_database() AS name"), ["name"])
        shown = f"postgresql:///{database}" + ("" if schema == "pydedup" else f"?schema={schema}")
        self._place = Place("", shown, schema, None)
        super().__init__(
            shown,
            dialect=dialect_of(schema),
            read_only=True,
            capabilities=CAPABILITIES,
            pool=SessionPool(self._connect, name=shown),
        )

    def _connect(self) -> Connection:
        if threading.get_ident() != self._thread:
            # A server's process is one thread: another that asks it for rows could end it.
            raise StoreError(f"{self._url}: a thread of its own cannot read from within the server")
        return _Connection(self._plpy)

    def _again(self, read: Callable[[], R]) -> R:
        return read()  # what fails here does so as long as the query that called goes on

    def _translate(self, error: Exception) -> PydedupError:
        said = " ".join(str(error).split())
        return meaning(getattr(error, "sqlstate", None), said, self._place, lost=False)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Raise ReadOnlyError: from within the server, a store is only read."""
        self._refuse_when_read_only()
        yield

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Do nothing: all that is read is what the query that called sees."""
        yield

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        for start in range(0, len(ids), PAYLOADS_PER_READ):
            piece = list(ids[start : start + PAYLOADS_PER_READ])
            rows = self._query(self._sql.read_pages(len(piece)), [piece])
            yield from ((page_id, checksum, payload) for page_id, checksum, payload in rows)


class _Connection:
    """As much of a connection as the shared layer uses; statements are prepared once."""

    def __init__(self, plpy: Any) -> None:
        self.plpy = plpy
        self.plans: dict[tuple[str, tuple[str, ...]], Any] = {}

    def cursor(self) -> _Cursor:
        return _Cursor(self)

    def close(self) -> None:
        self.plans.clear()


class _Cursor:
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._rows: list[Row] = []
        self.description: list[tuple[str]] | None = None

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        connection = self._connection
        types = tuple(map(_type_of, parameters))
        plan = connection.plans.get((sql, types))
        if plan is None:
            pieces = sql.split(_MARK)
            numbered = "".join(f"{piece}${i}" for i, piece in enumerate(pieces[:-1], 1))
            plan = connection.plpy.prepare(numbered + pieces[-1], list(types))
            connection.plans[sql, types] = plan
        result = connection.plpy.execute(plan, list(parameters))
        columns = result.colnames()
        self.description = [(column,) for column in columns]
        self._rows = _rows_of(result, columns)

    def fetchall(self) -> list[Row]:
        return self._rows

    def close(self) -> None:
        self._rows = []


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return f"{_TYPES[type(value[0])]}[]" if value else "int8[]"
    return _TYPES[type(value)]


def _rows_of(result: Any, columns: Sequence[str]) -> list[Row]:
    """Return rows of PL/Python, which are mappings, as tuples."""
    return [tuple(row[column] for column in columns) for row in result]
