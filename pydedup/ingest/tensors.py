# SPDX-License-Identifier: Apache-2.0
"""Matching of a model's tensors: large ones one by one, small ones many at a time.

What a tensor costs by itself, a look-up in the store and some calls into the core, is more than
its few blocks are worth when it is small, and most tensors of most models are: biases, scales,
kernels of convolutions. So small ones wait until there are enough; then all their blocks of one
dtype and shape, whichever tensors they are of, are stacked and matched as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import BlockGrid, MatrixView
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_view
from pydedup.ingest.aligned import Neighbours
from pydedup.ingest.match import Hints, Matcher
from pydedup.ingest.places import by_shape, stack_blocks
from pydedup.ingest.plan import Request
from pydedup.ingest.previous import Previous
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.write import MatchedTensor
from pydedup.types import DType

__all__ = ["hints_for", "match_tensors"]

# Tensors up to this many bytes wait for others, until these are so many bytes or blocks together.
_SMALL_BYTES = 256 * 1024
_WAITING_BYTES = 4 * 1024 * 1024
_WAITING_BLOCKS = 4096

# Dtype, rows and columns of a block.
_Kind = tuple[DType, tuple[int, int]]


def match_tensors(
    matcher: Matcher,
    request: Request,
    previous: Previous | None,
    advance: Callable[[int], None],
) -> list[MatchedTensor]:
    """Return the tensors of a model after matching, in their order."""
    matched: dict[str, MatchedTensor] = {}
    bundle = _Bundle(matcher, request, previous)
    twins: dict[object, TensorEntry] = {}
    for entry in request.source.entries:
        twin = twins.get(entry.key)
        if twin is not None and twin.shape == entry.shape:
            # Tied weights: the same memory, so the same blocks.
            if twin.name not in matched:
                matched.update(bundle.match(advance))
            matched[entry.name] = replace(matched[twin.name], entry=entry)
            advance(_nbytes(entry))
            continue
        twins[entry.key] = entry
        view = MatrixView.of(request.source.read(entry.name), request.block_shape)
        if view.data.nbytes <= _SMALL_BYTES:
            bundle.add(entry, view)
            if bundle.is_full:
                matched.update(bundle.match(advance))
        else:
            matched[entry.name] = _match_one(matcher, request, previous, entry, view, advance)
        del view
    matched.update(bundle.match(advance))
    return [matched[entry.name] for entry in request.source.entries]


def hints_for(matcher: Matcher, request: Request, entry: TensorEntry, grid: BlockGrid) -> Hints:
    """Return what is known of a tensor of a model before its blocks are looked at."""
    return Hints(_neighbours(matcher, request, entry, grid))


def _neighbours(
    matcher: Matcher, request: Request, entry: TensorEntry, grid: BlockGrid
) -> Sequence[Neighbours]:
    if not request.policy.uses_deltas:
        return ()
    return matcher.aligned.neighbours(entry, grid, request.name)


def _nbytes(entry: TensorEntry) -> int:
    return int(np.prod(entry.shape)) * entry.dtype.itemsize


def _match_one(
    matcher: Matcher,
    request: Request,
    previous: Previous | None,
    entry: TensorEntry,
    view: MatrixView,
    advance: Callable[[int], None],
) -> MatchedTensor:
    digests = hash_view(view)
    known, errors = _known(previous, entry, view.grid, digests)
    found = matcher.match(
        view,
        digests=digests,
        known=known,
        policy=request.policy,
        hints=hints_for(matcher, request, entry, view.grid),
        advance=advance,
    )
    matcher.aligned.note(entry, view.grid, found.references)
    largest_error = float(max(errors.max(initial=0.0), found.errors.max(initial=0.0)))
    return MatchedTensor(entry, view.grid, found.references, digests, largest_error)


def _known(
    previous: Previous | None, entry: TensorEntry, grid: BlockGrid, digests: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return references of blocks as they were in the version before, and their errors."""
    if previous is None:
        return np.full(grid.count, NO_BASE, np.int64), np.zeros(grid.count)
    known = previous.references(entry, grid, digests)
    return known, np.where(known != NO_BASE, previous.largest_error, 0.0)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A small tensor; its blocks are numbered within the bundle, from ``start`` on."""

    entry: TensorEntry
    view: MatrixView
    start: int

    @property
    def blocks(self) -> slice:
        """Its blocks, as numbers of the bundle."""
        return slice(self.start, self.start + self.view.grid.count)


@dataclass(frozen=True, slots=True)
class _Together:
    """Candidates for stacked blocks: those that neighbour ``column`` of each tensor has.

    ``owners`` says which tensor each block of the stack is of, ``numbers`` which block of that.
    """

    neighbours: Sequence[Sequence[Neighbours]]
    owners: NDArray[np.int64]
    numbers: NDArray[np.int64]
    column: int

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(rows), NO_BASE, np.int64)
        for neighbours, at in self._asked(rows):
            found[at] = neighbours(self.numbers[rows[at]])
        return found

    def note(self, rows: NDArray[np.int64], helped: NDArray[np.bool_]) -> None:
        for neighbours, at in self._asked(rows):
            neighbours.note(self.numbers[rows[at]], helped[at])

    def _asked(self, rows: NDArray[np.int64]) -> Iterator[tuple[Neighbours, slice]]:
        owners = self.owners[rows]
        # The blocks of a tensor follow one another.
        edges = np.flatnonzero(np.diff(owners, prepend=-1, append=-1)).tolist()
        for start, stop in pairwise(edges):
            neighbours = self.neighbours[owners[start]]
            if self.column < len(neighbours):
                yield neighbours[self.column], slice(start, stop)


class _Bundle:
    """Small tensors that wait to be matched."""

    def __init__(self, matcher: Matcher, request: Request, previous: Previous | None) -> None:
        self._matcher = matcher
        self._request = request
        self._previous = previous
        self._tensors: list[_Waiting] = []
        self._bytes = 0
        self._blocks = 0

    def add(self, entry: TensorEntry, view: MatrixView) -> None:
        """Let a tensor wait."""
        self._tensors.append(_Waiting(entry, view, self._blocks))
        self._bytes += view.data.nbytes
        self._blocks += view.grid.count

    @property
    def is_full(self) -> bool:
        """Whether it is time to match them."""
        return self._bytes >= _WAITING_BYTES or self._blocks >= _WAITING_BLOCKS

    def match(self, advance: Callable[[int], None]) -> dict[str, MatchedTensor]:
        """Match all that wait, by name; then none does."""
        tensors, count = self._tensors, self._blocks
        self._tensors, self._bytes, self._blocks = [], 0, 0
        stacks = _stacks(tensors)
        digests = np.empty((count, 2), np.uint64)
        for view, blocks in stacks:
            digests[blocks] = hash_view(view)
        references = np.full(count, NO_BASE, np.int64)
        errors = np.zeros(count)
        neighbours: list[Sequence[Neighbours]] = []
        owners = np.empty(count, np.int64)
        for number, waiting in enumerate(tensors):
            here, entry, grid = waiting.blocks, waiting.entry, waiting.view.grid
            owners[here] = number
            references[here], errors[here] = _known(self._previous, entry, grid, digests[here])
            neighbours.append(_neighbours(self._matcher, self._request, entry, grid))
        starts = np.array([waiting.start for waiting in tensors], np.int64)
        columns = range(max(map(len, neighbours), default=0))
        for view, blocks in stacks:
            of = owners[blocks]
            numbers = blocks - starts[of]
            found = self._matcher.match(
                view,
                digests=digests[blocks],
                known=references[blocks],
                policy=self._request.policy,
                hints=Hints([_Together(neighbours, of, numbers, i) for i in columns]),
            )
            references[blocks] = found.references
            errors[blocks] = np.maximum(errors[blocks], found.errors)
        done = {}
        for waiting in tensors:
            here, entry, grid = waiting.blocks, waiting.entry, waiting.view.grid
            self._matcher.aligned.note(entry, grid, references[here])
            largest = float(errors[here].max(initial=0.0))
            done[entry.name] = MatchedTensor(entry, grid, references[here], digests[here], largest)
            advance(waiting.view.data.nbytes)
        return done


def _stacks(tensors: Sequence[_Waiting]) -> list[tuple[MatrixView, NDArray[np.int64]]]:
    """Stack the blocks of each dtype and shape; also says which blocks of the bundle they are."""
    parts: dict[_Kind, list[tuple[NDArray[np.uint8], NDArray[np.int64]]]] = {}
    for waiting in tensors:
        view, grid = waiting.view, waiting.view.grid
        indices = np.arange(grid.count, dtype=np.int64)
        if grid.count == 1:
            part = view.data, indices + waiting.start
            parts.setdefault((view.dtype, (grid.rows, grid.cols)), []).append(part)
            continue
        for shape, some in by_shape(indices, view, indices):
            part = stack_blocks(view, some, shape).data, some + waiting.start
            parts.setdefault((view.dtype, shape), []).append(part)
    stacks = []
    for (dtype, (height, width)), found in parts.items():
        data = np.concatenate([rows for rows, _ in found])
        view = MatrixView(data, dtype, BlockGrid(len(data), width, height, width))
        stacks.append((view, np.concatenate([blocks for _, blocks in found])))
    return stacks
