# SPDX-License-Identifier: Apache-2.0
"""Adding a batch of models: match, lay out, stage, publish; again where others were faster."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pydedup import config
from pydedup.accuracy import Accuracy
from pydedup.adapter import Adapter
from pydedup.certificates import guards_nothing
from pydedup.errors import (
    ConflictError,
    CorruptStoreError,
    NotFoundError,
    PageNotFoundError,
    PydedupError,
)
from pydedup.ingest.ahead import Ahead
from pydedup.ingest.artifacts import match_artifacts
from pydedup.ingest.cuts import cut_as_stored
from pydedup.ingest.match import Hints, Matcher, look_now
from pydedup.ingest.pages import plan_layout
from pydedup.ingest.plan import Request
from pydedup.ingest.previous import Previous, split_sums
from pydedup.ingest.publish import publish_batch
from pydedup.ingest.quota import BasesRefusedError, check_quotas
from pydedup.ingest.replace import Chosen, choose_blocks
from pydedup.ingest.scan import unreadable_pages
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.staged import MatchedModel, MatchedTensor
from pydedup.ingest.stored_index import KeptIndex
from pydedup.ingest.stored_models import KeptModels
from pydedup.ingest.tensors import match_tensors
from pydedup.ingest.transposed import Transposed
from pydedup.ingest.workers import Workers, worker_count
from pydedup.ingest.write import Stager
from pydedup.layout import joined
from pydedup.policies import Lossless
from pydedup.pool import PagePool
from pydedup.sets import distinct
from pydedup.types import AddReport, Progress

__all__ = ["Kept", "add_models"]

# Of pages of new blocks, which models after them are compared with: for one worker, for several.
_SPOOL_BYTES, _SHARED_SPOOL_BYTES = 4 * 1024 * 1024, 32 * 1024 * 1024
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Kept:
    """What adds of one open store leave each other of what they read."""

    index: KeptIndex = field(default_factory=KeptIndex)
    models: KeptModels = field(default_factory=KeptModels)


def add_models(
    adapter: Adapter,
    pool: PagePool,
    requests: Sequence[Request],
    *,
    dry_run: bool,
    progress: Progress | None,
    workers: int | None,
    kept: Kept,
) -> list[AddReport]:
    """Add models with one joint layout, all of them or none.

    Memory: one tensor, the pool, and about 16 bytes and one index entry per block; with more than
    one of ``workers`` up to 200 MiB more, whatever is added (docs/architecture.md, "Workers").
    ``kept`` is what adds of one open store leave each other.
    Holds no lock while hashing or staging. Pages that turn out to be damaged are nothing to share
    blocks with: what was matched is then matched anew, without them.

    Raises
    ------
    DuplicateError, QuotaError, ConflictError, ReadOnlyError, StorageFullError, FormatError
        The store is as it was before, whatever is raised.
    """
    started = time.monotonic()
    count = worker_count(workers, sum(request.logical_bytes for request in requests))
    unreadable: set[int] = set()
    keeps_bases = True
    attempts = 0
    with config.at_most_threads(workers), Workers(count) as crew:
        work = _Add(adapter, pool, requests, crew, dry_run, progress, started, kept)
        while attempts < _ATTEMPTS:
            epoch = adapter.epoch()
            try:
                reports = work.attempt(epoch, unreadable, keeps_bases)
            except BasesRefusedError:
                keeps_bases = False
                continue
            except (CorruptStoreError, NotFoundError) as exc:
                was_changed = adapter.epoch() != epoch
                if was_changed and isinstance(exc, PageNotFoundError | NotFoundError):
                    attempts += 1  # somebody removed a model that this one was compared with
                    continue
                damaged = exc.page_ids if isinstance(exc, CorruptStoreError) else ()
                if unreadable.issuperset(damaged):
                    raise
                unreadable.update(damaged)  # nothing is to be shared with them
                continue
            if reports is not None:
                return [replace(r, damaged_pages=tuple(sorted(unreadable))) for r in reports]
            attempts += 1
    raise ConflictError(
        f"other writers changed what this add shares {_ATTEMPTS} times in a row; try again later"
    )


@dataclass(frozen=True, slots=True)
class _Add:
    """Models, the store that they are added to, and who works on it or is told."""

    adapter: Adapter
    pool: PagePool
    requests: Sequence[Request]
    workers: Workers
    dry_run: bool
    progress: Progress | None
    started: float
    kept: Kept

    def attempt(
        self, epoch: int, unreadable: Collection[int], keeps_bases: bool
    ) -> list[AddReport] | None:
        """Add once; ``None`` when pages that this add shares went away meanwhile.

        Quotas are checked on the state of the store that `Stager.publish` then insists on.
        """
        memory = _SHARED_SPOOL_BYTES if self.workers.are_several else _SPOOL_BYTES
        with Spool(memory, workers=self.workers) as spool:
            matcher = Matcher(
                self.adapter,
                self.pool,
                spool,
                unreadable,
                self.kept.index,
                self.kept.models.take(self.adapter, self.pool, epoch),
                keeps_bases=keeps_bases,
            )
            cut_as_stored(self.requests, matcher.models)
            try:
                models = self._match(matcher)
            except CorruptStoreError as exc:
                if exc.page_ids:  # for each one after the other, all would be matched anew
                    exc.page_ids += unreadable_pages(self.pool, matcher.stored.page_ids)
                raise
            spool.freeze()
            # What blocks with factors take, which quotas count, is known when they are laid out.
            planned = [plan_layout(matcher, models)] if spool.factored.any() else []

            def lay_out() -> list[NDArray[np.int64]]:
                return planned.pop() if planned else plan_layout(matcher, models)

            allowed = check_quotas(matcher, models, epoch)
            if self.dry_run:
                layout = lay_out()
                matcher.candidates.keep()
                return self._reports(matcher, models, layout) if allowed else None
            writing = _Writing(spool, self.progress)
            stager = Stager(
                matcher,
                models,
                writing.advance,
                workers=self.workers,
                record=writing.record,
            )
            published = publish_batch(stager, lambda: writing.begin(lay_out()), epoch)
            if published is None:
                return None
            stager.finish()
            matcher.candidates.keep()
            if stager.epoch == epoch + 1:  # else others changed the store meanwhile
                self.kept.models.keep(matcher.models, self.pool, stager.epoch)
            return self._reports(matcher, models, published)

    def _match(self, matcher: Matcher) -> list[MatchedModel]:
        total, done = sum(request.logical_bytes for request in self.requests), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress("matching", done, total)

        models = []
        with Ahead(self.workers, self.requests, matcher) as ahead:
            matcher.look = ahead.look
            try:
                for request in self.requests:
                    with _named(request, self.requests):
                        models.append(self._match_model(matcher, ahead, request, advance))
            finally:
                # Else the two hold each other, and the index, until a garbage collection.
                matcher.look = look_now
        reader = matcher.reader
        split_sums(matcher.stored, reader, (model.references(reader) for model in models))
        return models

    def _match_model(
        self, matcher: Matcher, ahead: Ahead, request: Request, advance: Callable[[int], None]
    ) -> MatchedModel:
        name, policy = request.name, request.policy
        previous = Previous.of(self.adapter, matcher.stored, matcher.models.catalog, name, policy)
        if isinstance(policy, Accuracy):
            tell = functools.partial(self._tell_of_evaluation, policy)
            chosen = choose_blocks(matcher, ahead, request, policy, previous, advance, tell)
            if why := guards_nothing(chosen.certificate):
                warnings.warn(f"{request.address}: {why}", UserWarning, stacklevel=2)
            model = _match_chosen(matcher, request, chosen)
            match_artifacts(matcher, model)
            return model
        model = MatchedModel(request, match_tensors(matcher, ahead, request, previous, advance))
        match_artifacts(matcher, model)
        if previous is not None:
            previous.settle_costs(model.references(matcher.reader), matcher.reader)
        return model

    def _tell_of_evaluation(self, policy: Accuracy, stage: str, count: int) -> None:
        if self.progress is not None:  # evaluations may take minutes, fine-tuning hours
            self.progress(stage, count, policy.max_evaluations if count else 0)

    def _reports(
        self,
        matcher: Matcher,
        models: Sequence[MatchedModel],
        layout: Sequence[NDArray[np.int64]],
    ) -> list[AddReport]:
        """Say what each model brought; a block counts for the first model that has it."""
        spool, reader = matcher.spool, matcher.reader
        first_owner = np.full(spool.count, len(models), np.int64)
        for number, model in reversed(list(enumerate(models))):
            references = model.references(reader)
            first_owner[references[references >= 0]] = number
        page_owner = [int(first_owner[page].min()) for page in layout]
        reports = []
        for number, model in enumerate(models):
            mine = first_owner == number
            references = joined(tensor.references for tensor in model.tensors)
            deltas = int((reader.bases_of(references) != NO_BASE).sum())
            own = len(_own(references, mine))
            beside = _own(joined(part.references for part in model.artifacts_in_blocks), mine)
            beside_bytes = int(spool.lengths[beside].sum())
            reports.append(
                AddReport(
                    model=model.request.address,
                    logical_bytes=model.request.logical_bytes,
                    stored_bytes=int(spool.lengths[mine].sum()) - beside_bytes,
                    blocks=len(references),
                    shared_blocks=len(references) - own,
                    delta_blocks=deltas,
                    pages=page_owner.count(number),
                    seconds=time.monotonic() - self.started,
                    certificate=model.certificate(),
                    dry_run=self.dry_run,
                    left_out=tuple(model.request.source.left_out),
                    artifact_bytes=sum(model.artifact_sizes.values()),
                    stored_artifact_bytes=beside_bytes + model.artifact_bytes_in_rows,
                    weights_key=model.request.source.weights_key,
                )
            )
        return reports


def _own(references: NDArray[np.int64], mine: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the blocks of the spool among references that are ``mine``, each once."""
    new = distinct(references[references >= 0])
    return new[mine[new]]


