# SPDX-License-Identifier: Apache-2.0
"""Reading ahead of walks: what is read when and by whom, and that nothing depends on it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.errors import PageNotFoundError, UnavailableError
from pydedup.pool import Called, Fetched, PagePool
from pydedup.testing.memory_pages import MemoryPages

MIB = 1 << 20


class SlowPages:
    """A MiB each, each fetch taking a while; notes who fetched what."""

    def __init__(self, count: int, seconds: float = 0.002) -> None:
        self._pages = MemoryPages()
        rows = np.repeat(np.arange(1, count + 1, dtype=np.float32)[:, None], MIB // 4 - 64, axis=1)
        self._pages.add(rows, (1, rows.shape[1]), per_page=1)
        self._seconds = seconds
        self.fetched: list[tuple[str, list[int]]] = []

    def fetch(self, ids: Sequence[int]) -> Iterator[Fetched]:
        self.fetched.append((threading.current_thread().name, list(ids)))
        for page in self._pages.fetch(ids):
            time.sleep(self._seconds)
            yield page

    def next_is_asked_for(self, done: int) -> None:
        """Wait until the window of four pages behind these is being read."""
        count = len(self._pages.payloads)
        eventually(lambda: sum(len(ids) for _, ids in self.fetched) >= min(done + 4, count))

    def is_asked_for(self, page_id: int) -> None:
        """Wait until a page is being read."""
        eventually(lambda: any(page_id in ids for _, ids in self.fetched))

    def by(self, name: str) -> list[int]:
        return sorted(n for who, ids in self.fetched for n in ids if who.startswith(name))


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def walk(
    pool: PagePool,
    ids: NDArray[np.int64],
    linger: Callable[[int], object] = lambda done: None,
    *,
    once: bool = False,
) -> list[float]:
    """Return what the pages hold; `linger` is called in each window with what is done."""
    seen = []
    for part, pages, index, _ in pool.stream(ids, None, once=once):
        here = [
            float(
                np.frombuffer(pages[i].payload, np.float32, 1, int(pages[i].slots["offset"][0]))[0]
            )
            for i in index.tolist()
        ]
        assert len(here) == part.stop - part.start
        seen += here
        linger(len(seen))
    return seen


def model(owner: int) -> Called:
    return Called(owner, 0, lambda: ids_of(1, 24))


def ids_of(first: int, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count, dtype=np.int64)


def test_a_walk_is_read_ahead_from_its_first_miss_on() -> None:
    pages = SlowPages(24)
    pool = PagePool(pages.fetch, 32 * MIB)
    assert pool.window_pages == 4
    with pool.call(model(1)):
        assert walk(pool, ids_of(1, 24), pages.next_is_asked_for) == list(range(1, 25))
    main = threading.current_thread().name
    assert pages.by(main) == [1, 2, 3, 4]
    assert pages.by("pydedup-ahead") == list(range(5, 25))
    stats = pool.stats()
    assert (stats["misses"], stats["inserts"], stats["pinned_bytes"]) == (24, 24, 0)


def test_the_next_call_is_read_ahead_along_the_way_of_the_last() -> None:
    pages = SlowPages(24)
    pool = PagePool(pages.fetch, 16 * MIB)  # two thirds of what a call reads
    matrices = [ids_of(1 + 2 * i, 2) for i in range(12)]  # one window each
    main = threading.current_thread().name

    def next_is_here(_: int) -> None:  # beside the window that is walked over now
        page_bytes = pool.stats()["bytes"] // pool.stats()["pages"]
        if pages.by(main) and ids is not matrices[-1]:
            eventually(lambda: pool.stats()["pinned_bytes"] >= 4 * page_bytes)

    for number in range(3):
        pages.fetched.clear()
        with pool.call(model(1)):
            for ids in matrices:
                assert walk(pool, ids, next_is_here if number else lambda _: None) == ids.tolist()
    assert pool.window_pages == 2
    assert len(pages.by(main)) <= 2  # the first miss; the rest came ahead
    assert len(pages.by("pydedup-ahead")) >= 6
    assert pool.stats()["pinned_bytes"] == 0


def test_lookups_of_each_call_do_not_end_reading_ahead() -> None:
    """Each looks up other rows: what came next was never known again, and each walk had to miss."""
    pages = SlowPages(40, 0)
    pool = PagePool(pages.fetch, 16 * MIB)
    assert pool.window_pages == 2
    matrices = [ids_of(17 + 2 * i, 2) for i in range(12)]  # one window each
    main = threading.current_thread().name
    for number in range(3):
        pool.clear()
        pages.fetched.clear()
        rows = ids_of(1 + number, 6)
        wait: Callable[[int], object] = pages.is_asked_for if number else lambda _: None
        with pool.call(model(1)):
            walk(pool, rows, lambda done: wait([*rows, 17][done]), once=True)  # noqa: B023
            for ids in matrices:
                walk(pool, ids, lambda _: wait(min(ids[-1] + 1, 40)))  # noqa: B023
        # The walk over rows misses its first window; the rest and all that follows comes ahead.
        if number:
            assert pages.by(main) == rows[:2].tolist()
            assert pages.by("pydedup-ahead") == [*rows[2:].tolist(), *range(17, 41)]
    assert pool.stats()["pinned_bytes"] == 0


def test_a_matrix_that_is_all_in_memory_does_not_end_reading_ahead() -> None:
    """It is not walked over, in that call or in the next; nothing was known then of what follows.

    One that was there in the last call misses, as does the one behind it, no more.
    """
    pages = SlowPages(24, 0)
    pool = PagePool(pages.fetch, 16 * MIB)
    matrices = [ids_of(1 + 2 * i, 2) for i in range(12)]  # one window each
    main = threading.current_thread().name
    for here, missed in (
        ([], range(12)),
        ([0, 1, 5], [2, 6]),
        ([], [0, 1, 2, 5, 6]),
        ([11], [0]),
    ):
        pool.clear()
        pages.fetched.clear()
        ahead = set(range(12)) - {*here, *missed}
        with pool.call(model(1)):
            for number in sorted({*range(12)} - {*here}):
                next_one = 2 * number + 3 if number + 1 in ahead else 2 * number + 1
                walk(pool, matrices[number], lambda _: pages.is_asked_for(next_one))  # noqa: B023
        assert pages.by(main) == [n for one in missed for n in matrices[one].tolist()]
    assert pool.stats()["pinned_bytes"] == 0


def test_two_walk_side_by_side_in_a_small_pool() -> None:
    """One had two of the three pages that walks may pin there, and the other waited for its end."""
    pages = SlowPages(24, 0)
    pool = PagePool(pages.fetch, 12 * MIB)
    assert pool.window_pages == 2
    one = pool.stream(ids_of(1, 8), None)
    assert len(next(one)[1]) == 2
    seen: list[list[float]] = []
    other = threading.Thread(target=lambda: seen.append(walk(pool, ids_of(11, 8))), daemon=True)
    other.start()
    other.join(30)
    assert seen == [list(range(11, 19))]
    assert [len(held) for _, held, _, _ in one] == [2, 2, 2]
    assert pool.stats()["pinned_bytes"] == 0


def test_readers_share_what_is_read() -> None:
    pages = SlowPages(32)
    pool = PagePool(pages.fetch, 128 * MIB, readers=4)
    with pool.call(model(1)):
        assert walk(pool, ids_of(1, 32)) == list(range(1, 33))
    assert pages.by("pydedup-reader") == list(range(1, 33))
    assert max(len(ids) for _, ids in pages.fetched) == 4


def test_outside_of_a_call_nobody_else_reads() -> None:
    pages = SlowPages(32)
    pool = PagePool(pages.fetch, 64 * MIB, readers=4)
    assert walk(pool, ids_of(1, 32)) == list(range(1, 33))
    assert pages.by(threading.current_thread().name) == list(range(1, 33))


def test_a_warm_model_costs_no_thread() -> None:
    pages = SlowPages(8)
    pool = PagePool(pages.fetch, 64 * MIB)
    ids = ids_of(1, 8)
    with pool.call(model(1)):
        walk(pool, ids)
    before = set(threading.enumerate())
    for _ in range(3):
        with pool.call(model(1)):
            walk(pool, ids)
    assert set(threading.enumerate()) <= before
    assert pool.stats()["hits"] == 24


def test_a_call_may_take_another_way_than_the_last() -> None:
    pages = SlowPages(24)
    pool = PagePool(pages.fetch, 16 * MIB)
    matrices = [ids_of(1 + 4 * i, 4) for i in range(6)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 3], [5, 0, 1, 1, 2], [4], [0, 1, 2, 3, 4, 5]):
        with pool.call(model(1)):
            for number in order:
                assert (
                    walk(pool, matrices[number], lambda _: time.sleep(0.005))
                    == matrices[number].tolist()
                )
    assert pool.stats()["pinned_bytes"] == 0
    assert pool.stats()["bytes"] <= 16 * MIB


def test_what_cannot_be_read_ahead_fails_where_it_is_used() -> None:
    pages = SlowPages(8)
    pool = PagePool(pages.fetch, 32 * MIB)
    with pytest.raises(PageNotFoundError, match="9, 10, 11, 12"), pool.call(model(1)):
        walk(pool, ids_of(1, 16), lambda _: time.sleep(0.02))
    assert pool.stats()["pinned_bytes"] == 0
    with pool.call(model(1)):
        assert walk(pool, ids_of(1, 8)) == list(range(1, 9))


def test_a_driver_that_breaks_while_reading_ahead_fails_the_walk() -> None:
    pages = SlowPages(24)

    def breaks(ids: Sequence[int]) -> Iterator[Fetched]:
        if ids[0] > 8:
            raise RuntimeError("no such driver")
        return pages.fetch(ids)

    pool = PagePool(breaks, 32 * MIB)
    with pytest.raises(RuntimeError, match="no such driver"), pool.call(model(1)):
        walk(pool, ids_of(1, 24), lambda _: time.sleep(0.02))
    assert pool.stats()["pinned_bytes"] == 0


def test_where_no_second_connection_is_to_be_had_a_walk_reads_for_itself() -> None:
    """Each window was waited for in vain, ten seconds of PostgreSQL: a prediction took minutes."""
    pages = SlowPages(24)
    refused: list[int] = []

    def one_connection(ids: Sequence[int]) -> Iterator[Fetched]:
        if threading.current_thread().name == "pydedup-ahead":
            refused.append(ids[0])
            raise UnavailableError("too many connections")
        return pages.fetch(ids)

    pool = PagePool(one_connection, 16 * MIB)
    for _ in range(2):
        with pool.call(model(1)):
            seen = walk(pool, ids_of(1, 24), lambda _: eventually(lambda: bool(refused)))
            assert seen == list(range(1, 25))
    assert 1 <= len(refused) <= 2  # of each thread the first
    assert pool.stats()["pinned_bytes"] == 0


def test_many_calls_share_a_small_pool() -> None:
    pages = SlowPages(40, 0.0005)
    pool = PagePool(pages.fetch, 12 * MIB, readers=2)
    errors: list[BaseException] = []

    def serve(owner: int) -> None:
        try:
            matrices = [ids_of(1 + 5 * ((owner + i) % 8), 5) for i in range(4)]
            for _ in range(6):
                with pool.call(model(owner)):
                    for ids in matrices:
                        assert walk(pool, ids) == ids.tolist()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=serve, args=(owner,)) for owner in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    stats = pool.stats()
    assert stats["pinned_bytes"] == 0
    assert stats["bytes"] <= 12 * MIB


def test_a_call_that_is_given_up_lets_its_pages_go() -> None:
    pages = SlowPages(24, 0.005)
    pool = PagePool(pages.fetch, 32 * MIB)

    def interrupted() -> None:
        with pool.call(model(1)):
            walked = pool.stream(ids_of(1, 24), None)
            next(walked)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    eventually(lambda: pool.stats()["pinned_bytes"] == 0)
    pool.clear()
    pages.fetched.clear()
    with pool.call(model(1)):  # and its room
        assert walk(pool, ids_of(1, 24), pages.next_is_asked_for) == list(range(1, 25))
    assert pages.by("pydedup-ahead")


def in_threads(*works: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)


def test_without_a_thread_to_be_had_a_walk_reads_for_itself(monkeypatch: Any) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pages = SlowPages(24)
    pool = PagePool(pages.fetch, 32 * MIB)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pool.call(model(1)):
        assert walk(pool, ids_of(1, 24)) == list(range(1, 25))
    assert pages.by(threading.current_thread().name) == list(range(1, 25))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_after_an_interrupt_wherever_it_comes_others_walk_on() -> None:
    """What a walk held, or the lock itself, was never given back: all waited for ever."""
    pool = PagePool(SlowPages(4, 0).fetch, 8 * MIB)

    def in_call() -> list[float]:
        with pool.call(model(1)):
            return walk(pool, ids_of(1, 4))

    for number in range(1, 1000):
        calls = 0

        def interrupt(frame: Any, event: str, arg: object, number: int = number) -> None:
            """Python looks for signals where a function begins."""
            nonlocal calls
            if frame.f_globals["__name__"] != __name__:
                calls += 1
                if calls == number:
                    raise KeyboardInterrupt

        pool.clear()
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            in_call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if calls < number:
            break
        seen: list[list[float]] = []
        other = threading.Thread(target=lambda to=seen: to.append(in_call()), daemon=True)
        other.start()
        other.join(20)
        assert seen == [[1, 2, 3, 4]], number
    assert number > 50


def test_an_interrupt_while_a_thread_begins_lets_its_pages_go(monkeypatch: Any) -> None:
    """It read ahead all the same, and its pages stayed pinned for as long as the process lived."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    pages = SlowPages(24)
    pool = PagePool(pages.fetch, 32 * MIB)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), pool.call(model(1)):
        walk(pool, ids_of(1, 24))
    # Of those interrupted within `start` itself, Python 3.13 keeps some in its list for ever.
    eventually(
        lambda: "pydedup-ahead" not in [t.name for t in threading.enumerate() if t.is_alive()]
    )
    assert pool.stats()["pinned_bytes"] == 0


