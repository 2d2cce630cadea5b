# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names are quoted; values are always bound)
"""Tables of users in SQLite: beside a store, or in a file of their own."""

from __future__ import annotations

import contextlib
import marshal
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, cast

from pydedup.adapter_options import RowColumn
from pydedup.errors import ArgumentError

from ._rows import RowCalls, Rows
from ._select import as_table

__all__ = ["SqliteRows"]

#: What a query may not do, by the codes of SQLite's authorizer: the names of all that changes
#: something, begins or ends a transaction, or opens another file.
_REFUSED: Final = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in (
        *("INSERT", "UPDATE", "DELETE", "ATTACH", "DETACH", "TRANSACTION", "SAVEPOINT"),
        *("CREATE_TABLE", "CREATE_INDEX", "CREATE_VIEW", "CREATE_TRIGGER", "CREATE_VTABLE"),
        *("DROP_TABLE", "DROP_INDEX", "DROP_VIEW", "DROP_TRIGGER", "DROP_VTABLE"),
        *("ALTER_TABLE", "REINDEX", "ANALYZE"),
    )
)
#: What columns keep as it is, or refuse, by their types without a length.
_KEEPS: Final[Mapping[str, frozenset[type]]] = MappingProxyType(
    dict.fromkeys(("INTEGER", "INT", "BIGINT"), frozenset((int,)))
    | dict.fromkeys(("TEXT", "VARCHAR"), frozenset((str,)))
    | {"": frozenset((int, str))}
)


