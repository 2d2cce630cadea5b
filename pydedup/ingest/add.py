# SPDX-License-Identifier: Apache-2.0
"""Adding a batch of models: match, lay out, stage, publish; again where others were faster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.accuracy import Accuracy
from pydedup.adapter import LIVE, Adapter
from pydedup.blocks import MatrixView
from pydedup.errors import ConflictError, PageNotFoundError, PydedupError
from pydedup.ingest.match import Matcher, hash_keys
from pydedup.ingest.places import BlockReader
from pydedup.ingest.plan import Request
from pydedup.ingest.previous import Previous
from pydedup.ingest.quota import check_quotas
from pydedup.ingest.replace import choose_blocks
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.tensors import hints_for, match_tensors
from pydedup.ingest.write import MatchedModel, MatchedTensor, Stager, plan_layout
from pydedup.policies import Lossless
from pydedup.pool import PagePool
from pydedup.types import AddReport, Progress

__all__ = ["add_models"]

_SPOOL_MEMORY_BYTES = 4 * 1024 * 1024
_ATTEMPTS = 8


def add_models(
    adapter: Adapter,
    pool: PagePool,
    requests: Sequence[Request],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> list[AddReport]:
    """Add models with one joint layout, all of them or none.

    Memory: one tensor, the pool, and about 16 bytes and one index entry per block. Holds no
    lock while hashing or staging.

    Raises
    ------
    DuplicateError, QuotaError, ConflictError, ReadOnlyError, StorageFullError, FormatError
        The store is as it was before, whatever is raised.
    """
    started = time.monotonic()
    for _ in range(_ATTEMPTS):
        epoch = adapter.epoch()
        try:
            reports = _attempt(adapter, pool, requests, dry_run, progress, started, epoch)
        except PageNotFoundError:
            if adapter.epoch() == epoch:
                raise  # nobody took it away: the store is damaged
            continue
        if reports is not None:
            return reports
    raise ConflictError(
        f"other writers changed what this add shares {_ATTEMPTS} times in a row; try again later"
    )


def _attempt(
    adapter: Adapter,
    pool: PagePool,
    requests: Sequence[Request],
    dry_run: bool,
    progress: Progress | None,
    started: float,
    epoch: int,
) -> list[AddReport] | None:
    """Add once; ``None`` when pages that this add shares went away meanwhile.

    Quotas are checked on the state of the store that `Stager.publish` then insists on.
    """
    with Spool(_SPOOL_MEMORY_BYTES) as spool:
        matcher = Matcher(adapter, pool, spool)
        models = _match(adapter, matcher, requests, progress)
        spool.freeze()
        layout = plan_layout(models, spool, matcher.reader)
        allowed = check_quotas(adapter, pool, matcher, models, spool, epoch)
        if dry_run:
            if not allowed:
                return None
            return _reports(models, spool, matcher.reader, layout, started, dry_run=True)
        total, done = sum(int(spool.costs[page].sum()) for page in layout), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress("writing", min(done, total), total)

        stager = Stager(adapter, models, spool, matcher, advance)
        try:
            stager.stage(layout)
            while not stager.publish(epoch):
                epoch = adapter.epoch()
                if not _shared_pages_live(adapter, matcher, models):
                    stager.discard()
                    return None
                changed = _match_again(adapter, pool, matcher, models, spool)
                check_quotas(adapter, pool, matcher, models, spool, epoch)
                if changed:
                    stager.discard()
                    layout = plan_layout(models, spool, matcher.reader)
                    done = 0
                    stager = Stager(adapter, models, spool, matcher, advance)
                    stager.stage(layout)
        except BaseException:
            # What cannot be removed now (a full disk, a lost connection) is collected by vacuum.
            with contextlib.suppress(PydedupError):
                stager.discard()
            raise
        adapter.checkpoint()
        return _reports(models, spool, matcher.reader, layout, started, dry_run=False)


def _match(
    adapter: Adapter, matcher: Matcher, requests: Sequence[Request], progress: Progress | None
) -> list[MatchedModel]:
    total, done = sum(request.logical_bytes for request in requests), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("matching", done, total)

    models = []
    for request in requests:
        previous = Previous.of(
            adapter, matcher.stored, matcher.catalog, request.name, request.policy
        )
        if isinstance(request.policy, Accuracy):
            policy = _counting(request.policy, progress)
            models.append(_match_chosen(matcher, request, policy, previous, advance))
        else:
            tensors = match_tensors(matcher, request, previous, advance)
            models.append(MatchedModel(request, tensors))
    return models


def _match_chosen(
    matcher: Matcher,
    request: Request,
    policy: Accuracy,
    previous: Previous | None,
    advance: Callable[[int], None],
) -> MatchedModel:
    """Match what the search of `Accuracy` made of the model: its bits, as `Lossless` would."""
    chosen = choose_blocks(matcher, request, policy, previous, advance)
    model = MatchedModel(request, evidence=chosen.certificate)
    for entry in request.source.entries:
        view = MatrixView.of(chosen.arrays[entry.name], request.block_shape)
        deltas = chosen.deltas.get(entry.name, {})
        hints = replace(hints_for(matcher, request, entry, view.grid), deltas=deltas)
        matched = matcher.match(view, policy=Lossless(), hints=hints)
        matcher.aligned.note(entry, view.grid, matched.references)
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


def _counting(policy: Accuracy, progress: Progress | None) -> Accuracy:
    """Return a policy that tells of its evaluations, which may take minutes."""
    if progress is None:
        return policy
    count = 0

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> Any:
        nonlocal count
        count += 1
        progress("evaluating", count, policy.max_evaluations)
        return policy.evaluate(arrays)

    return replace(policy, evaluate=evaluate)


def _shared_pages_live(adapter: Adapter, matcher: Matcher, models: Sequence[MatchedModel]) -> bool:
    used = np.unique(np.concatenate([model.references(matcher.reader) for model in models]))
    page_ids, _ = matcher.stored.places(used[used < 0])
    shared = np.unique(page_ids).tolist()
    return len(adapter.page_rows(ids=shared, state=LIVE)) == len(shared) if shared else True


def _match_again(
    adapter: Adapter, pool: PagePool, matcher: Matcher, models: Sequence[MatchedModel], spool: Spool
) -> bool:
    """Point references at blocks that others published meanwhile; return whether any were."""
    used = np.unique(np.concatenate([model.references(matcher.reader) for model in models]))
    used = used[used >= 0]
    # What a delta holds would have to be decoded to be compared: such a twin is only a waste.
    used = used[spool.bases[used] == NO_BASE]
    keys = hash_keys(spool.hashes[used])
    number_of: dict[bytes, list[int]] = {}
    for number, key in zip(used.tolist(), keys, strict=True):
        number_of.setdefault(key, []).append(number)
    moved = np.arange(spool.count, dtype=np.int64)
    for row in adapter.find_blocks(list(number_of)):
        if row.base_id is not None:
            continue
        (stored,) = pool.pages([row.page_id])
        for number in number_of[row.hash128]:
            if codec.same_block(*spool.block(number), stored, row.slot):
                moved[number] = matcher.stored.reference(row)
                cost = codec.page_cost(stored.slots["length"])[row.slot]
                matcher.stored.costs[-int(moved[number]) - 1] = int(cost)
    if np.array_equal(moved, np.arange(spool.count)):
        return False
    spool.move_bases(moved)
    for model in models:
        for tensor in model.tensors:
            new = tensor.references >= 0
            references = tensor.references.copy()
            references[new] = moved[references[new]]
            tensor.references = references
    return True


def _reports(
    models: Sequence[MatchedModel],
    spool: Spool,
    reader: BlockReader,
    layout: Sequence[NDArray[np.int64]],
    started: float,
    *,
    dry_run: bool,
) -> list[AddReport]:
    """Say what each model brought; a block counts for the first model that has it."""
    first_owner = np.full(spool.count, len(models), np.int64)
    for number, model in reversed(list(enumerate(models))):
        references = model.references(reader)
        first_owner[references[references >= 0]] = number
    page_owner = [int(first_owner[page].min()) for page in layout]
    reports = []
    for number, model in enumerate(models):
        mine = first_owner == number
        references = model.references()
        deltas = int((reader.bases_of(references) != NO_BASE).sum())
        new = references[references >= 0]
        own = len(np.unique(new[first_owner[new] == number]))
        reports.append(
            AddReport(
                model=model.request.address,
                logical_bytes=model.request.logical_bytes,
                stored_bytes=int(spool.lengths[mine].sum()),
                blocks=len(references),
                shared_blocks=len(references) - own,
                delta_blocks=deltas,
                pages=page_owner.count(number),
                seconds=time.monotonic() - started,
                certificate=model.certificate(),
                dry_run=dry_run,
                left_out=tuple(model.request.source.left_out),
            )
        )
    return reports
