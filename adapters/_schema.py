# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (identifiers come from TABLES, VIEWS and a Dialect; values are always bound)
"""The tables, indexes and views of a store, written once; what differs is a :class:`Dialect`.

There are no foreign keys: every deletion names its dependants in the same transaction, and a
lookup per row of ``distinct_blocks`` would be paid on the hottest insert. ``verify`` looks for
what dangles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pydedup.adapter import LIVE, RETIRED, STAGING

__all__ = [
    "NUMBERED",
    "PREFIX",
    "TABLES",
    "VIEWS",
    "Dialect",
    "Table",
    "create_statements",
    "literal",
]

#: What names of tables and views begin with, unless stores live in a schema of their own.
PREFIX: Final = "pydedup_"


#: The version of a live model, NULL of any other.
_LIVE_VERSION: Final = f"CASE WHEN state = '{LIVE}' THEN version END"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one database spells things. The defaults are those of SQLite."""

    #: SQL type of each kind of column: int, float, word (a few letters), name (short and part
    #: of a key), text, hash (16 bytes and indexed), blob.
    types: Mapping[str, str]
    #: Definition of a column that numbers rows and never uses a number twice.
    identity: str
    #: Query that lists the tables that live where ours would.
    list_tables: str
    begin_write: tuple[str, ...]
    #: Must fix the state that is seen there and then, not at the first read.
    begin_snapshot: tuple[str, ...]
    #: Run before it is looked whether there are tables, so that no two create them at once,
    #: where beginning to write is not enough.
    lock_schema: tuple[str, ...] = ()
    placeholder: str = "?"
    #: Whether a list of values is one parameter, ``= ANY(...)``, and not one each in ``IN (...)``.
    arrays: bool = False
    #: Whether a list in ``NOT IN (SELECT ...)`` that is long is gone through for every row.
    scans_lists: bool = False
    #: Whether one INSERT takes many rows sooner than the driver's `executemany` sends them.
    many_rows: bool = False
    quote: str = '"'
    #: ``'"some_schema".'`` where stores live in a schema of their own (then ``prefix`` is empty).
    qualifier: str = ""
    prefix: str = PREFIX
    table_options: str = ""
    #: Further ones of tables whose key is no ``id``.
    keyed_table_options: str = ""
    upsert: str = "ON CONFLICT ({key}) DO UPDATE SET {changes}"
    upsert_change: str = "{column} = excluded.{column}"
    increment: str = "CAST(CAST(value AS INTEGER) + 1 AS TEXT)"
    #: Without partial indexes an expression that is NULL unless live keeps live names unique; where
    #: an index takes no expression either, it is that of a generated column.
    partial_indexes: bool = True
    expression_indexes: bool = False
    #: Whether ``INSERT ... RETURNING id`` tells a new id, instead of ``cursor.lastrowid``.
    returning_id: bool = False
    #: Whether ``pages`` gets a column ``pad``, see :meth:`pad`.
    page_pad: bool = False
    #: Whether ``pages`` gets a column ``payload_bytes``, where asking for the length of a value
    #: reads the value; then ``byte_length`` names that column.
    page_length: bool = False
    address: str = "{model}.name || '@' || {model}.version"
    join_text: str = "group_concat({value}, ', ')"
    byte_length: str = "length({value})"

    @property
    def live_version(self) -> str:
        """What the index of live models has beside their names; of no other model is it equal."""
        if self.partial_indexes:
            return "version"
        return f"({_LIVE_VERSION})" if self.expression_indexes else "live_version"

    def name(self, table: str) -> str:
        """Return the full name of one of our tables or views."""
        if table not in TABLES and table not in VIEWS:
            raise KeyError(table)
        return f"{self.qualifier}{self.prefix}{table}"

    def column(self, column: str) -> str:
        """Return a column as it must be written: some databases reserve ``cursor``."""
        return f"{self.quote}{column}{self.quote}" if column == "cursor" else column

    def columns(self, columns: Sequence[str]) -> str:
        """Return a list of columns."""
        return ", ".join(self.column(column) for column in columns)

    def pad(self, state: str, retired_at: float | None) -> tuple[bytes, ...]:
        """Return the value of column ``pad`` of ``pages``, or nothing without such a column.

        SQLite changes a row in place when its encoded length stays the same, and otherwise
        writes all of it again, a payload of 1 MiB included: 13 times slower in a publishing
        transaction (measured, 256 pages). So a state and its pad have the same length together.
        """
        if not self.page_pad:
            return ()
        longest = max(len(STAGING), len(LIVE), len(RETIRED))
        return (bytes(longest - len(state) + (8 if retired_at is None else 0)),)


