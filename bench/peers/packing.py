# SPDX-License-Identifier: Apache-2.0
"""Page packing: what each algorithm stores and reads, and how long it takes.

    python bench/peers/packing.py [--netsdb PATH [--all]] [--json]

Without options: the five algorithms on synthetic owner sets of the paper's shape. They imitate its
workloads in number of models, of distinct blocks and of blocks per page: half of the blocks belong
to all models, a fifth to three neighbours, the rest to one.

With --netsdb: our `layout` beside the packers of the paper's authors, on their own owner sets. Get
them with

    git clone --depth 1 https://github.com/asu-cactus/netsdb

Their code is loaded from that checkout and run once per problem (they take seconds; --all adds the
two that take minutes). They get Python sets and so does one of our two timings; the other gets the
same ids as arrays. Every layout of ours is proved by the checker, outside the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pydedup.packing import Algorithm, Layout, pack

ALGORITHMS: tuple[Algorithm, ...] = ("layout", "two_stage", "greedy1", "greedy2", "baseline")
FOLDER = Path("model-inference/deduplication/page-packing")
ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Row:
    """One problem and packer. Reads of all models; theirs do not say what a model reads."""

    problem: str
    packer: str
    milliseconds: float
    pages: int
    bound: int
    reads: int | None = None
    least_reads: int | None = None
    optimal: bool | None = None


def timed(call: Callable[[], Layout]) -> tuple[float, Layout]:
    """Return the median time in ms, and the layout."""
    spent = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        layout = call()
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent), layout


def row_of(problem: str, packer: str, milliseconds: float, layout: Layout) -> Row:
    return Row(
        problem,
        packer,
        milliseconds,
        layout.stored_pages,
        layout.lower_bound,
        int(layout.page_reads.sum()),
        int(layout.least_reads.sum()),
        layout.optimal,
    )


def owner_sets(models: int, blocks: int) -> list[NDArray[np.int64]]:
    """Return the blocks of each model of a synthetic problem."""
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


def synthetic() -> Iterator[Row]:
    """Yield our five algorithms."""
    for models, blocks in ((6, 700), (5, 8600)):
        owners = owner_sets(models, blocks)
        for capacity in (8, 44, 88):
            for algorithm in ALGORITHMS:
                spent, layout = timed(partial(pack, owners, capacity, algorithm=algorithm))
                layout.check(owners)
                yield row_of(
                    f"{models} models, {blocks} blocks, l={capacity}", algorithm, spent, layout
                )


def load_packers(netsdb: Path) -> ModuleType:
    """Import the authors' module; what it imports without need is not installed for it."""
    for name in ("numpy.lib.arraysetops", "sympy.utilities.iterables"):
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            if part not in sys.modules:
                sys.modules[part] = ModuleType(part)
    for name, module in (
        ("isin", "numpy.lib.arraysetops"),
        ("multiset_permutations", "sympy.utilities.iterables"),
        ("multiset_combinations", "sympy.utilities.iterables"),
    ):
        if not hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, None)
    path = netsdb / FOLDER / "algorithms" / "PagePacking.py"
    spec = importlib.util.spec_from_file_location("netsdb_page_packing", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{netsdb} is no checkout of netsDB: there is no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_owners(netsdb: Path, name: str) -> list[set[int]]:
    """Return the blocks of each model as the authors' scripts make them."""
    # Pickles: no worse than the code of the same checkout, which is about to run.
    data: dict[str, Any] = np.load(netsdb / FOLDER / "data" / name, allow_pickle=True).item()
    if "list_of_tensors" in data:  # five tensors per model
        tensors = data["list_of_tensors"]
        starts = range(0, len(tensors), 5)
        return [set[int]().union(*tensors[start : start + 5]) for start in starts]
    return [set(mapping.values()) for mapping in data["tensor_mapping"]]


def beside_netsdb(netsdb: Path, *, slow: bool) -> Iterator[Row]:
    """Yield our layout and their packers on their problems."""
    theirs = load_packers(netsdb)
    for file, prefix, capacities in (
        ("detector_output_same_size_unshared_located_random.npy", "w2v", (8,)),
        ("tensor_list.npy", "text_classification", (8,)),
        ("tensor_list_300.npy", "text_classification", (8, 44, 46, 88)),
    ):
        owners = load_owners(netsdb, file)
        arrays = [np.array(sorted(owned)) for owned in owners]
        blocks = len(set[int]().union(*owners))
        for capacity in capacities:
            problem = f"{len(owners)} models, {blocks} blocks, l={capacity}"
            spent, layout = timed(partial(pack, arrays, capacity))
            layout.check(owners)
            yield row_of(problem, "layout, arrays", spent, layout)
            spent, layout = timed(partial(pack, owners, capacity))
            yield row_of(problem, "layout, sets", spent, layout)
            bound = layout.lower_bound
            sets = [set(owned) for owned in owners]
            lists = [list(owned) for owned in owners]
            runs: list[tuple[str, Sequence[Any]]] = [
                (f"{prefix}_greedy1", sets),
                (f"{prefix}_twostage", sets),
            ]
            if slow:
                runs += [("bin_pack_greedy", lists), ("bin_pack_base", lists)]
            for name, given in runs:
                start = time.perf_counter()
                found = getattr(theirs, name)(given, capacity)
                spent = 1e3 * (time.perf_counter() - start)
                schemes = found[0] if isinstance(found, tuple) else found
                (scheme,) = schemes
                yield Row(problem, f"netsDB {name}", spent, scheme.numBins, bound)


def show(rows: Sequence[Row]) -> None:
    table = Table(title="page packing; ms are medians (netsDB: one run)", title_justify="left")
    for name in (
        "problem",
        "packer",
        "ms",
        "of fastest netsDB",
        "pages / bound",
        "reads / least",
        "",
    ):
        table.add_column(name, justify="left" if name in ("problem", "packer") else "right")
    last = None
    for row in rows:
        same = [
            r.milliseconds for r in rows if r.problem == row.problem and r.packer[:6] == "netsDB"
        ]
        faster = f"{min(same) / row.milliseconds:,.0f}x" if same and row.reads is not None else ""
        ratio = (
            ""
            if row.reads is None or not row.least_reads
            else f" ({row.reads / row.least_reads:.4f})"
        )
        table.add_row(
            "" if row.problem == last else row.problem,
            row.packer,
            f"{row.milliseconds:,.2f}",
            faster,
            f"{row.pages} / {row.bound}",
            "" if row.reads is None else f"{row.reads} / {row.least_reads}{ratio}",
            "optimal" if row.optimal else "",
        )
        last = row.problem
    Console(width=150).print(table)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--netsdb", type=Path, metavar="PATH", help="a checkout of netsDB")
    parser.add_argument("--all", action="store_true", help="also their packers that take minutes")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    if options.netsdb is None:
        rows = list(synthetic())
    else:
        rows = list(beside_netsdb(options.netsdb, slow=options.all))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
