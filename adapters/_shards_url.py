# SPDX-License-Identifier: Apache-2.0
"""URLs of sharded stores, and which shards a page is on.

``postgresql+shards://COORDINATOR|SHARD|SHARD...``: each part is what follows ``postgresql://`` in
the URL of one database, credentials and options included. ``replicas=`` is an option of the first.

A page is on the shards with the highest hash of (shard, page) (rendezvous hashing: Thaler and
Ravishankar, 1998). Beside a ring with virtual nodes it needs no table, spreads pages evenly
whatever their number of shards, moves as few when one is added, and of a shard that is down the
load goes to all others, not to its neighbour; that it looks at every shard costs a microsecond
each, for a page of a megabyte.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from pydedup.errors import ArgumentError, NotAStoreError

from ._postgres_url import Place, locate

__all__ = [
    "Ring",
    "ShardPlaces",
    "generation_of",
    "is_same_place",
    "locate_shards",
    "places_of",
    "shard_of_name",
]

#: More copies would be written than a second failure at the same time is worth.
MOST_REPLICAS: Final = 2
_OURS: Final = ("replicas",)
_PREFIX: Final = re.compile(r"postgres(ql)?://")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class ShardPlaces:
    """Where a sharded store is.

    Attributes
    ----------
    shown
        The whole store for people, without passwords.
    coordinator
        The database of all tables; its ``shown`` says that it is the coordinator.
    shards
        Those of payloads, in the order of the URL, which means nothing.
    replicas
        On how many shards each page is; ``None`` where the URL leaves it to the store.
    """

    shown: str
    coordinator: Place
    shards: tuple[Place, ...]
    replicas: int | None


def locate_shards(url: str, schema: str | None, known: Collection[str]) -> ShardPlaces:
    """Take a URL apart; raises ArgumentError, without credentials, for what is none."""
    first, *others = url.partition("://")[2].split("|")
    if not others or not all(others):
        raise ArgumentError(
            "the URL of a sharded store lists its shards after the coordinator: "
            "postgresql+shards://host/database|host1/pages|host2/pages"
        )
    first, *others = (_PREFIX.sub("", one) for one in (first, *others))
    for one in (first, *others):
        if scheme := _SCHEME.match(one):  # its name would be that of a host, which is down
            raise ArgumentError(
                f"{scheme[0]} in the list: the coordinator and all shards are PostgreSQL "
                "databases, each written as after postgresql://"
            )
    first, replicas = _without_replicas(first)
    coordinator = locate(f"postgresql://{first}", schema, known, also=_OURS)
    shards = []
    for number, other in enumerate(others, 1):
        own, misplaced = _without_replicas(f"postgresql://{other}")
        if misplaced is not None:
            raise ArgumentError(
                "replicas= is an option of the first database in the list, the coordinator: "
                "postgresql+shards://host/database?replicas=2|host1/pages|host2/pages"
            )
        asks = re.search(r"[?&]schema=", own)
        try:
            own_schema = None if asks else coordinator.schema
            shards.append(locate(own, own_schema, known, also=_OURS))
        except ArgumentError as error:
            raise ArgumentError(f"shard {number} of the list: {error}") from None
    if replicas is not None and not 1 <= replicas <= min(MOST_REPLICAS, len(shards)):
        raise ArgumentError(
            f"replicas={replicas} cannot be: each page is on 1 or {MOST_REPLICAS} of the shards, "
            f"and {len(shards)} of them are listed"
        )
    twins = [place.shown for i, place in enumerate(shards) if place in shards[:i]]
    if twins:
        raise ArgumentError(f"{twins[0]} is listed twice as a shard; list each once")
    shown = "|".join(place.shown.partition("://")[2] for place in (coordinator, *shards))
    named = dataclasses.replace(coordinator, shown=f"{coordinator.shown} (the coordinator)")
    return ShardPlaces(f"postgresql+shards://{shown}", named, tuple(shards), replicas)


def _without_replicas(part: str) -> tuple[str, int | None]:
    """Return the coordinator's part without ``replicas=``, and its value."""
    location, mark, query = part.partition("?")
    options = query.split("&")
    ours = [option for option in options if option.startswith("replicas=")]
    rest = "&".join(option for option in options if option not in ours)
    if not ours:
        return part, None
    value = ours[-1].partition("=")[2]
    if not (value.isascii() and value.isdigit()):
        raise ArgumentError(f"replicas={value!r} must be 1 or {MOST_REPLICAS}")
    return f"{location}{mark if rest else ''}{rest}", int(value)


