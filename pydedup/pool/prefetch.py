# SPDX-License-Identifier: Apache-2.0
"""Reading pages ahead of the kernels that want them.

A model's matrices are walked over in the same order call after call, so a call remembers the
windows of its walks, and the next call of that model is read ahead along them (a first call along
the windows of the walk it is in). A walk over what only this call looks up is read ahead, too, with
what the last call walked over next behind it, but is not remembered. Nothing is done until the
first miss: a pool that holds the model costs no thread. Windows that were read ahead stay pinned
until their walk has come by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydedup._core import Page
from pydedup.windows import Window

__all__ = ["Call", "Lane", "Room"]

#: Windows of a course that are read at once, where two may be held: readers go on with the next one
#: while the last pages of one are on their way.
_THREADS = 2

#: Returns pages of a window, pinned, after reading those that miss; on a thread of its own.
LoadAhead = Callable[[Any], list[Page]]


class Room(NamedTuple):
    """Room that a call has for what it reads ahead."""

    pages: int
    give_back: Callable[[], None]


@dataclass(slots=True)
class _Stop:
    """A window on the way of a course."""

    window: Window
    state: str = "ahead"  # -> "reading" -> "here" | "failed"; or "passed", before or after
    pages: list[Page] = field(default_factory=list)
    unwanted: bool = False  # its walk has come by, or was given up, while it was read


class _Course:
    """Windows in the order in which they will be wanted, read by threads that keep ahead."""

    def __init__(self, windows: Sequence[Window], load: LoadAhead, limit: int) -> None:
        self._stops = [_Stop(window) for window in windows]
        self._load = load
        self._limit = limit  # pages that may be held ahead
        self._held = 0  # of them, those that are read included
        self._next = 0  # stop that is read next
        self._passed = 0  # stops before this one were passed
        self._lock = threading.RLock()  # entered itself: see `admission.Gate`
        self._changed = threading.Condition(self._lock)
        self._ended = False

    def start(self) -> None:
        """Begin to read. Raises RuntimeError when no thread is to be had."""
        widest = max(len(stop.window.ids) for stop in self._stops)
        for number in range(_THREADS if 2 * widest <= self._limit else 1):
            # A daemon: a process that ends does not wait for pages that nobody will use.
            try:
                threading.Thread(target=self._run, name="pydedup-ahead", daemon=True).start()
            except RuntimeError:  # no more threads are to be had
                if number == 0:
                    raise

    def reach(self, number: int) -> bool:
        """Wait for what is being read of a window that a walk wants now.

        Returns whether there was something to wait for.
        """
        with self._lock:
            for stop in self._stops[self._passed : number]:
                self._pass(stop)
            self._passed = max(self._passed, number)
            stop = self._stops[number]
            if stop.state == "ahead":
                stop.state = "passed"  # the walk reads it itself
            self._changed.notify_all()
            waits = stop.state == "reading"
            self._changed.wait_for(lambda: stop.state != "reading")
            return waits

    def pass_by(self, number: int) -> None:
        """Let go of a window that the walk has pinned itself."""
        with self._lock:
            self._pass(self._stops[number])
            self._changed.notify_all()

    def end(self) -> None:
        """Let everything go; the thread ends after what it is reading."""
        with self._lock:
            self._ended = True
            for stop in self._stops:
                self._pass(stop)
            self._changed.notify_all()

    def _pass(self, stop: _Stop) -> None:
        self._held -= len(stop.pages)
        stop.pages = []
        if stop.state == "reading":
            stop.unwanted = True
        else:
            stop.state = "passed"

    def _run(self) -> None:
        while (stop := self._take_next()) is not None:
            try:
                pages = self._load(stop.window.ids)
            except Exception:  # of any driver; else the walk would wait for ever
                pages = []  # it meets the same, and says so
            self._put(stop, pages)
            del pages

    def _take_next(self) -> _Stop | None:
        """Return the next window that is to be read, once there is room for it."""
        with self._lock:
            self._changed.wait_for(self._may_read)
            if self._ended or self._next == len(self._stops):
                return None
            stop = self._stops[self._next]
            self._next += 1
            stop.state = "reading"
            self._held += len(stop.window.ids)
            return stop

    def _may_read(self) -> bool:
        while self._next < len(self._stops) and self._stops[self._next].state == "passed":
            self._next += 1
        if self._ended or self._next == len(self._stops) or self._held == 0:
            return True
        return self._held + len(self._stops[self._next].window.ids) <= self._limit

    def _put(self, stop: _Stop, pages: list[Page]) -> None:
        with self._lock:
            self._held -= len(stop.window.ids)
            stop.state = "here" if pages else "failed"
            if not (self._ended or stop.unwanted):
                stop.pages = pages
                self._held += len(pages)
            self._changed.notify_all()


class Lane:
    """One walk of a call, and the course that keeps ahead of it, if there is one."""

    def __init__(
        self, call: Call, windows: list[Window], place: int | None, *, once: bool = False
    ) -> None:
        self._call = call
        self._windows = windows
        self._once = once
        self._course = None if place is None else call.course
        self._place = place or 0  # of its first window on that course

    def reach(self, number: int) -> bool:
        """Window ``number`` of the walk is wanted; returns whether it was waited for."""
        course = self._on_course()
        return course is not None and course.reach(self._place + number)

    def pass_by(self, number: int) -> None:
        """Window ``number`` is pinned by the walk."""
        course = self._on_course()
        if course is not None and self._place + number >= 0:
            course.pass_by(self._place + number)

    def missed(self, number: int) -> None:
        """Window ``number`` is not all in the pool: begin to read what follows."""
        if self._on_course() is None and self._call.begin(
            self._windows, number + 1, once=self._once
        ):
            self._course, self._place = self._call.course, -(number + 1)

    def _on_course(self) -> _Course | None:
        """Return the call's course, if this walk is on it."""
        return self._course if self._course is self._call.course else None


