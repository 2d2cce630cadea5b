# SPDX-License-Identifier: Apache-2.0
"""Ends a process by SIGKILL in a chosen phase of what it does to a store.

A child is forked, works on the store through an adapter of its own, and is killed where a
:class:`Phase` says, or after some seconds. What must hold afterwards is the test's business.
"""

from __future__ import annotations

import os
import random
import select
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydedup import registry
from pydedup.errors import UnavailableError
from pydedup.store import Store
from pydedup.testing.faults import Fault, FaultyAdapter, inject

__all__ = ["PHASES", "ROUNDS", "Kill", "Phase", "at", "kills", "run_and_kill", "work_and_kill"]

#: How often tests kill: 10 times in `make test`, 200 in `make crash`.
ROUNDS: Final = int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "10"))
#: After so many rounds the phases come again; what is left of them are random moments.
_CYCLE: Final = 10
#: A commit in which a client is killed has run for up to so many seconds.
_COMMIT_SECONDS: Final = 0.0015
#: A child that is not killed, and does not come to its end, ends itself after so long.
_PATIENCE_SECONDS: Final = 120
_MEMORY_BYTES: Final = 64 << 20

Moment = Literal["within", "in the commit", "after the commit"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment in the life of a transaction, found by a call of the adapter in it.

    Attributes
    ----------
    method, call
        The call that the transaction makes, and how many of the method's calls came before, as
        in :class:`pydedup.testing.faults.Fault`.
    moment
        Just after that call, while the transaction's commit runs, or just after the commit.
    """

    method: str
    call: int
    moment: Moment


#: What is done to a store -> the phases of it, by name.
PHASES: Final[Mapping[str, Mapping[str, Phase]]] = {
    "add": {
        "staging, first transaction": Phase("put_job", 1, "within"),
        "staging, pages": Phase("insert_pages", 2, "within"),
        "staged in part": Phase("insert_pages", 2, "after the commit"),
        "staging, blocks": Phase("insert_blocks", 1, "within"),
        "before publish": Phase("bump_epoch", 1, "within"),
        "in the commit": Phase("bump_epoch", 1, "in the commit"),
        "after": Phase("bump_epoch", 1, "after the commit"),
    },
    "remove": {
        "before publish": Phase("bump_epoch", 1, "within"),
        "rows deleted": Phase("delete_model", 1, "within"),
        "in the commit": Phase("bump_epoch", 1, "in the commit"),
        "after": Phase("bump_epoch", 1, "after the commit"),
    },
    # Of the destination, where each model has an epoch of its own.
    "copy": {
        "staging, first transaction": Phase("put_job", 1, "within"),
        "staging, pages": Phase("insert_pages", 2, "within"),
        "staged in part": Phase("insert_pages", 2, "after the commit"),
        "staging, blocks": Phase("insert_blocks", 1, "within"),
        "before publish": Phase("bump_epoch", 1, "within"),
        "in the commit": Phase("bump_epoch", 2, "in the commit"),
        "between models": Phase("bump_epoch", 1, "after the commit"),
        "after": Phase("bump_epoch", 3, "after the commit"),
    },
    "repair": {
        "staging": Phase("insert_pages", 1, "within"),
        "staged in part": Phase("insert_pages", 1, "after the commit"),
        "before publish": Phase("bump_epoch", 1, "within"),
        "block maps replaced": Phase("replace_block_maps", 1, "within"),
        "in the commit": Phase("bump_epoch", 1, "in the commit"),
        "after": Phase("bump_epoch", 1, "after the commit"),
        "deleting pages": Phase("delete_pages", 1, "within"),
        "pages deleted": Phase("delete_pages", 1, "after the commit"),
    },
    # The first two epochs are those of retiring pages without an owner and of a new layout.
    "vacuum": {
        "retiring": Phase("bump_epoch", 1, "within"),
        "staging": Phase("insert_pages", 1, "within"),
        "staged in part": Phase("insert_pages", 1, "after the commit"),
        "before publish": Phase("bump_epoch", 2, "within"),
        "in the commit": Phase("bump_epoch", 2, "in the commit"),
        "after": Phase("bump_epoch", 2, "after the commit"),
        "freeing pages": Phase("delete_pages", 1, "within"),
        "pages freed": Phase("delete_pages", 1, "after the commit"),
    },
}


@dataclass(slots=True)
class Kill:
    """One of the rounds of a test, which sets whether the child was ``killed`` before its end.

    Attributes
    ----------
    number, phase
        Which round it is, and the name of the phase; ``None`` is a random moment.
    delay
        Seconds after which the child is killed, see :func:`work_and_kill`.
    """

    number: int
    phase: str | None
    delay: float
    killed: bool = False


def kills(phases: Iterable[str], seconds: float) -> Iterator[Kill]:
    """Give the rounds of a test: each phase, then random moments, and so on in turns.

    Random moments are spread over the ``seconds`` that the work takes, and a bit beyond. At the
    end, none may have come to its end before it was killed in a phase but that of a commit.
    """
    chance, done = random.Random(20220815), []
    turns: list[str | None] = [*phases]
    turns += [None] * (_CYCLE - len(turns))
    for number in range(ROUNDS):
        phase = turns[number % _CYCLE]
        within = _COMMIT_SECONDS if phase else 1.1 * seconds
        done.append(Kill(number, phase, chance.random() * within))
        yield done[-1]
    for kill in done:
        assert kill.killed or kill.phase in (None, "in the commit"), f"no kill in {kill}"


def at(control: FaultyAdapter, phase: Phase, strike: Callable[[], BaseException | None]) -> None:
    """Call ``strike`` in that phase; of an "in the commit" just before the commit is sent."""

    def reached() -> None:
        if phase.moment == "within":
            strike()
        else:
            after = phase.moment == "after the commit"
            number = control.calls["commit"] + 1
            control.add_fault(Fault("commit", strike, call=number, after=after))

    control.add_fault(Fault(phase.method, reached, call=phase.call, after=True))


def work_and_kill(
    url: str, work: Callable[[Store], object], phase: Phase | None, delay: float
) -> bool:
    """Work on the store in a child, kill it, and return whether it was killed before its end.

    Parameters
    ----------
    phase
        Where it is killed. Without one, ``delay`` seconds after it has opened the store.
    delay
        How long a commit has been running when the child is killed in one.
    """
    waits = phase is None or phase.moment == "in the commit"
    return run_and_kill(lambda tell: _work(url, work, phase, tell), delay if waits else None)


def run_and_kill(run: Callable[[Callable[[], object]], object], delay: float | None) -> bool:
    """Run something in a child, kill it, and return whether it was killed before its end.

    Parameters
    ----------
    run
        Calls what it is given when it has begun, or is at a certain point.
    delay
        Seconds from then on until it is killed; ``None`` leaves that to itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(_PATIENCE_SECONDS)
        try:
            os.close(reading)
            run(lambda: os.write(writing, b"."))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # here pytest must not see what happens
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as told:
        if told.read(1) and delay is not None:
            select.select([told], [], [], delay)  # its end, when it comes earlier
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise UnavailableError(f"the child ended with {code} instead of being killed")
    return code != 0


def _work(
    url: str, work: Callable[[Store], object], phase: Phase | None, tell: Callable[[], object]
) -> None:
    def strike() -> None:
        if phase is not None and phase.moment == "in the commit":
            tell()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    adapter, control = inject(registry.connect(url, mode="a"))
    if phase is not None:
        at(control, phase, strike)
    with Store(adapter, _MEMORY_BYTES) as store:
        if phase is None:
            tell()
        work(store)
