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
#: Share of the pages that a pool has room for which is too small, requests that it is asked.
_TOO_SMALL, _STATES_MISSING = 0.75, 303
#: Requests whose sum says what they cost.
_ENOUGH = 8


@dataclass(frozen=True, slots=True)
class Requested:
    """Seconds of a prediction: all in memory, its model unknown, and some of the pages missing.

    Attributes
    ----------
    missing
        For each time that pages had to be read: seconds beyond where none had, pages, bytes.
    """

    hot: float
    forgotten: float
    tensors: int
    missing: tuple[tuple[float, float, float], ...]


def request_costs(
    url: str, address: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> Requested:
    """Time one kind of request, that uses these pages at most, in three states of a store.

    Its pool just holds the pages, so that it has no room for blocks that are decoded once, either;
    or it is too small for them.
    """
    with _room_for(1.0, url, request, pages) as store:
        tensors = len(store._adapter.tensors(store._catalog.resolve(address).id))

        def forget() -> None:
            store._catalog = Catalog(store._adapter)

        hot = median_time(lambda: request(store), _STATES)
        forgotten = statistics.median(_timed(forget, lambda: request(store)))
    missing = _with_pages_missing(url, request, pages, hot)
    return Requested(hot, forgotten, tensors, missing)


def hot_seconds(
    url: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> float:
    """Time a kind of request from memory alone, as `request_costs` does."""
    with _room_for(1.0, url, request, pages) as store:
        return median_time(lambda: request(store), _STATES)


@contextlib.contextmanager
def _room_for(
    share: float, url: str, request: Callable[[pydedup.Store], object], pages: Sequence[int]
) -> Iterator[pydedup.Store]:
    """Give a store whose pool holds so many of these pages, and that knows all models asked."""
    with pydedup.open(url, mode="r") as store:
        rows = store._adapter.page_rows(ids=pages)
    needed = int(share * sum(row.payload_bytes for row in rows)) + _SPARE
    with pydedup.open(url, mode="r", memory=needed + min(needed, 48 << 20)) as store:
        for _ in range(_STATES):  # models are asked in turns
            request(store)
        yield store


def _timed(prepare: Callable[[], object], request: Callable[[], object]) -> list[float]:
    """Return the seconds of requests after something was done each time."""
    spent = []
    for _ in range(_STATES):
        prepare()
        started = time.perf_counter()
        request()
        spent.append(time.perf_counter() - started)
    return spent


def _with_pages_missing(
    url: str, request: Callable[[pydedup.Store], object], pages: Sequence[int], hot: float
) -> tuple[tuple[float, float, float], ...]:
    """Time requests in a pool that is too small, where a page that comes takes another's place.

    Beside requests there that read nothing, where there are enough: after others had to read,
    these take longer than where none has to. A whole model that is read ahead costs less a page.
    """
    spent = []
    with _room_for(_TOO_SMALL, url, request, pages) as store:
        nbytes = sum(row.payload_bytes for row in store._adapter.page_rows(ids=pages)) / len(pages)
        for _ in range(_STATES_MISSING):
            before, started = store._pool.stats()["inserts"], time.perf_counter()
            request(store)
            seconds = time.perf_counter() - started
            spent.append((seconds, store._pool.stats()["inserts"] - before))
    unread = [seconds for seconds, number in spent if not number]
    without = statistics.mean(unread) if len(unread) >= _ENOUGH else hot
    return tuple(
        (seconds - without, float(number), number * nbytes) for seconds, number in spent if number
    )


def request_prices(several: Sequence[Requested]) -> dict[str, float]:
    """Return what a model that has to be looked up and a page that has to be read cost."""
    looked = [(max(one.forgotten - one.hot, 0.0), 1.0, float(one.tensors)) for one in several]
    model, tensor = _fitted(looked)
    request, page, nbyte = _fitted([row for one in several for row in _sums(one.missing)])
    return {
        "catalog_model": model,
        "catalog_tensor": tensor,
        "read_request": request,
        "read_page": page,
        "read_byte": nbyte,
    }


def _sums(
    missing: Sequence[tuple[float, float, float]],
) -> list[tuple[float, float, float, float]]:
    """Return sums of seconds, requests, pages and bytes of those that read about as many pages.

    By themselves, requests that by chance took no longer would count most.
    """
    groups: dict[int, list[tuple[float, float, float]]] = {}
    for one in missing:
        groups.setdefault(int(one[1]).bit_length(), []).append(one)
    sums = [(len(group), np.sum(group, axis=0)) for group in groups.values()]
    return [(float(s), float(n), float(p), float(b)) for n, (s, p, b) in sums if n >= _ENOUGH]


def _fitted(rows: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the prices, none below 0, that give these sums with the least relative errors.

    A row is a sum of seconds, and how much of each kind of work it is for.
    """
    matrix = np.array([np.divide(work, seconds) for seconds, *work in rows if seconds > 0])
    return [float(price) for price in nonnegative(matrix, np.ones(len(matrix)))]


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
