# SPDX-License-Identifier: Apache-2.0
"""Matching of a model's tensors: large ones one by one, small ones many at a time.

What a tensor costs by itself, a look-up in the store and some calls into the core, is more than a
few blocks are worth, and most tensors of most models are small: biases, scales, kernels of
convolutions; and of a large one that was there before, only some blocks may have changed. So where
little is to be matched it waits until there is enough; then all blocks of one dtype and shape,
whichever tensors they are of, are stacked and matched as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import BlockGrid, MatrixView
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_keys, hash_view
from pydedup.ingest.ahead import SMALL_BYTES, Ahead
from pydedup.ingest.families import Family
from pydedup.ingest.low_rank import LEAST_SIDE, Adapted, Looks
from pydedup.ingest.match import Hints, Matcher
from pydedup.ingest.places import as_stack, by_shape, stack_blocks
from pydedup.ingest.plan import Request
from pydedup.ingest.previous import Previous
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.staged import MatchedTensor
from pydedup.ingest.together import Asked, Together, Transposes, transposed_of
from pydedup.ingest.transposed import Transposed
from pydedup.sets import is_among
from pydedup.types import DType

__all__ = ["match_tensors"]

# Up to `SMALL_BYTES` of a tensor wait for others, until these are so many bytes or blocks.
_WAITING_BYTES = 4 * 1024 * 1024
_WAITING_BLOCKS = 4096

# Dtype, rows and columns of a block.
_Kind = tuple[DType, tuple[int, int]]


def match_tensors(
    matcher: Matcher,
    ahead: Ahead,
    request: Request,
    previous: Previous | None,
    advance: Callable[[int], None],
) -> list[MatchedTensor]:
    """Return the tensors of a model after matching, in their order."""
    matched: dict[str, MatchedTensor] = {}
    looks = Looks()
    transposed = Transposed(matcher, request, request.policy)
    bundle = _Bundle(matcher, request, previous, transposed)
    for entry, twin in request.distinct_entries():
        if twin is not None:
            if twin.name not in matched:
                matched.update(bundle.match(advance))
            matched[entry.name] = replace(matched[twin.name], entry=entry)
            advance(entry.nbytes)
            continue
        view, digests = ahead.read(request, entry)
        may_wait = bundle.takes(view.grid, entry.dtype)
        if may_wait and view.data.nbytes <= SMALL_BYTES:
            bundle.add(entry, view)
        else:
            if digests is None:
                digests = hash_view(view)
            known = _known(previous, entry, view.grid, digests)
            if may_wait and known.bytes_to_match(view) <= SMALL_BYTES:
                bundle.add(entry, view, known)
            else:
                matched[entry.name] = _match_one(
                    matcher, request, entry, view, known, looks, transposed, advance
                )
        if bundle.is_full:
            matched.update(bundle.match(advance))
        del view
    matched.update(bundle.match(advance))
    return [matched[entry.name] for entry in request.source.entries]


@dataclass(frozen=True, slots=True)
class _Known:
    """The blocks of a tensor before they are matched, and what the version before says of them.

    ``references`` are `NO_BASE` for those that have to be matched, ``errors`` 0.
    """

    digests: NDArray[np.uint64]
    references: NDArray[np.int64]
    errors: NDArray[np.float64]

    def bytes_to_match(self, view: MatrixView) -> int:
        """Return how many bytes the version before says nothing of."""
        return int(view.block_bytes()[self.references == NO_BASE].sum())


def _known(
    previous: Previous | None, entry: TensorEntry, grid: BlockGrid, digests: NDArray[np.uint64]
) -> _Known:
    if previous is None:
        return _Known(digests, np.full(grid.count, NO_BASE, np.int64), np.zeros(grid.count))
    references, error = previous.unchanged(entry, grid, digests)
    errors = np.where(references != NO_BASE, error, 0.0)
    return _Known(digests, references, errors)


def _match_one(
    matcher: Matcher,
    request: Request,
    entry: TensorEntry,
    view: MatrixView,
    known: _Known,
    looks: Looks,
    transposed: Transposed,
    advance: Callable[[int], None],
) -> MatchedTensor:
    neighbours = matcher.aligned.neighbours(request, entry, view.grid)
    by_transposition = transposed.of(entry, view.grid)
    found = matcher.match(
        view,
        digests=known.digests,
        known=matcher.met.find(view, known.digests, known.references),
        policy=request.policy,
        hints=Hints(
            neighbours,
            most=Family(matcher.reader, request.policy, neighbours, by_transposition),
            looks=looks,
            transposed=by_transposition,
        ),
        advance=advance,
    )
    matcher.met.note(known.digests, found.references)
    matcher.aligned.note(request, entry, view.grid, found.references)
    errors = np.maximum(known.errors, found.errors)
    largest_error = float(errors.max(initial=0.0))
    return MatchedTensor(entry, view.grid, found.references, known.digests, largest_error)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A tensor in a bundle; its blocks are numbered within that, from ``start`` on.

    Without ``known``, what the version before says of it was not looked up yet.
    """

    entry: TensorEntry
    grid: BlockGrid
    start: int
    known: _Known | None

    @property
    def blocks(self) -> slice:
        """Its blocks, as numbers of the bundle."""
        return slice(self.start, self.start + self.grid.count)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """All blocks of a bundle, by their numbers: the stacks, what is known, and whose they are.

    ``owners`` are numbers of tensors, of each of which ``asked`` has what may be near.
    """

    stacks: Sequence[tuple[MatrixView, NDArray[np.int64]]]
    digests: NDArray[np.uint64]
    references: NDArray[np.int64]
    errors: NDArray[np.float64]
    owners: NDArray[np.int64]
    asked: Sequence[Asked]


