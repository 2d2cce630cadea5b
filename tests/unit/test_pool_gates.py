# SPDX-License-Identifier: Apache-2.0
"""Gates of a pool, where an interrupt or another thread comes at the worst moment."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from pydedup.pool.admission import Gate


class _Interrupted(deque[object]):
    """Those who wait; an interrupt comes as the first of them is to be taken out."""

    is_due = True

    def __contains__(self, ticket: object) -> bool:
        if self.is_due and threading.current_thread() is threading.main_thread():
            self.is_due = False
            raise KeyboardInterrupt
        return super().__contains__(ticket)


def test_who_is_interrupted_at_the_end_of_waiting_is_not_waited_for() -> None:
    """All behind it waited for ever."""
    gate = Gate(1)
    gate._waiting = _Interrupted()
    holder = object()
    gate.enter(holder, -1, 1, waits=True)  # of another thread

    def leave() -> None:
        while not gate._waiting:
            pass
        gate.leave(holder)

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(KeyboardInterrupt), gate.hold(1):
        pass
    thread.join()
    assert not gate._waiting
    assert gate.used == 0


class _Left(Gate):
    """Another thread leaves as it is looked at what is used."""

    leaving: threading.Thread | None = None

    def _held(self) -> list[tuple[int, int]]:
        held, leaving = super()._held(), self.leaving
        if leaving is not None:
            self.leaving = None
            leaving.start()
            leaving.join(0.2)  # it waits for this to end, or did not see that it has to tell
        return held


def test_who_leaves_as_another_comes_is_told_of() -> None:
    """Its bytes were off the budget for as long as the other was inside."""
    told: list[int] = []
    gate = _Left(100, told.append, quiet=10)
    first, second = object(), object()
    gate.enter(first, -1, 5, waits=False)
    leaving = threading.Thread(target=gate.leave, args=(first,))
    gate.leaving = leaving
    gate.enter(second, -2, 20, waits=False)
    leaving.join()
    assert told == [25, 20]
    gate.leave(second)
    assert told == [25, 20, 0]
    gate.enter(first, -1, 10, waits=False)
    gate.leave(first)
    assert told == [25, 20, 0]
