# SPDX-License-Identifier: Apache-2.0
"""How far something is, on standard error, once it has taken a moment.

On a terminal a bar that goes away at the end; elsewhere a plain line every few seconds. A thread of
its own draws, so that work which reports rarely, or not at all, is still seen to be under way.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from pydedup.text import clean, count, duration, percent, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

__all__ = ["WAITING", "Watch"]

#: What a change that is quick by itself is at, when it takes a moment.
WAITING = "waiting for the database, which others may be writing to"

_DELAY_SECONDS = 0.7
_LINE_SECONDS = 5.0
_REDRAW_SECONDS = 0.1
#: Stages that are counted in bytes; all others are counted in things.
_IN_BYTES = frozenset(
    {"matching", "writing", "reading", "copying", "checking", "refilling", "checking copies"}
)


class Watch:
    """Shows progress while it is entered; to be handed to the API as ``progress``."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._state = (title, 0, 0)
        self._quiet = quiet or sys.stderr is None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Take note of how far a stage is."""
        self._state = (stage, done, total)

    def __enter__(self) -> Self:
        if not self._quiet:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def seconds(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._started

    def _run(self) -> None:
        if self._done.wait(_DELAY_SECONDS):
            return
        try:
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                self._draw()
            else:
                self._write_lines()
        except (OSError, ValueError):
            pass  # nobody reads what is said: no reason to end the work

    def _write_lines(self) -> None:
        while not self._done.wait(_LINE_SECONDS):
            stage, done, total = self._state
            amounts = _amounts(stage, done, total)
            how_far = (
                f" {percent(done / total)} ({amounts})" if total else amounts and f" {amounts}"
            )
            sys.stderr.write(f"pydedup: {clean(stage)}{how_far}, {duration(self.seconds)}\n")
            sys.stderr.flush()

    def _draw(self) -> None:
        with _bars() as bars:
            task, shown = None, None
            while True:
                stage, done, total = self._state
                if task is None or stage != shown:
                    if task is not None:
                        bars.remove_task(task)
                    task = bars.add_task(clean(stage), total=None, amounts="", times="")
                    shown = stage
                bars.update(
                    task,
                    total=total or None,
                    completed=done,
                    amounts=_amounts(stage, done, total),
                    times=self._times(bars.tasks[0].time_remaining),
                )
                if self._done.wait(_REDRAW_SECONDS):
                    return

    def _times(self, left: float | None) -> str:
        """Return how long it will take, or has taken when nobody knows that."""
        if left is None:
            return f"{self.seconds:.0f} s"
        return f"{max(round(left), 1)} s left" if left < 60 else f"{round(left / 60)} min left"


def _amounts(stage: str, done: int, total: int) -> str:
    show = size if stage in _IN_BYTES else count
    if total:
        return f"{show(done)} of {show(total)}"
    return f"{show(done)} so far" if done else ""  # as of rows that a query finds


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None if console.width < 80 else 30),
        TextColumn("{task.fields[amounts]}", markup=False),
    ]
    if console.width >= 60:
        columns.append(TextColumn("{task.fields[times]}", markup=False, style="dim"))
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)
