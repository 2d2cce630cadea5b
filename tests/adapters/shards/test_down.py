# SPDX-License-Identifier: Apache-2.0
"""Reading and writing while a shard is down, and once it is back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapters._errors import ConnectionLostError
from pydedup.errors import StoreError, UnavailableError
from pydedup.testing._contract_base import add_pages, add_random_pages, in_thread, open_store
from pydedup.testing.shards import ShardedPlace


def test_a_shard_that_is_down(
    store: Adapter, place: ShardedPlace, shard_servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages elsewhere are read, models elsewhere served, and the error names what cannot be had."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    pages = add_random_pages(store, 30, size=100_000)
    ((down,),) = place.rows(2, "SELECT array_agg(id) FROM {}.page_payloads")
    up = [number for number in pages if number not in down]
    shard_servers[2].kill()
    try:
        opened = registry.connect(place.url(), mode="a")  # also now
        for adapter in (store, opened):
            assert dict(adapter.read_pages(up)) == {number: pages[number] for number in up}
            with adapter.snapshot(), pytest.raises(UnavailableError) as told:
                list(adapter.read_pages(list(pages)))
            assert f"port={shard_servers[2].port}" in str(told.value)
            assert f"{len(down)} of the pages" in str(told.value)
            with pytest.raises(UnavailableError):
                add_pages(adapter, 40)
            assert not adapter.size_is_exact()
            assert adapter.stored_bytes() >= 30 * 100_000
            assert adapter.integrity_errors() == []  # of pages that nobody has seen
            (said,) = adapter.unreachable_places()  # type: ignore[attr-defined]
            assert f"port={shard_servers[2].port}" in said
            adapter.compact()
        assert sorted(row.id for row in store.page_rows()) == sorted(pages)
    finally:
        shard_servers[2].start()
    for adapter in (store, opened):
        assert dict(adapter.read_pages(list(pages))) == pages
        assert adapter.size_is_exact()
    assert opened.integrity_errors() == []
    opened.close()


def test_what_a_shard_fails_to_read_is_not_taken_for_missing(
    store: Adapter, place: ShardedPlace
) -> None:
    pages = add_random_pages(store, 30, size=500)
    assert dict(store.read_pages(list(pages))) == pages  # by connections that stay open
    place.rows(2, "DROP TABLE {}.page_payloads")
    with pytest.raises(StoreError, match="nobody else has"):
        list(store.read_pages(list(pages)))


def test_a_shard_that_is_lost_as_a_transaction_begins_is_used_again(
    store: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same thread; the connection looked well a moment before."""
    pages = add_random_pages(store, 60, size=500)

    def lost(*_: object) -> None:
        raise ConnectionLostError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store._shards[2], "_begin", lost)  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match="no answer"):
            add_random_pages(store, 60, size=500)
    pages |= add_random_pages(store, 60, size=500)
    assert dict(store.read_pages(list(pages))) == pages


def test_a_host_that_does_not_answer_is_left_alone(
    store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = add_random_pages(store, 30, size=500)
    shard: Any = store._shards[2]  # type: ignore[attr-defined]
    tries = []

    def wait() -> Any:
        tries.append(1)
        time.sleep(0.01)
        raise ConnectionLostError("no answer")

    monkeypatch.setattr(shard._pool, "_open_connection", wait)
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.1)
    monkeypatch.setattr("pydedup.adapters._shard.LEFT_ALONE", 1e6)

    def read() -> None:  # with new connections
        with pytest.raises(UnavailableError, match="no answer"):
            list(store.read_pages(list(pages)))

    in_thread(read)
    asked = len(tries)
    for _ in range(3):
        in_thread(read)
    assert len(tries) == asked > 0
    monkeypatch.undo()
    shard.answered()  # instead of waiting
    assert in_thread(lambda: dict(store.read_pages(list(pages)))) == pages


def test_of_a_shard_that_is_known_to_be_down_readers_are_told_at_once(
    store: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = add_random_pages(store, 60, size=500)
    tries = []

    def refuse() -> Any:
        tries.append(1)
        raise ConnectionLostError("no answer")

    monkeypatch.setattr(store._shards[2]._pool, "_open_connection", refuse)  # type: ignore[attr-defined]
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 1.0)

    def read() -> None:  # with new connections
        with pytest.raises(UnavailableError, match="no answer"):
            list(store.read_pages(list(pages)))

    in_thread(read)
    assert len(tries) > 1
    time.sleep(0.7)  # for half of the time that it is down, nobody asks
    tries.clear()
    in_thread(read)
    assert len(tries) == 1


def test_of_two_copies_the_one_on_a_shard_that_failed_is_asked_for_last(
    place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter: Any = open_store(place.url(replicas=2))
    pages = add_random_pages(adapter, 60, size=500)
    tries = []

    def refuse() -> Any:
        tries.append(1)
        raise ConnectionLostError("no answer")

    for pause in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(f"pydedup.adapters._shard.{pause}", 1e6)
    monkeypatch.setattr(adapter._shards[2]._pool, "_open_connection", refuse)
    for _ in range(3):
        assert in_thread(lambda: dict(adapter.read_pages(list(pages)))) == pages
    assert len(tries) == 1
    adapter.close()


def test_a_snapshot_waits_for_a_coordinator_that_starts_again(
    store: Adapter, shard_servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 90.0)
    with store.snapshot():
        before = store.epoch()
    shard_servers[0].kill()
    starts = threading.Thread(target=shard_servers[0].start)
    starts.start()
    try:
        with store.snapshot():
            assert store.epoch() == before
    finally:
        starts.join()
