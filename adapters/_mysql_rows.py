# SPDX-License-Identifier: Apache-2.0
"""Tables of users in MySQL and MariaDB, beside a store or in a database without one."""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, cast

from pydedup.adapter_options import RowColumn
from pydedup.errors import ArgumentError

from ._mysql_cursors import PreparedConnection, sent
from ._rows import RowCalls, Rows
from ._values import Row, text

__all__ = ["MysqlRows"]

#: The server gives up on who does not fetch for so long; 60 seconds by default.
_PATIENCE: Final = "SET SESSION net_write_timeout = 86400"
#: Modes by which a query means something else; our sessions have none of them.
_READINGS: Final = (
    *("ANSI_QUOTES", "PIPES_AS_CONCAT", "IGNORE_SPACE"),
    *("HIGH_NOT_PRECEDENCE", "NO_UNSIGNED_SUBTRACTION"),
)
#: A user's query is read as in a session of their own. (But for backslashes in strings: the driver
#: writes values with them.)
_AS_READ: Final = "SET SESSION sql_mode = CONCAT_WS(',', @@SESSION.sql_mode, {})".format(
    ", ".join(f"IF(FIND_IN_SET('{one}', @@GLOBAL.sql_mode), '{one}', NULL)" for one in _READINGS)
)

# Types and flags of the protocol.
_INTEGERS: Final = frozenset({1, 2, 3, 8, 9, 13})
_TEXTS: Final = frozenset({15, 252, 253, 254})
_TIMES: Final = {7: "DATETIME(6)", 10: "DATE", 12: "DATETIME(6)"}
_TEXT: Final = "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
_UNSIGNED: Final = 32
_ENUM: Final = 256
_SET: Final = 2048
_BINARY: Final = 63
#: Strings, quoted names and comments, but for those that the server runs.
_NO_SQL: Final = re.compile(
    r"""(?s)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`|/\*(?!M?!).*?\*/"""
    r"""|(?:\#|--(?=\s))[^\n]*"""
)
#: The word, where it is no column of a table, and no variable.
_INTO: Final = re.compile(r"(?i)(?<![\w$@])(?<![a-z_$`]\.)into(?![\w$])")
#: The error of a user's query that would write, or lock; elsewhere it is the server's fault.
_READ_ONLY: Final = 1792
#: The most that a decimal has.
_DIGITS: Final = 65
#: What columns keep as it is, or refuse, in strict mode, whatever characters they have.
_KEEPS: Final[Mapping[str, frozenset[type]]] = MappingProxyType(
    dict.fromkeys(("tinyint", "smallint", "mediumint", "int", "bigint"), frozenset((int,)))
    | {"varchar": frozenset((str,))}
)
#: Who sees triggers: to others, MySQL and older MariaDB (MDEV-37474) say that there are none.
_TOLD_OF_TRIGGERS: Final = (
    "SELECT grantee, privilege_type FROM information_schema.user_privileges UNION ALL "
    "SELECT grantee, privilege_type FROM information_schema.schema_privileges "
    "WHERE table_schema = ? UNION ALL "
    "SELECT grantee, privilege_type FROM information_schema.table_privileges "
    "WHERE table_schema = ? AND table_name = ?"
)
#: What makes values of a query of the texts that they are sent as.
_TYPED: Final = (
    (float, "({} + 0e0)"),
    (bytes, "UNHEX({})"),
    (datetime, "CAST({} AS DATETIME(6))"),
    (date, "CAST({} AS DATE)"),
    (timedelta, "CAST({} AS TIME(6))"),
)


