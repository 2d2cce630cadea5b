# SPDX-License-Identifier: Apache-2.0
"""Models on their way to another store, and the aliases that point at them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import STAGING, Adapter, ModelRow
from pydedup.catalog import StoredModel, aliases_of, artifact_digests, point_alias, version_of
from pydedup.errors import DuplicateError
from pydedup.formats.base import TensorEntry
from pydedup.ingest.staged import MatchedTensor, StagedModel
from pydedup.layout import places_of
from pydedup.maintenance.versions import delete_models
from pydedup.moving.plan import Item
from pydedup.moving.source import SourceModel

__all__ = ["MovedModel", "matched_parts", "set_aliases"]


@dataclass(slots=True)
class MovedModel(StagedModel):
    """A model on its way to the destination."""

    item: Item
    source: StoredModel
    tensors: list[MatchedTensor]
    artifacts_in_blocks: list[MatchedTensor]
    model_id: int = 0
    #: Of artifacts that the source has in rows: what is recorded of their chunks.
    _chunks: dict[str, bytes] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """``name@version``."""
        return self.item.address

    @property
    def metadata(self) -> str:
        """Its metadata as JSON."""
        return self.item.row.metadata

    @property
    def logical_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.item.row.logical_bytes

    def row(self) -> ModelRow:
        """Return its row, as it is to be staged."""
        return replace(self.item.row, id=0, state=STAGING)

    def artifacts(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, media type, payload) of what belongs to it besides tensors.

        Raises NotFoundError when it was removed: then some of that may be gone already.
        """
        for name, media_type, recorded in self.source.artifacts_in_rows():
            yield name, media_type, self._chunks.get(name, recorded)
        self.source.check_live()

    def note_artifacts(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, payload) of what the source has in rows, as older stores have all of it.

        Not of what it has no hash of: of what is in blocks, that tells whether it is the same.
        """
        in_blocks = {part.entry.name for part in self.artifacts_in_blocks}
        for name in sorted(artifact_digests(self.item.row).keys() - in_blocks):
            payload = self.source.artifact(name)
            if payload is not None:
                yield name, payload

    @property
    def replaces(self) -> int:
        """The id of the model whose place it takes, 0 for none."""
        return self.item.replaces

    def created_at(self) -> float:
        """Return when the source got it."""
        return self.item.row.created_at

    def settle(self, adapter: Adapter) -> None:
        """Take the place of another model where that was asked for, and take the aliases."""
        name = self.item.row.name
        moved: list[str] = []
        replaces = self.item.replaces
        if replaces and adapter.model(replaces) is not None:
            moved = aliases_of(adapter, name).get(replaces, [])
            delete_models(adapter, [replaces])
        self.refuse_alias(adapter)
        _point(adapter, self.item, self.model_id, list(dict.fromkeys([*moved, *self.item.aliases])))

    def aliases(self, adapter: Adapter) -> list[str]:
        """Return the aliases that point at it once it was settled."""
        return aliases_of(adapter, self.item.row.name).get(self.model_id, [])


def matched_parts(model: SourceModel, references: NDArray[np.int64]) -> list[MatchedTensor]:
    """Return all that a model has in blocks, by the references of its places."""
    tensors = []
    for info, block_map, digests in zip(
        model.stored.in_blocks, model.maps, model.digests, strict=True
    ):
        at = np.searchsorted(model.places, places_of(block_map))
        entry = TensorEntry(info.name, info.dtype, info.shape, info.name)
        tensors.append(MatchedTensor(entry, block_map.grid, references[at], digests))
    return tensors


def set_aliases(target: Adapter, items: Sequence[Item]) -> int:
    """Give the aliases that are not there yet to models that were; returns how many all have."""
    wanted = [item for item in items if item.aliases and item.status == "there"]
    if wanted:
        with target.transaction():
            target.bump_epoch()  # nobody removes a version meanwhile
            ids = {(row.name, row.version): row.id for row in target.models()}
            for item in wanted:
                model_id = ids.get((item.row.name, item.row.version))
                if model_id:
                    _point(target, item, model_id, item.aliases)
    return sum(len(item.aliases) for item in items if item.status in ("there", "copy", "replace"))


def _point(target: Adapter, item: Item, model_id: int, aliases: Sequence[str]) -> None:
    """Point aliases at a model, unless somebody gave them another meaning since the plan."""
    if not aliases:
        return
    name = item.row.name
    pointed = {alias: model for _, alias, model in target.aliases(name)}
    for alias in aliases:
        elsewhere = pointed.get(alias, model_id) != model_id
        is_version = version_of(target, name, alias) is not None
        if is_version or (elsewhere and not item.moves_aliases):
            what = "a version" if is_version else "an alias of another version"
            raise DuplicateError(
                f"{target.url} has {name}@{alias} as {what} since a moment ago; run it again"
            )
        point_alias(target, name, alias, model_id)
