# SPDX-License-Identifier: Apache-2.0
"""Searching near duplicates among many blocks: our index beside those of faiss, and MinHash.

    python bench/peers/similarity_search.py [--blocks 100000] [--queries 10000] [--only PEER]

Blocks of 64x64 f32 drawn from N(0, 0.02), so 1.6 GB of them; each query is one of them plus noise,
at a relative distance of 1 to 5 %, and asks for the nearest. Every side gets the same arrays and
two threads, is built once and asked once (pydedup five times: the median counts); where all queries
would take too long, the first ones are asked and the rate is taken for all. "In all" is building
plus all queries, and what ratios are of. Peers with a recall below 0.95 are shown and count for
nothing.

HNSW is built of the first blocks only (its time grows faster than their number, so its figures
flatter it). MinHash is MISTIQUE's way (datasketch's MinHashLSH over sets of discretised values), on
few blocks: a set of values without places tells weights hardly apart, so nearly all are candidates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from _blocks import Blocks, drawn, near
from _timing import machine
from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pydedup.similarity import L2LSH

SIDE = 64
DIM = SIDE * SIDE
THREADS = 2
#: Recall that a peer needs to be one.
ENOUGH = 0.95
TARGET = 2.0


@dataclass(slots=True)
class Row:
    """One way to search; times are seconds, rates are per second."""

    name: str
    blocks: int
    build: float
    rate: float
    recall: float
    in_all: float = 0.0  # rate of queries, building included
    ratio: float = 0.0  # of ours in all


@dataclass(frozen=True, slots=True)
class Data:
    blocks: Blocks  # (n, dim)
    queries: Blocks
    true: NDArray[np.int64]


def make_data(n_blocks: int, n_queries: int) -> Data:
    rng = np.random.default_rng(0)
    blocks = drawn(rng, n_blocks, (SIDE, SIDE)).reshape(n_blocks, -1)
    true = rng.permutation(n_blocks)[:n_queries]
    queries = near(rng, blocks[true], rng.uniform(0.01, 0.05, len(true)))
    return Data(blocks, queries, true)


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    return float((found.reshape(len(true), -1)[:, 0] == true).mean())


def ours(data: Data) -> Iterator[Row]:
    """Yield sketches alone (estimated distances), and exact distances of fetched candidates."""
    ids = np.arange(len(data.blocks))

    def build() -> L2LSH:
        index = L2LSH((SIDE, SIDE), np.float32)
        index.add(data.blocks, ids, threads=THREADS)
        return index

    builds, plain, exact = [], [], []
    for _ in range(5):
        spent, index = clock(build)
        builds.append(spent)
        ask = partial(index.query, data.queries, 1, threads=THREADS)
        spent, (found, _) = clock(ask)
        plain.append(spent)
        spent, (fetched, _) = clock(partial(ask, fetch=data.blocks.__getitem__))
        exact.append(spent)
    seconds = statistics.median(builds)
    n = len(data.queries)
    for name, times, answer in (
        ("pydedup L2LSH", plain, found),
        ("pydedup L2LSH, exact distances", exact, fetched),
    ):
        rate = n / statistics.median(times)
        yield Row(name, len(data.blocks), seconds, rate, recall(answer, data.true))


def faiss_row(
    name: str,
    index: Any,
    data: Data,
    *,
    train: int = 0,
    queries: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """Build once, ask once per setting."""

    def build() -> None:
        if train:
            index.train(data.blocks[:train])
        index.add(data.blocks)

    seconds, _ = clock(build)
    asked = data.queries[:queries]
    for label, change in (settings or {"": lambda: None}).items():
        change()
        spent, (_, found) = clock(lambda: index.search(asked, 1))
        yield Row(
            f"faiss {name}{label}",
            len(data.blocks),
            seconds,
            len(asked) / spent,
            recall(found, data.true[:queries]),
        )


def peers() -> dict[str, Callable[[Data], Iterator[Row]]]:
    """Return all peers by name: the indexes of faiss that are meant for this, and MinHash."""
    return {
        "IndexFlatL2": lambda d: faiss_row("IndexFlatL2", faiss.IndexFlatL2(DIM), d, queries=200),
        "IndexLSH": lsh,
        "IndexBinaryMultiHash": binary_hash,
        "IVF64,Flat": lambda d: inverted(64, d),
        "IVF256,Flat": lambda d: inverted(256, d),
        "PQ64x4fs,RFlat": lambda d: quantised("PQ64x4fs,RFlat", 4000, d),
        "IVF256,PQ64x4fs,RFlat": lambda d: quantised("IVF256,PQ64x4fs,RFlat", 10240, d),
        "IVF64,PQ64,RFlat": lambda d: quantised("IVF64,PQ64,RFlat", 2560, d),
        "HNSW32": graph,
        "MinHashLSH": min_hash,
    }


def lsh(data: Data) -> Iterator[Row]:
    """Yield signs of projections, compared with all others."""
    for bits in (32, 64, 128):
        yield from faiss_row(f"IndexLSH, {bits} bits", faiss.IndexLSH(DIM, bits), data)


def inverted(lists: int, data: Data) -> Iterator[Row]:
    """Yield clusters, the nearest of which are looked through."""
    index: Any = faiss.index_factory(DIM, f"IVF{lists},Flat")
    probes = {f", nprobe {n}": partial(setattr, index, "nprobe", n) for n in (1, 4)}
    yield from faiss_row(
        f"IVF{lists},Flat", index, data, train=40 * lists, queries=200, settings=probes
    )


def quantised(factory: str, train: int, data: Data) -> Iterator[Row]:
    """Yield product quantisers, the best candidates of which are compared exactly."""
    index: Any = faiss.index_factory(DIM, factory)
    index.k_factor = 8
    inner: Any = faiss.downcast_index(index.base_index)
    inner.pq.cp.niter = 5
    if factory.startswith("IVF"):
        inner.nprobe = 4
    yield from faiss_row(factory, index, data, train=train, queries=2000)


def graph(data: Data) -> Iterator[Row]:
    """Yield a graph of neighbours, of few blocks."""
    few = data.true < 4000
    index: Any = faiss.IndexHNSWFlat(DIM, 32)
    efforts = {f", efSearch {n}": partial(setattr, index.hnsw, "efSearch", n) for n in (16, 128)}
    small = Data(data.blocks[:4000], data.queries[few], data.true[few])
    yield from faiss_row("HNSW32", index, small, settings=efforts)


def binary_hash(data: Data) -> Iterator[Row]:
    """Yield what an expert would put together: signs of projections, hashed by IndexBinaryHash."""
    bits = 64

    def project(blocks: Blocks) -> NDArray[np.uint8]:
        return np.packbits(blocks @ projections > 0, axis=1)

    projections = np.random.default_rng(1).standard_normal((DIM, bits), np.float32)
    index = faiss.IndexBinaryMultiHash(bits, 4, 16)
    seconds, _ = clock(lambda: index.add(project(data.blocks)))
    spent, (_, found) = clock(lambda: index.search(project(data.queries), 1))
    rate = len(data.queries) / spent
    yield Row(
        "numpy signs + faiss IndexBinaryMultiHash 4x16",
        len(data.blocks),
        seconds,
        rate,
        recall(found, data.true),
    )


def min_hash(data: Data) -> Iterator[Row]:
    """Yield MISTIQUE's approximate match on few blocks: discretised values as a set."""
    bins = np.linspace(-1, 1, 10000)
    count = min(200, len(data.blocks))

    def sketch(block: Blocks) -> MinHash:
        sketched = MinHash(num_perm=128)
        sketched.update_batch([value.tobytes() for value in np.unique(np.digitize(block, bins))])
        return sketched

    def build() -> MinHashLSH:
        index = MinHashLSH(threshold=0.7, num_perm=128)
        for number in range(count):
            index.insert(number, sketch(data.blocks[number]))
        return index

    seconds, index = clock(build)
    asked = near(np.random.default_rng(2), data.blocks[:count], 0.02)
    spent, answers = clock(lambda: [index.query(sketch(block)) for block in asked])
    right = float(np.mean([number in answer for number, answer in enumerate(answers)]))
    candidates = float(np.mean([len(answer) for answer in answers]))
    name = f"datasketch MinHashLSH ({candidates:.0f} candidates each)"
    yield Row(name, count, seconds, count / spent, right)


