# SPDX-License-Identifier: Apache-2.0
"""Checks models, given what is on the pages; the pages are `pydedup.maintenance.verify`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, BlockRow, ModelRow
from pydedup.blocks import BlockMap
from pydedup.catalog import ModelDigest, SourceHashes, StoredModel
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError, SchemaVersionError
from pydedup.layout import base_places, by_page, split_places, used_places
from pydedup.maintenance.damage import MAX_ERRORS, VerifyReport
from pydedup.maintenance.rows import wrong_reads
from pydedup.names import check_name
from pydedup.quotas import Quotas
from pydedup.text import listed

__all__ = [
    "DAMAGE",
    "NO_BASE",
    "OTHER_BASE",
    "PageContent",
    "verify_meta",
    "verify_model",
    "verify_names",
]

#: In place of a base, of a block that is no delta.
NO_BASE = -1
OTHER_BASE = "its base is another than recorded"
#: What says that a page is damaged. Any other error (a kernel or memory that cannot be had) says
#: nothing about the store.
DAMAGE = (CorruptStoreError, SchemaVersionError)


@dataclass(frozen=True, slots=True)
class PageContent:
    """What the slots of a page hold."""

    dtypes: NDArray[np.uint8]
    rows: NDArray[np.uint32]
    cols: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    digests: NDArray[np.uint64]
    readable: NDArray[np.bool_]
    """False for deltas whose base cannot be read; their digests are 0."""
    bases: NDArray[np.int64] | None
    """Places of bases, `NO_BASE` where a block is no delta; None where none is."""
    doubts: dict[int, tuple[BlockRow, str]] = field(default_factory=dict)
    """Slots that are not as recorded, with the row of each and what is said of it: either of them
    is damaged, and models may know which. Of deltas whose bases are gone, which may well be,
    nothing is said."""

    def bases_of(self, slots: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the places of the bases of some blocks."""
        return np.full(len(slots), NO_BASE) if self.bases is None else self.bases[slots]


