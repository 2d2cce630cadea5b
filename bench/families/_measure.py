# SPDX-License-Identifier: Apache-2.0
"""What every file of this folder does with a family: store it, look at what that cost, print it.

A member is stored under a policy and scored twice on held-out examples, which nothing was chosen
by: with its own weights and with what the store gives back. Sizes are those of the SQLite file,
when the store is closed. Not here: data and models.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import pydedup
from pydedup import policies
from pydedup.certificates import describe
from pydedup.demo.packages import default_cache

__all__ = ["Arrays", "Member", "Result", "console", "family_table", "options", "store_family"]

Arrays = Mapping[str, NDArray[Any]]
#: Of weights, one score per held-out example, or another metric's parts; the mean is the metric.
Score = Callable[[Arrays], NDArray[np.float64]]

console = Console(width=150)


@dataclass(frozen=True, slots=True)
class Member:
    """A model to store: its weights, what may happen to them, and how good it is.

    ``module`` has these weights and is added in their place where the graph is wanted too.
    """

    name: str
    arrays: Arrays
    policy: policies.Policy
    held_out: Score | None = None
    module: Any = None


@dataclass(slots=True)
class Stored:
    """What one member brought and cost."""

    name: str
    logical: int
    stored: int
    shared: int
    deltas: int
    blocks: int
    seconds: float
    certificate: Mapping[str, Any]
    before: NDArray[np.float64] | None = None
    after: NDArray[np.float64] | None = None

    @property
    def drop(self) -> float:
        """How far the held-out metric fell."""
        assert self.before is not None
        assert self.after is not None
        return float(np.mean(self.before - self.after))


@dataclass(slots=True)
class Result:
    """A family in one store."""

    title: str
    members: list[Stored] = field(default_factory=list)
    file_bytes: int = 0

    @property
    def logical(self) -> int:
        """Bytes of all models as they were given."""
        return sum(member.logical for member in self.members)

    def mean_drop(self) -> tuple[float, float]:
        """Return the mean held-out drop of those that have one, and half of its 95 % interval.

        Examples are independent draws, models are not: the interval is about other texts, for
        these models, each weighing the same.
        """
        scored = [m for m in self.members if m.before is not None]
        drops = np.array([member.drop for member in scored])
        variance = 0.0
        for member in scored:
            assert member.before is not None
            assert member.after is not None
            difference = member.before - member.after
            variance += float(difference.var(ddof=1)) / len(difference)
        return float(drops.mean()), 1.96 * math.sqrt(variance) / len(scored)


def store_family(
    title: str,
    members: Sequence[Member],
    *,
    then: Callable[[pydedup.Store], None] | None = None,
    tell: bool = True,
) -> Result:
    """Add members in order to a new store and measure; ``then`` may look at the store."""
    result = Result(title)
    with tempfile.TemporaryDirectory(prefix="pydedup-families-") as folder:
        path = Path(folder) / "store.db"
        with pydedup.open(path, memory="1GiB") as store:
            for member in members:
                result.members.append(_add(store, member))
                if tell:
                    console.print(
                        f"  {member.name}: "
                        + "\n    ".join(describe(result.members[-1].certificate)),
                        highlight=False,
                    )
            if then is not None:
                then(store)
        result.file_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return result


def _add(store: pydedup.Store, member: Member) -> Stored:
    started = time.perf_counter()
    source = dict(member.arrays) if member.module is None else member.module
    report = store.add(member.name, source, policy=member.policy)
    seconds = time.perf_counter() - started
    stored = Stored(
        member.name,
        report.logical_bytes,
        report.stored_bytes,
        report.shared_blocks,
        report.delta_blocks,
        report.blocks,
        seconds,
        report.certificate,
    )
    if member.held_out is not None:
        loaded = store.load(member.name)
        stored.before = np.asarray(member.held_out(member.arrays))
        stored.after = np.asarray(member.held_out(loaded))
    return stored


def family_table(result: Result) -> Table:
    """Return a table of one family; sizes in MB of what each member brought."""
    ratio = result.logical / result.file_bytes
    table = Table(
        title=f"{result.title}: {result.logical / 1e6:.1f} MB in a file of "
        f"{result.file_bytes / 1e6:.1f} MB, 1/{ratio:.2f}",
        title_justify="left",
    )
    columns = "model|MB|stored MB|%|shared|deltas|blocks|validation|after|bound|held-out|after|"
    for number, name in enumerate((columns + "drop|evaluations|seconds").split("|")):
        table.add_column(name, justify="right" if number else "left")
    for m in result.members:
        about = m.certificate
        judged = about.get("policy") == "accuracy"
        bound = about.get("bound")
        table.add_row(
            m.name,
            f"{m.logical / 1e6:.1f}",
            f"{m.stored / 1e6:.2f}",
            f"{100 * m.stored / m.logical:.1f}",
            str(m.shared),
            str(m.deltas),
            str(m.blocks),
            f"{about['metric_before']:.4f}" if judged else "",
            f"{about['metric_after']:.4f}" if judged else "",
            f"{bound:.4f}" if judged and bound is not None else "",
            "" if m.before is None else f"{float(np.mean(m.before)):.4f}",
            "" if m.after is None else f"{float(np.mean(m.after)):.4f}",
            "" if m.before is None else f"{m.drop:+.4f}",
            str(about["evaluations"]) if judged else "",
            f"{m.seconds:.1f}",
        )
    return table


def options(description: str | None) -> argparse.Namespace:
    """Return the options that each file has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a part of it, in a minute or two")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="downloads and trained models"
    )
    return parser.parse_args()
