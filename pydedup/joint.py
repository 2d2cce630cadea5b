# SPDX-License-Identifier: Apache-2.0
"""Products with several stored matrices at once, each block that they share multiplied once.

Variants of a model differ in some of their blocks. A product takes several blocks at a place of the
grid, each with the rows of those who have it: one that many have is read, decoded and multiplied
once for all their rows, at the speed of many rows.

Deliberately not here: a single product (:mod:`pydedup.matmul`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import NO_PAGE, BlockMap
from pydedup.matmul import Among, activate_in_place, matmul
from pydedup.pool import PagePool
from pydedup.words import Activation

__all__ = ["Factor", "matmul_together"]

# Rows of one matrix beyond which its product alone is bound by the cores, as all of them together
# would be (measured with AVX2 on an EPYC with 2 cores: 12 rows gain a tenth, 16 a twentieth).
_MANY_ROWS = 16
# Matrices that are compared with each other; the pairs of more would take longer than they save.
_MOST_TOGETHER = 16
# Sets of matrices whose shares are remembered, and bytes of these at most.
_REMEMBERED = 256
_REMEMBERED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One product: x of shape (m, in), and a bias or None."""

    block_map: BlockMap
    x: NDArray[Any]
    bias: NDArray[Any] | None


def matmul_together(
    factors: Sequence[Factor],
    pool: PagePool,
    *,
    activation: Activation | None = None,
    transpose: bool = False,
    threads: int = 0,
) -> list[NDArray[Any]]:
    """Return what `pydedup.matmul.matmul` returns for each factor, in their order.

    Sums are formed in another order than one by one, so the last bits may differ.

    Raises
    ------
    ArgumentError, PageNotFoundError, CorruptStoreError, BudgetError
        As `pydedup.matmul.matmul` does.
    """
    results: list[NDArray[Any] | None] = [None] * len(factors)
    for places in _groups(factors):
        together = [factors[place] for place in places]
        if len(together) == 1:
            only = together[0]
            made = [
                matmul(
                    only.block_map,
                    pool,
                    only.x,
                    bias=only.bias,
                    activation=activation,
                    transpose=transpose,
                    threads=threads,
                )
            ]
        else:
            made = _multiply(together, pool, activation, transpose, threads)
        for place, result in zip(places, made, strict=True):
            results[place] = result
    return results  # type: ignore[return-value]  # each place is in one group


def _groups(factors: Sequence[Factor]) -> list[list[int]]:
    """Return which factors are multiplied together."""
    groups: list[list[int]] = []
    open_groups: dict[object, list[int]] = {}
    for place, factor in enumerate(factors):
        block_map = factor.block_map
        if len(factor.x) > _MANY_ROWS:
            groups.append([place])
            continue
        key = block_map.grid, block_map.dtype, factor.x.dtype, factor.x.shape[1:]
        group = open_groups.get(key)
        if group is None or len(group) == _MOST_TOGETHER:
            group = open_groups[key] = []
            groups.append(group)
        group.append(place)
    return groups


def _multiply(
    factors: Sequence[Factor],
    pool: PagePool,
    activation: Activation | None,
    transpose: bool,
    threads: int,
) -> list[NDArray[Any]]:
    members: dict[int, list[int]] = {}  # by the array of pages: factors with one matrix
    for place, factor in enumerate(factors):
        members.setdefault(id(factor.block_map.page_ids), []).append(place)
    of_map = [members[key] for key in sorted(members)]  # the same for any order of requests
    shares = _shares([factors[places[0]].block_map for places in of_map])
    # Rows in the order of their variants, so that those of one lie together.
    order = [place for places in of_map for place in places]
    lengths = [len(factors[place].x) for place in order]
    x = np.concatenate([factors[place].x for place in order])
    owner = [variant for variant, places in enumerate(of_map) for _ in places]
    variants = np.repeat(np.array(owner, np.uint8), lengths)
    among = Among(variants, shares.places, shares.members)
    y = matmul(shares.blocks, pool, x, transpose=transpose, threads=threads, among=among)
    results: list[NDArray[Any] | None] = [None] * len(factors)
    for place, end, length in zip(order, np.cumsum(lengths).tolist(), lengths, strict=True):
        results[place] = y[end - length : end]
    for factor, result in zip(factors, results, strict=True):
        assert result is not None  # each place is in the order
        if factor.bias is not None:
            result += factor.bias
        if activation is not None:
            activate_in_place(result, activation)
    return results  # type: ignore[return-value]  # as just said


@dataclass(frozen=True, slots=True, eq=False)
class _Shares:
    """The different blocks of some matrices, by their places, and who has each (see `Among`)."""

    blocks: BlockMap
    places: NDArray[np.uint32]
    members: NDArray[np.uint64]


# By the arrays of pages of the matrices, which are kept alive by it.
_known: OrderedDict[tuple[int, ...], tuple[list[BlockMap], _Shares]] = OrderedDict()


def _shares(maps: list[BlockMap]) -> _Shares:
    """Return the blocks of matrices of one grid; the same object for the same matrices."""
    key = tuple(id(block_map.page_ids) for block_map in maps)
    known = _known.get(key)
    if known is None:
        known = _known[key] = maps, _find_shares(maps)
        kept = sum(_bytes_of(shares) for _, shares in list(_known.values()))
        while len(_known) > 1 and (len(_known) > _REMEMBERED or kept > _REMEMBERED_BYTES):
            try:
                kept -= _bytes_of(_known.popitem(last=False)[1][1])
            except KeyError:  # another thread was faster
                break
    else:
        with contextlib.suppress(KeyError):
            _known.move_to_end(key)
    return known[1]


def _bytes_of(shares: _Shares) -> int:
    return 32 * len(shares.members)


def _find_shares(maps: list[BlockMap]) -> _Shares:
    # Who has the same block as variant v at each place, as bits.
    same = np.zeros((len(maps), len(maps[0].page_ids)), np.uint64)
    is_first = np.ones(same.shape, np.bool_)
    for v, one in enumerate(maps):
        same[v] |= np.uint64(1 << v)
        for w in range(v):
            equal = (one.page_ids == maps[w].page_ids) & (one.slots == maps[w].slots)
            same[w] |= np.where(equal, np.uint64(1 << v), np.uint64(0))
            is_first[v] &= ~equal
    places, variants = np.nonzero(is_first.T)

    def column(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return np.ascontiguousarray(np.stack(arrays)[variants, places])

    some = next((one.bases for one in maps if one.bases is not None), None)
    bases = [
        one.bases or (np.full_like(one.page_ids, NO_PAGE), np.zeros_like(one.slots)) for one in maps
    ]
    blocks = BlockMap(
        maps[0].grid,
        maps[0].dtype,
        column([one.page_ids for one in maps]),
        column([one.slots for one in maps]),
        None if some is None else column([page_ids for page_ids, _ in bases]),
        None if some is None else column([slots for _, slots in bases]),
    )
    return _Shares(blocks, places.astype(np.uint32), same[variants, places])
