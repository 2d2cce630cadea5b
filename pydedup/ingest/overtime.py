# SPDX-License-Identifier: Apache-2.0
"""Ending a call of the user's that takes too long, in the thread that makes it.

In another thread it could not run: what it uses may belong to the caller's, as torch's modes and
connections of SQLite do. So an exception is sent to that thread, as Ctrl-C sends one to the main
thread. Like that one, it waits for what runs in C. Deliberately not here: how long is too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["Overtime", "ended_after"]

R = TypeVar("R")

_LOG: Final = logging.getLogger("pydedup")
#: Who caught it and goes on is sent it again.
_PAUSE_SECONDS: Final = 5.0
#: How often it is looked whether the other thread has ended; it does so at once.
_LOOK_SECONDS: Final = 0.05


class Overtime(BaseException):
    """A call was ended. Not an Exception, which a loop of the user's may catch to go on."""


def ended_after(seconds: float, call: Callable[[], R], what: str) -> R:
    """Return what ``call`` returns.

    Raises Overtime when that took longer than ``seconds`` and was ended. Where it takes no notice,
    a warning is logged that says so of ``what``.
    """
    watch = _Watch(seconds, what)
    try:
        try:
            watch.start()
            return call()
        finally:
            watch.end()
    except Overtime:
        watch.end()  # it may have come while the watch was being ended
        raise


class _Watch:
    """What sends Overtime to the thread that made this, until it is ended.

    What is sent may come at any step of that thread, so that there is no lock here which it holds.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds, self._what = seconds, what
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._begun: list[bool] = []
        self._sent: list[bool] = []
        self._over: list[bool] = []
        self._finished: list[bool] = []
        self._wake, self._done, self._begins = (allocate_lock() for _ in range(3))
        for lock in (self._wake, self._done, self._begins):
            lock.acquire()

    def start(self) -> None:
        """Return when it watches."""
        start_new_thread(self.run, ())
        # Before it runs, CPython 3.11 takes a thread for the one that made it, and would send it
        # what the next watch sends to that one.
        self._begins.acquire()

    def run(self) -> None:
        self._begun.append(True)
        self._begins.release()
        wait = min(self._seconds, threading.TIMEOUT_MAX)
        while not self._over and not self._wake.acquire(timeout=wait):
            self._sent.append(True)
            _send(self._thread)
            wait = _PAUSE_SECONDS
            if len(self._sent) == 2:
                _LOG.warning(
                    "%s takes longer than %.0f seconds, and does not let itself be ended",
                    self._what,
                    self._seconds,
                )
        self._finished.append(True)
        self._done.release()

    def end(self) -> None:
        """Send nothing any more, and take what did not arrive."""
        self._over.append(True)
        with contextlib.suppress(RuntimeError):  # it was done before
            self._wake.release()
        # One that begins only now sees that it is over.
        while self._begun and not self._finished:
            self._done.acquire(timeout=_LOOK_SECONDS)
        if not self._sent:
            return
        # Taken back, what did not arrive would be looked for at every step from then on: CPython
        # 3.11 is slower for good, and hangs where a profiler is set.
        with contextlib.suppress(Overtime):
            while True:  # a thread that this one has just made may be sent it instead
                _send(self._thread)


def _send(thread: ctypes.c_ulong) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Overtime))
