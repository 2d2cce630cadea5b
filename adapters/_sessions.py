# SPDX-License-Identifier: Apache-2.0
"""One connection per thread and process: opened when needed, closed when its thread has ended.

A thread that takes the rows of a statement one by one lends its connection to that, and uses
another one until the last row has come (`SessionPool.lend`).

Locks and their order: ``SessionPool._lock`` guards opening and closing, ``Session.lock`` one use
of a connection. A thread never opens a session while it holds a session's lock.

Forks. Idle sessions are closed before a fork, so that a child inherits none of them. What is in
a transaction at that moment stays open for the parent; the child drops it without touching it,
not even to free it, since closing would speak to the server, or release file locks, in the
parent's name. SQLite also keeps a table of its locks in memory: a child that inherits one for a
file believes in locks it does not hold, so for that file it is refused (``file`` below).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, Self

from pydedup.errors import StoreError, UnavailableError

__all__ = ["READ", "WRITE", "Connection", "Session", "SessionPool"]

READ: Final = "snapshot"
WRITE: Final = "transaction"
_STREAM: Final = "statement"

#: How long a fork waits for another thread's statement to end before it counts as busy.
FORK_WAIT_SECONDS: Final = 5.0


#: Seconds between tries to get a first session; a connection that was closed is soon another's.
FIRST_PAUSES: Final = (0.05, 0.1, 0.2, 0.4, 0.8)


class Connection(Protocol):
    """What is asked of a driver's connection here; it must commit each statement by itself."""

    def cursor(self) -> Any:
        """Return a DB-API cursor."""

    def close(self) -> None:
        """Close it."""


class Session:
    """A connection of one thread; ``with session.use():`` locks it for one use of it."""

    __slots__ = ("closed", "connection", "lock", "name", "pid", "scope")

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.lock = threading.RLock()
        self.pid = os.getpid()
        self.scope: str | None = None
        self.closed = False

    def use(self) -> Self:
        """Lock it, to be unlocked by leaving it as a context manager.

        Raises
        ------
        StoreError
            When it was closed, which only happens to a session in use when the adapter is closed
            or the process forked.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lock.release()

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        if not self.closed:
            self.closed = True
            # Nothing is lost when closing fails: what was not committed is rolled back.
            with contextlib.suppress(Exception):
                self.connection.close()


class _Anchor:
    """Lives in a thread's local storage, and so dies with the thread; its session follows."""

    __slots__ = ("pool_sessions", "session")

    def __init__(self, session: Session, pool_sessions: set[Session]) -> None:
        self.session = session
        self.pool_sessions = pool_sessions

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        # Takes no lock: this runs wherever memory is freed, also in a child just after a fork.
        if self.session.pid == getpid():
            self.pool_sessions.discard(self.session)
            self.session.close()


