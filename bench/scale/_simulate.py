# SPDX-License-Identifier: Apache-2.0
"""A store of any size on paper: rows, bytes, memory, ingest time, shards (serving: `_nodes.py`).

docs/scale.md has the formulas. Fed with `Measured` and a `Scenario`; no store is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from _costs import HASH_PAGE, add_work, ingest_seconds
from _measure import Measured
from _sharing import Brought
from _tables import BTREES, SQLITE_PAGE, Table, paged, predicted
from numpy.typing import NDArray

from pydedup.layout import PAGE_BYTES

__all__ = [
    "Ingest",
    "Scenario",
    "Stock",
    "Writers",
    "ingest",
    "sharded",
    "stock",
    "stock_of",
    "writers",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is stored, and who asks.

    Attributes
    ----------
    mix
        Shares of models by measured family, "copy" for exact copies of a family's first model.
    alone
        Share of models without a relative.
    family_tail, largest_family
        Families have 2 to so many models, sizes from a Pareto law with this exponent.
    spread
        Standard deviation of the logarithm of model sizes.
    popularity
        Exponent of the Zipf law over models, families mixed at random.
    requests
        For each node, half of them to fill its pool.
    """

    models: int = 1_000_000
    total_bytes: float = 100e12
    mix: Mapping[str, float] = field(
        default_factory=lambda: {"minilm": 0.5, "imdb": 0.25, "bbc": 0.15, "copy": 0.1}
    )
    alone: float = 0.1
    family_tail: float = 0.9
    largest_family: int = 2000
    spread: float = 1.0
    popularity: float = 1.0
    requests: int = 20_000
    memory: int = 64 << 30
    database: str = "postgres"
    seed: int = 1


@dataclass(slots=True)
class Stock:
    """What is in the store.

    ``kind`` (names), ``size`` (models) and ``model_bytes`` are per family.
    """

    scenario: Scenario
    kind: list[str]
    size: Ints
    model_bytes: Floats
    copies: Ints
    logical_bytes: float
    tables: dict[str, Table]
    bytes: dict[str, float]
    new_deltas: float
    index_blocks: float
    index_bytes: float
    first: dict[str, Brought]
    further: dict[str, Brought]

    @property
    def stored_bytes(self) -> float:
        """Bytes of pages."""
        return self.tables["pages"].payload

    @property
    def metadata_bytes(self) -> float:
        """Bytes of all tables but pages."""
        return sum(size for table, size in self.bytes.items() if table != "pages")


def stock(measured: Measured, scenario: Scenario) -> Stock:
    """Draw families and count what they bring."""
    rng = np.random.default_rng(scenario.seed)
    size = _family_sizes(rng, scenario)
    names = [name for name in scenario.mix if name != "copy"]
    share = np.array([scenario.mix[name] for name in names])
    kind = rng.choice(len(names), len(size), p=share / share.sum())
    copies = rng.binomial(np.maximum(size - 1, 0), scenario.mix.get("copy", 0.0))
    model_bytes = np.exp(rng.normal(0.0, scenario.spread, len(size)))
    model_bytes *= scenario.total_bytes / float((model_bytes * size).sum())
    return stock_of(measured, scenario, [names[k] for k in kind], size, model_bytes, copies)


