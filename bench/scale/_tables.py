# SPDX-License-Identifier: Apache-2.0
"""Rows and bytes per table: measured on filled tables, and predicted for any number of models.

`fill` writes rows through the adapter as adds write them, model by model, with payloads of the
right size and random content, but pages of a few bytes: so tables of a hundred thousand models are
filled in a minute, and what a row takes with its indexes is what it takes in a large store.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from _sharing import Brought

from pydedup.adapter import LIVE, Adapter, ModelRow, TensorRow
from pydedup.adapter_options import ExpectingAdapter

__all__ = [
    "BTREES",
    "SQLITE_PAGE",
    "TABLES",
    "Table",
    "analyse",
    "fill",
    "overheads",
    "predicted",
    "table_bytes",
    "table_rows",
]

#: Tables that grow with models.
TABLES = (
    "models",
    "artifacts",
    "tensors",
    "block_maps",
    "source_hashes",
    "pages",
    "model_pages",
    "distinct_blocks",
    "signatures",
)
#: What `fill` puts on a page, and the page size of SQLite stores.
_LITTLE, SQLITE_PAGE = 64, 65536
_MUCH = 1 << 40
#: Trees of a table and its indexes, each at least a page.
BTREES = dict.fromkeys(TABLES, 2) | {"model_pages": 3, "distinct_blocks": 3}
_MODELS_PER_TRANSACTION = 50


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a table, and bytes of their variable parts (text, payloads)."""

    rows: float
    payload: float

    def bytes(self, overhead: float) -> float:
        """Return what it takes with its indexes, at so many bytes a row beside the payload."""
        return self.payload + self.rows * overhead


def predicted(brought: Iterable[tuple[float, Brought]]) -> dict[str, Table]:
    """Return each table after so many models of each kind were added."""
    total = dict.fromkeys(TABLES, Table(0.0, 0.0))
    for count, one in brought:
        for name, rows, payload in (
            ("models", 1.0, one.model_payload),
            ("artifacts", one.artifacts, one.artifact_payload),
            ("tensors", one.tensors, one.tensor_payload),
            ("block_maps", one.map_parts, one.map_payload),
            ("source_hashes", one.hash_parts, one.hash_payload),
            ("pages", one.pages, one.page_payload),
            ("model_pages", one.reads, 0.0),
            ("distinct_blocks", one.new_blocks, 0.0),
            ("signatures", one.segments, one.signature_payload),
        ):
            old = total[name]
            total[name] = Table(old.rows + count * rows, old.payload + count * payload)
    return total


def fill(adapter: Adapter, models: int, one: Brought, *, first: int = 0) -> dict[str, float]:
    """Write the rows of so many models; returns seconds per row, by table.

    Parts, pages and blocks are rounded to whole numbers, at least one of each.
    """
    if isinstance(adapter, ExpectingAdapter):
        adapter.expect(_MUCH)  # it stands for a store of large models
    filling = _Filling(adapter, one, first)
    for start in range(first, first + models, _MODELS_PER_TRANSACTION):
        began = time.perf_counter()
        with adapter.transaction():
            filling.spent["commit"] += time.perf_counter() - began
            for number in range(start, min(start + _MODELS_PER_TRANSACTION, first + models)):
                filling.add_model(number)
            began = time.perf_counter()
        filling.spent["commit"] += time.perf_counter() - began
    adapter.checkpoint()
    return {table: filling.spent[table] / max(filling.rows[table], 1) for table in TABLES}


