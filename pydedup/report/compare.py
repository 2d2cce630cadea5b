# SPDX-License-Identifier: Apache-2.0
"""Who shares which blocks, and how two models differ, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup import matmul
from pydedup.adapter import Adapter
from pydedup.adapter_options import telling_rows
from pydedup.catalog import Catalog, ModelsAhead, ParsedMaps, StoredModel, artifact_digests
from pydedup.certificates import artifact_digest
from pydedup.errors import CorruptStoreError
from pydedup.layout import block_costs, block_places, joined, map_places, used_places
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

#: How many numbers of two tensors are compared at a time, as f64.
_PIECE = 2**18


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
        damaged=tuple(damaged),
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
    parsed, ahead = ParsedMaps(), ModelsAhead(adapter, rows)
    for row in rows:
        try:
            other = StoredModel(adapter, row, parsed=parsed, ahead=ahead)
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
    """Compare two models tensor by tensor. Memory: two tensors. Raises NotFoundError."""
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
    if map_a.grid == map_b.grid:
        apart = block_places(map_a.page_ids, map_a.slots) != block_places(
            map_b.page_ids, map_b.slots
        )
        if not apart.any():
            return TensorDiff(info.name, "same", blocks)
        changed = int(apart.sum())
    whole_a, whole_b = matmul.read(map_a, pool).reshape(-1), matmul.read(map_b, pool).reshape(-1)
    pieces = [slice(at, at + _PIECE) for at in range(0, whole_a.size, _PIECE)]
    if all(
        np.array_equal(whole_a[piece].view(np.uint8), whole_b[piece].view(np.uint8))
        for piece in pieces
    ):
        return TensorDiff(info.name, "same", blocks)
    largest = squares = squares_apart = np.float64(0)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        peak = max(float(np.max(np.abs(whole_a[piece].astype(np.float64)))) for piece in pieces)
    # A power of two, so that squares of what is tiny or huge in f64 stay in the range.
    scale = math.ldexp(0.5, math.frexp(peak)[1]) if 0 < peak < math.inf else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        for piece in pieces:
            value = whole_a[piece].astype(np.float64)
            delta = whole_b[piece].astype(np.float64)
            delta -= value
            largest = np.maximum(largest, np.max(np.abs(delta)))  # NaN stays NaN
            value /= scale
            delta /= scale
            squares += np.dot(value, value)
            squares_apart += np.dot(delta, delta)
        norm, distance = float(np.sqrt(squares)), float(np.sqrt(squares_apart))
    return TensorDiff(
        info.name,
        "changed",
        blocks,
        changed or blocks,
        float(largest),
        distance / norm if norm else float("inf"),
    )
