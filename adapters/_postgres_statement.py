# SPDX-License-Identifier: Apache-2.0
"""COPY of payloads out of PostgreSQL, by libpq's own calls: its rows are had while more are coming.

On one connection (`Statement.rows_as_they_come`), or on several at once in one thread, each server
at its own pace (`run_together`): one statement per connection is sent, then whoever has something
to say is listened to. Pipelines of libpq take no COPY, which moves payloads twice as fast as rows
do, so that there is one statement under way on each connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, cast

import psycopg
from psycopg import pq

from pydedup.errors import without_frames

from ._sessions import Connection, Session
from ._values import Row

__all__ = ["Statement", "copy_statement", "is_stale", "run_together"]

#: What a binary COPY begins with: signature, flags, length of an extension.
_HEAD: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
#: What it ends with, where a row has its length of two bytes.
_TRAILER: Final = b"\xff\xff"
_ID: Final = struct.Struct("!hiq")
_SIZE: Final = struct.Struct("!i")


def copy_statement(table: str, columns: str, ids: Sequence[int]) -> bytes:
    """Return the COPY of columns, ``id`` and bytes, of some rows: it takes no parameters."""
    listed = ",".join(str(int(number)) for number in ids)
    query = f"SELECT {columns} FROM {table} WHERE id = ANY('{{{listed}}}')"  # noqa: S608
    return f"COPY ({query}) TO STDOUT (FORMAT BINARY)".encode()


class Statement:
    """A statement on one connection, whose session the caller has locked.

    Attributes
    ----------
    rows
        Of a COPY of an int8 and one bytea or several: what has come.
    tag
        How the server says that it is done.
    error
        The driver's exception when it failed.
    """

    def __init__(self, session: Session, sql: bytes) -> None:
        self.rows: list[Row] = []
        self.tag = b""
        self.error: Exception | None = None
        self.done = False
        self._sql = sql
        self._copying = False
        self._session = session
        self._connection: psycopg.Connection[Any] = session.connection  # type: ignore[assignment]

    @property
    def socket(self) -> int:
        """What to listen on."""
        return self._connection.pgconn.socket

    def send(self) -> None:
        """Send it."""
        try:
            pgconn = self._connection.pgconn
            pgconn.send_query_params(self._sql, None, result_format=pq.Format.BINARY)
            poll = select.poll()
            poll.register(pgconn.socket, select.POLLIN | select.POLLOUT)
            while pgconn.flush():
                poll.poll()
                pgconn.consume_input()
        except psycopg.Error as error:
            self._fail(error)

    def step(self) -> None:
        """Take in what the server has said so far."""
        try:
            self._connection.pgconn.consume_input()
            while not self.done and (self._take_row() if self._copying else self._take_result()):
                pass
        except psycopg.Error as error:
            self._fail(error)

    def rows_as_they_come(self) -> Iterator[Row]:
        """Send it and yield its rows; the session is locked while it is used, not between rows."""
        poll = select.poll()
        with self._session.use():
            self.send()
            if not self.done:
                poll.register(self.socket, select.POLLIN)
        while not self.done:
            with self._session.use():
                while not self.rows and not self.done:
                    poll.poll()
                    self.step()
            rows, self.rows = self.rows, []
            yield from rows

    def close(self) -> None:
        """Close the connection of a statement that was given up halfway.

        In a child of a fork it is left alone: it is the parent's, who may go on.
        """
        if not self.done and self._session.pid == os.getpid():
            self._connection.close()

    def _fail(self, error: Exception) -> None:
        # Whatever it says afterwards is lost: the connection is of no use any more.
        self.error, self.done = self.error or without_frames(error), True
        if self._connection.pgconn.status != pq.ConnStatus.OK or self._copying:
            self._connection.close()

    def _take_row(self) -> bool:
        length, data = self._connection.pgconn.get_copy_data(1)
        if length == -1:
            self._copying = False
        elif length > 0:
            row = bytes(data)  # is one already, so nothing is copied
            at = len(_HEAD) if row.startswith(_HEAD) else 0
            if len(row) - at > len(_TRAILER):
                columns, _, number = _ID.unpack_from(row, at)
                at += _ID.size
                values = [number]
                for _ in range(columns - 1):
                    start = at + _SIZE.size
                    at = start + _SIZE.unpack_from(row, at)[0]
                    values.append(row[start:at])
                self.rows.append(tuple(values))
        return length != 0

    def _take_result(self) -> bool:
        pgconn = self._connection.pgconn
        if pgconn.is_busy():
            return False
        result = pgconn.get_result()
        if result is None:
            self.done = True
        elif result.status == pq.ExecStatus.COPY_OUT:
            self._copying = True
        elif result.status == pq.ExecStatus.COMMAND_OK:
            self.tag = result.command_status or b""
        else:
            self.error = psycopg.errors.error_from_result(result)
        return True


def run_together(statements: Iterable[Statement]) -> None:
    """Wait until all that were sent have ended; what failed says so in its ``error``."""
    poll = select.poll()
    open_ones = {statement.socket: statement for statement in statements if not statement.done}
    for socket in open_ones:
        poll.register(socket, select.POLLIN)
    while open_ones:
        for socket, _ in poll.poll():
            statement = open_ones[socket]
            statement.step()
            if statement.done:
                poll.unregister(socket)
                del open_ones[socket]


def is_stale(connection: Connection) -> bool:
    """Whether the server has closed an idle connection, or Ctrl-C cut a statement of it short."""
    pgconn = cast("psycopg.Connection[Any]", connection).pgconn
    if pgconn.transaction_status != pq.TransactionStatus.IDLE:
        return True
    with contextlib.suppress(psycopg.Error, OSError, ValueError):  # closed: there is more to read
        for _ in range(3):  # a last message, then the end
            if pgconn.status != pq.ConnStatus.OK:
                return True
            poll = select.poll()
            poll.register(pgconn.socket, select.POLLIN)
            if not poll.poll(0):
                return False
            pgconn.consume_input()
        return pgconn.status != pq.ConnStatus.OK
    return True
