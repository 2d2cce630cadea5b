# SPDX-License-Identifier: Apache-2.0
"""What models of a store share, counted: the statistics that the simulator is fed with.

Read from a real store: block maps, `model_pages` and the tables themselves. Nothing is estimated
here; `_sizes.py` says what follows for more models than there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

import pydedup
from pydedup.adapter import Adapter, ModelRow
from pydedup.catalog import Catalog, StoredModel
from pydedup.layout import base_places, block_places, split_places
from pydedup.signatures import read_segments
from pydedup.similarity import L2LSH

__all__ = ["Brought", "Family", "family_of", "index_bytes"]

#: Rows of ``distinct_blocks``, ... that one model brings are counted under these names.
_NUMBER_BITS = 20


@dataclass(frozen=True, slots=True)
class Brought:
    """What adding one model brought; means are of the same kind, with fractions.

    Attributes
    ----------
    logical, tensors, blocks
        Of the model as it was given.
    new_blocks, new_deltas
        Distinct blocks that came with it, deltas among them.
    pages, page_payload
        Pages that came with it, and their bytes.
    reads
        Pages that it reads: rows of ``model_pages``, bases included.
    map_parts, map_payload, hash_parts, hash_payload
        Rows and bytes of ``block_maps`` and ``source_hashes``.
    segments, signature_payload
        Rows and bytes of ``signatures``.
    indexed
        Blocks that the similarity index got.
    artifacts, artifact_payload
        Rows and bytes of ``artifacts``.
    tensor_payload, model_payload
        Bytes of text and numbers in its rows of ``tensors`` and ``models``.
    """

    logical: float = 0.0
    tensors: float = 0.0
    blocks: float = 0.0
    new_blocks: float = 0.0
    new_deltas: float = 0.0
    pages: float = 0.0
    page_payload: float = 0.0
    reads: float = 0.0
    map_parts: float = 0.0
    map_payload: float = 0.0
    hash_parts: float = 0.0
    hash_payload: float = 0.0
    segments: float = 0.0
    signature_payload: float = 0.0
    indexed: float = 0.0
    artifacts: float = 0.0
    artifact_payload: float = 0.0
    tensor_payload: float = 0.0
    model_payload: float = 0.0

    def scaled(self, factor: float) -> Brought:
        """Return this of a model so many times as large, its tensors as many as before."""
        return Brought(
            **{
                f.name: getattr(self, f.name) * (1.0 if f.name in _PER_TENSOR else factor)
                for f in fields(Brought)
            }
        )

    @classmethod
    def mean(cls, several: Sequence[Brought]) -> Brought:
        """Return the mean of some."""
        return cls(
            **{f.name: float(np.mean([getattr(b, f.name) for b in several])) for f in fields(cls)}
        )


#: What a larger model has as many of.
_PER_TENSOR = {
    "tensors",
    "map_parts",
    "hash_parts",
    "segments",
    "artifacts",
    "artifact_payload",
    "tensor_payload",
    "model_payload",
}


@dataclass(frozen=True, slots=True)
class Family:
    """A family in numbers: its first model, and what each further one brings on the average.

    Attributes
    ----------
    owners
        How many distinct blocks have so many owners, deltas and private ones included.
    base_reads
        Pages of the first model that a further one reads.
    """

    name: str
    models: int
    first: Brought
    further: Brought
    base_reads: float
    owners: Mapping[int, int] = field(default_factory=dict)


def family_of(store: pydedup.Store, prefix: str, name: str | None = None) -> Family:
    """Count what the models of a store whose names begin with ``prefix`` brought, in their order.

    Needs two of them at least, in a store where no vacuum has repacked.
    """
    adapter = store._adapter
    catalog = Catalog(adapter)
    rows = [row for row in adapter.models() if row.name.startswith(prefix)]
    if len(rows) < 2:
        raise SystemExit(f"{store.url} has {len(rows)} models called {prefix}...; two are needed")
    segments = _segments(adapter)
    seen_pages: set[int] = set()
    seen_places = np.empty(0, np.int64)
    owners: Counter[int] = Counter()
    brought, base_reads, first_pages = [], [], set[int]()
    for row in rows:
        model = catalog.of_row(row)
        places, deltas = _places(model)
        reads = {page: size for _, page, _, size in adapter.model_pages(row.id)}
        is_new = ~np.isin(places, seen_places)
        seen_places = np.union1d(seen_places, places)
        owners.update(places.tolist())
        pages = sorted(set(reads) - seen_pages)
        seen_pages.update(reads)
        if not brought:
            first_pages = set(pages)
        else:
            base_reads.append(len(first_pages & set(reads)))
        brought.append(
            _brought(adapter, row, model, segments, places, is_new, deltas, pages, len(reads))
        )
    return Family(
        name=name or prefix,
        models=len(rows),
        first=brought[0],
        further=Brought.mean(brought[1:]),
        base_reads=float(np.mean(base_reads)),
        owners=dict(sorted(Counter(owners.values()).items())),
    )


def _places(model: StoredModel) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct places that a model names or needs as bases, and those of deltas."""
    named, deltas, bases = [], [], []
    for block_map in model.block_maps():
        here = block_places(block_map.page_ids, block_map.slots)
        base = base_places(block_map)
        named.append(here)
        deltas.append(here[base >= 0])
        bases.append(base[base >= 0])
    return np.unique(np.concatenate(named)), np.unique(np.concatenate(deltas))


