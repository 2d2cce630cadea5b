# SPDX-License-Identifier: Apache-2.0
"""Workers of a scoring: as many actors as are wanted, each with one piece of the work at a time.

So when one dies, it is known of which piece. That piece comes after all others when it is tried
again, and not for ever: one that no worker survives is left, and said in the end. (Ray Data's own
pool tries again without end, and does not tell.)
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final

from pydedup.errors import ClusterError
from pydedup.ray.cluster import kill
from pydedup.ray.score_plan import Settings
from pydedup.ray.score_worker import ScoreWorker
from pydedup.text import plural, without_secrets

__all__ = ["CLOSE_SECONDS", "Pool", "cause_of", "never_began", "words_of"]

_LOG = logging.getLogger("pydedup.ray")
#: What a worker may take to close what it has open, after the batch that it is at.
CLOSE_SECONDS: Final = 5.0
#: How often in a row workers may die without a piece done, and how often for each of them; of those
#: that die at one piece, the first counts.
_MOST_IN_A_ROW: Final = (20, 3)
#: Of pieces that were left, so many are named.
_NAMED: Final = 5
#: What Ray writes of a death, and what that means. Of a process that is gone it knows no more.
_CAUSES: Final = (
    ("low on memory", "ended by Ray, as its machine ran low on memory"),
    ("its node has died", "its machine was lost"),
    ("killed by `ray.kill`", "ended by ray.kill"),
    ("SIGTERM", "asked to end (SIGTERM)"),
)
#: The last line of a traceback.
_RAISED: Final = re.compile(r"(?m)^[A-Za-z_][\w.]*(?:Error|Exception)(?::.*)?$")
_UNKNOWN: Final = "killed (SIGKILL, as the kernel does when memory runs out) or crashed (SIGSEGV)"


def never_began(error: Exception) -> str | None:
    """Return what an actor said that could not even begin; ``None`` of one that was up."""
    if not getattr(error, "actor_init_failed", False):
        return None
    return words_of(error)


def words_of(error: Exception) -> str:
    """Return the line of an error of Ray's that says what went wrong, without its frames."""
    said = without_secrets(str(error)).strip()
    # Of several that caused one another, the first; advice of Ray's may follow them.
    first = _RAISED.search(said)
    if first is not None:
        return first.group().strip()
    return said.splitlines()[-1].strip() if said else type(error).__name__


def cause_of(error: Exception) -> str:
    """Return what a worker died of, as far as Ray tells."""
    if (why := never_began(error)) is not None:
        return f"could not begin: {why}"
    if getattr(error, "preempted", False):
        return "its machine was taken away (preempted)"
    said = str(error)
    return next((cause for mark, cause in _CAUSES if mark in said), _UNKNOWN)


