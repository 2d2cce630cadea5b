# SPDX-License-Identifier: Apache-2.0
"""What activations and reservations take of the budget, beside walks that read ahead."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest

from pydedup.errors import BudgetError
from pydedup.pool import PagePool
from pydedup.testing.serving import until

from .test_prefetch import SlowPages, ids_of, in_threads, walk

MIB = 1 << 20


def test_activations_and_reservations_count() -> None:
    pages = SlowPages(16, 0)
    pool = PagePool(pages.fetch, 16 * MIB)
    walk(pool, ids_of(1, 16))
    assert pool.stats()["pages"] == 16
    with pool.activations(6 * MIB):
        assert pool.stats()["bytes"] <= 10 * MIB
        assert pool.stats()["reserved_bytes"] == 6 * MIB
        assert walk(pool, ids_of(1, 16)) == list(range(1, 17))
    with pool.reserve(8 * MIB):
        assert pool.activation_bytes == 4 * MIB
        assert walk(pool, ids_of(1, 16)) == list(range(1, 17))
        assert pool.stats()["bytes"] <= 8 * MIB
    assert pool.activation_bytes == 8 * MIB
    kept = pool.reserve(MIB)
    assert pool.stats()["reserved_bytes"] == MIB
    kept.release()
    kept.release()
    assert pool.stats()["reserved_bytes"] == 0
    pool.reserve(MIB)
    assert pool.stats()["reserved_bytes"] == 0  # nobody kept it


def test_what_is_reserved_during_a_prediction_leaves_room_for_a_delta_and_its_base() -> None:
    """The first call of an attached module failed within a small budget, and the second did not:
    its vectors were loaded after all that activations may take was taken off the pages.
    """
    pages = SlowPages(4, 0)
    pool = PagePool(pages.fetch, 4 * MIB)
    walk(pool, ids_of(1, 4))
    with pool.activations(pool.activation_bytes):
        assert pool.stats()["reserved_bytes"] == 2 * MIB
        with pool.reserve(MIB // 2):
            assert pool.stats()["reserved_bytes"] == 2 * MIB
            assert pool.stats()["budget_bytes"] == 4 * MIB


def test_what_is_kept_for_later_makes_room() -> None:
    pages = SlowPages(4, 0)
    pool = PagePool(pages.fetch, 4 * MIB)
    kept = [pool.reserve(MIB) for _ in range(3)]

    class Keeper:
        def give_up(self) -> bool:
            return bool(kept) and kept.pop(0).release() is None

        def alone(self) -> AbstractContextManager[None]:
            return nullcontext()

    pool.keeps(Keeper())
    assert len(pool.pages([1])) == 1
    assert len(kept) == 3
    held = pool.pages([2, 3])
    assert len(kept) == 2
    with pool.reserve(MIB):
        assert len(kept) == 1
        with pytest.raises(BudgetError, match="does not fit"):
            pool.pages([1, 4])
    assert kept == []
    assert len(held) == 2
    # Pages that a walk is in the middle of go as well.
    walked = [held]
    del held
    with ThreadPoolExecutor(1) as threads, pool.hold(2):
        pending = threads.submit(pool.reserve, 3 * MIB)
        until(lambda: bool(pool._shares.walks._waiting))
        walked.clear()
    pending.result().release()


def test_scratch_is_there_once_for_all_predictions() -> None:
    pool = PagePool(SlowPages(1, 0).fetch, 64 * MIB, scratch_bytes=16 * MIB)
    inside = threading.Barrier(3)

    def hold() -> None:
        with pool.activations(14 * MIB):
            inside.wait(20)
            assert pool.stats()["reserved_bytes"] == (3 * 14 - 16) * MIB
            inside.wait(20)

    in_threads(hold, hold, hold)
    assert pool.stats()["reserved_bytes"] == 0


def test_a_large_prediction_gets_its_turn_among_small_ones() -> None:
    pool = PagePool(SlowPages(1, 0).fetch, 16 * MIB)
    served = threading.Event()

    def small() -> None:
        deadline = time.monotonic() + 60
        while not served.is_set():
            assert time.monotonic() < deadline
            with pool.activations(MIB):
                time.sleep(0.003)

    def large() -> None:
        time.sleep(0.05)
        with pool.activations(8 * MIB):
            served.set()

    in_threads(small, small, small, large)


def test_what_was_reserved_before_a_fork_counts_in_the_child() -> None:
    pool = PagePool(SlowPages(1, 0).fetch, 64 * MIB)
    kept = pool.reserve(16 * MIB)
    child = os.fork()
    if child == 0:
        try:
            ok = pool.stats()["reserved_bytes"] == 16 * MIB and pool.activation_bytes == 24 * MIB
            with pool.reserve(8 * MIB):
                ok = ok and pool.stats()["reserved_bytes"] == 24 * MIB
            kept.release()
            ok = ok and pool.stats()["reserved_bytes"] == 0 and pool.activation_bytes == 32 * MIB
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.stats()["reserved_bytes"] == 16 * MIB
