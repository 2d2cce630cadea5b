# SPDX-License-Identifier: Apache-2.0
"""A connection of mysql-connector-python whose statements are prepared once and sent as bytes.

Prepared statements carry bytes as they are; the other way writes them into the text, escaped,
which takes three times as long and twice the packet. Preparing costs a round trip, so a
connection keeps the statements that it used last. Large results are had sooner without, as the
driver copies what a prepared statement gives twice: what is written with ``%s`` for its
parameters, which are numbers, is sent as text.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from mysql.connector.errors import get_exception

from pydedup.errors import ArgumentError

from ._errors import ConnectionLostError
from ._mysql_errors import LOST

__all__ = ["TEXT_MARK", "PreparedConnection", "sent"]

#: Statements that one connection keeps prepared (a server has max_prepared_stmt_count: 16382).
KEPT: Final = 32
#: The mark of parameters in a statement that is sent as text.
TEXT_MARK: Final = "%s"
#: What a packet begins with, behind its head, that is an error; no row does.
_ERROR: Final = 0xFF


class PreparedConnection:
    """What the session pool holds.

    Attributes
    ----------
    raw
        The driver's connection.
    broken
        Whether a statement is in its middle; where it was given up, what comes next would be its
        answer.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        # The driver's own way to a cursor asks the server each time whether it is there. That costs
        # a round trip, and what Galera has to say of a transaction goes into the answer of it.
        self._kinds = {prepared: type(raw.cursor(prepared=prepared)) for prepared in (False, True)}
        _let_errors_end_rows(raw)
        self._kept: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self._used = time.monotonic()
        self.broken = False

    def cursor(self) -> _Cursor:
        """Return a cursor; one after the other, each closed before the next."""
        if self.broken:
            raise ConnectionLostError("a statement was interrupted, and its connection with it")
        return _Cursor(self)

    def close(self) -> None:
        """Close it; the server drops what was prepared."""
        self.raw.close()
        self._kept.clear()

    def leave(self) -> None:
        """Close it, whatever of a result was not read: nothing of that is read any more.

        The server counts who leaves so as an aborted client, and ends the query.
        """
        # Closed the driver's way, the C extension would first read all that is left of a result.
        extension = getattr(self.raw, "_cmysql", None)
        if extension is not None and self.raw.unread_result:
            extension.close()
        else:
            self.close()

    def is_lost(self, idle_seconds: float) -> bool:
        """Whether it cannot be used; the server is only asked after so much time without use."""
        if self.broken:
            return True
        now = time.monotonic()
        if now - self._used < idle_seconds:
            return False
        self._used = now
        return not self.raw.is_connected()

    def execute(self, sql: str, parameters: Sequence[Any]) -> Any:
        """Run a statement and return the driver's cursor."""
        self.broken = True
        # Of what has no parameters and no result, some cannot be prepared: START TRANSACTION.
        prepared = (bool(parameters) or sql.startswith("SELECT")) and TEXT_MARK not in sql
        # The driver prepares anew what is equal to the statement before, but not the same object.
        sql, cursor = self._kept.pop(sql, (sql, None)) if prepared else (sql, None)
        if cursor is None:
            if len(self._kept) >= KEPT:  # before there is a result, beside which nothing can be
                self._kept.popitem(last=False)[1][1].close()
            cursor = self._kinds[prepared](self.raw)
        try:
            cursor.execute(sql, tuple(map(sent, parameters)))
        except Exception as error:
            self._failed(error, cursor)
            raise
        if prepared:
            self._kept[sql] = (sql, cursor)
        self._used = time.monotonic()
        self.broken = bool(cursor.description)  # until the result is read
        return cursor

    def rows_of(self, cursor: Any) -> list[tuple[Any, ...]]:
        """Read what a statement of :meth:`execute` gives."""
        try:
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        except Exception as error:  # MySQL refuses some tables once their rows are asked for
            self._kept = OrderedDict(
                (sql, kept) for sql, kept in self._kept.items() if kept[1] is not cursor
            )
            if getattr(self.raw, "_unread_result", False):  # the C extension goes on waiting for it
                self.raw._unread_result = False
            self._failed(error, cursor)
            raise
        self.broken = False
        return rows

    def _failed(self, error: Exception, cursor: Any) -> None:
        """Know after an error whether the connection can be used; drop what was prepared."""
        self.broken = not _is_answer(getattr(error, "errno", None))
        if not self.broken:
            cursor.close()


class _Cursor:
    """As much of a DB-API cursor as the shared layer uses."""

    def __init__(self, connection: PreparedConnection) -> None:
        self._connection = connection
        self._cursor: Any = None

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        self._cursor = self._connection.execute(sql, parameters)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._connection.rows_of(self._cursor)

    @property
    def description(self) -> Any:
        return self._cursor.description

    @property
    def rowcount(self) -> int:
        return int(self._cursor.rowcount)

    @property
    def lastrowid(self) -> int:
        return int(self._cursor.lastrowid)

    def close(self) -> None:
        """Leave the statement prepared, its result read."""


class _Packets:
    """The packets of a result, of which an error is raised."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def recv(self, *arguments: Any) -> Any:
        packet = self._socket.recv(*arguments)
        if packet[4] == _ERROR:
            raise get_exception(packet)
        return packet


def _let_errors_end_rows(raw: Any) -> None:
    """Have an error raised that comes among the rows of a prepared statement.

    As of a statement that is cut short. The driver without its C extension takes it for the row
    before, once more, and waits for the next without end.
    """
    protocol = getattr(raw, "_protocol", None)
    if protocol is not None:
        read = protocol.read_binary_result
        protocol.read_binary_result = lambda socket, *rest: read(_Packets(socket), *rest)


def _is_answer(code: int | None) -> bool:
    """Whether an error is what a server said that is still there, and not a client's."""
    return code is not None and code > 0 and not 2000 <= code < 3000 and code not in LOST


def sent(value: Any) -> Any:
    """Return a parameter as the driver carries it without loss."""
    if isinstance(value, str):
        try:  # the C extension would end the process
            value.encode()
        except UnicodeEncodeError:
            raise ArgumentError(f"{value!r} is no valid Unicode text") from None
    if isinstance(value, float):
        return repr(value)  # the C extension would round it to 32 bits
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)  # the C extension would fail
    if isinstance(value, Decimal):
        return f"{value:f}"  # the C extension would write beyond its memory
    if isinstance(value, timedelta):  # the C extension would send 0, the other mangle negative ones
        seconds = abs(value) // timedelta(seconds=1)
        sign = "-" if value < timedelta(0) else ""
        micros = abs(value).microseconds
        return f"{sign}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}.{micros:06}"
    return bytes(value) if isinstance(value, memoryview | bytearray) else value
