# SPDX-License-Identifier: Apache-2.0
"""All that a report of a store says, as numbers of one moment. Not here: how it looks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pydedup.adapter import LIVE, Adapter, ModelRow
from pydedup.adapter_options import telling_rows, told_damage
from pydedup.catalog import Catalog, StoredModel, certificate_of, model_info
from pydedup.errors import CorruptStoreError
from pydedup.layout import PAGE_BYTES
from pydedup.pool import PagePool
from pydedup.replacement import Trace, check_trace
from pydedup.report.curves import Curves, miss_curves
from pydedup.report.detail import TensorBlocks, blocks_of
from pydedup.report.families import Common, common_blocks
from pydedup.report.figures import StoreStats, store_stats
from pydedup.sets import distinct, is_among
from pydedup.types import ModelInfo
from pydedup.usage import Readers, beside_damage, bytes_by_group

__all__ = ["FILL_BINS", "Called", "Detail", "ModelLine", "StoreReport", "gather"]

#: Bins of the histogram of how full pages are.
FILL_BINS = 10
# Models that are shown block by block when none is named.
_DETAILS = 4


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One model, and what its blocks take, counted as `pydedup.usage` does.

    ``used_bytes`` is ``shared_bytes`` and ``marginal_bytes``: what removing it frees.
    """

    info: ModelInfo
    certificate: Mapping[str, Any]
    pages: int
    used_bytes: int
    marginal_bytes: int

    @property
    def shared_bytes(self) -> int:
        """What its blocks take that other models use too."""
        return self.used_bytes - self.marginal_bytes


@dataclass(frozen=True, slots=True)
class Detail:
    """One model, block by block."""

    address: str
    tensors: tuple[TensorBlocks, ...]


@dataclass(frozen=True, slots=True)
class Called:
    """A model of a trace; without a name it is not in the store (any more)."""

    address: str | None
    calls: int


@dataclass(frozen=True, slots=True)
class StoreReport:
    """A store at one moment.

    Attributes
    ----------
    models
        In the order of their rows; ``common.readers`` are places in it.
    used_bytes
        What the blocks that models use take, each counted once.
    page_fill
        How many live pages are filled to 0-10 %, 10-20 %, ...
    curves, called, trace_known
        Of the trace, if there is one: its miss ratios, its models by their calls, and how much of
        its pages the store has.
    """

    made_at: float
    stats: StoreStats
    models: tuple[ModelLine, ...]
    used_bytes: int
    page_fill: tuple[int, ...]
    common: Common
    details: tuple[Detail, ...]
    curves: Curves | None
    called: tuple[Called, ...]
    trace_known: float
    trace_complete: bool


def gather(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    names: Sequence[str],
    trace: Trace | None,
) -> StoreReport:
    """Look at a store; ``names`` are the models to show block by block.

    Models that are damaged are in no figure, as if they were not there; ``stats.damaged`` of the
    result tells of them.

    Raises
    ------
    NotFoundError
        When there is no such model.
    ArgumentError
        When the trace is none, or does not fit together.
    CorruptStoreError
        When one of ``names`` is damaged.
    """
    if trace is not None:
        check_trace(trace)
    damaged: list[str] = []
    with adapter.snapshot():
        named = [model_info(catalog.resolve(name)).id for name in names]
        with telling_rows(adapter, damaged):
            return _of_sound_models(adapter, catalog, pool, named, trace, damaged)


def _of_sound_models(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    named: Sequence[int],
    trace: Trace | None,
    damaged: list[str],
) -> StoreReport:
    """Look at a store without models that turn out to be damaged; ``damaged`` tells of them."""
    infos = {info.id: info for info in catalog.sound_infos(damaged)}
    rows = []
    for row in adapter.models():
        try:
            certificate_of(row)
        except CorruptStoreError as exc:
            if row.id in named:
                raise
            damaged.append(str(exc))
            continue
        if row.id in infos:
            rows.append(row)
    return beside_damage(
        adapter,
        rows,
        damaged,
        lambda sound: _gathered(adapter, catalog, pool, named, trace, sound, infos, damaged),
        named,
    )


def _gathered(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    named: Sequence[int],
    trace: Trace | None,
    rows: Sequence[ModelRow],
    infos: Mapping[int, ModelInfo],
    damaged: Sequence[str],
) -> StoreReport:
    stats = store_stats(adapter, catalog, pool.stats())
    stats = replace(
        stats, damaged=tuple(dict.fromkeys((*stats.damaged, *told_damage(adapter, damaged))))
    )
    readers = Readers.of_store(adapter, pool, rows)
    used, marginal, shared = bytes_by_group(readers, np.arange(len(rows)), len(rows))
    pages = np.bincount(readers.rows[:, 0], minlength=len(rows))
    number = {row.id: i for i, row in enumerate(rows)}
    chosen = [number[model_id] for model_id in named]
    largest = sorted(range(len(rows)), key=lambda i: (-rows[i].logical_bytes, rows[i].id))
    chosen = list(dict.fromkeys(chosen)) or largest[:_DETAILS]
    common = common_blocks(readers, list(dict.fromkeys([*chosen, *largest])))
    details = [_detail(adapter, rows[i], common) for i in chosen if i in common.readers]
    sizes = {page.id: page.payload_bytes for page in adapter.page_rows(state=LIVE)}
    fill = np.array(list(sizes.values()), np.float64) * FILL_BINS / PAGE_BYTES
    bins = np.clip(fill, 0, FILL_BINS - 1).astype(np.int64)
    lines = [
        ModelLine(
            info=infos[row.id],
            certificate=certificate_of(row),
            pages=int(pages[i]),
            used_bytes=int(used[i]),
            marginal_bytes=int(marginal[i]),
        )
        for i, row in enumerate(rows)
    ]
    known = 0.0
    if trace is not None and len(trace):
        seen = distinct(trace.pages)
        known = float(is_among(seen, np.array(list(sizes), np.int64)).mean())
    return StoreReport(
        made_at=time.time(),
        stats=stats,
        models=tuple(lines),
        used_bytes=int(marginal.sum()) + shared,
        page_fill=tuple(np.bincount(bins, minlength=FILL_BINS).tolist()),
        common=common,
        details=tuple(details),
        curves=None if trace is None else miss_curves(trace),
        called=() if trace is None else _called(trace, {row.id: row for row in rows}),
        trace_known=known,
        trace_complete=trace is None or trace.complete,
    )


def _detail(adapter: Adapter, row: ModelRow, common: Common) -> Detail:
    # Block maps of this snapshot, not cached ones: a vacuum may have moved blocks since.
    model = StoredModel(adapter, row)
    return Detail(
        model.address,
        tuple(blocks_of(model.tensors, model.block_maps()[: len(model.tensors)], common)),
    )


def _called(trace: Trace, rows: Mapping[int, ModelRow]) -> tuple[Called, ...]:
    owners, calls = np.unique(trace.owners, return_counts=True)
    found = [
        Called(rows[owner].address if owner in rows else None, count)
        for owner, count in zip(owners.tolist(), calls.tolist(), strict=True)
    ]
    return tuple(sorted(found, key=lambda called: -called.calls))
