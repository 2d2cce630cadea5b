# SPDX-License-Identifier: Apache-2.0
"""``layout`` against an exact solver (HiGHS, branch and cut) on small random problems.

The solver knows nothing of how layouts are made: it gets one integer program per problem and
number of pages. First come the fewest pages, then the least weighted reads on so many.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import highspy
import numpy as np
import pytest

from pydedup.packing import pack


@dataclass(frozen=True)
class Problem:
    owners: list[list[int]]
    capacity: int
    sizes: dict[int, int]
    weights: list[int]


def drawn(seed: int, *, by_bytes: bool) -> Problem:
    """2 to 4 models, 4 to 14 blocks (12 by bytes), 2 to 4 blocks per page; every other weighted."""
    random = np.random.default_rng([int(by_bytes), seed])
    models = int(random.integers(2, 5))
    blocks = int(random.integers(4, 13 if by_bytes else 15))
    sets = random.integers(1, 1 << models, blocks).tolist()
    owners = [[b for b, owned in enumerate(sets) if owned >> m & 1] for m in range(models)]
    weights = random.integers(1, 9, models).tolist() if seed % 2 else [1] * models
    if by_bytes:
        sizes = dict(enumerate(random.integers(10, 100, blocks).tolist()))
        return Problem(owners, int(random.integers(100, 250)), sizes, weights)
    return Problem(owners, int(random.integers(2, 5)), dict.fromkeys(range(blocks), 1), weights)


def least_reads(problem: Problem, pages: int) -> int | None:
    """Return the least weighted reads on so many pages; None when the blocks do not fit."""
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("mip_rel_gap", 0.0)
    # Blocks with the same owners and size are alike: how many of them go on each page?
    owner_sets = {
        b: tuple(m for m, o in enumerate(problem.owners) if b in o) for b in problem.sizes
    }
    kinds = Counter((owner_sets[b], size) for b, size in problem.sizes.items())
    reads = {(m, p): solver.addBinary() for m in range(len(problem.owners)) for p in range(pages)}
    count = {(kind, p): solver.addIntegral(0, kinds[kind]) for kind in kinds for p in range(pages)}
    for kind, number in kinds.items():
        solver.addConstr(sum(count[kind, p] for p in range(pages)) == number)
        for p in range(pages):
            for model in kind[0]:
                solver.addConstr(count[kind, p] <= number * reads[model, p])
    for p in range(pages):
        solver.addConstr(sum(kind[1] * count[kind, p] for kind in kinds) <= problem.capacity)
    # Implied, but it saves the solver most of its time.
    for model, owned in enumerate(problem.owners):
        amount = sum(problem.sizes[b] for b in owned)
        least = math.ceil(amount / problem.capacity)
        solver.addConstr(sum(reads[model, p] for p in range(pages)) >= least)
    # Pages are interchangeable: those that the first model reads come first.
    for p in range(1, pages):
        solver.addConstr(reads[0, p - 1] >= reads[0, p])
    solver.minimize(sum(problem.weights[m] * read for (m, _), read in reads.items()))
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    assert status == highspy.HighsModelStatus.kOptimal
    return round(solver.getObjectiveValue())


def optimum(problem: Problem) -> tuple[int, int]:
    """Return the fewest pages and, on these, the least weighted reads."""
    pages = math.ceil(sum(problem.sizes.values()) / problem.capacity)
    while (reads := least_reads(problem, pages)) is None:
        pages += 1
    return pages, reads


@pytest.mark.parametrize(
    ("by_bytes", "first", "last"),
    [(False, start, start + 40) for start in range(0, 160, 40)]
    + [(True, start, start + 20) for start in range(0, 60, 20)],
)
def test_layout_is_optimal_on_small_problems(by_bytes: bool, first: int, last: int) -> None:
    for seed in range(first, last):
        problem = drawn(seed, by_bytes=by_bytes)
        sizes = problem.sizes if by_bytes else None
        layout = pack(problem.owners, problem.capacity, sizes=sizes, weights=problem.weights)
        layout.check(problem.owners, sizes=sizes)
        found = (layout.stored_pages, int(layout.page_reads @ np.array(problem.weights)))
        assert found == optimum(problem), f"seed {seed}: {problem}"
        assert layout.optimal
        assert layout.stored_pages >= layout.lower_bound
