# SPDX-License-Identifier: Apache-2.0
"""Staging and publishing (docs/architecture.md, "Writing").

Everything of an add is written in bounded transactions in state ``staging``, where no reader and
no other writer sees it; one short transaction makes it live. Publishing is a compare-and-set on
the store's epoch: if anybody published since matching began, what they brought is matched first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, STAGING, TensorRow
from pydedup.blocks import PART_BYTES, BlockMap
from pydedup.catalog import ARTIFACT_DTYPE, TAG_BYTES, map_digest, page_tags, tags_of, with_recorded
from pydedup.certificates import ALIASES, MAPS, PAGES
from pydedup.errors import ConflictError
from pydedup.hashing import digest_bytes, hash_keys
from pydedup.ingest.match import Matcher
from pydedup.ingest.pages import PageWriter
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.staged import MatchedTensor, StagedModel
from pydedup.ingest.workers import Workers
from pydedup.jobs import NO_SIGN, Job
from pydedup.layout import NO_PLACE, block_places, map_at, pages_read
from pydedup.sets import in_parts
from pydedup.signatures import drop_segment

__all__ = ["Segments", "Stager"]

_BYTES_PER_TRANSACTION = 8 * 1024 * 1024
# Blocks of which rows are made in one go.
_BLOCKS_AT_ONCE = 8192
# What a row takes beside its payload, about.
_ROW_BYTES = 200

# What kind of row it is, and the row.
_Row = tuple[str, TensorRow | tuple[Any, ...]]


class Segments(Protocol):
    """What gives the segment of the similarity index that goes with staged pages."""

    def segments(
        self,
        number: int,
        page_of: NDArray[np.int64],
        slot_of: NDArray[np.uint32],
        page_ids: list[int],
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield rows of ``signatures``; see `pydedup.ingest.candidates.Candidates.segments`."""


@dataclass(slots=True)
class _Recorded:
    """What the certificate of a model gets: digests of its block maps, and tags of its pages."""

    certificate: str
    maps: list[str] = field(default_factory=list)
    tags: Mapping[int, bytes] = field(default_factory=dict)