class Call:
    """One prediction of a model: the walks it makes, and those the last one made.

    Not safe between threads: it belongs to the one that predicts.
    """

    def __init__(
        self,
        past: list[list[Window]],
        load: LoadAhead,
        take_room: Callable[[], Room | None],
    ) -> None:
        self.course: _Course | None = None
        self.walks: list[list[Window]] = []  # of this call, in order
        self._past = past
        self._at = 0  # of the next walk in `past`, if this call goes on as that one did
        self._in_step = True  # whether the walk before is in `past`
        self._places: dict[int, int] = {}  # walk in `past` -> its first window on the course
        self._load = load
        self._take_room = take_room
        self._room: Room | None = None

    def enter(self, windows: list[Window], *, once: bool) -> Lane:
        """Note that a walk begins, unless it is one that the next call does not make."""
        if once:
            return Lane(self, windows, None, once=True)
        self.walks.append(windows)
        number = self._last_time(windows)
        self._in_step = number is not None
        if number is None or number < self._at:
            self._leave_course()
        if number is None:
            return Lane(self, windows, None)
        self._at = number + 1
        return Lane(self, windows, self._places.get(number))

    def begin(self, walk: list[Window], first: int, *, once: bool) -> bool:
        """Read ahead from window ``first`` of a walk on, if there is room."""
        self._leave_course()
        as_last_time = self._in_step and (once or self._past[self._at - 1] is walk)
        later = self._past[self._at :] if as_last_time else []
        windows = walk[first:] + [window for walk in later for window in walk]
        if windows and self._room is None:
            self._room = self._take_room()
        if not windows or self._room is None:
            return False
        place = len(walk) - first
        for number, after in enumerate(later, self._at):
            self._places[number] = place
            place += len(after)
        # Known before it starts: an interrupt may come when a thread of it has begun.
        self.course = _Course(windows, self._load, self._room.pages)
        try:
            self.course.start()
        except RuntimeError:  # no thread is to be had: then without
            self._leave_course()
            return False
        return True

    def end(self) -> None:
        """Let everything go: the prediction is done, or has failed."""
        self._leave_course()
        if self._room is not None:
            room, self._room = self._room, None
            room.give_back()

    def _last_time(self, windows: list[Window]) -> int | None:
        """Return the number that a walk had in the last call: the next one, or one after that.

        Matrices that are all in the pool are not walked over, in that call or in this one.
        """
        count = len(self._past)
        for number in range(self._at, self._at + count):
            if self._past[number % count] is windows:
                return number % count
        return None

    def _leave_course(self) -> None:
        self._places = {}
        if self.course is not None:
            self.course.end()
            self.course = None
