# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (identifiers are checked and quoted by `quoted`; values are always bound)
"""Tables of users beside a store: the protocol :class:`pydedup.adapter_options.RowAdapter`.

Here is what the three databases have in common. Each adds how a query is streamed and where the
catalog tells of tables and indexes.
"""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Final

from pydedup.adapter_options import KeyRange, RowColumn, RowStream
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

from ._base import DbApiBase
from ._errors import CancelledError, DeniedError, KeyTakenError
from ._schema import TABLES, VIEWS
from ._select import as_table, check_select
from ._sessions import WRITE, Connection
from ._sql import batches
from ._values import Row

__all__ = ["RowCalls", "Rows", "plain_key", "shown_key", "split_name", "words_of"]

#: PostgreSQL takes no longer names, and would cut them.
NAME_BYTES: Final = 63
#: Each a query within one, of which SQLite takes 2,000.
_KEYS_ONE_BY_ONE: Final = 256
#: How often a transaction is tried that the database gives up for another, as of a deadlock.
_WRITES: Final = 5
#: Errors that are no fault of a user's query or table.
_AS_EVER: Final = (
    *(KeyTakenError, UnavailableError, ConflictError),
    *(ReadOnlyError, StorageFullError, CorruptStoreError),
)
_NAME: Final = re.compile(r"[^\W\d]\w*")
#: A database of MySQL is often called like my-app; what ends a name, or marks a value, is in none.
_SCHEMA_NAME: Final = re.compile(r"""[^\x00-\x1f"'`%?\\]+""")


class Rows:
    """What :meth:`RowCalls.read_rows` gives: columns, and batches of rows."""

    def __init__(self, columns: Sequence[RowColumn], fetch: Callable[[], list[Row]]) -> None:
        self.columns = columns
        self._fetch = fetch

    def __iter__(self) -> Iterator[list[Row]]:
        while rows := self._fetch():
            yield rows