class Pool:
    """Workers, started as they are wanted, and others in the place of those that die.

    Parameters
    ----------
    ray
        Ray, connected to a cluster.
    method
        Of `ScoreWorker`, which is called with a piece.
    count
        How many there are at most.
    max_deaths
        Of workers, until a piece is left.
    name
        Says what a piece is, given its number and itself.
    """

    def __init__(
        self,
        ray: Any,
        settings: Settings,
        method: str,
        count: int,
        max_deaths: int,
        name: Callable[[int, Any], str],
    ) -> None:
        self._ray, self._settings, self._method = ray, settings, method
        self._count, self._max_deaths, self._name = count, max_deaths, name
        self._class = ray.remote(
            num_cpus=settings.threads,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            max_concurrency=2,  # its work, and a call that stops it
        )(ScoreWorker)
        exceptions = importlib.import_module("ray.exceptions")
        self._any_error = exceptions.RayError
        self._died = (
            exceptions.RayActorError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
        )
        self._again: deque[tuple[int, Any]] = deque()
        self._left: list[tuple[int, Any]] = []
        self._deaths: dict[int, list[str]] = {}
        self._in_a_row = 0
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int, Any]] = {}
        self._stopped = threading.Event()

    def results(self, pieces: Iterator[tuple[int, Any]]) -> Generator[tuple[int, str], None, None]:
        """Yield the number of each piece and what a worker said of it, in the order of their ends.

        Raises ClusterError after all others when there are pieces that no worker survives, and at
        once when workers die whatever they do.
        """
        try:
            more = True
            while True:
                while self._idle and (more or self._again):
                    piece = next(pieces, None) if more else self._again.popleft()
                    if piece is None:
                        more = False
                    else:
                        self._give(*piece)
                if not more and not self._again and not self._running:
                    break
                self._start(self._count if more else len(self._again) + len(self._running))
                ended, _ = self._ray.wait([*self._running, *self._starting], num_returns=1)
                if self._stopped.is_set():
                    raise ClusterError("stopped")
                told = self._heard(ended[0])
                if told is not None:
                    yield told
        finally:
            self._end()
        if self._left:
            raise ClusterError(self._said())

    def stop(self) -> None:
        """Have `results` end soon, with an error: from a thread beside it."""
        self._stopped.set()
        for actor in list(self._starting.values()):
            kill(self._ray, actor)
        self._stop_running()

    def _stop_running(self) -> None:
        for actor, _, _ in list(self._running.values()):
            with contextlib.suppress(Exception):
                actor.stop.remote()

    def _end(self) -> None:
        """End all workers; those that have something open close it, if they do so soon."""
        starting, open_ones = list(self._starting.values()), list(self._idle)
        open_ones += [actor for actor, _, _ in self._running.values()]
        try:
            self._stop_running()
            closing = [actor.close.remote() for actor in open_ones]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        except Exception:  # of a cluster that is gone
            _LOG.debug("workers could not be told to close", exc_info=True)
        finally:
            for actor in (*starting, *open_ones):
                kill(self._ray, actor)
            self._starting, self._running = {}, {}
            self._idle.clear()

    def _start(self, wanted: int) -> None:
        there = len(self._starting) + len(self._idle) + len(self._running)
        for _ in range(min(wanted, self._count) - there):
            actor = self._class.remote(self._settings)
            self._starting[actor.ready.remote()] = actor

    def _give(self, number: int, piece: Any) -> None:
        actor = self._idle.pop()
        call = getattr(actor, self._method).remote(piece)
        self._running[call] = (actor, number, piece)

    def _heard(self, ended: Any) -> tuple[int, str] | None:
        """Take note of a call that ended: what a worker said, that it is up, or dead."""
        actor, number, piece = self._running.pop(ended, (None, None, None))
        if number is None:
            actor = self._starting.pop(ended)
        try:
            said = self._ray.get(ended)
        except self._died as error:
            kill(self._ray, actor)  # Ray may have lost sight of it, no more
            self._dead(number, piece, error)
            return None
        except self._any_error as error:
            raise ClusterError(
                f"Ray gave up: {words_of(error)}; run it again to continue"
            ) from None
        self._idle.append(actor)
        if number is None:
            return None
        self._in_a_row = 0
        self._deaths.pop(number, None)
        return number, str(said)

    def _dead(self, number: int | None, piece: Any, error: Exception) -> None:
        # A piece that killed before is known by now, and left before long.
        if number not in self._deaths:
            self._in_a_row += 1
        # A machine that is taken away says nothing against what ran there.
        if number is not None and not getattr(error, "preempted", False):
            self._deaths.setdefault(number, []).append(cause_of(error))
        if number is not None:
            again = len(self._deaths.get(number, ())) < self._max_deaths
            (self._again if again else self._left).append((number, piece))
        least, each = _MOST_IN_A_ROW
        if self._in_a_row >= max(least, each * self._count):
            met = [*self._left, *(one for one in self._again if one[0] in self._deaths)]
            parts = f", the last of them at {self._named(met[-1])}" if met else ""
            to_do = "see that there is memory for them (memory, workers)"
            if never_began(error) is not None:
                to_do = "see that the same pydedup and the driver are on all machines"
            raise ClusterError(
                f"Ray's workers died {self._in_a_row} times without a part done{parts} (the last: "
                f"{cause_of(error)}); {to_do}, and run it again to continue"
            )

    def _named(self, piece: tuple[int, Any]) -> str:
        number, what = piece
        causes = Counter(self._deaths.get(number, ()))
        died = ", ".join(f"{cause}: {plural(n, 'time')}" for cause, n in causes.items())
        return f"{self._name(number, what)} ({died})"

    def _said(self) -> str:
        parts = "; ".join(map(self._named, self._left[:_NAMED]))
        more = f"; and {len(self._left) - _NAMED} more" if len(self._left) > _NAMED else ""
        return (
            f"{plural(len(self._left), 'part')} of the work killed every worker that was given it "
            f"(max_deaths is {self._max_deaths}): {parts}{more}. All other parts are done and "
            "stay so. If memory ran out, take fewer workers, a smaller memory for each, or smaller "
            "batches; else mend the rows that no worker survives, of those without a prediction. "
            "The same command goes on with what is left"
        )
