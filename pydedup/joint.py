# SPDX-License-Identifier: Apache-2.0
"""Products with several stored matrices at once, each block that they share multiplied once.

Variants of a model differ in some of their blocks. The rows of x for all variants that have a block
in common go through it together: it is read, decoded and multiplied once, at the speed of many
rows. What a variant has alone is multiplied with its own rows, and both results are added up.

Deliberately not here: a single product (:mod:`pydedup.matmul`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import NO_PAGE, BlockMap
from pydedup.matmul import activate_in_place, matmul
from pydedup.pool import PagePool

__all__ = ["Factor", "matmul_together"]

# Rows per matrix from which a product alone is as fast as it gets: measured, 2 cores.
_MANY_ROWS = 64
# Matrices that are compared with each other; the pairs of more would take longer than they save.
_MOST_TOGETHER = 16
# A set of matrices gets a product of its own when it shares at least this part of the blocks.
_LEAST_SHARE = 1 / 64
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
    activation: str | None = None,
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
    activation: str | None,
    transpose: bool,
    threads: int,
) -> list[NDArray[Any]]:
    members: dict[int, list[int]] = {}  # by the array of pages: factors with one matrix
    for place, factor in enumerate(factors):
        members.setdefault(id(factor.block_map.page_ids), []).append(place)
    results: list[NDArray[Any] | None] = [None] * len(factors)
    of_map = list(members.values())
    for variants, block_map in _shares([factors[places[0]].block_map for places in of_map]):
        places = [place for variant in variants for place in of_map[variant]]
        x = np.concatenate([factors[place].x for place in places])
        y = matmul(block_map, pool, x, transpose=transpose, threads=threads)
        at = 0
        for place in places:
            part = y[at : at + len(factors[place].x)]
            at += len(part)
            before = results[place]
            if before is None:
                results[place] = part
            else:
                before += part
    for factor, result in zip(factors, results, strict=True):
        assert result is not None  # each block is in a share of each variant
        if factor.bias is not None:
            result += factor.bias
        if activation is not None:
            activate_in_place(result, activation)
    return results  # type: ignore[return-value]  # as just said


#: Of some matrices, and the blocks that these have in common.
_Shares = list[tuple[tuple[int, ...], BlockMap]]
# By the arrays of pages of the matrices, which are kept alive by it.
_known: OrderedDict[tuple[int, ...], tuple[list[BlockMap], _Shares]] = OrderedDict()


def _shares(maps: list[BlockMap]) -> _Shares:
    """Return, per set of matrices that get a product, their map without all other blocks."""
    key = tuple(id(block_map.page_ids) for block_map in maps)
    known = _known.get(key)
    if known is None:
        known = _known[key] = maps, _find_shares(maps)
        kept = sum(_bytes_of(*entry) for entry in list(_known.values()))
        while len(_known) > 1 and (len(_known) > _REMEMBERED or kept > _REMEMBERED_BYTES):
            try:
                kept -= _bytes_of(*_known.popitem(last=False)[1])
            except KeyError:  # another thread was faster
                break
    return known[1]


def _bytes_of(maps: list[BlockMap], shares: _Shares) -> int:
    return sum(32 * len(block_map.page_ids) for _, block_map in shares)


def _find_shares(maps: list[BlockMap]) -> _Shares:
    count = len(maps[0].page_ids)
    # Per block, the first of the matrices that has the same block at this place.
    first = np.empty((len(maps), count), np.int8)
    for variant, block_map in enumerate(maps):
        first[variant] = variant
        for other in range(variant - 1, -1, -1):
            same = (block_map.page_ids == maps[other].page_ids) & (
                block_map.slots == maps[other].slots
            )
            first[variant][same] = first[other][same]
    patterns, of_block = np.unique(first, axis=1, return_inverse=True)
    blocks: dict[tuple[int, ...], NDArray[np.bool_]] = {}
    for number, pattern in enumerate(patterns.T.tolist()):
        here = of_block.reshape(-1) == number
        for leader in set(pattern):
            variants = tuple(v for v, its in enumerate(pattern) if its == leader)
            blocks[variants] = blocks.get(variants, False) | here
    shares: _Shares = []
    alone = {variant: np.zeros(count, np.bool_) for variant in range(len(maps))}
    for variants, mine in sorted(blocks.items()):
        if len(variants) > 1 and np.count_nonzero(mine) >= _LEAST_SHARE * count:
            shares.append((variants, _only(maps[variants[0]], mine)))
        else:
            for variant in variants:
                alone[variant] |= mine
    for variant, mine in alone.items():
        if mine.any() or not any(variant in variants for variants, _ in shares):
            shares.append(((variant,), _only(maps[variant], mine)))
    return shares


def _only(block_map: BlockMap, mine: NDArray[np.bool_]) -> BlockMap:
    """Return a map in which all other blocks have no page: products take them for zeros."""
    if mine.all():
        return block_map
    bases = block_map.base_page_ids
    return replace(
        block_map,
        page_ids=np.where(mine, block_map.page_ids, NO_PAGE),
        base_page_ids=None if bases is None else np.where(mine, bases, NO_PAGE),
    )