class Stager:
    """Stages and publishes one batch of matched models.

    ``segments`` gives their part of the similarity index; by default what the matcher indexed.
    ``workers`` help to write pages (pages.py). ``advance`` is called with bytes of pages that were
    written, ``record`` then with how many rows of distinct blocks were, and how many there are.
    """

    def __init__(
        self,
        matcher: Matcher,
        models: Sequence[StagedModel],
        advance: Callable[[int], None] | None = None,
        *,
        kind: str = "add",
        segments: Segments | None = None,
        workers: Workers | None = None,
        record: Callable[[int, int], None] | None = None,
    ) -> None:
        self.matcher = matcher
        self.models = models
        self._adapter = matcher.adapter
        self._workers = workers
        self._segments = matcher.candidates if segments is None else segments
        self._advance = advance
        self._record = record
        beside = workers.waiting if workers is not None and workers.are_several else None
        self._job = Job(matcher.adapter, kind, beside)
        self._has_begun = False
        #: Of each model that is staged its certificate, and what its block maps and pages are.
        self._recorded: dict[int, _Recorded] = {}
        self._pages = self._page_writer([])
        #: That of the store once this was published.
        self.epoch = -1

    @property
    def page_ids(self) -> list[int]:
        """Ids of the pages that are staged, in the order of their layout."""
        return self._pages.page_ids

    # ---- staging ------------------------------------------------------------------------------

    def stage(self, layout: Sequence[NDArray[np.int64]]) -> bool:
        """Write everything in state ``staging``; what is small in one transaction.

        ``False`` when a vacuum took it for abandoned and collected it: what came after that, nobody
        would delete if this process were killed.
        """
        pages = self._pages = self._page_writer(layout)
        rows = _batches(self._rows())
        images = pages.make_small() if pages.is_small else []
        first: Sequence[_Row] = ()
        self._job.expect(self.matcher.spool.cost_of(layout))
        try:
            with self._job.staging():
                self._has_begun = True
                self._recorded.clear()
                for model in self.models:
                    model.model_id = self._insert_model(model)
                self._job.model_ids = [model.model_id for model in self.models]
                if pages.is_small:
                    pages.write_small(images)
                    first = next(rows, [])
                    self._insert(first)
                self._job.beat()
        except BaseException:
            # Ids of a transaction that failed may become another writer's.
            for model in self.models:
                model.model_id = 0
            self._job.model_ids = ()
            pages.forget()
            raise
        if pages.is_small:
            pages.note_small()
        else:
            pages.write()
        done = _blocks_in(first)
        self._tell(done)
        for batch in rows:
            with self._job.staging():
                # Which also keeps a vacuum from collecting it before this is committed.
                if not self._adapter.update_model(self.models[0].model_id, state=STAGING):
                    return False
                self._insert(batch)
                self._job.beat()
            done += _blocks_in(batch)
            self._tell(done)
        return True

    def _tell(self, done: int) -> None:
        """Tell of rows of distinct blocks: those of a million take ten seconds and more."""
        total = int(np.count_nonzero(self._pages.page_of))
        if self._record is not None and total:
            self._record(done, total)

    def discard(self) -> None:
        """Remove what was staged; leaves nothing behind but a gap in the ids.

        Does nothing when the publishing transaction was committed after all: an interrupt, or a
        connection that broke, can hide a commit from whoever made it.
        """
        if not self._has_begun:
            return  # another writer was in the way: he need not be waited for once more
        adapter = self._adapter
        mine = [model.model_id for model in self.models if model.model_id]
        if any(adapter.model(model_id) is not None for model_id in mine):
            return
        for model in self.models:
            if model.model_id:
                # Also what was written under an id that a vacuum has collected meanwhile.
                with adapter.transaction():
                    drop_segment(adapter, model.model_id)
                    adapter.delete_model(model.model_id)
                model.model_id = 0
        self._job.model_ids = ()
        self._job.discard(self.page_ids)
        self._pages.forget()

    def publish(self, epoch: int) -> bool:
        """Make everything live in one transaction, if the epoch is still ``epoch``.

        Raises DuplicateError when somebody published the same ``name@version`` meanwhile and
        ConflictError when a vacuum took this staging for abandoned.
        """
        adapter = self._adapter
        with self._job.publishing():
            if not adapter.bump_epoch(epoch):
                return False
            adapter.set_page_state(self.page_ids, LIVE)
            for model in self.models:
                model.settle(adapter)
                recorded = self._recorded[model.model_id]
                placed = {
                    MAPS: "".join(recorded.maps),
                    PAGES: page_tags(recorded.tags),
                    ALIASES: model.aliases(adapter),
                }
                if not adapter.update_model(
                    model.model_id,
                    state=LIVE,
                    certificate=with_recorded(recorded.certificate, placed),
                    created_at=model.created_at(),
                ):
                    raise ConflictError(
                        f"the staging of {model.address} was collected by a vacuum: it "
                        f"{NO_SIGN}; start again"
                    )
            self._job.end()
        self.epoch = epoch + 1
        return True

    def finish(self) -> None:
        """Leave nothing to be done for the database, once this was published."""
        self._job.finish()

    def keep_alive(self) -> None:
        """Say that this is still going on, where nothing is written for long."""
        self._job.keep_alive()

    def _page_writer(self, layout: Sequence[NDArray[np.int64]]) -> PageWriter:
        return PageWriter(self._job, self.matcher.spool, layout, self._workers, self._advance)

    def _insert_model(self, model: StagedModel) -> int:
        row = model.row()
        model_id = self._adapter.insert_model(row, replaces=model.replaces)
        self._recorded[model_id] = _Recorded(row.certificate)
        return self._job.checked_id("models", model_id)

    def _insert(self, batch: Sequence[_Row]) -> None:
        adapter = self._adapter
        inserts: Mapping[str, Callable[[list[Any]], None]] = {
            "block": self._job.stage_blocks,
            "signature": adapter.insert_signatures,
            "tensor": adapter.insert_tensors,
            "map": adapter.insert_block_maps,
            "hash": adapter.insert_source_hashes,
            "read": adapter.insert_model_pages,
            "artifact": self._insert_artifacts,
        }
        rows: dict[str, list[Any]] = {}
        for kind, row in batch:
            rows.setdefault(kind, []).append(row)
        for kind, some in rows.items():
            inserts[kind](some)

    def _insert_artifacts(self, rows: list[Any]) -> None:
        for model_id, *item in rows:
            self._adapter.insert_artifacts(model_id, [tuple(item)])

    def _rows(self) -> Iterator[_Row]:
        """Yield all rows but those of models and pages."""
        yield from self._block_rows()
        segments = self._segments.segments(
            self.models[0].model_id, self._pages.page_of, self._pages.slot_of, self.page_ids
        )
        yield from (("signature", row) for row in segments)
        for model in self.models:
            yield from self._model_rows(model)

    def _block_rows(self) -> Iterator[_Row]:
        """Yield the distinct blocks of page after page; by now all bases of deltas have a place."""
        spool, pages = self.matcher.spool, self._pages
        numbers = np.flatnonzero(pages.page_of > 0)
        numbers = numbers[np.argsort(pages.page_of[numbers], kind="stable")]
        for some in in_parts(numbers, _BLOCKS_AT_ONCE):
            keys = hash_keys(spool.hashes[some])
            page_ids, slots = pages.page_of[some].tolist(), pages.slot_of[some].tolist()
            places = self.places(spool.bases[some]).tolist()
            bases = (None if place == NO_PLACE else place for place in places)
            for row in zip(keys, page_ids, slots, bases, strict=True):
                yield "block", row

    def _model_rows(self, model: StagedModel) -> Iterator[_Row]:
        model_id = model.model_id
        for ordinal, tensor in enumerate(model.in_blocks):
            info = tensor.info
            label = info.dtype.label if ordinal < len(model.tensors) else ARTIFACT_DTYPE
            shapes = json.dumps(info.shape), json.dumps(info.recorded_blocks)
            yield "tensor", TensorRow(model_id, ordinal, info.name, label, *shapes)
            parts = list(self._block_map(tensor).parts())
            self._recorded[model_id].maps.append(map_digest(parts))
            for part, payload in enumerate(parts):
                yield "map", (model_id, ordinal, part, payload)
            for part, payload in enumerate(in_parts(digest_bytes(tensor.digests), PART_BYTES)):
                yield "hash", (model_id, ordinal, part, payload)
        reader = self.matcher.reader
        references = model.references(reader)
        reads = list(pages_read(self.places(references), reader.costs_of(references)))
        self._recorded[model_id].tags = self._tags([page_id for page_id, _, _ in reads])
        for row in reads:
            yield "read", (model_id, *row)
        for artifact in model.artifacts():
            yield "artifact", (model_id, *artifact)

    def _tags(self, page_ids: Sequence[int]) -> dict[int, bytes]:
        """Return the tags of pages; of those that are shared, what other models know comes first.

        Another page may be in their place.
        """
        tags = {}
        for page_id in page_ids:
            new = self._pages.checksums.get(page_id, b"")[:TAG_BYTES]
            tag = new or self.matcher.pool.expected(page_id)
            if tag:
                tags[page_id] = tag
        return {**tags_of(self._adapter, [n for n in page_ids if n not in tags]), **tags}

    def _block_map(self, tensor: MatchedTensor) -> BlockMap:
        bases = self.places(self.matcher.reader.bases_of(tensor.references))
        return map_at(tensor.grid, tensor.entry.dtype, self.places(tensor.references), bases)

    def places(self, references: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of blocks that are stored or staged, `NO_PLACE` for `NO_BASE`."""
        places = np.full(len(references), NO_PLACE, np.int64)
        new = references >= 0
        spooled = references[new]
        places[new] = block_places(self._pages.page_of[spooled], self._pages.slot_of[spooled])
        stored = ~new & (references != NO_BASE)
        places[stored] = self.matcher.stored.places(references[stored])
        return places


def _blocks_in(batch: Sequence[_Row]) -> int:
    return sum(kind == "block" for kind, _ in batch)


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Group rows into transactions of bounded bytes."""
    batch: list[_Row] = []
    size = 0
    for kind, row in rows:
        batch.append((kind, row))
        payload = row[-1] if isinstance(row, tuple) else None
        size += _ROW_BYTES + (len(payload) if isinstance(payload, bytes) else 0)
        if size >= _BYTES_PER_TRANSACTION:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