def finish(rows: list[Row], n_queries: int) -> None:
    """Fill in what follows from the rest; pydedup's first row is what the others are beside."""
    for row in rows:
        row.in_all = n_queries / (row.build + n_queries / row.rate)
    for row in rows:
        row.ratio = rows[0].in_all / row.in_all


def main() -> None:
    """Measure, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--queries", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument(
        "--only", action="append", choices=list(peers()), metavar="PEER", help=", ".join(peers())
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    faiss.omp_set_num_threads(THREADS)
    data = make_data(options.blocks, min(options.queries, options.blocks))
    rows: list[Row] = []
    chosen = [peer for name, peer in peers().items() if not options.only or name in options.only]
    for side in (ours, *chosen):
        for row in side(data):
            rows.append(row)
            print(f"  {row.name}: {row.build:.2f} s, {row.rate:.0f}/s, {row.recall:.3f}",
                  file=sys.stderr, flush=True)  # fmt: skip
    finish(rows, len(data.queries))
    about = machine()
    if options.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=1, default=asdict))
        return
    title = (
        f"kernel {about['kernel']}, {about['cpu']}; {len(data.queries)} queries, {THREADS} threads"
    )
    table = Table(title=title, title_justify="left")
    names = ("index", "blocks", "build s", "queries/s", "recall", "queries/s in all", "pydedup is")
    for name in names:
        table.add_column(name, justify="left" if name == "index" else "right")
    for row in rows:
        table.add_row(
            row.name, str(row.blocks), f"{row.build:.2f}", f"{row.rate:.0f}", f"{row.recall:.3f}",
            f"{row.in_all:.0f}", "" if row is rows[0] else f"{row.ratio:.1f}x",
        )  # fmt: skip
    console = Console(width=max(130, Console().width))
    console.print(table)
    able = [
        row
        for row in rows
        if row.recall >= ENOUGH and row.blocks == len(data.blocks) and "pydedup" not in row.name
    ]
    if able:
        best = max(able, key=lambda row: row.in_all)
        verdict = "" if best.ratio >= TARGET else ", missed"
        alone = rows[0].rate / best.rate
        console.print(
            f"best peer in all: {best.name}; pydedup {best.ratio:.1f}x "
            f"(target {TARGET:.0f}x{verdict}); queries alone {alone:.1f}x"
        )


if __name__ == "__main__":
    main()
