# SPDX-License-Identifier: Apache-2.0
"""The regression gate on instruction counts (`make bench-gate`).

    python bench/callgrind/gate.py --executable build/dev/bench/callgrind/pydedup_callgrind
    ... --update     write what was counted into baseline.json
    ... --counts F   judge counts that were recorded with --record instead of counting (tests)

valgrind counts the instructions of each workload, with the kernels that it can run (it knows no
AVX-512). Counts do not depend on what else a machine does, so a rise of more than TOLERANCE
percent is a change of the code, not noise; wall-clock time is for bench/native to measure. They do
depend on the compiler: baseline.json has counts for each that someone recorded, and one that is
not in it is reported, not judged. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BASELINE = Path(__file__).with_name("baseline.json")
KERNELS = ("scalar", "avx2")
#: Percent. Other versions of the same compiler and of libc differ by less.
TOLERANCE = 3.0

Counts = dict[str, dict[str, int]]  # kernel -> workload -> instructions


def count(executable: Path, kernel: str) -> dict[str, int]:
    """Run one kernel under callgrind and return the instructions of each workload."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--instr-atstart=no",
                f"--callgrind-out-file={folder}/counts",
                executable,
            ],
            env={**os.environ, "PYDEDUP_KERNEL": kernel},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"valgrind failed with kernel {kernel}:\n{done.stderr[-3000:]}")
        return dict(filter(None, map(read_dump, sorted(Path(folder).iterdir()))))


def read_dump(path: Path) -> tuple[str, int] | None:
    """Return name and instructions of one dump, None for the one that valgrind writes at exit."""
    text = path.read_text(errors="replace")
    name = re.search(r"^desc: Trigger: Client Request: (\S+)$", text, re.MULTILINE)
    if name is None:
        return None
    total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
    if total is None:
        sys.exit(f"callgrind's dump of {name[1]} has no total; is this a valgrind that it knows?")
    return name[1], int(total[1])


def about(executable: Path, kernel: str) -> dict[str, str] | None:
    """Return compiler and kernel, None when the machine cannot run the kernel."""
    done = subprocess.run(
        [executable, "--about"],
        env={**os.environ, "PYDEDUP_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(f"skipped: {done.stderr.strip()}")
        return None
    told: dict[str, str] = json.loads(done.stdout)
    return told


def measure(executable: Path) -> tuple[str, Counts]:
    """Count all kernels; return the compiler and the counts."""
    compiler = ""
    counts: Counts = {}
    for kernel in KERNELS:
        told = about(executable, kernel)
        if told is not None:
            compiler = told["compiler"]
            counts[kernel] = count(executable, kernel)
            if not counts[kernel]:
                sys.exit(f"callgrind dumped nothing for kernel {kernel}")
    if not counts:
        sys.exit("no kernel could be counted")
    return compiler, counts


def judge(counts: Counts, baseline: Counts, tolerance: float) -> list[str]:
    """Print one line per workload; return what is wrong."""
    wrong = []
    for kernel, found in counts.items():
        known = baseline.get(kernel, {})
        for name in sorted(known.keys() | found.keys()):
            label = f"{kernel:<7} {name:<24}"
            if name not in found:
                wrong.append(f"{kernel} {name}: is in the baseline, but was not counted")
            elif name not in known:
                print(f"{label} {found[name]:>12,}            new: not in the baseline yet")
            else:
                change = 100.0 * (found[name] - known[name]) / known[name]
                verdict = ""
                if change > tolerance:
                    verdict = "MORE"
                    wrong.append(
                        f"{kernel} {name}: {known[name]:,} -> {found[name]:,} instructions"
                    )
                elif change < -tolerance:
                    verdict = "less: update the baseline to keep it so"
                print(f"{label} {found[name]:>12,}  {change:+7.2f} %  {verdict}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Count, then judge or update; 1 when a count rose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--executable", type=Path)
    source.add_argument("--counts", type=Path)
    parser.add_argument("--record", type=Path, help="also write the counts to this file")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="percent (%(default)s)")
    parser.add_argument("--update", action="store_true", help="make the counts the baseline")
    options = parser.parse_args(arguments)

    if options.counts:
        recorded = json.loads(options.counts.read_text())
        compiler, counts = recorded["compiler"], recorded["counts"]
    else:
        compiler, counts = measure(options.executable.resolve())
    if options.record:
        options.record.write_text(json.dumps({"compiler": compiler, "counts": counts}, indent=1))
    baseline = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    if options.update:
        baseline[compiler] = counts
        text = json.dumps(baseline, indent=1, sort_keys=True) + "\n"
        options.baseline.write_text(text)
        print(f"{options.baseline}: {compiler} recorded")
        return 0
    if compiler not in baseline:
        print(
            f"NO BASELINE for {compiler} (there is: {', '.join(sorted(baseline)) or 'none'}); "
            "nothing was judged and nothing recorded. `make bench-gate-update` records it."
        )
        return 0
    print(f"{compiler}; more than {options.tolerance} % above the baseline fails")
    wrong = judge(counts, baseline[compiler], options.tolerance)
    if wrong:
        print("\n".join(["", "instruction counts rose:", *wrong]), file=sys.stderr)
        print(
            "if that is meant: make bench-gate-update, and say why in the commit", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
