# SPDX-License-Identifier: Apache-2.0
"""What reads whole tables: calls of the adapter timed on filled tables, with the database's plan.

Rows as `_tables.fill` writes them. What a call took per row that it reads, times the rows of the
scenario, is what it takes there; a call that looks its rows up takes as long as it did here, but
for deeper trees.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _costs import median_time
from _measure import Measured
from _show import duration, number, titled
from _simulate import Scenario, Stock, stock
from _tables import analyse, fill, table_rows
from rich.table import Table

import pydedup
from pydedup.adapter import LIVE, Adapter
from pydedup.signatures import read_segments

__all__ = ["limits"]


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the adapter, who makes it, and the table whose rows it reads all of, if any."""

    name: str
    by: str
    call: Callable[[], object]
    table: str | None = None


def limits(
    measured: Measured, folder: Path, models: int, url: str | None, tell: Any
) -> Iterator[Table]:
    """Fill tables, time the calls, and say what they take in the scenario."""
    scenario = Scenario()
    held = stock(measured, scenario)
    one = replace(measured.families["imdb"].further, new_blocks=20.0)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        pydedup.open(url or f"sqlite:///{scratch}/filled.db") as store,
    ):
        adapter = store._adapter
        started = time.perf_counter()
        fill(adapter, models, one)
        tell(f"{models} models in {time.perf_counter() - started:.0f} s")
        analyse(adapter)
        rows = table_rows(adapter)
        table = titled(
            f"{models:,} models, and {scenario.models:,} of them",
            *("call", "made by", "plan", "rows", "takes", "rows then", "takes then"),
        )
        for call in _calls(adapter):
            with _recorded(adapter) as statements:
                call.call()
            plan = _plan(adapter, statements)
            table.add_row(*_row(call, plan, median_time(call.call, 3), rows, held))
    yield table


def _row(
    call: _Call, plan: str, seconds: float, rows: dict[str, int], held: Stock
) -> tuple[str, ...]:
    if call.table is None:
        return call.name, call.by, plan, "", duration(seconds), "", duration(seconds)
    here, then = rows[call.table], held.tables[call.table].rows
    return (
        call.name,
        call.by,
        plan,
        number(here),
        duration(seconds),
        number(then),
        duration(seconds * then / here),
    )


def _calls(adapter: Adapter) -> Iterator[_Call]:
    rows = adapter.models(newest=4)
    name, model = rows[0].name, rows[0].id
    pages = [page for _, page, _, _ in adapter.model_pages(model)]
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(16) for _ in range(5600)]
    yield _Call("models(name)", "every look-up of a name", lambda: adapter.models(name=name))
    yield _Call("models(newest=32)", "every add", lambda: adapter.models(newest=32))
    yield _Call("models()", "ls, index of HTTP, quotas", adapter.models, "models")
    yield _Call("tensors(id)", "a model's first request", lambda: adapter.tensors(model))
    yield _Call("block_maps(id)", "a model's first request", lambda: adapter.block_maps(model))
    yield _Call("model_pages(id)", "a model's first request", lambda: adapter.model_pages(model))
    yield _Call("readers_of(its pages)", "info, unload", lambda: adapter.readers_of(pages))
    yield _Call("find_blocks(5600)", "every add", lambda: adapter.find_blocks(hashes))
    yield _Call("page_ids(live)", "every add", lambda: adapter.page_ids(LIVE), "pages")
    yield _Call("read_segments", "every add", lambda: read_segments(adapter), "models")
    yield _Call("model_pages()", "sizes, vacuum", lambda: adapter.model_pages(), "model_pages")
    yield _Call("orphan_pages()", "vacuum", adapter.orphan_pages, "pages")
    yield _Call("count_blocks()", "stats", adapter.count_blocks, "distinct_blocks")
    yield _Call("model_sizes", "view", lambda: adapter.view("model_sizes"), "model_pages")


@contextmanager
def _recorded(adapter: Any) -> Iterator[list[tuple[str, Sequence[Any]]]]:
    """Note the first statements that an adapter runs."""
    found: list[tuple[str, Sequence[Any]]] = []
    original = adapter._query

    def query(sql: str, parameters: Sequence[Any] = ()) -> Any:
        if len(found) < 2:
            found.append((sql, parameters))
        return original(sql, parameters)

    adapter._query = query
    try:
        yield found
    finally:
        del adapter._query


def _plan(adapter: Any, statements: Sequence[tuple[str, Sequence[Any]]]) -> str:
    """Return how the database goes about the first statement: what it scans, else the index."""
    if not statements:
        return ""
    sql, parameters = statements[0]
    is_sqlite = adapter.url.startswith("sqlite")
    explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
    lines = [str(row[-1]) for row in adapter._query(explain + sql, parameters)]
    prefix = adapter._sql.dialect.prefix
    words = ("SCAN", "SEARCH") if is_sqlite else ("Scan",)
    steps = [line.replace(prefix, "").strip() for line in lines if any(w in line for w in words)]
    scans = [s for s in steps if s.startswith("SCAN") or "Seq Scan" in s]
    chosen = (scans or steps or [""])[0]
    return chosen.partition("(cost")[0].removeprefix("->").strip()[:58]
