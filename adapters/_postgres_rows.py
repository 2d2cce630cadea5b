# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names are quoted; values are always bound)
"""Tables of users in PostgreSQL, beside a store or in a database without one."""

from __future__ import annotations

import abc
import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Final

from pydedup.adapter_options import KeyRange, RowColumn, RowStream
from pydedup.errors import ArgumentError

from ._base import Row
from ._rows import RowCalls, Rows
from ._sessions import Connection

__all__ = ["PostgresRows"]

#: Names in a user's query mean what they mean to him, and he may take his time between rows.
_AS_USER: Final = (
    "RESET search_path",
    "SET idle_in_transaction_session_timeout = 0",
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
)


class PostgresRows(RowCalls):
    """How PostgreSQL streams a user's query, and what it knows of tables."""

    _key_types: Mapping[str, str] = MappingProxyType(
        {"integer": "bigint", "number": "numeric", "text": "text", "bytes": "bytea"}
        | {"date": "date", "time": "timestamp"}
    )

    @abc.abstractmethod
    def _connect(self) -> Connection:
        """Return a new connection."""

    @contextlib.contextmanager
    def _stream(self, query: str, batch: int, values: Sequence[object] = ()) -> Iterator[Rows]:
        """Run one SELECT of a user through a cursor on the server, and stream it.

        Every statement goes by the extended protocol, which takes one at a time: a second one in
        the query, such as COMMIT, is refused.
        """
        with contextlib.closing(self._connect()) as connection:
            for statement in _AS_USER:
                self._on(connection, statement)
            with self._of_user("the query failed"):
                self._on(connection, f"DECLARE pydedup_rows NO SCROLL CURSOR FOR {query}", values)
                head = self._on(connection, "FETCH FORWARD 0 FROM pydedup_rows")
                columns = [
                    RowColumn(column.name, self._type_name(connection, column.type_code))
                    for column in head.description
                ]

            def fetch() -> list[Row]:
                with self._of_user("the query failed"):
                    found = self._on(connection, f"FETCH FORWARD {int(batch)} FROM pydedup_rows")
                    rows: list[Row] = found.fetchall()
                    return rows

            yield Rows(columns, fetch)

    def _on(self, connection: Connection, statement: str, values: Sequence[object] = ()) -> Any:
        """Run a statement and return its cursor.

        Without values as it stands, so that a % in it is one; with them, %b marks each.
        """
        try:
            cursor = connection.cursor()
            if values:
                cursor.execute(statement, values)
            else:
                cursor.execute(statement)
            return cursor
        except self.driver_error as error:
            raise self._translate(error) from error

    def read_range(
        self, query: str, batch: int, within: KeyRange
    ) -> AbstractContextManager[RowStream]:
        """Stream those rows of a query whose keys are within a range."""
        if within.above is not None or within.up_to is not None:
            query = query.replace("%", "%%")  # beside values, a single one would mark one
        return super().read_range(query, batch, within)

    def _bound_key(self, key: RowColumn, value: object) -> str:
        """Name the type, as `format_type` has it: a text is compared with no enum, say."""
        return f"CAST(%b AS {key.type})"

    def _insert_lines(self, head: str, rows: Sequence[Sequence[object]]) -> None:
        """Send a column as one array, which takes the server a fraction of a statement per row."""
        columns = list(map(list, zip(*rows, strict=True)))
        if not rows or any(isinstance(column[0], list) for column in columns):
            super()._insert_lines(head, rows)  # arrays of arrays would be taken apart
            return
        arrays = ", ".join(["pg_catalog.unnest(%b)"] * len(columns))
        self._write(f"{head} SELECT * FROM ROWS FROM ({arrays})", columns)

    def _type_name(self, connection: Connection, oid: int) -> str:
        cursor = connection.cursor()
        cursor.execute("SELECT pg_catalog.format_type(CAST(%b AS oid), -1)", [oid])
        return str(cursor.fetchone()[0])

    def full_table_name(self, table: str) -> str:
        """Return the name with its schema: of a name alone, the first of the search path."""
        if "." not in table:
            with contextlib.closing(self._connect()) as connection:
                self._on(connection, "RESET search_path")
                schema = self._on(connection, "SELECT current_schema()").fetchone()[0]
            if schema is None:
                raise ArgumentError(
                    f"no schema of the search path exists; name one: public.{table}"
                )
            table = f"{schema}.{table}"
        self._table(table)
        return table

    def _columns_of(self, schema: str, table: str) -> list[str]:
        rows = self._query(
            "SELECT a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %b "
            "AND c.relname = %b AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            [schema, table],
        )
        return [name for (name,) in rows]

    def _unique_columns(self, schema: str, table: str) -> set[str]:
        rows = self._query(
            "SELECT a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid "
            "JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a "
            "ON a.attrelid = c.oid AND a.attnum = i.indkey[0] WHERE n.nspname = %b "
            "AND c.relname = %b AND i.indisunique AND i.indisvalid AND i.indimmediate "
            "AND i.indnkeyatts = 1 AND i.indpred IS NULL",
            [schema, table],
        )
        return {name for (name,) in rows}

    def _vector_type(self) -> str:
        return "REAL[]"

    def vector(self, payload: bytes) -> object:
        """Return float32 in little-endian order as a list, for an array of the server's."""
        return list(struct.unpack(f"<{len(payload) // 4}f", payload))
