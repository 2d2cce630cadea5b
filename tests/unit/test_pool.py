# SPDX-License-Identifier: Apache-2.0
"""The page pool: budget, one batched fetch per request, one copy per page, walks, forks."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import _core, codec, matmul
from pydedup.errors import (
    ArgumentError,
    BudgetError,
    CorruptStoreError,
    PageNotFoundError,
    UnavailableError,
)
from pydedup.pool import Called, Fetched, PagePool
from pydedup.testing.memory_pages import MemoryPages
from pydedup.windows import Window

MIB = 1 << 20


def pages_of(count: int, elements: int = 1000) -> tuple[MemoryPages, int]:
    """Return pages 1 to ``count``, each of one row that holds its number, and their size."""
    pages = MemoryPages()
    rows = np.repeat(np.arange(1, count + 1, dtype=np.float32)[:, None], elements, axis=1)
    pages.add(rows, (1, elements), per_page=1)
    assert sorted(pages.payloads) == list(range(1, count + 1))
    return pages, len(pages.payloads[1])


def number_on(page: Any) -> int:
    return int(np.frombuffer(page.payload, np.float32, 1, int(page.slots["offset"][0]))[0])


def test_pages_come_in_the_order_asked_for() -> None:
    pages, _ = pages_of(9)
    pool = pages.pool()
    for ids in ([3, 1, 2], [9, 3, 3, 8], [1]):
        assert [number_on(page) for page in pool.pages(ids)] == ids
    assert pages.fetches == [[1, 2, 3], [8, 9]]
    assert pool.pages([]) == []
    stats = pool.stats()
    assert (stats["inserts"], stats["pages"], stats["pinned_bytes"]) == (5, 5, 0)


def test_a_model_that_was_not_called_for_long_is_asked_for_its_pages_again() -> None:
    """Those that are gone stayed owners of what they shared, which took time and memory."""
    pages, _ = pages_of(2)
    pool = pages.pool()
    asked: list[int] = []

    def call(owner: int) -> None:
        def pages_of_it() -> NDArray[np.int64]:
            asked.append(owner)
            return np.array([1, 2])

        with pool.call(Called(owner, 0, pages_of_it)):
            pool.pages([1, 2])

    for owner in range(300):
        call(owner)
        call(owner)
    assert asked == list(range(300))
    for _ in range(5000):  # some ten thousand uses of pages
        call(0)
    for owner in range(300, 600):
        call(owner)
    for owner in (0, 1, 1, 599):
        call(owner)
    assert asked[300:] == [*range(300, 600), 1]


def test_what_is_expected_of_pages_that_are_gone_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all pages that a process had ever met it was kept, while vacuums replace them nightly."""
    monkeypatch.setattr("pydedup.pool.pool._MANY_EXPECTED", 10)
    pages, _ = pages_of(1)
    pool = pages.pool()
    for first in range(0, 1000, 5):
        ids = range(first, first + 5)
        there = range(first - 2, first + 5)
        assert pool.expect(dict.fromkeys(ids, b"tag"), lambda there=there: there) == []
        assert pool.expected(first) == b"tag"
    assert [bool(pool.expected(n)) for n in (0, 500, 960, 999)] == [False, False, False, True]


