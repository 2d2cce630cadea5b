# SPDX-License-Identifier: Apache-2.0
"""One connection per thread and process: opened when needed, closed when its thread has ended.

A thread that takes the rows of a statement one by one lends its connection to that, and uses
another one until the last row has come (`SessionPool.lend`). Where the server gives no more
connections, threads that only read take those over that others do not use at the moment.

Locks and their order: ``SessionPool._lock`` guards opening and closing, ``Session.lock`` one use
of a connection. A thread never opens a session while it holds a session's lock.

Forks. Idle sessions are closed before a fork, so that a child inherits none of them. What is in
a transaction at that moment stays open for the parent; the child drops it without touching it,
not even to free it, since closing would speak to the server, or release file locks, in the
parent's name. SQLite also keeps a table of its locks in memory: a child that inherits one for a
file believes in locks it does not hold, so that file is abandoned (``file`` below).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from pydedup.errors import StoreError, UnavailableError

from ._connection import Anchor, Connection, Session

__all__ = ["READ", "WRITE", "Connection", "Session", "SessionPool", "forks_held_off"]

READ: Final = "snapshot"
WRITE: Final = "transaction"
_STREAM: Final = "statement"

_LOG: Final = logging.getLogger("pydedup")

#: How long a fork waits for another thread's statement to end before it counts as busy.
FORK_WAIT_SECONDS: Final = 5.0


#: Seconds between tries to get a first session; a connection that was closed is soon another's.
FIRST_PAUSES: Final = (0.05, 0.1, 0.2, 0.4, 0.8)

#: How long a thread waits for another one's statement to end, to take its connection over.
BUSY_SECONDS: Final = 1.0
#: For so long after a server gave no more connections it is asked for one only when none is free.
CROWDED_SECONDS: Final = 5.0
#: What a thread leaves its connection alone for when others wait for one.
_TURN_SECONDS: Final = 0.001


class _Own(threading.local):
    """What holds the session of a thread, and dies with it."""

    anchor: Anchor | None = None


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
        The database's file, where SQLite's locks on it can be lost; see `abandon`.
    crowded
        What is raised where the server gives no more connections.
    shares
        Whether threads may then have each other's: for those who only read. A transaction that
        writes keeps its connection for long, and who waits for its end may need one.
    """

    def __init__(
        self,
        open_connection: Callable[[], Connection],
        *,
        name: str,
        is_stale: Callable[[Connection], bool] | None = None,
        file: str | None = None,
        crowded: type[Exception] = UnavailableError,
        shares: bool = False,
    ) -> None:
        self._open_connection = open_connection
        self._crowded = crowded
        self._shares = shares
        self._crowded_until = 0.0
        self._told = False  # that threads take turns
        self._wanted = 0  # threads that wait for the connection of another
        self._name = name
        self._is_stale = is_stale
        self._file = file
        self._sessions: set[Session] = set()
        self._local = _Own()
        self._lock = threading.RLock()
        self._closed = False
        self.number = next(_NUMBERS)
        _POOLS.add(self)

    def acquire(self) -> Session:
        """Return this thread's session, locked.

        Raises StoreError when the adapter is closed, or was closed in the middle of this thread's
        transaction; UnavailableError in a child of a fork that inherited locks on the file.
        """
        while True:
            anchor = self._local.anchor
            session = self._new() if anchor is None else anchor.session
            if session.scope is not None:
                return session.use()
            if self._wanted:
                time.sleep(_TURN_SECONDS)
            session.lock.acquire()
            stale = self._is_stale
            if not session.closed and stale is not None and stale(session.connection):
                self.discard(session)
            if not session.closed:
                return session
            session.lock.release()
            self._local.anchor = None

    def acquire_first(self) -> Session:
        """Return the first session, locked, as `acquire` does.

        Where the server gives no more, who had one until now waits for it to notice.
        """
        for pause in FIRST_PAUSES:
            with contextlib.suppress(self._crowded):
                return self.acquire()
            time.sleep(pause)
        return self.acquire()

    def acquire_open(self) -> Session | None:
        """Return this thread's session, locked; ``None`` when there is none, or it is stale.

        For those who lock sessions of several pools: to open one would be to wait for a lock that a
        fork may hold, which waits for theirs.
        """
        anchor = self._local.anchor
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
        it does on another session: for a thread that is in no transaction or snapshot. Raises
        StoreError when the thread is in one.
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
            if not session.closed and self._local.anchor is None:
                self._local.anchor = anchor

    def has_own(self) -> bool:
        """Whether this thread has a connection, though it may be lost by now."""
        anchor = self._local.anchor
        return anchor is not None and not anchor.session.closed

    def scope(self) -> str | None:
        """Return what this thread is in: a transaction, a snapshot, or nothing."""
        anchor = self._local.anchor
        return None if anchor is None else anchor.session.scope

    @contextlib.contextmanager
    def keep(self) -> Iterator[Session]:
        """Give this thread's session, which no other thread takes over meanwhile."""
        kept = None
        try:
            with self.acquire() as session:
                session.kept += 1
                kept = session
            yield session
        finally:
            if kept is not None:
                kept.kept -= 1

    @contextlib.contextmanager
    def enter(self, scope: str) -> Iterator[Session]:
        """Give this thread's session for a transaction or snapshot, which is its scope meanwhile.

        Raises StoreError when the thread is in one already.
        """
        with self.keep() as session:
            session.check_free(scope)
            try:
                session.scope = scope
                yield session
            finally:
                session.scope = None

    def _new(self) -> Session:
        """Return a session for this thread, which has none: a new one, or one taken over."""
        if time.monotonic() < self._crowded_until:
            session = self._take_over()
            if session is not None:
                return session
        try:
            return self._open()
        except self._crowded as error:
            session = self._take_over() if self._shares else None
            if session is None:
                raise
            with self._lock:
                told, self._told = self._told, True
                self._crowded_until = time.monotonic() + CROWDED_SECONDS
            if not told:
                _LOG.warning("threads take turns with the connections there are: %s", error)
            return session

    def _take_over(self) -> Session | None:
        """Return, as this thread's, a session that others do not use any more.

        ``None`` when none becomes free in time, or there are none but those this thread has lent.
        """
        end, me = time.monotonic() + BUSY_SECONDS, threading.get_ident()
        with self._lock:
            self._wanted += 1
        try:
            while True:
                with self._lock:
                    others = [one for one in list(self._sessions) if one.thread != me]
                    session = self._first_free(others)
                if session is not None:
                    return session
                if not others or time.monotonic() > end:
                    return None
                # Whose statement ends next; who is in a snapshot does not lock it all the time.
                if others[0].lock.acquire(timeout=_TURN_SECONDS):
                    others[0].lock.release()
                    time.sleep(_TURN_SECONDS / 2)
        finally:
            with self._lock:
                self._wanted -= 1

    def _first_free(self, others: Iterable[Session]) -> Session | None:
        """Return, as this thread's, the first of the sessions that is not in use."""
        for other in others:
            if other.lock.acquire(blocking=False):
                with other:
                    session = self._moved(other)
                if session is not None:
                    return session
        return None

    def _moved(self, other: Session) -> Session | None:
        """Return the connection of a locked session as this thread's, if it is not in use."""
        if other.scope is not None or other.kept or other.closed:
            return None
        # That thread finds it closed, and gets another.
        other.closed = True
        self._sessions.discard(other)
        return self._mine(Session(other.connection, self._name))

    def _mine(self, session: Session) -> Session:
        self._sessions.add(session)
        self._local.anchor = Anchor(session, self._sessions)
        return session

    def _open(self) -> Session:
        with self._lock:
            if self._closed:
                raise StoreError(f"{self._name} is closed; open it again to use it")
            if self._file in _ABANDONED:
                raise UnavailableError(f"{self._name} {_ABANDONED[self._file]}")
            return self._mine(Session(self._open_connection(), self._name))

    def discard(self, session: Session) -> None:
        """Close one session; its thread gets a new one when it next asks."""
        self._sessions.discard(session)
        session.close()

    @contextlib.contextmanager
    def emptied(self) -> Iterator[bool]:
        """Close what nobody uses at the moment, and let no session be opened meanwhile.

        Gives whether none is left. Each thread gets a new one when it next asks.
        """
        with self._lock:
            for session in list(self._sessions):
                if session.lock.acquire(blocking=False):
                    with session:
                        if session.scope is None and not session.kept:
                            self.discard(session)
            yield not self._sessions

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

    def abandon(self, why: str) -> None:
        """Leave all sessions as they are, and open none for this file in this process any more.

        For locks that cannot be trusted: to close a session would act on them. ``why`` follows the
        name of the database in the message of UnavailableError.
        """
        with self._lock:
            for session in self._sessions:
                session.closed = True
                # One reference more than will ever be given back: never freed, so never closed.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.connection))
            if self._file is not None:
                _ABANDONED[self._file] = why
            self._sessions = set()
            self._local = _Own()

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
        self._lock = threading.RLock()
        self._wanted = 0  # those who wait are threads of the parent
        if self._sessions:
            self.abandon(_FORKED)


_POOLS: weakref.WeakSet[SessionPool] = weakref.WeakSet()
_NUMBERS = itertools.count()
#: Files on which this process has, or had, locks that it cannot trust, and why.
_ABANDONED: dict[str | None, str] = {}
_FORKED: Final = (
    "was in a transaction when this process was forked, so its locks cannot be trusted here; fork "
    "outside of transactions, or start the process afresh (multiprocessing's 'spawn')"
)


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

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """Let no thread fork as long as this lasts, which is to be short."""
        with self._lock:
            yield

    def in_parent(self) -> None:
        while self._held:
            self._held.pop().resume()
        self._lock.release()

    def in_child(self) -> None:
        self._lock = threading.RLock()
        while self._held:
            self._held.pop().disown()


_fork = _Fork()
#: For what is done with a driver without a session: a child may inherit its locks, never released.
forks_held_off = _fork.held_off
os.register_at_fork(
    before=_fork.before, after_in_parent=_fork.in_parent, after_in_child=_fork.in_child
)
