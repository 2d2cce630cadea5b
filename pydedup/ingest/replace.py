# SPDX-License-Identifier: Apache-2.0
"""What the policy `Accuracy` may put in the place of a model's blocks, and what came of it.

Everything that a block might become is encoded beforehand, so the search evaluates what would be
stored, bit for bit. The whole model is in memory meanwhile, about three times: as it was given, as
it is being changed, and the stored blocks that are near to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.blocks import MatrixView
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_view
from pydedup.ingest.accuracy import GENTLE, Replacement, choose
from pydedup.ingest.ahead import Ahead
from pydedup.ingest.asked import ByPosition, ByTransposition
from pydedup.ingest.candidates import can_be_delta
from pydedup.ingest.deltas import Delta
from pydedup.ingest.levels import Levels, MovedBases
from pydedup.ingest.low_rank import Moved
from pydedup.ingest.match import Matcher, pieces_of
from pydedup.ingest.pairs import (
    Pairs,
    best_pairs,
    exact_distances,
    farthest_base,
    pairs_of,
    pairs_on,
)
from pydedup.ingest.places import block_of, by_shape, stack_blocks, values_of
from pydedup.ingest.plan import Request
from pydedup.ingest.previous import Previous
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.transposed import Transposed
from pydedup.ingest.trial import changes
from pydedup.similarity import magnitude

__all__ = ["Chosen", "choose_blocks"]


@dataclass(slots=True)
class Chosen:
    """A model as it is to be stored.

    Attributes
    ----------
    arrays
        Its tensors by name.
    digests
        Those of the source's blocks by name, uint64 (n, 2).
    deltas
        By name: number of a block -> the quantised delta that gives what ``arrays`` has there.
    moved
        By name: what moves the bases of blocks that were not replaced (low_rank.py).
    certificate
        What `choose` found out.
    errors
        Largest relative L2 change of a replaced block, by name; of those that have one.
    trained
        Tensors that fine-tuning changed, so that more than what was replaced differs.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    digests: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    deltas: dict[str, dict[int, Delta]] = field(default_factory=dict)
    moved: dict[str, Mapping[int, Moved]] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    def error(self, request: Request, entry: TensorEntry) -> float:
        """Return the greatest relative L2 difference of a tensor's blocks to the source's.

        Raises ConflictError when the source has to be looked at again, and is another by now.
        """
        if entry.name not in self.trained:
            return self.errors.get(entry.name, 0.0)
        now = request.view_of(entry.name, self.arrays[entry.name])
        changed = np.flatnonzero((hash_view(now) != self.digests[entry.name]).any(axis=1))
        if not len(changed):
            return 0.0
        source = request.read(entry.name)
        request.check_unchanged(entry.name, hash_view(source).tobytes())
        largest = 0.0
        for shape, at in by_shape(now, changed):
            for some in pieces_of(now, changed[at]):
                pair = [values_of(stack_blocks(view, some, shape)) for view in (source, now)]
                largest = max(largest, float(changes(*pair).max()))
        return largest