def test_what_another_thread_expects_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was added after the database was asked which pages there are, so it seemed to be gone."""
    monkeypatch.setattr("pydedup.pool.pool._MANY_EXPECTED", 10)
    pages, _ = pages_of(1)
    pool = pages.pool()

    def there() -> list[int]:
        other = threading.Thread(target=pool.expect, args=({100: b"new"},))
        other.start()
        other.join()
        return [19]

    pool.expect(dict.fromkeys(range(20), b"tag"), there)
    assert [bool(pool.expected(n)) for n in (0, 19, 100)] == [False, True, True]


def test_what_is_read_into_memory_is_held_against_checksums() -> None:
    pages, size = pages_of(8)
    asked: list[list[int]] = []

    def read_into(
        ids: Sequence[int], memory: Callable[[int], memoryview]
    ) -> Iterator[tuple[int, bytes, memoryview]]:
        asked.append(list(ids))
        for number in ids:
            payload = bytearray(pages.payloads[number])
            checksum = codec.page_checksum(bytes(payload))
            if number == 2:
                continue  # left out
            if number == 3:
                payload[-1] ^= 1
            elif number == 4:
                payload[:] = pages.payloads[5]
            elif number == 5:
                payload[:8] = b"\xff" * 8
            elif number == 6:
                del payload[10:]
            elif number == 7:
                checksum = b""
            elif number == 8:
                raise CorruptStoreError("the rest cannot be read")
            view = memory(len(payload))
            view[:] = payload
            yield number, checksum, view

    pool = PagePool(pages.fetch, 20 * size, read_into=read_into)
    ids = list(range(1, 9))
    held = pool.pages(ids)
    assert [number_on(page) for page in held] == ids
    assert [page.payload for page in held] == [pages.payloads[number] for number in ids]
    assert (asked, pages.fetches) == ([ids], [ids[1:]])
    assert [number_on(page) for page in pool.pages(ids)] == ids
    assert len(asked) == 1
    with pytest.raises(PageNotFoundError, match="1 page does not exist: 9;"):
        PagePool(pages.fetch, size, read_into=lambda _ids, _memory: ()).pages([9])
    del held, pool
    gc.collect()


def test_memory_for_pages_of_any_size() -> None:
    for size in (0, 1, 4096, MIB, MIB + 1, 5 * MIB):
        view = memoryview(_core.PageMemory(size))
        assert (view.nbytes, view.readonly) == (size, False)
        view[:] = bytes(size)
    with pytest.raises(MemoryError):
        _core.PageMemory(1 << 62)
    for wrong in (-1, 1.5, None):
        with pytest.raises(TypeError):
            _core.PageMemory(wrong)  # type: ignore[arg-type]
    with pytest.raises(CorruptStoreError):
        _core.BufferPool(MIB).adopt(1, _core.PageMemory(0), bytes(16))


def test_what_ends_the_reading_into_memory_is_raised() -> None:
    pages, size = pages_of(2)

    def read_into(*_: object) -> Iterator[tuple[int, bytes, memoryview]]:
        raise UnavailableError("gone")

    with pytest.raises(UnavailableError, match="gone"):
        PagePool(pages.fetch, size, read_into=read_into).pages([1])
    assert pages.fetches == []


def test_missing_pages_are_listed() -> None:
    pages, _ = pages_of(3)
    with pytest.raises(PageNotFoundError, match="2 pages do not exist: 7, 9;"):
        pages.pool().pages([1, 9, 7])
    with pytest.raises(PageNotFoundError, match=r"30 pages .*: 10, 11, 12, 13, 14 and 25 more;"):
        pages.pool().pages(list(range(10, 40)))


def test_of_missing_pages_it_is_said_who_reads_them() -> None:
    """Those that nobody reads any more are not lost: a vacuum took them away."""
    pages, size = pages_of(3)
    for by, said in (("; read by m@1", "; read by m@1; mend it"), ("", "; if this stays so .*")):
        pool = PagePool(pages.fetch, size, lambda _ids, by=by: (by, "; mend it"))
        with pytest.raises(PageNotFoundError, match=f"^2 pages do not exist: 7, 9{said}$") as told:
            pool.pages([9, 7])
        assert told.value.page_ids == (7, 9)


def test_the_budget_is_never_exceeded() -> None:
    pages, size = pages_of(20)
    pool = pages.pool(3 * size + 10)
    for number in range(1, 21):
        pool.pages([number])
        assert pool.stats()["bytes"] <= 3 * size
    held = pool.pages([1, 2, 3])
    with pytest.raises(BudgetError, match="open the store with more memory"):
        pool.pages([4])
    assert [number_on(page) for page in held] == [1, 2, 3]
    del held
    assert number_on(pool.pages([4])[0]) == 4
    with pytest.raises(BudgetError):
        pool.pages([5, 6, 7, 8])
    assert pool.stats()["pinned_bytes"] == 0


def test_a_budget_must_be_positive() -> None:
    for memory in (0, -1):
        with pytest.raises(ArgumentError, match="positive"):
            PagePool(MemoryPages().fetch, memory)


def test_a_damaged_page_is_named() -> None:
    pages, _ = pages_of(2)
    damaged = bytearray(pages.payloads[2])
    damaged[-1] ^= 1
    pages.payloads[2] = bytes(damaged)
    pool = pages.pool()
    with pytest.raises(CorruptStoreError, match=r"^page 2: .*verify"):
        pool.pages([1, 2])
    pages.payloads[2] = b"short"
    with pytest.raises(CorruptStoreError, match="page 2"):
        pool.pages([2])


def test_drop_and_clear_forget_pages() -> None:
    pages, _ = pages_of(3)
    pool = pages.pool()
    held = pool.pages([1, 2, 3])
    pool.drop([2])
    pool.pages([1, 2, 3])
    assert pages.fetches == [[1, 2, 3], [2]]
    pool.clear()
    assert [number_on(page) for page in held] == [1, 2, 3]
    del held
    assert pool.stats()["bytes"] == 0


def test_only_what_is_not_there_is_waited_for() -> None:
    pages, size = pages_of(4)
    pool = pages.pool(10 * size)
    for ids, waits in (([1, 2], 1), ([2, 1], 1), ([2, 3], 2)):
        pool.pages(ids)
        assert pool.stats()["waits"] == waits


def test_warm_takes_what_fits() -> None:
    pages, size = pages_of(40, elements=MIB // 4)
    assert pages.pool(10 * size).warm(range(1, 41)) == 10
    roomy = pages.pool(60 * size)
    assert roomy.warm(range(1, 41)) == 40
    before = len(pages.fetches)
    roomy.pages(list(range(1, 41)))
    assert len(pages.fetches) == before
    assert pages.pool(size).warm([]) == 0


def test_warm_takes_what_fits_beside_what_is_reserved_and_in_use() -> None:
    """What a walk pins did not fit then, which was an error."""
    pages, size = pages_of(40, elements=MIB // 4)
    pool = pages.pool(32 * size)
    assert pool.window_pages > 3
    with pool.reserve(29 * size):
        assert pool.warm(range(1, 41)) == 3
        held = pool.pages([38, 39])
        assert pool.warm(range(1, 38)) == 1
        assert len(held) == 2


# ---- walks --------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    page_ids=st.lists(st.integers(1, 9), max_size=60),
    budget_pages=st.integers(1, 12),
)
def test_walks_visit_every_block_once(page_ids: list[int], budget_pages: int) -> None:
    pages, size = pages_of(9)
    ids = np.array(page_ids, np.int64)
    pool = pages.pool(budget_pages * size)
    seen = np.zeros(len(ids), int)
    for rows, held, index in pool.windows(ids):
        assert len(held) <= budget_pages
        assert [number_on(held[i]) for i in index] == ids[rows].tolist()
        seen[rows] += 1
        del held
    assert (seen == 1).all()
    at = 0
    for part, held, index, _ in pool.stream(ids, None):
        assert part.start == at
        at = part.stop
        assert [number_on(held[i]) for i in index] == ids[part].tolist()
        assert held.count(held[0]) == 1
    assert at == len(ids)


def test_windows_read_each_page_once() -> None:
    pages, _ = pages_of(9)
    ids = np.tile(np.arange(1, 10), 5)
    pool = pages.pool(9 * MIB)  # windows of two pages of the usual size
    for _ in pool.windows(ids):
        pass
    assert sorted(number for batch in pages.fetches for number in batch) == list(range(1, 10))
    assert len(pages.fetches) > 1


def test_windows_shrink_when_pages_are_larger_than_usual() -> None:
    pages, size = pages_of(8, elements=MIB)  # 4 MiB each, taken for 1 MiB at first
    pool = pages.pool(34 * MIB)
    assert pool.window_pages == 4
    ids = np.arange(1, 9, dtype=np.int64)
    seen = [(rows.tolist(), len(held)) for rows, held, _ in pool.windows(ids)]
    assert sorted(row for rows, _ in seen for row in rows) == list(range(8))
    assert pool.window_pages == 2
    with pytest.raises(BudgetError):
        list(pages.pool(size - 1).windows(ids))


def test_a_walk_lets_its_pages_go() -> None:
    pages, size = pages_of(6)
    pool = pages.pool(6 * size)
    for _, held, _ in pool.windows(np.arange(1, 7, dtype=np.int64)):
        assert held
    assert held == []
    assert pool.stats()["pinned_bytes"] == 0
    walk = pool.windows(np.arange(1, 7, dtype=np.int64))
    next(walk)
    del walk  # given up half way
    gc.collect()
    assert pool.stats()["pinned_bytes"] == 0


def test_the_cut_of_an_array_is_remembered_while_it_lives() -> None:
    pages, _ = pages_of(6)
    pool = pages.pool()
    ids = np.arange(1, 7, dtype=np.int64)
    for _ in range(3):
        assert sum(part.stop - part.start for part, *_ in pool.stream(ids, None)) == 6
    assert len(pool._plans) == 1
    del ids
    gc.collect()
    assert len(pool._plans) == 0


def pages_used(pool: PagePool, ids: NDArray[np.int64]) -> list[int]:
    """Walk over blocks; return how many pages each window had that was used out of the pool."""
    used: list[int] = []

    def at_once(window: Window) -> bool:
        is_here = pool.native.count_resident(window.ids) == len(window.ids)
        if is_here:
            used.append(len(window.ids))
        return is_here

    for _ in pool.stream(ids, None, at_once):
        pass
    return used


def test_what_is_all_there_is_one_window() -> None:
    pages, _ = pages_of(17)
    pool = pages.pool(96 * MIB)  # windows of 12 pages of the usual size, and 16 at once
    assert pool.window_pages == 12
    some, many = np.arange(1, 15), np.arange(1, 18)
    assert pages_used(pool, some) == []
    assert pages_used(pool, some) == [14]
    assert pages_used(pool, many) == [12]
    assert pages_used(pool, many) == [12, 5]
    pool.drop([3])
    assert pages_used(pool, some) == [2]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.hold(12):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    assert pages_used(pool, some) == [12, 2]  # as one they would have to wait
    done.set()
    other.join()
    assert pages_used(pool, some) == [14]
    assert pool.stats()["pinned_bytes"] == 0


# ---- threads ------------------------------------------------------------------------------------


def in_threads(count: int, work: Any) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # an assertion in a thread must fail the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_a_page_that_several_threads_miss_is_fetched_once() -> None:
    pages, _ = pages_of(6)
    all_ask = threading.Barrier(4)

    def slow(ids: Sequence[int]) -> Iterator[Fetched]:
        time.sleep(0.05)
        return pages.fetch(ids)

    pool = PagePool(slow, MIB)

    def work(number: int) -> None:
        all_ask.wait(10)
        wanted = [(number + i) % 6 + 1 for i in range(4)]
        assert [number_on(page) for page in pool.pages(wanted)] == wanted

    in_threads(4, work)
    assert sorted(number for batch in pages.fetches for number in batch) == list(range(1, 7))


def test_a_failing_fetch_does_not_strand_those_who_wait() -> None:
    pages, _ = pages_of(2)
    failed = threading.Event()

    def first_fails(ids: Sequence[int]) -> Iterator[Fetched]:
        if not failed.is_set():
            failed.set()
            time.sleep(0.1)
            raise OSError("the database went away")
        return pages.fetch(ids)

    pool = PagePool(first_fails, MIB)
    outcomes: list[str] = []

    def work(number: int) -> None:
        if number:
            failed.wait(10)
        try:
            outcomes.append(str(number_on(pool.pages([1])[0])))
        except OSError as error:
            outcomes.append(str(error))

    in_threads(3, work)
    assert sorted(outcomes) == ["1", "1", "the database went away"]


def test_many_threads_share_a_small_budget() -> None:
    # Each walk takes a quarter of the budget; eight at once would not fit, so some wait.
    pages = MemoryPages()
    rng = np.random.default_rng(1)
    w = rng.standard_normal((256, 256)).astype(np.float32)
    block_map = pages.add(w, (8, 256), per_page=1)
    size = max(map(len, pages.payloads.values()))
    pool = pages.pool(8 * size)
    pool._largest = size
    x = rng.standard_normal((2, 256)).astype(np.float32)
    want = matmul.matmul(block_map, pages.pool(), x)

    def work(number: int) -> None:
        for _ in range(20):
            assert np.array_equal(matmul.matmul(block_map, pool, x), want)
            assert pool.stats()["bytes"] <= 8 * size

    in_threads(8, work)
    assert pool.stats()["pinned_bytes"] == 0


def test_walks_inside_walks_do_not_wait_for_each_other() -> None:
    pages, size = pages_of(8)
    pool = pages.pool(16 * size)
    pool._loader.largest = size
    both = threading.Barrier(2)
    ids = np.arange(1, 9, dtype=np.int64)

    def work(number: int) -> None:
        for _, held, _ in pool.windows(ids[:2]):
            both.wait(10)
            for _, inner, _ in pool.windows(ids[2:4]):
                assert len(inner) == 2
            assert len(held) == 2

    in_threads(2, work)


# ---- forks --------------------------------------------------------------------------------------


def _child(pool: PagePool, held: list[Any], results: Any) -> None:
    stats = pool.stats()
    results.put((stats["pages"], stats["inserts"]))
    results.put([number_on(page) for page in held])
    results.put([number_on(page) for page in pool.pages([2, 5])])


def test_a_forked_child_starts_empty_and_works() -> None:
    pages, _ = pages_of(6)
    pool = pages.pool()
    held = pool.pages([1, 2])
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            pool.pages([3, 4])
            pool.drop([3])

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(5):
            results = context.SimpleQueue()
            child = context.Process(target=_child, args=(pool, held, results))
            child.start()
            child.join(60)
            assert child.exitcode == 0
            assert results.get() == (0, 0)
            assert results.get() == [1, 2]
            assert results.get() == [2, 5]
    finally:
        stop.set()
        thread.join()
    assert [number_on(page) for page in pool.pages([1, 2])] == [1, 2]
