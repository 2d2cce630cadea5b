# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""Rows of a table scored by workers of a Ray cluster beside one process that scores them.

    python bench/peers/ray_scoring.py [--rows N] [--rounds N] [--json]

A private PostgreSQL and a private Ray on this machine; a net of 16 x 64 x 64 x 1; a thread for each
worker, and for the one process. Peers take turns. What it takes until the workers are at it, a run
over as good as no rows, is a line of its own, and is taken off the others of Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["PYDEDUP_THREADS"] = "1"  # before anything computes

import numpy as np
import psycopg
from rich.console import Console
from rich.table import Table

import pydedup
import pydedup.ray
from pydedup.graph import Graph, Node
from pydedup.testing.servers import embedded_postgres_at

FEATURES, HIDDEN = 16, 64


def fill(url: str, rows: int) -> str:
    """Make a store with a net and a table of features; return the query."""
    rng = np.random.default_rng(1)
    sizes = (FEATURES, HIDDEN, HIDDEN, 1)
    weights, nodes = {}, []
    for number, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{number}"] = rng.standard_normal((n_out, n_in)).astype(np.float32)
        names = (f"x{number}",), f"y{number}"
        nodes.append(Node("linear", *names, {"weight": f"w{number}"}))
        nodes.append(Node("relu", (f"y{number}",), f"x{number + 1}", {}))
    nodes.pop()
    with pydedup.open(url) as store:
        store.add("net@1", weights, graph=Graph(("x0",), (nodes[-1].output,), tuple(nodes)))
    columns = ", ".join(f"f{i}" for i in range(FEATURES))
    made = ", ".join(f"random() AS f{i}" for i in range(FEATURES))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"CREATE TABLE people AS SELECT i::bigint AS id, {made} "
            f"FROM generate_series(1, {rows}) i"
        )
        connection.execute("ALTER TABLE people ADD PRIMARY KEY (id)")
        connection.execute("VACUUM ANALYZE people")
    return f"SELECT id, {columns} FROM people"


def measured(url: str, work: Callable[[], int], rows: int) -> float:
    """Return the seconds of one run, whose predictions go away after it."""
    begun = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - begun
    assert done == rows, f"{done} rows were scored, and there are {rows}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE scored")
        connection.execute("CHECKPOINT")
    return seconds


def run(rows: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each peer and round."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        server = embedded_postgres_at(Path(folder) / "pg")
        try:
            url = server.get_uri()
            query = fill(url, rows)

            def plain() -> int:
                with pydedup.open(url, memory="128MiB") as store:
                    return store.score(query, "net@1", into="scored").rows

            def on_ray(workers: int, query: str = query) -> int:
                return pydedup.ray.score(
                    query, url, "net@1", into="scored", workers=workers, memory="128MiB"
                ).rows

            with pydedup.ray.attached("local", cpus=2):
                few = f"{query} WHERE id <= 64"
                peers: dict[str, tuple[Callable[[], int], int]] = {
                    "one process": (plain, rows),
                    "Ray, no rows, 1 worker": (lambda: on_ray(1, few), 64),
                    "Ray, 1 worker": (lambda: on_ray(1), rows),
                    "Ray, no rows, 2 workers": (lambda: on_ray(2, few), 64),
                    "Ray, 2 workers": (lambda: on_ray(2), rows),
                }
                on_ray(2, few)  # what is loaded once
                with psycopg.connect(url, autocommit=True) as connection:
                    connection.execute("DROP TABLE scored")
                times: dict[str, list[float]] = {name: [] for name in peers}
                for _ in range(rounds):
                    for name, (work, expected) in peers.items():
                        times[name].append(measured(url, work, expected))
        finally:
            server.cleanup()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times = run(given.rows, given.rounds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    begins = {n: median[f"Ray, no rows, {n} worker{'s' if n > 1 else ''}"] for n in (1, 2)}
    one, two = median["Ray, 1 worker"] - begins[1], median["Ray, 2 workers"] - begins[2]
    found = {
        "overhead of Ray, 1 worker, after start-up": one / median["one process"] - 1,
        "2 workers against 1, after start-up": one / two,
        "2 workers against 1, start-up included": median["Ray, 1 worker"]
        / median["Ray, 2 workers"],
    }
    if given.json:
        print(json.dumps({"rows": given.rows, "seconds": times, "found": found}))
        return
    table = Table(title=f"{given.rows:,} rows, medians of {given.rounds}")
    for name in ("", "seconds", "rows/s", "all rounds"):
        table.add_column(name, justify="left" if not name else "right")
    for name, seconds in times.items():
        rate = "" if "no rows" in name else f"{given.rows / median[name]:,.0f}"
        each = " ".join(f"{one:.1f}" for one in seconds)
        table.add_row(name, f"{median[name]:.1f}", rate, each)
    console = Console()
    console.print(table)
    for name, value in found.items():
        console.print(f"{name}: {value:+.1%}" if "overhead" in name else f"{name}: {value:.2f}x")


if __name__ == "__main__":
    main()
