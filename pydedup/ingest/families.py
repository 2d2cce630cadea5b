# SPDX-License-Identifier: Apache-2.0
"""When blocks are kept by themselves, although they are near to others: as bases of later ones.

A base is never itself a delta (docs/architecture.md, "Similar blocks"). So what was derived from a
fine-tune that is stored as deltas can be a delta on that one's bases only, however little the two
differ: an adapter per tenant, or a nightly update of a few rows, takes as much as the fine-tune
did. To keep its blocks whole costs more now and makes all later ones of its kind small. Whether
that pays nobody knows who does not know what comes; but who does it as soon as the relatives that
there are would have saved as much pays at most about twice what the best choice takes (the ski
rental problem: Karlin et al., *Competitive Snoopy Caching*, Algorithmica 3, 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.aligned import Related, Relative
from pydedup.ingest.asked import ByTransposition
from pydedup.ingest.differences import sample_of, seems_moved
from pydedup.ingest.low_rank import LEAST_SIDE
from pydedup.ingest.places import BlockReader, block_of, by_shape, stack_blocks
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Policy
from pydedup.sets import in_parts, is_among
from pydedup.types import DType

__all__ = ["Family"]

# Blocks of a sample; and of one of a stack.
_SAMPLED = 8
_OF_STACK = 4
# A base that a delta on takes one of so many bytes is as good as any.
_SMALL = 16
# A relative is near if a delta on it would take so much of what one on a base does, at most; and
# what a delta with factors takes of one without them (bench/RESULTS.md, "Variants").
_NEAR = 1 / 2
_MOVED = 1 / 4
# Of fewer bytes of blocks nothing is asked.
_LEAST_BYTES = 16 * 1024
# Relatives that are asked: one for so many bytes of the blocks, but so many. Of these, those that
# deltas are measured on, as a page of each may be read; and those that are asked about further
# tensors.
_BYTES_EACH = 64 * 1024
_LEAST, _MOST = 3, 64
_BYTES_EACH_MEASURED = 512 * 1024
_LEAST_MEASURED, _MOST_MEASURED = 8, 16
_NEAREST = 3
# Relatives of which blocks are in memory at a time.
_AT_ONCE = 8
# Tensors in vain, one after the other, after which none is looked at.
_PATIENCE = 2


class Family:
    """The relatives of a tensor, asked whether its new blocks had better be bases of others.

    ``transposed`` gives bases to transpose. Of blocks of several tensors, a stack, those of the
    middle are judged by; ``in_stack`` says of each whether it is of a tensor that may have factors.
    """

    def __init__(
        self,
        reader: BlockReader,
        policy: Policy,
        neighbours: Related,
        transposed: ByTransposition | None = None,
        *,
        in_stack: NDArray[np.bool_] | None = None,
    ) -> None:
        self._reader = reader
        self._policy = policy
        self._neighbours = neighbours
        self._transposed = transposed
        self._in_stack = in_stack
        self._is_stack = in_stack is not None

    def __call__(self, view: MatrixView, fresh: NDArray[np.int64]) -> float:
        """Return what a delta may take of these blocks of a matrix, ascending, by themselves.

        That is 1, or half of what deltas seem to take where blocks had better be bases: a delta
        that is so much smaller has a base that is nearer than those of the others.
        """
        kinship = self._neighbours.kinship
        size = int(view.block_bytes()[fresh].sum())
        if size < _LEAST_BYTES or kinship.vain[self._is_stack] >= _PATIENCE:
            return 1.0
        sample, rectangle = self._sample(view, fresh)
        asked = min(max(size // _BYTES_EACH, _LEAST), _MOST)
        relatives = self._neighbours.relatives(sample, asked)
        if not self._derived(relatives):
            return 1.0
        if kinship.near:
            relatives = [one for one in relatives if one.relation in kinship.near]
        probe = _Probe(self._reader, self._policy, view, sample, rectangle)
        away = probe.costs([self._reader.plain(one.blocks) for one in relatives])
        if kinship.measured < asked:
            for one, cost in zip(relatives, away.tolist(), strict=True):
                one.relation.away = cost
            kinship.measured = asked
        least = float(away.min(initial=1.0))
        if least > 1 / _SMALL and self._transposed is not None:
            least = min(least, probe.transposed_cost(self._transposed))
        deltas = self._derived(relatives) if least > 1 / _SMALL else []
        measured = min(
            max(view.data.nbytes // _BYTES_EACH_MEASURED, _LEAST_MEASURED), _MOST_MEASURED
        )
        saved, near = self._near(probe, deltas[:measured], least)
        if not near:
            kinship.vain[self._is_stack] += 1
            return 1.0
        kinship.vain[self._is_stack] = 0
        if not kinship.near:
            if saved < 1 - least:  # with the others it may be enough
                deltas = self._derived(self._neighbours.relatives(sample, _MOST))
                saved, near = self._near(probe, deltas, least)
            kinship.near = [one.relation for one in near[:_NEAREST]]
            kinship.times = len(near) / len(kinship.near)
        else:
            saved *= kinship.times
        return _NEAR * least if saved >= 1 - least else 1.0

    def _sample(self, view: MatrixView, fresh: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Return a sample of blocks, and how many of the first may have factors in common."""
        middle = len(fresh) // 2
        if self._in_stack is not None:
            sample = fresh[middle : middle + _OF_STACK]
            return sample, int(self._in_stack[sample[0]])
        sample = sample_of(view.grid, is_among(np.arange(view.grid.count), fresh), view.edges)
        if len(sample):
            return sample, len(sample)
        return fresh[middle : middle + _SAMPLED], 1

    def _derived(self, relatives: Sequence[Relative]) -> list[Relative]:
        """Return those that have deltas there."""
        bases_of = self._reader.bases_of
        return [one for one in relatives if (bases_of(one.blocks) != NO_BASE).any()]

    def _near(
        self, probe: _Probe, deltas: Sequence[Relative], least: float
    ) -> tuple[float, list[Relative]]:
        """Return what deltas on near ones of these would save, and those, nearest first."""
        # Edges of a few rows or columns had better become what the rest does.
        twice = min(probe.block_shape) >= LEAST_SIDE
        costs = probe.costs([one.blocks for one in deltas], twice=twice)
        near = [i for i in np.argsort(costs, kind="stable").tolist() if costs[i] <= _NEAR * least]
        return sum(least - float(costs[i]) for i in near), [deltas[i] for i in near]


