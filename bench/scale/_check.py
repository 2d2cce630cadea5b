# SPDX-License-Identifier: Apache-2.0
"""Predictions beside a real store of some hundred models, none of them fitted to it.

Prices and bytes per row come from other families (`_measure.py`); how models share comes from a
pilot: the first dozen models of one of two families. What is checked is a store with both families,
of which the second was never looked at, real adds, and real predictions through real pools.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from _costs import HASH_PAGE, add_work, ingest_seconds
from _measure import Measured, timed_adds, work_of
from _nodes import fleet_of, latency, pool_bytes
from _reading import hot_seconds
from _sharing import Family, family_of, index_bytes
from _simulate import Scenario, Stock, stock_of
from _tables import TABLES, table_bytes, table_rows
from _traffic import Fleet, Served, Touches, draw_requests, serve, zipf
from numpy.typing import NDArray

import pydedup

__all__ = ["Compared", "check"]

#: Corpus, words and first seed of the checked families; `_measure.py` has others.
CORPUS, WORDS, SEED, FAMILIES = "rt", 60_000, 101, 2
PILOT = 12
#: Adds of a measured family between those that are checked: at so many points, so many at each.
POINTS, AT_A_POINT = 15, 2
CONTROLS = 1 + (POINTS + 1) * AT_A_POINT
#: A family that was measured: name there, words, seed.
CONTROL = ("imdb", 20_000, 7)
#: Times that a prediction of the pilot is timed in between those that are checked.
HOT_POINTS = 6
#: Texts of one time that is taken.
_TEXTS = 16
POPULARITY = 0.9


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity. ``within`` is what it must keep to, as a share of the real value."""

    what: str
    predicted: float
    real: float
    unit: str = ""
    within: float = 0.2

    @property
    def ratio(self) -> float:
        """Predicted by real."""
        return self.predicted / self.real if self.real else float(self.predicted == 0)

    @property
    def holds(self) -> bool:
        """Whether it is near enough."""
        return abs(self.ratio - 1) <= self.within


@dataclass(slots=True)
class _Pilot:
    """What the pilot told: its family, pages that requests touch, and a prediction from memory.

    ``hot`` times that, now.
    """

    family: Family
    touches: Touches
    hot: Callable[[], float]


