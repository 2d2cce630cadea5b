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

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.ingest.aligned import Neighbours, Relative
from pydedup.ingest.low_rank import sample_of, seems_moved
from pydedup.ingest.places import BlockReader, by_shape, stack_blocks
from pydedup.ingest.spool import NO_BASE
from pydedup.policies import Policy
from pydedup.sets import is_among

__all__ = ["Family"]

# Blocks of a sample.
_SAMPLED = 8
# A base that a delta on takes one of so many bytes is as good as any.
_SMALL = 16
# A relative is near if a delta on it would take so much of what one on a base does, at most; and
# what a delta with factors takes of one without them (bench/RESULTS.md, "Variants").
_NEAR = 1 / 2
_MOVED = 1 / 4
# Relatives that deltas are measured on: one for so many bytes of the tensor, as a page of each may
# be read, but so many; and those that are asked about further tensors.
_BYTES_EACH = 512 * 1024
_LEAST, _MOST = 8, 16
_NEAREST = 3
# Tensors in vain, one after the other, after which none is looked at.
_PATIENCE = 2


class Family:
    """The relatives of a tensor, asked whether its new blocks had better be bases of others."""

    def __init__(self, reader: BlockReader, policy: Policy, neighbours: Neighbours) -> None:
        self._reader = reader
        self._policy = policy
        self._neighbours = neighbours

    def __call__(self, view: MatrixView, fresh: NDArray[np.int64]) -> float:
        """Return what a delta may take of these blocks of a matrix, ascending, by themselves.

        That is 1, or half of what deltas seem to take where blocks had better be bases: a delta
        that is so much smaller has a base that is nearer than those of the others.
        """
        kinship = self._neighbours.kinship
        if not len(fresh) or kinship.vain >= _PATIENCE:
            return 1.0
        grid = view.grid
        sample = sample_of(grid, is_among(np.arange(grid.count), fresh))
        is_rectangle = len(sample) > 0
        if not is_rectangle:
            middle = len(fresh) // 2
            sample = fresh[middle : middle + _SAMPLED]
        relatives = self._neighbours.relatives(sample)
        if not any(self._has_deltas(one) for one in relatives):
            return 1.0
        if kinship.near:
            relatives = [one for one in relatives if one.relation in kinship.near]
        probe = _Probe(self._reader, self._policy, view, sample, is_rectangle)
        away = [probe.cost(self._reader.plain(one.blocks)) for one in relatives]
        if not kinship.is_measured:
            for one, cost in zip(relatives, away, strict=True):
                one.relation.away = cost
            kinship.is_measured = True
        least = min(away, default=1.0)
        saved, near = self._near(probe, relatives, least, view.data.nbytes)
        if not near:
            kinship.vain += 1
            return 1.0
        kinship.vain = 0
        saved *= kinship.times
        if not kinship.near:
            kinship.near = [one.relation for one in near[:_NEAREST]]
            kinship.times = len(near) / len(kinship.near)
        return _NEAR * least if saved >= 1 - least else 1.0

    def _has_deltas(self, relative: Relative) -> bool:
        return bool((self._reader.bases_of(relative.blocks) != NO_BASE).any())

    def _near(
        self, probe: _Probe, relatives: Sequence[Relative], least: float, size: int
    ) -> tuple[float, list[Relative]]:
        """Return what deltas on relatives would save, and the relatives, nearest first."""
        if least <= 1 / _SMALL:
            return 0.0, []
        deltas = [one for one in relatives if self._has_deltas(one)]
        deltas = deltas[: min(max(size // _BYTES_EACH, _LEAST), _MOST)]
        costs = np.array([probe.cost(one.blocks) for one in deltas])
        near = [i for i in np.argsort(costs, kind="stable").tolist() if costs[i] <= _NEAR * least]
        return sum(least - float(costs[i]) for i in near), [deltas[i] for i in near]


class _Probe:
    """Some blocks of a matrix, and what deltas on others would take."""

    def __init__(
        self,
        reader: BlockReader,
        policy: Policy,
        view: MatrixView,
        numbers: NDArray[np.int64],
        is_rectangle: bool,
    ) -> None:
        self._reader = reader
        self._bound = policy.max_rel_error
        self._view = view
        self._numbers = numbers
        self._is_rectangle = is_rectangle
        alone = codec.encode_blocks(view, numbers, planes=policy.compresses)
        self._alone = max(int(alone.lengths.sum()), 1)
        self._known: dict[bytes, float] = {}

    def cost(self, references: NDArray[np.int64]) -> float:
        """Return what deltas on blocks take of what the blocks do by themselves, about."""
        key = references.tobytes()
        if key not in self._known:
            self._known[key] = self._measured(references)
        return self._known[key]

    def _measured(self, references: NDArray[np.int64]) -> float:
        reader, view, numbers = self._reader, self._view, self._numbers
        dtypes = set(reader.dtypes_of(references))
        if len(dtypes) != 1:
            return 1.0
        dtype = dtypes.pop()
        total = 0
        for shape, at in by_shape(view, numbers):
            blocks = stack_blocks(view, numbers[at], shape)
            others = reader.read(references[at], dtype, shape)
            every = np.arange(len(at))
            bound = self._bound or None
            sizes = codec.estimate_deltas(blocks, every, others, every, max_rel_error=bound)
            total += int(sizes.sum())
        cost = min(total / self._alone, 1.0)
        if self._is_rectangle and seems_moved(
            reader, view, numbers, references, dtype, self._bound
        ):
            cost *= _MOVED
        return cost
