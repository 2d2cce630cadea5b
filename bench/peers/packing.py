# SPDX-License-Identifier: Apache-2.0
"""Stored pages and page reads of each packing algorithm on problems of the paper's shape.

    python bench/packing.py

The owner sets are synthetic. They imitate the paper's workloads in number of models, of distinct
blocks and of blocks per page: half of the blocks belong to all models, a fifth to three neighbours,
the rest to one.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pydedup.packing import pack

ALGORITHMS = ("layout", "two_stage", "greedy1", "greedy2", "baseline")


def owner_sets(models: int, blocks: int) -> list[NDArray[np.int64]]:
    """Return the blocks of each model."""
    rng = np.random.default_rng(7)
    kind, first = rng.random(blocks), rng.integers(0, models, blocks)
    owned = np.zeros((models, blocks), np.bool_)
    owned[:, kind < 0.5] = True
    for step in range(3):
        near = np.flatnonzero((kind >= 0.5) & (kind < 0.7))
        owned[(first[near] + step) % models, near] = True
    own = np.flatnonzero(kind >= 0.7)
    owned[first[own], own] = True
    return [np.flatnonzero(row) for row in owned]


def main() -> None:
    """Print stored pages / page reads of all models."""
    table = Table(title="stored pages / page reads (milliseconds)")
    for name in ("problem", "bound", "least reads", *ALGORITHMS):
        table.add_column(name, justify="right", no_wrap=True)
    for models, blocks in ((6, 700), (5, 8600)):
        for capacity in (8, 44, 88):
            owners = owner_sets(models, blocks)
            cells = []
            for algorithm in ALGORITHMS:
                start = time.perf_counter()
                layout = pack(owners, capacity, algorithm=algorithm)
                spent = 1e3 * (time.perf_counter() - start)
                layout.check(owners)
                cells.append(f"{layout.stored_pages} / {layout.page_reads.sum()} ({spent:.0f})")
            least = int(layout.least_reads.sum())
            problem = f"{models} x {blocks}, l={capacity}"
            table.add_row(problem, str(layout.lower_bound), str(least), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