class _Filling:
    """Writes rows of models, and counts rows and seconds by table."""

    def __init__(self, adapter: Adapter, one: Brought, seed: int) -> None:
        self._adapter = adapter
        self._one = one
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.bytes(1 << 20)
        self.spent = dict.fromkeys((*TABLES, "commit"), 0.0)
        self.rows = dict.fromkeys(TABLES, 0)

    def _payload(self, size: int) -> bytes:
        start = int(self._rng.integers(0, len(self._noise) - size))
        return self._noise[start : start + size]

    def _payloads(self, total: float, count: int) -> list[bytes]:
        return [self._payload(max(8, int(total / count))) for _ in range(count)]

    def _write(self, table: str, call: Callable[..., Any], *arguments: Any, rows: int) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        self.spent[table] += time.perf_counter() - began
        self.rows[table] += rows
        return result

    def add_model(self, number: int) -> None:
        one, to, write = self._one, self._adapter, self._write
        name = f"family-{number // 100:06}-{number:08}"
        said = "x" * max(16, int(one.model_payload) - 80)
        row = ModelRow(0, name, "1", LIVE, 1.0, "lossless", "", said, 1, self._payload(16))
        model = write("models", to.insert_model, row, rows=1)

        count = max(1, round(one.tensors))
        called = "t" * max(1, int(one.tensor_payload / count) - 26)
        tensors = [
            TensorRow(model, i, called, "f32", "[30522, 384]", "[64, 64]") for i in range(count)
        ]
        write("tensors", to.insert_tensors, tensors, rows=count)
        for table, total, part_count, insert in (
            ("block_maps", one.map_payload, one.map_parts, to.insert_block_maps),
            ("source_hashes", one.hash_payload, one.hash_parts, to.insert_source_hashes),
        ):
            payloads = self._payloads(total, max(1, round(part_count)))
            parts = [(model, i, 0, part) for i, part in enumerate(payloads)]
            write(table, insert, parts, rows=len(parts))
        payloads = self._payloads(one.artifact_payload, max(1, round(one.artifacts)))
        artifacts = [(f"a{i}", "application/json", part) for i, part in enumerate(payloads)]
        write("artifacts", to.insert_artifacts, model, artifacts, rows=len(artifacts))
        self._add_pages(model)

    def _add_pages(self, model: int) -> None:
        one, to, write = self._one, self._adapter, self._write
        count = max(1, round(one.pages))
        pages = [(self._payload(16), self._payload(_LITTLE)) for _ in range(count)]
        insert = functools.partial(to.insert_pages, state=LIVE)
        ids = write("pages", insert, pages, rows=count)
        oldest = max(1, ids[-1] - max(1, round(one.reads)) + 1)
        reads = [(model, page, 60, 900_000) for page in range(oldest, ids[-1] + 1)]
        write("model_pages", to.insert_model_pages, reads, rows=len(reads))

        count = max(1, round(one.new_blocks))
        hashes = self._rng.bytes(16 * count)
        blocks = [
            (hashes[16 * i : 16 * i + 16], ids[i % len(ids)], i, ids[0] << 20) for i in range(count)
        ]
        write("distinct_blocks", to.insert_blocks, blocks, rows=count)
        payloads = self._payloads(one.signature_payload, max(1, round(one.segments)))
        signatures = [((model << 20) + i, min(i, 1), part) for i, part in enumerate(payloads)]
        write("signatures", to.insert_signatures, signatures, rows=len(signatures))


def table_rows(adapter: Adapter) -> dict[str, int]:
    """Return how many rows each table has."""
    connection = _connection(adapter)
    found = {}
    for table in TABLES:
        name = adapter._sql.dialect.name(table)  # type: ignore[attr-defined]
        with closing(connection.cursor()) as cursor:
            cursor.execute(f"SELECT COUNT(*) FROM {name}")  # noqa: S608
            found[table] = int(cursor.fetchone()[0])
    return found


def analyse(adapter: Adapter) -> None:
    """Do what PostgreSQL's autovacuum does within a minute; SQLite stores have no statistics."""
    if not adapter.url.startswith("sqlite"):
        connection = _connection(adapter)
        for table in TABLES:
            connection.execute(f"ANALYZE {adapter._sql.dialect.name(table)}")
        connection.commit()


def table_bytes(adapter: Adapter) -> dict[str, int]:
    """Return what each table takes with its indexes, in SQLite or PostgreSQL."""
    connection = _connection(adapter)
    dialect = adapter._sql.dialect  # type: ignore[attr-defined]
    found = dict.fromkeys(TABLES, 0)
    with closing(connection.cursor()) as cursor:
        if adapter.url.startswith("sqlite"):
            cursor.execute(
                "SELECT m.tbl_name, SUM(s.pgsize) FROM dbstat s "
                "JOIN sqlite_master m ON m.name = s.name GROUP BY m.tbl_name"
            )
            sizes = {name.removeprefix(dialect.prefix): size for name, size in cursor.fetchall()}
            return {table: int(sizes.get(table, 0)) for table in TABLES}
        for table in TABLES:
            name = dialect.name(table)
            cursor.execute("SELECT pg_total_relation_size(%s::regclass)", [name])
            found[table] = int(cursor.fetchone()[0])
    connection.rollback()
    return found


def overheads(adapter: Adapter, one: Brought, models: int) -> dict[str, float]:
    """Return bytes per row beside the payload, of tables that `fill` filled."""
    sizes, rows = table_bytes(adapter), table_rows(adapter)
    count = {
        "artifacts": one.artifact_payload,
        "block_maps": one.map_payload,
        "source_hashes": one.hash_payload,
        "signatures": one.signature_payload,
        "models": one.model_payload,
        "tensors": one.tensor_payload,
        "pages": _LITTLE * max(1, round(one.pages)),
    }
    return {
        table: max(0.0, (sizes[table] - models * count.get(table, 0.0)) / rows[table])
        for table in TABLES
    }


def paged(rows: float, payload: float, overhead: float, sqlite: bool) -> float:
    """Return the bytes of ``pages``, whose payloads are cut into pages of the database.

    SQLite keeps a payload on pages of its own, the last one half full on the average; the chunks
    of 1,996 bytes of PostgreSQL's TOAST take 4 to a page of 8,192, and an index entry each.
    """
    if sqlite:
        return payload * SQLITE_PAGE / (SQLITE_PAGE - 4) + rows * (SQLITE_PAGE / 2 + overhead)
    return payload / 1996 * (8192 / 4 + 24) + rows * overhead


def _connection(adapter: Adapter) -> Any:
    with adapter._pool.acquire() as session:  # type: ignore[attr-defined]
        return session.connection
