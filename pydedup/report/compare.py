# SPDX-License-Identifier: Apache-2.0
"""Who shares which blocks, and how two models differ, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup import matmul
from pydedup.adapter import Adapter
from pydedup.adapter_options import telling_rows, told_damage
from pydedup.blocks import BlockGrid, BlockMap
from pydedup.catalog import Catalog, ModelsAhead, StoredModel, artifact_digests
from pydedup.certificates import artifact_digest
from pydedup.errors import CorruptStoreError
from pydedup.layout import block_costs, joined, map_places, places_of, used_places
from pydedup.pool import PagePool
from pydedup.sets import distinct, is_among
from pydedup.types import Progress, TensorInfo

__all__ = [
    "ArtifactDiff",
    "Diff",
    "Explanation",
    "SharedWith",
    "TensorDiff",
    "TensorSharing",
    "diff_models",
    "explain_model",
]

# Bytes of two tensors that are read at a time, about, and numbers of these that are compared at a
# time, as f64: they stay in the cache.
_PART_BYTES = 4 * 1024 * 1024
_PIECE = 2**15


@dataclass(frozen=True, slots=True)
class TensorSharing:
    """How much of one tensor other models use too.

    Bytes include the bases that its deltas need, block counts do not. ``largest_error`` is a bound
    on the relative L2 difference between a block and what is stored for it.
    """

    tensor: TensorInfo
    blocks: int
    distinct_blocks: int
    shared_blocks: int
    delta_blocks: int
    largest_error: float
    used_bytes: int
    shared_bytes: int
    shared_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SharedWith:
    """What one other model has in common with the explained one."""

    model: str
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a model's bytes are and what removing it would free.

    ``removal_frees_bytes`` counts blocks that no other live model uses; those that lie on pages
    of others are given back when ``vacuum`` packs these anew: those of which nobody uses a quarter,
    at least, but for factors that a block has for others as well, which stay. ``damaged`` tells of
    models that are damaged: with these nothing is shared. ``artifacts`` are those that are kept in
    blocks, such as a tokenizer, as tensors of bytes; sums have these, too.
    """

    model: str
    tensors: tuple[TensorSharing, ...]
    shared_with: tuple[SharedWith, ...]
    logical_bytes: int
    used_bytes: int
    shared_bytes: int
    removal_frees_bytes: int
    damaged: tuple[str, ...] = ()
    artifacts: tuple[TensorSharing, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor in two models.

    ``status`` is ``same``, ``changed``, ``reshaped`` (other shape or dtype), ``added`` (only in
    the second) or ``removed`` (only in the first). Differences are over elements, in float64.
    Blocks are those of the first model, also where the second one has the tensor cut otherwise.
    """

    name: str
    status: str
    blocks: int = 0
    changed_blocks: int = 0
    max_abs: float = 0.0
    relative_l2: float = 0.0


@dataclass(frozen=True, slots=True)
class ArtifactDiff:
    """What is beside the weights of two models under one name: a tokenizer, a graph.

    ``status`` is ``same``, ``changed``, ``added`` or ``removed``, as of a `TensorDiff`.
    """

    name: str
    status: str


@dataclass(frozen=True, slots=True)
class Diff:
    """Two models, tensor by tensor, and what is beside these."""

    first: str
    second: str
    tensors: tuple[TensorDiff, ...]
    artifacts: tuple[ArtifactDiff, ...] = ()

    @property
    def same(self) -> bool:
        """Whether all tensors have the same bits."""
        return all(tensor.status == "same" for tensor in self.tensors)


def explain_model(adapter: Adapter, catalog: Catalog, pool: PagePool, address: str) -> Explanation:
    """Say which blocks of a model are shared with whom. Raises NotFoundError."""
    with adapter.snapshot():
        model = StoredModel(adapter, catalog.resolve(address))
        maps = model.block_maps()
        mine = [map_places(block_map) for block_map in maps]
        used = distinct(joined(mine))
        costs = block_costs(pool, used)
        damaged: list[str] = []
        per_other = _in_common(adapter, model, used, damaged)
    shared = np.zeros(len(used), np.bool_)
    for _, common in per_other:
        shared |= common
    tensors = []
    for info, block_map, places in zip(model.in_blocks, maps, mine, strict=True):
        count = block_map.grid.count
        own = np.searchsorted(used, distinct(places[:count]))  # without bases, which come behind
        at = np.searchsorted(used, distinct(places))
        tensors.append(
            TensorSharing(
                tensor=info,
                blocks=count,
                distinct_blocks=len(own),
                shared_blocks=int(shared[own].sum()),
                delta_blocks=len(places) - count,
                largest_error=model.error_of(info.name),
                used_bytes=int(costs[at].sum()),
                shared_bytes=int(costs[at][shared[at]].sum()),
                shared_with=tuple(name for name, common in per_other if common[at].any()),
            )
        )
    sharing = [
        SharedWith(name, int(common.sum()), int(costs[common].sum()))
        for name, common in per_other
        if common.any()
    ]
    return Explanation(
        model=model.address,
        tensors=tuple(tensors[: len(model.tensors)]),
        shared_with=tuple(sorted(sharing, key=lambda s: (-s.bytes, s.model))),
        logical_bytes=model.row.logical_bytes,
        used_bytes=int(costs.sum()),
        shared_bytes=int(costs[shared].sum()),
        removal_frees_bytes=int(costs[~shared].sum()),
        damaged=told_damage(adapter, damaged),
        artifacts=tuple(tensors[len(model.tensors) :]),
    )


def _in_common(
    adapter: Adapter, model: StoredModel, used: NDArray[np.int64], damaged: list[str]
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return the models that read the same pages, and which of the places ``used`` each uses.

    Those that are damaged are told instead.
    """
    pages = model.page_ids().tolist()
    with telling_rows(adapter, damaged):
        neighbours = {owner for owner, _ in adapter.readers_of(pages)} - {model.row.id}
        rows = [row for row in adapter.models() if row.id in neighbours]
    found = []
    ahead = ModelsAhead(adapter, rows)
    for row in rows:
        try:
            other = StoredModel(adapter, row, ahead=ahead)
            found.append((other.address, is_among(used, used_places(other.block_maps()))))
        except CorruptStoreError as exc:
            damaged.append(str(exc))
    return found


def diff_models(
    adapter: Adapter,
    catalog: Catalog,
    pool: PagePool,
    first: str,
    second: str,
    *,
    progress: Progress | None,
) -> Diff:
    """Compare two models tensor by tensor, by parts of some MiB. Raises NotFoundError."""
    with adapter.snapshot():
        # Block maps of this snapshot, not cached ones: a vacuum may have moved blocks since.
        a = StoredModel(adapter, catalog.resolve(first))
        b = StoredModel(adapter, catalog.resolve(second))
        names_a = {info.name for info in a.tensors}
        names_b = {info.name for info in b.tensors}
        diffs = []
        for number, info in enumerate(a.tensors):
            if info.name in names_b:
                diffs.append(_diff_tensor(pool, a, b, info))
            else:
                diffs.append(TensorDiff(info.name, "removed"))
            if progress is not None:
                progress("comparing", number + 1, len(a.tensors))
        artifacts = _diff_artifacts(_artifacts_of(a), _artifacts_of(b))
    diffs.extend(TensorDiff(i.name, "added") for i in b.tensors if i.name not in names_a)
    return Diff(a.address, b.address, tuple(diffs), artifacts)


def _artifacts_of(model: StoredModel) -> dict[str, object]:
    """Return the digests of what is beside a model's weights, as recorded where they are."""
    found: dict[str, object] = dict(artifact_digests(model.row))
    for name in model.artifact_names():
        if name not in found:  # of an older pydedup
            found[name] = artifact_digest(model.artifact(name) or b"")
    return found


def _diff_artifacts(a: dict[str, object], b: dict[str, object]) -> tuple[ArtifactDiff, ...]:
    diffs = []
    for name in sorted(a.keys() | b.keys()):
        if name in a and name in b:
            status = "same" if a[name] == b[name] else "changed"
        else:
            status = "removed" if name in a else "added"
        diffs.append(ArtifactDiff(name, status))
    return tuple(diffs)


def _diff_tensor(pool: PagePool, a: StoredModel, b: StoredModel, info: TensorInfo) -> TensorDiff:
    other = b.tensor(info.name)
    if (info.shape, info.dtype) != (other.shape, other.dtype):
        return TensorDiff(info.name, "reshaped")
    map_a, map_b = a.block_map(info.name), b.block_map(info.name)
    blocks, changed = map_a.grid.count, 0
    is_cut_alike = map_a.grid == map_b.grid
    if is_cut_alike:
        apart = places_of(map_a) != places_of(map_b)
        if not apart.any():
            return TensorDiff(info.name, "same", blocks)
        changed = int(apart.sum())
    largest, same = np.float64(0), True
    length, distance = _Length(), _Length()
    buffers = np.empty((2, _PIECE))
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaNs, and what is infinite
        for part_a, part_b in _parts(map_a, map_b):
            one = two = matmul.read(part_a, pool).reshape(-1)
            if part_a.grid != part_b.grid or not np.array_equal(
                places_of(part_a), places_of(part_b)
            ):
                two = matmul.read(part_b, pool).reshape(-1)
            if not is_cut_alike:
                changed += _changed_blocks(part_a.grid, one, two)
            for at in range(0, one.size, _PIECE):
                piece_a, piece_b = one[at : at + _PIECE], two[at : at + _PIECE]
                value, delta = buffers[:, : len(piece_a)]
                value[:] = piece_a
                if not np.array_equal(piece_a.view(np.uint8), piece_b.view(np.uint8)):
                    same = False
                    delta[:] = piece_b
                    delta -= value
                    largest = np.maximum(largest, distance.add(delta))  # NaN stays NaN
                length.add(value)
    if same:
        return TensorDiff(info.name, "same", blocks)
    away = distance.over(length)
    return TensorDiff(info.name, "changed", blocks, changed, float(largest), away)


def _changed_blocks(grid: BlockGrid, one: NDArray[Any], two: NDArray[Any]) -> int:
    """Return how many blocks of a matrix, which is given as a row, have other bits in another."""
    a, b = (matrix.reshape(grid.rows, grid.cols).view(np.uint8) for matrix in (one, two))
    lefts = np.arange(0, grid.cols, grid.block_cols) * one.itemsize
    changed = 0
    for top in range(0, grid.rows, grid.block_rows):
        down = slice(top, top + grid.block_rows)
        apart = (a[down] != b[down]).any(axis=0)
        changed += int(np.logical_or.reduceat(apart, lefts).sum())
    return changed


class _Length:
    """The L2 norm of numbers that come in pieces.

    Its squares are scaled by a power of two: those of what is tiny or huge in f64 leave its range.
    """

    def __init__(self) -> None:
        self._scale = 0.0
        self._squares = 0.0

    def add(self, values: NDArray[np.float64]) -> float:
        """Take further numbers, which are overwritten, and return the largest magnitude of them."""
        peak = max(float(values.max()), -float(values.min()))
        if 0 < peak < math.inf and math.isfinite(self._squares):
            scale = math.ldexp(0.5, math.frexp(peak)[1])
            if scale > self._scale:
                self._squares *= (self._scale / scale) ** 2
                self._scale = scale
        self._scale = self._scale or 1.0
        values /= self._scale
        self._squares += float(np.square(values, out=values).sum())
        return peak

    def over(self, other: _Length) -> float:
        """Return this as a multiple of another; infinity where that is 0."""
        if other._squares == 0:
            return math.inf
        return self._scale / other._scale * math.sqrt(self._squares / other._squares)


def _parts(a: BlockMap, b: BlockMap) -> Iterator[tuple[BlockMap, BlockMap]]:
    """Yield the same parts of two tensors, of few bytes where blocks of both end alike."""
    grids = a.grid, b.grid
    rows, cols = a.grid.rows, a.grid.cols
    if (rows, cols) != (b.grid.rows, b.grid.cols):  # stacks, of which one was cut as a matrix
        yield a, b
        return
    height = math.lcm(*(grid.block_rows for grid in grids))
    width = math.lcm(*(grid.block_cols for grid in grids))
    least = height * a.dtype.itemsize
    width *= min(max(_PART_BYTES // (least * width), 1), max(-(-cols // width), 1))
    height *= max(_PART_BYTES // (least * width), 1)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            down, across = slice(top, min(top + height, rows)), slice(left, min(left + width, cols))
            yield a.covering(down, across), b.covering(down, across)
