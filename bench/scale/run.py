# SPDX-License-Identifier: Apache-2.0
"""What a store of a million models takes, on paper, and how far the paper is to be believed.

    python bench/scale/run.py measure [--postgres URL]   # prices and families -> measured.json
    python bench/scale/run.py simulate [--models 1000000] [--bytes 100e12] ...
    python bench/scale/run.py check [--models 300] [--url URL]
    python bench/scale/run.py limits [--models 20000] [--url URL]

`measure` runs the real code on real families for some minutes; `simulate` needs nothing but
measured.json, which is in the repository; `check` builds a store of a family that was not measured
and holds each prediction against it; `limits` times what reads whole tables. docs/scale.md says
what is assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from _measure import Measured, load
from _nodes import ROUTINGS
from _show import compared_table, simulated
from _simulate import Scenario
from rich.console import Console

HERE = Path(__file__).resolve().parent
console = Console(width=170)


def tell(text: object) -> None:
    """Print progress to standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, default=HERE / "measured.json")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for scratch stores")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="prices of this machine, statistics of families")
    one.add_argument("--postgres", help="URL of an empty PostgreSQL database: bytes per row there")
    one = commands.add_parser("simulate", help="predict a store of any size")
    plain = Scenario()
    one.add_argument("--models", type=int, default=plain.models)
    one.add_argument("--bytes", type=float, default=plain.total_bytes, help="before deduplication")
    one.add_argument("--mix", help='shares of models, e.g. "minilm=0.5,imdb=0.4,copy=0.1"')
    one.add_argument("--alone", type=float, default=plain.alone, help="share without a relative")
    one.add_argument("--largest-family", type=int, default=plain.largest_family)
    one.add_argument("--popularity", type=float, default=plain.popularity, help="Zipf's exponent")
    one.add_argument("--requests", type=int, default=plain.requests, help="per node")
    one.add_argument("--memory", type=float, default=plain.memory / 2**30, help="GiB per node")
    one.add_argument("--database", choices=("sqlite", "postgres"), default=plain.database)
    one.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    one.add_argument("--routing", choices=ROUTINGS, nargs="+", default=list(ROUTINGS))
    one.add_argument("--shards", type=int, nargs="+", default=[1, 4, 16, 64])
    one.add_argument("--policy", default="reuse")
    one.add_argument("--seed", type=int, default=plain.seed)
    one = commands.add_parser("check", help="predictions beside a real store")
    one.add_argument("--models", type=int, default=300)
    one.add_argument("--requests", type=int, default=3000)
    one.add_argument("--corpus", choices=("rt", "imdb", "bbc"), default="rt")
    one.add_argument("--words", type=int, default=60_000, help="rows of the families' tables")
    one.add_argument("--seed", type=int, default=101)
    one.add_argument("--url", help="an empty PostgreSQL database instead of SQLite")
    one.add_argument("--json", type=Path)
    one = commands.add_parser("limits", help="what reads whole tables, timed on filled ones")
    one.add_argument("--models", type=int, default=20_000)
    one.add_argument("--url", help="an empty database instead of SQLite")
    return parser.parse_args()


def scenario_of(chosen: argparse.Namespace) -> Scenario:
    """Return the scenario that the command line asks for."""
    mix = dict(Scenario().mix)
    if chosen.mix:
        mix = {name: float(share) for name, share in (p.split("=") for p in chosen.mix.split(","))}
    return Scenario(
        models=chosen.models,
        total_bytes=chosen.bytes,
        mix=mix,
        alone=chosen.alone,
        largest_family=chosen.largest_family,
        popularity=chosen.popularity,
        requests=chosen.requests,
        memory=int(chosen.memory * 2**30),
        database=chosen.database,
        seed=chosen.seed,
    )


def measured_of(chosen: argparse.Namespace) -> Measured:
    if not chosen.measured.exists():
        raise SystemExit(f"{chosen.measured} does not exist; run: run.py measure")
    return load(chosen.measured)


def main() -> None:
    chosen = options()
    if chosen.command == "measure":
        from _measure import measure

        servers = {"postgres": chosen.postgres} if chosen.postgres else None
        measure(chosen.folder, tell, servers).save(chosen.measured)
        console.print(f"wrote {chosen.measured}")
    elif chosen.command == "simulate":
        for table in simulated(
            measured_of(chosen),
            scenario_of(chosen),
            chosen.nodes,
            chosen.routing,
            chosen.shards,
            chosen.policy,
        ):
            console.print(table)
    elif chosen.command == "limits":
        from _limits import limits

        for table in limits(measured_of(chosen), chosen.folder, chosen.models, chosen.url, tell):
            console.print(table)
    else:
        from _check import check

        found = check(
            measured_of(chosen),
            chosen.folder,
            tell,
            models=chosen.models,
            requests=chosen.requests,
            url=chosen.url,
            given=(chosen.corpus, chosen.words, chosen.seed),
        )
        console.print(compared_table(found))
        if chosen.json:
            chosen.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
