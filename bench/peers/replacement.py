# SPDX-License-Identifier: Apache-2.0
"""Replacement policies beside each other, on traces of several kinds.

Traces are made here from the traffic they imitate (the shares of a family of fine-tunes, Zipf and
uniform popularity, one model larger than the pool, a nightly pass over everything), or recorded
with ``store.record()`` and given as files. Misses are those of a pool that begins empty. "optimum"
knows the future; "fixed" knows how often each page of the trace is used, but not when: it keeps
those used most, which no policy does better than where calls are independent of each other
(Aho, Denning, Ullman, "Principles of Optimal Page Replacement", JACM 18(1), 1971).

    python bench/peers/replacement.py [TRACE.npz ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pydedup.replacement import POLICIES, Trace, replay

PAGE = 1 << 20
SHARED, PRIVATE, MODELS = 450, 50, 12


class Recorder:
    """Collects calls and the pages each of them uses."""

    def __init__(self) -> None:
        self.pages: list[NDArray[np.int64]] = []
        self.owners: list[int] = []

    def call(self, owner: int, pages: NDArray[np.int64]) -> None:
        self.owners.append(owner)
        self.pages.append(pages)

    def trace(self) -> Trace:
        lengths = [len(pages) for pages in self.pages]
        used = np.concatenate(self.pages)
        calls = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.uint32), lengths)
        return Trace(used, np.full(len(used), PAGE, np.uint32), calls, np.array(self.owners))


def family(shared: int, private: int, models: int) -> list[NDArray[np.int64]]:
    """Pages of models that have ``shared`` of their pages in common."""
    common = np.arange(shared)
    return [
        np.concatenate((common, shared + model * private + np.arange(private))).astype(np.int64)
        for model in range(models)
    ]


def zipf(n: int, s: float = 1.0) -> NDArray[np.float64]:
    weights = np.arange(1, n + 1) ** -s
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


def popular(chances: NDArray[np.float64], calls: int, seed: int) -> Trace:
    """Dense models: each call reads all pages of its model, front to back."""
    rng = np.random.default_rng(seed)
    pages = family(SHARED, PRIVATE, MODELS)
    record = Recorder()
    for model in rng.choice(MODELS, calls, p=chances):
        record.call(int(model), pages[model])
    return record.trace()


def many_tenants(calls: int, seed: int) -> Trace:
    """200 small models, three quarters shared in groups of ten, Zipf."""
    rng = np.random.default_rng(seed)
    record = Recorder()
    chances = zipf(200, 1.1)
    places = rng.permutation(200)
    for rank in rng.choice(200, calls, p=chances):
        model = int(places[rank])
        group = 100_000 + model // 10 * 12 + np.arange(12)
        record.call(model, np.concatenate((group, model * 4 + np.arange(4))).astype(np.int64))
    return record.trace()


def embeddings(calls: int, seed: int) -> Trace:
    """Requests of few ids: each call touches some pages of a large table, all of a small head."""
    rng = np.random.default_rng(seed)
    record = Recorder()
    words = zipf(1000, 0.8)
    for model in rng.choice(MODELS, calls, p=zipf(MODELS)):
        table = np.unique(rng.choice(1000, 40, p=words))
        own = table % 10 == 0  # a tenth of the table is private
        pages = np.where(own, 10_000 + model * 1000 + table, table)
        head = 100_000 + model * 4 + np.arange(4)
        record.call(int(model), np.concatenate((pages, head)).astype(np.int64))
    return record.trace()


def loop(calls: int) -> Trace:
    """One dense model, larger than the pool."""
    record = Recorder()
    for _ in range(calls):
        record.call(0, np.arange(1000, dtype=np.int64))
    return record.trace()


def with_scans(calls: int, seed: int) -> Trace:
    """Zipf over the family, and a pass over 2,000 other pages after each hundredth call."""
    rng = np.random.default_rng(seed)
    pages = family(SHARED, PRIVATE, MODELS)
    record = Recorder()
    for i, model in enumerate(rng.choice(MODELS, calls, p=zipf(MODELS))):
        record.call(int(model), pages[model])
        if i % 100 == 99:
            record.call(1000 + i, 10_000_000 + i * 10_000 + np.arange(2000, dtype=np.int64))
    return record.trace()


def shifting(calls: int, seed: int) -> Trace:
    """Zipf over the family; every 100 calls other models become the popular ones."""
    rng = np.random.default_rng(seed)
    pages = family(SHARED, PRIVATE, MODELS)
    record = Recorder()
    for i in range(calls):
        if i % 100 == 0:
            places = rng.permutation(MODELS)
        model = int(places[rng.choice(MODELS, p=zipf(MODELS, 1.5))])
        record.call(model, pages[model])
    return record.trace()


TRACES: dict[str, tuple[Callable[[], Trace], int]] = {
    "Zipf, 12 variants, 90 % shared": (lambda: popular(zipf(MODELS), 400, 1), 600),
    "uniform, 12 variants, 90 % shared": (
        lambda: popular(np.full(MODELS, 1 / MODELS), 400, 2),
        600,
    ),
    "Zipf, 200 tenants, 3/4 shared by ten": (lambda: many_tenants(4000, 3), 300),
    "few ids of embeddings, Zipf": (lambda: embeddings(3000, 4), 500),
    "one model, twice the pool": (lambda: loop(40), 500),
    "Zipf with passes over others": (lambda: with_scans(400, 5), 600),
    "Zipf, popularity shifts": (lambda: shifting(600, 6), 600),
}


def fixed_misses(trace: Trace, memory: int) -> int:
    """Return the misses when the pages that are used most are kept from their first use on."""
    _, first, uses = np.unique(trace.pages, return_index=True, return_counts=True)
    by_use = np.argsort(-uses, kind="stable")
    kept = by_use[np.cumsum(trace.nbytes[first][by_use], dtype=np.int64) <= memory]
    return len(kept) + int(uses.sum() - uses[kept].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--pages", type=int, default=512, help="pool of recorded traces, in MiB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    named = (
        {name: (make(), pages * PAGE) for name, (make, pages) in TRACES.items()}
        if not options.traces
        else {path.name: (Trace.load(path), options.pages * PAGE) for path in options.traces}
    )
    policies = [*POLICIES, "optimum"]
    table = Table(title="misses per 100 uses")
    table.add_column("trace")
    for policy in [*policies, "fixed", "LRU / reuse", "LRU / fixed", "reuse / best"]:
        table.add_column(policy, justify="right")
    rows = []
    for name, (trace, memory) in named.items():
        misses = {policy: replay(trace, memory, policy).misses for policy in policies}
        best = min(misses[policy] for policy in POLICIES)
        misses["fixed"] = fixed_misses(trace, memory)
        rows.append({"trace": name, "uses": len(trace), "memory": memory, "misses": misses})
        table.add_row(
            name,
            *(f"{100 * count / len(trace):.2f}" for count in misses.values()),
            f"{misses['lru'] / misses['reuse']:.2f}",
            f"{misses['lru'] / misses['fixed']:.2f}",
            f"{misses['reuse'] / best:.3f}",
        )
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