class _Probe:
    """Some blocks of a matrix, and what deltas on others would take.

    The first ``rectangle`` of these are one; 0 where no factors move them.
    """

    def __init__(
        self,
        reader: BlockReader,
        policy: Policy,
        view: MatrixView,
        numbers: NDArray[np.int64],
        rectangle: int,
    ) -> None:
        self._reader = reader
        self._bound = policy.max_rel_error
        self._view = view
        self._numbers = numbers
        self._rectangle = numbers[:rectangle]
        alone = codec.encode_blocks(view, numbers, planes=policy.compresses)
        self._alone = max(int(alone.lengths.sum()), 1)
        self._known: dict[tuple[bytes, bool, bool], float] = {}

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block that is not at an edge."""
        return self._view.grid.block_shape

    def costs(
        self,
        given: Sequence[NDArray[np.int64]],
        *,
        twice: bool = False,
        is_transposed: bool = False,
    ) -> NDArray[np.float64]:
        """Return what deltas on blocks take of what the blocks do by themselves, about.

        Of each of ``given`` there is a reference for each block. With ``twice``, factors count that
        would be found between two models like this one, too: else it is no use as their base.
        """
        keys = [(references.tobytes(), twice, is_transposed) for references in given]
        sides = self._view.grid.shapes(self._numbers)
        rows, cols = sides[::-1] if is_transposed else sides
        unknown = {
            key: references
            for key, references in zip(keys, given, strict=True)
            if key not in self._known
        }
        by_dtype: dict[DType, list[NDArray[np.int64]]] = {}
        for key, references in unknown.items():
            self._known[key] = 1.0
            dtype = self._reader.dtype_of_all(references, rows, cols)
            if dtype is not None:
                by_dtype.setdefault(dtype, []).append(references)
        for dtype, alike in by_dtype.items():
            for some in in_parts(alike, _AT_ONCE):
                measured = self._measured(some, dtype, twice, is_transposed)
                for references, cost in zip(some, measured, strict=True):
                    self._known[references.tobytes(), twice, is_transposed] = cost
        return np.array([self._known[key] for key in keys])

    def transposed_cost(self, transposed: ByTransposition) -> float:
        """Return the same of the bases that are given by transposition, 1 without any."""
        references = transposed(self._numbers, partial(block_of, self._view, self._numbers))
        if (references == NO_BASE).any():
            return 1.0
        return float(self.costs([references], is_transposed=True)[0])

    def _measured(
        self,
        given: Sequence[NDArray[np.int64]],
        dtype: DType,
        twice: bool,
        is_transposed: bool,
    ) -> list[float]:
        """Return the same for blocks of one dtype."""
        reader, view, numbers = self._reader, self._view, self._numbers
        totals = np.zeros(len(given), np.int64)
        for shape, at in by_shape(view, numbers):
            blocks = stack_blocks(view, numbers[at], shape)
            chosen = np.concatenate([references[at] for references in given])
            others = reader.read(chosen, dtype, shape, is_transposed=is_transposed)
            sizes = codec.estimate_deltas(
                blocks,
                np.tile(np.arange(len(at)), len(given)),
                others,
                np.arange(len(chosen)),
                max_rel_error=self._bound or None,
            )
            totals += sizes.reshape(len(given), -1).sum(axis=1)
        costs = np.minimum(totals / self._alone, 1.0)
        for i, references in enumerate(given):
            together = references[: len(self._rectangle)]
            if len(together) and seems_moved(
                reader,
                view,
                self._rectangle,
                together,
                dtype,
                self._bound,
                is_transposed=is_transposed,
                twice=twice,
            ):
                costs[i] *= _MOVED
        return [float(cost) for cost in costs]
