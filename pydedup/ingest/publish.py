# SPDX-License-Identifier: Apache-2.0
"""Staging and publishing a batch that is matched, and matching again where others were faster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.adapter import LIVE
from pydedup.adapter_options import only_sound_rows
from pydedup.errors import DuplicateError, PageNotFoundError, PydedupError
from pydedup.hashing import hash_keys
from pydedup.ingest.match import Matcher
from pydedup.ingest.quota import check_quotas
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.staged import StagedModel
from pydedup.ingest.write import Stager
from pydedup.layout import block_at
from pydedup.sets import distinct

__all__ = ["publish_batch"]


def publish_batch(
    stager: Stager,
    lay_out: Callable[[], list[NDArray[np.int64]]],
    epoch: int,
    check: Callable[[list[NDArray[np.int64]]], None] | None = None,
    said: str = "this add",
) -> list[NDArray[np.int64]] | None:
    """Stage and publish a batch, whose quotas were checked at ``epoch``; ``None``: match it anew.

    That is when pages that it shares went away meanwhile, when others published blocks of pages
    that it takes over whole, or when a vacuum took what was staged for abandoned.

    Parameters
    ----------
    lay_out
        Returns the pages of the blocks that are new: per page, their numbers in slot order.
    epoch
        That of the store when matching began.
    check
        Called with that when it is staged; what it raises ends the work.
    said
        What this is called where quotas do not allow it.

    Returns
    -------
    list
        The pages that were published.
    """
    matcher, models = stager.matcher, stager.models
    adapter, spool = matcher.adapter, matcher.spool
    try:
        layout = lay_out()
        lost = _lost_pages(matcher, models)
        if lost and adapter.epoch() == epoch:
            raise PageNotFoundError.of(lost)  # nobody took them away: the store is damaged
        if not _stage(stager, layout, check):
            return None
        if spool.lists:
            # Only now is it known what these blocks take.
            check_quotas(matcher, models, epoch, said)
        while not stager.publish(epoch):
            epoch = adapter.epoch()
            if _lost_pages(matcher, models):
                stager.discard()
                return None
            changed = _match_again(matcher, models)
            changed |= _renumber(stager)
            check_quotas(matcher, models, epoch, said)
            if changed:
                stager.discard()
                if spool.lists:
                    return None  # pages that are taken over whole cannot lose a block
                layout = lay_out()
                if not _stage(stager, layout, check):
                    return None
    except BaseException:
        # What cannot be removed now (a full disk, a lost connection) is collected by vacuum.
        with contextlib.suppress(PydedupError):
            stager.discard()
        raise
    return layout


def _stage(
    stager: Stager,
    layout: list[NDArray[np.int64]],
    check: Callable[[list[NDArray[np.int64]]], None] | None,
) -> bool:
    """Stage and check models; ``False`` when a vacuum collected them, with nothing left of them."""
    while True:
        try:
            is_staged = stager.stage(layout)
            break
        except DuplicateError:
            if not _renumber(stager):
                raise
    if not is_staged:
        stager.discard()
    elif check is not None:
        check(layout)
    return is_staged


def _renumber(stager: Stager) -> bool:
    """Give models other versions whose own, which nobody asked for, others took meanwhile."""
    return sum(model.renumber(stager.matcher.adapter) for model in stager.models) > 0


def _used(matcher: Matcher, models: Sequence[StagedModel]) -> NDArray[np.int64]:
    """Return the distinct references of all blocks of models, and of the bases behind them."""
    return distinct(np.concatenate([model.references(matcher.reader) for model in models]))


def _lost_pages(matcher: Matcher, models: Sequence[StagedModel]) -> list[int]:
    """Return the pages that models share, and that are not live (any more), or are others."""
    used = _used(matcher, models)
    shared = distinct(matcher.stored.pages(used[used < 0])).tolist()
    if not shared:
        return []
    with only_sound_rows(matcher.adapter):
        rows = matcher.adapter.page_rows(ids=shared, state=LIVE)
    live = {row.id for row in rows if matcher.pool.is_expected(row.id, row.checksum)}
    return [page_id for page_id in shared if page_id not in live]


def _match_again(matcher: Matcher, models: Sequence[StagedModel]) -> bool:
    """Point references at blocks that others published meanwhile; return whether any were."""
    spool, used = matcher.spool, _used(matcher, models)
    used = used[used >= 0]
    are_bases = set(spool.bases[used].tolist())
    keys = hash_keys(spool.hashes[used])
    number_of: dict[bytes, list[int]] = {}
    for number, key in zip(used.tolist(), keys, strict=True):
        number_of.setdefault(key, []).append(number)
    moved = np.arange(spool.count, dtype=np.int64)
    blocks = _Blocks(matcher)
    for row in matcher.with_live_bases(matcher.adapter.find_blocks(list(number_of))):
        (reference,) = matcher.stored.references([row])
        for number in number_of[row.hash128]:
            if row.base_id is not None and number in are_bases:
                continue  # a base is never itself a delta
            if blocks.are_same(number, reference):
                moved[number] = reference
    found = moved[moved < 0]
    if not len(found):
        return False
    bases = matcher.stored.bases_of(found)
    matcher.reader.learn(distinct(np.append(found, bases[bases != NO_BASE])))
    spool.move_bases(moved)
    for model in models:
        for tensor in model.in_blocks:
            new = tensor.references >= 0
            references = tensor.references.copy()
            references[new] = moved[references[new]]
            tensor.references = references
    return True


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of the spool and of the store, compared one by one."""

    matcher: Matcher

    def are_same(self, a: int, b: int) -> bool:
        """Whether two references are to blocks of one dtype, shape and content."""
        bases = [self._base(reference) for reference in (a, b)]
        return codec.same_block(*self._at(a), *self._at(b), base_a=bases[0], base_b=bases[1])

    def _at(self, reference: int) -> tuple[codec.Page, int]:
        """Return the page and slot of a block."""
        if reference >= 0:
            return self.matcher.spool.block(reference)
        (place,) = self.matcher.stored.places(np.array([reference])).tolist()
        return block_at(self.matcher.pool, place)

    def _base(self, reference: int) -> tuple[codec.Page, int] | None:
        """Return the page and slot of what a block is a delta of, if it is one."""
        (base,) = self.matcher.reader.bases_of(np.array([reference])).tolist()
        return None if base == NO_BASE else self._at(base)
