# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (identifiers come from TABLES, VIEWS and a Dialect; values are always bound)
"""Every statement that an adapter runs, as finished texts for one dialect.

No connection, no driver and no value of a user is ever seen here; the tables are in ``_schema``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from pydedup.adapter import LIVE, RETIRED, STAGING

from ._schema import TABLES, VIEWS, Dialect, literal

__all__ = ["MAX_MEMBERS", "Statements", "batches", "insert_pieces"]

T = TypeVar("T")

MODEL_COLUMNS: Final = TABLES["models"].names

#: Most values in one list: more would make texts that cost more to parse than to run.
MAX_MEMBERS: Final = 8192
#: Rows, and bytes of their values, of one INSERT.
INSERT_ROWS: Final = 512
INSERT_BYTES: Final = 1 << 20
_SIZED: Final = (bytes, bytearray, memoryview, str)


def batches(values: Sequence[T], limit: int) -> Iterator[Sequence[T]]:
    """Yield pieces of ``values`` for ``IN (...)``, each at most ``limit`` long.

    The length of a piece is a power of two, reached by repeating its last value, which changes
    no result: a driver then sees a dozen statements to keep prepared, not one per length.
    """
    size = 1 << (max(1, min(limit, MAX_MEMBERS)).bit_length() - 1)
    for start in range(0, len(values), size):
        piece = values[start : start + size]
        missing = (1 << (len(piece) - 1).bit_length()) - len(piece)
        yield [*piece, *([piece[-1]] * missing)] if missing else piece


def insert_pieces(
    rows: Iterable[Sequence[Any]], max_parameters: int
) -> Iterator[list[Sequence[Any]]]:
    """Yield rows in pieces for one INSERT each, in order.

    The length of a piece is a power of two, for the same reason.
    """
    piece: list[Sequence[Any]] = []
    size = 0
    for row in rows:
        row_bytes = sum(len(value) for value in row if isinstance(value, _SIZED))
        most = min(INSERT_ROWS, max_parameters // len(row))
        if len(piece) >= most or size + row_bytes > INSERT_BYTES:
            yield from _halved(piece)
            piece, size = [], 0
        piece.append(row)
        size += row_bytes
    yield from _halved(piece)


def _halved(piece: list[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    while piece:
        count = 1 << (len(piece).bit_length() - 1)
        yield piece[:count]
        piece = piece[count:]


class Statements:
    """Every statement that an adapter runs, for one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._name, self._columns = dialect.name, dialect.columns
        self._of_models()
        self._of_what_belongs_to_models()
        self._of_pages()

        self.meta = self.select("meta")
        self.meta_value = self.select("meta", ("value",), where=("name",))
        self.set_meta = self.upsert("meta")
        bump = f"UPDATE {self._name('meta')} SET value = {dialect.increment} WHERE name = 'epoch'"
        self.bump_epoch = bump
        self.bump_epoch_from = f"{bump} AND value = {dialect.placeholder}"

        self.signature_segments = self.select(
            "signatures", ("segment",), where=("grp",), order=("segment",)
        )
        self.signature = self.select("signatures", ("payload",), where=("segment", "grp"))

        self.put_job = self.upsert("jobs")
        self.jobs = self.select("jobs", order=("id",))
        self.delete_job = self.delete("jobs", ("id",))

    def _of_models(self) -> None:
        dialect = self.dialect
        self.insert_model = self.insert("models", MODEL_COLUMNS[1:], returning=True)
        self.model_exists = self.select("models", ("id",), where=("id",))
        self.live_model = self.select("models", ("id",), where=("name", "version", "state"))
        models = self._name("models")
        one = f"SELECT {self._columns(MODEL_COLUMNS)} FROM {models} WHERE state = {literal(LIVE)}"
        self.model = f"{one} AND id = {dialect.placeholder}"
        named = f"{one} AND name = {dialect.placeholder}"
        self.models_called = (  # an OR of the two would keep some databases from their indexes
            f"{named} AND {dialect.live_version} = {dialect.placeholder} "
            f"UNION ALL {named} AND id = (SELECT model_id FROM {self._name('aliases')}"
            f"{self._where(('name', 'alias'))})"
        )
        self.live_rival = (
            f"SELECT other.name, other.version FROM {models} me JOIN {models} other "
            "ON other.name = me.name AND other.version = me.version AND other.id <> me.id "
            f"WHERE other.state = {literal(LIVE)} AND me.id = {dialect.placeholder}"
        )
        self.delete_model = [self.delete("models", ("id",))] + [
            self.delete(table, ("model_id",))
            for table, spec in TABLES.items()
            if "model_id" in spec.names
        ]
        order = ("name", "alias")
        self.aliases = self.select("aliases", order=order)
        self.aliases_of = self.select("aliases", where=("name",), order=order)
        self.set_alias = self.upsert("aliases")
        self.delete_alias = self.delete("aliases", ("name", "alias"))

    def _of_what_belongs_to_models(self) -> None:
        self.artifacts = self.select(
            "artifacts", ("name", "media_type"), where=("model_id",), order=("name", "part")
        )
        self.artifact = self.select(
            "artifacts", ("part", "payload"), where=("model_id", "name"), order=("part",)
        )
        self.tensors = self.select("tensors", where=("model_id",), order=("ordinal",))
        self.block_map = self.select(
            "block_maps", ("payload",), where=("model_id", "ordinal"), order=("part",)
        )
        self.block_maps = self.select(
            "block_maps", ("ordinal", "payload"), where=("model_id",), order=("ordinal", "part")
        )
        mark = self.dialect.placeholder
        self.source_hashes = (  # from an ordinal on, until below another
            f"SELECT ordinal, payload FROM {self._name('source_hashes')} WHERE model_id = {mark} "
            f"AND ordinal >= {mark} AND ordinal < {mark} ORDER BY ordinal, part"
        )
        self.model_pages = self.select("model_pages", order=("model_id", "page_id"))
        self.model_pages_of = self.select("model_pages", where=("model_id",), order=("page_id",))
        self.delete_model_pages = self.delete("model_pages", ("model_id",))

    def _of_pages(self) -> None:
        dialect = self.dialect
        page_columns = ["state", *(["pad"] if dialect.page_pad else []), "checksum", "payload"]
        page_columns += ["payload_bytes"] if dialect.page_length else []
        self.insert_page = self.insert("pages", page_columns, returning=True)
        # Pages that are not live are few, so this inner list is short and read from an index;
        # a join would fetch the row of a page, beside its payload, for every block.
        self._hidden = (
            f"SELECT id FROM {self._name('pages')} WHERE state IN "
            f"({literal(STAGING)}, {literal(RETIRED)})"
        )
        count = f"SELECT COUNT(*) FROM {self._name('distinct_blocks')}"
        self.count_blocks = f"SELECT ({count}) - ({count} WHERE page_id IN ({self._hidden}))"

    # ---- generic forms --------------------------------------------------------------------------

    def _where(self, columns: Sequence[str]) -> str:
        tests = (
            f"{self.dialect.column(column)} = {self.dialect.placeholder}" for column in columns
        )
        return f" WHERE {' AND '.join(tests)}" if columns else ""

    def select(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        *,
        where: Sequence[str] = (),
        members: tuple[str, int] | None = None,
        order: Sequence[str] = (),
    ) -> str:
        """Return a SELECT with equality tests; of all columns unless told otherwise.

        Of a column that ``members`` names, the value is one of so many, its last parameters.
        """
        columns = TABLES[table].names if columns is None else columns
        found = self._where(where)
        if members is not None:
            column, count = members
            found += f"{' AND' if found else ' WHERE'} {column} {self.members(count)}"
        ordered = f" ORDER BY {self._columns(order)}" if order else ""
        return f"SELECT {self._columns(columns)} FROM {self._name(table)}{found}{ordered}"

    def delete(self, table: str, where: Sequence[str]) -> str:
        """Return a DELETE with equality tests."""
        return f"DELETE FROM {self._name(table)}{self._where(where)}"

    def insert(
        self, table: str, columns: Sequence[str] | None = None, *, returning: bool = False
    ) -> str:
        """Return an INSERT of one row; of all columns unless told otherwise."""
        columns = TABLES[table].names if columns is None else columns
        marks = ", ".join([self.dialect.placeholder] * len(columns))
        tail = " RETURNING id" if returning and self.dialect.returning_id else ""
        return f"INSERT INTO {self._name(table)} ({self._columns(columns)}) VALUES ({marks}){tail}"

    def upsert(self, table: str) -> str:
        """Return an INSERT that replaces the row of the same key."""
        spec = TABLES[table]
        changes = ", ".join(
            self.dialect.upsert_change.format(column=self.dialect.column(column))
            for column in spec.names
            if column not in spec.key
        )
        clause = self.dialect.upsert.format(key=self._columns(spec.key), changes=changes)
        return f"{self.insert(table)} {clause}"

    def members(self, count: int) -> str:
        """Return ``IN (...)`` for that many values, or what takes the one list of them."""
        if self.dialect.arrays:
            return f"= ANY({self.dialect.placeholder})"
        return f"IN ({', '.join([self.dialect.placeholder] * count)})"

    def delete_members(self, table: str, column: str, count: int) -> str:
        """Return the DELETE of rows whose column has one of that many values."""
        return f"DELETE FROM {self._name(table)} WHERE {column} {self.members(count)}"

    # ---- statements whose shape depends on the call -------------------------------------------

    def models(self, *, name: bool, state: str | None, newest: bool) -> str:
        """Return the listing of models, in a state; parameters: name, how many, newest first.

        The state is no parameter: SQLite, where it decides of an index, would plan each time anew.
        """
        tests = [f"name = {self.dialect.placeholder}"] if name else []
        tests += [] if state is None else [f"state = {literal(state)}"]
        where = f" WHERE {' AND '.join(tests)}" if tests else ""
        limit = f" DESC LIMIT {self.dialect.placeholder}" if newest else ""
        return f"{self.select('models')}{where} ORDER BY id{limit}"

    def readers_of(self, members: int) -> str:
        """Return the live models that read some pages."""
        return (
            f"SELECT r.model_id, r.page_id FROM {self._name('model_pages')} r "
            f"JOIN {self._name('models')} m ON m.id = r.model_id "
            f"WHERE r.page_id {self.members(members)} AND m.state = {literal(LIVE)}"
        )

    def update_model(self, columns: Sequence[str]) -> str:
        """Return an UPDATE of these columns of one model."""
        if not set(columns) <= set(MODEL_COLUMNS):
            raise KeyError(columns)
        changes = ", ".join(f"{column} = {self.dialect.placeholder}" for column in columns)
        return f"UPDATE {self._name('models')} SET {changes}{self._where(('id',))}"

    def page_rows(self, *, members: int, state: bool, limit: bool) -> str:
        """Return the listing of pages; parameters: after, state, members, limit."""
        mark = self.dialect.placeholder
        length = self.dialect.byte_length.format(value="payload")
        return (
            f"SELECT id, state, retired_at, checksum, {length} FROM {self._name('pages')} "
            f"WHERE id > {mark}"
            + (f" AND state = {mark}" if state else "")
            + (f" AND id {self.members(members)}" if members else "")
            + " ORDER BY id"
            + (f" LIMIT {mark}" if limit else "")
        )

    def page_ids(self, state: str) -> str:
        """Return the listing of pages in a state, by the index on states alone."""
        return f"SELECT id FROM {self._name('pages')} WHERE state = {literal(state)} ORDER BY id"

    def orphan_pages(self, members: int) -> str:
        """Return the listing of pages without a reader, of some or of all."""
        # Naming every state leads to the index on states.
        states = f"state IN ({literal(STAGING)}, {literal(LIVE)}, {literal(RETIRED)})"
        return (
            f"SELECT id FROM {self._name('pages')} p "
            f"WHERE {f'id {self.members(members)}' if members else states} AND NOT EXISTS "
            f"(SELECT 1 FROM {self._name('model_pages')} r WHERE r.page_id = p.id) ORDER BY id"
        )

    def read_pages(self, members: int) -> str:
        """Return the reading of checksums and payloads."""
        return self.select("pages", ("id", "checksum", "payload"), members=("id", members))

    def set_page_state(self, members: int) -> str:
        """Return the change of state; parameters: state, retired_at, pad if any, members."""
        mark = self.dialect.placeholder
        pad = f", pad = {mark}" if self.dialect.page_pad else ""
        return (
            f"UPDATE {self._name('pages')} SET state = {mark}, retired_at = {mark}{pad} "
            f"WHERE id {self.members(members)}"
        )

    def find_blocks(self, members: int) -> str:
        """Return the lookup of blocks by hash, on live pages."""
        blocks = self.select("distinct_blocks", members=("hash128", members))
        if not self.dialect.scans_lists:
            return f"{blocks} AND page_id NOT IN ({self._hidden})"
        hidden = f"{self._hidden} AND id IN (SELECT page_id FROM found)"
        found = f"WITH found AS MATERIALIZED ({blocks})"
        return f"{found} SELECT * FROM found WHERE page_id NOT IN ({hidden})"

    def blocks_on_pages(self, members: int) -> str:
        """Return the listing of blocks by page."""
        of_pages, order = ("page_id", members), ("page_id", "slot")
        return self.select("distinct_blocks", members=of_pages, order=order)

    def signatures(self, members: int) -> str:
        """Return the reading of some segments of a group; parameters: the group, members."""
        columns, order = ("segment", "payload"), ("segment",)
        some = ("segment", members)
        return self.select("signatures", columns, where=("grp",), members=some, order=order)

    def view(self, view: str) -> str:
        """Return the reading of a view, in a stable order."""
        columns = VIEWS[view].names
        # Of a pair, the name and version of both.
        keys = ", ".join(str(number + 1) for number, _ in enumerate(columns[:4]))
        return f"SELECT {', '.join(columns)} FROM {self._name(view)} ORDER BY {keys}"

    def columns_of(self, table: str) -> str:
        """Return a SELECT that yields no row but describes the columns of a table."""
        return f"SELECT * FROM {self._name(table)} WHERE 1 = 0"
