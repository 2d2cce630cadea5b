# SPDX-License-Identifier: Apache-2.0
"""Lives of a store, drawn at random, against a dict of what it was given.

Adds under each policy, of models near to others, dry runs, interrupts, a writer who is overtaken by
another, aliases, removals and vacuums. After each step two clients read all models back as they
were, and all that says how large something is (reports, `explain`, `info`, `sizes`, `stats`) agrees
with the block maps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.adapter import LIVE
from pydedup.catalog import StoredModel
from pydedup.layout import block_costs, split_places, used_places
from pydedup.policies import Accuracy, Bounded, Exact, Lossless, Policy
from pydedup.types import AddReport, DType

Array = NDArray[Any]
Model = dict[str, Array]
AllRows = Callable[[pydedup.Store], dict[str, list[str]]]

STEPS = 14
FLOATS = [np.dtype(t) for t in (np.float32, np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]
SHAPES = [(), (0, 5), (1, 900), (700,), (64, 128), (96, 64), (192, 192), (8, 4, 3, 3)]
KEEPS = {"seconds", "dry_run"}  # of reports, what a dry run says otherwise


def metric(arrays: Any) -> float:
    """Falls as weights move."""
    sizes = (np.abs(a.astype(np.float64)) for a in arrays.values())
    return -math.fsum(float(size[np.isfinite(size)].sum()) for size in sizes) / 1e3


POLICIES: list[Policy] = [Exact(), Lossless(), Lossless(), Bounded(0.001), Bounded(0.05)]
POLICIES += [Accuracy(metric, 0.01, max_evaluations=8)]


class StoppedError(Exception):
    """Raised where an add is interrupted."""


def bits(model: Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in model.items()}


def blocks(array: Array, shape: tuple[int, int]) -> Iterator[Array]:
    matrix = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1) if array.size else array
    for top in range(0, matrix.shape[0] if array.size else 0, shape[0]):
        for left in range(0, matrix.shape[1], shape[1]):
            yield matrix[top : top + shape[0], left : left + shape[1]]


@dataclasses.dataclass
class Kept:
    """A model that was added, and what the store gave back for it at once."""

    source: Model
    stored: Model
    policy: Policy
    report: AddReport


class Life:
    """A store, another client of it, and what has to be in it."""

    def __init__(self, url: str, seed: int, all_rows: AllRows) -> None:
        self.all_rows = all_rows
        self.rng = np.random.default_rng(seed)
        self.store, self.other = pydedup.open(url), pydedup.open(url)
        self.models: dict[str, Kept] = {}
        self.aliases: dict[tuple[str, str], str] = {}
        self.block_shape = [None, (32, 32), (8, 128), (64, 64)][seed % 4]
        self.library: list[Array] = []

    # ---- what is drawn ------------------------------------------------------------------------

    def one_of(self, things: Any) -> Any:
        return things[int(self.rng.integers(len(things)))]

    def tensor(self) -> Array:
        if not self.library or self.rng.random() < 0.2:
            array = np.asarray(self.rng.standard_normal(self.one_of(SHAPES)))
            array = array.astype(self.one_of([*FLOATS, np.dtype(np.int32), np.dtype(bool)]))
        else:
            array = self.changed(self.one_of(self.library))
        self.library.append(array)
        return array

    def changed(self, array: Array) -> Array:
        """Another tensor: the same, moved a little, in part, turned, with what is no number."""
        how = int(self.rng.integers(8))
        if not array.size or array.dtype.kind in "ib" or how == 0:
            return array.copy()
        if how == 1:
            return np.asarray(-array)
        if how == 2:
            return np.ascontiguousarray(array.T)
        copy = np.array(array)
        if how == 3:
            copy.reshape(-1)[self.rng.integers(array.size)] = self.one_of([np.nan, np.inf, -0.0])
            return copy
        part = copy.reshape(-1)[: array.size // self.one_of([1, 1, 1, 2, 9]) or 1]
        noise = 10.0 ** self.rng.uniform(-6, -1) * self.rng.standard_normal(part.shape)
        part[:] = (part.astype(np.float64) * (1 + noise)).astype(array.dtype)
        return copy

    def model(self, name: str) -> Model:
        """A next version of what has this name, else one of new tensors; some are tied."""
        before = [kept for address, kept in self.models.items() if address.split("@")[0] == name]
        if before and self.rng.random() < 0.8:
            model = {
                key: self.changed(a) if self.rng.random() < 0.5 else a
                for key, a in before[-1].source.items()
            }
        else:
            model = {f"t{number}": self.tensor() for number in range(int(self.rng.integers(1, 6)))}
        if self.rng.random() < 0.3:
            model["tied"] = self.one_of(list(model.values()))
        return model

    # ---- steps --------------------------------------------------------------------------------

    def add(self) -> None:
        """One or several models, first interrupted and as a dry run."""
        names = {
            f"m{number}" for number in self.rng.integers(0, 6, self.one_of([1, 1, 3])).tolist()
        }
        models = {name: self.model(name) for name in sorted(names)}
        policy, workers = self.one_of(POLICIES), self.one_of([1, 2])
        given: Any = {"policy": policy, "block_shape": self.block_shape, "workers": workers}
        left = int(self.rng.integers(1, 12))

        def interrupt(stage: str, done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise StoppedError

        before, stats = self.all_rows(self.store), self.store.stats()
        dry = self.other.add_many(models, dry_run=True, **given)
        assert self.all_rows(self.store) == before
        try:
            reports = self.other.add_many(models, progress=interrupt, **given)
        except StoppedError:
            assert self.all_rows(self.store) == before
            reports = self.store.add_many(models, **given)
        for said, report in zip(dry, reports, strict=True):
            pairs = zip(*(dataclasses.asdict(r).items() for r in (said, report)), strict=True)
            assert all(a == b for a, b in pairs if a[0] not in KEEPS)
        self.keep(models, policy, reports)
        now = self.store.stats()
        assert now.pages - stats.pages == sum(report.pages for report in reports)
        new = sum(report.blocks - report.shared_blocks for report in reports)
        assert now.distinct_blocks - stats.distinct_blocks == new

    def be_overtaken(self) -> None:
        """Another writer publishes much the same first."""
        policy = self.one_of(POLICIES[:5])
        name = self.one_of([*self.models, "m0"]).partition("@")[0]
        mine, theirs = self.model(name), self.model(name)
        theirs.update({key: array for key, array in mine.items() if self.rng.random() < 0.8})
        faster: list[AddReport] = []

        def overtake(stage: str, done: int, total: int) -> None:
            if stage == "writing" and not faster:
                faster.append(self.other.add("fast", theirs, policy=policy))

        report = self.store.add("slow", mine, policy=policy, progress=overtake)
        if faster:
            self.keep({"fast": theirs}, policy, faster)
        self.keep({"slow": mine}, policy, [report])

    def keep(self, models: dict[str, Model], policy: Policy, reports: list[AddReport]) -> None:
        for source, report in zip(models.values(), reports, strict=True):
            assert report.model not in self.models
            stored = self.store.load(report.model)
            self.models[report.model] = Kept(source, stored, policy, report)
            self.check_promise(self.models[report.model])

    def remove(self) -> None:
        address = self.one_of(list(self.models))
        name, _, version = address.partition("@")
        for key in [k for k, v in self.aliases.items() if k[0] == name and v == version]:
            self.store.alias(*key, None)
            del self.aliases[key]
        frees = self.store.explain(address).removal_frees_bytes
        used = self.store.stats(by="tenant").used_bytes
        assert self.store.remove(address) == [address]
        del self.models[address]
        assert used - self.store.stats(by="tenant").used_bytes == frees

    def alias(self) -> None:
        name, _, version = self.one_of(list(self.models)).partition("@")
        self.other.alias(name, "prod", version)
        self.aliases[name, "prod"] = version

    def vacuum(self) -> None:
        used = self.store.stats(by="tenant")
        dry, wet = self.other.vacuum(dry_run=True), self.store.vacuum()
        assert wet == dataclasses.replace(
            dry, dry_run=False, stored_bytes_after=wet.stored_bytes_after
        )
        stats = self.store.stats()
        assert (stats.pages, stats.page_bytes) == (wet.pages_after, wet.page_bytes_after)
        assert stats.retired_pages == 0
        assert self.store.stats(by="tenant") == used
        # What nobody uses is less than a quarter of each page that shares no block.
        places, costs = self.used()
        everything = np.concatenate([np.empty(0, np.int64), *places.values()])
        for page_id in {row.id for row in self.store._adapter.page_rows(state=LIVE)}:
            rows = self.store._adapter.blocks_on_pages([page_id])
            there = np.array([(page_id << 20) | row.slot for row in rows], np.int64)
            mine = everything[split_places(everything)[0] == page_id]
            if len(mine) == len(np.unique(mine)):
                total = int(block_costs(self.store._pool, there).sum())
                assert total - sum(costs[p] for p in mine.tolist()) < 0.25 * total

    # ---- what must hold -----------------------------------------------------------------------

    def used(self) -> tuple[dict[str, NDArray[np.int64]], dict[int, int]]:
        """The places that each model uses, and what the block at each place takes."""
        adapter = self.store._adapter
        with adapter.snapshot():
            models = [StoredModel(adapter, row) for row in adapter.models()]
            places = {model.address: used_places(model.block_maps()) for model in models}
            every = np.unique(np.concatenate([np.empty(0, np.int64), *places.values()]))
            costs = block_costs(self.store._pool, every)
        return places, dict(zip(every.tolist(), costs.tolist(), strict=True))

    def check_promise(self, kept: Kept) -> None:
        certificate = kept.report.certificate
        farthest, shapes = 0.0, self.store.info(kept.report.model).tensors
        for tensor in shapes:
            source, stored = kept.source[tensor.name], kept.stored[tensor.name]
            if kept.policy.max_rel_error == 0 or not DType.of(source.dtype).is_float:
                assert bits({"": source}) == bits({"": stored})
                continue
            pairs = (blocks(a, tensor.block_shape) for a in (source, stored))
            for block, other in zip(*pairs, strict=True):
                if block.tobytes() != other.tobytes():
                    wide, near = block.astype(np.float64), other.astype(np.float64)
                    assert np.isfinite(wide).all()
                    away = float(np.linalg.norm(wide - near) / np.linalg.norm(wide))
                    assert away <= kept.policy.max_rel_error * (1 + 1e-9)
                    farthest = max(farthest, away)
        recorded = certificate["largest_block_error"]  # a bound, hardly above what it bounds
        assert farthest * (1 - 1e-9) <= recorded <= farthest * (1 + 2e-5) + 1e-12
        if isinstance(kept.policy, Accuracy):
            drop = metric(kept.source) - metric(kept.stored)
            assert drop <= kept.policy.max_drop + 1e-12
            assert certificate["metric_after"] == pytest.approx(metric(kept.stored))

    def check(self) -> None:
        report = self.store.verify()
        assert report.errors == []
        assert not [note for note in report.notes if "same block" in note]
        for client in (self.store, self.other):
            assert {info.address for info in client.models()} == set(self.models)
        for address, kept in self.models.items():
            assert bits(self.one_of([self.store, self.other]).load(address)) == bits(kept.stored)
        for (name, alias), version in self.aliases.items():
            assert bits(self.other.load(f"{name}@{alias}")) == bits(
                self.models[f"{name}@{version}"].stored
            )
        places, costs = self.used()
        assert self.store.stats(by="tenant").used_bytes == sum(costs.values())
        sizes = {size.info.address: size for size in self.store.sizes()}
        for address, mine in places.items():
            others = [p for other, p in places.items() if other != address]
            alone = np.setdiff1d(mine, np.concatenate([mine[:0], *others]))
            explained, info = self.store.explain(address), self.store.info(address)
            total = sum(costs[p] for p in mine.tolist())
            assert total == explained.used_bytes == info.used_bytes
            assert explained.removal_frees_bytes == sum(costs[p] for p in alone.tolist())
            pages = np.unique(split_places(mine)[0])
            assert len(pages) == info.pages == sizes[address].pages
            added = self.models[address].report
            assert sum(tensor.blocks for tensor in explained.tensors) == added.blocks
            assert sum(tensor.delta_blocks for tensor in explained.tensors) == added.delta_blocks
        owned = {page for p in places.values() for page in split_places(p)[0].tolist()}
        assert owned == {row.id for row in self.store._adapter.page_rows(state=LIVE)}

    def live(self) -> None:
        for _ in range(STEPS):
            steps: list[Callable[[], None]] = (
                [self.add] * 3 + [self.be_overtaken] * 2 + [self.vacuum]
            )
            if self.models:
                steps += [self.remove, self.remove, self.alias]
            self.one_of(steps if len(self.models) < 9 else [self.remove])()
            self.check()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    ("backend", "seed"),
    [*(("sqlite", seed) for seed in range(8)), ("postgres", 8), ("mysql", 9)],
)
def test_whatever_is_done_all_of_it_holds(
    new_store: Callable[[str], str], all_rows: AllRows, backend: str, seed: int
) -> None:
    life = Life(new_store(backend), seed, all_rows)
    with life.store, life.other:
        life.live()
