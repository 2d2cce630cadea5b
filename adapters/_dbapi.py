# SPDX-License-Identifier: Apache-2.0
"""The adapter protocol over any DB-API 2 driver: here the calls on pages, blocks and views.

A database adds its dialect, how to connect, what its errors mean, and the few things it does
better, as the hooks of :class:`DbApiBase` and :meth:`DbApiAdapter._read_payloads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydedup.adapter import BlockRow, PageRow
from pydedup.errors import ArgumentError

from ._base import check_state
from ._migrations import SchemaCalls
from ._schema import TABLES, VIEWS
from ._sql import batches
from ._values import Row

__all__ = ["PAYLOADS_PER_READ", "DbApiAdapter"]

T = TypeVar("T", int, bytes)

#: Payloads fetched by one statement, where they are not read one by one.
PAYLOADS_PER_READ = 16


class DbApiAdapter(SchemaCalls):
    """The whole adapter protocol, but for the hooks of a database."""

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (id, checksum, payload) of pages that exist; ids come without repetitions."""
        for piece in batches(ids, min(PAYLOADS_PER_READ, self.capabilities.max_parameters)):
            sql = self._sql.read_pages(len(piece))
            yield from self._recorded("pages", sql, piece, ["id", "checksum", "payload"])

    def _checksums(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (id, checksum) of pages that exist."""
        columns = ["id", "checksum"]
        for piece in self._members(ids):
            sql = self._sql.select("pages", columns, members=("id", len(piece)))
            yield from self._recorded("pages", sql, piece, columns)

    # ---- pages --------------------------------------------------------------------------------

    def insert_pages(self, pages: Sequence[tuple[bytes, bytes]], *, state: str) -> list[int]:
        """Insert (checksum, payload) and return their ids, in order."""
        check_state(state)
        pad = self._sql.dialect.pad(state, None)
        has_length = self._sql.dialect.page_length
        found = []
        for checksum, payload in pages:
            length = [len(payload)] if has_length else []
            row = [state, *pad, checksum, self._sized(payload, "a page"), *length]
            found.append(self._insert(self._sql.insert_page, row))
        return found

    def read_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (id, payload) once for each of the ids that exists."""
        return ((page_id, payload) for page_id, _, payload in self.read_recorded_pages(ids))

    def read_recorded_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (id, checksum, payload) once for each of the ids that exists."""
        return self._read_payloads(list(dict.fromkeys(ids)))

    def page_rows(
        self,
        *,
        ids: Sequence[int] | None = None,
        state: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[PageRow]:
        """Return page rows by ascending id, only those with id > ``after``."""
        pieces: Iterable[Sequence[int]] = [()] if ids is None else self._members(ids, reserved=3)
        columns = [*TABLES["pages"].names[:-1], "payload_bytes"]
        rows: list[Row] = []
        for piece in pieces:
            left = None if limit is None else limit - len(rows)
            if left is not None and left <= 0:
                break
            sql = self._sql.page_rows(
                members=len(piece), state=state is not None, limit=left is not None
            )
            found = [after, *([] if state is None else [state]), *piece]
            found = found if left is None else [*found, left]
            rows += self._recorded("pages", sql, found, columns)
        return [PageRow(*row) for row in rows]

    def page_ids(self, state: str) -> list[int]:
        """Return the ids of all pages in a state, ascending; their rows are not looked at."""
        check_state(state)
        return [
            page_id
            for (page_id,) in self._recorded("pages", self._sql.page_ids(state), columns=["id"])
        ]

    def set_page_state(
        self, ids: Sequence[int], state: str, retired_at: float | None = None
    ) -> None:
        """Change the state of pages."""
        check_state(state)
        values = [state, retired_at, *self._sql.dialect.pad(state, retired_at)]
        for piece in self._members(ids, reserved=len(values)):
            self._write(self._sql.set_page_state(len(piece)), [*values, *piece])

    def delete_pages(self, ids: Sequence[int]) -> None:
        """Delete pages and the distinct blocks on them."""
        self._delete_members("distinct_blocks", "page_id", ids)
        self._delete_members("pages", "id", ids)

    def orphan_pages(self, among: Sequence[int] | None = None) -> list[int]:
        """Return ids, ascending, of pages that no row of ``model_pages`` names, in any state."""
        pieces: Iterable[Sequence[int]] = [()] if among is None else self._members(among)
        return [
            row[0]
            for piece in pieces
            for row in self._query(self._sql.orphan_pages(len(piece)), piece)
        ]

    # ---- who reads what -----------------------------------------------------------------------

    def insert_model_pages(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        """Insert (model_id, page_id, blocks, bytes)."""
        self._insert_many("model_pages", rows)

    def model_pages(self, model_id: int | None = None) -> list[tuple[int, int, int, int]]:
        """Return (model_id, page_id, blocks, bytes) ordered by model and page."""
        if model_id is None:
            return self._recorded("model_pages", self._sql.model_pages)
        return self._recorded("model_pages", self._sql.model_pages_of, [model_id])

    def readers_of(self, page_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return (model_id, page_id), ordered, of live models that read one of these pages."""
        found: list[tuple[int, int]] = []
        for piece in self._members(page_ids):
            sql = self._sql.readers_of(len(piece))
            found += self._recorded("model_pages", sql, piece, ["model_id", "page_id"])
        return sorted(found)

    def delete_model_pages(self, model_id: int) -> None:
        """Delete the rows of one model."""
        self._write(self._sql.delete_model_pages, [model_id])

    # ---- distinct blocks ----------------------------------------------------------------------

    def insert_blocks(self, rows: Iterable[tuple[bytes, int, int, int | None]]) -> None:
        """Insert (hash128, page_id, slot, base_id)."""
        self._insert_many("distinct_blocks", rows, TABLES["distinct_blocks"].names[1:])

    def delete_blocks(self, ids: Sequence[int]) -> None:
        """Delete rows by id."""
        self._delete_members("distinct_blocks", "id", ids)

    def find_blocks(self, hashes: Sequence[bytes]) -> list[BlockRow]:
        """Return rows on *live* pages whose hash is one of these, in any order."""
        return self._blocks(self._sql.find_blocks, hashes)

    def blocks_on_pages(self, page_ids: Sequence[int]) -> list[BlockRow]:
        """Return rows on these pages, ordered by page and slot, whatever the pages' state."""
        return self._blocks(self._sql.blocks_on_pages, page_ids)

    def _blocks(self, sql: Callable[[int], str], values: Sequence[T]) -> list[BlockRow]:
        found: list[Row] = []
        for piece in self._members(values):
            found += self._recorded("distinct_blocks", sql(len(piece)), piece)
        return [BlockRow(*row) for row in found]

    def count_blocks(self) -> int:
        """Return the number of distinct blocks on live pages."""
        count: int = self._query(self._sql.count_blocks)[0][0]
        return count

    # ---- signatures ---------------------------------------------------------------------------

    def insert_signatures(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        """Insert (segment, grp, payload)."""
        self._insert_many(
            "signatures",
            ((segment, grp, self._sized(payload, "signatures")) for segment, grp, payload in rows),
        )

    def segments(self, grp: int) -> list[int]:
        """Return the segments of one group, ascending."""
        listed = self._signatures(self._sql.signature_segments, [grp], ["segment"])
        return [segment for (segment,) in listed]

    def signatures(
        self, grp: int, segments: Sequence[int] | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (segment, payload) of one group, by ascending segment; of these if any."""
        wanted = self.segments(grp) if segments is None else segments
        most = min(PAYLOADS_PER_READ, self.capabilities.max_parameters - 1)
        for piece in batches(wanted, most):
            members = [list(piece)] if self._sql.dialect.arrays else piece
            sql, columns = self._sql.signatures(len(piece)), ["segment", "payload"]
            yield from self._signatures(sql, [grp, *members], columns)

    def signatures_of(self, segments: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yield (segment, grp, payload) of these segments, in any order."""
        keys = ["segment", "grp"]
        for piece in self._members(segments):
            sql = self._sql.select("signatures", keys, members=("segment", len(piece)), order=keys)
            for segment, grp in self._signatures(sql, piece, keys):
                rows = self._signatures(self._sql.signature, [segment, grp], ["payload"])
                yield from ((segment, grp, payload) for (payload,) in rows)

    def _signatures(self, sql: str, values: Sequence[Any], columns: Sequence[str]) -> list[Row]:
        """Return rows, without damaged ones: the index can do without, and is made anew."""
        with self.sound_rows(lambda *_: None):
            return self._recorded("signatures", sql, values, columns)

    def delete_signatures(self, segments: Sequence[int]) -> None:
        """Delete all groups of these segments."""
        self._delete_members("signatures", "segment", segments)

    def _delete_members(self, table: str, column: str, values: Sequence[int]) -> None:
        for piece in self._members(values):
            self._write(self._sql.delete_members(table, column, len(piece)), piece)

    # ---- views --------------------------------------------------------------------------------

    def view(self, name: str) -> list[dict[str, object]]:
        """Return all rows of ``model_sizes``, ``sharing`` or ``page_owners``."""
        if name not in VIEWS:
            raise ArgumentError(f"there is no view {name!r}; choose one of: {', '.join(VIEWS)}")
        rows = self._recorded(name, self._sql.view(name))
        return [dict(zip(VIEWS[name].names, row, strict=True)) for row in rows]