def _segments(adapter: Adapter) -> dict[int, tuple[int, int, int]]:
    """Return rows, bytes and blocks of each segment, by the first page that it covers."""
    found = {}
    for segment in read_segments(adapter):
        rows = list(adapter.signatures_of(segment.rows))
        indexed = sum(len(L2LSH.load(payload)) for _, grp, payload in rows if grp)
        if len(segment.page_ids):
            page = int(segment.page_ids[0])
            found[page] = len(rows), sum(len(payload) for _, _, payload in rows), indexed
    return found


def _brought(
    adapter: Adapter,
    row: ModelRow,
    model: StoredModel,
    segments: Mapping[int, tuple[int, int, int]],
    places: NDArray[np.int64],
    is_new: NDArray[np.bool_],
    deltas: NDArray[np.int64],
    pages: Sequence[int],
    reads: int,
) -> Brought:
    maps = [payload for _, payload in adapter.block_maps(row.id)]
    hashes = [part for _, part in adapter.source_hashes(row.id, 0, len(model.tensors))]
    artifacts = [adapter.artifact(row.id, name) or b"" for name, _ in adapter.artifacts(row.id)]
    new = places[is_new & np.isin(split_places(places)[0], pages)]
    covering = [segments[page] for page in pages if page in segments]
    tensors = adapter.tensors(row.id)
    return Brought(
        logical=row.logical_bytes,
        tensors=len(tensors),
        blocks=sum(block_map.grid.count for block_map in model.block_maps()),
        new_blocks=len(new),
        new_deltas=int(np.isin(new, deltas).sum()),
        pages=len(pages),
        page_payload=sum(r.payload_bytes for r in adapter.page_rows(ids=pages)) if pages else 0,
        reads=reads,
        map_parts=len(maps),
        map_payload=sum(map(len, maps)),
        hash_parts=len(hashes),
        hash_payload=sum(map(len, hashes)),
        segments=sum(rows for rows, _, _ in covering),
        signature_payload=sum(size for _, size, _ in covering),
        indexed=sum(count for _, _, count in covering),
        artifacts=len(artifacts),
        artifact_payload=sum(map(len, artifacts)),
        tensor_payload=sum(
            len(t.name) + len(t.dtype) + len(t.shape) + len(t.block_shape) for t in tensors
        ),
        model_payload=sum(
            len(text) for text in (row.name, row.version, row.policy, row.certificate, row.metadata)
        )
        + len(row.digest),
    )


def index_bytes(store: pydedup.Store) -> tuple[int, int]:
    """Return what the whole similarity index takes in memory, and how many blocks are in it.

    As an add holds it that asks for every kind of block: one index per kind, of all segments.
    """
    adapter = store._adapter
    merged: dict[int, L2LSH] = {}
    for segment in read_segments(adapter):
        for _, grp, payload in adapter.signatures_of(segment.rows):
            if grp:
                piece = L2LSH.load(payload)
                if grp in merged:
                    merged[grp].merge(piece)
                else:
                    merged[grp] = L2LSH(piece.block_shape, piece.dtype)
                    merged[grp].merge(piece)
    return sum(i.memory_bytes for i in merged.values()), sum(map(len, merged.values()))