class RowCalls(DbApiBase):
    """Rows of users in any database of DB-API."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[tuple[str, str], frozenset[type]] = {}

    # ---- hooks --------------------------------------------------------------------------------

    @abc.abstractmethod
    def _connect(self) -> Connection:
        """Return a new connection."""

    @abc.abstractmethod
    def _stream(
        self, query: str, batch: int, values: Sequence[object] = ()
    ) -> AbstractContextManager[RowStream]:
        """Run one SELECT in a read-only transaction of its own, and stream it."""

    @abc.abstractmethod
    def full_table_name(self, table: str) -> str:
        """Return what a name that a user wrote stands for."""

    @abc.abstractmethod
    def _columns_of(self, schema: str, table: str) -> list[str]:
        """Return the columns of a table; none when there is no table."""

    @abc.abstractmethod
    def _unique_columns(self, schema: str, table: str) -> set[str]:
        """Return the columns that an index makes unique by themselves."""

    @abc.abstractmethod
    def _indexless(self, schema: str, table: str) -> str:
        """Return what it is, where no index can be made on it: a view, say; else nothing."""

    def vector(self, payload: bytes) -> object:
        """Return float32 in little-endian order as a value of kind ``vector``."""
        return payload

    @abc.abstractmethod
    def _kept_types(self, schema: str, table: str, key: str) -> frozenset[type]:
        """Return types of keys that a column keeps as they are, or refuses.

        None where anything, as a trigger, may stand between an INSERT and the rows. Of texts that
        end in blanks nothing is said.
        """

    #: Whether names of columns that differ in case alone are one.
    _ignores_case = True
    #: Of tables of predictions, where these are not those of our own.
    _table_options: str | None = None
    #: What vectors are, where they are no blobs.
    _vector_type: str | None = None
    #: Types of keys that come from elsewhere, by kind.
    _key_types: Mapping[str, str] = MappingProxyType({})

    # ---- names --------------------------------------------------------------------------------

    def _quoted(self, name: str, what: str) -> str:
        """Return one name as SQL. Raises ArgumentError for what is none."""
        if not _NAME.fullmatch(name) or len(name.encode()) > NAME_BYTES:
            raise ArgumentError(
                f"{name!r} is no name for a {what}; take letters, digits and underscores, not "
                f"beginning with a digit, {NAME_BYTES} bytes at most"
                + (", as in SELECT ... AS id" if what == "column" else "")
            )
        return f"{self._sql.dialect.quote}{name}{self._sql.dialect.quote}"

    def _table(self, full_name: str) -> str:
        """Return the full name of a user's table as SQL; those of the store are refused."""
        dialect = self._sql.dialect
        schema, name = split_name(full_name)
        quoted = self._quoted(name, "table")
        if schema:
            if not _SCHEMA_NAME.fullmatch(schema):
                raise ArgumentError(f"the schema of a table cannot be called {schema!r} here")
            quoted = f"{dialect.quote}{schema}{dialect.quote}.{quoted}"
        ours = {dialect.name(table).replace(dialect.quote, "") for table in (*TABLES, *VIEWS)}
        if {full_name.lower(), name.lower()} & ours or (
            dialect.prefix and name.lower().startswith(dialect.prefix)
        ):
            raise ArgumentError(f"{full_name!r} belongs to the store; name another table")
        return quoted

    # ---- the protocol -------------------------------------------------------------------------

    def read_rows(self, query: str, batch: int) -> AbstractContextManager[RowStream]:
        """Run one SELECT of a user, and stream it."""
        check_select(query)
        return self._stream(query, batch)

    def query_columns(self, query: str) -> list[RowColumn]:
        """Return the columns of a query."""
        # Rows would have to be given up, which MySQL counts as an aborted client.
        with self._stream(f"SELECT * FROM {as_table(query)} LIMIT 0", 1) as stream:
            for _ in stream:
                pass  # to the end, which has to be read, too
            return list(stream.columns)

    def key_bounds(self, query: str, key: str, every: int) -> list[object]:
        """Return every ``every``-th key of a query, in the order of the database."""
        name, inner = self._quoted(key, "column"), as_table(query)
        order = self._order_of(name, inner)
        numbered = (
            f"SELECT {name} AS pydedup_key, ROW_NUMBER() OVER (ORDER BY {order}) AS pydedup_n "
            f"FROM {inner} WHERE {name} IS NOT NULL"
        )
        outer = (
            f"SELECT pydedup_key FROM ({numbered}) pydedup_k WHERE pydedup_n % {int(every)} = 0 "
            "ORDER BY pydedup_n"
        )
        with self._stream(outer, 4096) as stream:
            # None is a date of zeros, which drivers have no value for: the least of all keys.
            return [plain_key(row[0]) for rows in stream for row in rows if row[0] is not None]

    def read_range(
        self, query: str, batch: int, within: KeyRange
    ) -> AbstractContextManager[RowStream]:
        """Stream those rows of a query whose keys are within a range."""
        name = self._quoted(within.key.name, "column")
        conditions: list[str] = []
        values: list[object] = []
        if within.above is not None:
            conditions.append(f"{name} > {self._bound_key(within.key, within.above, values)}")
        if within.up_to is not None:
            last = f"{name} <= {self._bound_key(within.key, within.up_to, values)}"
            # Rows without a key are of the first range, where they are reported as such.
            conditions.append(f"({last} OR {name} IS NULL)" if within.above is None else last)
        if not conditions:
            return self.read_rows(query, batch)
        inner = as_table(self._beside_values(query))
        wanted = f"SELECT * FROM {inner} WHERE {' AND '.join(conditions)}"
        return self._stream(wanted, batch, values)

    def key_column(self, name: str, kind: str) -> RowColumn:
        """Return a column for keys that come from elsewhere."""
        return RowColumn(name, self._key_types.get(kind))

    def _beside_values(self, query: str) -> str:
        """Return a query as it is written where values are bound to what is around it."""
        return query

    def _order_of(self, name: str, inner: str) -> str:
        """Return what a column of a query is sorted by to be in the order of comparisons."""
        return name

    def _bound_key(self, key: RowColumn, value: object, values: list[object]) -> str:
        """Return what keys of a query are compared with, as SQL; what is bound joins ``values``."""
        values.append(value)
        return self._mark(value)

    def _mark(self, value: object) -> str:
        """Return the placeholder of a key."""
        return self._sql.dialect.placeholder

    def table_columns(self, table: str, key: str) -> tuple[str, ...] | None:
        """Return the columns of a table whose column ``key`` is unique, ``None`` without one."""
        self._table(table)
        self._kept.pop((table, key), None)
        with self._of_user(f"table {table}"):
            columns = self._columns_of(*split_name(table))
            if not columns:
                return None
            if key in columns and key not in self._unique_columns(*split_name(table)):
                said = f"column {key!r} of table {table} is not unique by itself"
                advice = "make it the primary key"
                if kind := self._indexless(*split_name(table)):
                    said = f"{table} is {kind}, and no index makes its column {key!r} unique"
                    advice = "name the table that it is of, if there is one"
                raise ArgumentError(
                    f"{said}, so that no row is known to be done; {advice}, or name a new table"
                )
        return tuple(columns)

    def create_predictions(
        self, table: str, key: RowColumn, columns: Sequence[tuple[str, str]]
    ) -> None:
        """Create a table with this key and columns of (name, kind), unless it exists."""
        if key.type is None:
            raise ArgumentError(
                f"column {key.name!r} of the query has a type that can be no key; cast it to an "
                "integer or a text, or create the table yourself"
            )
        if self._ignores_case and key.name.lower() in dict(columns):
            raise ArgumentError(
                f"the key cannot be called {key.name!r}: to this database a column of the "
                "predictions has the same name; give it another one with AS"
            )
        dialect, options = self._sql.dialect, self._table_options
        kinds = {**dialect.types, "vector": self._vector_type or dialect.types["blob"]}
        lines = [f"{self._quoted(key.name, 'column')} {key.type} NOT NULL PRIMARY KEY"]
        lines += [
            f"{self._quoted(name, 'column')} {kinds[kind]} NOT NULL" for name, kind in columns
        ]
        with self._of_user(f"creating table {table}"):
            try:
                self._define_table(
                    f"CREATE TABLE IF NOT EXISTS {self._table(table)} ({', '.join(lines)})"
                    f"{dialect.table_options if options is None else options}"
                )
            except StoreError:
                # Of two who create it at once, PostgreSQL may tell one that a row of its catalog,
                # the type of the table's rows or the table is there.
                if not self._columns_of(*split_name(table)):
                    raise

    def _define_table(self, statement: str) -> None:
        with self._writing():
            self._write(statement)

    def present_keys(self, table: str, key: str, keys: Sequence[object]) -> set[object]:
        """Return those of the keys that have a row, as they were asked."""
        distinct: list[Any] = list(dict.fromkeys(keys))
        if self._sql.dialect.arrays:
            pieces: Iterator[Sequence[Any]] = iter([[distinct]] if distinct else [])
        else:
            pieces = batches(distinct, self.capabilities.max_parameters)
        with self._of_user(f"table {table}"):
            name, told = self._compared_key(table, key), self._told_key(table, key)
            head = f"SELECT {told} FROM {self._table(table)} WHERE {name} "
            found = {
                plain_key(row[0])
                for piece in pieces
                for row in self._query(head + self._members_of(piece), piece)
            }
            if found.issubset(distinct):
                return found
            # The column's type writes some in another way, such as the text 7 as a number.
            unknown = [one for one in distinct if one not in found]
            return found.intersection(distinct) | self._present_one_by_one(head, unknown)

    def _told_key(self, table: str, key: str) -> str:
        """Return the key of a table as a SELECT gives it."""
        return self._quoted(key, "column")

    def _compared_key(self, table: str, key: str) -> str:
        """Return the key of a table as it is compared: what is equal, its unique index says."""
        return self._quoted(key, "column")

    def _present_one_by_one(self, head: str, keys: Sequence[object]) -> set[object]:
        """Return those of the keys for which the column has another spelling."""
        there: set[object] = set()
        for piece in batches(keys, _KEYS_ONE_BY_ONE):
            marks = ", ".join(f"({head} = {self._mark(one)} LIMIT 1)" for one in piece)
            (found,) = self._query(f"SELECT {marks}", piece)
            pairs = zip(piece, found, strict=True)
            there.update(asked for asked, one in pairs if self._is_same(asked, one))
        return there

    def _is_same(self, asked: object, found: object) -> bool:
        """Whether a key that the database takes for another one is that; ``None`` is none."""
        return found is not None

    def _members_of(self, keys: Sequence[object]) -> str:
        if self._sql.dialect.arrays:
            return self._sql.members(len(keys))
        return f"IN ({', '.join(map(self._mark, keys))})"

    def insert_predictions(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> bool:
        """Insert rows in a transaction of their own; ``False``, and none, when a key is taken."""
        names = ", ".join(self._quoted(column, "column") for column in columns)
        head = f"INSERT INTO {self._table(table)} ({names})"
        for left in reversed(range(_WRITES)):
            try:
                with self._of_user(f"writing to table {table}"), self._writing():
                    if rows:
                        self._insert_lines(head, table, columns, rows)
                        self._check_kept(table, columns[0], [row[0] for row in rows])
                break
            except KeyTakenError:
                return False
            except CancelledError:  # another one writes the same rows in another order
                if not left:
                    raise
        return True

    # ---- inside -------------------------------------------------------------------------------

    def _insert_lines(
        self, head: str, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None:
        """Insert rows, of which there are some, in the transaction that there is.

        ``head`` is the INSERT without its values.
        """
        marks = ", ".join([self._sql.dialect.placeholder] * len(columns))
        self._write_many(f"{head} VALUES ({marks})", rows)

    def _check_kept(self, table: str, key: str, keys: Sequence[object]) -> None:
        """Raise ArgumentError where the table has not the keys of rows that were written.

        They are asked for only where it may have made others of them: that takes a sixth.
        """
        if (table, key) not in self._kept:
            self._kept[table, key] = self._kept_types(*split_name(table), key)
        kept = self._kept[table, key].issuperset(map(type, keys))
        # A column of so many characters leaves out blanks behind them.
        if kept and not any(isinstance(one, str) and one[-1:].isspace() for one in keys):
            return
        there = self.present_keys(table, key, keys)
        lost = next((one for one in map(plain_key, keys) if one not in there), None)
        if lost is not None:
            raise ArgumentError(
                f"table {table} has no row with the key {shown_key(lost)} that was written to it: "
                f"the type of its column {key!r} made another key of it, or a trigger, a rule or "
                "an ON CONFLICT of the table changed or dropped the row, or row-level security "
                "hides it; have the query give keys that the table takes, or name another table"
            )

    def _writing(self) -> AbstractContextManager[None]:
        """Write transaction on tables of users; whether they may be written, the database says."""
        return self._scope(WRITE, self._sql.dialect.begin_write)

    @contextlib.contextmanager
    def _of_user(self, what: str) -> Iterator[None]:
        """Tell what the database says of a user's query or table in its own words.

        Other errors of a database are raised as ever.
        """
        try:
            yield
        except OverflowError as error:
            raise ArgumentError(
                f"{self._url}: {what}: a number is beyond what the database holds ({error}); "
                "make a text of it"
            ) from error
        except PydedupError as error:
            # A privilege that the user lacks is one of these where the server is asked to write.
            as_ever = isinstance(error, _AS_EVER) and not isinstance(error, DeniedError)
            if as_ever or not isinstance(error.__cause__, self.driver_error):
                raise
            raise ArgumentError(
                f"{self._url}: {what}: {words_of(error.__cause__)}"
            ) from error.__cause__


def split_name(name: str) -> tuple[str, str]:
    """Split ``schema.table``; the schema is empty when there is none."""
    schema, _, table = name.rpartition(".")
    return schema, table


def plain_key(value: Any) -> Any:
    """Return a key as it can be looked up in a set."""
    if isinstance(value, set):  # of a SET of MySQL; what is asked for is its text
        return frozenset(value)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def shown_key(key: object) -> str:
    """Return a key as messages have it."""
    return repr(key) if isinstance(key, str | bytes) else str(key)


def words_of(error: BaseException) -> str:
    """Return what a driver's error says, in one line, with the advice that PostgreSQL may have."""
    diagnosis = getattr(error, "diag", None)
    said = getattr(diagnosis, "message_primary", None) or getattr(error, "msg", None) or str(error)
    hint = getattr(diagnosis, "message_hint", None)
    return " ".join(f"{said}{f' ({hint})' if hint else ''}".split()) or type(error).__name__
