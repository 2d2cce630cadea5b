# SPDX-License-Identifier: Apache-2.0
"""What reading and predicting cost on this machine: a page, a model not known yet, a victim."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _costs import ROUNDS, median_time, nonnegative

import pydedup
from pydedup import codec
from pydedup.adapter import LIVE
from pydedup.blocks import MatrixView
from pydedup.catalog import Catalog
from pydedup.pool import PagePool
from pydedup.types import DType

__all__ = ["Requested", "read_costs", "request_costs", "request_prices", "victim_cost"]


def read_costs(store: pydedup.Store, path: Path | None) -> dict[str, float]:
    """Measure bringing pages into an empty pool: seconds per page, and per byte.

    ``cold`` is with the file dropped from the system's cache, where there is a file.
    """
    adapter = store._adapter
    rows = [row for row in adapter.page_rows(state=LIVE) if row.payload_bytes > 1024]
    rows.sort(key=lambda row: row.payload_bytes)
    small, large = rows[: min(8, len(rows) // 2)], rows[-min(16, len(rows) // 2) :]
    costs: dict[str, float] = {}
    for kind in ("warm", "cold") if path is not None else ("warm",):
        spent, sizes = [], []
        for group in (small, large):
            ids = np.array([row.id for row in group], np.int64)
            times = []
            for _ in range(ROUNDS):
                pool = PagePool(adapter.read_pages, 1 << 30)
                if kind == "cold" and path is not None:
                    drop_from_cache(path)
                started = time.perf_counter()
                pool.pages(ids)
                times.append((time.perf_counter() - started) / len(ids))
            spent.append(statistics.median(times))
            sizes.append(statistics.mean(row.payload_bytes for row in group))
        slope = max(0.0, (spent[1] - spent[0]) / max(sizes[1] - sizes[0], 1.0))
        costs[f"{kind}_byte"] = slope
        costs[f"{kind}_page"] = max(0.0, spent[0] - slope * sizes[0])
    return costs


#: Bytes that a pool has beside the pages of a model, and times that each state is timed.
_SPARE, _STATES = 256 << 10, 11


@dataclass(frozen=True, slots=True)
class Requested:
    """Mean seconds of a prediction: all in memory, its model unknown, none of its pages there."""

    hot: float
    forgotten: float
    cleared: float
    tensors: int
    pages: int
    read_bytes: int


def request_costs(
    url: str, address: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> Requested:
    """Time one kind of request of a model, that uses these pages, in three states of a store.

    Its pool just holds the pages. A full one has no room for blocks that are decoded once, either.
    """
    with pydedup.open(url, mode="r") as store:
        rows = store._adapter.page_rows(ids=pages)
        tensors = len(store._adapter.tensors(store._catalog.resolve(address).id))
    needed = sum(row.payload_bytes for row in rows) + _SPARE
    with pydedup.open(url, mode="r", memory=needed + min(needed, 48 << 20)) as store:
        pool = store._pool

        def forget() -> None:
            store._catalog = Catalog(store._adapter)

        hot = median_time(lambda: request(store), 21)
        forgotten = _in_state(forget, lambda: request(store))
        before = pool.stats()["inserts"]
        cleared = _in_state(pool.clear, lambda: request(store))
        stats = pool.stats()
        read = (stats["inserts"] - before) // _STATES
        mean = stats["bytes"] / max(stats["pages"], 1)
        return Requested(hot, forgotten, cleared, tensors, read, int(read * mean))


def _in_state(prepare: Callable[[], object], request: Callable[[], object]) -> float:
    """Return the median seconds of a request after something was done each time."""
    spent = []
    for _ in range(_STATES):
        prepare()
        started = time.perf_counter()
        request()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def request_prices(several: Sequence[Requested]) -> dict[str, float]:
    """Return what a model that has to be looked up and a page that has to be read cost."""
    looked = [(max(one.forgotten - one.hot, 0.0), 1.0, float(one.tensors)) for one in several]
    read = [
        (max(one.cleared - one.hot, 0.0), float(one.pages), float(one.read_bytes))
        for one in several
    ]
    model, tensor = _fitted(looked)
    page, nbyte = _fitted(read)
    return {
        "catalog_model": model,
        "catalog_tensor": tensor,
        "read_page": page,
        "read_byte": nbyte,
    }


def _fitted(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the two prices, none below 0, that give these sums with the least relative errors."""
    matrix = np.array([[a / s, b / s] for s, a, b in rows if s > 0])
    found = nonnegative(matrix, np.ones(len(matrix)))
    return float(found[0]), float(found[1])


def victim_cost(pages: int = 4000) -> float:
    """Return what finding one page to give up costs, per page in the pool, under ``reuse``."""
    image = _tiny_page()
    pool = PagePool(lambda ids: [(i, image) for i in ids], pages * len(image))
    native = pool.native
    for number in range(pages):
        native.insert(number, image)
    started, more = time.perf_counter(), 200
    for number in range(pages, pages + more):
        native.insert(number, image)
    return (time.perf_counter() - started) / more / pages


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget the pages of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _tiny_page() -> bytes:
    view = MatrixView.of(np.zeros((16, 16), np.float32))
    encoded = codec.encode_blocks(view, np.arange(1), planes=False)
    return codec.build_page(
        encoded.arena,
        encoded.offsets,
        encoded.lengths,
        encoded.encodings,
        [DType.F32.code],
        [16],
        [16],
    )
