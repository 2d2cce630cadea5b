# SPDX-License-Identifier: Apache-2.0
"""Checks models, names and settings, given what `verify_pages` found on the pages."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, BlockRow, ModelRow
from pydedup.blocks import BlockMap
from pydedup.catalog import (
    ParsedMaps,
    SourceHashes,
    StoredModel,
    check_row,
    recorded_aliases,
)
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError
from pydedup.hashing import digests_of
from pydedup.layout import NO_PLACE, base_places, by_page, split_places, used_places
from pydedup.maintenance.damage import MAX_ERRORS, VerifyReport
from pydedup.maintenance.rows import wrong_reads
from pydedup.maintenance.verify_pages import DAMAGE, OTHER_BASE, PageContent
from pydedup.names import check_name
from pydedup.quotas import Quotas
from pydedup.sets import distinct
from pydedup.text import listed
from pydedup.types import GRAPH_ARTIFACT

__all__ = ["ModelChecks", "verify_meta", "verify_names"]


class ModelChecks:
    """Checks models by what is on the pages, which `PageChecks` found."""

    def __init__(
        self, adapter: Adapter, contents: Mapping[int, PageContent], report: VerifyReport
    ) -> None:
        self._adapter = adapter
        self._contents = contents
        self._report = report
        self._parsed = ParsedMaps()
        #: What models recorded of pages that they read, and those of which not all did the same.
        self.tags: dict[int, bytes] = {}
        self.disputed: set[int] = set()

    def check(self, row: ModelRow) -> None:
        """Check all that is recorded of a model."""
        try:
            check_row(row)
        except CorruptStoreError as exc:
            self._report.add_error(str(exc))
        try:
            model = StoredModel(self._adapter, row, parsed=self._parsed)
        except CorruptStoreError as exc:
            self._report.add_error(str(exc))
        else:
            for page_id, tag in model.page_tags().items():
                if self.tags.setdefault(page_id, tag) != tag:
                    self.disputed.add(page_id)
            self._check_content(model)

    def _check_content(self, model: StoredModel) -> None:
        """Check that block maps lead to the blocks of the source, and what else is recorded."""
        report = self._report
        maps: list[BlockMap] = []
        begun = len(report.errors)
        lost = self._artifacts_on_lost_pages(model)  # which the blocks tell
        for name in model.artifact_names():
            if name in lost:
                continue
            try:
                model.artifact(name)
                if name == GRAPH_ARTIFACT:
                    model.graph()
            except CorruptStoreError as exc:
                report.add_error(str(exc))
        keeps_bits = model.keeps_bits
        hashes = SourceHashes(self._adapter, model)
        known = len(report.errors)
        with contextlib.suppress(*DAMAGE, NotFoundError, ArgumentError):
            model.block_maps()  # of all tensors at once; what is wrong with one, is said of it
        for ordinal in range(len(model.in_blocks)):
            try:
                block_map = model.block_map_at(ordinal)
            except (*DAMAGE, NotFoundError, ArgumentError) as exc:  # of its rows, all of them
                report.add_error(str(exc))
                continue
            maps.append(block_map)
            source = hashes.of(ordinal)
            where = model.where(ordinal)
            if len(source) != 16 * block_map.grid.count:
                report.add_error(
                    f"{where}: {len(source)} bytes of source hashes do not fit its blocks"
                )
                continue
            is_artifact = ordinal >= len(model.tensors)
            self._check_blocks(where, block_map, source, keeps_bits or is_artifact)
        if len(report.errors) == known and not hashes.are_as_added():
            report.add_error(
                f"{model.address}: its tensors are not those that it was added with; restore a "
                "backup"
            )
        if len(maps) == len(model.in_blocks):
            self._check_reads(model, maps, is_sound=len(report.errors) == begun < MAX_ERRORS)

    def _artifacts_on_lost_pages(self, model: StoredModel) -> set[str]:
        """Return which artifacts that are kept in blocks cannot be read."""
        found = set()
        for ordinal in range(len(model.tensors), len(model.in_blocks)):
            with contextlib.suppress(*DAMAGE, NotFoundError, ArgumentError):
                pages = split_places(used_places([model.block_map_at(ordinal)]))[0].tolist()
                if all(page in self._contents for page in pages):
                    continue
            found.add(model.in_blocks[ordinal].name)
        return found

    def _check_blocks(
        self, where: str, block_map: BlockMap, source: bytes, keeps_bits: bool
    ) -> None:
        """Check that the blocks of a tensor are there, as the source had them."""
        report = self._report
        wanted = digests_of(source)
        heights, widths = block_map.grid.all_shapes()
        bases = base_places(block_map)
        for page_id, blocks in by_page(block_map.page_ids):
            content = self._contents.get(page_id)
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
                (content.dtypes[slots] == block_map.dtype.code)
                & (content.rows[slots] == heights[blocks])
                & (content.cols[slots] == widths[blocks])
                & (is_source | (not keeps_bits) | ~content.readable[slots])
            )
            if not good.all():
                wrong = int((~good).sum())
                report.add_error(f"{where}: {wrong} blocks on page {page_id} are not the source's")
            needed = content.bases_of(slots)
            if content.doubts:
                is_right = np.where(content.readable[slots], is_source, needed != bases[blocks])
                self._settle(page_id, content.doubts, slots[is_right])
            if (needed != bases[blocks]).any():
                report.add_error(
                    f"{where}: blocks on page {page_id} have other bases than recorded"
                )
            based_on = distinct(split_places(needed[needed != NO_PLACE])[0]).tolist()
            if not all(page in self._contents or report.unread(page) for page in based_on):
                report.add_error(f"{where}: bases of blocks on page {page_id} are missing")

    def _settle(
        self, page_id: int, doubts: dict[int, tuple[BlockRow, str]], slots: NDArray[np.uint32]
    ) -> None:
        """Note that these slots are right: their rows are to be made anew."""
        report = self._report
        for slot in set(slots.tolist()) & doubts.keys():
            row, said = doubts.pop(slot)
            report.add_wrong(page_id, slot, row, said or OTHER_BASE)
            report.unrecorded_blocks.setdefault(page_id, []).append(slot)

    def _check_reads(self, model: StoredModel, maps: list[BlockMap], *, is_sound: bool) -> None:
        """Check what is recorded of the pages that a model reads; else it may be ``is_sound``."""
        report = self._report
        # What it takes of a page that is damaged, or not to be had, nobody knows.
        places = used_places(maps)
        lengths = {
            page_id: self._contents[page_id].lengths
            for page_id in distinct(split_places(places)[0]).tolist()
            if page_id in self._contents and not report.unread(page_id)
        }
        recorded = self._adapter.model_pages(model.row.id)
        amiss = wrong_reads(recorded, places, lengths)
        if not amiss:
            return
        # A block map that names other pages than it did is as likely, unless all that it names is
        # what the source had, or rows are missing and no other is wrong.
        is_right = model.keeps_bits and is_sound
        if is_right or {row[1] for row in recorded}.isdisjoint(amiss):
            report.wrong_readers.append(model.address)
        pages = listed([str(page_id) for page_id in amiss])
        report.add_error(f"{model.address}: what it reads is recorded wrongly for pages {pages}")


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
    recorded = {row.id: recorded_aliases(row) for row in rows}
    set_to = {(row.name, alias): row for row in rows for alias in recorded[row.id] or ()}
    for name, alias in sorted(set_to.keys() - {(name, alias) for name, alias, _ in aliases}):
        version = set_to[name, alias].version
        report.add_error(f"alias {name}@{alias} is lost, which was set to version {version}")
    for name, alias, model_id in aliases:
        found = set_to.get((name, alias))
        is_other = found.id != model_id if found else recorded.get(model_id) is not None
        if live.get(model_id) == name and is_other:
            report.add_error(f"alias {name}@{alias} points at a version that it was not set to")
        if live.get(model_id) != name and model_id not in damaged:
            other = "of another name" if model_id in live else "that is gone"
            report.add_error(f"alias {name}@{alias} points at a model {other}")