class SqliteRows(RowCalls):
    """How SQLite streams a user's query, and what it knows of tables."""

    _table_options = " WITHOUT ROWID"
    #: A store is a file of its own, so a table that is not there may well be in another one.
    _elsewhere = "; name the database that has it, if it is another one, by source= (--source)"
    #: Keys keep what they are: a type of SQLite would turn some into others. It has no decimals.
    _key_types: Mapping[str, str] = MappingProxyType(
        dict.fromkeys(("integer", "text", "bytes", "date", "time", "instant"), "")
    )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._collations: dict[str, dict[str, str]] = {}

    @contextlib.contextmanager
    def _stream(self, query: str, batch: int, values: Sequence[object] = ()) -> Iterator[Rows]:
        """Run one SELECT of a user on a connection of its own, and stream it.

        In WAL mode a reader is in nobody's way. Otherwise it would be in ours, who write
        meanwhile: then the rows are first copied into a temporary file.
        """
        with contextlib.closing(cast(sqlite3.Connection, self._connect())) as connection:
            # A text that is no UTF-8 is a fault of its row alone.
            connection.text_factory = lambda value: value.decode(errors="surrogateescape")
            connection.execute("PRAGMA query_only = ON")
            ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
            connection.set_authorizer(_only_reads)
            with self._of_query():
                cursor = connection.execute(query, cast(Any, values))
            with contextlib.ExitStack() as opened:
                columns = [RowColumn(column[0], "") for column in cursor.description]
                if mode != "wal":
                    spool = opened.enter_context(contextlib.closing(sqlite3.connect("")))
                    with self._of_query():
                        cursor = _copied(cursor, spool)

                def fetch() -> list[tuple[Any, ...]]:
                    with self._of_query():
                        return cursor.fetchmany(batch)

                yield Rows(columns, fetch)

    @contextlib.contextmanager
    def _of_query(self) -> Iterator[None]:
        try:
            with self._of_user("the query failed"):
                try:
                    yield
                except sqlite3.Warning as error:  # older than 3.12's ProgrammingError
                    raise ArgumentError(f"the query must be one SELECT: {error}") from error
                except sqlite3.Error as error:
                    raise self._translate(error) from error
                except UnicodeEncodeError as error:  # a key that bounds a range of the query
                    raise ArgumentError(
                        f"the query has a key that is no UTF-8: {error.object!r}; leave it out"
                    ) from error
        except ArgumentError as error:
            if self._elsewhere and str(error.__cause__).startswith("no such table"):
                raise ArgumentError(f"{error}{self._elsewhere}") from error.__cause__
            raise

    def key_bounds(self, query: str, key: str, every: int) -> list[object]:
        """Return every ``every``-th key of a query; none where texts and numbers are keys.

        In a view of several tables, SQLite makes of a bound what each of them has, and no range has
        the text -7 that comes after the number 20.
        """
        bounds = super().key_bounds(query, key, every)
        if bounds:
            name = self._quoted(key, "column")
            kinds = (
                f"SELECT DISTINCT typeof({name}) IN ('integer', 'real') FROM {as_table(query)} "
                f"WHERE {name} IS NOT NULL"
            )
            with self._stream(kinds, 3) as found:
                if sum(map(len, found)) > 1:
                    return []
        return bounds

    def full_table_name(self, table: str) -> str:
        """Return the name itself: there is one schema."""
        if "." in table:
            raise ArgumentError(f"{table!r}: SQLite has no schemas; give the name of a table alone")
        self._table(table)
        return table

    def _columns_of(self, schema: str, table: str) -> list[str]:
        self._collations.pop(table, None)
        # Generated columns are in this list alone; 1 is what a virtual table hides.
        rows = self._query("SELECT name FROM pragma_table_xinfo(?) WHERE hidden <> 1", [table])
        return [name for (name,) in rows]

    def _compared_key(self, table: str, key: str) -> str:
        """Name the collation of the unique index, which may be another than the column's."""
        if table not in self._collations:
            # Of several, one by which more keys are the same.
            rows = self._query(
                "SELECT c.name, MAX(c.coll) FROM pragma_index_list(?) i, "
                'pragma_index_xinfo(i.name) c WHERE i."unique" AND NOT i.partial AND c."key" '
                "GROUP BY i.name HAVING COUNT(*) = 1 ORDER BY upper(MAX(c.coll)) <> 'BINARY'",
                [table],
            )
            self._collations[table] = {name: coll for name, coll in rows if name is not None}
        name, collation = self._quoted(key, "column"), self._collations[table].get(key)
        if collation is None:  # the number of a row
            return name
        quote = self._sql.dialect.quote
        return f"{name} COLLATE {quote}{collation.replace(quote, quote * 2)}{quote}"

    def _unique_columns(self, schema: str, table: str) -> set[str]:
        keys = self._query("SELECT name FROM pragma_table_info(?) WHERE pk > 0", [table])
        found = {name for (name,) in keys} if len(keys) == 1 else set()
        alone = self._query(
            "SELECT MIN(c.name) FROM pragma_index_list(?) i, pragma_index_info(i.name) c "
            'WHERE i."unique" AND NOT i.partial GROUP BY i.name HAVING COUNT(*) = 1',
            [table],
        )
        return found | {name for (name,) in alone if name is not None}

    def _indexless(self, schema: str, table: str) -> str:
        found = self._query(
            "SELECT CASE WHEN type = 'view' THEN 'a view' ELSE 'a virtual table' END "
            "FROM sqlite_master WHERE lower(name) = lower(?) "
            "AND (type = 'view' OR type = 'table' AND sql LIKE 'CREATE VIRTUAL TABLE%')",
            [table],
        )
        return str(found[0][0]) if found else ""

    def insert_predictions(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> bool:
        """Insert rows; of a key that an INTEGER PRIMARY KEY does not take, tell which it is."""
        try:
            return super().insert_predictions(table, columns, rows)
        except ArgumentError as error:
            code = getattr(error.__cause__, "sqlite_errorcode", None)
            keys = [row[0] for row in rows if not _is_whole(row[0])]
            if code != sqlite3.SQLITE_MISMATCH or not keys:
                raise
            raise ArgumentError(
                f"column {columns[0]!r} of table {table} is an INTEGER PRIMARY KEY, which takes "
                f"whole numbers alone, and not the key {keys[0]!r}; have the query give keys "
                "that the table takes, or name another table"
            ) from error.__cause__

    def _kept_types(self, schema: str, table: str, key: str) -> frozenset[type]:
        # ON CONFLICT IGNORE, of any constraint, drops a row.
        found = self._query(
            "SELECT c.type FROM pragma_table_info(?) c, sqlite_master t WHERE c.name = ? "
            "AND lower(t.name) = lower(?) AND t.sql LIKE 'CREATE TABLE%' "
            "AND t.sql NOT LIKE '%CONFLICT%' AND NOT EXISTS "
            "(SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = lower(?))",
            [table, key, table, table],
        )
        if not found:
            return frozenset()
        return _KEEPS.get(found[0][0].partition("(")[0].strip().upper(), frozenset())


def _is_whole(key: object) -> bool:
    """Whether SQLite takes a key for a whole number of 64 bits."""
    if isinstance(key, str) and (not key.isascii() or "_" in key):
        return False
    try:
        number = float(key) if isinstance(key, int | float | str) else math.nan
        return number.is_integer() and -(2.0**63) <= number < 2.0**63
    except ValueError:  # a text
        return False


def _only_reads(action: int, *about: str | None) -> int:
    """Allow what a SELECT does."""
    return sqlite3.SQLITE_DENY if action in _REFUSED else sqlite3.SQLITE_OK


def _copied(cursor: sqlite3.Cursor, spool: sqlite3.Connection) -> sqlite3.Cursor:
    """Copy all rows into a temporary database, and return a cursor on them there."""
    spool.execute("CREATE TABLE rows (row BLOB)")
    # As a whole, since SQLite would not take a text that is no UTF-8 again.
    spool.executemany("INSERT INTO rows VALUES (?)", ((marshal.dumps(row),) for row in cursor))
    cursor.close()
    found = spool.execute("SELECT row FROM rows ORDER BY rowid")
    found.row_factory = lambda _, row: marshal.loads(row[0])  # what was written above
    return found
