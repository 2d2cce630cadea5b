# SPDX-License-Identifier: Apache-2.0
"""pydedup's kernels beside what an expert would otherwise use, in turns, in one process.

    python bench/peers/kernels.py [--seconds S] [--json]

hash: xxHash's XXH3-128 on pieces of the same size. matmul: torch's ``linear`` on a weight that it
holds as a whole, against a weight that stays on the pages of a pool. Each pair alternates, round
by round, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from rich.console import Console
from rich.table import Table

import pydedup
from pydedup import config, policies
from pydedup.hashing import hash_blocks, hash_buffer

PIECE = 64 * 1024
SIZE = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one pair; ``ratio`` above 1 means that pydedup is faster."""

    case: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    rounds: int


def compare(
    case: str,
    peer: str,
    unit: str,
    work: float,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    seconds: float,
) -> Row:
    """Time both in turns; ``work`` over the median time is what is reported."""
    ours()
    theirs()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, spent in ((ours, times[0]), (theirs, times[1])):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    mine, other = (work / statistics.median(spent) / 1e9 for spent in times)
    return Row(case, peer, unit, mine, other, mine / other, len(times[0]))


def hash_rows(seconds: float) -> list[Row]:
    rng = np.random.default_rng(0)
    hot = rng.integers(0, 256, PIECE, np.uint8).tobytes()
    matrix = rng.standard_normal((32768, 1024), np.float32)
    blocks = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, PIECE)

    def peer_blocks() -> None:
        for block in blocks:
            xxhash.xxh3_128_digest(block)

    def peer_strided() -> None:
        for top in range(0, 32768, 64):
            for left in range(0, 1024, 64):
                xxhash.xxh3_128_digest(matrix[top : top + 64, left : left + 64].tobytes())

    return [
        compare(
            "hash, 64 KiB in cache, 64 times",
            "xxh3_128",
            "GB/s",
            64 * PIECE,
            lambda: [hash_buffer(hot) for _ in range(64)],
            lambda: [xxhash.xxh3_128_digest(hot) for _ in range(64)],
            seconds,
        ),
        compare(
            "hash, 128 MiB from memory in 64 KiB rows, 1 thread",
            "xxh3_128",
            "GB/s",
            matrix.nbytes,
            lambda: hash_blocks(blocks, (1, PIECE), threads=1),
            peer_blocks,
            seconds,
        ),
        compare(
            "hash, 64x64 f32 blocks of a 1024-wide matrix, 1 thread",
            "copy + xxh3_128",
            "GB/s",
            matrix.nbytes,
            lambda: hash_blocks(matrix, (64, 64), threads=1),
            peer_strided,
            seconds,
        ),
    ]


def matmul_rows(seconds: float) -> list[Row]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((SIZE, SIZE), np.float32) * np.float32(0.02)
    torch.set_num_threads(2)
    whole = torch.from_numpy(weight)
    rows = []
    with tempfile.TemporaryDirectory() as folder, pydedup.open(Path(folder) / "m.db") as store:
        store.add("m", {"w": weight}, policy=policies.Exact())
        stored = store.tensor("m", "w")
        for m in (1, 8, 32, 128, 512):
            x = rng.standard_normal((m, SIZE), np.float32)
            given = torch.from_numpy(x)
            reference = x.astype(np.float64) @ weight.T.astype(np.float64)
            error = np.abs(stored.matmul(x) - reference).max() / np.abs(reference).max()
            assert error < 1e-5, f"m={m}: wrong by {error}"
            rows.append(
                compare(
                    f"x @ W.T, {SIZE}x{SIZE} f32 from pages, m={m}, 2 threads",
                    "torch",
                    "GFLOP/s",
                    2.0 * m * SIZE * SIZE,
                    lambda x=x: stored.matmul(x),  # type: ignore[misc]
                    lambda g=given: torch.nn.functional.linear(g, whole),
                    seconds,  # type: ignore[misc]
                )
            )
    return rows


def main() -> None:
    """Run all pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each pair")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = hash_rows(options.seconds) + matmul_rows(options.seconds)
    if options.json:
        print(
            json.dumps(
                {"kernel": config.kernels().in_use, "rows": [asdict(r) for r in rows]}, indent=1
            )
        )
        return
    table = Table(title=f"kernel {config.kernels().in_use}; ratio above 1: pydedup is faster")
    for name in ("case", "peer", "pydedup", "peer's", "unit", "ratio"):
        table.add_column(name, justify="left" if name in ("case", "peer", "unit") else "right")
    for row in rows:
        table.add_row(
            row.case, row.peer, f"{row.ours:.1f}", f"{row.theirs:.1f}", row.unit, f"{row.ratio:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
