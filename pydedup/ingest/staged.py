# SPDX-License-Identifier: Apache-2.0
"""Models on their way in: what `pydedup.ingest.write` stages, after matching."""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import STAGING, Adapter, ModelRow
from pydedup.blocks import BlockGrid, matrix_shape
from pydedup.catalog import ModelDigest, tensors_digest
from pydedup.certificates import ADDRESS, ARTIFACTS, METADATA, TENSORS, artifact_digest
from pydedup.errors import DuplicateError, FormatError
from pydedup.formats import ties
from pydedup.formats.base import Artifact, ModelSource, TensorEntry
from pydedup.graph import Graph
from pydedup.hashing import digest_bytes
from pydedup.ingest.places import BlockReader
from pydedup.ingest.plan import Request
from pydedup.ingest.spool import NO_BASE
from pydedup.layout import joined
from pydedup.types import GRAPH_ARTIFACT, TensorInfo

__all__ = ["MatchedModel", "MatchedTensor", "StagedModel", "artifacts_of"]


def artifacts_of(source: ModelSource, graph: Graph | None) -> Iterator[Artifact]:
    """Yield what belongs to a model besides tensors: of its source, its ties and its graph."""
    yield from source.artifacts()
    tied = ties.record(source.entries)
    if tied is not None:
        yield tied
    if graph is not None:
        yield Artifact(GRAPH_ARTIFACT, "application/json", graph.to_json().encode())


@dataclass(slots=True)
class MatchedTensor:
    """One tensor after matching. ``references`` and ``digests`` are per block (match.py)."""

    entry: TensorEntry
    grid: BlockGrid
    references: NDArray[np.int64]
    digests: NDArray[np.uint64]
    #: A bound on the relative L2 difference between a block and what is stored for it.
    largest_error: float = 0.0

    @property
    def info(self) -> TensorInfo:
        """What is recorded of it."""
        entry = self.entry
        is_stack = self.grid.rows != matrix_shape(entry.shape, 1)[0]
        axes = len(entry.shape) - 1 if is_stack else 1
        return TensorInfo(entry.name, entry.dtype, entry.shape, self.grid.block_shape, axes)


class StagedModel(abc.ABC):
    """One model on its way in.

    Attributes
    ----------
    tensors
        Its tensors, in order.
    artifacts_in_blocks
        Its large artifacts, as tensors of bytes (artifacts.py).
    model_id
        Its id once it is staged, 0 before.
    """

    tensors: list[MatchedTensor]
    artifacts_in_blocks: list[MatchedTensor]
    model_id: int
    #: By name, of artifacts that are kept in blocks: what is recorded of their chunks.
    _chunks: dict[str, bytes]

    @property
    def in_blocks(self) -> list[MatchedTensor]:
        """All that it has blocks of, by ordinal."""
        return [*self.tensors, *self.artifacts_in_blocks]

    @property
    @abc.abstractmethod
    def address(self) -> str:
        """``name@version``."""

    @property
    @abc.abstractmethod
    def metadata(self) -> str:
        """Its metadata as JSON."""

    @property
    @abc.abstractmethod
    def logical_bytes(self) -> int:
        """Bytes of all its tensors."""

    @abc.abstractmethod
    def row(self) -> ModelRow:
        """Return its row, as it is to be staged."""

    @abc.abstractmethod
    def artifacts(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, media type, payload) of what belongs to it besides tensors.

        Of those in blocks, the payload is what lengths their chunks have.
        """

    @abc.abstractmethod
    def note_artifacts(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, payload) of what belongs to it besides tensors and is in no blocks yet."""

    def keep_in_blocks(self, artifact: MatchedTensor, chunks: bytes) -> None:
        """Note that an artifact is kept in blocks, and what is recorded of its chunks."""
        self.artifacts_in_blocks.append(artifact)
        self._chunks[artifact.entry.name] = chunks

    @property
    def replaces(self) -> int:
        """The id of the live model whose place it takes, 0 for none."""
        return 0

    def renumber(self, adapter: Adapter) -> bool:
        """Take another version if others took its own, and return whether that was allowed."""
        return False

    def created_at(self) -> float:
        """Return when it was added, as it is being published."""
        return time.time()

    def settle(self, adapter: Adapter) -> None:
        """Do what must be done in the transaction that publishes it, before it is live."""
        self.refuse_alias(adapter)

    def refuse_alias(self, adapter: Adapter) -> None:
        """Raise DuplicateError when its version became an alias since it was found to be free."""
        name, _, version = self.address.partition("@")
        if any(alias == version for _, alias, _ in adapter.aliases(name)):
            raise DuplicateError(
                f"{adapter.url} has an alias {self.address} since a moment ago; run it again"
            )

    def aliases(self, adapter: Adapter) -> list[str]:
        """Return the aliases that point at it once it was settled."""
        return []

    def references(self, reader: BlockReader | None = None) -> NDArray[np.int64]:
        """Return the references of all blocks; with ``reader``, those of the bases behind them."""
        references = joined(part.references for part in self.in_blocks)
        if reader is None:
            return references
        bases = reader.bases_of(references)
        return np.concatenate([references, bases[bases != NO_BASE]])


