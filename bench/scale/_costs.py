# SPDX-License-Identifier: Apache-2.0
"""What adding and reading cost on this machine, per block, byte, row and page, with real blocks.

`ingest_seconds` is the model that these costs are for: a sum of work, each kind at its price.
Prices are measured one by one (`block_costs`, `store_costs`); what Python does around them is the
rest, and is found from real adds of the families that are measured, never of those that
predictions are checked on (`residual`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from _sharing import Brought, index_bytes
from numpy.typing import NDArray

import pydedup
from pydedup import codec
from pydedup.adapter import LIVE, Adapter
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.places import stack_blocks
from pydedup.signatures import read_pieces, read_segments, rows_of_kind
from pydedup.similarity import L2LSH
from pydedup.types import DType

__all__ = [
    "HASH_PAGE",
    "ROUNDS",
    "add_work",
    "block_prices",
    "ingest_seconds",
    "median_time",
    "nonnegative",
    "residual",
    "store_costs",
    "write_costs",
]

ROUNDS = 15
#: Blocks that are encoded in one go (`pydedup.ingest.match`).
_PIECE = 128


def median_time(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median seconds of some calls, the first one not counted."""
    call()
    spent = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


# ---- the model ----------------------------------------------------------------------------------


#: Bytes of an entry of the index on ``hash128``, free space included, and of a page of it.
_HASH_ENTRY, HASH_PAGE = 36.0, {"sqlite": 65536, "postgres": 8192}
#: Bytes of pages that a connection to SQLite keeps.
_SQLITE_CACHE = 4 << 20


def touched_pages(rows: float, looked: float, page: int = 65536) -> float:
    """Return how many pages of the index on hashes so many random entries lie on."""
    pages = max(1.0, rows * _HASH_ENTRY / page)
    return pages * -math.expm1(looked * math.log1p(-1 / pages)) if pages > 1 else 1.0


def add_work(
    one: Brought,
    *,
    indexed: float,
    pages: float,
    segments: float,
    models: float,
    blocks: float,
    page: int = 65536,
) -> dict[str, float]:
    """Return the work of one add to a store that has so much already, by kind of price.

    ``blocks`` are the rows of ``distinct_blocks``: hashes are random, so each new one lands on
    another page of their index, and pages are written whole, as payloads are: to the log, then
    to their place.
    """
    written = touched_pages(blocks + one.new_blocks, one.new_blocks, page) * page
    read = touched_pages(blocks, one.blocks, page) * page
    uncached = max(0.0, 1.0 - _SQLITE_CACHE / max(blocks * _HASH_ENTRY, 1.0))
    kept = one.logical * one.new_blocks / max(one.blocks, 1.0)
    alone = one.new_blocks - one.new_deltas
    share = one.new_deltas / max(one.new_blocks, 1.0)
    return {
        "hash_byte": one.logical,
        "find_block": one.blocks,
        "encode_byte": kept,
        "query_block": one.new_blocks,
        "delta_block": one.new_deltas,
        "delta_byte": one.page_payload * share,
        "index_block": one.indexed,
        "page_byte": one.page_payload + written,
        "warm_byte": (read + written) * uncached,
        "row": alone
        + one.new_deltas
        + one.reads
        + one.tensors
        + one.map_parts
        + one.hash_parts
        + one.segments
        + one.artifacts,
        "old_block": indexed,
        "old_page": pages,
        "old_segment": segments,
        "old_model": models,
        "add": 1.0,
        "tensor": one.tensors,
        "block": one.blocks,
    }


def ingest_seconds(work: Mapping[str, float], costs: Mapping[str, float]) -> float:
    """Return the sum of work at these prices."""
    return sum(amount * costs.get(kind, 0.0) for kind, amount in work.items())


def residual(
    works: Sequence[Mapping[str, float]], seconds: Sequence[float], costs: Mapping[str, float]
) -> dict[str, float]:
    """Return prices of an add, a tensor and a block, from what real adds took beyond the others.

    Least squares of relative errors, none below 0.
    """
    kinds = ("add", "tensor", "block")
    known = {kind: price for kind, price in costs.items() if kind not in kinds}
    rest = np.array(
        [s - ingest_seconds(work, known) for work, s in zip(works, seconds, strict=True)]
    )
    weight = 1.0 / np.array(seconds)
    matrix = np.array([[work[kind] for kind in kinds] for work in works]) * weight[:, None]
    found = nonnegative(matrix, np.maximum(rest * weight, 0.0))
    return dict(zip(kinds, found.tolist(), strict=True))


