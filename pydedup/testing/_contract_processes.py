# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for several processes: writers at once, creators at once, forks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.errors import StoreError, UnavailableError
from pydedup.testing._contract_base import (
    META,
    PATIENCE_SECONDS,
    ContractBase,
    add_pages,
    add_random_pages,
    checksum_of,
    in_thread,
)

__all__ = ["ProcessesContract"]


#: The exit status of a process that is refused because another one has the database open.
REFUSED = 77


def _write(url: str, number: int, rounds: int) -> None:
    try:
        adapter = registry.connect(url, mode="a")
    except UnavailableError as error:
        assert "another process" in str(error)  # noqa: PT017 - in a child
        sys.exit(REFUSED)
    adapter.create_schema(META)
    for i in range(rounds):
        with adapter.transaction():
            assert adapter.bump_epoch()
            (page,) = adapter.insert_pages([(checksum_of(i), os.urandom(5000))], state=LIVE)
            adapter.insert_blocks([(checksum_of(number), page, 0, None)])
    adapter.close()


def in_fork(function: Callable[[], Any]) -> Any:
    """Return what the function returns (as JSON) in a forked child that ends without clean-up."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # here pytest must not see what happens
        status = 1
        signal.alarm(int(PATIENCE_SECONDS))  # rather than hang, and its parent with it
        try:
            os.close(reading)
            try:
                result: tuple[str, Any] = ("ok", function())
            except BaseException as error:  # told to the parent
                result = (type(error).__name__, str(error))
            with os.fdopen(writing, "w") as pipe:
                json.dump(result, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    kind, result = json.loads(told)
    if kind == "UnavailableError":
        raise UnavailableError(result)
    assert kind == "ok", f"{kind}: {result}"
    return result


def in_child(adapter: Adapter, function: Callable[[], Any], expected: Any) -> bool:
    """Call the function in a forked child, which must return that; whether it could.

    A child is refused, and told, where the database takes one process at a time.
    """
    try:
        assert in_fork(function) == expected
    except UnavailableError as error:
        assert "fork" in str(error)  # noqa: PT017 - it is not demanded
        assert not adapter.capabilities.many_processes
        return False
    return True


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class ProcessesContract(ContractBase):
    """Processes write one after the other, and a fork shares no connection."""

    def test_processes_create_and_write_at_once(self, url: str) -> None:
        """One schema comes out, and no publish is lost.

        Where the database takes one process at a time, the others are refused, and told.
        """
        spawn = multiprocessing.get_context("spawn")

        def run(numbers: Sequence[int], rounds: int) -> list[int | None]:
            workers = [spawn.Process(target=_write, args=(url, i, rounds)) for i in numbers]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(PATIENCE_SECONDS)
            return [worker.exitcode for worker in workers]

        rounds = 10
        codes = run(range(3), rounds)
        with contextlib.closing(self.open(url)) as adapter:
            if adapter.capabilities.many_processes:
                assert codes == [0, 0, 0]
            else:
                assert set(codes) <= {0, REFUSED}
                assert run([3], rounds) == [REFUSED]
            wrote = [number for number, code in enumerate(codes) if code == 0]
            assert adapter.epoch() == len(wrote) * rounds
            assert META.items() <= adapter.meta().items()
            assert adapter.count_blocks() == len(wrote) * rounds
            for number in wrote:
                assert len(adapter.find_blocks([checksum_of(number)])) == rounds
            assert adapter.integrity_errors() == []
        assert run([3], rounds) == [0]

    def test_threads_create_at_once(self, url: str) -> None:
        """Adapters of one process do not get in each other's way either."""
        failures: list[BaseException] = []
        barrier = threading.Barrier(4)

        def create() -> None:
            try:
                barrier.wait(PATIENCE_SECONDS)
                adapter = self.open(url)
                with adapter.transaction():
                    adapter.bump_epoch()
                adapter.close()
            except BaseException as error:  # shown below
                failures.append(error)

        threads = [threading.Thread(target=create) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not failures, failures
        with contextlib.closing(self.open(url)) as adapter:
            assert adapter.epoch() == 4

    def test_a_child_can_read_and_write(self, adapter: Adapter) -> None:
        """After a fork both go on, each with connections of its own."""
        ids = add_pages(adapter, 3)
        in_thread(adapter.models)

        def child() -> int:
            assert len(list(adapter.read_pages(ids))) == 3
            add_pages(adapter, 2)
            with adapter.transaction():
                adapter.bump_epoch()
            assert in_thread(adapter.epoch) == 1
            return adapter.count_blocks()

        written = in_child(adapter, child, 10)
        assert adapter.epoch() == (1 if written else 0)
        add_pages(adapter, 1)
        blocks = 12 if written else 8
        assert adapter.count_blocks() == blocks
        in_child(adapter, adapter.count_blocks, blocks)
        assert adapter.integrity_errors() == []

    def test_a_child_may_close(self, adapter: Adapter) -> None:
        """Closing in a child closes nothing of the parent's."""
        add_pages(adapter, 1)

        def child() -> int:
            count = adapter.count_blocks()
            adapter.close()
            return count

        in_child(adapter, child, 2)
        with adapter.snapshot():
            assert adapter.count_blocks() == 2

    def test_a_fork_in_the_middle_of_reading(self, adapter: Adapter) -> None:
        """The parent goes on as if nothing was; a child that does gets pages, or an error."""
        pages = add_random_pages(adapter, 40, size=256 << 10)
        reading = adapter.read_pages(list(pages))
        seen = dict(islice(reading, 5))

        def child() -> int:
            try:
                assert (seen | dict(reading)) == pages
            except StoreError as error:  # UnavailableError is one
                assert "fork" in str(error) or "closed" in str(error)  # noqa: PT017 - allowed
            return len(adapter.page_rows())

        in_child(adapter, child, 40)
        in_child(adapter, lambda: len(adapter.page_rows()), 40)
        assert (seen | dict(reading)) == pages

    def test_a_fork_beside_a_busy_thread(self, adapter: Adapter) -> None:
        """A thread that reads all the time notices nothing."""
        ids = add_pages(adapter, 5)
        failures: list[BaseException] = []
        done = threading.Event()

        def read() -> None:
            try:
                while not done.is_set():
                    assert len(list(adapter.read_pages(ids))) == 5
            except BaseException as error:  # shown below
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        seconds = []
        try:
            for _ in range(5):
                started = time.monotonic()
                in_child(adapter, adapter.count_blocks, 10)
                seconds.append(time.monotonic() - started)
        finally:
            done.set()
            thread.join(PATIENCE_SECONDS)
        assert not failures, failures
        assert max(seconds) < 4.5, f"forks waited for the other thread: {seconds}"

    @pytest.mark.parametrize("who", ["this thread", "another thread"])
    def test_a_fork_within_a_transaction(self, adapter: Adapter, who: str) -> None:
        """The parent's transaction is its own; a child reads what is committed, or is refused."""
        add_pages(adapter, 1)
        begun, forked = threading.Event(), threading.Event()

        def child() -> int:
            return adapter.count_blocks()

        def fork() -> None:
            try:
                count = in_fork(child)
            except UnavailableError as error:
                assert "fork" in str(error)  # noqa: PT017 - allowed, not demanded
            else:
                assert count == 2

        def write() -> None:
            with adapter.transaction():
                (page,) = adapter.insert_pages([(checksum_of(5), b"p")], state=LIVE)
                adapter.insert_blocks([(checksum_of(5), page, 0, None)])
                begun.set()
                if who == "this thread":
                    fork()
                else:
                    assert forked.wait(PATIENCE_SECONDS)

        if who == "this thread":
            write()
        else:
            thread = threading.Thread(target=write)
            thread.start()
            assert begun.wait(PATIENCE_SECONDS)
            fork()
            forked.set()
            thread.join(PATIENCE_SECONDS)
        assert adapter.count_blocks() == 3
        assert adapter.integrity_errors() == []
        in_child(adapter, adapter.count_blocks, 3)

    def test_a_transaction_left_in_a_child_commits_nothing(self, adapter: Adapter) -> None:
        """A child that runs to the end of its parent's block gets an error, and changes nothing."""
        child = -1
        try:
            with adapter.transaction():
                adapter.put_job("mine", "", "", "")
                child = os.fork()
                if child:
                    _, status = os.waitpid(child, 0)
                    assert adapter.jobs(), "the child ended the transaction of its parent"
        except StoreError:
            if child == 0:
                os._exit(7)
            raise
        finally:
            if child == 0:
                os._exit(0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert [job[0] for job in adapter.jobs()] == ["mine"]