def check(
    measured: Measured,
    folder: Path,
    tell: Any,
    *,
    models: int = 300,
    requests: int = 3000,
    memories: Sequence[int] = (64 << 20, 144 << 20),
    url: str | None = None,
    given: tuple[str, int, int] = (CORPUS, WORDS, SEED),
) -> list[Compared]:
    """Build, measure, compare; about five minutes and 1 GB for 300 models.

    ``url`` is an empty PostgreSQL database to build it in, instead of SQLite; ``given`` are the
    corpus, the words of the table and the first seed of the families.
    """
    from _family import Classifiers, classifiers, texts

    def control_of(corpus: Any) -> Classifiers:
        return Classifiers(corpus, *CONTROL)

    corpus = texts()
    name, words, seed = given
    families = [Classifiers(corpus, name, words, seed + i) for i in range(FAMILIES)]
    split = families[0].bags(corpus.tasks[name].held_out)
    lengths = np.diff(split.bags.offsets, append=len(split.bags.ids))
    asked = [
        split.bags.ids[o : o + n][None, :] for o, n in zip(split.bags.offsets, lengths, strict=True)
    ]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with pydedup.open(Path(scratch) / "pilot.db") as store:
            named = list(classifiers(families[0], PILOT))
            timed_adds(store, named)
            pilot = _pilot(store, families[0].name, [name for name, _ in named], asked[:200])
        tell(f"pilot: {pilot.family.further}, touches {pilot.touches}")
        database = "sqlite" if url is None else "postgres"
        fed = replace_families(measured, {"pilot": pilot.family}, 0.0)
        held = _stock(fed, pilot, models, database, memories[0])
        address = url or f"sqlite:///{scratch}/checked.db"
        pace = _Pace(
            measured, Path(scratch) / "control.db", classifiers(control_of(corpus), CONTROLS)
        )
        with pydedup.open(address, memory="256MiB") as store, pace:
            spent: list[float] = []
            names: list[str] = []
            sources = [classifiers(family, models // FAMILIES) for family in families]
            points = control_points(models // FAMILIES)
            for number, both in enumerate(zip(*sources, strict=True)):
                if number in points:
                    pace.take(len(spent))
                names += [name for name, _ in both]  # in turns, as models of a hub arrive
                spent += timed_adds(store, both)
            pace.take(len(spent))
            tell(f"{len(spent)} adds in {sum(spent):.1f} s")
            tell(f"adds of a measured family take {pace} times what was measured")
            found = _stored(fed, held, store, spent, pace.of_adds())
        found += _served(
            fed, held, pilot, address, sorted(names), asked[200:], requests, memories, tell
        )
    return found


def control_points(rounds: int) -> set[int]:
    """Return before which of so many rounds of adds the pace is taken: `POINTS` at most."""
    return set(np.linspace(0, rounds, POINTS, endpoint=False).astype(int).tolist())


class _Pace:
    """How much longer adds of a family that was measured take now: the machine's mood.

    It changes within seconds, by half and more, so it is taken in between the adds that are
    checked, some adds at a time.
    """

    def __init__(self, measured: Measured, path: Path, models: Iterator[Any]) -> None:
        self._family = measured.families[CONTROL[0]]
        self._costs = measured.costs
        self._path = path
        self._models = models
        self._added = 0
        self._points: list[tuple[int, float]] = []

    def __enter__(self) -> Self:
        self._store = pydedup.open(self._path, memory="1GiB")
        timed_adds(self._store, list(itertools.islice(self._models, 1)))
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def __str__(self) -> str:
        return ", ".join(f"{pace:.2f}" for _, pace in self._points)

    def take(self, at: int) -> None:
        """Take it after so many of the adds that are checked."""
        spent = timed_adds(self._store, list(itertools.islice(self._models, AT_A_POINT)))
        expected = 0.0
        for _ in spent:
            self._added += 1
            work = work_of(self._family, self._family.further, self._added)
            expected += ingest_seconds(work, self._costs)
        self._points.append((at, sum(spent) / expected))

    def of_adds(self) -> NDArray[np.float64]:
        """Return the pace of each add: the mean of those before and after it."""
        paces = np.empty(self._points[-1][0])
        for (start, before), (stop, after) in itertools.pairwise(self._points):
            paces[start:stop] = (before + after) / 2
        return paces


def replace_families(measured: Measured, families: dict[str, Family], hot: float) -> Measured:
    """Return what was measured, with other families."""
    return replace(measured, families=families, hot_seconds=dict.fromkeys(families, hot))


def _stock(fed: Measured, pilot: _Pilot, models: int, database: str, memory: int) -> Stock:
    sizes = np.full(FAMILIES, models // FAMILIES)
    scenario = Scenario(
        models=int(sizes.sum()), database=database, popularity=POPULARITY, memory=memory
    )
    logical = np.full(FAMILIES, pilot.family.first.logical)
    return stock_of(fed, scenario, ["pilot"] * FAMILIES, sizes, logical, np.zeros_like(sizes))


def _pilot(
    store: pydedup.Store, prefix: str, names: Sequence[str], asked: Sequence[NDArray[Any]]
) -> _Pilot:
    """Look at a few models and some requests, as anybody can who has them."""
    family = family_of(store, prefix, "pilot")
    adapter = store._adapter
    rows = {
        row.id: [page for _, page, _, _ in adapter.model_pages(row.id)] for row in adapter.models()
    }
    first = min(rows)
    base = {page: i for i, page in enumerate(rows[first])}
    store.record(1 << 20)
    for number, ids in enumerate(asked):
        store.predict(names[1 + number % (len(names) - 1)], ids)
    trace = store.recorded()
    store.record(0)
    touched = np.zeros(len(base))
    own = np.zeros(32)
    owned = np.zeros(32)
    for call in range(1, len(trace.owners) + 1):
        pages = np.unique(trace.pages[trace.calls == call])
        for page in pages.tolist():
            if page in base:
                touched[base[page]] += 1
        mine = [page for page in rows[int(trace.owners[call - 1])] if page not in base]
        owned[: len(mine)] += 1
        own[: len(mine)] += np.isin(mine, pages)
    kept = owned > 0.05 * len(trace.owners)
    touches = Touches(
        tuple((touched / len(trace.owners)).tolist()), tuple((own[kept] / owned[kept]).tolist())
    )
    pages = sorted(
        {page for name in names for page in store._catalog.model(name).page_ids().tolist()}
    )
    # Texts are of all lengths; those of a few would find their words in the processor's caches.
    texts, turns = itertools.cycle(asked), itertools.cycle(names)

    def request(reader: pydedup.Store) -> None:
        for ids in itertools.islice(texts, _TEXTS):
            reader.predict(next(turns), ids)

    url = store.url
    return _Pilot(family, touches, lambda: hot_seconds(url, request, pages) / _TEXTS)


# ---- what is stored -----------------------------------------------------------------------------


def _stored(
    fed: Measured,
    held: Stock,
    store: pydedup.Store,
    spent: Sequence[float],
    paces: NDArray[np.float64],
) -> list[Compared]:
    adapter = store._adapter
    rows, sizes = table_rows(adapter), table_bytes(adapter)
    found = [Compared(f"rows of {table}", held.tables[table].rows, rows[table]) for table in TABLES]
    payload = sum(row.payload_bytes for row in adapter.page_rows())
    found.append(Compared("bytes of pages", held.stored_bytes / 1e6, payload / 1e6, "MB"))
    found.append(Compared("table pages", held.bytes["pages"] / 1e6, sizes["pages"] / 1e6, "MB"))
    rest = sum(size for table, size in sizes.items() if table != "pages")
    found.append(Compared("all other tables", held.metadata_bytes / 1e6, rest / 1e6, "MB"))
    memory, indexed = index_bytes(store)
    found.append(Compared("blocks in the similarity index", held.index_blocks, indexed))
    found.append(Compared("memory of that index", held.index_bytes / 1e6, memory / 1e6, "MB"))
    predicted = (np.array(_adding(fed, held)) * paces).tolist()
    found.append(Compared("ingest", sum(predicted), sum(spent), "s"))
    tail = len(spent) // 10
    found.append(
        Compared("the last tenth of the adds", sum(predicted[-tail:]), sum(spent[-tail:]), "s")
    )
    return found


def _adding(fed: Measured, held: Stock) -> list[float]:
    """Return the seconds of each add, families taking turns."""
    (family,) = fed.families.values()
    seconds = []
    indexed = pages = blocks = 0.0
    for number in range(int(held.size.sum())):
        one = family.first if number < len(held.size) else family.further
        work = add_work(
            one,
            indexed=indexed,
            pages=pages,
            segments=float(number),
            models=float(number),
            blocks=blocks,
            page=HASH_PAGE[held.scenario.database],
        )
        seconds.append(ingest_seconds(work, fed.costs))
        indexed, pages = indexed + one.indexed, pages + one.pages
        blocks += one.new_blocks
    return seconds


# ---- what is served -----------------------------------------------------------------------------


def _served(
    fed: Measured,
    held: Stock,
    pilot: _Pilot,
    url: str,
    names: Sequence[str],
    asked: Sequence[NDArray[Any]],
    requests: int,
    memories: Sequence[int],
    tell: Any,
) -> list[Compared]:
    """Compare serving: one node at several sizes of memory, then two nodes.

    Popularity is given, being no property of the store; the requests drawn from it are others.
    """
    fleet = fleet_of(fed, held, {"pilot": pilot.touches})
    chances = zipf(fleet.models, POPULARITY)[np.random.default_rng(5).permutation(fleet.models)]
    found = []
    for memory in memories:
        models = draw_requests(chances, requests, np.random.default_rng(17))
        real = _real(url, names, models, asked, memory, pilot.hot)
        hot = ", ".join(f"{1e3 * seconds:.2f}" for seconds in real.hot)
        tell(f"a prediction of the pilot from memory meanwhile: {hot} ms")
        now = replace_families(fed, fed.families, float(np.mean(real.hot)))
        title = f"{memory >> 20} MiB"
        found += _beside(title, _expected(fleet, chances, requests, memory), real, now, held, fleet)
    memory = memories[0]
    for routing in ("random", "family"):
        nodes = [
            chances if routing == "random" else np.where(fleet.family == node, chances, 0.0)
            for node in range(2)
        ]
        expected = [_expected(fleet, mine / mine.sum(), requests, memory)[0] for mine in nodes]
        reals = [
            _real(
                url,
                names,
                draw_requests(mine / mine.sum(), requests, np.random.default_rng(23 + node)),
                asked,
                memory,
            )
            for node, mine in enumerate(nodes)
        ]
        found.append(
            Compared(
                f"2 nodes of {memory >> 20} MiB, {routing}: reads a request",
                float(np.mean([one.reads for one in expected])),
                float(np.mean([one.reads for one in reals])),
            )
        )
        found.append(
            Compared(
                f"2 nodes of {memory >> 20} MiB, {routing}: hit ratio",
                float(np.mean([one.hit_ratio for one in expected])),
                float(np.mean([1 - one.reads / one.uses for one in reals])),
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class _Real:
    """Means over the second half of real requests."""

    uses: float
    reads: float
    seconds: float
    hot: list[float]


def _real(
    url: str,
    names: Sequence[str],
    models: NDArray[np.int64],
    asked: Sequence[Any],
    memory: int,
    hot: Callable[[], float] | None = None,
) -> _Real:
    """Predict with these models, one request after another, in a store opened anew.

    ``hot`` is called now and then during the second half.
    """
    half = len(models) // 2
    taken: list[float] = []
    with pydedup.open(url, mode="r", memory=memory) as store:
        store.record(1 << 24)
        spent = []
        before, apart = 0, max(half // HOT_POINTS, 1)
        for number, model in enumerate(models.tolist()):
            if number == half:
                before = store._pool.stats()["inserts"]
            if hot is not None and number >= half and (number - half) % apart == 0:
                taken.append(hot())  # the machine has its moods
            started = time.perf_counter()
            store.predict(names[model], asked[number % len(asked)])
            spent.append(time.perf_counter() - started)
        reads = (store._pool.stats()["inserts"] - before) / (len(models) - half)
        trace = store.recorded()
    uses = len(np.unique((trace.calls.astype(np.int64) << 40) | trace.pages)) / len(models)
    return _Real(uses, reads, float(np.mean(spent[half:])), taken)


def _expected(
    fleet: Fleet, chances: NDArray[np.float64], requests: int, memory: int
) -> tuple[Served, NDArray[np.int64]]:
    """Replay other requests of the same popularity, all pages."""
    models = draw_requests(chances, requests, np.random.default_rng(99))
    return serve(fleet, models, pool_bytes(memory), rate=1.0), models


def _beside(
    title: str,
    expected: tuple[Served, NDArray[np.int64]],
    real: _Real,
    fed: Measured,
    held: Stock,
    fleet: Fleet,
) -> list[Compared]:
    served, models = expected
    seconds, _ = latency(fed, held, fleet, served, models)
    return [
        Compared(f"{title}: pages a request uses", served.uses, real.uses),
        Compared(f"{title}: pages a request reads", served.reads, real.reads),
        Compared(f"{title}: hit ratio", served.hit_ratio, 1 - real.reads / real.uses),
        Compared(f"{title}: latency", 1e3 * seconds, 1e3 * real.seconds, "ms"),
    ]
