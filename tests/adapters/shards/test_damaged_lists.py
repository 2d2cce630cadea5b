# SPDX-License-Identifier: Apache-2.0
"""What says which databases are the shards of a store, and whose shard each is, is damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pydedup
from pydedup.errors import CorruptStoreError, NotAStoreError
from pydedup.testing.shards import POLICY, ShardedPlace, fill, model_of, serves

#: What a list says instead.
WRONG: list[dict[str, Any]] = [
    {"ring": None},
    {"replicas": 0},  # pages would be written nowhere
    {"replicas": 3},
    {"replicas": "many"},
    {"replicas": float("inf")},
    {"shards": {}},
    {"shards": [1, 2]},
    {"shards": {"a": 1, "b": "there", "c": "there"}},
    {"names": {"a": None}},
]


def test_a_list_that_cannot_be(place: ShardedPlace) -> None:
    fill(place.url(2))
    ((text,),) = place.rows(0, "SELECT value FROM {}.meta WHERE name = 'shards'")
    changed = [json.dumps(json.loads(text) | change) for change in WRONG]
    for wrong in (text[1:], "[" * 100_000, *changed):
        place.rows(0, "UPDATE {}.meta SET value = %s WHERE name = 'shards'", wrong)
        for url in (place.url(2), place.url().replace("&replicas=1", "")):
            with pytest.raises(NotAStoreError, match="list of shards in its meta cannot be read; "):
                pydedup.open(url)
    place.rows(0, "UPDATE {}.meta SET value = %s WHERE name = 'shards'", text)
    serves(place.url(2))


def test_a_list_that_is_lost_while_its_store_is_open(place: ShardedPlace) -> None:
    """Adding was an IndexError, and the store sound until it was to be opened again."""
    url = place.url(2)
    fill(url)
    with pydedup.open(url) as store:
        ((text,),) = place.rows(0, "SELECT value FROM {}.meta WHERE name = 'shards'")
        place.rows(0, "DELETE FROM {}.meta WHERE name = 'shards'")
        for change in (lambda: store.add("more", model_of(3), policy=POLICY), store.refill):
            with pytest.raises(NotAStoreError, match="list of shards in its meta cannot be read; "):
                change()
        (error,) = store.verify().errors
        assert "list of shards in its meta cannot be read; restore a backup" in error
        place.rows(0, "INSERT INTO {}.meta VALUES ('shards', %s)", text)
        assert store.verify().ok
    serves(url)


@pytest.mark.usefixtures("known_places")
@pytest.mark.parametrize("column", ["ring", "id", "joined"])
def test_a_shard_that_says_of_nobody_that_it_is_theirs(column: str, place: ShardedPlace) -> None:
    url = place.url(2)
    fill(url)
    place.rows(1, f"ALTER TABLE {{}}.shard_identity ALTER {column} DROP NOT NULL")
    place.rows(1, f"UPDATE {{}}.shard_identity SET {column} = NULL")  # noqa: S608
    serves(url)  # from the other copies
    said = "NULL is in the row of .*shard_identity.* backup of it, or replace it"
    with pydedup.open(url) as store:
        assert not store.verify().ok
        more = {f"more{seed}": model_of(seed) for seed in range(3, 6)}
        with pytest.raises(CorruptStoreError, match=said):
            store.add_many(more, policy=POLICY)