def choose_blocks(
    matcher: Matcher,
    ahead: Ahead,
    request: Request,
    policy: Accuracy,
    previous: Previous | None,
    advance: Callable[[int], None],
    tell: Callable[[str, int], None],
) -> Chosen:
    """Search for what may be replaced.

    ``advance`` is told the bytes of each tensor looked at, ``tell`` what comes next.
    """
    chosen = Chosen()
    same: dict[str, str] = {}  # of tied tensors, the name of the first
    offers: list[_Offer] = []
    shared: dict[str, list[tuple[slice, slice]]] = {}
    transposed = Transposed(matcher, request, policy)
    for entry, twin in request.distinct_entries():
        same[entry.name] = entry.name if twin is None else twin.name
        if twin is not None:
            # Tied weights stay tied: one array, of whose blocks each is replaced once.
            chosen.arrays[entry.name] = chosen.arrays[twin.name]
            chosen.digests[entry.name] = chosen.digests[twin.name]
            continue
        given, known = ahead.read(request, entry)
        array = np.empty(entry.shape, entry.dtype.numpy)
        array.reshape(-1).view(np.uint8)[:] = given.data.reshape(-1)
        chosen.arrays[entry.name] = array
        view = request.view_of(entry.name, array)
        digests = chosen.digests[entry.name] = hash_view(view) if known is None else known
        request.check_unchanged(entry.name, digests.tobytes())
        references = matcher.find(view, digests)
        found = np.flatnonzero(references != NO_BASE)
        shared[entry.name] = [view.grid.area(number) for number in found.tolist()]
        aligned = matcher.aligned.neighbours(request, entry, view.grid)
        before = np.full(view.grid.count, NO_BASE, np.int64), 0.0
        if previous is not None:
            before = previous.unchanged(entry, view.grid, digests)
        new = np.flatnonzero(references == NO_BASE)
        by_transposition = transposed.of(entry, view.grid)
        tensor = _Tensor(
            matcher, entry, view, new, policy.max_rel_error, before, aligned, by_transposition
        )
        offers += tensor.offers()
        chosen.moved[entry.name] = tensor.moved
        advance(array.nbytes)
    replacements = [offer.replacement for offer in offers]
    choice = choose(
        chosen.arrays, replacements, policy, shared=shared, row_axes=request.row_axes, tell=tell
    )
    for level, offer in zip(choice.levels.tolist(), offers, strict=True):
        # Also of tensors that fine-tuning changed: what was replaced kept its bits.
        delta = offer.deltas[level] if level >= 0 else None
        if delta is not None:
            chosen.deltas.setdefault(offer.replacement.tensor, {})[offer.number] = delta
    chosen.certificate = choice.certificate
    chosen.errors = {n: choice.errors[first] for n, first in same.items() if first in choice.errors}
    trained = {same[name] for name in choice.finetuned}
    chosen.trained = frozenset(name for name, first in same.items() if first in trained)
    return chosen


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one block may become, and the deltas behind its levels (None: a stored block)."""

    number: int
    replacement: Replacement
    deltas: tuple[Delta | None, ...]


class _Tensor:
    """A tensor of the model, of which these blocks may be replaced.

    ``before`` is what the version before has for blocks that did not change, and how far from them
    it is at most, as `Previous.unchanged` returns it.
    """

    def __init__(
        self,
        matcher: Matcher,
        entry: TensorEntry,
        view: MatrixView,
        numbers: NDArray[np.int64],
        farthest: float,
        before: tuple[NDArray[np.int64], float],
        aligned: ByPosition,
        transposed: ByTransposition | None,
    ) -> None:
        self._aligned = aligned
        self._transposed = transposed
        self._matcher = matcher
        self._name = entry.name
        self._view = view
        self._numbers = numbers
        self._farthest = farthest
        # Error bounds of the quantised deltas that are tried where a stored block is too far away.
        self._bounds = sorted({min(bound, farthest) for bound in GENTLE} - {0.0})
        self._spread = _spread(view)
        self._before, self._error_before = before
        fresh = numbers[self._before[numbers] == NO_BASE]
        self._moved = MovedBases(matcher.reader, view, fresh, self._bounds, aligned, transposed)

    @property
    def moved(self) -> Mapping[int, Moved]:
        """What moves the bases of blocks that stay as they are, as far as they were looked at."""
        return self._moved.exact

    def offers(self) -> Iterator[_Offer]:
        """Yield what the blocks may become, in order, for those that may become anything."""
        view, numbers = self._view, self._numbers
        for shape, at in by_shape(view, numbers):
            if not (view.dtype.has_distances and can_be_delta(shape)):
                continue
            for some in pieces_of(view, at):
                yield from self._piece(numbers[some], shape)

    def _piece(self, numbers: NDArray[np.int64], shape: tuple[int, int]) -> Iterator[_Offer]:
        view = self._view
        blocks = stack_blocks(view, numbers, shape)
        magnitudes = magnitude(values_of(blocks)) / self._spread
        levels = Levels(blocks)
        rest = self._as_before(numbers, shape, levels)
        moved = self._moved.settle(levels, numbers)
        near = self._aligned(numbers)
        least, nearest = self._as_others(levels, numbers, near, rest)
        helped = near == moved
        for some in nearest:
            helped[:, some.rows] |= near[:, some.rows] == some.references
        self._aligned.note((helped & (near != NO_BASE))[:, rest])
        self._moved.add_to(levels, numbers, least, nearest)
        self._as_transposed(levels, numbers, rest)
        for row, best in levels.best():
            number = int(numbers[row])
            rows, cols = view.grid.area(number)
            deltas = tuple(level.delta for level in best)
            yield _Offer(
                number,
                Replacement(
                    tensor=self._name,
                    rows=rows,
                    cols=cols,
                    levels=tuple(level.content for level in best),
                    saved=tuple(level.saved for level in best),
                    magnitude=float(magnitudes[row]),
                    layer_bytes=view.data.nbytes,
                    shares=deltas[0] is None,
                    errors=tuple(level.error for level in best),
                ),
                deltas,
            )

    def _as_before(
        self, numbers: NDArray[np.int64], shape: tuple[int, int], levels: Levels
    ) -> NDArray[np.bool_]:
        """Offer what the version before has for blocks that did not change; return the others."""
        references = self._before[numbers]
        rest: NDArray[np.bool_] = references == NO_BASE
        rows = np.flatnonzero(~rest)
        kept = values_of(self._matcher.reader.read(references[rows], self._view.dtype, shape))
        for content, row in zip(kept, rows.tolist(), strict=True):
            levels.add_stored(row, content, self._error_before)
        return rest

    def _as_others(
        self,
        levels: Levels,
        numbers: NDArray[np.int64],
        aligned: NDArray[np.int64],
        rest: NDArray[np.bool_],
    ) -> tuple[NDArray[np.float64], list[Pairs]]:
        """Offer the nearest stored block, and quantised deltas on it.

        Returns how far away it is, infinity without one, and the pairs of blocks with theirs.
        """
        blocks = levels.blocks
        # Bases of deltas may be farther than what is shared.
        limit = max(self._farthest, farthest_base(self._farthest))
        pairs = pairs_of(self._matcher.similar.pairs(blocks, numbers, limit, aligned), rest)
        away = [exact_distances(blocks, some, limit) for some in pairs]
        for some, distances in zip(pairs, away, strict=True):
            # What is near in part alone comes behind all others.
            distances[~(some.estimates <= limit)] = np.nextafter(limit, np.inf)
        least, best = best_pairs(pairs, away, len(numbers))
        for some in pairs_of(best, least > limit):
            levels.settle(some)
        for some in best:
            rows = some.rows
            if some.bases.dtype == blocks.dtype:
                contents = values_of(some.bases)
                for row, base in zip(rows.tolist(), some.base_index, strict=True):
                    if least[row] <= self._farthest:
                        levels.add_stored(row, contents[base], float(least[row]))
            for bound in self._bounds:
                for worth in pairs_of([some], least > bound):
                    levels.add_deltas(worth, bound)
        return least, best

    def _as_transposed(
        self, levels: Levels, numbers: NDArray[np.int64], rest: NDArray[np.bool_]
    ) -> None:
        """Offer quantised deltas on stored blocks that are like these if they are transposed."""
        rows = np.flatnonzero(rest)
        if self._transposed is None or not len(rows):
            return
        fresh = numbers[rows]
        references = self._transposed(fresh, partial(block_of, self._view, fresh))
        there = references != NO_BASE
        reader, shape = self._matcher.reader, levels.blocks.grid.block_shape
        for pairs in pairs_on(reader, rows[there], references[there], shape, is_transposed=True):
            levels.settle(pairs)
            for bound in self._bounds:
                levels.add_deltas(pairs, bound)


def _spread(view: MatrixView) -> float:
    """Return the range of a layer's finite weights, by which magnitudes are normalised."""
    if not view.dtype.is_float or view.data.size == 0:
        return 1.0
    values = view.data.view(view.dtype.numpy)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        finite = values[np.isfinite(values)].astype(np.float64)
    spread = float(finite.max()) - float(finite.min()) if finite.size else 0.0
    return spread if spread > 0 else 1.0
