# SPDX-License-Identifier: Apache-2.0
"""Threads beside the one that decides and writes (docs/architecture.md, "Workers").

Threads rather than processes: nearly all of the time of an add goes into the core, the driver of
the database and the file system, which let other threads run, and blocks need not be copied from
one process to another. What is handed over before all is matched is pure: its result does not
depend on when or where it runs, and it knows no database.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

from pydedup import config
from pydedup.arguments import as_count

__all__ = ["Task", "Workers", "worker_count"]

#: Workers unless somebody says how many: the decisions, which one makes, keep no more busy.
_ENOUGH = 4
_MOST = 256
#: An add of fewer bytes is over before threads have begun.
_WORTH_BYTES = 4 * 1024 * 1024

_Result = TypeVar("_Result")

# Work: called with the threads that the core may use for it, 0 for what it thinks best.
Work = Callable[[int], _Result]


def worker_count(workers: int | None, logical_bytes: int) -> int:
    """Return how many threads work on an add of so many bytes, the caller's included.

    Raises
    ------
    ArgumentError
        When ``workers`` is given and no integer from 1 to 256.
    """
    if workers is None:
        if logical_bytes < _WORTH_BYTES:
            return 1
        return min(_ENOUGH, config.threads())
    return as_count("workers", workers, least=1, most=_MOST)


class Task(Generic[_Result]):
    """Something that a worker does, or did, or that is done by who needs it before one began.

    Only one thread may ask for its result.
    """

    __slots__ = ("_future", "_work")

    def __init__(self, work: Work[_Result], future: Future[_Result] | None) -> None:
        self._work = work
        self._future = future

    def result(self) -> _Result:
        """Return what came of it, and raise what it raised; here and now if nobody has begun."""
        if self._future is None or self._future.cancel():
            done: Future[_Result] = Future()
            done.set_result(self._work(0))
            self._future = done
        return self._future.result()

    @property
    def is_ready(self) -> bool:
        """Whether it is done, and well."""
        future = self._future
        return (
            future is not None
            and future.done()
            and not future.cancelled()
            and future.exception() is None
        )

    def end(self) -> None:
        """Make sure that nobody works on it from now on, and raise nothing."""
        if self._future is not None and not self._future.cancel():
            wait([self._future])

    def drop(self) -> None:
        """Say that nobody needs it any more."""
        if self._future is not None:
            self._future.cancel()


class Workers:
    """``count`` workers, one of which is the caller's thread. A context manager.

    When it ends, what has not begun never does, and what has is waited for.

    Attributes
    ----------
    waiting
        A further thread for what waits for a disk most of the time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count - 1, "pydedup-add") if count > 1 else None
        self.waiting = ThreadPoolExecutor(1, "pydedup-add-waiting")  # begins with its first work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.waiting.shutdown(cancel_futures=True)
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to hand work to."""
        return self._threads is not None

    def submit(self, work: Work[_Result]) -> Task[_Result]:
        """Hand over work; without others it is done when its result is asked for."""
        if self._threads is None:
            return Task(work, None)
        return Task(work, self._threads.submit(work, 1))
