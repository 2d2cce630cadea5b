# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL beside its driver: dialect, schema, upkeep."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from pydedup.adapter import Capabilities
from pydedup.errors import (
    ConflictError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

from ._again import ReadsAgain
from ._dbapi import DbApiAdapter
from ._errors import ConnectionLostError
from ._postgres_functions import PostgresFunctions
from ._postgres_rows import PostgresRows
from ._postgres_url import Place
from ._schema import TABLES, Dialect, literal
from ._sessions import Session
from ._values import Row

__all__ = ["CAPABILITIES", "CREATING", "SHARDS", "PostgresBase", "dialect_of"]

CAPABILITIES: Final = Capabilities(
    # Larger values could be stored, but not dumped by pg_dump, which doubles them on their way.
    max_payload_bytes=256 << 20,
    max_parameters=65535,  # the protocol counts them in 16 bits
    concurrent_writers=True,
    shrinks=False,
)

#: The row of ``meta`` by which a store says that its payloads are in other databases.
SHARDS: Final = "shards"

#: Any number that others are unlikely to lock: who creates a schema holds it.
CREATING: Final = int.from_bytes(b"pydedup", "big")

#: So many new blocks, and a quarter of those that there were, are worth counting anew.
_MANY_BLOCKS: Final = 10_000


def dialect_of(schema: str) -> Dialect:
    """Return how PostgreSQL spells things, for a store in this schema."""
    text = 'TEXT COLLATE "C"'
    return Dialect(
        types=dict.fromkeys(("word", "name", "text"), text)
        | {"int": "BIGINT", "float": "DOUBLE PRECISION", "hash": "BYTEA", "blob": "BYTEA"},
        identity="BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
        list_tables=(
            "SELECT c.relname FROM pg_class c JOIN pg_namespace n "  # noqa: S608 - a plain word
            f"ON n.oid = c.relnamespace WHERE n.nspname = '{schema}' "
            "AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
        ),
        # Under READ COMMITTED the second of two that bump the epoch sees what the first made of
        # it; any stricter level would end in a serialization failure. Whether it may write is left
        # to the server, which may have become a standby.
        begin_write=("BEGIN ISOLATION LEVEL READ COMMITTED",),
        begin_snapshot=("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "SELECT 1"),
        lock_schema=(f"SELECT pg_advisory_xact_lock({CREATING})",),
        placeholder="%b",  # everything goes in binary
        arrays=True,  # texts with thousands of placeholders cost psycopg more than the query
        scans_lists=True,  # one that does not fit into work_mem, as of 262,144 pages into 4 MB
        qualifier=f'"{schema}".',
        prefix="",
        increment="CAST(CAST(value AS BIGINT) + 1 AS TEXT)",
        returning_id=True,
        join_text="string_agg({value}, ', ')",
        byte_length="octet_length({value})",
    )


class PostgresBase(ReadsAgain, PostgresRows, PostgresFunctions, DbApiAdapter):
    """A store in a schema of PostgreSQL, but for what needs the driver."""

    #: Set before the first connection is opened.
    _place: Place
    #: Whether payloads are in other databases, see ``postgres_shards``.
    _sharded = False
    #: Blocks that were inserted since the planner was told of any.
    _new_blocks = 0

    def _begin(self, session: Session, statements: Sequence[str]) -> None:
        try:
            super()._begin(session, statements)
        except ConnectionLostError:
            # Nothing has been done yet. A host that went down closes no connection, so that it
            # is noticed here.
            with session.use():
                session.connection.close()
                session.connection = self._connect()
            super()._begin(session, statements)

    # ---- schema -------------------------------------------------------------------------------

    def schema_version(self) -> int | None:
        """Return the version of the store's tables, or ``None`` when there are none.

        Raises NotAStoreError for a store with its payloads elsewhere, unless this adapter knows.
        """
        version = super().schema_version()
        if version is None or bool(self._query(self._sql.meta_value, [SHARDS])) == self._sharded:
            return version
        if self._sharded:
            raise NotAStoreError(
                f"{self._url} is a store without shards; open it with postgresql:// and no list of "
                "shards"
            )
        raise NotAStoreError(
            f"{self._url} has the coordinator of a store whose pages are in shards; open it with "
            "postgresql+shards:// and the list of its shards (docs/sharding.md)"
        )

    def missing(self) -> MissingStoreError:
        """Return the error that there is no store, and what to do about it."""
        what = f"{self._url} holds no store in schema {self._place.schema} (schema= names another)"
        return MissingStoreError(what, self._hindrance()[1])

    def _hindrance(self) -> tuple[bool, str]:
        """Return whether there is the schema, and why this user may create no store in it."""
        schema = self._place.schema
        ((there, allowed, role, database),) = self._query(
            "SELECT n.oid IS NOT NULL, CASE WHEN n.oid IS NULL "
            "THEN has_database_privilege(current_database(), 'CREATE') "
            "ELSE has_schema_privilege(n.oid, 'CREATE') END, current_user, current_database() "
            "FROM (SELECT CAST(%b AS text) AS name) w LEFT JOIN pg_namespace n "
            "ON n.nspname = w.name",
            [schema],
        )
        quoted = role.replace('"', '""')
        to_do = (
            f'GRANT CREATE, USAGE ON SCHEMA "{schema}" TO "{quoted}"'
            if there
            else f'CREATE SCHEMA "{schema}" AUTHORIZATION "{quoted}"'
        )
        return there, "" if allowed else (
            f"user {role} may not create one: connect as one who may, or let an administrator run, "
            f"in database {database}: {to_do}"
        )

    def _ensure_schema(self) -> None:
        """Create the schema of the store where it is missing."""
        schema = self._place.schema
        there, hindrance = self._hindrance()
        if hindrance:
            raise ReadOnlyError(f"{self._url} has no store in schema {schema}, and {hindrance}")
        if not there:
            self._write(f'CREATE SCHEMA "{schema}"')

    def _create_tables(self) -> None:
        self._ensure_schema()
        super()._create_tables()
        # Pages are compressed already where that helps: never try again, and read them in slices.
        for table, spec in TABLES.items():
            if "payload" in spec.names:
                name = self._sql.dialect.name(table)
                self._write(f"ALTER TABLE {name} ALTER COLUMN payload SET STORAGE EXTERNAL")

    # ---- upkeep -------------------------------------------------------------------------------

    def _of_tables(self, what: str, more: str = "") -> list[Row]:
        """Return something of each of our tables, as the catalog knows them."""
        names = ", ".join(f"'{table}'" for table in TABLES)
        return self._query(
            f"SELECT {what} FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace {more} "  # noqa: S608
            f"WHERE n.nspname = %b AND c.relkind = {literal('r')} AND c.relname IN ({names})",
            [self._place.schema],
        )

    def stored_bytes(self) -> int:
        """Return the size of the tables, with their indexes and what is stored apart."""
        return sum(int(row[0] or 0) for row in self._of_tables("pg_total_relation_size(c.oid)"))

    def checkpoint(self) -> None:
        """Tell the planner of many new blocks; the server sees to its log by itself.

        It counts them within some minutes. Until then it takes it that many have the same hash, and
        goes through all of them for a few hundred hashes.
        """
        if self._read_only or self._pool.scope() is not None or self._new_blocks < _MANY_BLOCKS:
            return
        new, self._new_blocks = self._new_blocks, 0
        with contextlib.suppress(StoreError):  # what this follows is done
            known: dict[str, float] = dict(self._of_tables("relname, reltuples"))
            if known.get("distinct_blocks", 0) < 4 * new:
                tables = map(self._sql.dialect.name, ("distinct_blocks", "pages"))
                self._query(f"ANALYZE (SKIP_LOCKED) {', '.join(tables)}")

    def compact(self) -> None:
        """Make the space of deleted rows free for new ones, and tell the planner what there is.

        The files do not shrink but at their ends: more would keep readers out meanwhile (VACUUM
        FULL does).
        """
        self._refuse_when_read_only()
        self._refuse_inside("compact()")
        # Pages first: where a disk is full, they give room for what the others want.
        tables = sorted(TABLES, key=lambda table: table != "pages")
        full: list[str] = []
        for table in map(self._sql.dialect.name, tables):
            try:
                self._query(f"VACUUM (ANALYZE) {table}")
            except StorageFullError:
                full.append(table)
        for table in full:  # what the planner is told can wait
            self._query(f"VACUUM {table}")

    def integrity_errors(self) -> list[str]:
        """Return what amcheck finds, and which indexes are not to be used and views missing."""
        check = self._query(
            "SELECT p.oid::regproc::text FROM pg_proc p JOIN pg_extension e "
            "ON e.extnamespace = p.pronamespace WHERE e.extname = 'amcheck' "
            "AND p.proname = 'bt_index_check' AND p.pronargs = 1 "
            "AND has_function_privilege(p.oid, 'EXECUTE')"
        )
        complaints: dict[Row, str] = {}
        for index in self._indexes():
            name, oid, valid, kind = index
            if not valid:
                complaints[index] = (
                    f'index {name} is not valid; run REINDEX SCHEMA "{self._place.schema}"'
                )
            elif (
                check
                and kind == "btree"  # of others, which a user may add, it knows nothing
                and (complaint := self._checked(str(check[0][0]), str(name), int(oid)))
            ):
                complaints[index] = complaint
        missing = self._missing_views()
        if not complaints:
            return missing
        # Who makes an index CONCURRENTLY has one that is not valid until it is complete; what that
        # takes the place of gets another name, is not valid any more, and goes.
        in_work = self._indexes_in_work()
        there = self._indexes()
        return [
            complaint
            for index, complaint in complaints.items()
            if index in there and (index[2] or index[1] not in in_work)
        ] + missing

    def hidden_rows(self) -> list[str]:
        """Return a sentence about the tables that row-level security is active of, if any are."""
        tables = self._of_tables("c.relname, row_security_active(c.oid)")
        names = ", ".join(str(name) for name, hides in sorted(tables) if hides)
        if not names:
            return []
        return [
            f"row-level security may hide rows of {names} from this user, so what seems to be "
            "missing may be there; let the owner of the tables verify them"
        ]

    def _indexes(self) -> list[Row]:
        """Return name, oid, whether it can be used, and kind of each index of our tables."""
        return self._of_tables(
            "x.relname, i.indexrelid, i.indisvalid AND i.indisready, a.amname",
            "JOIN pg_index i ON i.indrelid = c.oid JOIN pg_class x ON x.oid = i.indexrelid "
            "JOIN pg_am a ON a.oid = x.relam",
        )

    def _indexes_in_work(self) -> set[int]:
        """Return the oids of indexes that somebody makes, makes anew or drops CONCURRENTLY."""
        rows = self._query(
            "SELECT i.indexrelid FROM pg_index i JOIN pg_locks l ON l.relation = i.indexrelid "
            # Who makes the first of its name has locked the table alone, as others do, too.
            "OR (l.relation = i.indrelid "
            "AND l.pid IN (SELECT pid FROM pg_stat_progress_create_index)) "
            "WHERE l.mode = 'ShareUpdateExclusiveLock' AND l.database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return {oid for (oid,) in rows}

    def _checked(self, function: str, index: str, oid: int) -> str:
        """Return what is wrong with an index, an empty text if nothing is."""
        try:
            self._query(f"SELECT {function}(CAST(%b AS oid))", [oid])
        except (ConflictError, UnavailableError) as error:  # which says nothing of the index
            raise type(error)(f"index {index}: {error}") from error
        except StoreError as error:
            return f"index {index}: {error}"
        return ""
