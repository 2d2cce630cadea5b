# SPDX-License-Identifier: Apache-2.0
"""Which databases are the shards of a store, and how one takes the place of another that is lost.

The coordinator's ``meta`` has the list, and each shard a row that says whose it is. A database that
takes a lost one's place gets a name that no other ever had (``Ring.next_name``). It is written
there first, where it is a claim and no more, and then into the list, in a transaction that no
writer of pages runs beside: from then on, what was lost is refused if it should come back. A claim
that got no further is read like a shard that lacks all of its pages, and not written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from pydedup.errors import ArgumentError, ConflictError, CorruptStoreError, StoreError

from ._errors import ConnectionLostError
from ._postgres_base import SHARDS
from ._postgres_errors import MissingDatabaseError
from ._shard import Shard
from ._shards_reading import ShardedReads
from ._shards_url import Ring, generation_of, is_same_place, places_of, shard_of_name

__all__ = ["ShardedList"]

#: Pages that are asked for together.
_ROWS_AT_ONCE: Final = 4096


@dataclass(slots=True)
class _Found:
    """What the databases of a list turned out to be.

    Attributes
    ----------
    shards, names
        By the id of the shard: the database, and what it calls itself.
    empty
        Those that belong to no store.
    silent
        Those that do not answer, or were dropped on a server that does.
    """

    shards: dict[str, Shard]
    names: dict[str, str]
    empty: list[Shard]
    silent: list[Shard]

    def claimed(self, ring: Ring) -> dict[str, str]:
        """Return by id of the shard the names that are not in the store's list."""
        return {key: name for key, name in self.names.items() if name != ring.name_of(key)}


