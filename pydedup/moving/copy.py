# SPDX-License-Identifier: Apache-2.0
"""Copying models from one store to another, one by one, each published when it is complete.

So a copy that ends early leaves whole models, and the next one goes on behind them. What arrived
is read back and compared with its hashes before it is published.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import version_of
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    DuplicateError,
    NotFoundError,
)
from pydedup.ingest.artifacts import match_artifacts
from pydedup.ingest.match import Matcher
from pydedup.ingest.pages import settled
from pydedup.ingest.publish import publish_batch
from pydedup.ingest.quota import BasesRefusedError, check_quotas
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.write import Stager
from pydedup.jobs import Job
from pydedup.layout import NO_PLACE, joined, split_places
from pydedup.maintenance.vacuum import collect_abandoned
from pydedup.moving.arrival import check_arrival
from pydedup.moving.known import Known, Scope, Whereabouts
from pydedup.moving.plan import SKIPPING, Item, same_model
from pydedup.moving.progress import CopyProgress
from pydedup.moving.quota import check_room
from pydedup.moving.resolve import NotWholeError, Resolved, Resolver
from pydedup.moving.signatures import CarriedSegments, SourceIndex
from pydedup.moving.source import End, SourceModel, read_model
from pydedup.moving.staged import MovedModel, matched_parts, set_aliases
from pydedup.moving.survey import look_at_target, survey
from pydedup.sets import distinct, is_among, without
from pydedup.signatures import read_segments
from pydedup.types import CopiedModel, CopyReport, Progress

__all__ = ["copy_models"]

_ATTEMPTS = 8
_SPOOL_MEMORY_BYTES = 4 * 1024 * 1024


def copy_models(
    source: End,
    target: End,
    items: Sequence[Item],
    *,
    damaged: list[str] | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy models as planned (plan.py); see `pydedup.Store.copy_to`.

    With ``damaged``, which has a sentence about each row that the plan had to leave out, models
    that are damaged are left out, too.

    Memory: the two pools, some 200 bytes for each page of the source and 250 for each of the
    destination, 40 for each block that models share with later ones, and for each block of the
    largest model 300 (whole pages) or 700; what an add takes of a tensor that is matched anew, or
    of a large artifact that the source has in a row.
    """
    started = time.monotonic()
    _refuse_same_store(source.adapter, target.adapter)
    collect_abandoned(target.adapter)
    # Each model is checked again when it comes, and those that are damaged will not come.
    with nullcontext() if damaged is None else suppress(CorruptStoreError):
        check_room(source, target, items)
    copier = _Copier(source, target, items, damaged, progress)
    models = [copier.copy(item) for item in items]
    aliases = set_aliases(target.adapter, items)
    target.adapter.checkpoint()  # once: what a small model writes takes less than this
    return CopyReport(
        source=source.adapter.url,
        target=target.adapter.url,
        models=tuple(models),
        aliases=aliases,
        seconds=time.monotonic() - started,
        damaged=tuple(damaged or ()),
    )


def _refuse_same_store(source: Adapter, target: Adapter) -> None:
    """Raise ArgumentError when both are one store: what is written here is seen there."""
    with only_sound_rows(source):
        mine = source.meta().get("store_id")
    if mine != target.meta().get("store_id"):
        return
    job = Job(target, "copy")
    before = _job_ids(source)
    with target.transaction():
        job.beat()
    try:
        same = _job_ids(source) - before
        if same & _job_ids(target):
            raise ArgumentError(f"{source.url} and {target.url} are one store; name another one")
    finally:
        with target.transaction():
            job.end()


def _job_ids(adapter: Adapter) -> set[str]:
    with only_sound_rows(adapter):
        return {job_id for job_id, _, _, _ in adapter.jobs()}