class _Writing:
    """Tells of the writing of pages."""

    def __init__(self, spool: Spool, progress: Progress | None) -> None:
        self._spool = spool
        self._progress = progress
        self._done = self._total = 0

    def begin(self, layout: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Take note of what is to be written, and return it."""
        self._done, self._total = 0, self._spool.cost_of(layout)
        return layout

    def advance(self, count: int) -> None:
        """Take note of bytes that were written."""
        self._done += count
        if self._progress is not None:
            self._progress("writing", min(self._done, self._total), self._total)

    def record(self, done: int, total: int) -> None:
        """Take note of distinct blocks whose rows were written."""
        if self._progress is not None:
            self._progress("recording blocks", done, total)


@contextlib.contextmanager
def _named(request: Request, requests: Sequence[Request]) -> Iterator[None]:
    """Make an error say which of several models it is about."""
    try:
        yield
    except PydedupError as error:
        if len(requests) > 1 and error.args and request.address not in str(error):
            error.args = (f"{request.address}: {error.args[0]}", *error.args[1:])
        raise


def _match_chosen(matcher: Matcher, request: Request, chosen: Chosen) -> MatchedModel:
    """Match what the search of `Accuracy` made of a model: its bits, as `Lossless` would."""
    model = MatchedModel(request, evidence=chosen.certificate)
    transposed = Transposed(matcher, request, Lossless())
    for entry in request.source.entries:
        view = request.view_of(entry.name, chosen.arrays[entry.name])
        deltas = chosen.deltas.get(entry.name, {})
        aligned = matcher.aligned.neighbours(request, entry, view.grid)
        hints = Hints(
            aligned,
            deltas,
            moved=chosen.moved.get(entry.name, {}),
            transposed=transposed.of(entry, view.grid),
        )
        matched = matcher.match(view, policy=Lossless(), hints=hints)
        matcher.aligned.note(request, entry, view.grid, matched.references)
        model.tensors.append(
            MatchedTensor(
                entry,
                view.grid,
                matched.references,
                chosen.digests[entry.name],
                chosen.error(request, entry),
            )
        )
    return model