class _Bundle:
    """What waits to be matched: tensors, and copies of their blocks, stacked by kind."""

    def __init__(
        self,
        matcher: Matcher,
        request: Request,
        previous: Previous | None,
        transposed: Transposed,
    ) -> None:
        self._matcher = matcher
        self._transposed = transposed
        self._request = request
        self._previous = previous
        self._adapted = Adapted(matcher.reader, matcher.similar.pairs, request.policy)
        self._clear()

    def _clear(self) -> None:
        self._tensors: list[_Waiting] = []
        # Rows of stacked blocks, and the numbers of those in the bundle.
        self._parts: dict[_Kind, list[tuple[NDArray[np.uint8], NDArray[np.int64]]]] = {}
        self._count = 0
        self._bytes = 0
        self._blocks = 0

    def takes(self, grid: BlockGrid, dtype: DType) -> bool:
        """Return whether a tensor may wait: of one cut too finely, no block tells of an adapter."""
        return min(grid.block_shape) >= LEAST_SIDE or not self._adapted.can_be(grid, dtype)

    def add(self, entry: TensorEntry, view: MatrixView, known: _Known | None = None) -> None:
        """Let a tensor wait: all of it, or the blocks of which nothing is known."""
        grid, start = view.grid, self._count
        self._tensors.append(_Waiting(entry, grid, start, known))
        self._count += grid.count
        indices = np.arange(grid.count, dtype=np.int64)
        if known is not None:
            indices = np.flatnonzero(known.references == NO_BASE)
        if grid.count == len(indices) == 1:
            self._add_part((view.dtype, (grid.rows, grid.cols)), view.data, indices + start)
            return
        for shape, at in by_shape(view, indices):
            stack = stack_blocks(view, indices[at], shape)
            self._add_part((view.dtype, shape), stack.data, indices[at] + start)

    def _add_part(self, kind: _Kind, rows: NDArray[np.uint8], blocks: NDArray[np.int64]) -> None:
        self._parts.setdefault(kind, []).append((rows, blocks))
        self._bytes += rows.nbytes
        self._blocks += len(blocks)

    @property
    def is_full(self) -> bool:
        """Whether it is time to match them."""
        return self._bytes >= _WAITING_BYTES or self._blocks >= _WAITING_BLOCKS

    def match(self, advance: Callable[[int], None]) -> dict[str, MatchedTensor]:
        """Match all that wait, by name; then none does."""
        waiting, blocks = self._tensors, self._gathered()
        self._clear()
        self._matcher.ask(hash_keys(blocks.digests[blocks.references == NO_BASE]))
        done: dict[str, MatchedTensor] = {}
        for number in self._adapted_among(waiting, blocks):
            one = waiting[number]
            found = self._match_alone(one.entry, advance)
            done[one.entry.name], blocks.references[one.blocks] = found, found.references
        self._match_stacks(waiting, blocks)
        for one in waiting:
            here, entry, grid = one.blocks, one.entry, one.grid
            if entry.name in done:
                continue
            references, digests = blocks.references[here], blocks.digests[here]
            self._matcher.aligned.note(self._request, entry, grid, references)
            largest_error = float(blocks.errors[here].max(initial=0.0))
            done[entry.name] = MatchedTensor(entry, grid, references, digests, largest_error)
            advance(entry.nbytes)
        return done

    def _gathered(self) -> _Blocks:
        """Return all blocks that wait, and what the version before says of them."""
        count, stacks = self._count, _stacks(self._parts)
        digests = np.empty((count, 2), np.uint64)
        for view, blocks in stacks:
            digests[blocks] = hash_view(view)
        references, errors = np.full(count, NO_BASE, np.int64), np.zeros(count)
        owners, asked = np.empty(count, np.int64), []
        for number, waiting in enumerate(self._tensors):
            here, entry, grid = waiting.blocks, waiting.entry, waiting.grid
            owners[here] = number
            known = waiting.known or _known(self._previous, entry, grid, digests[here])
            digests[here], references[here] = known.digests, known.references
            errors[here] = known.errors
            asked.append(
                Asked(
                    self._matcher.aligned.neighbours(self._request, entry, grid),
                    self._transposed.of(entry, grid),
                    self._adapted.can_be(grid, entry.dtype),
                )
            )
        return _Blocks(stacks, digests, references, errors, owners, asked)

    def _match_stacks(self, tensors: Sequence[_Waiting], all_blocks: _Blocks) -> None:
        """Match the blocks of each stack, of all tensors together."""
        starts = np.array([waiting.start for waiting in tensors], np.int64)
        asked, policy = all_blocks.asked, self._request.policy
        can_be_adapted = np.array([one.can_be_adapted for one in asked], np.bool_)
        for view, blocks in all_blocks.stacks:
            of = all_blocks.owners[blocks]
            numbers = blocks - starts[of]
            together = Together(asked, of, numbers)
            transposed = Transposes(asked, of, numbers)
            matched = self._matcher.match(
                view,
                digests=all_blocks.digests[blocks],
                known=all_blocks.references[blocks],
                policy=policy,
                hints=Hints(
                    together,
                    most=Family(
                        self._matcher.reader,
                        policy,
                        together,
                        transposed,
                        in_stack=can_be_adapted[of],
                    ),
                    looks=None,
                    transposed=transposed,
                ),
            )
            all_blocks.references[blocks] = matched.references
            all_blocks.errors[blocks] = np.maximum(all_blocks.errors[blocks], matched.errors)

    def _adapted_among(self, tensors: Sequence[_Waiting], all_blocks: _Blocks) -> list[int]:
        """Return which tensors an adapter seems to have been merged into, by a block in the middle.

        That is a new one: of frozen tensors the store has it. Large tensors are looked at first:
        most of the model is in these, and heads are small.
        """
        asked = all_blocks.asked
        middles = {
            waiting.start + waiting.grid.middle: number
            for number, waiting in enumerate(tensors)
            if waiting.known is None and asked[number].can_be_adapted
        }
        chosen = np.array([*middles], np.int64)
        chosen = chosen[all_blocks.references[chosen] == NO_BASE]
        keys = zip(chosen.tolist(), hash_keys(all_blocks.digests[chosen]), strict=True)
        new = np.array([block for block, key in keys if not self._matcher.is_known(key)], np.int64)
        at = {
            middles[int(blocks[row])]: (view, row)
            for view, blocks in all_blocks.stacks
            for row in np.flatnonzero(is_among(blocks, new)).tolist()
        }
        adapted = []
        for number in sorted(at, key=lambda number: (-tensors[number].entry.nbytes, number)):
            middle, near = np.array([tensors[number].grid.middle]), asked[number].neighbours
            transposed = partial(transposed_of, asked[number].transposed, middle)
            found = self._adapted(*at[number], partial(near, middle), transposed)
            if found is None:
                continue
            base, is_transposed = found
            if is_transposed or near.ask_first(int(middle[0]), base):
                adapted.append(number)
        return sorted(adapted)

    def _match_alone(self, entry: TensorEntry, advance: Callable[[int], None]) -> MatchedTensor:
        """Match a tensor of which only copies of its blocks are at hand."""
        request = self._request
        view = request.read(entry.name)
        known = _known(self._previous, entry, view.grid, hash_view(view))
        # Whether to look for an adapter was settled.
        return _match_one(
            self._matcher, request, entry, view, known, Looks(), self._transposed, advance
        )


def _stacks(
    parts: Mapping[_Kind, Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]]],
) -> list[tuple[MatrixView, NDArray[np.int64]]]:
    """Return each stack as a matrix, and the numbers of its blocks."""
    stacks = []
    for (dtype, shape), found in parts.items():
        view = as_stack(np.concatenate([rows for rows, _ in found]), dtype, shape)
        stacks.append((view, np.concatenate([blocks for _, blocks in found])))
    return stacks