@dataclass(frozen=True)
class Table:
    """A table, or a view, as (column, kind) pairs; a kind that ends in ``?`` may be NULL."""

    columns: tuple[tuple[str, str], ...]
    key: tuple[str, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(name for name, _ in self.columns)

    @cached_property
    def _kind_of(self) -> dict[str, str]:
        return dict(self.columns)

    def kinds(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the kinds of some columns; what is no column is a number of bytes."""
        return tuple([self._kind_of.get(name, "int") for name in names])


_PARTS: Final = Table(
    (("model_id", "int"), ("ordinal", "int"), ("part", "int"), ("payload", "blob")),
    ("model_id", "ordinal", "part"),
)

TABLES: Final[Mapping[str, Table]] = {
    "meta": Table((("name", "name"), ("value", "text")), ("name",)),
    "models": Table(
        (
            ("id", "id"),
            ("name", "name"),
            ("version", "name"),
            ("state", "word"),
            ("created_at", "float"),
            ("policy", "text"),
            ("certificate", "text"),
            ("metadata", "text"),
            ("logical_bytes", "int"),
            ("digest", "blob"),
        )
    ),
    "aliases": Table((("name", "name"), ("alias", "name"), ("model_id", "int")), ("name", "alias")),
    # Artifacts are split, so that one may be larger than a value that the database takes.
    "artifacts": Table(
        (
            ("model_id", "int"),
            ("name", "name"),
            ("part", "int"),
            ("media_type", "text"),
            ("payload", "blob"),
        ),
        ("model_id", "name", "part"),
    ),
    "tensors": Table(
        (
            ("model_id", "int"),
            ("ordinal", "int"),
            ("name", "text"),
            ("dtype", "text"),
            ("shape", "text"),
            ("block_shape", "text"),
        ),
        ("model_id", "ordinal"),
    ),
    "block_maps": _PARTS,
    "source_hashes": _PARTS,
    # The payload comes last, so that the columns before it are read without it.
    "pages": Table(
        (
            ("id", "id"),
            ("state", "word"),
            ("retired_at", "float?"),
            ("checksum", "blob"),
            ("payload", "blob"),
        )
    ),
    "model_pages": Table(
        (("model_id", "int"), ("page_id", "int"), ("blocks", "int"), ("bytes", "int")),
        ("model_id", "page_id"),
    ),
    "distinct_blocks": Table(
        (
            ("id", "id"),
            ("hash128", "hash"),
            ("page_id", "int"),
            ("slot", "int"),
            ("base_id", "int?"),
        )
    ),
    "signatures": Table(
        (("segment", "int"), ("grp", "int"), ("payload", "blob")), ("segment", "grp")
    ),
    "jobs": Table(
        (("id", "name"), ("spec", "text"), ("cursor", "text"), ("state", "word")), ("id",)
    ),
}

#: The tables whose rows the database numbers.
NUMBERED: Final = tuple(name for name, spec in TABLES.items() if ("id", "id") in spec.columns)

#: The views, which people read.
VIEWS: Final[Mapping[str, Table]] = {
    "model_sizes": Table(
        (
            ("name", "name"),
            ("version", "name"),
            ("logical_bytes", "int"),
            ("pages", "int"),
            ("page_bytes", "int"),
            ("exclusive_bytes", "int"),
            ("shared_bytes", "int"),
        )
    ),
    "sharing": Table(
        (
            ("name", "name"),
            ("version", "name"),
            ("other_name", "name"),
            ("other_version", "name"),
            ("shared_pages", "int"),
            ("shared_blocks", "int"),
            ("shared_bytes", "int"),
        )
    ),
    "page_owners": Table((("page_id", "int"), ("owners", "int"), ("models", "text"))),
}

_INDEXES: Final = (
    ("distinct_blocks", "hash128"),
    ("distinct_blocks", "page_id"),
    ("model_pages", "page_id"),
    ("pages", "state"),  # states are asked for without touching the rows, payloads and all
)


def create_statements(dialect: Dialect) -> list[str]:
    """Return the statements that create tables, indexes and views, in order."""
    statements = [_create_table(dialect, table, spec) for table, spec in TABLES.items()]
    for table, column in _INDEXES:
        statements.append(
            f"CREATE INDEX pydedup_{table}_{column} ON {dialect.name(table)} ({column})"
        )
    live = f"{dialect.name('models')} (name, {dialect.live_version})"
    if dialect.partial_indexes:
        live += f" WHERE state = {literal(LIVE)}"
    statements.append(f"CREATE UNIQUE INDEX pydedup_models_live ON {live}")
    return statements + _create_views(dialect)


def _create_table(dialect: Dialect, table: str, spec: Table) -> str:
    lines = []
    for column, kind in spec.columns:
        null = "" if kind.endswith("?") else " NOT NULL"
        sql = "" if kind == "id" else dialect.types[kind.rstrip("?")] + null
        lines.append(f"{dialect.column(column)} {sql or dialect.identity}")
    if table == "pages" and dialect.page_pad:
        lines.insert(3, f"pad {dialect.types['blob']} NOT NULL")
    if table == "pages" and dialect.page_length:
        lines.insert(-1, f"payload_bytes {dialect.types['int']} NOT NULL")
    if table == "models" and not (dialect.partial_indexes or dialect.expression_indexes):
        lines.append(
            f"live_version {dialect.types['name']} GENERATED ALWAYS AS ({_LIVE_VERSION}) STORED"
        )
    if spec.key:
        lines.append(f"PRIMARY KEY ({dialect.columns(spec.key)})")
    body = ",\n  ".join(lines)
    options = dialect.table_options + (dialect.keyed_table_options if spec.key else "")
    return f"CREATE TABLE {dialect.name(table)} (\n  {body}\n){options}"


def _create_views(dialect: Dialect) -> list[str]:
    models, reads = dialect.name("models"), dialect.name("model_pages")
    size = dialect.byte_length.format(value="p.payload")
    address = dialect.address.format(model="m")
    joined = dialect.join_text.format(value="o.address")
    live = literal(LIVE)
    return [
        # Bytes of pages that no other live model reads, and of pages that others read too.
        f"""CREATE VIEW {dialect.name("model_sizes")} AS
SELECT m.name AS name, m.version AS version, m.logical_bytes AS logical_bytes,
  COUNT(p.id) AS pages,
  COALESCE(SUM({size}), 0) AS page_bytes,
  COALESCE(SUM(CASE WHEN o.owners = 1 THEN {size} ELSE 0 END), 0) AS exclusive_bytes,
  COALESCE(SUM(CASE WHEN o.owners > 1 THEN {size} ELSE 0 END), 0) AS shared_bytes
FROM {models} m
LEFT JOIN {reads} r ON r.model_id = m.id
LEFT JOIN {dialect.name("pages")} p ON p.id = r.page_id
LEFT JOIN (SELECT s.page_id AS page_id, COUNT(*) AS owners FROM {reads} s
  JOIN {models} l ON l.id = s.model_id WHERE l.state = {live} GROUP BY s.page_id) o
  ON o.page_id = r.page_id
WHERE m.state = {live}
GROUP BY m.id, m.name, m.version, m.logical_bytes""",
        # Of a page that both read, both can share no more than the smaller share of the two.
        f"""CREATE VIEW {dialect.name("sharing")} AS
SELECT a.name AS name, a.version AS version, b.name AS other_name, b.version AS other_version,
  COUNT(*) AS shared_pages,
  SUM(CASE WHEN x.blocks < y.blocks THEN x.blocks ELSE y.blocks END) AS shared_blocks,
  SUM(CASE WHEN x.bytes < y.bytes THEN x.bytes ELSE y.bytes END) AS shared_bytes
FROM {reads} x
JOIN {reads} y ON y.page_id = x.page_id AND y.model_id > x.model_id
JOIN {models} a ON a.id = x.model_id
JOIN {models} b ON b.id = y.model_id
WHERE a.state = {live} AND b.state = {live}
GROUP BY a.id, a.name, a.version, b.id, b.name, b.version""",
        f"""CREATE VIEW {dialect.name("page_owners")} AS
SELECT o.page_id AS page_id, COUNT(*) AS owners, {joined} AS models
FROM (SELECT r.page_id AS page_id, {address} AS address FROM {reads} r
  JOIN {models} m ON m.id = r.model_id WHERE m.state = {live}
  ORDER BY r.page_id, m.name, m.version) o
GROUP BY o.page_id""",
    ]


def literal(word: str) -> str:
    """Return one of our own constants as an SQL literal (definitions take no parameters)."""
    if not word.isalpha():
        raise ValueError(word)
    return f"'{word}'"
