# SPDX-License-Identifier: Apache-2.0
"""Checks a whole store, bit by bit, and changes nothing.

Page by page: every page's checksum, and that each block on it still hashes to what was recorded
when it was stored. Then model by model: every block map leads to a block of the right shape and
dtype whose hash is that of the source, so a load gives the source back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.catalog import StoredModel
from pydedup.errors import PydedupError
from pydedup.layout import by_page
from pydedup.types import Progress

__all__ = ["VerifyReport", "verify_store"]

_PAGES_AT_ONCE = 8
_MAX_ERRORS = 100


@dataclass(slots=True)
class VerifyReport:
    """What a verification looked at and what it found.

    ``errors`` are damage; ``notes`` are harmless leftovers that a vacuum removes.
    """

    pages: int = 0
    blocks: int = 0
    models: int = 0
    page_bytes: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.errors

    def add_error(self, text: str) -> None:
        """Record damage; a hopeless store stops the list at some point."""
        if len(self.errors) < _MAX_ERRORS:
            self.errors.append(text)


@dataclass(frozen=True, slots=True)
class _PageContent:
    dtypes: NDArray[np.uint8]
    rows: NDArray[np.uint32]
    cols: NDArray[np.uint32]
    digests: NDArray[np.uint64]


def verify_store(adapter: Adapter, *, progress: Progress | None = None) -> VerifyReport:
    """Verify everything that is live. Memory: a few pages, and 26 bytes per distinct block."""
    report = VerifyReport()
    for complaint in adapter.integrity_errors():
        report.add_error(f"database: {complaint}")
    with adapter.snapshot():
        contents = _verify_pages(adapter, report, progress)
        rows = adapter.models()
        for number, row in enumerate(rows):
            _verify_model(adapter, StoredModel(adapter, row), contents, report)
            report.models += 1
            if progress is not None:
                progress("checking models", number + 1, len(rows))
        _verify_aliases(adapter, {row.id for row in rows}, report)
        _note_leftovers(adapter, report)
    return report


def _verify_pages(
    adapter: Adapter, report: VerifyReport, progress: Progress | None
) -> dict[int, _PageContent]:
    contents: dict[int, _PageContent] = {}
    rows = adapter.page_rows(state=LIVE)
    seen: dict[bytes, tuple[int, int]] = {}
    for start in range(0, len(rows), _PAGES_AT_ONCE):
        group = {row.id: row for row in rows[start : start + _PAGES_AT_ONCE]}
        recorded: dict[int, list[tuple[int, bytes]]] = {}
        for block in adapter.blocks_on_pages(list(group)):
            recorded.setdefault(block.page_id, []).append((block.slot, block.hash128))
        for page_id, payload in adapter.read_pages(list(group)):
            report.pages += 1
            report.page_bytes += len(payload)
            try:
                page = codec.Page(payload)
                digests = codec.page_digests(page)
            except PydedupError as exc:
                report.add_error(f"page {page_id}: {exc}")
                continue
            if page.checksum != group[page_id].checksum:
                report.add_error(f"page {page_id}: its checksum is not the one of its row")
            slots = page.slots
            contents[page_id] = _PageContent(slots["dtype"], slots["rows"], slots["cols"], digests)
            report.blocks += page.n_slots
            actual = digests.astype("<u8").tobytes()
            wanted = dict(recorded.get(page_id, ()))
            for slot in range(page.n_slots):
                digest = actual[16 * slot : 16 * slot + 16]
                if slot not in wanted:
                    report.add_error(f"page {page_id}, slot {slot}: no distinct block names it")
                elif wanted[slot] != digest:
                    report.add_error(
                        f"page {page_id}, slot {slot}: content hashes to {digest.hex()}, "
                        f"recorded was {wanted[slot].hex()}"
                    )
                _note_twin(report, seen, contents, digest, page_id, slot)
        if progress is not None:
            progress("checking pages", min(start + _PAGES_AT_ONCE, len(rows)), len(rows))
    return contents


def _note_twin(
    report: VerifyReport,
    seen: dict[bytes, tuple[int, int]],
    contents: dict[int, _PageContent],
    digest: bytes,
    page_id: int,
    slot: int,
) -> None:
    """Note a block that is stored twice: wasteful, not wrong."""
    twin = seen.setdefault(digest, (page_id, slot))
    if twin != (page_id, slot):
        mine, other = contents[page_id], contents[twin[0]]
        if mine.dtypes[slot] == other.dtypes[twin[1]]:
            report.notes.append(
                f"page {page_id}, slot {slot}: same block as page {twin[0]}, slot {twin[1]}"
            )


def _verify_model(
    adapter: Adapter, model: StoredModel, contents: dict[int, _PageContent], report: VerifyReport
) -> None:
    read = {page_id for _, page_id, _, _ in adapter.model_pages(model.row.id)}
    for ordinal, info in enumerate(model.tensors):
        where = f"{model.address}, tensor {info.name!r}"
        try:
            block_map = model.block_map(info.name)
        except PydedupError as exc:
            report.add_error(str(exc))
            continue
        source = b"".join(adapter.source_hashes(model.row.id, ordinal))
        if len(source) != 16 * block_map.grid.count:
            report.add_error(f"{where}: {len(source)} bytes of source hashes do not fit its blocks")
            continue
        wanted = np.frombuffer(source, "<u8").reshape(-1, 2)
        heights, widths = block_map.grid.heights(), block_map.grid.widths()
        for page_id, blocks in by_page(block_map.page_ids):
            content = contents.get(page_id)
            if content is None:
                report.add_error(f"{where}: page {page_id} is missing, damaged or not live")
                continue
            if page_id not in read:
                report.add_error(f"{where}: page {page_id} is not among the pages of its model")
            slots = block_map.slots[blocks]
            if int(slots.max()) >= len(content.dtypes):
                report.add_error(f"{where}: page {page_id} has no slot {int(slots.max())}")
                continue
            good = (
                (content.dtypes[slots] == info.dtype.code)
                & (content.rows[slots] == heights[blocks])
                & (content.cols[slots] == widths[blocks])
                & (content.digests[slots] == wanted[blocks]).all(axis=1)
            )
            if not good.all():
                wrong = int((~good).sum())
                report.add_error(f"{where}: {wrong} blocks on page {page_id} are not the source's")


def _verify_aliases(adapter: Adapter, live: set[int], report: VerifyReport) -> None:
    for name, alias, model_id in adapter.aliases():
        if model_id not in live:
            report.add_error(f"alias {name}@{alias} points at a model that is gone")


def _note_leftovers(adapter: Adapter, report: VerifyReport) -> None:
    staging = len(adapter.models(state=STAGING))
    if staging:
        report.notes.append(f"{staging} unfinished or running adds")
    for state in (STAGING, RETIRED):
        pages = len(adapter.page_rows(state=state))
        if pages:
            report.notes.append(f"{pages} {state} pages")
