# SPDX-License-Identifier: Apache-2.0
"""How every file of this folder times two sides and prints what it found. No workloads here.

A file of one area defines functions that yield rows and hands them to `main`:

    def hash_rows(seconds: float) -> Iterator[Row]:
        yield from compare(
            "64 KiB in cache",
            work=65536,
            unit="GB/s",
            sides={"pydedup": lambda: hash_buffer(piece), "xxhash": lambda: xxh3_128_digest(piece)},
            seconds=seconds,
            target=1.0,
        )

    if __name__ == "__main__":
        main(__doc__, [hash_rows])

The sides take turns, round by round, so that whatever else the machine does hits all of them; the
medians are compared. A side may also be a `timeit.Timer` (``timed("f(x)", f=f, x=x)``), which
spares calls of a few nanoseconds the cost of a lambda.

Threads of OpenBLAS, OpenMP and ONNX Runtime go on spinning for a while after a call, on the cores
that the next side needs, and need a while to find a core of their own when they wake up. With
``settle`` each turn begins after all have gone to sleep, and with calls that are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from timeit import Timer

from rich.console import Console
from rich.table import Table

import pydedup
from pydedup import config

__all__ = ["Row", "compare", "main", "timed"]

#: Shortest round: below this the clock and the loop around the call would be measured.
MIN_ROUND_SECONDS = 200e-6
#: The same for turns that begin with a pause, and what is called without being timed before.
MIN_SETTLED_SECONDS = 10e-3
WARM_SECONDS = 20e-3
#: Enough for any of the libraries named above; OpenBLAS takes the longest, up to 75 ms: what runs
#: meanwhile shares a CPU with its thread.
SETTLE_SECONDS = 0.15

#: What one unit of ``work`` is divided by.
UNITS = {"GB/s": 1e9, "GFLOP/s": 1e9, "M/s": 1e6, "k/s": 1e3, "1/s": 1.0}
#: Units in which the time of one call is reported; ``work`` has no meaning there.
TIMES = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}

Side = Callable[[], object] | Timer


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one pair.

    ``ratio`` above 1 means that pydedup is faster, whatever the unit. ``spread`` is half of the
    distance between the quartiles, in percent of the median, the larger one of the two sides.
    ``target`` is the ratio that pydedup set itself, or None.
    """

    case: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    spread: float
    rounds: int
    target: float | None = None


def timed(statement: str, **names: object) -> Timer:
    """Return a side that runs ``statement`` without a call around it."""
    return Timer(statement, globals=names)


def compare(
    case: str,
    *,
    unit: str,
    sides: Mapping[str, Side],
    seconds: float,
    work: float = 1.0,
    target: float | Mapping[str, float] | None = None,
    settle: bool = False,
) -> Iterator[Row]:
    """Time all sides in turns and yield one row for each but the first, which is pydedup's.

    Their order is another one in each round: memory and caches are what the side before has left.

    Parameters
    ----------
    case
        What is done, for people.
    unit
        A key of `UNITS` (``work`` per second) or of `TIMES` (time of one call).
    sides
        Name to callable or `timeit.Timer`; the first is ours.
    seconds
        Time for the whole comparison; at least 5 rounds are made however long they take.
    work
        Bytes, floating-point operations or items of one call.
    target
        The ratio to reach: one for all peers, or by name.
    settle
        Let the threads of the side before fall asleep, and those of this one wake up, first.
    """
    if unit not in UNITS and unit not in TIMES:
        raise ValueError(f"unit {unit!r} is unknown; choose one of {[*UNITS, *TIMES]}")
    timers = [side if isinstance(side, Timer) else Timer(side) for side in sides.values()]
    repeats = []
    for timer in timers:
        timer.timeit(1)  # warm-up: first use, page faults, caches
        once = max(min(timer.timeit(1) for _ in range(3)), 1e-9)
        least = MIN_SETTLED_SECONDS if settle else MIN_ROUND_SECONDS
        repeats.append(max(1, round(least / once)))
    spent: list[list[float]] = [[] for _ in timers]
    total = 0.0
    turns, chance = list(zip(timers, repeats, spent, strict=True)), random.Random(len(case))
    while total < seconds or len(spent[0]) < 5:
        chance.shuffle(turns)
        for timer, number, times in turns:
            if settle:
                time.sleep(SETTLE_SECONDS)
                warm = time.perf_counter() + WARM_SECONDS
                while time.perf_counter() < warm:
                    timer.timeit(1)
            elapsed = timer.timeit(number)
            total += elapsed
            times.append(elapsed / number)
    medians = [statistics.median(times) for times in spent]
    spreads = [_spread(times) for times in spent]
    figures = [m * TIMES[unit] if unit in TIMES else work / m / UNITS[unit] for m in medians]
    for i, name in enumerate(sides):
        if i == 0:
            continue
        wanted = target.get(name) if isinstance(target, Mapping) else target
        yield Row(
            case=case,
            peer=name,
            unit=unit,
            ours=figures[0],
            theirs=figures[i],
            ratio=medians[i] / medians[0],
            spread=max(spreads[0], spreads[i]),
            rounds=len(spent[0]),
            target=wanted,
        )


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return 50.0 * (high - low) / middle


def machine() -> dict[str, object]:
    """Return what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "pydedup": pydedup.__version__,
        "kernel": config.kernels().in_use,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(
    description: str | None,
    areas: Sequence[Callable[[float], Iterable[Row]]],
    *,
    seconds: float = 1.0,
) -> None:
    """Run the areas that the command line asks for, print a table, or one JSON document."""
    names = [area.__name__ for area in areas]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="time for each comparison (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="AREA", help=f"one of {', '.join(names)}"
    )
    options = parser.parse_args()
    rows: list[Row] = []
    console = Console(width=max(150, Console().width))
    about = machine()
    for area in areas:
        if options.only and area.__name__ not in options.only:
            continue
        for row in area(options.seconds):
            rows.append(row)
            print(f"  {row.case}, {row.peer}: {row.ratio:.2f}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    console.print(_table(rows, f"kernel {about['kernel']}, {about['cpu']}"))


def _table(rows: Iterable[Row], title: str) -> Table:
    table = Table(title=f"{title}; ratio above 1: pydedup is faster", title_justify="left")
    left = ("case", "peer", "unit")
    for name in ("case", "peer", "pydedup", "peer's", "unit", "ratio", "target", "+-%", "rounds"):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(
            row.case,
            row.peer,
            f"{row.ours:.4g}",
            f"{row.theirs:.4g}",
            row.unit,
            f"{row.ratio:.2f}",
            ""
            if row.target is None
            else f"{row.target:.2f}{'' if row.ratio >= row.target else ' missed'}",
            f"{row.spread:.1f}",
            str(row.rounds),
        )
    return table
