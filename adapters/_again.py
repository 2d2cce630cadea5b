# SPDX-License-Identifier: Apache-2.0
"""Reading again where a server's connection was lost: what PostgreSQL and MySQL have in common."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from ._base import DbApiBase
from ._errors import CancelledError, ConnectionLostError, CrowdedError

__all__ = ["AGAIN_SECONDS", "ReadsAgain"]

R = TypeVar("R")

#: From its first failure on a read is tried again for so long, with pauses that double.
AGAIN_SECONDS: Final = 10.0
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0
#: Whoever asks so soon after a server was waited for in vain does not wait again, but asks: an
#: operation tidies up behind its failure, or goes on with another part, and is to end within one
#: wait; and by now the server may be back, for other threads as well.
IN_VAIN_SECONDS: Final = 1.0


class ReadsAgain(DbApiBase):
    """Outside of transactions, reading survives lost connections, and conflicts.

    Such as of a standby that replays what a vacuum deleted. What begins waits for the server, too.
    """

    #: When it was last waited for in vain.
    _gave_up_at = -math.inf

    def _again(self, read: Callable[[], R]) -> R:
        """Return what ``read`` returns; it may fail for a while, but in a transaction."""
        if self._pool.scope() is not None:
            return read()
        end = pause = 0.0
        began, had_connection = time.monotonic(), self._pool.has_own()
        while True:
            try:
                if pause:
                    time.sleep(pause)
                return read()
            except KeyboardInterrupt:
                if pause:  # nor does what tidies up behind it wait anew
                    self._gave_up_at = time.monotonic()
                raise
            except (ConnectionLostError, CancelledError) as error:
                now = time.monotonic()
                # Where connections are few, one comes free sooner or later.
                is_away = not isinstance(error, CancelledError | CrowdedError)
                if is_away and not end and 0 <= began - self._gave_up_at < IN_VAIN_SECONDS:
                    if not had_connection:
                        raise
                    had_connection = False
                    # That an old connection is lost tells nothing of the server; one that did
                    # work for a while, that it had come back.
                    if now - began < IN_VAIN_SECONDS:
                        continue
                end = end or now + AGAIN_SECONDS  # a host that fell silent took long to fail
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS) or FIRST_PAUSE_SECONDS
                if now + pause > end:
                    if is_away:
                        self._gave_up_at = now
                    raise

    def _ask(self, sql: str, parameters: Sequence[Any], result: Callable[[Any], R]) -> R:
        """Run a SELECT, on a new connection where the old one is lost."""
        return self._again(lambda: super(ReadsAgain, self)._ask(sql, parameters, result))

    def _connected(self) -> None:
        """Open this thread's connection where there is none, or it is lost."""
        with self._pool.acquire():
            pass

    @contextlib.contextmanager
    def _scope(self, scope: str, begin: Sequence[str]) -> Iterator[None]:
        self._again(self._connected)
        with super()._scope(scope, begin):
            yield
