# SPDX-License-Identifier: Apache-2.0
"""Who goes together: requests that wait become one batch, over all models.

When no prediction runs, a request goes at once, alone if it is alone. While one runs, others
gather; they go together when it is done, or into a thread of their own when there are `max_rows`
of them or the first has waited `max_wait` seconds. So nobody waits for company that may not come.

Lives in the event loop; batches run in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydedup.http.problems import busy

__all__ = ["Batcher"]

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[_Request, _Result]):
    request: _Request
    rows: int
    future: asyncio.Future[_Result]
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[_Request, _Result]):
    """Hands batches of requests to a function that runs in threads.

    Parameters
    ----------
    run
        Given requests, yields the number of each and its result or exception, in any order. A
        request is answered then, not when the batch is done.
    max_rows
        A batch takes requests until they have so many rows; a larger request goes alone.
    max_wait
        Seconds that a request waits at most while a thread is free.
    max_queue
        Requests that may wait; more are refused.
    threads
        Batches that run at once.
    observe
        Called with the number of requests and of rows of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[_Request]], Iterable[tuple[int, _Result | Exception]]],
        *,
        max_rows: int,
        max_wait: float,
        max_queue: int,
        threads: int,
        observe: Callable[[int, int], None],
    ) -> None:
        self._run = run
        self._max_rows = max_rows
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._threads = threads
        self._observe = observe
        self._waiting: deque[_Waiting[_Request, _Result]] = deque()
        self._rows = 0
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predict")

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many batches run."""
        return self._running

    async def submit(self, request: _Request, rows: int) -> _Result:
        """Return the result of a request, or raise what it raised.

        Raises HttpError 503 when too many wait already.
        """
        if len(self._waiting) >= self._max_queue:
            raise busy(f"{len(self._waiting)} requests wait already; try again soon", "queue_full")
        one = _Waiting[_Request, _Result](request, rows, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._rows += rows
        self._pump()
        try:
            return await one.future
        except asyncio.CancelledError:
            # It has timed out. If it still waits, nobody needs its result.
            if one in self._waiting:
                self._waiting.remove(one)
                self._rows -= one.rows
            raise

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- inside -------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self._waiting and self._running < self._threads:
            due = self._waiting[0].since + self._max_wait - time.monotonic()
            if self._running and self._rows < self._max_rows and due > 0:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(due, self._wake)
                return
            self._start(self._take())

    def _wake(self) -> None:
        self._timer = None
        self._pump()

    def _take(self) -> list[_Waiting[_Request, _Result]]:
        batch = [self._waiting.popleft()]
        rows = batch[0].rows
        while self._waiting and rows + self._waiting[0].rows <= self._max_rows:
            batch.append(self._waiting.popleft())
            rows += batch[-1].rows
        self._rows -= rows
        return batch

    def _start(self, batch: list[_Waiting[_Request, _Result]]) -> None:
        self._running += 1
        self._observe(len(batch), sum(one.rows for one in batch))
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._pool, self._work, loop, batch)
        done.add_done_callback(lambda finished: self._finish(batch, finished))

    def _work(
        self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting[_Request, _Result]]
    ) -> None:
        """Run a batch, in a thread."""
        for number, result in self._run([one.request for one in batch]):
            loop.call_soon_threadsafe(_settle, batch[number], result)

    def _finish(
        self, batch: list[_Waiting[_Request, _Result]], finished: asyncio.Future[None]
    ) -> None:
        self._running -= 1
        error = RuntimeError("stopped") if finished.cancelled() else finished.exception()
        if error is not None:
            for one in batch:
                _settle(one, error)
        self._pump()


def _settle(one: _Waiting[_Request, _Result], result: _Result | BaseException) -> None:
    if one.future.done():
        return  # it has timed out
    if isinstance(result, BaseException):
        one.future.set_exception(result)
    else:
        one.future.set_result(result)
