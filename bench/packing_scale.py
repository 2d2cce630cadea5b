# SPDX-License-Identifier: Apache-2.0
"""Time and memory of packing as stores grow, each size in a process of its own.

    python bench/packing_scale.py [--blocks-per-page N] [--check] [--json]

Owner sets are synthetic and look like a hub of fine-tuned models: models come in families of 2 to
200 (few large ones, many small); the blocks of a family come in runs, its tensors, 40 blocks on
average; a run belongs to k models of the family, k drawn from a Zipf law, so most tensors are one
model's own, and some are everybody's. One run in ten is torn up: each of its blocks has owners of
its own. The last line compares each size with the one before.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pydedup.packing import pack

SIZES = ((1_000, 100_000), (1_000, 1_000_000), (10_000, 10_000_000))


def family_sizes(rng: np.random.Generator, models: int) -> NDArray[np.int64]:
    """Sizes from 2 to 200, which add up to ``models``."""
    sizes: list[int] = []
    left = models
    while left > 0:
        size = min(left, int(np.clip(rng.pareto(0.9) * 4 + 2, 2, 200)))
        sizes.append(size)
        left -= size
    return np.array(sizes, np.int64)


def owners_of(models: int, blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the owner sets as (row pointers, block ids)."""
    rng = np.random.default_rng(11)
    sizes = family_sizes(rng, models)
    first_model = np.cumsum(sizes) - sizes
    lengths = rng.geometric(1 / 40, blocks // 20)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), blocks) + 1]
    lengths[-1] -= lengths.sum() - blocks
    torn = rng.random(len(lengths)) < 0.1
    # A run is a range of blocks with one owner set; a torn one falls into runs of one block.
    runs = np.ones(np.where(torn, lengths, 1).sum(), np.int64)
    where = np.cumsum(np.where(torn, lengths, 1)) - 1
    runs[where[~torn]] = lengths[~torn]
    family = np.repeat(
        rng.choice(len(sizes), len(lengths), p=sizes / models), np.where(torn, lengths, 1)
    )
    count = np.minimum(rng.zipf(1.6, len(runs)), sizes[family])
    start = rng.integers(0, sizes[family])
    stride = np.where(rng.random(len(runs)) < 0.5, 1, rng.integers(1, 1 + sizes[family]))
    stride = np.where(np.gcd(stride, sizes[family]) == 1, stride, 1)
    # (run, owner) pairs, then (block, owner) pairs.
    run = np.repeat(np.arange(len(runs)), count)
    step = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    owner = first_model[family[run]] + (start[run] + step * stride[run]) % sizes[family[run]]
    first_block = np.cumsum(runs) - runs
    order = np.argsort(owner, kind="stable")
    run, owner = run[order], owner[order]
    per_model = np.bincount(owner, weights=runs[run], minlength=models).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(per_model)])
    repeat = runs[run]
    ids = np.repeat(first_block[run] - (np.cumsum(repeat) - repeat), repeat)
    ids += np.arange(len(ids))
    return indptr, ids


def peak_mib() -> float:
    """Return the largest resident size of this process so far, in MiB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM")
    return int(found[1]) / 1024


def measure(models: int, blocks: int, per_page: int, check: bool) -> dict[str, Any]:
    """Pack once in this process."""
    owners = owners_of(models, blocks)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: without the generator's
    before = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    layout = pack(owners, per_page)
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_mib()
    if check:
        layout.check(owners)
    return {
        "models": models,
        "blocks": blocks,
        "pairs": len(owners[1]),
        "seconds": spent,
        "cpu_seconds": cpu,
        "input_mib": (owners[0].nbytes + owners[1].nbytes) / 2**20,
        "rss_before_mib": before,
        "peak_rss_mib": peak,
        "stored_pages": layout.stored_pages,
        "lower_bound": layout.lower_bound,
        "reads": int(layout.page_reads.sum()),
        "least_reads": int(layout.least_reads.sum()),
    }


def main() -> None:
    """Measure each size in a child, so that its peak is its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks-per-page", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="prove each layout, untimed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, nargs=2, metavar=("MODELS", "BLOCKS"))
    arguments = parser.parse_args()
    if arguments.one is not None:
        models, blocks = arguments.one
        print(json.dumps(measure(models, blocks, arguments.blocks_per_page, arguments.check)))
        return
    rows = []
    for models, blocks in SIZES:
        command = [sys.executable, __file__, "--one", str(models), str(blocks)]
        command += ["--blocks-per-page", str(arguments.blocks_per_page)]
        command += ["--check"] if arguments.check else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    if arguments.json:
        print(json.dumps(rows))
        return
    table = Table(title=f"layout, {arguments.blocks_per_page} blocks per page")
    for name in (
        "models",
        "blocks",
        "pairs",
        "seconds",
        "of CPU",
        "x",
        "peak RSS",
        "before packing",
        "pages / bound",
        "reads / least",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        table.add_row(
            f"{row['models']:,}",
            f"{row['blocks']:,}",
            f"{row['pairs']:,}",
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            "" if last is None else f"{row['seconds'] / last:.1f}",
            f"{row['peak_rss_mib']:,.0f} MiB",
            f"{row['rss_before_mib']:,.0f} MiB",
            f"{row['stored_pages']:,} / {row['lower_bound']:,}",
            f"{row['reads'] / row['least_reads']:.3f}",
        )
        last = row["seconds"]
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