class ShardedList(ShardedReads):
    """The part of a sharded adapter that knows which databases are its shards."""

    _replicas_asked: int | None
    _reads_only: bool
    #: Ids of shards that a database has claimed to be, which is not in the list -> its name.
    _claimed: Mapping[str, str]

    # ---- holding the list of a URL against the store's ------------------------------------------

    def match_shards(self) -> None:
        """Hold the list of the URL against the store's.

        Raises ArgumentError when they differ: a shard is missing, foreign, empty, or there twice;
        UnavailableError when a shard refuses. Those that are down are taken for those that nobody
        else is, and looked at when they are back.
        """
        ring = self._listed_ring()
        self._settle(ring, self._look(ring))

    def _listed_ring(self) -> Ring:
        """Return what the store's list is now.

        Raises ArgumentError for other ``replicas``, NotAStoreError where it is lost or damaged.
        """
        rows = self._query(self._sql.meta_value, [SHARDS])
        ring = Ring.from_json(rows[0][0] if rows else "", self._url)
        asked = self._replicas_asked
        if asked is not None and asked != ring.replicas:
            raise ArgumentError(
                f"{self._url} was created with replicas={ring.replicas}, not {asked}; leave "
                "replicas= out, or copy the models into a new store (pydedup copy)"
            )
        return ring

    def _look(self, ring: Ring) -> _Found:
        """Find out what each database of the URL's list is. Raises as `match_shards` does."""
        found = _Found({}, {}, [], [])
        for shard in self._shards:
            try:
                identity = shard.identity()
            except (ConnectionLostError, CorruptStoreError) as error:
                shard.lost(error)
                found.silent.append(shard)
                continue
            except MissingDatabaseError as error:
                # Of a place that the store knows it was dropped; any other is a slip in the URL.
                if not any(is_same_place(shard.shown, place) for place in ring.shards.values()):
                    raise MissingDatabaseError(f"{error}; {self._listed(ring)}") from error
                shard.failed()
                found.silent.append(shard)
                continue
            if identity is None:
                found.empty.append(shard)
                continue
            shard_id = shard_of_name(identity[1])
            if identity[0] != ring.id or shard_id not in ring.shards:
                raise ArgumentError(f"{shard.shown} is of another store; {self._listed(ring)}")
            _refuse_replaced(ring, shard, shard_id, identity[1])
            if shard_id in found.shards:
                raise ArgumentError(
                    f"{shard.shown} and {found.shards[shard_id].shown} are the same shard; "
                    f"{self._listed(ring)}"
                )
            found.shards[shard_id], found.names[shard_id] = shard, identity[1]
            if not identity[2] and not self._reads_only:
                shard.join()
        return found

    def _settle(self, ring: Ring, found: _Found) -> None:
        """Take the databases for the shards that they are."""
        left = [shard_id for shard_id in ring.shards if shard_id not in found.shards]
        if found.empty:
            advice = ""
            if len(found.empty) == len(left) == 1 and ring.replicas > 1:
                advice = (
                    "; to let it take the place of a shard that is lost for good, run `pydedup "
                    "refill --replace` with this list"
                )
            raise ArgumentError(
                f"{found.empty[0].shown} holds no pages of any store; {self._listed(ring)}{advice}"
            )
        if len(left) != len(found.silent):
            raise ArgumentError(f"the list has {_count(self._shards)}; {self._listed(ring)}")
        matched = dict(found.shards)
        # Where they were tells who is who of several; if they moved meanwhile, connecting says so.
        same = {
            shard: [key for key in left if is_same_place(ring.shards[key], shard.shown)]
            for shard in found.silent
        }
        for shard in sorted(found.silent, key=lambda one: not same[one]):
            shard_id = next((key for key in same[shard] if key in left), left[0])
            left.remove(shard_id)
            matched[shard_id] = shard
        for shard_id, shard in matched.items():
            name = found.names.get(shard_id, ring.name_of(shard_id))
            shard.expect(ring.id, shard_id, name)
        self._claimed = found.claimed(ring)
        self._ring, self._by_id = ring, matched

    def _listed(self, ring: Ring) -> str:
        places = ", ".join(sorted(ring.shards.values()))
        return f"the store {self._url} has {_count(ring.shards)}: {places}"

    # ---- while it is open ---------------------------------------------------------------------

    def _keep_list(self) -> None:
        """Let nobody change the list until this transaction has ended.

        Raises StoreError when somebody has done so since this store was opened.
        """
        self._query("SELECT pg_advisory_xact_lock_shared(%b)", [_list_lock(self._ring)])
        self._check_list()

    def _check_list(self) -> None:
        """Raise StoreError unless each database that this store was opened with is in the list."""
        now = self._listed_ring()
        for shard_id, shard in self._by_id.items():
            listed = now.name_of(shard_id)
            if generation_of(shard.name) > generation_of(listed):
                raise StoreError(
                    f"{shard.shown} was about to take the place of a lost shard when that was cut "
                    "off; run `pydedup refill` to finish it"
                )
            if shard.name != listed:
                raise StoreError(
                    f"{now.shards[shard_id]} took the place of {shard.shown} since this store was "
                    "opened; open it again with the list as it is now"
                )

    # ---- replacing a shard that is lost ---------------------------------------------------------

    def replace_lost(self) -> tuple[str, str] | None:
        """Let the one empty database of the list take the place of the shard that is lost.

        Returns where that was, as it was last listed, and what has its place now; ``None`` when no
        database of the list is empty. Done again after it was cut off, it goes on.

        Raises ArgumentError, with nothing changed, when no shard is lost, more than one is, or who
        is cannot be known, when each page was on one shard alone, when of a page no other shard has
        a copy, or when the database is not empty; also NotAStoreError, ReadOnlyError,
        ConflictError, UnavailableError.
        """
        self._refuse_when_read_only()
        ring = self._listed_ring()
        found = self._look(ring)
        done = None
        for shard_id, name in found.claimed(ring).items():
            done = self._install(ring, found.shards[shard_id], shard_id, name)
            ring = self._listed_ring()
        if found.empty:
            new, lost = found.empty[0], self._lost(ring, found)
            self._refuse_only_copies(ring, found, lost)
            done = self._install(ring, new, lost, ring.next_name(lost), claim=True)
        self.match_shards()
        return done

    def finish_replacing(self) -> None:
        """Take into the list what a replacement that was cut off has claimed.

        Raises StoreError when the list was changed since this store was opened.
        """
        for shard_id, name in self._claimed.items():
            self._install(self._listed_ring(), self._by_id[shard_id], shard_id, name)
        if self._claimed:
            self.match_shards()
        self._check_list()

    def _lost(self, ring: Ring, found: _Found) -> str:
        """Return the id of the one shard that is lost; raises ArgumentError when it is not one."""
        left = [shard_id for shard_id in ring.shards if shard_id not in found.shards]
        new, listed = found.empty[0].shown, self._listed(ring)
        if not left:
            raise ArgumentError(
                f"{new} cannot take the place of a shard: all of them answer, none is lost; "
                f"{listed}. A store is brought onto other shards with pydedup copy"
            )
        if len(self._shards) != len(ring.shards):
            raise ArgumentError(f"the list has {_count(self._shards)}; {listed}")
        if ring.replicas == 1:
            raise ArgumentError(
                f"{new} cannot be filled: the store was created with replicas=1, so what was on "
                f"{ring.shards[left[0]]} is on no other shard. Restore a backup of that shard in "
                "its place and let `pydedup verify --repair-from` bring what it lacks; or copy "
                "what is left, which is served under the list as it was, to a new store (pydedup "
                "copy STORE NEW NAME...) and add the other models again"
            )
        if len(found.empty) > 1 or found.silent:
            others = [shard.shown for shard in (*found.empty[1:], *found.silent)]
            raise ArgumentError(
                f"{new} can take the place of a lost shard only while all others answer, and "
                f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} empty or down too. "
                "Bring back what is not lost, and replace one at a time; what was on two "
                "shards that are both lost is gone: then copy what is left to a new store (pydedup "
                "copy STORE NEW NAME...), with the list as it was"
            )
        return left[0]

    def _refuse_only_copies(self, ring: Ring, found: _Found, lost: str) -> None:
        """Raise ArgumentError where a lost shard had the only copy of a page: it may come back."""
        alone: dict[str, list[int]] = {}
        after = 0
        while rows := self.page_rows(after=after, limit=_ROWS_AT_ONCE):
            after = rows[-1].id
            others: dict[str, list[int]] = {}
            for row in rows:
                places = places_of(row.id, tuple(ring.shards), ring.replicas)
                if lost in places:
                    (other,) = {*places} - {lost}
                    others.setdefault(other, []).append(row.id)
            for other, ids in others.items():
                if missing := set(ids) - found.shards[other].present_payloads(ids):
                    alone.setdefault(other, []).extend(missing)
        # What was deleted meanwhile is gone from both.
        gone = sorted(page for missing in alone.values() for page in missing)
        pages = [row.id for row in self.page_rows(ids=gone)] if gone else []
        if not pages:
            return
        there = ", ".join(found.shards[other].shown for other in alone)
        raise ArgumentError(
            f"{found.empty[0].shown} cannot take the place of {ring.shards[lost]}: {len(pages)} "
            f"of the pages there have no copy on {there}, and would be out of reach. They are read "
            f"by {self._readers_of(pages)}. Bring {ring.shards[lost]} back and run `pydedup "
            "refill`; if it is lost for good so are they: remove these models, with the list as it "
            "was, vacuum, and run this again"
        )

    def _install(
        self, ring: Ring, shard: Shard, shard_id: str, name: str, *, claim: bool = False
    ) -> tuple[str, str]:
        """Make a database the one of a shard: there, if need be, and then in the list.

        Returns where the shard was, and is.
        """
        with self.transaction():
            # Whoever inserts pages has this lock too: none is left that writes to the lost one.
            self._query("SELECT pg_advisory_xact_lock(%b)", [_list_lock(ring)])
            now = self._listed_ring()
            if now.name_of(shard_id) == name:
                return ring.shards[shard_id], shard.shown
            is_newer = generation_of(name) > generation_of(now.name_of(shard_id))
            if now.names != ring.names or not is_newer:
                raise ConflictError(
                    f"another process has replaced a shard of {self._url} meanwhile; run it again "
                    "with the list as it is now"
                )
            if claim:
                shard.take_place(ring.id, name)
            self.set_meta(SHARDS, now.replaced(shard_id, name, shard.shown).as_json())
        return ring.shards[shard_id], shard.shown


def _refuse_replaced(ring: Ring, shard: Shard, shard_id: str, name: str) -> None:
    """Raise ArgumentError for a database that another one has taken the place of."""
    current = ring.name_of(shard_id)
    if name != current and generation_of(name) <= generation_of(current):
        raise ArgumentError(
            f"{shard.shown} was lost, and {ring.shards[shard_id]} has taken its place: list that "
            "one, and drop the schema of the lost one before it is used for anything"
        )


def _count(shards: Sized) -> str:
    return "1 shard" if len(shards) == 1 else f"{len(shards)} shards"


def _list_lock(ring: Ring) -> int:
    """Return the advisory lock that writers of pages share, and who changes the list has alone."""
    digest = blake2b(ring.id.encode(), digest_size=8, person=b"list").digest()
    return int.from_bytes(digest, "big", signed=True)
