# SPDX-License-Identifier: Apache-2.0
"""How a sharded store reads: from all servers at once, and from a copy where one is down.

Also what is said of pages that cannot be had, and which payloads nobody needs any more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Final

from pydedup.errors import PydedupError, StoreError, UnavailableError, without_frames

from . import _again
from ._dbapi import PAYLOADS_PER_READ
from ._errors import ConnectionLostError
from ._postgres_copy import PostgresCopy
from ._postgres_statement import Statement, run_together
from ._sessions import READ, Session
from ._shard import Shard
from ._shards_url import Ring, places_of

__all__ = ["Begun", "ShardedReads"]

#: More servers than these get fewer pages each at once, so that memory stays bounded.
SHARDS_PER_READ: Final = 3
#: Rows per statement where all payloads of a shard are looked at.
IDS_AT_ONCE: Final = 50_000
DELETED_AT_ONCE: Final = 256
#: How long `compact` waits for snapshots and writers to end.
WAIT_SECONDS: Final = 1.0
_SHOWN: Final = 10


class Begun(threading.local):
    """What a thread has begun: its transactions on shards, ``None`` outside of one of its own."""

    touched: dict[str, Session] | None = None


class ShardedReads(PostgresCopy):
    """The part of a sharded adapter that reads payloads."""

    _shards: list[Shard]
    _by_id: dict[str, Shard]
    _ring: Ring
    _mine: Begun

    def _places(self, page_id: int) -> list[str]:
        return places_of(page_id, tuple(self._by_id), self._ring.replicas)

    # ---- who may still need a payload -----------------------------------------------------------

    @property
    def _users_lock(self) -> int:
        """The advisory lock that snapshots and writers of pages share."""
        digest = blake2b(self._ring.id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read transaction, as in :class:`DbApiBase`; while it lasts, no payload is deleted.

        The lock is the session's, and taken before the snapshot: within it, the statement that took
        it would see a state older than the lock. Where the connection is lost before the snapshot
        has begun, so is the lock: both are begun again.
        """
        if self._pool.scope() is not None or not hasattr(self, "_ring"):
            with super().snapshot():
                yield
            return
        lock = f"SELECT pg_advisory_lock_shared({self._users_lock})"
        self._again(self._connected)
        with self._pool.enter(READ) as session:
            try:
                with self._committed(session, (lock, *self._sql.dialect.begin_snapshot)):
                    yield
            finally:
                self._end(session, f"SELECT pg_advisory_unlock_shared({self._users_lock})")

    # ---- reading ------------------------------------------------------------------------------

    def _read_payloads(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        size = PAYLOADS_PER_READ * min(len(self._shards), SHARDS_PER_READ)
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            yield from self._again(lambda piece=piece: self._read_piece(piece))  # type: ignore[misc]

    def _read_piece(self, ids: Sequence[int]) -> list[tuple[int, bytes, bytes]]:
        """Return those of the pages that exist; where a copy cannot be had, the other."""
        untried = {page_id: self._in_turn(self._places(page_id)) for page_id in ids}
        exist: dict[int, bytes] | None = None  # with their checksums
        found: list[tuple[int, bytes, bytes]] = []
        problems: dict[str, PydedupError] = {}
        while untried:
            groups: dict[str, list[int]] = {}
            for page_id, places in untried.items():
                groups.setdefault(places.pop(0), []).append(page_id)
            with self._asked(groups, problems) as statements:
                if exist is None:
                    exist = {row.id: row.checksum for row in self.page_rows(ids=ids)}
            rows: dict[int, bytes] = {}
            for statement in statements.values():
                rows.update(statement.rows)
            found += [
                (page_id, exist[page_id], rows[page_id]) for page_id in rows if page_id in exist
            ]
            untried = {
                page_id: places
                for page_id, places in untried.items()
                if page_id in exist and page_id not in rows and places
            }
        missing = set(exist or ()).difference(page_id for page_id, _, _ in found)
        self._raise_for(missing, problems)
        return found

    def _in_turn(self, places: list[str]) -> list[str]:
        """Return the places of a page with those that are down last."""
        return sorted(places, key=lambda shard_id: not self._by_id[shard_id].may_be_asked())

    @contextlib.contextmanager
    def _asked(
        self, groups: Mapping[str, Sequence[int]], problems: dict[str, PydedupError]
    ) -> Iterator[dict[str, Statement]]:
        """Ask shards for pages, let the caller do something, and wait until they have answered."""
        with contextlib.ExitStack() as held:
            sessions = self._locked(groups, problems)
            for session in sessions.values():
                held.enter_context(session)
            statements = {}
            for shard_id, session in sessions.items():
                sql = self._by_id[shard_id].read_statement(groups[shard_id])
                statements[shard_id] = Statement(session, sql)
                held.callback(statements[shard_id].close)
                statements[shard_id].send()
            yield statements
            run_together(statements.values())
        for shard_id, statement in statements.items():
            shard = self._by_id[shard_id]
            if statement.error is None:
                shard.answered()
            else:
                self._note(shard_id, problems, shard.error_of(statement.error))

    def _locked(
        self, shard_ids: Iterable[str], problems: dict[str, PydedupError]
    ) -> dict[str, Session]:
        """Return this thread's sessions on shards, locked, without those that cannot be had."""
        while True:
            for shard_id in shard_ids:
                try:
                    self._by_id[shard_id].connected()
                except StoreError as error:
                    self._note(shard_id, problems, error)
            sessions = {
                shard_id: self._by_id[shard_id].open_session()
                for shard_id in shard_ids
                if shard_id not in problems
            }
            ready = {one: session for one, session in sessions.items() if session is not None}
            if len(ready) == len(sessions):
                return ready
            for session in ready.values():  # a fork closed some in between
                session.lock.release()

    def _note(self, shard_id: str, problems: dict[str, PydedupError], error: PydedupError) -> None:
        """Note that a shard failed; raise where no other copy may be asked."""
        in_use = shard_id in (self._mine.touched or ())
        if not self._by_id[shard_id].lost(error) or in_use:
            raise error
        problems[shard_id] = without_frames(error)

    def _raise_for(self, missing: set[int], problems: Mapping[str, PydedupError]) -> None:
        """Raise when one of the pages may be where nobody answered."""
        gone = sorted(n for n in missing if not problems.keys().isdisjoint(self._places(n)))
        if not gone:
            return
        error = next(problems[one] for one in self._places(gone[0]) if one in problems)
        kind: type[PydedupError] = type(error)
        longest = max(self._by_id[one].down_seconds() or 0.0 for one in problems)
        if isinstance(error, ConnectionLostError):
            # Whoever asks first waits for it; afterwards it is known to be away.
            patient = longest < _again.AGAIN_SECONDS
            kind = ConnectionLostError if patient else UnavailableError
        raise kind(
            f"{error}; nobody else has {len(gone)} of the pages asked for ({_some(gone)}), which "
            f"are read by {self._readers_of(gone)}; models without pages there are served"
        ) from error

    def _readers_of(self, page_ids: Sequence[int]) -> str:
        models, reads = self._sql.dialect.name("models"), self._sql.dialect.name("model_pages")
        rows = self._query(
            f"SELECT DISTINCT m.name, m.version FROM {models} m JOIN {reads} r "  # noqa: S608
            "ON r.model_id = m.id WHERE r.page_id = ANY(%b) ORDER BY 1, 2",
            [list(page_ids)],
        )
        return _some([f"{name}@{version}" for name, version in rows]) or "no model yet"

    @property
    def copies(self) -> int:
        """On how many shards each page is."""
        return self._ring.replicas

    def page_copies(self, page_id: int) -> Iterator[bytes]:
        """Yield what each shard that answers has of a page."""
        for shard_id in self._places(page_id):
            problems: dict[str, PydedupError] = {}
            with self._asked({shard_id: [page_id]}, problems) as statements:
                pass
            for statement in statements.values():
                yield from (payload for _, payload in statement.rows)

    # ---- what is where ------------------------------------------------------------------------

    def _payloads_on(self, shard: Shard) -> Iterator[list[tuple[int, int]]]:
        """Yield (id, bytes) of all that is on a shard, in parts."""
        after = 0
        while rows := shard.payload_ids(after, IDS_AT_ONCE):
            yield rows
            after = rows[-1][0]

    @contextlib.contextmanager
    def _unless_lost(self, shard: Shard) -> Iterator[None]:
        """Leave what is begun, without an error, when a shard does not answer."""
        try:
            yield
            shard.answered()
        except StoreError as error:
            if not shard.lost(error):
                raise

    def _without_pages(self, shard: Shard) -> list[int]:
        """Return which payloads on a shard are of no page that is seen now."""
        listed = self._payloads_on(shard)
        return [n for rows in listed for n in self._without_page([number for number, _ in rows])]

    def _delete_payloads(self, shard: Shard, ids: Sequence[int]) -> None:
        """Delete those payloads of a list that are still of no page.

        What is of none may be of one that is being inserted, or that an older snapshot still sees.
        Both hold a lock; who gets it alone (`_alone`), after the list was made, knows that all of
        them have ended.
        """
        dead = self._without_page(ids)
        for start in range(0, len(dead), DELETED_AT_ONCE):
            shard.delete_payloads(dead[start : start + DELETED_AT_ONCE])

    def _without_page(self, ids: Sequence[int]) -> list[int]:
        pages = self._sql.dialect.name("pages")
        rows = self._query(
            f"SELECT n FROM unnest(CAST(%b AS int8[])) n WHERE NOT EXISTS "  # noqa: S608
            f"(SELECT 1 FROM {pages} p WHERE p.id = n)",
            [list(ids)],
        )
        return [number for (number,) in rows]

    def _alone(self) -> bool:
        """Whether everybody who had the lock when this was called gave it back within a second."""
        end = time.monotonic() + WAIT_SECONDS
        key = [self._users_lock]
        while True:
            # Granted and given back within one statement: nobody waits for it.
            ((alone,),) = self._query(
                "SELECT CASE WHEN pg_try_advisory_lock(%b) THEN pg_advisory_unlock(%b) "
                "ELSE false END",
                key * 2,
            )
            if alone or time.monotonic() > end:
                return bool(alone)
            time.sleep(0.02)

    def _wrong_on(self, shard: Shard) -> list[str]:
        """Return complaints about copies that a shard should have."""
        # In this order: a page that somebody sees has its copy, and others may come meanwhile.
        wanted = [row for row in self.page_rows() if shard.id in self._places(row.id)]
        there = {number: length for rows in self._payloads_on(shard) for number, length in rows}
        # What was deleted meanwhile is gone from both, sooner or later.
        wrong = [row.id for row in wanted if there.get(row.id) != row.payload_bytes]
        wrong = [row.id for row in self.page_rows(ids=wrong)]
        if not wrong:
            return []
        other = "the other copy is read" if self._ring.replicas > 1 else "there is no other"
        return [f"{shard.shown} lacks its copy of {len(wrong)} pages ({_some(wrong)}); {other}"]


def _some(things: Sequence[object]) -> str:
    """Return a list of things for a message, of many the first ones."""
    return ", ".join(map(str, things[:_SHOWN])) + (", ..." if len(things) > _SHOWN else "")
