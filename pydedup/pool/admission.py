# SPDX-License-Identifier: Apache-2.0
"""Who may use how much of a pool's budget at the same time.

Half of the budget is for activations of predictions, a quarter for pages that walks pin, a quarter
for those that are read ahead of walks. A prediction takes its activations first, then pins pages;
walks wait for other walks alone, and who reads ahead waits for nobody: no circle of waiting.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from pydedup import _core
from pydedup.errors import BudgetError

__all__ = ["Gate", "Held", "Reservation", "Shadow", "Shares"]


# After so long who waits looks again by itself.
_AGAIN_SECONDS = 1.0


class Reservation:
    """Bytes of a pool's budget for something else than pages, until released or forgotten."""

    def __init__(
        self, held: _core.Reservation, nbytes: int, give_back: Callable[[int, int], None]
    ) -> None:
        self.nbytes = nbytes
        # The finalizer is held by the interpreter, and must not keep the pool.
        self._free = weakref.finalize(
            self, _free, held, nbytes, os.getpid(), weakref.WeakMethod(give_back)
        )
        self._free.atexit = False

    def release(self) -> None:
        """Give the bytes back; once is enough."""
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _free(
    held: _core.Reservation,
    nbytes: int,
    process: int,
    give_back: weakref.WeakMethod[Callable[[int, int], None]],
) -> None:
    held.release()
    method = give_back()
    if method is not None:
        method(nbytes, process)


class Held:
    """Room behind a gate, from the beginning of a ``with`` to its end; used once.

    A class, since this is entered several times in each prediction: a generator takes twice as
    long.
    """

    __slots__ = ("_amount", "_gate", "_is_in", "_thread", "_ticket", "_waits")

    def __init__(self, gate: Gate, amount: int, waits: bool) -> None:
        self._amount = amount
        self._waits = waits
        self._thread = threading.get_ident()  # a walk that is forgotten ends on any thread
        self._ticket = object()
        self._gate = gate
        self._is_in = False

    def __enter__(self) -> Self:
        try:
            self._is_in = True
            self._gate.enter(self._ticket, self._thread, self._amount, waits=self._waits)
        except BaseException:  # an interrupt may come when it is let in
            self._gate.leave(self._ticket)
            raise
        return self

    def take_more(self, amount: int) -> None:
        """Take more, without waiting, whether there is room or not; until this is left."""
        self._gate.add(self._ticket, amount)

    def __exit__(self, *error: object) -> None:
        self._gate.leave(self._ticket)
        self._is_in = False

    def __del__(self) -> None:
        try:
            is_in = self._is_in
        except AttributeError:  # an interrupt came as `__init__` began
            return
        if is_in:  # or as `__exit__` did
            self._gate.leave(self._ticket)


class Gate:
    """Lets users in, first come first served, as far as the sum of what they hold fits a limit.

    A thread that is inside already is always let in: making it wait for others, who may wait for
    it, could go on forever. Then the budget itself decides.

    ``changed`` is told what is used, one thread at a time, as long as that is more than ``quiet``,
    and once when it is no more.
    """

    def __init__(
        self, limit: int, changed: Callable[[int], None] | None = None, quiet: int = 0
    ) -> None:
        self._limit = limit
        self._quiet = quiet
        self._is_loud = False  # told of more than that
        self._taken = 0  # until it is given back
        self._holders: dict[object, tuple[int, int]] = {}  # ticket -> thread, amount
        self._waiting: deque[object] = deque()
        # Entered itself, and not by the condition, whose `__exit__` is Python's: an interrupt as
        # that begins would leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._told = changed

    @property
    def limit(self) -> int:
        """What fits; who asks for more is let in alone."""
        return self._limit

    def narrow(self, limit: int) -> None:
        """Change the limit; who is inside stays."""
        with self._lock:
            self._limit = limit
            self._tell()
            self._changed.notify_all()

    def hold(self, amount: int, *, waits: bool = True) -> Held:
        """Wait until there is room, unless told otherwise, and hold it."""
        return Held(self, amount, waits)

    def enter(self, ticket: object, thread: int, amount: int, *, waits: bool) -> None:
        """Let a thread in, until `leave` is called with the ticket; also where this is broken off.

        Who holds what is one entry each, made and taken out in one step: an interrupt may come at
        any other.
        """
        with self._lock:
            if waits and self._has_others(thread):
                self._wait_for(ticket, amount)
            self._holders[ticket] = thread, amount
            self._tell()

    def is_crowded(self, amount: int) -> bool:
        """Whether this thread would wait now for so much."""
        with self._lock:
            is_full = bool(self._waiting) or not self._has_room(amount)
            return is_full and self._has_others(threading.get_ident())

    def _has_others(self, thread: int) -> bool:
        # Where nobody is there is room, whatever the amount.
        return bool(self._holders or self._taken or self._waiting) and thread not in [
            one for one, _ in self._held()
        ]

    def add(self, ticket: object, amount: int) -> None:
        """Let a ticket that is inside have more."""
        with self._lock:
            thread, held = self._holders[ticket]
            self._holders[ticket] = thread, held + amount
            self._tell()

    def leave(self, ticket: object) -> None:
        """Give back what the ticket has; on any thread."""
        self._holders.pop(ticket, None)
        if self._is_loud or self._waiting:
            with self._lock:
                # Where `_wait_for` was broken off as it ended: all behind it would wait for ever.
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._tell()
                self._changed.notify_all()

    def _wait_for(self, ticket: object, amount: int) -> None:
        if not self._waiting and self._has_room(amount):
            return
        try:
            self._waiting.append(ticket)
            # Asked again at times: an interrupt may have kept who left from saying so.
            while not self._changed.wait_for(
                lambda: self._waiting[0] is ticket and self._has_room(amount), _AGAIN_SECONDS
            ):
                pass
        finally:  # the next one may fit as well, or be the first now
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    def _held(self) -> list[tuple[int, int]]:
        return list(self._holders.values())  # in one step: others leave meanwhile

    def _has_room(self, amount: int) -> bool:
        return self.used + min(amount, self._limit) <= self._limit

    def try_take(self, amount: int) -> bool:
        """Take room for as long as `give_back` is not called, if there is some; never waits."""
        with self._lock:
            if self.used + amount > self._limit:
                return False
            self._taken += amount
            try:
                self._tell()
            except BaseException:
                self._taken -= amount
                raise
            return True

    def give_back(self, amount: int) -> None:
        """Return what `try_take` took; on any thread."""
        with self._lock:
            self._taken -= amount
            self._tell()
            self._changed.notify_all()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Tell that nothing is in use, as long as this lasts; nobody comes meanwhile."""
        with self._lock:
            try:
                if self._told is not None:
                    self._told(0)
                yield
            finally:
                self._tell()

    @property
    def used(self) -> int:
        """What is held and taken now."""
        return self._taken + sum([amount for _, amount in self._held()])

    def _tell(self) -> None:
        if self._told is None:
            return
        # Before it is looked: who leaves from here on says so, after this.
        was_loud, self._is_loud = self._is_loud, True
        used = self.used
        if was_loud or used > self._quiet:
            self._told(used)
        if used <= self._quiet:
            self._is_loud = False


class Shadow:
    """Takes off a pool's budget what is used elsewhere beyond an allowance, as far as it goes."""

    def __init__(self, core: _core.BufferPool, allowance: int, most: Callable[[], int]) -> None:
        self._core = core
        self._allowance = allowance
        self._most = most  # bytes that may be taken off: pages need the rest
        self._held: _core.Reservation | None = None
        self._nbytes = 0

    def follow(self, used: int) -> None:
        """Make what is taken off fit what is used now."""
        beyond = used - self._allowance
        wanted = max(min(beyond, self._most()), 0) if beyond > 0 else 0
        if wanted == self._nbytes:
            return
        if self._held is not None:
            self._held.release()
        self._nbytes = wanted
        try:
            self._held = self._core.reserve(wanted)
        except BudgetError:  # pages in use leave less than that
            stats = self._core.stats()
            left = stats["budget_bytes"] - stats["pinned_bytes"] - stats["reserved_bytes"]
            self._nbytes = max(min(wanted, left), 0) // 2  # others pin meanwhile
            self._held = self._core.reserve(self._nbytes)


