# SPDX-License-Identifier: Apache-2.0
"""Connecting to MySQL and MariaDB so that Ctrl-C may come meanwhile.

The C extension of mysql-connector-python crashes where a signal's exception is raised while it
connects, and lets none through while it waits for a server that is silent. Exceptions of signals
are raised in the main thread alone, so another thread connects for that. Deliberately not here:
what is connected to (``mysql.py``).
"""

from __future__ import annotations

import contextlib
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import Any, Final

__all__ = ["interruptible"]

#: How often it is looked for signals: one just before a thread begins to wait does not wake it.
_LOOK_SECONDS: Final = 0.05


def interruptible(connect: Callable[[], Any]) -> Any:
    """Return the connection that ``connect`` makes; one that comes after an interrupt is closed."""
    if threading.current_thread() is not threading.main_thread():
        return connect()
    made: list[Any] = []
    failed: list[BaseException] = []
    given_up: list[bool] = []
    # No thread of `threading`: what interrupts that as it starts or locks may break its locks.
    over = allocate_lock()
    over.acquire()

    def work() -> None:
        try:
            made.append(connect())
        except BaseException as error:
            failed.append(error)
        over.release()
        if given_up:
            _close(made)

    try:
        try:
            start_new_thread(work, ())
        except RuntimeError:  # the system gives no more, or Python ends
            return connect()
        while not over.acquire(timeout=_LOOK_SECONDS):
            pass
    except BaseException:
        given_up.append(True)
        _close(made)
        raise
    if failed:
        raise failed.pop()
    return made.pop()


def _close(made: list[Any]) -> None:
    """Close a connection that nobody waits for any more, if there is one."""
    with contextlib.suppress(Exception):  # IndexError: there is none, or the other thread has it
        made.pop().close()