def verify_model(
    adapter: Adapter, model: StoredModel, contents: dict[int, PageContent], report: VerifyReport
) -> None:
    """Check that block maps lead to the blocks of the source, and what is recorded beside them."""
    maps: list[BlockMap] = []
    live = np.array(list(contents), np.int64)
    try:
        for name, _ in adapter.artifacts(model.row.id):
            adapter.artifact(model.row.id, name)
        model.graph()
    except CorruptStoreError as exc:
        report.add_error(str(exc))
    keeps_bits = model.keeps_bits
    hashes = SourceHashes(adapter, model)
    named, known = ModelDigest(), len(report.errors)
    with contextlib.suppress(*DAMAGE, NotFoundError, ArgumentError):
        model.block_maps()  # of all tensors at once; what is wrong with one, is said of it
    for ordinal, info in enumerate(model.tensors):
        where = f"{model.address}, tensor {info.name!r}"
        try:
            block_map = model.block_map(info.name)
        except (*DAMAGE, NotFoundError, ArgumentError) as exc:  # of its rows, all of them
            report.add_error(str(exc))
            continue
        maps.append(block_map)
        source = hashes.of(ordinal)
        if len(source) != 16 * block_map.grid.count:
            report.add_error(f"{where}: {len(source)} bytes of source hashes do not fit its blocks")
            continue
        named.add(info, source)
        wanted = np.frombuffer(source, "<u8").reshape(-1, 2)
        heights, widths = block_map.grid.heights(), block_map.grid.widths()
        bases = base_places(block_map)
        for page_id, blocks in by_page(block_map.page_ids):
            content = contents.get(page_id)
            if content is None:
                if not report.unread(page_id):
                    report.add_error(f"{where}: page {page_id} is missing, damaged or not live")
                continue
            slots = block_map.slots[blocks]
            if int(slots.max()) >= len(content.dtypes):
                report.add_error(f"{where}: page {page_id} has no slot {int(slots.max())}")
                continue
            is_source = (content.digests[slots] == wanted[blocks]).all(axis=1)
            good = (
                (content.dtypes[slots] == info.dtype.code)
                & (content.rows[slots] == heights[blocks])
                & (content.cols[slots] == widths[blocks])
                & (is_source | (not keeps_bits) | ~content.readable[slots])
            )
            if not good.all():
                wrong = int((~good).sum())
                report.add_error(f"{where}: {wrong} blocks on page {page_id} are not the source's")
            needed = content.bases_of(slots)
            if content.doubts:
                is_right = np.where(
                    content.readable[slots], keeps_bits & is_source, needed != bases[blocks]
                )
                _settle(report, page_id, content.doubts, slots[is_right])
            if (needed != bases[blocks]).any():
                report.add_error(
                    f"{where}: blocks on page {page_id} have other bases than recorded"
                )
            lost = np.setdiff1d(split_places(needed[needed != NO_BASE])[0], live)
            if not all(map(report.unread, lost.tolist())):
                report.add_error(f"{where}: bases of blocks on page {page_id} are missing")
    if len(report.errors) == known and named.digest() != model.row.digest:
        report.add_error(f"{model.address}: its tensors are not those that it was added with")
    if len(maps) < len(model.tensors):
        return
    # What it takes of a page that is damaged, or not to be had, nobody knows.
    places = used_places(maps)
    lengths = {
        page_id: contents[page_id].lengths
        for page_id in np.unique(split_places(places)[0]).tolist()
        if page_id in contents and not report.unread(page_id)
    }
    recorded = adapter.model_pages(model.row.id)
    amiss = wrong_reads(recorded, places, lengths)
    if amiss:
        # A block map that names other pages than it did is as likely, unless all that it names is
        # what the source had, or rows are missing and no other is wrong.
        is_right = keeps_bits and len(report.errors) == known < MAX_ERRORS
        if is_right or {row[1] for row in recorded}.isdisjoint(amiss):
            report.wrong_readers.append(model.address)
        pages = listed([str(page_id) for page_id in amiss])
        report.add_error(f"{model.address}: what it reads is recorded wrongly, of pages {pages}")


def _settle(
    report: VerifyReport,
    page_id: int,
    doubts: dict[int, tuple[BlockRow, str]],
    slots: NDArray[np.uint32],
) -> None:
    """Note that these slots are right: their rows are to be made anew."""
    for slot in set(slots.tolist()) & doubts.keys():
        row, said = doubts.pop(slot)
        report.add_error(f"page {page_id}, slot {slot}: {said or OTHER_BASE}, which is wrong")
        report.surplus_blocks.append(row.id)
        report.unrecorded_blocks.setdefault(page_id, []).append(slot)


def verify_meta(adapter: Adapter, report: VerifyReport) -> None:
    """Check what is recorded of the store as a whole, without which nothing can be added."""
    if "store_id" not in adapter.meta():  # by which it is told from others
        report.add_error(f"{adapter.url} has no store_id in meta; restore a backup")
    for read in (adapter.epoch, lambda: list(Quotas(adapter))):
        try:
            read()
        except CorruptStoreError as exc:
            report.add_error(str(exc))


def verify_names(
    adapter: Adapter, rows: Sequence[ModelRow], damaged: Collection[int], report: VerifyReport
) -> None:
    """Check that models and aliases are called as they can be, and aliases point at models.

    Of those whose row is ``damaged`` nobody knows what they are called.
    """
    live = {row.id: row.name for row in rows}
    aliases = adapter.aliases()
    called = [(row.name, row.version) for row in rows]
    for name, version in called + [(name, alias) for name, alias, _ in aliases]:
        try:
            check_name(name, "the name")
            check_name(version, "the version or alias")
        except ArgumentError as exc:
            report.add_error(f"{name}@{version} is damaged: {exc}; restore a backup")
    for name, alias, model_id in aliases:
        if live.get(model_id) != name and model_id not in damaged:
            other = "of another name" if model_id in live else "that is gone"
            report.add_error(f"alias {name}@{alias} points at a model {other}")
