# SPDX-License-Identifier: Apache-2.0
"""One shard: a database of PostgreSQL with payloads of pages by id, which says whose shard it is.

Payloads are written once, in a transaction that ends before the coordinator's, and never changed,
but for damaged ones that are written again as they were. Which of them belong to a page is the
coordinator's knowledge.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from pydedup.errors import (
    ArgumentError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    StorageFullError,
    StoreError,
    UnavailableError,
)

from ._base import DbApiBase
from ._errors import ConnectionLostError, KeyTakenError
from ._migrations import SchemaCalls
from ._postgres_base import CAPABILITIES, CREATING, SHARDS
from ._postgres_errors import MissingDatabaseError
from ._postgres_statement import copy_statement, is_stale
from ._postgres_url import Place
from ._sessions import WRITE, Connection, Session, SessionPool
from ._shards_url import Ring, shard_of_name
from .postgres import PostgresAdapter

__all__ = ["Shard"]

R = TypeVar("R")

#: Whoever makes a shard holds this; the coordinator, which may be the same database, has its own.
CLAIMING: Final = CREATING + 1
#: Of two copies the one on a shard that failed is asked for first again after half the time that it
#: is down, at most so long.
LONGEST_PAUSE_SECONDS: Final = 5.0
FIRST_PAUSE_SECONDS: Final = 0.05
#: A shard that let a connection wait, as a host without power does, is left alone for so many times
#: as long. One that refuses does so at once, and is asked whenever there is no other.
LEFT_ALONE: Final = 3.0
_EMPTY_ONE: Final = "what takes the place of a lost shard must be empty: name another database"


class Shard(PostgresAdapter):
    """Connections to one shard; of the whole protocol only what moves payloads is of use.

    Attributes
    ----------
    id, name
        Its id in the ring, and what its database calls itself; empty until the store was matched
        with the list.
    """

    def __init__(self, place: Place, mode: str) -> None:
        self._place, self._reads_only = place, mode == "r"
        self.id = self.name = ""
        self._ring = ""
        self._state = threading.Lock()
        self._down_since: float | None = None
        self._ask_at = self._leave_until = 0.0
        self._said = ""
        # Not PostgresAdapter's, which connects: a shard may be down when its store is opened.
        DbApiBase.__init__(
            self,
            place.shown,
            dialect=self._dialect(),
            read_only=self._reads_only,
            capabilities=CAPABILITIES,
            pool=SessionPool(self._connect, name=place.shown, is_stale=is_stale),
        )
        self._payloads = f'"{place.schema}".page_payloads'
        self._identity = f'"{place.schema}".shard_identity'

    # ---- whether it answers -------------------------------------------------------------------

    @property
    def shown(self) -> str:
        """Where it is, for people."""
        return self._place.shown

    def down_seconds(self) -> float | None:
        """Return for how long it has been down, ``None`` when it answered last."""
        with self._state:
            return None if self._down_since is None else time.monotonic() - self._down_since

    def may_be_asked(self) -> bool:
        """Whether it answered last, or has been left alone for long enough."""
        with self._state:
            return self._down_since is None or time.monotonic() >= self._ask_at

    def failed(self) -> None:
        """Note that it did not answer."""
        with self._state:
            now = time.monotonic()
            if self._down_since is None:
                self._down_since = now
            pause = (now - self._down_since) / 2
            self._ask_at = now + min(max(pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)

    def answered(self) -> None:
        """Note that it did."""
        if self._down_since is not None:
            with self._state:
                self._down_since, self._leave_until = None, 0.0

    def connected(self) -> None:
        """Open this thread's connection where there is none.

        Raises what its opening does, and the same at once while the shard is left alone.
        """
        began = time.monotonic()
        if began < self._leave_until:
            raise ConnectionLostError(self._said)
        try:
            self._connected()
        except ConnectionLostError as error:
            with self._state:
                now = time.monotonic()
                self._said, self._leave_until = str(error), now + LEFT_ALONE * (now - began)
            raise

    def _again(self, read: Callable[[], R]) -> R:
        # Whoever reads asks another shard, or waits for this one together with all others.
        try:
            return read()
        except ConnectionLostError:
            if self.down_seconds() is not None or self._pool.scope() is not None:
                raise
            return read()

    # ---- whose it is --------------------------------------------------------------------------

    def identity(self) -> tuple[str, str, bool] | None:
        """Return the ring, its name, and whether it has joined; ``None`` of what is no shard."""
        with contextlib.closing(self._connect()) as connection:
            return self._identity_on(connection)

    def _identity_on(self, connection: Connection) -> tuple[str, str, bool] | None:
        try:
            cursor = connection.cursor()
            cursor.execute("SELECT to_regclass(%b) IS NULL", [self._identity])
            if cursor.fetchone()[0]:
                return None
            cursor.execute(f"SELECT ring, id, joined FROM {self._identity}")  # noqa: S608
            row = cursor.fetchone()
            if row is not None and None in row:
                raise CorruptStoreError(
                    f"{self.shown} is damaged: NULL is in the row of {self._identity}, which says "
                    "whose shard it is; restore a backup of it, or replace it (docs/sharding.md)"
                )
            return None if row is None else (row[0], row[1], row[2])
        except self.driver_error as error:
            raise self._translate(error) from error

    def expect(self, ring: str, shard_id: str, name: str) -> None:
        """Insist from now on that each new connection leads to this database of this ring."""
        self._ring, self.id, self.name = ring, shard_id, name

    def _connect(self) -> Connection:
        try:
            return super()._connect()
        except MissingDatabaseError as error:
            if not self.id:
                raise
            raise MissingDatabaseError(
                f"{self.shown} is gone, where the pages of shard {self.id[:8]} were: its server "
                "has no such database. Bring it back, or write a new, empty database in its place "
                "in the list and run `pydedup refill --replace` with it (docs/sharding.md)"
            ) from error

    def _configure(self, connection: Any) -> None:
        super()._configure(connection)
        # What the coordinator then publishes must have reached this disk.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') = 'off'"
        )
        if self.id:
            found = self._identity_on(connection)
            if found is None:
                raise NotAStoreError(
                    f"{self.shown} holds no pages any more, where those of shard {self.id[:8]} "
                    "were; was it dropped? Bring it back, or replace it (docs/sharding.md)"
                )
            if found[:2] != (self._ring, self.name):
                what = f"shard {found[1][:8]} of {found[0][:8]}"
                if shard_of_name(found[1]) == self.id:
                    what = "another database of that shard, from before or after it was replaced"
                raise ArgumentError(
                    f"{self.shown} is {what}, where shard {self.id[:8]} of {self._ring[:8]} was "
                    "expected; was a database exchanged? Open the store with its own shards"
                )

    def _make_tables(self) -> None:
        """Create what a shard has, in a transaction of the caller that others wait for."""
        self._write("SELECT pg_advisory_xact_lock(%b)", [CLAIMING])
        self._ensure_schema()
        self._write(
            f"CREATE TABLE IF NOT EXISTS {self._identity} "
            "(ring TEXT NOT NULL, id TEXT NOT NULL, joined BOOLEAN NOT NULL)"
        )
        # It has no key, without which nothing of it could be changed where all is published.
        self._write(f"ALTER TABLE {self._identity} REPLICA IDENTITY FULL")
        self._write(
            f"CREATE TABLE IF NOT EXISTS {self._payloads} "
            "(id BIGINT PRIMARY KEY, payload BYTEA NOT NULL)"
        )
        self._write(f"ALTER TABLE {self._payloads} ALTER COLUMN payload SET STORAGE EXTERNAL")

    def _name_itself(self, ring: str, name: str, *, joined: bool) -> None:
        self._write(f"INSERT INTO {self._identity} VALUES (%b, %b, %b)", [ring, name, joined])  # noqa: S608

    def claim(self, ring: str, shard_id: str) -> None:
        """Make an empty database, or what a creation that failed left, a shard of a new store."""
        with self.transaction():
            self._make_tables()
            ((again, taken),) = self._query(
                f"SELECT EXISTS (SELECT 1 FROM {self._identity} WHERE ring = %b), "  # noqa: S608
                f"EXISTS (SELECT 1 FROM {self._identity} WHERE joined) "
                f"OR EXISTS (SELECT 1 FROM {self._payloads})",
                [ring],
            )
            if again:
                raise ArgumentError(
                    f"{self.shown} is listed twice as a shard, in other words; list each once"
                )
            if taken:
                raise ArgumentError(
                    f"{self.shown} is a shard of another store; give this one an empty database, "
                    "or another schema= of it"
                )
            self._write(f"DELETE FROM {self._identity}")  # noqa: S608
            self._name_itself(ring, shard_id, joined=False)

    def take_place(self, ring: str, name: str) -> None:
        """Make an empty database the one of a shard that is lost, under a name of its own.

        Raises ArgumentError, or NotAStoreError, where anything of a store is there already, but for
        the tables of the ring's own coordinator.
        """
        if self._is_of_another_store(ring):
            raise ArgumentError(f"{self.shown} holds another store; {_EMPTY_ONE}")
        with self.transaction():
            self._make_tables()
            ((taken,),) = self._query(
                f"SELECT EXISTS (SELECT 1 FROM {self._identity}) "  # noqa: S608
                f"OR EXISTS (SELECT 1 FROM {self._payloads})"
            )
            if taken:
                raise ArgumentError(f"{self.shown} holds pages already; {_EMPTY_ONE}")
            self._name_itself(ring, name, joined=True)

    def _is_of_another_store(self, ring: str) -> bool:
        """Whether the schema has the tables of a store whose coordinator is not this ring's."""
        if SchemaCalls.schema_version(self) is None:
            return False
        of_shards = self._query(self._sql.meta_value, [SHARDS])
        return not of_shards or Ring.from_json(of_shards[0][0], self.shown).id != ring

    def join(self) -> None:
        """Note that the store exists which this was claimed for."""
        with self.transaction():
            self._write(f"UPDATE {self._identity} SET joined = true WHERE NOT joined")  # noqa: S608

    # ---- payloads -----------------------------------------------------------------------------

    def begin(self) -> Session:
        """Begin a transaction of this thread; whoever called ends it, and clears its scope."""
        super()._again(self._connected)
        with self._pool.acquire() as session:
            session.check_free(WRITE)
            session.scope = WRITE
        try:
            self._begin(session, self._sql.dialect.begin_write)
        except BaseException:
            self.roll_back(session)
            raise
        return session

    def roll_back(self, session: Session) -> None:
        """Undo what this thread wrote; whatever the connection is like afterwards."""
        try:
            self._roll_back(session)
        finally:
            session.scope = None

    @contextlib.contextmanager
    def copying(self, session: Session) -> Iterator[Any]:
        """Give a COPY that takes rows of (id, payload), see :meth:`write`."""
        sql = f"COPY {self._payloads} (id, payload) FROM STDIN (FORMAT BINARY)"
        try:
            with session.use(), session.connection.cursor() as cursor, cursor.copy(sql) as copy:
                copy.set_types(["int8", "bytea"])
                yield copy
        except self.driver_error as error:
            raise self._refused(error) from error

    def write(self, copy: Any, page_id: int, payload: bytes) -> None:
        """Write one row; an error says that it is this shard's."""
        try:
            copy.write_row((page_id, payload))
        except self.driver_error as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> PydedupError:
        """Return what an error means that payloads of new pages met."""
        meant = self._translate(error)
        if isinstance(meant, KeyTakenError):
            return StoreError(
                f"{self.shown} has pages that the coordinator knows nothing of, as when an older "
                "state of it was restored; run `pydedup vacuum`, which deletes them, and try again"
            )
        return meant

    def read_statement(self, ids: Sequence[int]) -> bytes:
        """Return the COPY of some payloads."""
        return copy_statement(self._payloads, "id, payload", ids)

    def open_session(self) -> Session | None:
        """Return this thread's session, locked, if its connection is open."""
        return self._pool.acquire_open()

    def error_of(self, error: Exception) -> PydedupError:
        """Return what an error of the driver means."""
        return self._translate(error)

    def payload_ids(self, after: int, limit: int) -> list[tuple[int, int]]:
        """Return (id, bytes) of payloads by ascending id, only those with id > ``after``."""
        rows = self._query(
            f"SELECT id, octet_length(payload) FROM {self._payloads} WHERE id > %b "  # noqa: S608
            "ORDER BY id LIMIT %b",
            [after, limit],
        )
        return [(number, length) for number, length in rows]

    def present_payloads(self, ids: Sequence[int]) -> set[int]:
        """Return those of the ids of which there is a payload."""
        rows = self._query(
            f"SELECT id FROM {self._payloads} WHERE id = ANY(%b)",  # noqa: S608
            [list(ids)],
        )
        return {number for (number,) in rows}

    def put_payloads(self, payloads: Mapping[int, bytes]) -> None:
        """Write payloads, in a transaction of their own, over what there is of them."""
        with self.transaction():
            # In the order of their ids: who puts the same ones waits, and never for one another.
            self._write_many(
                f"INSERT INTO {self._payloads} VALUES (%b, %b) "  # noqa: S608
                "ON CONFLICT (id) DO UPDATE SET payload = EXCLUDED.payload",
                sorted(payloads.items()),
            )

    def delete_payloads(self, ids: Sequence[int]) -> None:
        """Delete payloads, in a transaction of their own."""
        with self.transaction():
            self._write(f"DELETE FROM {self._payloads} WHERE id = ANY(%b)", [list(ids)])  # noqa: S608

    def stored_bytes(self) -> int:
        """Return the size of the table of payloads, with its index and what is stored apart."""
        ((size,),) = self._query(
            "SELECT pg_total_relation_size(CAST(%b AS regclass))", [self._payloads]
        )
        return int(size)

    def compact(self) -> None:
        """Make the space of deleted payloads free for new ones."""
        try:
            self._query(f"VACUUM (ANALYZE) {self._payloads}")
        except StorageFullError:  # what the planner is told can wait
            self._query(f"VACUUM {self._payloads}")

    def lost(self, error: PydedupError) -> bool:
        """Note what an error says of the shard; whether another copy may help."""
        if isinstance(error, UnavailableError | NotAStoreError):
            self.failed()
            return True
        return isinstance(error, CorruptStoreError)
