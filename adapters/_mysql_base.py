# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (identifiers come from TABLES, VIEWS and a Dialect; values are always bound)
"""MySQL and MariaDB beside their driver: dialect, settings of a session, creation, upkeep."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NoReturn

from pydedup.errors import (
    ArgumentError,
    ConflictError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyError,
    StoreError,
    UnavailableError,
)

from ._again import ReadsAgain
from ._base import DbApiBase, fetch_all
from ._dbapi import PAYLOADS_PER_READ, DbApiAdapter
from ._errors import DeniedError
from ._mysql_cursors import TEXT_MARK
from ._mysql_errors import DefinedError, packet_advice
from ._mysql_rows import MysqlRows
from ._mysql_server import MOST_PAYLOAD_BYTES, may_create
from ._mysql_url import Place
from ._schema import TABLES, VIEWS, Dialect, create_statements
from ._sessions import WRITE, Session
from ._sql import batches
from ._values import text

__all__ = ["DIALECT", "MysqlBase"]

#: Names are compared byte by byte: collations take trailing spaces, or accents, for nothing.
DIALECT: Final = Dialect(
    types={
        "int": "BIGINT",
        "float": "DOUBLE",
        "word": "VARBINARY(16)",
        "name": "VARBINARY(1020)",  # 255 characters of UTF-8; two of them make a key of InnoDB
        "text": "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
        "hash": "BINARY(16)",
        "blob": "LONGBLOB",
    },
    identity="BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY",
    list_tables="SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()",
    # Sessions are READ COMMITTED: a writer that waited for the epoch sees what was committed.
    # Whether it may write is left to the server, which may have been set to read only.
    begin_write=("START TRANSACTION",),
    begin_snapshot=(
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
    ),
    quote="`",
    many_rows=True,
    table_options=(
        " ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    ),
    upsert="ON DUPLICATE KEY UPDATE {changes}",
    upsert_change="{column} = VALUES({column})",
    increment="CAST(CAST(value AS UNSIGNED) + 1 AS CHAR)",
    partial_indexes=False,
    page_length=True,
    byte_length="{value}_bytes",
    address="CONCAT({model}.name, '@', {model}.version)",
    join_text="GROUP_CONCAT({value} ORDER BY {value} SEPARATOR ', ')",
)

#: What who creates a store must be allowed.
CREATOR: Final = "CREATE, CREATE VIEW, DROP, INDEX, SELECT, INSERT, UPDATE, DELETE"

#: Whether InnoDB was started to read and no more, as from a disk that is read-only.
INNODB_READS: Final = "SELECT @@innodb_read_only"

#: How CHECK TABLE ends where it did not come to look; of what is damaged it says Corrupt.
_NOT_CHECKED: Final = ": Operation failed"

#: Names of locks have at most 64 characters. MySQL 9.6 and newer have no MD5.
CREATE_LOCK: Final = "CONCAT('pydedup:', LEFT(SHA2(DATABASE(), 256), 32))"


class MysqlBase(ReadsAgain, MysqlRows, DbApiAdapter):
    """A store in a database of MySQL or MariaDB, but for what needs the driver."""

    # Set before the first use.
    _place: Place
    _is_maria: bool

    def _dialect(self) -> Dialect:
        return replace(DIALECT, prefix=self._place.prefix)

    def _cannot_write(self, session: Session) -> bool:
        meta = self._dialect().name("meta")
        if self._run(session, INNODB_READS, (), fetch_all)[0][0]:
            return True
        try:
            self._run(session, f"SELECT 1 FROM {meta} LIMIT 0", (), fetch_all)
            # Only a user who may make a change can have it explained.
            self._run(session, f"EXPLAIN INSERT INTO {meta} SELECT * FROM {meta}", (), fetch_all)
        except ReadOnlyError:
            return True
        except StoreError:  # as where there is no store, of which readers learn elsewhere
            return False
        return False

    # ---- statements ---------------------------------------------------------------------------

    def insert_pages(self, pages: Sequence[tuple[bytes, bytes]], *, state: str) -> list[int]:
        """Insert (checksum, payload) and return their ids, in order.

        Payloads follow their rows: an update looks whether there is room to take itself back. An
        insertion does not, and where there is none MariaDB and MySQL end themselves.
        """
        payloads = [self._sized(payload, "a page") for _, payload in pages]
        ids = super().insert_pages([(checksum, b"") for checksum, _ in pages], state=state)
        table = self._sql.dialect.name("pages")
        sql = f"UPDATE {table} SET payload = ?, payload_bytes = ? WHERE id = ?"
        for page_id, payload in zip(ids, payloads, strict=True):
            self._write(sql, [payload, len(payload), page_id])
        return ids

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        for piece in batches(ids, PAYLOADS_PER_READ):
            sql = self._sql.read_pages(len(piece)).replace(DIALECT.placeholder, TEXT_MARK)
            yield from self._recorded("pages", sql, piece, ["id", "checksum", "payload"])

    def _connected(self) -> None:
        # A connection that was used lately is not asked whether it still stands. Once: whoever
        # calls this tries again.
        DbApiBase._ask(self, "SELECT 1", (), fetch_all)

    def _sized(self, payload: bytes, what: str) -> bytes:
        limit = self.capabilities.max_payload_bytes
        if limit < len(payload) <= MOST_PAYLOAD_BYTES:
            raise ArgumentError(
                f"{what} has {len(payload)} bytes, and {self._url} takes at most {limit} in one "
                f"value; {packet_advice()}"
            )
        return super()._sized(payload, what)

    # ---- schema -------------------------------------------------------------------------------

    def schema_version(self) -> int | None:
        """Return the version of the store's tables; ``None`` when there are none, or not all yet.

        A definition cannot be rolled back here; that a store is complete is said by ``meta``,
        which is filled at the end.
        """
        try:
            return super().schema_version()
        except NotAStoreError:  # or somebody who creates one was seen in the middle of it
            return None if self._unfinished() else super().schema_version()

    def _unfinished(self) -> list[str]:
        """Return the tables and views of a creation that did not get to its end.

        Dropped in this order, ``meta`` last, what is left at any moment is known again.
        """
        there = {text(name) for (name,) in self._query(self._sql.dialect.list_tables)}
        ours = [name for name in reversed((*TABLES, *VIEWS)) if self._bare(name) in there]
        tables = [name for name in ours if name in TABLES]
        if "meta" not in tables or any(map(self._has_rows, tables)):
            return []
        return ours if all(map(self._has_shape, tables)) else []

    def _has_rows(self, table: str) -> bool:
        return bool(self._query(f"SELECT 1 FROM {self._sql.dialect.name(table)} LIMIT 1"))

    def _bare(self, name: str) -> str:
        return self._sql.dialect.prefix + name

    def create_schema(self, meta: Mapping[str, str]) -> None:
        """Create tables and views and fill ``meta``; a no-op when they exist."""
        self._refuse_when_read_only()
        self._refuse_inside("create_schema()")
        with self._creating() as session:
            if self.schema_version() is not None:
                return
            for name in self._unfinished():
                kind = "TABLE" if name in TABLES else "VIEW"
                self._define(f"DROP {kind} {self._sql.dialect.name(name)}")
            try:
                for statement in create_statements(self._sql.dialect):
                    # Views would read with the rights of their creator, and break when he goes.
                    made = statement.replace("CREATE VIEW", "CREATE SQL SECURITY INVOKER VIEW")
                    self._define(made)
            except DeniedError as error:
                said = f"{self._url} holds no store; {self._grant(self._who())}"
                raise ReadOnlyError(said) from error
            with self._committed(session, self._sql.dialect.begin_write):
                self._fill_meta(meta)

    def migrate_schema(self) -> None:
        """Make older tables those of this pydedup, as every adapter does; but not at once.

        A definition commits by itself. So those of a migration that did not get to its end stay,
        which does no harm, and the next one finds them; rows change together with the version.
        """
        self._refuse_when_read_only()
        self._refuse_inside("migrate_schema()")
        with self._told_whose(), self._creating() as session:
            for version, step in self._steps():
                for statement in step.define(self._sql.dialect):
                    with contextlib.suppress(DefinedError):
                        self._define(statement)
                with self._committed(session, self._sql.dialect.begin_write):
                    self._finish(version, step)

    def _refuse_tables(self, table: str, *, is_store: bool = False) -> NoReturn:
        # Tables that a user may not read are not listed: they are asked for.
        with contextlib.suppress(NotAStoreError):
            self._has_shape(table)
        super()._refuse_tables(table, is_store=is_store)

    def missing(self) -> MissingStoreError:
        """Return the error that there is no store, and what to do about it."""
        rows = self._query("SHOW GRANTS")
        ((database,),) = self._query("SELECT DATABASE()")  # as the server spells it
        may = may_create([text(row[0]) for row in rows], text(database))
        if may:
            return MissingStoreError(f"{self._url} holds no store", "")
        who = self._who()
        if self._may_look():
            return MissingStoreError(f"{self._url} holds no store", self._grant(who))
        return MissingStoreError(
            f"{self._url} holds no store that this user may read",
            f"if there is one, let an administrator run GRANT SELECT {self._to(who)}; if not, "
            f"{self._grant(who)}",
        )

    def _may_look(self) -> bool:
        try:
            self._has_shape("meta")
        except DeniedError:
            return False
        except NotAStoreError:
            return True
        return True

    def _who(self) -> str:
        """Return what the server calls this user."""
        ((who,),) = self._query("SELECT CURRENT_USER()")
        return text(who)

    def _grant(self, who: str) -> str:
        """Say what an administrator must run for this user to create a store."""
        return (
            f"user {who} may not create one: connect as one who may, or let an administrator "
            f"run GRANT {CREATOR} {self._to(who)}"
        )

    def _to(self, who: str) -> str:
        """Return where and to whom something is to be granted."""
        name, _, host = who.replace("'", "''").rpartition("@")
        return f"ON `{self._place.database.replace('`', '``')}`.* TO '{name}'@'{host}'"

    @contextlib.contextmanager
    def _creating(self) -> Iterator[Session]:
        """Hold the lock of who creates or migrates, in a session that writes.

        Where its connection is lost, so is the lock, and nothing is done on another connection:
        that would drop what somebody else has made by then.
        """
        self._again(self._connected)
        seconds = math.ceil(self._place.timeout)
        with self._pool.enter(WRITE) as session:
            try:
                ((got,),) = self._query(f"SELECT GET_LOCK({CREATE_LOCK}, {seconds})")
                if got != 1:
                    raise ConflictError(
                        f"{self._url}: somebody else has been creating or migrating a store there "
                        f"for {seconds} seconds; try again"
                    )
                yield session
            finally:
                self._end(session, f"SELECT RELEASE_LOCK({CREATE_LOCK})")

    def _define(self, statement: str) -> None:
        with self._pool.acquire() as session:
            self._run(session, statement, (), lambda cursor: None)

    # ---- upkeep -------------------------------------------------------------------------------

    def stored_bytes(self) -> int:
        """Return the size of the tables' files; to who may not see that, what it is at least.

        Files are shown to who has the privilege PROCESS. InnoDB's statistics, which others see, are
        those of some time ago: renewed in the background when a tenth of a table has changed, and
        by ANALYZE TABLE, which wants INSERT. Files never shrink by themselves, so they are not
        smaller than that, nor than the payloads of the pages there are.
        """
        exact = self._file_bytes()
        if exact is not None:
            return exact
        names = [self._bare(table) for table in TABLES]
        rows = self._query(
            "SELECT table_name, data_length + index_length FROM information_schema.tables "
            f"WHERE table_schema = DATABASE() AND table_name {self._sql.members(len(names))}",
            names,
        )
        sizes = {text(name): int(size or 0) for name, size in rows}
        pages = self._bare("pages")
        if pages in sizes:
            sql = f"SELECT SUM(payload_bytes) FROM {self._sql.dialect.name('pages')}"
            ((payloads,),) = self._query(sql)
            sizes[pages] = max(sizes[pages], int(payloads or 0))
        return sum(sizes.values())

    def size_is_exact(self) -> bool:
        """Whether this user may see files; else the store occupies at least `stored_bytes`."""
        return self._file_bytes() is not None

    def _file_bytes(self) -> int | None:
        """Return the size of the tables' files; None to who may not see it."""
        if self._query(INNODB_READS)[0][0]:
            return None  # MariaDB 11.8 ends with a fault when it is asked for it then
        database = self._place.database
        if self._is_maria:  # which calls files of `a-b` a@002db
            sql = "SELECT CAST(CONVERT(DATABASE() USING filename) AS BINARY)"
            database = text(self._query(sql)[0][0])
        spaces = [f"{database}/{self._bare(table)}" for table in TABLES]
        files = "innodb_sys_tablespaces" if self._is_maria else "innodb_tablespaces"
        with contextlib.suppress(DeniedError):
            marks = self._sql.members(len(spaces))
            sql = f"SELECT SUM(file_size) FROM information_schema.{files} WHERE name {marks}"
            ((size,),) = self._query(sql, spaces)
            return None if size is None else int(size)
        return None

    def checkpoint(self) -> None:
        """Do nothing: the server sees to its log itself."""

    def compact(self) -> None:
        """Do nothing but what every change does: InnoDB uses the space of deleted rows again.

        A rebuilt table (``OPTIMIZE TABLE pydedup_pages``) would be smaller, but snapshots that
        are being read would fail.
        """
        self._refuse_when_read_only()
        self._refuse_inside("compact()")

    def integrity_errors(self) -> list[str]:
        """Return what CHECK TABLE finds wrong, and which views are missing.

        Where InnoDB only reads, tables are not checked. There it counts rows that are deleted and
        not yet purged, takes the index for corrupt, and MariaDB refuses to read that, to everybody,
        until it is started again.
        """
        if self._query(INNODB_READS)[0][0]:
            return self._missing_views()
        found, readable = self._checked(TABLES), set()
        # A lock that was waited for in vain is told like damage, in words; here it is an error.
        for table in found:
            try:
                self._query(f"SELECT 1 FROM {self._sql.dialect.name(table)} LIMIT 0")
            except (ConflictError, UnavailableError):
                raise
            except StoreError:
                continue
            readable.add(table)
        again = self._checked(list(found)) if found else {}
        for table, complaints in again.items():
            if table in readable and complaints[-1].endswith(_NOT_CHECKED):
                raise ConflictError(
                    f"{self._url}: {complaints[0]}; it could not be checked, as while a backup of "
                    "the server is made (LOCK INSTANCE FOR BACKUP); try again when that is over"
                )
        complaints = [complaint for complaints in again.values() for complaint in complaints]
        return complaints + self._missing_views()

    def _checked(self, tables: Iterable[str]) -> dict[str, list[str]]:
        """Return what CHECK TABLE says of those of the tables that are not as they should be."""
        names = {self._bare(table): table for table in tables}
        check = f"CHECK TABLE {', '.join(map(self._sql.dialect.name, names.values()))}"
        if self._pool.scope() is None:
            rows = self._query(check)
        else:  # a transaction would be ended by it
            session = Session(self._connect(), self._url)
            try:
                rows = self._run(session, check, (), fetch_all)
            finally:
                session.close()
        found: dict[str, list[str]] = {}
        for table, _, kind, said in rows:
            is_wrong = text(kind).lower() in ("error", "warning")
            if is_wrong or (text(kind).lower() == "status" and text(said) != "OK"):
                name = text(table).rpartition(".")[2]
                found.setdefault(names[name], []).append(f"{text(table)}: {text(said)}")
        return found