class Shares:
    """How a pool's budget is divided now. Safe between threads.

    Attributes
    ----------
    walks, ahead
        The gates of pages that walks pin, and of those that are read ahead of walks.
    """

    def __init__(self, budget: int, scratch: int, largest: Callable[[], int]) -> None:
        self._budget = budget
        self._scratch = scratch  # for activations, beside the budget
        self._largest = largest  # returns the bytes of the largest page so far
        self._reserved = 0

    def begin(self, core: _core.BufferPool) -> None:
        """Begin with nobody at work: at first, and with the new pool of a forked child.

        What was reserved before a fork is in the memory of the child as well.
        """
        self._core = core
        self.walks = Gate(self._budget // 4)
        self.ahead = Gate(self._budget // 4)
        shadow = Shadow(
            core,
            self._scratch,
            # A delta needs its page and that of its base at once.
            lambda: min(self._left // 2, self._left - 2 * self._largest()),
        )
        self._activations = Gate(self._scratch + self._budget // 2, shadow.follow, self._scratch)
        self._process = os.getpid()
        self._inherited, self._carried = self._reserved, core.reserve(0)
        self._widen(0)
        self._carry()

    def reserve(self, nbytes: int) -> Reservation:
        """Take bytes off the budget, for something else than pages that lives long.

        They come back when the result is released or gone, or is left as a context manager. Evicts
        what it must; raises BudgetError when that much is not to be had.
        """
        try:
            return self._reserve(nbytes)
        except BudgetError:
            # Activations count as far as there is room: what they will take is only foreseen.
            with self._activations.aside():
                return self._reserve(nbytes)

    @property
    def activation_bytes(self) -> int:
        """What activations may take together, in bytes."""
        return self._activations.limit

    def activations(self, nbytes: int, *, waits: bool = True) -> Held:
        """Count the activations of a prediction against the budget, waiting for others' to go.

        More than `activation_bytes` is let in alone, and counted as far as there is room. Who finds
        out on the way that it is more says so (`Held.take_more`).
        """
        return self._activations.hold(nbytes, waits=waits)

    def _reserve(self, nbytes: int) -> Reservation:
        reservation = Reservation(self._core.reserve(nbytes), nbytes, self._give_back)
        self._widen(-nbytes)
        return reservation

    def _give_back(self, nbytes: int, process: int) -> None:
        if process != self._process:
            self._inherited -= nbytes
            self._carry()
        self._widen(nbytes)

    @property
    def _left(self) -> int:
        return max(self._budget - self._reserved, 0)

    def _carry(self) -> None:
        self._carried.release()
        self._carried = self._core.reserve(min(self._inherited, self._budget))

    def _widen(self, nbytes: int) -> None:
        self._reserved -= nbytes
        left = self._left
        self.walks.narrow(left // 4)
        self.ahead.narrow(left // 4)
        self._activations.narrow(self._scratch + left // 2)