def stock_of(
    measured: Measured,
    scenario: Scenario,
    kind: Sequence[str],
    size: Ints,
    model_bytes: Floats,
    copies: Ints,
) -> Stock:
    """Count what given families bring."""
    counted: list[tuple[float, Brought]] = []
    names = list(dict.fromkeys(kind))
    for name in names:
        family = measured.families[name]
        here = np.array([one == name for one in kind])
        factors = model_bytes[here] / family.first.logical
        ones = np.ones(int(here.sum()))
        further = size[here] - 1 - copies[here]
        counted += _counted(family.first, factors, ones)
        counted += _counted(family.further, factors, further)
        counted += _counted(_copy_of(family.first), factors, copies[here])
    tables = predicted(counted)
    is_sqlite = scenario.database == "sqlite"
    over = measured.overheads.get(scenario.database, measured.overheads["sqlite"])
    least = BTREES if is_sqlite else {}
    sizes = {
        table: max(one.bytes(over[table]), SQLITE_PAGE * least.get(table, 0))
        for table, one in tables.items()
    }
    sizes["pages"] = sum(
        paged(count * one.pages, count * one.page_payload, over["pages"], is_sqlite)
        for count, one in counted
    )
    indexed = sum(count * one.indexed for count, one in counted)
    return Stock(
        scenario=scenario,
        kind=list(kind),
        size=size,
        model_bytes=model_bytes,
        copies=copies,
        logical_bytes=float((model_bytes * size).sum()),
        tables=tables,
        bytes=sizes,
        new_deltas=sum(count * one.new_deltas for count, one in counted),
        index_blocks=indexed,
        index_bytes=indexed * measured.index_block_bytes,
        first={name: measured.families[name].first for name in names},
        further={name: measured.families[name].further for name in names},
    )


def _copy_of(first: Brought) -> Brought:
    """Return what an exact copy of a family's first model brings: rows, no block."""
    return replace(
        first,
        new_blocks=0.0,
        new_deltas=0.0,
        pages=0.0,
        page_payload=0.0,
        segments=0.0,
        signature_payload=0.0,
        indexed=0.0,
    )


def _family_sizes(rng: np.random.Generator, scenario: Scenario) -> Ints:
    """Draw sizes that add up to the models."""
    alone = round(scenario.models * scenario.alone)
    left, sizes = scenario.models - alone, [1] * alone
    while left > 0:
        drawn = (rng.pareto(scenario.family_tail, 4096) * 4 + 2).clip(2, scenario.largest_family)
        for one in drawn.astype(np.int64).tolist():
            sizes.append(min(one, left))
            left -= sizes[-1]
            if left == 0:
                break
    return rng.permutation(np.array(sizes, np.int64))


def page_count(payload: Floats) -> Floats:
    """Return pages for so many bytes: the last one is half full on the average; 0 for nothing."""
    return np.where(payload > 0, np.maximum(1.0, payload / PAGE_BYTES + 0.5), 0.0)


def _counted(
    one: Brought, factors: Floats, counts: Floats | Ints
) -> Iterator[tuple[float, Brought]]:
    """Yield the mean of so many models of each size; nothing where there are none.

    Pages are whole ones, so they are counted per size; rows that a tensor or an add has are as
    many in a large model as in a small one (tensors up to 65,536 blocks).
    """
    total = float(np.sum(counts))
    if total == 0:
        return
    own = page_count(one.page_payload * factors)
    others = np.maximum(one.reads - one.pages, 0.0) * factors
    yield (
        total,
        replace(
            one.scaled(float(np.sum(factors * counts)) / total),
            pages=float(np.sum(own * counts)) / total,
            reads=float(np.sum((own + others) * counts)) / total,
        ),
    )


# ---- ingest -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ingest:
    """Seconds of one writer: of all adds, and of one more at full size.

    Attributes
    ----------
    work, last_work
        What an add to a small store takes.
    growing, last_growing
        Reading what every add reads of the whole store.
    hashes, last_hashes
        Pages of the index on hashes, read and written for entries that are anywhere.
    """

    work: float
    growing: float
    hashes: float
    last_work: float
    last_growing: float
    last_hashes: float


