# SPDX-License-Identifier: Apache-2.0
"""Who may use how much of a pool's budget at the same time.

Half of the budget is for activations of predictions, a quarter for pages that walks pin, a quarter
for those that are read ahead of walks. A prediction takes its activations first, then pins pages;
walks wait for other walks alone, and who reads ahead waits for nobody: no circle of waiting.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from pydedup import _core

__all__ = ["Gate", "Reservation"]


class Reservation:
    """Bytes of a pool's budget for something else than pages, until released or forgotten."""

    def __init__(
        self, held: _core.Reservation, nbytes: int, give_back: Callable[[int], None]
    ) -> None:
        self.nbytes = nbytes
        # The finalizer is held by the interpreter, and must not keep the pool.
        self._free = weakref.finalize(self, _free, held, nbytes, weakref.WeakMethod(give_back))
        self._free.atexit = False

    def release(self) -> None:
        """Give the bytes back; once is enough."""
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _free(
    held: _core.Reservation, nbytes: int, give_back: weakref.WeakMethod[Callable[[int], None]]
) -> None:
    held.release()
    method = give_back()
    if method is not None:
        method(nbytes)


class Gate:
    """Lets users in as far as the sum of what they hold fits a limit.

    A thread that is inside already is always let in: making it wait for others, who may wait for
    it, could go on forever. Then the budget itself decides.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._inside: dict[int, int] = {}  # thread -> how often
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """What fits; who asks for more is let in alone."""
        return self._limit

    def narrow(self, limit: int) -> None:
        """Change the limit; who is inside stays."""
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait until there is room, and hold it."""
        thread = threading.get_ident()
        taken = -1
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        thread in self._inside
                        or self._used + min(amount, self._limit) <= self._limit
                    )
                )
                taken = min(amount, self._limit)
                self._inside[thread] = self._inside.get(thread, 0) + 1
                self._used += taken
            yield
        finally:
            if taken >= 0:
                with self._changed:
                    self._used -= taken
                    self._inside[thread] -= 1
                    if not self._inside[thread]:
                        del self._inside[thread]
                    self._changed.notify_all()

    def try_take(self, amount: int) -> bool:
        """Take room for as long as `give_back` is not called, if there is some; never waits."""
        with self._changed:
            if self._used + amount > self._limit:
                return False
            self._used += amount
            return True

    def give_back(self, amount: int) -> None:
        """Return what `try_take` took; on any thread."""
        with self._changed:
            self._used -= amount
            self._changed.notify_all()
