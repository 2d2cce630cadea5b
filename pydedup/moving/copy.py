# SPDX-License-Identifier: Apache-2.0
"""Copying models from one store to another in order, each published when it is complete.

So a copy that ends early leaves whole models, and the next one goes on behind them; of small
models, several are published together. What arrived is read back and compared with its hashes
before it is published.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
    QuotaError,
)
from pydedup.ingest.artifacts import match_artifacts
from pydedup.ingest.match import Matcher
from pydedup.ingest.publish import publish_batch
from pydedup.ingest.quota import BasesRefusedError, check_quotas
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.write import Stager
from pydedup.jobs import Job
from pydedup.layout import NO_PLACE, joined, split_places
from pydedup.maintenance.vacuum import collect_abandoned
from pydedup.moving.arrival import check_arrival
from pydedup.moving.known import Known, Met, Scope, Whereabouts
from pydedup.moving.plan import SKIPPING, Item, same_model
from pydedup.moving.progress import CopyProgress
from pydedup.moving.quota import check_room
from pydedup.moving.resolve import NotWholeError, Resolver
from pydedup.moving.signatures import CarriedSegments, SourceIndex
from pydedup.moving.source import End, read_models
from pydedup.moving.staged import MovedModel, matched_parts, set_aliases
from pydedup.moving.survey import look_at_target, survey
from pydedup.moving.together import (
    MOST_BYTES,
    AloneError,
    Moved,
    gathered,
    lay_out,
    nothing_done,
    report,
)
from pydedup.sets import is_among
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
    largest model, or of small ones that come together, 300 (whole pages) or 700; what an add takes
    of a tensor that is matched anew, or of a large artifact that the source has in a row.
    """
    started = time.monotonic()
    _refuse_same_store(source.adapter, target.adapter)
    collect_abandoned(target.adapter)
    # Each model is checked again when it comes, and those that are damaged will not come.
    with nullcontext() if damaged is None else suppress(CorruptStoreError):
        check_room(source, target, items)
    copier = _Copier(source, target, items, damaged, progress)
    models = list(copier.copy(items))
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
    """Copies one model after the other, small ones several at a time."""

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
        self._come_alone = False
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

    def copy(self, items: Sequence[Item]) -> Iterator[CopiedModel]:
        """Copy models, those that are to be, and say what became of each."""
        done = 0
        while done < len(items):
            some = items[done : done + 1] if self._come_alone else gathered(items, done)
            copied = self._copy_together(some) if len(some) > 1 else [self._copy_one(some[0])]
            yield from copied
            done += len(copied)

    def _copy_together(self, items: Sequence[Item]) -> list[CopiedModel]:
        """Copy the first of some models: as many as are of not too many bytes.

        Whatever is in the way of one of them, they are copied one by one.
        """
        self._catch_up()
        try:
            copied = self._attempt(items, set(), keeps_bases=True, takes_pages=True)
        except AloneError:  # and so are others of its family
            self._come_alone = True
        except (NotWholeError, CorruptStoreError, NotFoundError, DuplicateError, QuotaError):
            pass  # what was seen at both ends still holds: pages still go whole
        else:
            if copied is not None:
                del self._left[: len(copied)]
                return copied
            self._there.epoch = -1
        return [self._copy_one(item) for item in items]

    def _copy_one(self, item: Item) -> CopiedModel:
        if not item.is_wanted:
            return nothing_done(item)
        started = time.monotonic()
        not_whole: set[int] = set()
        keeps_bases = takes_pages = True
        for _ in range(_ATTEMPTS):
            self._catch_up()
            epochs = self._epoch(), self._there.epoch
            try:
                copied = self._attempt(
                    [item], not_whole, keeps_bases=keeps_bases, takes_pages=takes_pages
                )
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
                copied = [nothing_done(item)]
            except NotFoundError:
                if self._source.adapter.model(item.row.id) is not None:
                    raise
                item.status = "gone"
                copied = [nothing_done(item)]
            except DuplicateError:
                if not self._was_copied(item):
                    raise
                item.status = "there"  # by somebody who copies the same at the same time
                copied = [nothing_done(item)]
            if copied is not None:
                self._left.remove(item)
                return replace(copied[0], seconds=time.monotonic() - started)
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
        self, items: Sequence[Item], not_whole: set[int], *, keeps_bases: bool, takes_pages: bool
    ) -> list[CopiedModel] | None:
        """Copy the first of these models together, whole pages if these may be taken.

        Returns what became of these; ``None`` when that must be done anew.
        """
        started = time.monotonic()
        source, target = self._source, self._target
        epoch, sizes = self._there.epoch, self._survey.sizes
        with Spool(_SPOOL_MEMORY_BYTES, elsewhere=source.pool) as spool:
            matcher = Matcher(target.adapter, target.pool, spool, keeps_bases=keeps_bases)
            used = self._survey.used if takes_pages and self._there.is_bare else {}
            scope = Scope(self._known, Met(), self._there.twins, used, not_whole)
            moved, new = self._resolved(items, matcher, scope)
            spool.freeze()
            places = scope.met.spooled()
            stager = Stager(
                matcher,
                [one.copy for one in moved],
                self._progress.wrote,
                kind="copy",
                segments=CarriedSegments(source, self._index, spool, places),
            )
            first = [numbers[0] for one in moved for numbers in one.resolved.whole]
            whole = split_places(places[np.array(first, np.int64)])[0].tolist()
            more = sum(sizes.get(page_id, 0) for page_id in set(whole).difference(new))
            self._progress.grow(more)

            def plan() -> list[NDArray[np.int64]]:
                return lay_out(moved, matcher.reader, spool)

            def planned() -> list[NDArray[np.int64]]:
                self._progress.will_write(sum(sizes.get(page_id, 0) for page_id in whole))
                return plan()

            def check(layout: list[NDArray[np.int64]]) -> None:
                check_arrival(target, stager, spool, layout, self._progress.checked)

            said = f"a copy of {moved[0].item.address}"  # a quota refuses none but single ones
            if not spool.lists:
                if spool.factored.any():
                    plan()  # what blocks take is known then
                check_quotas(matcher, stager.models, epoch, said)
            layout = publish_batch(stager, planned, epoch, check, said)
            if layout is None:
                return None
            self._progress.end()
            # What was seen at the start still holds when nobody but us published since, and no
            # model was replaced, which may have taken pages along.
            if stager.epoch == epoch + 1 and not any(one.item.replaces for one in moved):
                self._there.epoch = stager.epoch
                for one in moved:
                    self._remember(one, places, matcher, stager)
            else:
                self._there.epoch = -1
            return report(moved, layout, spool, matcher, time.monotonic() - started)

    def _resolved(
        self, items: Sequence[Item], matcher: Matcher, scope: Scope
    ) -> tuple[list[Moved], set[int]]:
        """Resolve the first of these models; also return the pages that earlier ones did not read.

        So many as are of not too many bytes: what a copy that ends here has done in vain.
        """
        source, target, spool, met = self._source, self._target, matcher.spool, scope.met
        moved: list[Moved] = []
        new: set[int] = set()
        nbytes = 0
        self._progress.begin(0)
        models = read_models(source, [item.row for item in items])
        for item, model in zip(items, models, strict=True):
            more = {n for n in model.page_ids.tolist() if n not in self._known and n not in new}
            more_bytes = sum(self._survey.sizes.get(page_id, 0) for page_id in more)
            nbytes += more_bytes
            if moved and nbytes > MOST_BYTES:
                break
            new |= more
            self._progress.grow(more_bytes)
            resolver = Resolver(
                source, target, matcher, spool, model, scope, self._progress.advance
            )
            resolved = resolver.run()
            if resolved.anew and len(items) > 1:
                raise AloneError
            parts, count = matched_parts(model, resolved.references), len(model.stored.tensors)
            copy = MovedModel(item, model.stored, parts[:count], parts[count:])
            before = spool.count
            match_artifacts(matcher, copy)
            met.spool(np.full(spool.count - before, NO_PLACE))
            moved.append(Moved(item, model, copy, resolved))
            if len(items) > 1:
                whole = joined(resolved.whole)
                references = np.concatenate([resolved.references, whole])
                at = np.concatenate([model.places, met.spooled()[whole]])
                met.note(at, references, matcher.reader.bases_of(references) != NO_BASE)
        return moved, new

    def _remember(
        self, moved: Moved, places: NDArray[np.int64], matcher: Matcher, stager: Stager
    ) -> None:
        """Note where blocks are that later models need, and forget those that none does."""
        model, resolved = moved.source, moved.resolved
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