@dataclass(slots=True)
class MatchedModel(StagedModel):
    """One model of an add after matching."""

    request: Request
    tensors: list[MatchedTensor] = field(default_factory=list)
    artifacts_in_blocks: list[MatchedTensor] = field(default_factory=list)
    #: What the search of a policy found out.
    evidence: Mapping[str, Any] = field(default_factory=dict)
    model_id: int = 0
    #: By name, sizes and digests of its artifacts, as they were matched, and of those in blocks
    #: what is recorded of their chunks.
    artifact_sizes: dict[str, int] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _chunks: dict[str, bytes] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """``name@version``."""
        return self.request.address

    @property
    def metadata(self) -> str:
        """Its metadata as JSON."""
        return self.request.metadata_json()

    @property
    def logical_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.request.logical_bytes

    def renumber(self, adapter: Adapter) -> bool:
        """Take another version if others took its own, and return whether that was allowed."""
        return self.request.renumber(adapter)

    def row(self) -> ModelRow:
        """Return its row, as it is to be staged."""
        request = self.request
        return ModelRow(
            id=0,
            name=request.name,
            version=request.version,
            state=STAGING,
            created_at=time.time(),
            policy=request.policy.name,
            certificate=json.dumps(self._recorded_certificate()),
            metadata=self.metadata,
            logical_bytes=self.logical_bytes,
            digest=self.digest(),
        )

    def artifacts(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, media type, payload) of what belongs to it besides tensors.

        Read anew, as they may be large. Raises FormatError for what is not what it was when it was
        matched.
        """
        for artifact in artifacts_of(self.request.source, self.request.graph):
            name, payload = artifact.name, artifact.payload
            if self._digests.get(name) != artifact_digest(payload):
                raise FormatError(f"{name!r} changed while {self.address} was added; add it again")
            yield name, artifact.media_type, self._chunks.get(name, payload)

    @property
    def artifact_bytes_in_rows(self) -> int:
        """Size of its artifacts that are not kept in blocks."""
        return sum(size for name, size in self.artifact_sizes.items() if name not in self._chunks)

    def note_artifacts(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, payload) of what belongs to it besides tensors, and note what these are."""
        for artifact in artifacts_of(self.request.source, self.request.graph):
            name, payload = artifact.name, artifact.payload
            self._digests[name], self.artifact_sizes[name] = artifact_digest(payload), len(payload)
            yield name, payload

    def _recorded_certificate(self) -> dict[str, Any]:
        """Return its certificate with what tells damage of its row, of artifacts and tensors."""
        certificate = {
            **self.certificate(),
            ADDRESS: self.address,
            METADATA: artifact_digest(self.metadata.encode()),
            TENSORS: tensors_digest(self._infos()),
        }
        return {**certificate, ARTIFACTS: self._digests} if self._digests else certificate

    def _infos(self) -> list[TensorInfo]:
        """Return its tensors as they are recorded."""
        return [tensor.info for tensor in self.tensors]

    def certificate(self) -> dict[str, Any]:
        """Return what is guaranteed, and what was measured of it."""
        policy = self.request.policy
        errors = {t.entry.name: t.largest_error for t in self.tensors if t.largest_error > 0}
        certificate = {
            "policy": policy.name,
            **policy.parameters(),
            **self.evidence,
            # What a search chose may differ though no relative error shows it.
            "same_bits": bool(policy.max_rel_error == 0) and not self.evidence,
            "largest_block_error": max(errors.values(), default=0.0),
        }
        return {**certificate, "tensor_errors": errors} if errors else certificate

    def digest(self) -> bytes:
        """Return 16 bytes that name the content: names, dtypes, shapes and block digests."""
        content = ModelDigest()
        for info, tensor in zip(self._infos(), self.tensors, strict=True):
            content.add(info, digest_bytes(tensor.digests))
        return content.digest()
