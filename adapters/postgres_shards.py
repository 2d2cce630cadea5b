# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL, with the payloads of pages in several databases: ``postgresql+shards://``.

One database, the coordinator, has all tables; in its ``pages`` the payloads are empty. They are in
the shards, each on one or two of them (``_shards_url.places_of``), written there durably before the
coordinator's transaction commits. So a page that anybody sees has its payload, and what a killed
writer leaves are payloads without a page, which ``compact`` collects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.errors import (
    NotAStoreError,
    PydedupError,
    ReadOnlyError,
    SchemaVersionError,
    StoreError,
)

from ._connection import closed_on_error
from ._errors import ConnectionLostError
from ._postgres_base import SHARDS
from ._postgres_statement import Statement, run_together
from ._schema import Dialect
from ._sessions import Session
from ._shard import Shard
from ._shards_reading import Begun
from ._shards_refill import ShardedCopies
from ._shards_url import Ring, ShardPlaces, locate_shards
from .postgres import PostgresAdapter, known_options

__all__ = ["ShardedAdapter", "connect", "replace_lost"]

_NOT_IN_THE_SERVER: Final = (
    "functions in the server read the pages of its own database, and those of this store are in "
    "shards; predict from outside, or copy the models into a store without shards"
)


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open ``postgresql+shards://coordinator|shard|shard...``, see docs/sharding.md.

    Raises
    ------
    ArgumentError
        For a URL that cannot be read, or a list of shards that is not the store's.
    MissingStoreError
        With mode ``"r"``, when there are no tables.
    UnavailableError
        When the coordinator cannot be reached, or a shard refuses; one may be down.
    """
    adapter = ShardedAdapter(locate_shards(url, schema, known_options()), mode)
    with closed_on_error(adapter):
        if adapter.schema_version() is not None:
            adapter.match_shards()
        elif mode == "r":
            raise adapter.missing()
    return adapter


def replace_lost(url: str, *, schema: str | None = None) -> tuple[str, str] | None:
    """Let the one empty database of a list take the place of the shard that is lost.

    Returns and raises what :meth:`ShardedAdapter.replace_lost` does, and MissingStoreError, and
    SchemaVersionError for a store of a newer pydedup.
    """
    adapter = ShardedAdapter(locate_shards(url, schema, known_options()), "a")
    try:
        version = adapter.schema_version()
        if version is None:
            raise adapter.missing()
        if version > SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{adapter.url} was written by a newer pydedup (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade pydedup"
            )
        return adapter.replace_lost()
    finally:
        adapter.close()


class ShardedAdapter(ShardedCopies, PostgresAdapter):
    """A store whose payloads are in several databases."""

    _sharded = True

    def __init__(self, places: ShardPlaces, mode: str) -> None:
        self._replicas_asked = places.replicas
        self._shards = [Shard(place, mode) for place in places.shards]
        self._mine = Begun()
        try:
            super().__init__(places.coordinator, mode, places.shown)
        except BaseException:
            self._close_shards()
            raise

    def _dialect(self) -> Dialect:
        # Lengths are asked for often, and must not be asked of the shards.
        return dataclasses.replace(
            super()._dialect(), page_length=True, byte_length="{value}_bytes"
        )

    def close(self) -> None:
        """Close all connections of this process. Idempotent."""
        super().close()
        self._close_shards()

    def _close_shards(self) -> None:
        for shard in self._shards:
            shard.close()

    # ---- creating -----------------------------------------------------------------------------

    def _create_tables(self) -> None:
        replicas = self._replicas_asked or 1
        ids = {uuid.uuid4().hex: shard for shard in self._shards}
        ring = Ring(uuid.uuid4().hex, replicas, {key: one.shown for key, one in ids.items()})
        for shard_id, shard in ids.items():
            # Before anything is done here: a shard may be in the same schema as the coordinator.
            shard.claim(ring.id, shard_id)
        super()._create_tables()
        self.set_meta(SHARDS, ring.as_json())

    def create_schema(self, meta: Mapping[str, str]) -> None:
        """Create tables and views on the coordinator and the table of payloads on each shard."""
        super().create_schema(meta)
        self.match_shards()

    # ---- writing ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write transaction, as in :class:`DbApiBase`; shards commit before the coordinator."""
        with super().transaction():
            touched: dict[str, Session] = {}
            self._mine.touched = touched
            try:
                yield
                self._commit_shards(touched)
            except BaseException:
                for shard_id, session in touched.items():
                    self._by_id[shard_id].roll_back(session)
                raise
            finally:
                self._mine.touched = None
                for session in touched.values():
                    session.scope = None

    def _commit_shards(self, touched: Mapping[str, Session]) -> None:
        with contextlib.ExitStack() as held:
            commits = {}
            for shard_id, session in touched.items():
                held.enter_context(session.use())
                commits[shard_id] = Statement(session, b"COMMIT")
                held.callback(commits[shard_id].close)
            for statement in commits.values():
                statement.send()
            run_together(commits.values())
        for shard_id, statement in commits.items():
            shard = self._by_id[shard_id]
            if statement.error is not None:
                raise shard.error_of(statement.error) from statement.error
            if statement.tag != b"COMMIT":
                raise StoreError(
                    f"{shard.shown} did not keep what was written; nothing was changed"
                )

    def insert_pages(
        self, pages: Sequence[tuple[bytes, bytes]], *, state: str, ids: Sequence[int] | None = None
    ) -> list[int]:
        """Insert (checksum, payload), with these ids if there are any, and return the ids."""
        sized = self._checked_pages(pages, state)
        with self._writer():  # raises outside of a transaction; not held while shards connect
            self._query("SELECT pg_advisory_xact_lock_shared(%b)", [self._users_lock])
            self._keep_list()
            numbers = self.new_page_ids(len(sized)) if ids is None else list(ids)
        self._write_payloads({i: payload for i, (_, payload) in zip(numbers, sized, strict=True)})
        rows = [
            (i, state, checksum, b"", len(payload))
            for i, (checksum, payload) in zip(numbers, sized, strict=True)
        ]
        columns = ("id", "state", "checksum", "payload", "payload_bytes")
        with self._writer() as session:
            self._copy_in(session, "pages", columns, rows)
        return numbers

    def _write_payloads(self, payloads: Mapping[int, bytes]) -> None:
        """Write payloads to all of their shards at once, in this thread's transactions there."""
        wanted = {page_id: self._places(page_id) for page_id in payloads}
        touched = self._mine.touched
        assert touched is not None
        shard_ids = sorted({shard_id for places in wanted.values() for shard_id in places})
        for shard_id in shard_ids:
            if shard_id not in touched:
                touched[shard_id] = self._begin_on(self._by_id[shard_id])
        with contextlib.ExitStack() as copies:
            copy = {
                shard_id: copies.enter_context(self._by_id[shard_id].copying(touched[shard_id]))
                for shard_id in shard_ids
            }
            for page_id, payload in payloads.items():
                for shard_id in wanted[page_id]:
                    self._by_id[shard_id].write(copy[shard_id], page_id, payload)

    def _begin_on(self, shard: Shard) -> Session:
        try:
            session = shard.begin()
        except StoreError as error:
            shard.lost(error)
            raise
        shard.answered()
        return session

    # ---- what there is of functions in the server -----------------------------------------------

    def function_statements(self, python_path: str | None) -> list[str]:
        """Raise StoreError: see its words."""
        raise StoreError(f"{self._url}: {_NOT_IN_THE_SERVER}")

    def install_functions(self, python_path: str | None) -> str:
        """Raise StoreError: see its words."""
        raise StoreError(f"{self._url}: {_NOT_IN_THE_SERVER}")

    # ---- upkeep -------------------------------------------------------------------------------

    def stored_bytes(self) -> int:
        """Return the size of all tables; of shards that are down, the least that they can have."""
        known = super().stored_bytes()
        for shard in self._shards:
            with self._unless_lost(shard):
                known += shard.stored_bytes()
        if self.size_is_exact():
            return known
        pages = self._sql.dialect.name("pages")
        ((payloads,),) = self._query(f"SELECT COALESCE(SUM(payload_bytes), 0) FROM {pages}")  # noqa: S608
        return max(known, int(payloads))

    def size_is_exact(self) -> bool:
        """Whether all shards can be asked."""
        return all(shard.down_seconds() is None for shard in self._shards)

    def compact(self) -> None:
        """Delete payloads that no page is of, and make their space free for new ones.

        Shards that are down or take no changes keep them until the next time, and so do all when
        somebody is in a snapshot or inserts pages meanwhile, for longer than a second.
        """
        super().compact()
        dead: dict[Shard, list[int]] = {}
        for shard in self._shards:
            with self._unless_lost(shard):
                dead[shard] = self._without_pages(shard)
        if any(dead.values()) and not self._alone():
            dead = {}
        failed: list[StoreError] = []
        for shard, ids in dead.items():
            try:
                with contextlib.suppress(ReadOnlyError), self._unless_lost(shard):
                    self._delete_payloads(shard, ids)
                    shard.compact()
            except StoreError as error:  # the others are collected all the same
                failed.append(error)
        if failed:
            raise failed[0]

    def integrity_errors(self) -> list[str]:
        """Return complaints of the coordinator, and which copies are not where they belong.

        Of a shard that is merely down, nothing is known, see `unreachable_places`.
        """
        complaints = super().integrity_errors()
        try:
            self._listed_ring()
        except NotAStoreError as error:  # which lets nobody open the store again
            complaints.append(str(error))
        for shard in self._shards:
            try:
                complaints += self._wrong_on(shard)
            except ConnectionLostError:
                continue
            except PydedupError as error:
                complaints.append(f"the pages of a shard were not checked: {error}")
        return complaints

    def unreachable_places(self) -> list[str]:
        """Return what there is to say of each shard that does not answer now."""
        found: list[str] = []
        for shard in self._shards:
            try:
                shard.payload_ids(0, 1)
            except ConnectionLostError as error:
                found.append(f"shard {shard.id[:8]}: {error}")
            except PydedupError:  # which is no silence, and told where it matters
                continue
        return found
