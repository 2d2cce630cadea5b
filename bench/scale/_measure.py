# SPDX-License-Identifier: Apache-2.0
"""Measures this machine and some families, and writes what the simulator is fed with.

Three families in stores of their own: two of text classifiers (IMDB on 20,000 words, BBC on 8,000),
and MiniLM with its published full fine-tune. What `_check.py` builds is none of these.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from _costs import add_work, block_prices, residual, store_costs, write_costs
from _reading import Requested, read_costs, request_costs, request_prices, victim_cost
from _sharing import Brought, Family, family_of, index_bytes
from _tables import fill, overheads

import pydedup
from pydedup import config

__all__ = ["Measured", "load", "measure", "timed_adds", "work_of"]

MODELS = 60
#: Models that are asked in turns for the price of a request.
TURNS = 12
FILLED = 3000


@dataclass(slots=True)
class Measured:
    """Prices in seconds, bytes per row, and families by name."""

    machine: dict[str, Any]
    costs: dict[str, float] = field(default_factory=dict)
    overheads: dict[str, dict[str, float]] = field(default_factory=dict)
    index_block_bytes: float = 0.0
    families: dict[str, Family] = field(default_factory=dict)
    hot_seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON, numbers rounded to what they are good for."""
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")


def load(path: Path) -> Measured:
    """Read what `Measured.save` wrote."""
    found = json.loads(path.read_text())
    families = {
        name: Family(
            name=one["name"],
            models=one["models"],
            first=Brought(**one["first"]),
            further=Brought(**one["further"]),
            base_reads=one["base_reads"],
            owners={int(count): blocks for count, blocks in one["owners"].items()},
        )
        for name, one in found.pop("families").items()
    }
    return Measured(families=families, **found)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def timed_adds(store: pydedup.Store, models: Any) -> list[float]:
    """Add models one by one; returns the seconds of each."""
    spent = []
    for name, source in models:
        started = time.perf_counter()
        store.add(name, source)
        spent.append(time.perf_counter() - started)
    return spent


def measure(folder: Path, tell: Any, servers: dict[str, str] | None = None) -> Measured:
    """Measure everything; takes about three minutes and 2 GB below ``folder``.

    ``servers`` are URLs of empty databases beside SQLite, by name, for what rows take there.
    """
    from _family import Classifiers, classifiers, minilm, texts

    found = Measured(machine())
    corpus = texts()
    arrays = dict(minilm())
    sources = {
        "imdb": list(classifiers(Classifiers(corpus, "imdb", 20_000, 7), MODELS)),
        "bbc": list(classifiers(Classifiers(corpus, "bbc", 8_000, 8), MODELS)),
        "minilm": [(f"minilm-{name}", weights) for name, weights in arrays.items()],
    }
    works, seconds, entry_bytes, requested = [], [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        costs = _block_prices(sources, arrays)
        tell(f"blocks: {costs}")
        with pydedup.open(Path(scratch) / "empty.db") as store:
            costs |= write_costs(store._adapter)
        with pydedup.open(Path(scratch) / "first.db") as store:
            store.add("first", sources["bbc"][0][1])  # whatever the first add of a process costs
        for name, models in sources.items():
            path = Path(scratch) / f"{name}.db"
            with pydedup.open(path, memory="1GiB") as store:
                spent = timed_adds(store, models)
                family = found.families[name] = family_of(store, models[0][0][:5], name)
                total, indexed = index_bytes(store)
                entry_bytes.append(total / indexed)
                for number, one in enumerate(spent):
                    brought = family.further if number else family.first
                    works.append(work_of(family, brought, number))
                    seconds.append(one)
                if name == "imdb":
                    costs |= store_costs(store, costs["old_block"]) | read_costs(store, path)
                requested.append(_request(store, models, name))
                found.hot_seconds[name] = requested[-1].hot
                tell(f"{name}: adds {statistics.median(spent):.3f} s, {family.further}")
        costs |= residual(works, seconds, costs)
        costs |= request_prices(requested)
        costs["victim_page"] = victim_cost()
        found.costs = costs
        found.index_block_bytes = statistics.median(entry_bytes)
        urls = {"sqlite": f"sqlite:///{scratch}/filled.db", **(servers or {})}
        one = found.families["imdb"].further
        for kind, url in urls.items():
            with pydedup.open(url) as store:
                fill(store._adapter, FILLED, one)
                found.overheads[kind] = overheads(store._adapter, one, FILLED)
            tell(f"rows in {kind}: {found.overheads[kind]}")
    return found


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": config.kernels().in_use,
        "pydedup": pydedup.__version__,
        "python": platform.python_version(),
    }


def work_of(family: Family, brought: Brought, number: int) -> dict[str, float]:
    """Return the work of the add with this number to a store of its family alone."""
    return add_work(
        brought,
        indexed=(family.first.indexed + (number - 1) * family.further.indexed) if number else 0.0,
        pages=(family.first.pages + (number - 1) * family.further.pages) if number else 0.0,
        segments=float(number),
        models=float(number),
        blocks=(family.first.new_blocks + (number - 1) * family.further.new_blocks)
        if number
        else 0.0,
    )


def _block_prices(sources: dict[str, Any], arrays: dict[str, Any]) -> dict[str, float]:
    """Measure MiniLM's blocks, and rows of a classifier; blocks of both are 16 KiB."""
    from pydedup.demo.models import embedding

    name = "embeddings.word_embeddings.weight"
    base, dense = (
        np.ascontiguousarray(next(a for key, a in weights.items() if key.endswith(name))[:8192])
        for weights in arrays.values()
    )
    tables = [embedding(model).weight.detach().numpy() for _, model in sources["imdb"][:6]]
    few = [tables[0].copy() for _ in tables[1:]]
    for table, moved in zip(few, tables[1:], strict=True):
        table[::20] = moved[::20]  # four rows of a block: a short delta
    return block_prices([(base, [dense]), (tables[0], tables[1:]), (tables[0], few)])


def _request(store: pydedup.Store, models: Any, name: str) -> Requested:
    """Time predictions of a text by the last models in turns, or a product with all of MiniLM.

    In turns, since who serves many models finds none of them in the processor's caches.
    """
    rng = np.random.default_rng(0)
    address, source = models[-1]
    addresses = [address]
    if name == "minilm":
        inputs = {
            key: rng.standard_normal((1, a.shape[1]), np.float32)
            for key, a in source.items()
            if a.ndim == 2
        }

        def request(reader: pydedup.Store) -> None:
            for key, x in inputs.items():
                reader.tensor(address, key).matmul(x)
    else:
        ids = rng.integers(0, 5000, (1, 60))

        addresses = [other for other, _ in models[-TURNS:]]
        turns = itertools.cycle(addresses)

        def request(reader: pydedup.Store) -> None:
            reader.predict(next(turns), ids)

    pages = sorted(
        {page for one in addresses for page in store._catalog.model(one).page_ids().tolist()}
    )
    return request_costs(store.url, address, request, pages)
