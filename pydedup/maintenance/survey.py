# SPDX-License-Identifier: Apache-2.0
"""What a repair has to restore: the blocks that models use of damaged pages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, Adapter, BlockRow, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import BlockMap
from pydedup.catalog import SourceHashes, StoredModel
from pydedup.errors import CorruptStoreError
from pydedup.layout import base_places, block_place, places_of, split_places
from pydedup.sets import distinct, is_among, without

__all__ = ["Lost", "Survey", "recorded_blocks", "sound_models", "stored_model", "survey"]

# The policy that promises raw blocks.
_RAW = "exact"


@dataclass(slots=True)
class Lost:
    """A block that models use, directly or as a base.

    Attributes
    ----------
    dtypes
        The codes that its dtype may have, the likeliest first; none while it is only known as a
        base.
    digest
        What it hashes to; None where that was recorded nowhere.
    base
        The place of its base; None for a block that is no delta.
    is_raw
        Whether a model that uses it was promised raw blocks.
    may_be_transposed
        Whether its rows may be its columns: what is only known as a base has the shape of the
        deltas on it, or is what these transpose.
    """

    rows: int
    cols: int
    dtypes: tuple[int, ...] = ()
    digest: bytes | None = None
    base: int | None = None
    is_raw: bool = False
    may_be_transposed: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The rows and columns that it may have, the likeliest first."""
        shapes = [(self.rows, self.cols)]
        if self.may_be_transposed and self.rows != self.cols:
            shapes.append((self.cols, self.rows))
        return shapes


@dataclass(slots=True)
class Survey:
    """What models use of damaged pages, by place (`pydedup.layout.block_places`).

    Attributes
    ----------
    lost
        Blocks on damaged pages.
    dependents
        Of bases on damaged pages, the deltas on them, wherever these are.
    block_shapes
        Shapes that tensors with such blocks are cut into.
    """

    lost: dict[int, Lost] = field(default_factory=dict)
    dependents: dict[int, dict[int, Lost]] = field(default_factory=dict)
    block_shapes: set[tuple[int, int]] = field(default_factory=set)


def survey(adapter: Adapter, damaged: Collection[int]) -> Survey:
    """Return what live models use of damaged pages.

    Reads the block maps of models that read such a page. Memory: about 300 bytes for each block on
    such pages, and for each delta on one.
    """
    found = Survey()
    sources: dict[int, bytes] = {}
    pages = np.array(sorted(damaged), np.int64)
    with adapter.snapshot():
        recorded = recorded_blocks(adapter, pages)
        readers = {model_id for model_id, page, _, _ in adapter.model_pages() if page in damaged}
        for row in sound_models(adapter):
            if row.id not in readers or row.state != LIVE:
                continue
            model = stored_model(adapter, row)
            if model is None:
                continue
            hashes, others = SourceHashes(adapter, model), dict[int, bytes]()
            for ordinal, block_map in enumerate(model.block_maps()):
                others.update(
                    _note_blocks(found, hashes, model, ordinal, block_map, pages, recorded)
                )
                _note_bases(found, model, ordinal, block_map, pages)
            if others and hashes.are_as_added():
                sources.update(others)
        deltas = {place for places in found.dependents.values() for place in places}
        elsewhere = distinct(split_places(np.array(sorted(deltas), np.int64))[0])
        recorded.update(recorded_blocks(adapter, without(elsewhere, pages)))
    for blocks in (found.lost, *found.dependents.values()):
        for place, block in blocks.items():
            if place in recorded:
                block.digest, block.base = recorded[place].hash128, recorded[place].base_id
            block.digest = sources.get(place, block.digest)
    return found


def sound_models(adapter: Adapter) -> list[ModelRow]:
    """Return the models of all states, but for those whose row is damaged; verify tells them."""
    with only_sound_rows(adapter):
        return adapter.models(state=None)


def stored_model(adapter: Adapter, row: ModelRow) -> StoredModel | None:
    """Return a model with its block maps; None where these are damaged, which no repair mends."""
    try:
        model = StoredModel(adapter, row)
        model.block_maps()
    except CorruptStoreError:
        return None
    return model


def _note_blocks(
    found: Survey,
    hashes: SourceHashes,
    model: StoredModel,
    ordinal: int,
    block_map: BlockMap,
    pages: NDArray[np.int64],
    recorded: dict[int, BlockRow],
) -> dict[int, bytes]:
    """Note the blocks of a tensor that are lost.

    Returns, by place, what those hashed to at the source of which another hash is recorded, which
    may be the one of another block, or none.
    """
    others: dict[int, bytes] = {}
    hits = np.flatnonzero(is_among(block_map.page_ids, pages))
    if not len(hits):
        return others
    info = model.in_blocks[ordinal]
    found.block_shapes.add(info.block_shape)
    for place, number, rows, cols in _distinct(places_of(block_map, hits), hits, block_map):
        block = found.lost.setdefault(place, Lost(rows, cols))
        block.rows, block.cols, block.may_be_transposed = rows, cols, False
        block.dtypes = (info.dtype.code,)
        block.is_raw |= model.row.policy == _RAW
        if not (model.keeps_bits or ordinal >= len(model.tensors)):
            continue
        digest = hashes.of(ordinal)[16 * number : 16 * number + 16]
        if digest and (place not in recorded or digest != recorded[place].hash128):
            others[place] = digest
    return others


def _note_bases(
    found: Survey,
    model: StoredModel,
    ordinal: int,
    block_map: BlockMap,
    pages: NDArray[np.int64],
) -> None:
    bases = base_places(block_map)
    hits = np.flatnonzero(is_among(split_places(bases)[0], pages))
    if not len(hits):
        return
    info = model.in_blocks[ordinal]
    found.block_shapes |= {info.block_shape, info.block_shape[::-1]}
    own = places_of(block_map, hits)
    for place, number, rows, cols in _distinct(own, hits, block_map):
        base = int(bases[number])
        delta = Lost(rows, cols, (info.dtype.code,))
        found.lost.setdefault(base, Lost(rows, cols, may_be_transposed=True))
        found.dependents.setdefault(base, {}).setdefault(place, delta)


def _distinct(
    places: NDArray[np.int64], numbers: NDArray[np.int64], block_map: BlockMap
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (place, number of a block there, its rows, its columns), each place once."""
    each, first = np.unique(places, return_index=True)
    chosen = numbers[first]
    heights, widths = block_map.grid.shapes(chosen)
    columns: Sequence[list[int]] = [c.tolist() for c in (each, chosen, heights, widths)]
    yield from zip(*columns, strict=True)


def recorded_blocks(adapter: Adapter, page_ids: NDArray[np.int64]) -> dict[int, BlockRow]:
    """Return what is recorded of the blocks on pages, by place."""
    rows = adapter.blocks_on_pages(page_ids.tolist())
    return {block_place(row.page_id, row.slot): row for row in rows}