def test_with_one_more_thread_to_be_had_that_one_reads_all(monkeypatch: Any) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse_others(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    pages = SlowPages(64)
    pool = PagePool(pages.fetch, 260 * MIB)
    monkeypatch.setattr(threading.Thread, "start", refuse_others)
    with pool.call(model(1)):
        come = lambda _: eventually(lambda: bool(pages.by("pydedup-ahead")))  # noqa: E731
        assert walk(pool, ids_of(1, 64), come) == list(range(1, 65))
    assert pages.by("pydedup-ahead")
    assert pool.stats()["pinned_bytes"] == 0


def test_of_a_large_pool_windows_are_read_while_one_before_is_on_its_way() -> None:
    pages = SlowPages(64, 0)
    behind = threading.Event()

    def fetch(ids: Sequence[int]) -> Iterator[Fetched]:
        if ids[0] == 17:  # the first that is read ahead waits for the one behind it
            assert behind.wait(20)
        if ids[0] == 33:
            behind.set()
        return pages.fetch(ids)

    pool = PagePool(fetch, 260 * MIB)
    assert pool.window_pages == 16
    with pool.call(model(1)):
        assert walk(pool, ids_of(1, 64)) == list(range(1, 65))
    assert behind.is_set()
    assert 33 in pages.by("pydedup-ahead")


def test_two_calls_have_room_to_read_ahead() -> None:
    pages = SlowPages(48)
    pool = PagePool(pages.fetch, 40 * MIB)
    assert pool.window_pages == 5
    both = threading.Barrier(3)
    ahead: list[int] = []

    def hold(first: int) -> Callable[[], None]:
        def predict() -> None:
            def linger(done: int) -> None:
                if done <= 5:  # pages of one window are pinned by the walk
                    both.wait(20)
                    both.wait(20)

            with pool.call(Called(first, 0, lambda: ids_of(1, 48))):
                walk(pool, ids_of(first, 24), linger)

        return predict

    def look() -> None:
        both.wait(20)
        eventually(lambda: len(pages.by("pydedup-ahead")) >= 10)
        ahead.extend(pages.by("pydedup-ahead"))
        both.wait(20)

    in_threads(hold(1), hold(25), look)
    assert ahead == [*range(6, 11), *range(30, 35)]
    assert pool.stats()["pinned_bytes"] == 0


def test_an_error_that_is_kept_pins_nothing() -> None:
    pages = SlowPages(8)
    pool = PagePool(pages.fetch, 32 * MIB)

    def fails() -> None:
        for _ in pool.stream(ids_of(1, 8), None):
            raise ValueError("while computing")

    with pytest.raises(ValueError, match="while computing") as caught:
        fails()
    assert caught.value.__traceback__ is not None
    assert pool.stats()["pinned_bytes"] == 0
