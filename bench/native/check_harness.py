# SPDX-License-Identifier: Apache-2.0
"""Tries the harness (run by ctest): check_harness.py PYDEDUP_BENCH. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.argv[1], *arguments], capture_output=True, text=True, check=False, timeout=240
    )


def check(holds: bool, what: object) -> None:
    if not holds:
        sys.exit(f"does not hold: {what}")


listed = run("--list")
check(listed.returncode == 0, listed.stderr)
names = [line.split()[0] for line in listed.stdout.splitlines()]
check(len(names) == len(set(names)) >= 20, names)
for area in ("hash.", "codec.", "pack.", "matmul.", "rows.", "conv."):
    check(any(name.startswith(area) for name in names), area)

# Every workload runs, and all of it is one JSON document.
done = run("--smoke", "--json")
check(done.returncode == 0, done.stderr)
document = json.loads(done.stdout)
check([result["name"] for result in document["results"]] == names, document["results"])
check(document["format"] == 1, document)
check(document["kernel"] != "" and document["pydedup"] != "", document)
for key in ("cpu", "cores", "compiler", "date", "one_thread", "two_threads"):
    check(bool(document["machine"][key]), key)
for result in document["results"]:
    check(result["seconds"] > 0 and result["rounds"] >= 1, result)
    rates = [result[k] for k in ("gb_per_second", "gflop_per_second", "items_per_second")]
    check(any(rate is not None and rate > 0 for rate in rates), result)

timed = run("--seconds", "0.01", "--kernel", "scalar", "--json", "hash", "--filter", "cached-64")
check(timed.returncode == 0, timed.stderr)
document = json.loads(timed.stdout)
check(document["kernel"] == "scalar", document)
check(document["seconds"] == 0.01, document)
check(all("hash.cached-64" in r["name"] for r in document["results"]), document)
check(all(r["rounds"] >= 5 and r["percent_of_read"] > 0 for r in document["results"]), document)

shown = run("--help")
check(shown.returncode == 0 and "--filter" in shown.stdout, shown)
for wrong, message in (
    (("--fast",), "--fast"),
    (("nothing",), "nothing"),
    (("hash", "nothing"), "nothing"),
    (("hash", "--filter", "nothing"), "nothing"),
    (("--kernel", "nothing"), "nothing"),
    (("--kernel",), "needs a value"),
    (("--seconds", "0"), "--seconds"),
    (("--seconds", "1x"), "1x"),
    (("--seconds", "nan"), "nan"),
    (("",), "unknown option"),
):
    refused = run(*wrong)
    check(refused.returncode == 2, (wrong, refused.returncode))
    check(message in refused.stderr and refused.stdout == "", (wrong, refused))
