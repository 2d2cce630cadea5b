# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL's COPY, in binary: by it rows are written and payloads read, faster than otherwise."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from pydedup.errors import UnavailableError

from ._base import check_state
from ._dbapi import PAYLOADS_PER_READ
from ._errors import CancelledError
from ._postgres_base import PostgresBase
from ._postgres_statement import Statement, copy_statement
from ._schema import TABLES
from ._sessions import Session

__all__ = ["PostgresCopy"]

#: Kind of a column in TABLES -> the type that COPY sends it as.
KINDS: Final = {
    "id": "int8",
    "int": "int8",
    "float": "float8",
    "hash": "bytea",
    "blob": "bytea",
} | dict.fromkeys(("word", "name", "text"), "text")

#: Payloads of one statement that are yielded while it runs. A statement costs the server a
#: millisecond before its first row; one that runs long meets `statement_timeout`.
PAYLOADS_PER_STREAM: Final = 128


class PostgresCopy(PostgresBase):
    """The calls that move many rows, or large ones."""

    def _copy_in(
        self, session: Session, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> None:
        kinds = {**dict(TABLES[table].columns), "payload_bytes": "int"}
        names = self._sql.dialect.columns(columns)
        sql = f"COPY {self._sql.dialect.name(table)} ({names}) FROM STDIN (FORMAT BINARY)"
        try:
            with session.connection.cursor() as cursor, cursor.copy(sql) as copy:
                copy.set_types([KINDS[kinds[column].rstrip("?")] for column in columns])
                for row in rows:
                    copy.write_row(row)
        except self.driver_error as error:
            raise self._translate(error) from error

    def _insert_many(
        self, table: str, rows: Iterable[Sequence[Any]], columns: Sequence[str] | None = None
    ) -> None:
        with self._writer() as session:
            # Whoever makes the rows may use the connection meanwhile, so they are made before.
            if made := list(rows):
                self._copy_in(session, table, columns or TABLES[table].names, made)
        if table == "distinct_blocks":
            self._new_blocks += len(made)

    def insert_pages(
        self, pages: Sequence[tuple[bytes, bytes]], *, state: str, ids: Sequence[int] | None = None
    ) -> list[int]:
        """Insert (checksum, payload), with these ids if there are any, and return the ids."""
        sized = self._checked_pages(pages, state)
        with self._writer() as session:
            numbers = self.new_page_ids(len(sized)) if ids is None else list(ids)
            rows = ((i, state, *page) for i, page in zip(numbers, sized, strict=True))
            self._copy_in(session, "pages", ("id", "state", "checksum", "payload"), rows)
        return numbers

    def _checked_pages(
        self, pages: Sequence[tuple[bytes, bytes]], state: str
    ) -> list[tuple[bytes, bytes]]:
        check_state(state)
        return [(checksum, self._sized(payload, "a page")) for checksum, payload in pages]

    def new_page_ids(self, count: int) -> list[int]:
        """Return ids for `insert_pages`, ascending; nobody else ever gets them."""
        numbers = self._query(
            "SELECT nextval(s.name) FROM (SELECT CAST(pg_get_serial_sequence(%b, 'id') AS "
            "regclass) AS name) s, generate_series(1, %b)",
            [self._sql.dialect.name("pages"), count],
        )
        return sorted(row[0] for row in numbers)

    # ---- reading payloads -----------------------------------------------------------------------

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield payloads while more of them are coming; in a transaction or snapshot, by pieces.

        There, what the caller does between two of them uses the same connection, so that the
        statement has to end before.
        """
        start = 0
        while start < len(ids):
            if self._pool.scope() is None:
                piece = ids[start : start + PAYLOADS_PER_STREAM]
                yield from self._streamed(piece)
            else:
                piece = ids[start : start + PAYLOADS_PER_READ]
                with self._pool.acquire() as session:
                    found = list(self._copied(session, piece))
                yield from found
            start += len(piece)

    def _streamed(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield payloads; those that have not come are asked for again.

        When the connection is lost, or the statement took longer than it may because its rows were
        not taken sooner. As one had come by then, this ends.
        """
        left = list(ids)
        while True:
            came = set()
            rows = self._again(functools.partial(self._begun, left))
            try:
                for row in rows:
                    came.add(row[0])
                    yield row
                return
            except (UnavailableError, CancelledError):
                left = [page_id for page_id in left if page_id not in came]

    def _begun(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        rows = self._lent(ids)
        return itertools.chain(list(itertools.islice(rows, 1)), rows)

    def _lent(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        with self._pool.lend() as session:
            yield from self._copied(session, ids)

    def _copied(self, session: Session, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        pages = self._sql.dialect.name("pages")
        statement = Statement(session, copy_statement(pages, "id, checksum, payload", ids))
        try:
            yield from statement.rows_as_they_come()
        finally:
            statement.close()
        if statement.error is not None:
            raise self._translate(statement.error) from statement.error