class MysqlRows(RowCalls):
    """How MySQL streams a user's query, and what it knows of tables."""

    _key_types: Mapping[str, str] = MappingProxyType(
        {"integer": "BIGINT", "text": _TEXT, "bytes": "VARBINARY(255)"}
        | {"date": "DATE", "time": "DATETIME(6)", "instant": "DATETIME(6)"}
    )

    @abc.abstractmethod
    def _define(self, statement: str) -> None:
        """Run a definition, which ends any transaction."""

    @contextlib.contextmanager
    def _stream(self, query: str, batch: int, values: Sequence[object] = ()) -> Iterator[Rows]:
        """Run one SELECT of a user, unbuffered, on a connection of its own, and stream it.

        Connections are opened so that the server takes one statement at a time.
        """
        if _INTO.search(_NO_SQL.sub("`", query)):
            raise ArgumentError(
                "the query must give its rows, and this one writes them INTO a file or variables; "
                "leave that out"
            )
        connection = cast(PreparedConnection, self._connect())
        try:
            raw = connection.raw
            for statement in (_PATIENCE, _AS_READ, *self._sql.dialect.begin_snapshot):
                self._on(raw, statement).close()
            with self._of_user("the query failed"):
                cursor = self._on(raw, query, values)
            if not cursor.description:
                raise ArgumentError("the query gives no columns; write one SELECT")
            columns = [
                RowColumn(text(column[0]), _key_type(column)) for column in cursor.description
            ]

            def fetch() -> list[Row]:
                with self._of_user("the query failed"):
                    return self._fetched(cursor, batch)

            yield Rows(columns, fetch)
        finally:
            connection.leave()

    def _on(self, raw: Any, statement: str, values: Sequence[object] = ()) -> Any:
        """Run a plain statement: of prepared ones the driver reads some numbers and times wrong."""
        try:
            cursor = raw.cursor(buffered=False)
            named = {_named(number): sent(value) for number, value in enumerate(values)}
            cursor.execute(statement, named or None)
            return cursor
        except self.driver_error as error:
            told = self._translate(error)
            if getattr(error, "errno", None) == _READ_ONLY:
                told = ArgumentError(str(error))
            raise told from error

    def _fetched(self, cursor: Any, count: int) -> list[Row]:
        try:
            return list(cursor.fetchmany(count))
        except self.driver_error as error:
            raise self._translate(error) from error

    def _order_of(self, name: str, inner: str) -> str:
        """Return a text for enums, which are sorted by number but compared as texts.

        Raises ArgumentError for sets, which the driver gives and does not take.
        """
        with contextlib.closing(self._connect()) as connection:
            raw = cast(PreparedConnection, connection).raw
            self._on(raw, _AS_READ).close()
            with self._of_user("the query failed"):
                cursor = self._on(raw, f"SELECT {name} FROM {inner} LIMIT 0")  # noqa: S608 (quoted)
            (column,) = cursor.description
            cursor.fetchall()
            cursor.close()
        if column[7] & _SET:
            key = text(column[0])
            raise ArgumentError(
                f"the key {key!r} is a SET, which is no key; have the query give its text, "
                f"CONCAT({key})"
            )
        return f"CONCAT({name})" if column[7] & _ENUM else name

    def _beside_values(self, query: str) -> str:
        # There the driver takes %(name)s for a value, and %(name)% for a percent sign.
        return query.replace("%(", "%(percent)%(")

    def _bound_key(self, key: RowColumn, value: object, values: list[object]) -> str:
        """Name the value, and its type, since all but integers are sent as texts."""
        mark = f"%({_named(len(values))})s"
        values.append(value.hex() if isinstance(value, bytes) else value)
        for kind, typed in _TYPED:
            if isinstance(value, kind):
                return typed.format(mark)
        return self._mark(value).replace("?", mark)

    def _mark(self, value: object) -> str:
        """Return what makes a decimal of one again: it is sent as text, compared as a float.

        So are integers beyond 64 bits with a sign.
        """
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            value = Decimal(value)
        if not isinstance(value, Decimal):
            return super()._mark(value)
        exponent = value.as_tuple().exponent
        scale = max(0, -exponent) if isinstance(exponent, int) else 0
        return f"CAST(? AS DECIMAL({_DIGITS}, {scale}))"

    def _is_same(self, asked: object, found: object) -> bool:
        """Whether it is that; the server takes the text ``7a`` and the number 7 for one."""
        if isinstance(found, str) and isinstance(asked, int | float | Decimal):
            return str(asked) == found
        if isinstance(asked, str) and isinstance(found, int | float | Decimal):
            try:
                return (float if isinstance(found, float) else Decimal)(asked) == found
            except (ValueError, ArithmeticError):
                return False
        return super()._is_same(asked, found)

    def full_table_name(self, table: str) -> str:
        """Return the name with its database."""
        if "." not in table:
            ((database,),) = self._query("SELECT DATABASE()")
            self._table(table)
            return f"{text(database)}.{table}"
        self._table(table)
        return table

    def _columns_of(self, schema: str, table: str) -> list[str]:
        rows = self._query(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = ? "
            "AND table_name = ? ORDER BY ordinal_position",
            [schema, table],
        )
        return [text(name) for (name,) in rows]

    def _unique_columns(self, schema: str, table: str) -> set[str]:
        rows = self._query(
            "SELECT MIN(column_name) FROM information_schema.statistics WHERE table_schema = ? "
            "AND table_name = ? AND non_unique = 0 GROUP BY index_name "
            "HAVING COUNT(*) = 1 AND MAX(COALESCE(sub_part, 0)) = 0",
            [schema, table],
        )
        return {text(name) for (name,) in rows if name is not None}  # of an expression it is NULL

    def _indexless(self, schema: str, table: str) -> str:
        found = self._query(
            "SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = ? "
            "AND table_type LIKE '%VIEW'",
            [schema, table],
        )
        return "a view" if found else ""

    def _kept_types(self, schema: str, table: str, key: str) -> frozenset[type]:
        # Engines such as BLACKHOLE keep nothing.
        found = self._query(
            "SELECT c.data_type FROM information_schema.columns c "
            "JOIN information_schema.tables t USING (table_schema, table_name) "
            "WHERE c.table_schema = ? AND c.table_name = ? AND c.column_name = ? "
            "AND t.table_type = 'BASE TABLE' AND t.engine = 'InnoDB' "
            "AND NOT EXISTS (SELECT 1 FROM information_schema.triggers "
            "WHERE event_object_schema = ? AND event_object_table = ?)",
            [schema, table, key, schema, table],
        )
        if not found or not self._is_told_of_triggers(schema, table):
            return frozenset()
        return _KEEPS.get(text(found[0][0]), frozenset())

    def _is_told_of_triggers(self, schema: str, table: str) -> bool:
        ((account,),) = self._query("SELECT CURRENT_USER()")
        user, _, host = text(account).rpartition("@")
        told = self._query(
            f"SELECT 1 FROM ({_TOLD_OF_TRIGGERS}) granted WHERE grantee = ? "  # noqa: S608 (fixed)
            "AND privilege_type = 'TRIGGER'",
            [schema, schema, table, f"'{user}'@'{host}'"],
        )
        return bool(told)

    def _define_table(self, statement: str) -> None:
        self._define(statement)


def _named(number: int) -> str:
    """Return the name of a value of a query."""
    return f"key{number}"


def _key_type(column: Sequence[Any]) -> str | None:
    """Return the type of a key like a column of a result, as a driver describes it."""
    code, flags, charset = column[1], column[7], column[8]
    if code in _INTEGERS:
        return "BIGINT UNSIGNED" if flags & _UNSIGNED else "BIGINT"
    if code in _TEXTS:
        if charset == _BINARY:
            return "VARBINARY(255)"
        return _TEXT
    return _TIMES.get(code)
