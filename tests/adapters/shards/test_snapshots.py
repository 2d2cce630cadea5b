# SPDX-License-Identifier: Apache-2.0
"""What a snapshot of a store over several servers keeps, and for how long."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from pydedup.adapter import LIVE, Adapter
from pydedup.adapters._errors import CancelledError
from pydedup.testing._contract_base import add_random_pages, in_thread
from pydedup.testing.shards import ShardedPlace


def test_nothing_is_collected_from_under_others(store: Adapter, place: ShardedPlace) -> None:
    """A snapshot keeps what it sees, a transaction what it writes."""
    pages = add_random_pages(store, 9, size=500)

    def delete_and_compact() -> None:
        with store.transaction():
            store.delete_pages(list(pages))
        store.compact()

    with store.snapshot():
        in_thread(delete_and_compact)
        assert dict(store.read_pages(list(pages))) == pages
    with store.transaction():
        ids = store.insert_pages([(bytes(16), random.Random(1).randbytes(99))], state=LIVE)
        in_thread(store.compact)
    assert len(list(store.read_pages(ids))) == 1
    assert len(place.payloads()) == 10
    in_thread(store.compact)  # who had the snapshot keeps nothing from it any more
    assert place.payloads().keys() == set(ids)


def test_a_snapshot_on_a_new_connection_keeps_what_it_sees(
    store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock by which it does so was that of the connection which was lost before it began."""
    pages = add_random_pages(store, 9, size=500)
    adapter: Any = store
    run, lost = adapter._run, list[int]()

    def run_and_lose(session: Any, sql: str, *more: Any) -> Any:
        result = run(session, sql, *more)
        if "pg_advisory_lock_shared" in sql and not lost:
            lost.append(session.connection.info.backend_pid)
            place.cut(0, lost[0])
        return result

    def delete_and_compact() -> None:
        with store.transaction():
            store.delete_pages(list(pages))
        store.compact()

    monkeypatch.setattr(adapter, "_run", run_and_lose)
    with store.snapshot():
        in_thread(delete_and_compact)
        assert dict(store.read_pages(list(pages))) == pages
    assert lost
    in_thread(store.compact)
    assert place.payloads() == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelledError])
def test_a_snapshot_whose_end_is_cut_off_keeps_nothing_afterwards(
    error: type[BaseException], store: Adapter, place: ShardedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock stayed with the connection, and nothing was collected until that was closed."""
    pages = add_random_pages(store, 9, size=500)
    adapter: Any = store
    run = adapter._run

    def cut_off(session: Any, sql: str, *more: Any) -> Any:
        if "pg_advisory_unlock_shared" in sql:
            raise error
        return run(session, sql, *more)

    def delete_and_compact() -> None:
        with store.transaction():
            store.delete_pages(list(pages))
        store.compact()

    monkeypatch.setattr(adapter, "_run", cut_off)
    with contextlib.suppress(KeyboardInterrupt), store.snapshot():
        pass
    monkeypatch.undo()
    # The server closes what was left by itself, but not at once.
    monkeypatch.setattr("pydedup.adapters._shards_reading.WAIT_SECONDS", 20.0)
    in_thread(delete_and_compact)
    assert place.payloads() == {}
