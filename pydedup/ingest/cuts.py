# SPDX-License-Identifier: Apache-2.0
"""How the tensors of a model are cut: as those of the store that they may follow from.

Only blocks of one shape share anything. What a model follows from may have been cut by an older
release, which cut otherwise, or into blocks that its user asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydedup.adapter import ModelRow
from pydedup.blocks import default_grid
from pydedup.catalog import grid_of
from pydedup.formats.base import TensorEntry
from pydedup.ingest.candidates import can_be_delta
from pydedup.ingest.plan import Request
from pydedup.ingest.stored_models import StoredModels, kind_of
from pydedup.layout import MOST_BLOCK_BYTES
from pydedup.types import TensorInfo

__all__ = ["cut_as_stored"]

# Models that are looked at beside the version before, each of another name: of strangers, all.
_OTHERS = 8
# What shares most of its blocks has about as many bytes: within this factor.
_ABOUT = 8


def cut_as_stored(requests: Sequence[Request], models: StoredModels) -> None:
    """Settle how the models of an add are cut, once: one that begins anew cuts them alike.

    A tensor is cut as that of its name and shape in the version before. If there is none, it is cut
    by default, unless all such tensors of the newest models, and of the versions before of others
    of this add, are cut otherwise: then as in the newest of them.
    """
    asking = [one for one in requests if one.block_shape is None and one.cuts is None]
    before: dict[str, list[ModelRow]] = {}
    for request in asking:
        if request.name not in before:
            before[request.name] = models.version_before(request.name)
    for request in asking:
        request.cuts = _Cuts(request, before, models).all()


class _Cuts:
    """What the tensors of one model are cut as, where that is not by default."""

    def __init__(
        self, request: Request, before: Mapping[str, list[ModelRow]], models: StoredModels
    ) -> None:
        self._request = request
        self._before = before
        self._models = models

    def all(self) -> dict[str, tuple[int, int]]:
        """Return shapes of blocks by the name of the tensor."""
        tied = list(self._tied())
        own = self._before[self._request.name]
        followed = [next(self._alike(own, entry, names), None) for entry, names in tied]
        others: list[ModelRow] = []
        pairs = list(zip(tied, followed, strict=True))
        if any(info is None and self._has_several_blocks(entry) for (entry, _), info in pairs):
            others = self._others()
        cuts: dict[str, tuple[int, int]] = {}
        for (entry, names), info in pairs:
            found = self._of_all(others, entry, names) if info is None else info
            if found is not None and not _is_default(found) and _fits(found, entry):
                cuts.update(dict.fromkeys(names, found.block_shape))
        return cuts

    def _tied(self) -> Iterator[tuple[TensorEntry, list[str]]]:
        """Yield tensors with all of their names: what is tied to one has its blocks."""
        tied: dict[str, tuple[TensorEntry, list[str]]] = {}
        for entry, twin in self._request.distinct_entries():
            first = entry if twin is None else twin
            tied.setdefault(first.name, (first, []))[1].append(entry.name)
        yield from tied.values()

    def _others(self) -> list[ModelRow]:
        """Return models of other names that may be relatives, newest first."""
        before, nbytes = self._before, self._request.logical_bytes
        newest: dict[str, ModelRow] = {}
        for row in self._models.newest():
            if nbytes <= row.logical_bytes * _ABOUT and row.logical_bytes <= nbytes * _ABOUT:
                newest.setdefault(row.name, row)
        rows = [row for name, row in newest.items() if name not in before][:_OTHERS]
        return rows + [row for name in before if name != self._request.name for row in before[name]]

    def _of_all(
        self, rows: Sequence[ModelRow], entry: TensorEntry, names: Sequence[str]
    ) -> TensorInfo | None:
        """Return the first tensor that is alike, if none is cut by default."""
        first = None
        for info in self._alike(rows, entry, names):
            if _is_default(info):
                return None
            first = first or info
        return first if first is not None and can_be_delta(first.block_shape) else None

    def _alike(
        self, rows: Sequence[ModelRow], entry: TensorEntry, names: Sequence[str]
    ) -> Iterator[TensorInfo]:
        """Yield of each model a tensor that has one of the names, the shape and such a matrix."""
        kind, axes = kind_of(entry), self._request.axes_of(entry)
        for row in rows:
            model = self._models.tensors_of(row)
            by_name = None if model is None else model.tensors.get(kind)
            if by_name is None:
                continue
            found = (info for info in map(by_name.get, names) if info and info.row_axes == axes)
            yield from list(found)[:1]

    def _has_several_blocks(self, entry: TensorEntry) -> bool:
        axes = self._request.axes_of(entry)
        return default_grid(entry.shape, entry.dtype, axes).count > 1


def _is_default(info: TensorInfo) -> bool:
    return grid_of(info) == default_grid(info.shape, info.dtype, info.row_axes)


def _fits(info: TensorInfo, entry: TensorEntry) -> bool:
    """Whether a page holds such blocks of an entry: the other may have another dtype."""
    grid = grid_of(info)
    elements = min(grid.rows, grid.block_rows) * min(grid.cols, grid.block_cols)
    return elements * entry.dtype.itemsize <= MOST_BLOCK_BYTES
