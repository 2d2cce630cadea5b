# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP: they end a command in order, or at once where it cannot notice.

Python runs what it does about a signal between two steps of its own, and none comes while a driver
waits in C for a server that is silent. Deliberately not here: what is said of a command that was
interrupted (``app.py``).
"""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pydedup.cli.errors import Exit, warn
from pydedup.errors import with_causes

__all__ = ["Signals", "Terminated", "interruptible"]

#: For so long a command may take to notice Ctrl-C before something is said.
_PATIENCE_SECONDS = 1.0
_WAITING = "waiting for what is under way, such as an answer; Ctrl-C once more ends it at once"
#: Takes away a progress bar, which hides the cursor.
_NO_BAR = "\r\x1b[K\x1b[?25h"


#: What else than Ctrl-C ends a command: on demand, and when its terminal is closed.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """One of the signals came that end a command, ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Those that came while a command ran, and what is raised for them."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.handler = self._take  # the same object whenever it is asked for
        self._undisturbed_until = 0.0

    def of(self, error: BaseException) -> int:
        """Return the signal that an exception comes of, in whatever guise; 0 of another one.

        Libraries have one of their own for all that a signal raises: Ray's core an interrupt,
        compiled modules an ImportError, SQLite an error of the function that it called.
        """
        if not self.came and not isinstance(error, KeyboardInterrupt):
            return 0
        _let_go(error)
        if isinstance(error, Terminated):
            return error.number
        return self.came[-1] if self.came else signal.SIGINT

    def end(self) -> None:
        """Raise nothing any more: what was done is told by now, and so is that it was not."""
        self._undisturbed_until = math.inf

    def strike_again(self, number: int) -> None:
        """Send a signal once more whose exception Python dropped: it came within a callback.

        Not by a `threading.Timer`, of whose locks the main thread may hold one just then.
        """
        self._undisturbed_until = 0.0
        _thread.start_new_thread(self._strike, (number,))

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        now = time.monotonic()
        if now >= self._undisturbed_until:
            self._undisturbed_until = now + _PATIENCE_SECONDS
            raise Terminated(number)

    def _strike(self, number: int) -> None:
        time.sleep(0.01)
        if signal.getsignal(number) is self.handler:  # it has not ended by itself
            signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextlib.contextmanager
def interruptible(tell: Callable[[], None], *, to_the_end: bool = False) -> Iterator[Signals]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does: what it wrote beside is taken away.

    None is lost, nor shown as a traceback, where it comes when Python ignores exceptions, nor is
    what an object raises that it left half made. Others that come within a second are ignored,
    while it tidies up: a terminal that is closed may send two, and who is impatient many. Where a
    first Ctrl-C is not noticed, a second one ends the process, when ``tell`` has said so.

    With ``to_the_end``, the process has nothing to do afterwards but to end, and Ctrl-C ends it
    without a traceback.
    """
    signals = Signals()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield signals
        return
    before = sys.unraisablehook

    def dropped(told: Any) -> None:
        if isinstance(told.exc_value, KeyboardInterrupt):
            signals.strike_again(getattr(told.exc_value, "number", signal.SIGINT))
        elif not signals.came:
            before(told)

    # Not where it is ignored, as `nohup` has it.
    taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    sys.unraisablehook = dropped
    try:
        for number in taken:
            signal.signal(number, signals.handler)
        # Not where the shell has Ctrl-C ignored, as of what runs in the background.
        is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        afterwards = signal.SIG_DFL if to_the_end else signal.default_int_handler
        with _Impatience(tell, signals, afterwards) if is_ours else contextlib.nullcontext():
            try:
                yield signals
            finally:
                signals.end()
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = before


def _let_go(error: BaseException) -> None:
    """Free what the interrupted calls held, while what its ``__del__`` raises is not shown."""
    for one in with_causes(error):
        traceback.clear_frames(one.__traceback__)


class _Impatience:
    """Ends the process at the second Ctrl-C, while the main thread has not noticed the first.

    A signal writes its number to a pipe, whatever the main thread does; another thread reads it.
    ``signals`` are those that the main thread has noticed; ``afterwards`` handles later ones.
    """

    def __init__(self, tell: Callable[[], None], signals: Signals, afterwards: Any) -> None:
        self._tell = tell
        self._signals = signals
        self._afterwards = afterwards
        self._ended = _thread.allocate_lock()
        self._ended.acquire()

    def __enter__(self) -> None:
        self._numbers, self._written = os.pipe()
        os.set_blocking(self._written, False)
        # No thread of `threading`: what interrupts that as it starts may break its locks.
        _thread.start_new_thread(self._watch, ())
        signal.signal(signal.SIGINT, self._signals.handler)
        self._before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._before)
        signal.signal(signal.SIGINT, self._afterwards)
        self._ended.release()
        os.close(self._written)

    def _watch(self) -> None:
        try:
            self._look()
        finally:
            os.close(self._numbers)

    def _look(self) -> None:
        noticed = 0
        while self._struck() and not self._ended.acquire(timeout=_PATIENCE_SECONDS):
            # A server that is stopped by Ctrl-C sees to it itself meanwhile.
            is_ours = signal.getsignal(signal.SIGINT) is self._signals.handler
            if is_ours and len(self._signals.came) == noticed:
                warn(_WAITING)
                if self._struck() and len(self._signals.came) == noticed:
                    if sys.stderr is not None and sys.stderr.isatty():
                        sys.stderr.write(_NO_BAR)
                    self._tell()
                    os._exit(Exit.INTERRUPTED)
            noticed = len(self._signals.came)

    def _struck(self) -> bool:
        """Wait for Ctrl-C; False when the command has ended."""
        while number := os.read(self._numbers, 1):
            if number[0] == signal.SIGINT:
                return True
        return False
