# SPDX-License-Identifier: Apache-2.0
"""A connection of one thread: locked for each use, closed when its thread has ended.

Which thread has which one is up to ``_sessions``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

from pydedup.errors import StoreError

__all__ = ["Anchor", "Connection", "Session", "closed_on_error"]


class Connection(Protocol):
    """What is asked of a driver's connection here; it must commit each statement by itself."""

    def cursor(self) -> Any:
        """Return a DB-API cursor."""

    def close(self) -> None:
        """Close it."""


class _Closeable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def closed_on_error(opened: _Closeable) -> Iterator[None]:
    """Close what was opened when what is done with it fails."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


class Session:
    """A connection of one thread; ``with session.use():`` locks it for one use of it."""

    __slots__ = ("closed", "connection", "kept", "lock", "name", "pid", "scope", "thread")

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.lock = threading.RLock()
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.scope: str | None = None
        #: While it is not 0, no other thread gets the connection.
        self.kept = 0
        self.closed = False

    def use(self) -> Self:
        """Lock it, to be unlocked by leaving it as a context manager.

        Raises StoreError when it was closed, which only happens to a session in use when the
        adapter is closed or the process forked.
        """
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise StoreError(
                f"the connection to {self.name} was closed in the middle of a {self.scope}; "
                "nothing of it was kept"
            )
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def check_free(self, scope: str) -> None:
        """Raise StoreError where its thread is in a transaction or snapshot already."""
        if self.scope is not None:
            raise StoreError(f"a {scope} cannot begin inside of a {self.scope}")

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        if not self.closed:
            self.closed = True
            # Nothing is lost when closing fails: what was not committed is rolled back.
            with contextlib.suppress(Exception):
                self.connection.close()


class Anchor:
    """Lives in a thread's local storage, and so dies with the thread; its session follows."""

    __slots__ = ("pool_sessions", "session")

    def __init__(self, session: Session, pool_sessions: set[Session]) -> None:
        self.session = session
        self.pool_sessions = pool_sessions

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        # Waits for no lock: this runs wherever memory is freed, also in a child just after a fork.
        # One that is held is of a daemon thread, in a statement while the interpreter ends: drivers
        # crash where its connection is closed under it.
        if self.session.pid == getpid() and self.session.lock.acquire(blocking=False):
            with self.session:
                self.pool_sessions.discard(self.session)
                self.session.close()
