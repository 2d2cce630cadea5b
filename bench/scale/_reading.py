# SPDX-License-Identifier: Apache-2.0
"""What reading and predicting cost on this machine: a page, a model not known yet, a victim."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _costs import ROUNDS, median_time, nonnegative

import pydedup
from pydedup import codec
from pydedup.adapter import LIVE
from pydedup.blocks import MatrixView
from pydedup.catalog import Catalog, recorded_pages
from pydedup.pool import PagePool
from pydedup.types import DType

__all__ = [
    "MOST_LOOKED_AT",
    "Requested",
    "hot_seconds",
    "read_costs",
    "request_costs",
    "request_prices",
    "victim_cost",
]

#: Pages that a full pool looks at for one to give up, at most (csrc/src/storage/pool_pages.cpp).
MOST_LOOKED_AT = 2048


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
                pool = PagePool(recorded_pages(adapter), 1 << 30)
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


#: Bytes that a pool has beside the pages of models, times that each state is timed.
_SPARE, _STATES = 256 << 10, 21
#: Times that the state is timed where pages are away, as each time it is others, and their share.
_STATES_AWAY, _AWAY = 101, 0.25


@dataclass(frozen=True, slots=True)
class Requested:
    """Seconds of a prediction: all in memory, its model unknown, and some of the pages away.

    Attributes
    ----------
    missing
        For each time that pages had to be read: seconds beyond those from memory, pages, bytes.
    """

    hot: float
    forgotten: float
    tensors: int
    missing: tuple[tuple[float, float, float], ...]


def request_costs(
    url: str, address: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> Requested:
    """Time one kind of request, that uses these pages at most, in three states of a store.

    Its pool just holds the pages. A full one has no room for blocks that are decoded once, either.
    """
    with _just_room_for(url, request, pages) as store:
        tensors = len(store._adapter.tensors(store._catalog.resolve(address).id))

        def forget() -> None:
            store._catalog = Catalog(store._adapter)

        hot = median_time(lambda: request(store), _STATES)
        forgotten = statistics.median(_timed(forget, lambda: request(store)))
        missing = _with_pages_away(store, pages, lambda: request(store), hot)
        return Requested(hot, forgotten, tensors, missing)


def hot_seconds(
    url: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> float:
    """Time a kind of request from memory alone, as `request_costs` does."""
    with _just_room_for(url, request, pages) as store:
        return median_time(lambda: request(store), _STATES)


@contextlib.contextmanager
def _just_room_for(
    url: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> Iterator[pydedup.Store]:
    """Give a store whose pool holds these pages, and that knows all models that are asked."""
    with pydedup.open(url, mode="r") as store:
        rows = store._adapter.page_rows(ids=pages)
    needed = sum(row.payload_bytes for row in rows) + _SPARE
    with pydedup.open(url, mode="r", memory=needed + min(needed, 48 << 20)) as store:
        for _ in range(_STATES):  # models are asked in turns
            request(store)
        yield store


def _timed(
    prepare: Callable[[], object], request: Callable[[], object], states: int = _STATES
) -> list[float]:
    """Return the seconds of requests after something was done each time."""
    spent = []
    for _ in range(states):
        prepare()
        started = time.perf_counter()
        request()
        spent.append(time.perf_counter() - started)
    return spent


def _with_pages_away(
    store: pydedup.Store, pages: Sequence[int], request: Callable[[], object], hot: float
) -> tuple[tuple[float, float, float], ...]:
    """Time requests some of whose pages are not in the pool, here and there.

    As in a pool that is too small. A whole model that is read ahead costs less a page.
    """
    pool, rng = store._pool, np.random.default_rng(3)
    before: list[dict[str, int]] = []

    def prepare() -> None:
        pool.clear()
        pool.pages(np.array([page for page in pages if rng.random() >= _AWAY], np.int64))
        before.append(pool.stats())

    read = []

    def counted() -> None:
        request()
        stats = pool.stats()
        number = stats["inserts"] - before[-1]["inserts"]
        read.append((number, max(stats["bytes"] - before[-1]["bytes"], 0)))

    spent = _timed(prepare, counted, _STATES_AWAY)
    return tuple(
        (max(seconds - hot, 0.0), float(number), float(nbytes))
        for seconds, (number, nbytes) in zip(spent, read, strict=True)
        if number > 0
    )


def request_prices(several: Sequence[Requested]) -> dict[str, float]:
    """Return what a model that has to be looked up and a page that has to be read cost."""
    looked = [(max(one.forgotten - one.hot, 0.0), 1.0, float(one.tensors)) for one in several]
    model, tensor = _fitted(looked)
    # Sums of each kind: by themselves, requests that by chance took no longer would count most.
    missing = [one.missing for one in several if one.missing]
    page, nbyte = _fitted([tuple(map(sum, zip(*rows, strict=True))) for rows in missing])
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


def victim_cost(pages: int = MOST_LOOKED_AT) -> float:
    """Return what finding a page to give up costs, per page that is looked at, under ``reuse``."""
    image = _tiny_page()
    pool = PagePool(lambda ids: [(i, None, image) for i in ids], pages * len(image))
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