@dataclass(frozen=True, slots=True)
class Ring:
    """Which shards a store has, as its ``meta`` records it.

    Attributes
    ----------
    id
        Of this list; each shard holds it too.
    shards
        Id of each shard -> where it was when the store was created, or when it was replaced, for
        messages.
    names
        Id of a shard that was replaced -> what the database calls itself that took its place. All
        others call themselves by their id. What was replaced can so be told from what replaced it.
    """

    id: str
    replicas: int
    shards: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return what goes into ``meta``."""
        named = {"names": self.names} if self.names else {}
        return json.dumps(
            {"ring": self.id, "replicas": self.replicas, "shards": self.shards, **named}
        )

    @staticmethod
    def from_json(value: str, shown: str) -> Ring:
        """Return what ``meta`` holds. Raises NotAStoreError for anything else."""
        try:
            found = json.loads(value)
            shards, names = dict(found["shards"]), dict(found.get("names", {}))
            ring = Ring(found["ring"], int(found["replicas"]), shards, names)
            if not all(
                isinstance(one, str) for one in (ring.id, *shards.values(), *names.values())
            ):
                raise ValueError(value)
            if not 1 <= ring.replicas <= min(MOST_REPLICAS, len(shards)):
                raise ValueError(value)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise NotAStoreError(
                f"{shown}: the list of shards in its meta cannot be read; restore a backup"
            ) from error
        return ring

    def name_of(self, shard_id: str) -> str:
        """Return what the database of a shard calls itself."""
        return self.names.get(shard_id, shard_id)

    def next_name(self, shard_id: str) -> str:
        """Return a name for a database that is to take a shard's place; no other ever gets it."""
        generation = generation_of(self.name_of(shard_id)) + 1
        return f"{shard_id}.{generation}.{uuid.uuid4().hex}"

    def replaced(self, shard_id: str, name: str, shown: str) -> Ring:
        """Return the ring with another database, of that name and place, for one of its shards."""
        return Ring(
            self.id,
            self.replicas,
            {**self.shards, shard_id: shown},
            {**self.names, shard_id: name},
        )


def is_same_place(one: str, other: str) -> bool:
    """Whether two places, as they are shown, are the same database, whoever connects to it."""
    return _without_user(one) == _without_user(other)


def _without_user(shown: str) -> str:
    location, _, query = shown.partition("://")[2].partition("?")
    options = sorted(option for option in query.split("&") if not option.startswith("user="))
    return f"{location.rpartition('@')[2]}?{'&'.join(options)}"


def shard_of_name(name: str) -> str:
    """Return the id of the shard that a database of this name is, or was."""
    return name.partition(".")[0]


def generation_of(name: str) -> int:
    """Return the how manieth database of its shard this one is, counted from 1."""
    number = name.split(".")[1:2]
    return int(number[0]) if number and number[0].isdecimal() else 1


def places_of(page_id: int, shards: Sequence[str], replicas: int) -> list[str]:
    """Return the ids of the shards that a page is on, the one to ask first leading."""
    key = page_id.to_bytes(8, "little")

    def weight(shard: str) -> bytes:
        return blake2b(key, digest_size=8, key=shard.encode()).digest()

    return sorted(shards, key=weight, reverse=True)[:replicas]
