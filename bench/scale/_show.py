# SPDX-License-Identifier: Apache-2.0
"""Tables that people read, of what was simulated and of what was compared. Nothing is computed here
but units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from _measure import Measured
from _nodes import nodes
from _simulate import Scenario, ingest, sharded, stock, writers
from rich.table import Table

if TYPE_CHECKING:
    from _check import Compared

__all__ = ["compared_table", "duration", "number", "simulated", "size", "titled"]


def size(count: float) -> str:
    """Return bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """Return a count with three digits."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= limit:
            return f"{count / limit * (10 if limit == 1e4 else 1):.3g}{unit}"
    return f"{count:.4g}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for limit, unit, divisor in (
        (2 * 365.25 * 86400, "years", 365.25 * 86400),
        (2 * 86400, "days", 86400),
        (7200, "h", 3600),
        (120, "min", 60),
        (1, "s", 1),
    ):
        if seconds >= limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def titled(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def simulated(
    measured: Measured,
    scenario: Scenario,
    counts: Sequence[int],
    routings: Sequence[str],
    shards: Sequence[int],
    policy: str,
) -> Iterator[Table]:
    """Yield tables: the store, its ingest, its shards, its nodes."""
    held = stock(measured, scenario)
    title = f"{scenario.models:,} models, {size(held.logical_bytes)}, {scenario.database}"
    table = titled(title, "table", "rows", "bytes")
    for name, one in held.tables.items():
        table.add_row(name, number(one.rows), size(held.bytes[name]))
    table.add_section()
    share = held.stored_bytes / held.logical_bytes
    table.add_row("pages alone", f"{100 * share:.1f} % of given", size(held.stored_bytes))
    table.add_row("all other tables", "", size(held.metadata_bytes))
    table.add_row("similarity index in memory", number(held.index_blocks), size(held.index_bytes))
    table.add_row("families", number(len(held.size)), "")
    yield table

    one = ingest(measured, held)
    table = titled("ingest, one writer", "", "all models", "one more at full size")
    table.add_row("work of adds", duration(one.work), duration(one.last_work))
    table.add_row(
        "what every add reads of the whole store", duration(one.growing), duration(one.last_growing)
    )
    table.add_row("index on hashes", duration(one.hashes), duration(one.last_hashes))
    yield table
    table = titled("writers side by side, without the latter", "writers", "adds/s", "attempts")
    for found in writers(measured, held, [1, 4, 16, 64, 256]):
        table.add_row(f"{found.count}", f"{found.adds_per_second:.3g}", f"{found.attempts:.2f}")
    yield table

    table = titled(
        "shards, a store each", "shards", "pages, by family", "pages, at random", "index per shard"
    )
    for count in shards:
        by_family, at_random = sharded(measured, held, count)
        table.add_row(f"{count}", size(by_family), size(at_random), size(held.index_bytes / count))
    yield table

    table = titled(
        f"nodes of {size(scenario.memory)}, Zipf {scenario.popularity:g}, {policy}",
        *("nodes", "routing", "pages a request", "reads", "MB read", "hit ratio", "catalog hits"),
        *("latency", "of it computing", "busiest node"),
    )
    for node in nodes(measured, held, counts, routings, policy=policy):
        served = node.served
        table.add_row(
            f"{node.nodes}",
            node.routing,
            f"{served.uses:.1f}",
            f"{served.reads:.1f}",
            f"{served.read_bytes / 1e6:.1f}",
            f"{served.hit_ratio:.3f}",
            f"{node.catalog_hits:.2f}",
            duration(node.seconds),
            duration(node.cpu_seconds),
            f"{node.busiest:.2f}x",
        )
    yield table


def compared_table(found: Sequence[Compared]) -> Table:
    """Return predictions beside what was measured."""
    missed = sum(not one.holds for one in found)
    table = titled(
        f"{len(found)} quantities, {missed} not within {100 * found[0].within:.0f} %",
        *("quantity", "predicted", "real", "ratio", ""),
    )
    for one in found:
        table.add_row(
            one.what,
            f"{one.predicted:,.4g} {one.unit}",
            f"{one.real:,.4g} {one.unit}",
            f"{one.ratio:.3f}",
            "" if one.holds else "MISSED",
        )
    return table
