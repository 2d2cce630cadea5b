# SPDX-License-Identifier: Apache-2.0
"""Serving on paper: page reads, hit ratio and latency as nodes are added.

Each node has a pool of its own over the same store; `_traffic.py` draws and replays requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from _measure import Measured
from _reading import MOST_LOOKED_AT
from _simulate import Stock
from _traffic import Fleet, Served, Touches, draw_requests, serve, zipf
from numpy.typing import NDArray

from pydedup.layout import PAGE_BYTES

__all__ = ["ROUTINGS", "Node", "catalog_hits", "fleet_of", "latency", "nodes", "pool_bytes"]

Ints = NDArray[np.int64]

#: What a store takes off its memory before the pool (`pydedup.opening`): this, or the half.
_SCRATCH = 48 << 20

ROUTINGS = ("random", "model", "family")
#: Models whose block maps a store remembers at least (`pydedup.catalog`), those asked for last;
#: of small ones it remembers more.
CATALOG_MODELS = 256


@dataclass(frozen=True, slots=True)
class Node:
    """One routing at one number of nodes; means over the nodes that were replayed."""

    nodes: int
    routing: str
    served: Served
    seconds: float
    cpu_seconds: float
    catalog_hits: float
    busiest: float


def pool_bytes(memory: int) -> int:
    """Return the bytes of pages that a store with so much memory holds."""
    return memory - min(_SCRATCH, memory // 2)


def fleet_of(
    measured: Measured, held: Stock, touches: Mapping[str, Touches] | None = None
) -> Fleet:
    """Return the models of a stock as a fleet."""
    names = list(held.first)
    index = {name: i for i, name in enumerate(names)}
    kind = np.array([index[name] for name in held.kind], np.int64)
    first = np.array([held.first[n].page_payload / held.first[n].logical for n in names])
    further = np.array([held.further[n].page_payload / held.first[n].logical for n in names])
    base_bytes = first[kind] * held.model_bytes
    own_bytes = further[kind] * held.model_bytes
    base_pages = np.maximum(np.ceil(base_bytes / PAGE_BYTES), 1).astype(np.int64)
    own_pages = np.maximum(np.ceil(own_bytes / PAGE_BYTES), 1).astype(np.int64)
    return Fleet(
        family=np.repeat(np.arange(len(held.size)), held.size),
        base_pages=base_pages,
        own_pages=own_pages,
        base_bytes=np.maximum(base_bytes / base_pages, 1).astype(np.int64),
        own_bytes=np.maximum(own_bytes / own_pages, 1).astype(np.int64),
        touches=kind,
        profiles=tuple((touches or {}).get(name, Touches()) for name in names),
    )


def nodes(
    measured: Measured,
    held: Stock,
    counts: Sequence[int],
    routings: Sequence[str] = ROUTINGS,
    *,
    fleet: Fleet | None = None,
    policy: str = "reuse",
    rate: float | None = None,
    replayed: int = 2,
) -> list[Node]:
    """Replay requests as nodes are added, each with a pool of its own.

    ``random`` sends a request to any node, ``model`` and ``family`` to the one that a hash of
    the model or its family names. Of many nodes ``replayed`` are looked at; ``busiest`` is exact.
    """
    scenario = held.scenario
    fleet = fleet_of(measured, held) if fleet is None else fleet
    rng = np.random.default_rng([scenario.seed, 7])
    chances = zipf(fleet.models, scenario.popularity)[rng.permutation(fleet.models)]
    found = []
    for count in counts:
        for routing in routings if count > 1 else ("random",):
            node_of = _node_of(fleet, routing, count, rng)
            load = np.full(count, 1 / count)
            if node_of is not None:
                load = np.bincount(node_of, weights=chances, minlength=count)
            several = []
            # Of the nodes, those with the most common loads: a heavy one has its hot models alone.
            looked = np.argsort(load)[len(load) // 2 :][:: max(1, count // 4)][:replayed]
            for node in looked[: 1 if node_of is None else replayed]:
                mine = chances if node_of is None else np.where(node_of == node, chances, 0.0)
                models = draw_requests(mine / mine.sum(), scenario.requests, rng)
                served = serve(fleet, models, pool_bytes(scenario.memory), policy=policy, rate=rate)
                several.append((served, catalog_hits(models), models))
            served = _mean([one for one, _, _ in several])
            hits = float(np.mean([one for _, one, _ in several]))
            seconds, cpu = latency(measured, held, fleet, served, several[0][2])
            found.append(
                Node(count, routing, served, seconds, cpu, hits, float(load.max() * count))
            )
    return found


def _node_of(fleet: Fleet, routing: str, count: int, rng: np.random.Generator) -> Ints | None:
    if routing == "random" or count == 1:
        return None
    if routing == "model":
        return rng.integers(0, count, fleet.models)
    return rng.integers(0, count, len(fleet.base_pages))[fleet.family]


def _mean(several: Sequence[Served]) -> Served:
    columns = ("uses", "reads", "read_bytes", "waiting", "rate", "resident")
    return Served(*(float(np.mean([getattr(one, c) for one in several])) for c in columns))


def catalog_hits(models: Ints) -> float:
    """Return how often a model's tensors and block maps are remembered, in the second half."""
    known: OrderedDict[int, None] = OrderedDict()
    hits, half = 0, len(models) // 2
    for number, model in enumerate(models.tolist()):
        if model in known:
            hits += number >= half
            known.move_to_end(model)
        else:
            known[model] = None
            if len(known) > CATALOG_MODELS:
                known.popitem(last=False)
    return hits / max(len(models) - half, 1)


def latency(
    measured: Measured,
    held: Stock,
    fleet: Fleet,
    served: Served,
    models: Ints,
) -> tuple[float, float]:
    """Return the mean seconds of a request, pages read one by one, and its computing part."""
    costs = measured.costs
    families = fleet.family[models]
    kind = np.array([held.first[name].logical for name in held.kind])[families]
    hot = np.array([measured.hot_seconds[name] for name in held.kind])[families]
    hot_seconds = float(np.mean(hot * held.model_bytes[families] / kind))
    tensors = float(np.mean(np.array([held.first[n].tensors for n in held.kind])[families]))
    looked = costs["catalog_model"] + tensors * costs["catalog_tensor"]
    catalog = (1 - catalog_hits(models)) * looked
    read = served.waiting * costs["read_request"] + served.reads * costs["read_page"]
    read += served.read_bytes * costs["read_byte"]
    # Only a full pool looks for a victim.
    victims = served.reads * min(served.resident, MOST_LOOKED_AT) * costs["victim_page"]
    return hot_seconds + catalog + read + victims, hot_seconds
