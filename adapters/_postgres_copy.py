# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL's COPY, in binary: by it rows are written and payloads read, faster than otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from ._base import check_state
from ._dbapi import PAYLOADS_PER_READ
from ._postgres_base import PostgresBase
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

    def insert_pages(self, pages: Sequence[tuple[bytes, bytes]], *, state: str) -> list[int]:
        """Insert (checksum, payload) and return their ids, in order."""
        sized = self._checked_pages(pages, state)
        with self._writer() as session:
            ids = self._new_page_ids(len(sized))
            rows = ((i, state, *page) for i, page in zip(ids, sized, strict=True))
            self._copy_in(session, "pages", ("id", "state", "checksum", "payload"), rows)
        return ids

    def _checked_pages(
        self, pages: Sequence[tuple[bytes, bytes]], state: str
    ) -> list[tuple[bytes, bytes]]:
        check_state(state)
        return [(checksum, self._sized(payload, "a page")) for checksum, payload in pages]

    def _new_page_ids(self, count: int) -> list[int]:
        """Return ids that no page ever had, ascending."""
        numbers = self._query(
            "SELECT nextval(s.name) FROM (SELECT CAST(pg_get_serial_sequence(%b, 'id') AS "
            "regclass) AS name) s, generate_series(1, %b)",
            [self._sql.dialect.name("pages"), count],
        )
        return sorted(row[0] for row in numbers)

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(ids), PAYLOADS_PER_READ):
            piece = ids[start : start + PAYLOADS_PER_READ]
            yield from self._again(lambda piece=piece: self._copy_out(piece))  # type: ignore[misc]

    def _copy_out(self, ids: Sequence[int]) -> list[tuple[int, bytes]]:
        pages = self._sql.dialect.name("pages")
        chosen = f"SELECT id, payload FROM {pages} WHERE id = ANY(%s)"  # noqa: S608
        try:
            with (
                self._pool.acquire() as session,
                session.connection.cursor() as cursor,
                cursor.copy(f"COPY ({chosen}) TO STDOUT (FORMAT BINARY)", [list(ids)]) as copy,
            ):
                copy.set_types(["int8", "bytea"])
                return list(copy.rows())
        except self.driver_error as error:
            raise self._translate(error) from error
