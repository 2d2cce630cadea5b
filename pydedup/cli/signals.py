# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP: they end a command in order, or at once where it cannot notice.

Python runs what it does about a signal between two steps of its own, and none comes while a driver
waits in C for a server that is silent. Deliberately not here: what is said of a command that was
interrupted (``app.py``).
"""

from __future__ import annotations

import _thread
import contextlib
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

__all__ = ["Terminated", "interruptible"]

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


@contextlib.contextmanager
def interruptible(tell: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does: what it wrote beside is taken away.

    None is lost, nor shown as a traceback, where it comes when Python ignores exceptions, nor is
    what an object raises that it left half made. Where a first Ctrl-C is not noticed, a second one
    ends the process, when ``tell`` has said so.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = sys.unraisablehook

    def dropped(told: Any) -> None:
        if isinstance(told.exc_value, KeyboardInterrupt):
            number = getattr(told.exc_value, "number", signal.SIGINT)
            _thread.start_new_thread(_strike_again, (number,))
        elif not came:
            before(told)

    # Not where it is ignored, as `nohup` has it.
    taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    came: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated(number)

    for number in taken:
        signal.signal(number, terminate)
    sys.unraisablehook = dropped
    try:
        # Not where the shell has Ctrl-C ignored, as of what runs in the background.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with _Impatience(tell, came):
                yield
        else:
            yield
    except KeyboardInterrupt as error:
        _let_go(error)
        # Ray's core has one of its own for all that a signal raises.
        if came and not isinstance(error, Terminated):
            raise Terminated(came[-1]) from error
        raise
    finally:
        sys.unraisablehook = before
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _let_go(error: BaseException | None) -> None:
    """Free what the interrupted calls held, while what its ``__del__`` raises is not shown."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _strike_again(number: int) -> None:
    """Send a signal once more, whose exception Python dropped: it came within a weakref's callback.

    Not by a `threading.Timer`, of whose locks the main thread may hold one just then.
    """
    time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


class _Impatience:
    """Ends the process at the second Ctrl-C, while the main thread has not noticed the first.

    A signal writes its number to a pipe, whatever the main thread does; another thread reads it.
    What the main thread has noticed goes to ``came``.
    """

    def __init__(self, tell: Callable[[], None], came: list[int]) -> None:
        self._tell = tell
        self._came = came
        self._handler = self._notice  # the same object whenever it is asked for
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self._numbers, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        signal.signal(signal.SIGINT, self._handler)
        self._before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ended.set()
        os.close(self._written)
        self._thread.join()
        os.close(self._numbers)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        signal.default_int_handler(number, frame)

    def _watch(self) -> None:
        noticed = 0
        while self._struck() and not self._ended.wait(_PATIENCE_SECONDS):
            # A server that is stopped by Ctrl-C sees to it itself meanwhile.
            is_ours = signal.getsignal(signal.SIGINT) is self._handler
            if is_ours and len(self._came) == noticed:
                warn(_WAITING)
                if self._struck() and len(self._came) == noticed:
                    if sys.stderr is not None and sys.stderr.isatty():
                        sys.stderr.write(_NO_BAR)
                    self._tell()
                    os._exit(Exit.INTERRUPTED)
            noticed = len(self._came)

    def _struck(self) -> bool:
        """Wait for Ctrl-C; False when the command has ended."""
        while number := os.read(self._numbers, 1):
            if number[0] == signal.SIGINT:
                return True
        return False
