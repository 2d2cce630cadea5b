# SPDX-License-Identifier: Apache-2.0
"""Two JSON documents of the native harness side by side.

    pydedup_bench --json > new.json
    python bench/compare.py old.json new.json [--fail-below 0.9]

A ratio above 1 means that NEW is faster. What differs by less than the spread of the two runs is
marked as noise. Runs of different machines or kernels are compared with a warning: their ratios say
what the machines are, not what changed in the code. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """One workload that both runs have."""

    name: str
    old: float
    new: float
    spread: float

    @property
    def ratio(self) -> float:
        """How much faster the new run is."""
        return self.old / self.new

    @property
    def noise(self) -> bool:
        """Whether the difference is within what the rounds of either run differ by."""
        return abs(self.ratio - 1) <= self.spread / 100


def read(path: Path) -> dict[str, Any]:
    """Return a document, or exit saying what is wrong with it."""
    try:
        document = json.loads(path.read_text())
        if document["format"] != 1:
            sys.exit(f"{path}: format {document['format']} is not known to this script")
        for result in document["results"]:
            seconds = result["seconds"]
            if not (isinstance(seconds, float | int) and seconds > 0 and math.isfinite(seconds)):
                sys.exit(f"{path}: {result['name']} took {seconds!r} seconds")
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no document of pydedup_bench --json: {error!r}")
    return document


def lines(old: dict[str, Any], new: dict[str, Any]) -> list[Line]:
    """Return the workloads that both have, in the order of the new run."""
    before = {result["name"]: result for result in old["results"]}
    return [
        Line(
            result["name"],
            before[result["name"]]["seconds"],
            result["seconds"],
            before[result["name"]]["spread_percent"] + result["spread_percent"],
        )
        for result in new["results"]
        if result["name"] in before
    ]


def warnings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what makes the two runs different beyond the code."""
    told = [
        f"{what}: {a} against {b}"
        for what, a, b in (
            ("kernel", old["kernel"], new["kernel"]),
            ("cpu", old["machine"]["cpu"], new["machine"]["cpu"]),
            ("compiler", old["machine"]["compiler"], new["machine"]["compiler"]),
        )
        if a != b
    ]
    names = {r["name"] for r in old["results"]} ^ {r["name"] for r in new["results"]}
    if names:
        told.append(f"only in one of them: {', '.join(sorted(names))}")
    return told


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 1 when a workload fell below what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-below", type=float, metavar="RATIO", help="exit 1 if a ratio is below (not noise)"
    )
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    for warning in warnings(old, new):
        print(f"warning: {warning}", file=sys.stderr)
    common = lines(old, new)
    if not common:
        sys.exit("the two runs have no workload in common")
    print(f"old: {old['commit'] or '?'} of {old['machine']['date']}")
    print(f"new: {new['commit'] or '?'} of {new['machine']['date']}")
    slow = []
    for line in common:
        mark = "noise" if line.noise else ("faster" if line.ratio > 1 else "SLOWER")
        print(
            f"{line.name:<28} {1e3 * line.old:12.4f} ms {1e3 * line.new:12.4f} ms"
            f"  x{line.ratio:5.2f}  {mark}"
        )
        if options.fail_below is not None and line.ratio < options.fail_below and not line.noise:
            slow.append(line.name)
    if slow:
        print(f"below {options.fail_below}: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
