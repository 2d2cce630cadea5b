# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names are quoted; values are always bound)
"""Tables of users in PostgreSQL, beside a store or in a database without one."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, cast

from pydedup.adapter_options import RowColumn
from pydedup.errors import ArgumentError

from ._rows import RowCalls, Rows, plain_key, shown_key, split_name, words_of
from ._select import as_table
from ._sessions import Connection
from ._values import Row

__all__ = ["PostgresRows"]

#: Names in a user's query mean what they mean to him, and he may take his time between rows. The
#: second of these timeouts is there from PostgreSQL 17 on.
_AS_USER: Final = (
    "SELECT set_config(name, '0', false) FROM pg_settings "
    "WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')",
    "RESET search_path",
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
)
_BINARY: Final = 1
#: An interval, of whose months the driver makes days, with which it is another key; a time with its
#: zone, which Python takes for that of another zone; and ranges, one and several, which it sends as
#: no type at all.
_AS_TEXT: Final = frozenset(
    (1186, 1266, 3904, 3906, 3908, 3910, 3912, 3926, 4451, 4532, 4533, 4534, 4535, 4536)
)
#: What is in JSON is no key: Python has it as values of many types. No column has rows without a
#: type of their own.
_NO_KEYS: Final = frozenset((114, 3802, 2249))
#: Errors of a user's query that would write, or has parameters ($1): elsewhere these SQLSTATEs are
#: the server's fault.
_OF_QUERIES: Final = ("25006", "08P01")
#: The SQLSTATE of two types that are not compared.
_NO_OPERATOR: Final = "42883"
#: What columns keep as it is, or refuse.
_KEEPS: Final[Mapping[str, frozenset[type]]] = MappingProxyType(
    dict.fromkeys(("bigint", "integer", "smallint"), frozenset((int,)))
    | dict.fromkeys(("text", "character varying"), frozenset((str,)))
)
#: The columns of a table, by its schema and name; those of the system, and dropped ones, included.
_COLUMNS: Final = (
    "FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
    "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %b AND c.relname = %b "
)
#: Which of them users see.
_SEEN: Final = "AND a.attnum > 0 AND NOT a.attisdropped "
#: Values sent as one array, of which the server takes 1 GB.
ROWS_PER_ARRAY: Final = 8192


class PostgresRows(RowCalls):
    """How PostgreSQL streams a user's query, and what it knows of tables."""

    _ignores_case = False
    _vector_type = "REAL[]"
    _key_types: Mapping[str, str] = MappingProxyType(
        {"integer": "bigint", "number": "numeric", "text": "text", "bytes": "bytea"}
        | {"date": "date", "time": "timestamp", "instant": "timestamptz"}
    )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._types: dict[tuple[str, str], dict[str, str]] = {}

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
                found = self._declare(connection, query, values)
                columns = [RowColumn(name, self._type_name(oid)) for name, oid in found]
                strange = [n for n, (_, oid) in enumerate(found) if _is_strange(connection, oid)]
                if strange:
                    self._on(connection, "CLOSE pydedup_rows")
                    self._declare(connection, _told_as_text(query, len(found), strange), values)

            def fetch() -> list[Row]:
                with self._of_user("the query failed"):
                    found = self._on(connection, f"FETCH FORWARD {int(batch)} FROM pydedup_rows")
                return self._fetched(found)

            yield Rows(columns, fetch)

    def _fetched(self, cursor: Any) -> list[Row]:
        try:
            rows: list[Row] = cursor.fetchall()
            return rows
        except self.driver_error as error:
            # Infinite dates, and those before our era, are none of Python's.
            raise ArgumentError(
                f"{self._url}: the query gives a value that Python has none for: "
                f"{words_of(error)}; leave out its row, or cast the column to text"
            ) from error

    def _declare(
        self, connection: Connection, query: str, values: Sequence[object]
    ) -> list[tuple[str, int]]:
        """Begin a query, and return the names and types of its columns."""
        self._on(connection, f"DECLARE pydedup_rows NO SCROLL CURSOR FOR {query}", values)
        head = self._on(connection, "FETCH FORWARD 0 FROM pydedup_rows")
        return [(column.name, column.type_code) for column in head.description]

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
            told = self._translate(error)
            if getattr(error, "sqlstate", None) in _OF_QUERIES:
                told = ArgumentError(str(error))
            raise told from error

    def _beside_values(self, query: str) -> str:
        return query.replace("%", "%%")  # there a single one would mark a value

    def _bound_key(self, key: RowColumn, value: object, values: list[object]) -> str:
        """Name the type, as `format_type` has it: a text is compared with no enum, say."""
        if key.type is None:
            raise ArgumentError(
                f"column {key.name!r} of the query has a type that can be no key; cast it to an "
                "integer or a text"
            )
        values.append(value)
        return f"CAST(%b AS {key.type})"

    def present_keys(self, table: str, key: str, keys: Sequence[object]) -> set[object]:
        """Return those of the keys that have a row; what is equal, the column's type says."""
        by_type: dict[type, list[object]] = {}
        for one in dict.fromkeys(keys):
            by_type.setdefault(type(one), []).append(one)
        texts = by_type.pop(str, [])
        there: set[object] = set()
        for alike in by_type.values():  # the driver sends a list as values of one type
            try:
                there |= super().present_keys(table, key, alike)
            except ArgumentError as error:
                if getattr(error.__cause__, "sqlstate", None) != _NO_OPERATOR:
                    raise
                kind, first = self._types_of(table).get(key), shown_key(plain_key(alike[0]))
                raise ArgumentError(
                    f"column {key!r} of table {table} is of type {kind}, which the server does not "
                    f"compare with the key {first} of the query; have the query "
                    f"give that type, as in SELECT CAST({key} AS {kind}) AS {key}, ..., or name "
                    "another table"
                ) from error.__cause__
        if not texts:
            return there
        name, place = self._quoted(key, "column"), self._table(table)
        with self._of_user(f"table {table}"):
            kind = self._types_of(table).get(key, "text")
            equals = self._equality_of(kind)
            # As they were asked: the type may write them in another way.
            found = self._query(
                "SELECT asked.k FROM pg_catalog.unnest(CAST(%b AS pg_catalog.text[])) asked(k) "
                f"WHERE EXISTS (SELECT 1 FROM {place} "
                f"WHERE CAST({name} AS {kind}) {equals} CAST(asked.k AS {kind}))",
                [texts],
            )
        return there.union(row[0] for row in found)

    def _equality_of(self, kind: str) -> str:
        """Return what two keys of a type are compared with.

        An extension's type, such as citext, has an operator of its own, which our search path does
        not find; the server would compare texts, or nothing.
        """
        if "." not in kind:
            return "="
        rows = self._query(
            "SELECT quote_ident(n.nspname) FROM pg_operator o JOIN pg_namespace n "
            "ON n.oid = o.oprnamespace WHERE o.oprname = '=' AND o.oprleft = o.oprright "
            "AND o.oprleft = CAST(CAST(%b AS text) AS regtype)",
            [kind],
        )
        return f"OPERATOR({rows[0][0]}.=)" if rows else "="

    def _told_key(self, table: str, key: str) -> str:
        """Name the type: else a statement that is prepared fails once a table is made anew."""
        name, kind = self._quoted(key, "column"), self._types_of(table).get(key)
        return f"CAST({name} AS {kind})" if kind else name

    def _insert_lines(
        self, head: str, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None:
        """Send a column as one array, which takes the server a fraction of a statement per row."""
        first = rows[0]
        is_text = [isinstance(value, str) for value in first]
        types = self._types_of(table) if any(is_text) else {}
        kinds = [
            types.get(column) if text else None
            for column, text in zip(columns, is_text, strict=True)
        ]
        lists = list(map(list, zip(*rows, strict=True)))
        # Arrays of arrays would be taken apart, and the driver sends a list as values of one type.
        if list in map(type, first) or any(len(set(map(type, one))) > 1 for one in lists):
            marks = ", ".join(f"CAST(%b AS {kind})" if kind else "%b" for kind in kinds)
            self._write_many(f"{head} VALUES ({marks})", rows)
            return
        arrays = ", ".join(
            f"pg_catalog.unnest({f'CAST(%b AS {kind}[])' if kind else '%b'})" for kind in kinds
        )
        for start in range(0, len(rows), ROWS_PER_ARRAY):
            piece = [one[start : start + ROWS_PER_ARRAY] for one in lists]
            # Not from them: there a composite value is a column for each of its parts.
            self._write(f"{head} SELECT {arrays}", piece)

    def _kept_types(self, schema: str, table: str, key: str) -> frozenset[type]:
        found = self._query(
            f"SELECT format_type(a.atttypid, -1) {_COLUMNS}AND a.attname = %b "
            "AND c.relkind = 'r' AND NOT (c.relhastriggers OR c.relhasrules OR c.relrowsecurity)",
            [schema, table, key],
        )
        return _KEEPS.get(found[0][0], frozenset()) if found else frozenset()

    def _type_name(self, oid: int) -> str | None:
        """Return a type as any connection of ours understands it, without a length."""
        if oid in _NO_KEYS:
            return None
        # With our search path, in which there is nothing of users, all of theirs get their schema.
        ((name,),) = self._query("SELECT format_type(CAST(%b AS oid), -1)", [oid])
        return str(name)

    def _types_of(self, table: str) -> dict[str, str]:
        """Return the types of a table's columns, of domains what they are made of.

        Texts are sent with their column's type: no enum is compared with a text, and a char(n) as
        one, without the blanks that fill it. Asked once from :meth:`table_columns` on, with which
        a scoring begins.
        """
        place = split_name(table)
        if known := self._types.get(place):
            return known
        rows = self._query(
            f"WITH RECURSIVE made(name, oid) AS (SELECT a.attname, a.atttypid {_COLUMNS}{_SEEN}"
            "UNION ALL SELECT m.name, t.typbasetype FROM made m JOIN pg_type t ON t.oid = m.oid "
            "WHERE t.typtype = 'd') SELECT m.name, format_type(m.oid, -1) FROM made m "
            "JOIN pg_type t ON t.oid = m.oid WHERE t.typtype <> 'd'",
            [*place],
        )
        types: dict[str, str] = dict(rows)
        self._types[place] = types
        return types

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
        if table.startswith("pg_temp"):
            raise ArgumentError(
                f"{table!r} would be a temporary table, which goes with the connection that made "
                "it; name another schema, as in public.predictions"
            )
        return table

    def _columns_of(self, schema: str, table: str) -> list[str]:
        self._types.pop((schema, table), None)
        rows = self._query(f"SELECT a.attname {_COLUMNS}{_SEEN}ORDER BY a.attnum", [schema, table])
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

    def _indexless(self, schema: str, table: str) -> str:
        found = self._query(
            "SELECT CAST(c.relkind AS text) FROM pg_class c JOIN pg_namespace n "
            "ON n.oid = c.relnamespace WHERE n.nspname = %b AND c.relname = %b",
            [schema, table],
        )
        kind = found[0][0] if found else ""
        return {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(kind, "")

    def vector(self, payload: bytes) -> object:
        """Return float32 in little-endian order as a list, for an array of the server's."""
        return list(struct.unpack(f"<{len(payload) // 4}f", payload))


def _is_strange(connection: Connection, oid: int) -> bool:
    """Whether the driver would give values of a type as what the server keeps inside, or others."""
    return oid in _AS_TEXT or cast(Any, connection).adapters.get_loader(oid, _BINARY) is None


def _told_as_text(query: str, count: int, strange: Collection[int]) -> str:
    """Return a query with some of its columns, by number, as texts."""
    told = (f"CAST(c{n} AS pg_catalog.text)" if n in strange else f"c{n}" for n in range(count))
    names = ", ".join(f"c{n}" for n in range(count))
    return f"SELECT {', '.join(told)} FROM {as_table(query)}({names})"