class SessionPool:
    """The sessions of one adapter.

    Parameters
    ----------
    open_connection
        Called in the thread that needs a connection.
    name
        What messages call the database.
    is_stale
        Asked before each use outside of a transaction; a stale connection is opened anew.
    file
        The database's file, where inheriting locks on it over a fork is dangerous.
    """

    def __init__(
        self,
        open_connection: Callable[[], Connection],
        *,
        name: str,
        is_stale: Callable[[Connection], bool] | None = None,
        file: str | None = None,
    ) -> None:
        self._open_connection = open_connection
        self._name = name
        self._is_stale = is_stale
        self._file = file
        self._sessions: set[Session] = set()
        self._local = threading.local()
        self._lock = threading.RLock()
        self._closed = False
        self.number = next(_NUMBERS)
        _POOLS.add(self)

    def acquire(self) -> Session:
        """Return this thread's session, locked.

        Raises
        ------
        StoreError
            When the adapter is closed, or was closed in the middle of this thread's transaction.
        UnavailableError
            In a child of a fork that inherited locks on the file.
        """
        while True:
            anchor: _Anchor | None = getattr(self._local, "anchor", None)
            session = self._open() if anchor is None else anchor.session
            if session.scope is not None:
                return session.use()
            session.lock.acquire()
            stale = self._is_stale
            if not session.closed and stale is not None and stale(session.connection):
                self.discard(session)
            if not session.closed:
                return session
            session.lock.release()
            self._local.anchor = None

    def acquire_first(self, crowded: type[Exception]) -> Session:
        """Return the first session, locked, as `acquire` does.

        Where the server gives no more, who had one until now waits for it to notice.

        Parameters
        ----------
        crowded
            What is raised then.
        """
        for pause in FIRST_PAUSES:
            with contextlib.suppress(crowded):
                return self.acquire()
            time.sleep(pause)
        return self.acquire()

    def acquire_open(self) -> Session | None:
        """Return this thread's session, locked; ``None`` when there is none, or it is stale.

        For those who lock sessions of several pools: to open one would be to wait for a lock that a
        fork may hold, which waits for theirs.
        """
        anchor: _Anchor | None = getattr(self._local, "anchor", None)
        if anchor is None:
            return None
        session = anchor.session
        if session.scope is not None:
            return session.use()
        session.lock.acquire()
        stale = self._is_stale
        if session.closed or (stale is not None and stale(session.connection)):
            session.lock.release()
            return None
        return session

    @contextlib.contextmanager
    def lend(self) -> Iterator[Session]:
        """Give this thread's session for a statement whose rows are taken one by one.

        The borrower locks it for each use, with ``session.use()``. What the thread does meanwhile,
        it does on another session: for a thread that is in no transaction or snapshot.

        Raises
        ------
        StoreError
            When the thread is in one.
        """
        with self.acquire() as session:
            if session.scope is not None:
                raise StoreError(f"the connection of a {session.scope} cannot be lent")
            anchor = self._local.anchor
            session.scope = _STREAM
            self._local.anchor = None
        try:
            yield session
        finally:
            session.scope = None
            # Of two sessions that a thread has come to have, one is closed, by its anchor's end.
            if not session.closed and getattr(self._local, "anchor", None) is None:
                self._local.anchor = anchor

    def scope(self) -> str | None:
        """Return what this thread is in: a transaction, a snapshot, or nothing."""
        anchor: _Anchor | None = getattr(self._local, "anchor", None)
        return None if anchor is None else anchor.session.scope

    def enter(self, scope: str) -> Session:
        """Return this thread's session for a transaction or snapshot.

        The caller sets its scope, where it is sure to clear it whatever happens.

        Raises
        ------
        StoreError
            When the thread is in one already.
        """
        with self.acquire() as session:
            if session.scope is not None:
                raise StoreError(f"a {scope} cannot begin inside of a {session.scope}")
            return session

    def _open(self) -> Session:
        with self._lock:
            if self._closed:
                raise StoreError(f"{self._name} is closed; open it again to use it")
            if self._file in _INHERITED:
                raise UnavailableError(
                    f"{self._name} was in a transaction when this process was forked, so its "
                    "locks cannot be trusted here; fork outside of transactions, or start the "
                    "process afresh (multiprocessing's 'spawn')"
                )
            session = Session(self._open_connection(), self._name)
            self._sessions.add(session)
            self._local.anchor = _Anchor(session, self._sessions)
            return session

    def discard(self, session: Session) -> None:
        """Close one session; its thread gets a new one when it next asks."""
        self._sessions.discard(session)
        session.close()

    def close(self) -> bool:
        """Close all sessions of this process; returns whether this was the first call."""
        with self._lock:
            first, self._closed = not self._closed, True
            for session in list(self._sessions):
                with session.lock:
                    self.discard(session)
        return first

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        for session in list(getattr(self, "_sessions", ())):
            if session.pid == getpid():
                session.close()

    # ---- forks --------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let no session be opened or closed until :meth:`resume`."""
        self._lock.acquire()

    def resume(self) -> None:
        """Undo :meth:`hold`."""
        self._lock.release()

    def close_idle(self) -> None:
        """Close what is in no transaction."""
        for session in list(self._sessions):
            if session.lock.acquire(timeout=FORK_WAIT_SECONDS):
                if session.scope is None:
                    self.discard(session)
                session.lock.release()

    def disown(self) -> None:
        """Forget, in a child, the sessions of its parent."""
        for session in self._sessions:
            session.closed = True
            # One reference more than will ever be given back: never freed, so never closed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.connection))
            if self._file is not None:
                _INHERITED.add(self._file)
        self._sessions = set()
        self._local = threading.local()
        self._lock = threading.RLock()


_POOLS: weakref.WeakSet[SessionPool] = weakref.WeakSet()
_NUMBERS = itertools.count()
#: Files on which this process inherited locks.
_INHERITED: set[str | None] = set()


class _Fork:
    """What happens around a fork, in the thread that forks."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: list[SessionPool] = []

    def before(self) -> None:
        self._lock.acquire()
        # In the order in which they were made: who holds a session of a shard may wait for its
        # coordinator, whose pool was made after that of the shard, and never the other way round.
        for pool in sorted(_POOLS, key=lambda pool: pool.number):
            pool.hold()
            self._held.append(pool)
            pool.close_idle()

    def in_parent(self) -> None:
        while self._held:
            self._held.pop().resume()
        self._lock.release()

    def in_child(self) -> None:
        self._lock = threading.RLock()
        while self._held:
            self._held.pop().disown()


_fork = _Fork()
os.register_at_fork(
    before=_fork.before, after_in_parent=_fork.in_parent, after_in_child=_fork.in_child
)