def ingest(measured: Measured, held: Stock) -> Ingest:
    """Return what adding all models one by one takes, as the code is."""
    costs = measured.costs
    models = float(held.size.sum())
    total = Brought(
        logical=held.logical_bytes,
        tensors=held.tables["tensors"].rows,
        blocks=held.tables["source_hashes"].payload / 16,
        new_blocks=held.tables["distinct_blocks"].rows,
        new_deltas=held.new_deltas,
        page_payload=held.stored_bytes,
        indexed=held.index_blocks,
        reads=held.tables["model_pages"].rows,
        map_parts=held.tables["block_maps"].rows,
        hash_parts=held.tables["source_hashes"].rows,
        segments=held.tables["signatures"].rows,
        artifacts=held.tables["artifacts"].rows,
    )
    work = add_work(total, indexed=0.0, pages=0.0, segments=0.0, models=0.0, blocks=0.0)
    work["add"] = models
    work["page_byte"], work["warm_byte"] = held.stored_bytes, 0.0
    once = ingest_seconds(work, costs)
    mean = replace(Brought(), new_blocks=total.new_blocks / models, blocks=total.blocks / models)

    def hashes(blocks: float) -> float:
        page = HASH_PAGE[held.scenario.database]
        one = add_work(
            mean, indexed=0.0, pages=0.0, segments=0.0, models=0.0, blocks=blocks, page=page
        )
        return sum(one[kind] * costs[kind] for kind in ("page_byte", "warm_byte"))

    last_hashes = hashes(total.new_blocks)
    last = ingest_seconds(
        {
            "old_block": held.index_blocks,
            "old_page": held.tables["pages"].rows,
            "old_segment": models,
            "old_model": models,
        },
        costs,
    )
    # Nearly all adds find an index on hashes that is as large to them as the last one's.
    steps = [hashes(total.new_blocks * share) for share in (0.05, 0.25, 0.5, 0.75, 0.95)]
    return Ingest(
        once, last * models / 2, float(np.mean(steps)) * models, once / models, last, last_hashes
    )


@dataclass(frozen=True, slots=True)
class Writers:
    """Adds a second of so many writers on one store, and how often each publishes."""

    count: int
    adds_per_second: float
    attempts: float


def writers(
    measured: Measured, held: Stock, counts: Sequence[int], shards: int = 1
) -> list[Writers]:
    """Return throughput as writers are added; what grows with the store is left out.

    Publishing is a compare-and-set on the epoch of a store: who finds it moved looks up its new
    blocks again (m seconds) and tries again. With r publications a second, none falls into the T
    seconds of an add with a chance of exp(-r T), and into m seconds with exp(-r m): there is one
    attempt, and with a chance of 1 - exp(-r T) there are exp(r m) more.
    """
    seconds = ingest(measured, held).work / float(held.size.sum())
    again = measured.costs["find_block"] * held.tables["distinct_blocks"].rows
    again = again / float(held.size.sum()) + 10 * measured.costs["row"]
    found = []
    for count in counts:
        rate = count / seconds
        attempts = 1.0
        for _ in range(200):
            here = rate / shards
            late = 1.0 - math.exp(-here * seconds) if count > 1 else 0.0
            attempts = 1.0 + late * math.exp(min(here * again, 30.0))
            rate += 0.2 * (count / (seconds + (attempts - 1) * again) - rate)
        found.append(Writers(count, rate, attempts))
    return found


def sharded(measured: Measured, held: Stock, shards: int) -> tuple[float, float]:
    """Return bytes of pages on all shards: a family on one shard, and models at random.

    A shard is a store of its own, so each that has models of a family has a first one of it: of n
    models on s shards, on s (1 - (1 - 1/s)^n) of them.
    """
    total = 0.0
    for name, size, logical, copies in zip(
        held.kind, held.size.tolist(), held.model_bytes.tolist(), held.copies.tolist(), strict=True
    ):
        first, further = held.first[name], held.further[name]
        firsts = shards * -math.expm1(size * math.log1p(-1 / shards)) if shards > 1 else 1.0
        share = (size - 1 - copies) / (size - 1) if size > 1 else 1.0
        per_byte = firsts * first.page_payload + share * (size - firsts) * further.page_payload
        total += per_byte / first.logical * logical
    return held.stored_bytes, total