def nonnegative(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least-squares solution without a negative entry, of few unknowns."""
    best, least = np.zeros(matrix.shape[1]), math.inf
    for count in range(matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), count):
            found = np.zeros(matrix.shape[1])
            if chosen:
                found[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            error = float(((matrix @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = found, error
    return best


# ---- prices of blocks ---------------------------------------------------------------------------


def block_costs(base: NDArray[Any], moved: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Measure what is done with blocks, on a matrix and others of its shape that are nearly equal.

    As an add does it: 128 blocks at a time, and none that the processor's caches still hold where
    there are enough. ``delta_seconds`` and ``delta_bytes`` are of one delta.
    """
    view = MatrixView.of(base)
    grid = view.grid
    count = (grid.rows // grid.block_rows) * (grid.cols // grid.block_cols)
    shape = (grid.block_rows, grid.block_cols)
    pieces = [
        np.arange(at, min(at + _PIECE, count), dtype=np.int64) for at in range(0, count, _PIECE)
    ]
    stacks = [
        (stack_blocks(view, piece, shape), stack_blocks(MatrixView.of(other), piece, shape))
        for other in moved
        for piece in pieces
    ]
    everything = np.arange(count, dtype=np.int64)
    whole = stack_blocks(view, everything, shape)
    values = whole.data.view(base.dtype).reshape(-1, *shape)
    index = L2LSH(shape, base.dtype)
    index.add(values, everything)
    payload = index.save()
    done = count * len(moved)

    def over(what: Callable[[MatrixView, MatrixView, NDArray[np.int64]], object]) -> float:
        """Return the seconds of one block, of all pieces one after another."""

        def run() -> None:
            for first, near in stacks:
                what(first, near, np.arange(near.grid.count, dtype=np.int64))

        return median_time(run, 5) / done

    def indexed() -> None:
        fresh = L2LSH(shape, base.dtype)
        fresh.add(values, everything)
        fresh.select(everything, everything).save()

    def queried(first: MatrixView, near: MatrixView, numbers: NDArray[np.int64]) -> None:
        index.query(near.data.view(base.dtype).reshape(-1, *shape), 3)

    def encoded(first: MatrixView, near: MatrixView, numbers: NDArray[np.int64]) -> None:
        codec.estimate_deltas(near, numbers, first, numbers)
        codec.encode_deltas(near, numbers, first, numbers)
        hash_view(first)

    lengths = [
        codec.encode_deltas(n, np.arange(n.grid.count), f, np.arange(n.grid.count)).lengths
        for f, n in stacks
    ]
    block_bytes = shape[0] * shape[1] * base.itemsize
    return {
        "hash_byte": over(lambda _, near, __: hash_view(near)) / block_bytes,
        "encode_byte": over(lambda _, near, at: codec.encode_blocks(near, at, planes=True))
        / block_bytes,
        "index_block": median_time(indexed, 5) / count,
        "query_block": over(queried),
        "old_block": median_time(lambda: L2LSH(shape, base.dtype).merge(L2LSH.load(payload)))
        / count,
        "delta_seconds": over(encoded),
        "delta_bytes": float(np.concatenate(lengths).mean()),
    }


def block_prices(
    pairs: Sequence[tuple[NDArray[Any], Sequence[NDArray[Any]]]],
) -> dict[str, float]:
    """Return the mean over groups of matrices; of deltas a price per block and one per byte.

    Deltas that differ in length differ in what they take; so both prices follow from the groups.
    """
    several = [block_costs(base, moved) for base, moved in pairs]
    costs = {kind: statistics.mean(one[kind] for one in several) for kind in several[0]}
    seconds, nbytes = costs.pop("delta_seconds"), costs.pop("delta_bytes")
    spread = [(one["delta_seconds"] - seconds, one["delta_bytes"] - nbytes) for one in several]
    square = sum(b * b for _, b in spread)
    slope = max(0.0, sum(a * b for a, b in spread) / square) if square else 0.0
    slope = min(slope, seconds / nbytes)
    return {**costs, "delta_byte": slope, "delta_block": seconds - slope * nbytes}


# ---- prices of rows and of what is there --------------------------------------------------------


def store_costs(store: pydedup.Store, merge: float) -> dict[str, float]:
    """Measure what an add asks of a store, on one that holds some models.

    ``merge`` is the price of a block that goes into the index in memory.
    """
    adapter = store._adapter
    rows = adapter.page_rows(state=LIVE)
    costs = {"old_page": median_time(lambda: adapter.page_ids(LIVE)) / len(rows)}
    segments = read_segments(adapter)
    kinds = {
        (piece.dtype, piece.block_shape)
        for segment in segments
        for _, grp, payload in adapter.signatures_of(segment.rows)
        if grp
        for piece in [L2LSH.load(payload)]
    }

    def indexed() -> None:
        read_segments(adapter)
        for dtype, shape in kinds:
            index, kind = L2LSH(shape, dtype), (DType.of(dtype), *shape)
            for piece in read_pieces(adapter, kind, rows_of_kind(adapter, kind).tolist()):
                index.merge(piece)

    blocks = index_bytes(store)[1]
    merged = median_time(indexed) - blocks * merge
    costs["old_segment"] = max(merged, 0.0) / len(segments)
    costs["old_model"] = median_time(adapter.models) / len(adapter.models())
    hashes = [np.random.default_rng(0).bytes(16) for _ in range(2048)]
    known = [b.hash128 for b in adapter.blocks_on_pages([row.id for row in rows[:20]])]
    asked = (known + hashes)[:2048]
    costs["find_block"] = median_time(lambda: adapter.find_blocks(asked)) / len(asked)
    return costs


def write_costs(adapter: Adapter) -> dict[str, float]:
    """Measure writing into an empty store: a page per byte, a row of ``distinct_blocks``."""
    rng = np.random.default_rng(1)
    pages = [(rng.bytes(16), rng.bytes(1 << 20)) for _ in range(16)]
    rows = [(rng.bytes(16), 1, slot, None) for slot in range(4000)]

    def written(what: Callable[[], object]) -> float:
        spent = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            with adapter.transaction():
                what()
            adapter.checkpoint()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent)

    nothing = written(lambda: adapter.set_meta("bench", "1"))
    paged = written(lambda: adapter.insert_pages(pages, state=LIVE)) - nothing
    blocks = written(lambda: adapter.insert_blocks(rows)) - nothing
    return {"page_byte": max(0.0, paged) / (16 << 20), "row": max(0.0, blocks) / len(rows)}