class _Copier:
    """Copies one model after the other."""

    def __init__(
        self,
        source: End,
        target: End,
        items: Sequence[Item],
        damaged: list[str] | None,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._target = target
        self._damaged = damaged
        self._left = [item for item in items if item.is_wanted]
        self._known = Known()
        self._there = look_at_target(target.adapter, source.adapter)
        self._look()
        nbytes = sum(self._survey.sizes.values())
        Job(target.adapter, "copy").expect(nbytes)
        self._progress = CopyProgress(progress, nbytes)

    def _look(self) -> None:
        """Look at the source."""
        adapter, epoch, left = self._source.adapter, self._epoch(), self._left
        rows = [item.row for item in left]
        self._survey = survey(adapter, rows, epoch, blocks=self._there.is_bare)
        self._index = SourceIndex(read_segments(adapter) if left else [])

    def _epoch(self) -> int:
        """Return the epoch of the source, or 0 where it is damaged: nobody can publish then."""
        try:
            return self._source.adapter.epoch()
        except CorruptStoreError as error:
            if self._damaged is None:
                raise CorruptStoreError(f"{error}{SKIPPING}") from error
            if str(error) not in self._damaged:
                self._damaged.append(str(error))
            return 0

    def copy(self, item: Item) -> CopiedModel:
        """Copy one model, if that is to be done, and say what became of it."""
        started = time.monotonic()
        if not item.is_wanted:
            return _nothing_done(item)
        not_whole: set[int] = set()
        keeps_bases = takes_pages = True
        for _ in range(_ATTEMPTS):
            self._catch_up()
            epochs = self._epoch(), self._there.epoch
            try:
                copied = self._attempt(item, not_whole, keeps_bases, takes_pages)
            except NotWholeError as error:
                not_whole.update(error.page_ids)
                continue
            except BasesRefusedError:
                keeps_bases = False
                continue
            except CorruptStoreError as error:
                if epochs != (self._epoch(), self._target.adapter.epoch()):
                    continue
                # Nobody moved or removed pages meanwhile: a store is damaged.
                if self._damaged is None:
                    raise type(error)(self._where(item, error) + SKIPPING) from error
                if takes_pages and self._there.is_bare:
                    takes_pages = False  # what is damaged may be of others on its pages
                    continue
                is_named = item.address in str(error)
                said = f"{'' if is_named else f'{item.address}: '}{error}"
                if said not in self._damaged:  # of a page that several models read
                    self._damaged.append(said)
                item.status = "damaged"
                copied = _nothing_done(item)
            except NotFoundError:
                if self._source.adapter.model(item.row.id) is not None:
                    raise
                item.status = "gone"
                copied = _nothing_done(item)
            except DuplicateError:
                if not self._was_copied(item):
                    raise
                item.status = "there"  # by somebody who copies the same at the same time
                copied = _nothing_done(item)
            if copied is not None:
                self._left.remove(item)
                return replace(copied, seconds=time.monotonic() - started)
            self._there.epoch = -1
        raise ConflictError(
            f"other writers changed what {item.address} needs {_ATTEMPTS} times in a row; copy "
            "again later"
        )

    def _catch_up(self) -> None:
        """Look again at an end where somebody else published meanwhile."""
        if self._target.adapter.epoch() != self._there.epoch:
            self._look_again()
        if self._epoch() != self._survey.epoch:
            self._look_again()
            self._look()

    def _look_again(self) -> None:
        """Rely on nothing but what is seen now."""
        self._known.clear()
        self._there = look_at_target(self._target.adapter, self._source.adapter)

    def _where(self, item: Item, error: Exception) -> str:
        ends = f"from {self._source.adapter.url} to {self._target.adapter.url}"
        return f"copying {item.address} {ends}: {error}"

    def _was_copied(self, item: Item) -> bool:
        ours, theirs = self._source.adapter, self._target.adapter
        row = version_of(theirs, item.row.name, item.row.version)
        return row is not None and same_model(ours, item.row, theirs, row)

    def _attempt(
        self, item: Item, not_whole: set[int], keeps_bases: bool, takes_pages: bool
    ) -> CopiedModel | None:
        """Copy once, whole pages if these may be taken; ``None`` when that must be done anew."""
        source, target = self._source, self._target
        epoch = self._there.epoch
        model = read_model(source.adapter, item.row)
        sizes = self._survey.sizes
        new = [page_id for page_id in model.page_ids.tolist() if page_id not in self._known]
        self._progress.begin(sum(sizes.get(page_id, 0) for page_id in new))
        with Spool(_SPOOL_MEMORY_BYTES, elsewhere=source.pool) as spool:
            matcher = Matcher(target.adapter, target.pool, spool, keeps_bases=keeps_bases)
            used = self._survey.used if takes_pages and self._there.is_bare else {}
            scope = Scope(self._known, self._there.twins, used, not_whole)
            resolver = Resolver(
                source, target, matcher, spool, model, scope, self._progress.advance
            )
            resolved = resolver.run()
            parts, count = matched_parts(model, resolved.references), len(model.stored.tensors)
            copy = MovedModel(item, model.stored, parts[:count], parts[count:])
            before = spool.count
            match_artifacts(matcher, copy)
            resolved.places.append(np.full(spool.count - before, NO_PLACE))
            spool.freeze()
            places = joined(resolved.places)
            stager = Stager(
                matcher,
                [copy],
                self._progress.wrote,
                kind="copy",
                segments=CarriedSegments(source, self._index, spool, places),
            )
            first = np.array([numbers[0] for numbers in resolved.whole], np.int64)
            whole = split_places(places[first])[0].tolist()
            more = sum(sizes.get(page_id, 0) for page_id in set(whole).difference(new))
            self._progress.grow(more)

            def plan() -> list[NDArray[np.int64]]:
                references = copy.references(matcher.reader)
                return _lay_out(references, resolved, spool)

            def lay_out() -> list[NDArray[np.int64]]:
                self._progress.will_write(sum(sizes.get(page_id, 0) for page_id in whole))
                return plan()

            def check(layout: list[NDArray[np.int64]]) -> None:
                check_arrival(target, stager, spool, layout, self._progress.checked)

            said = f"a copy of {item.address}"
            if not spool.lists:
                if spool.factored.any():
                    plan()  # what blocks take is known then
                check_quotas(matcher, [copy], epoch, said)
            layout = publish_batch(stager, lay_out, epoch, check, said)
            if layout is None:
                return None
            self._progress.end()
            # What was seen at the start still holds when nobody but us published since, and no
            # model was replaced, which may have taken pages along.
            if stager.epoch == epoch + 1 and not item.replaces:
                self._there.epoch = stager.epoch
                self._remember(model, resolved, places, matcher, stager)
            else:
                self._there.epoch = -1
            return _report(item, copy, resolved, layout, spool, matcher)

    def _remember(
        self,
        model: SourceModel,
        resolved: Resolved,
        places: NDArray[np.int64],
        matcher: Matcher,
        stager: Stager,
    ) -> None:
        """Note where blocks are that later models need, and forget those that none does."""
        whole = joined(resolved.whole)
        at, first = np.unique(np.concatenate([model.places, places[whole]]), return_index=True)
        references = np.concatenate([resolved.references, whole])[first]
        last = np.array(self._survey.done(model.page_ids.tolist()), np.int64)
        there = stager.places(references)
        # A base that all deltas on it turned out to be there without was not written.
        later = ~is_among(split_places(at)[0], last) & (split_places(there)[0] > 0)
        at, references = at[later], references[later]
        bases = matcher.reader.bases_of(references)
        is_delta = bases != NO_BASE
        found = Whereabouts.nowhere(len(at))
        found.places[:] = there[later]
        found.costs[:] = matcher.reader.costs_of(references)
        found.bases[:] = stager.places(bases)
        found.base_costs[is_delta] = matcher.reader.costs_of(bases[is_delta])
        self._known.note(at, found)
        self._known.forget(last.tolist())


def _lay_out(
    references: NDArray[np.int64], resolved: Resolved, spool: Spool
) -> list[NDArray[np.int64]]:
    """Return the new pages: whole ones, then all other new blocks in the order of the source."""
    pages = list(resolved.whole)
    rest = without(references[references >= 0], joined(pages))

    def pages_of(sizes: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
        filled = []
        ends = np.cumsum(sizes[rest])
        start = 0
        while start < len(rest):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + capacity, side="right"))
            stop = max(stop, start + 1)
            filled.append(rest[start:stop])
            start = stop
        return filled

    return pages + settled(spool, pages_of)


def _nothing_done(item: Item) -> CopiedModel:
    return CopiedModel(item.address, item.status, item.row.logical_bytes)


def _report(
    item: Item,
    copy: MovedModel,
    resolved: Resolved,
    layout: Sequence[NDArray[np.int64]],
    spool: Spool,
    matcher: Matcher,
) -> CopiedModel:
    references = copy.references()
    new = references[references >= 0]
    written = joined(layout)
    return CopiedModel(
        model=item.address,
        status="replaced" if item.replaces else "copied",
        logical_bytes=item.row.logical_bytes,
        stored_bytes=int(spool.lengths[written].sum()),
        blocks=len(references),
        shared_blocks=len(references) - len(distinct(new)),
        delta_blocks=int((matcher.reader.bases_of(references) != NO_BASE).sum()),
        pages=len(layout),
        whole_pages=len(resolved.whole),
    )
