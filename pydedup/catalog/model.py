# SPDX-License-Identifier: Apache-2.0
"""One published model: its tensors, where their blocks are, and what came with them.

Thread-safe. Rows of a published model never change, but a vacuum may move its blocks: whoever
misses a page calls `StoredModel.refresh` and reads the block map again, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pydedup import matmul
from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import page_copies
from pydedup.blocks import BlockGrid, BlockMap, matrix_shape
from pydedup.catalog.ahead import ModelsAhead
from pydedup.catalog.chunks import joined_chunks
from pydedup.catalog.digests import ModelDigest, map_digest, tensors_digest
from pydedup.catalog.pages import expect_pages, recorded_pages, tags_in
from pydedup.catalog.parsed import ParsedMaps, parsed_graph
from pydedup.catalog.rows import (
    ARTIFACT_DTYPE,
    artifact_digests,
    promised,
    recorded_certificate,
    tensor_info,
)
from pydedup.certificates import (
    ADDRESS,
    MAPS,
    PAGES,
    TENSORS,
    artifact_digest,
    error_of,
    keeps_bits,
)
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError
from pydedup.graph import Graph
from pydedup.pool import PagePool
from pydedup.text import did_you_mean
from pydedup.types import GRAPH_ARTIFACT, TensorInfo

__all__ = ["SourceHashes", "StoredModel", "grid_of"]

_HASHES_PER_READ: Final = 16 * 1024
#: Block maps that are read one by one: whoever asks for more of a model goes through it.
_READ_SINGLY: Final = 4
# What is remembered of a model, about: of itself, of a tensor, and of a block that is a delta.
_MODEL_BYTES, _TENSOR_BYTES, _BLOCK_BYTES = 6144, 1024, 24
#: Pages through which artifacts are read where there is no pool.
_FEW_PAGES_BYTES: Final = 8 << 20
_MAP_ADVICE: Final = "remove the model and add it again, or restore a backup"


@lru_cache(maxsize=8192)  # models of a family have the same ones
def grid_of(info: TensorInfo) -> BlockGrid:
    """Return how the matrix of a tensor is cut into blocks."""
    return BlockGrid(*matrix_shape(info.shape, info.row_axes), *info.block_shape)


class StoredModel:
    """One published model: its tensors and where their blocks are.

    ``pool`` is told the tags of the pages that it reads, before their places are; artifacts are
    read through it, or through a few pages of their own. ``parsed`` is for whoever reads the block
    maps of several models, ``ahead`` where their order is known.

    Attributes
    ----------
    in_blocks
        All that it has blocks of, by ordinal: its tensors, then large artifacts, as tensors of
        bytes that are called as these.
    tensors
        Its tensors.

    Raises NotFoundError when it was removed, CorruptStoreError when what is recorded of a tensor
    cannot be read.
    """

    def __init__(
        self,
        adapter: Adapter,
        row: ModelRow,
        pool: PagePool | None = None,
        parsed: ParsedMaps | None = None,
        ahead: ModelsAhead | None = None,
    ) -> None:
        self.row = row
        self._adapter = adapter
        #: What its rows are first read from.
        self._source = adapter if ahead is None else ahead
        self._pool = pool
        parsed = parsed if ahead is None else ahead.parsed
        self._parse_parts = BlockMap.from_parts if parsed is None else parsed.parse
        self._maps: dict[int, BlockMap] = {}
        #: Parts of all maps, but for those that were taken; None as long as they are read singly.
        self._parts: dict[int, list[bytes]] | None = None
        self._graph: Graph | None = None
        self._graph_is_known = False  # also that there is none
        self._layers_key: object = None
        #: What those who predict with it keep of it, by a name of theirs.
        self.memo: dict[str, Any] = {}
        #: How often its block maps were forgotten: its pages are the same as long as this is.
        self.state = 0
        added_as = self._recorded_digest(ADDRESS)
        if added_as not in (None, self.address):
            raise CorruptStoreError(
                f"{self.address} was added as {added_as}: names of models, or their ids, are "
                "exchanged; restore a backup"
            )
        rows = self._source.tensors(row.id)
        self.in_blocks = tuple(
            tensor_info(self.address, ordinal, tensor) for ordinal, tensor in enumerate(rows)
        )
        if not self.in_blocks:
            self.check_live()
        count = sum(tensor.dtype != ARTIFACT_DTYPE for tensor in rows)
        self.tensors = self.in_blocks[:count]
        found = sum(info.nbytes for info in self.tensors)
        if found != row.logical_bytes:
            raise CorruptStoreError(
                f"{self.address} has tensors of {found:,} bytes where {row.logical_bytes:,} are "
                "recorded: rows of them are missing; restore a backup"
            )
        #: What its block maps were recorded to be; None where that is not known.
        self._map_digests = self._recorded_digest(MAPS)
        if not self._has_its_tensors():
            raise CorruptStoreError(
                f"{self.address}: its tensors are not those that it was added with; restore a "
                "backup"
            )
        self._ordinal = {info.name: ordinal for ordinal, info in enumerate(self.tensors)}
        self._artifact_at = {
            info.name: ordinal for ordinal, info in enumerate(self.in_blocks) if ordinal >= count
        }
        if pool is not None:
            expect_pages(pool, adapter, self.page_tags())

    def _has_its_tensors(self) -> bool:
        """Whether its tensors are those that it was added with, as far as that is known."""
        try:
            wanted = self._recorded.get(TENSORS)
        except CorruptStoreError:  # the digest in its row names them, too, and all of its source
            return SourceHashes(self._adapter, self).are_as_added()
        return wanted is None or wanted == tensors_digest(self.tensors)

    @property
    def address(self) -> str:
        """``name@version``."""
        return self.row.address

    @cached_property
    def memory_bytes(self) -> int:
        """About how many bytes are remembered of it once it was read whole."""
        blocks = sum(grid_of(info).count for info in self.in_blocks)
        texts = len(self.row.certificate) + len(self.row.metadata)
        tensors = _TENSOR_BYTES * len(self.in_blocks)
        return _MODEL_BYTES + 2 * texts + tensors + _BLOCK_BYTES * blocks

    def check_live(self) -> ModelRow:
        """Return its row as it is now.

        Raises NotFoundError when it was removed meanwhile, with all that was to be read of it.
        """
        row = self._adapter.model(self.row.id)
        if row is None:
            raise NotFoundError(f"{self.address} was removed from the store")
        return row

    @cached_property
    def certificate(self) -> dict[str, Any]:
        """What was guaranteed when it was added, and what was measured of it."""
        return promised(self._recorded)

    @property
    def keeps_bits(self) -> bool:
        """Whether it is stored to the bit, by promise; not where the certificate is damaged."""
        try:
            return keeps_bits(self.row.policy, self.certificate)
        except CorruptStoreError:
            return False

    def error_of(self, name: str) -> float:
        """Return a bound on the relative L2 difference of its blocks to what is stored for them."""
        return error_of(self.certificate, name)

    def tensor(self, name: str) -> TensorInfo:
        """Return one tensor. Raises NotFoundError, ArgumentError for what is no name."""
        if not isinstance(name, str):
            raise ArgumentError(f"a tensor's name must be a string, not {name!r}")
        ordinal = self._ordinal.get(name)
        if ordinal is None:
            hint = did_you_mean(name, list(self._ordinal))
            raise NotFoundError(f"{self.address} has no tensor {name!r}{hint}")
        return self.tensors[ordinal]

    def block_map(self, name: str) -> BlockMap:
        """Return where the blocks of one tensor are. Raises NotFoundError, CorruptStoreError."""
        self.tensor(name)
        return self.block_map_at(self._ordinal[name])

    def block_map_at(self, ordinal: int) -> BlockMap:
        """Return where the blocks of what has an ordinal are. Raises as `block_map` does."""
        block_map = self._maps.get(ordinal)
        if block_map is None:
            block_map = self._parse(ordinal, self._parts_of(ordinal))
        return block_map

    def _parts_of(self, ordinal: int) -> Sequence[bytes]:
        all_parts = self._parts  # which another thread may refresh
        if all_parts is None and len(self._maps) >= _READ_SINGLY:
            all_parts = self._parts = self._all_parts()
        parts = None if all_parts is None else all_parts.pop(ordinal, None)
        return self._adapter.block_map(self.row.id, ordinal) if parts is None else parts

    def _all_parts(self) -> dict[int, list[bytes]]:
        parts: dict[int, list[bytes]] = {}
        for ordinal, part in self._source.block_maps(self.row.id):
            parts.setdefault(ordinal, []).append(part)
        return parts

    def block_maps(self) -> list[BlockMap]:
        """Return all block maps, those of `in_blocks`; all that miss are read at once."""
        maps = dict(self._maps)  # which another thread may refresh
        if len(maps) < len(self.in_blocks):
            parts = self._all_parts()
            for ordinal in range(len(self.in_blocks)):
                if ordinal not in maps:
                    maps[ordinal] = self._parse(ordinal, parts.get(ordinal, []))
        return [maps[ordinal] for ordinal in range(len(self.in_blocks))]

    def _parse(self, ordinal: int, parts: Sequence[bytes]) -> BlockMap:
        block_map = self._parsed(ordinal, parts)
        if not _is_recorded(self._map_digests, ordinal, parts):
            block_map = self._parsed(ordinal, self._recorded_parts(ordinal, parts))
        self._maps[ordinal] = block_map
        return block_map

    def _parsed(self, ordinal: int, parts: Sequence[bytes]) -> BlockMap:
        info = self.in_blocks[ordinal]
        try:
            return self._parse_parts(parts, grid_of(info), info.dtype)
        except CorruptStoreError as exc:
            if not self._adapter.tensors(self.row.id):
                raise NotFoundError(f"{self.address} was removed from the store") from exc
            raise CorruptStoreError(f"{self.where(ordinal)}: {exc}; {_MAP_ADVICE}") from exc

    def _recorded_parts(self, ordinal: int, parts: Sequence[bytes]) -> Sequence[bytes]:
        """Return the parts of a block map that are recorded, given others.

        A vacuum may have moved blocks since it was read what is. Raises CorruptStoreError where
        none did.
        """
        known = self._map_digests
        while True:
            now = recorded_certificate(self.check_live())
            if self._pool is not None:
                expect_pages(self._pool, self._adapter, tags_in(now.get(PAGES)))
            self._map_digests = recorded = now.get(MAPS)
            if _is_recorded(recorded, ordinal, parts):
                return parts
            if recorded == known:
                raise CorruptStoreError(
                    f"{self.where(ordinal)}: its block map is not the one that was recorded; "
                    f"{_MAP_ADVICE}"
                )
            known, parts = recorded, self._adapter.block_map(self.row.id, ordinal)

    def where(self, ordinal: int) -> str:
        """Return what messages call the tensor, or artifact, with an ordinal."""
        kind = "tensor" if ordinal < len(self.tensors) else "artifact"
        return f"{self.address}, {kind} {self.in_blocks[ordinal].name!r}"

    def refresh(self) -> None:
        """Forget the block maps: a vacuum has moved blocks."""
        self._maps.clear()
        self._parts = None
        self.state += 1

    @property
    def layers_key(self) -> object:
        """Equal for models with the same graph, and tensors of the same names and shapes."""
        if self._layers_key is None:
            graph = self.graph()
            text = "" if graph is None else graph.to_json()
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()
            self._layers_key = digest, self.tensors
        return self._layers_key

    def page_tags(self) -> dict[int, bytes]:
        """Return the tags of its pages, as recorded; none where that is not known."""
        return tags_in(self._recorded_digest(PAGES))

    def page_ids(self) -> NDArray[np.int64]:
        """Return the pages it reads, those of bases included."""
        return np.array(
            [page for _, page, _, _ in self._adapter.model_pages(self.row.id)], np.int64
        )

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        return recorded_certificate(self.row)

    def _recorded_digest(self, name: str) -> object:
        """Return what is recorded of it beside the certificate; ``None`` where that is damaged."""
        try:
            return self._recorded.get(name)
        except CorruptStoreError:
            return None

    @cached_property
    def _artifact_digests(self) -> Mapping[str, object]:
        return artifact_digests(self.row)

    def artifact_names(self) -> list[str]:
        """Return the names of what came with it beside tensors; also of what is lost."""
        return sorted(self._media_types())

    def artifact(self, name: str) -> bytes | None:
        """Return what came with it under a name. Raises CorruptStoreError where that is damaged."""
        return self._artifact(name)[1]

    def _artifact(self, name: str) -> tuple[bytes | None, bytes | None]:
        """Return what the row of an artifact has, and the artifact."""
        recorded = payload = self._adapter.artifact(self.row.id, name)
        if recorded is not None and name in self._artifact_at:
            payload = joined_chunks(recorded, self._chunks_at(self._artifact_at[name]))
        wanted = self._artifact_digests.get(name)
        is_other = wanted is not None and (payload is None or artifact_digest(payload) != wanted)
        if is_other or (payload is None and recorded is not None):
            self.check_live()
            what = "lost" if recorded is None else "not what it was added with"
            raise CorruptStoreError(f"{self.address}: its {name!r} is {what}; restore a backup")
        return recorded, payload

    def _chunks_at(self, ordinal: int) -> NDArray[Any]:
        """Return an artifact that is kept in blocks; the map is read again once, as for tensors."""
        pool = self._pool
        if pool is None:
            copies = page_copies(self._adapter)
            pool = PagePool(recorded_pages(self._adapter), _FEW_PAGES_BYTES, copies=copies)
        try:
            return matmul.read(self.block_map_at(ordinal), pool)
        except CorruptStoreError:  # a vacuum, or a repair, may have moved blocks
            self.check_live()
            self.refresh()
            return matmul.read(self.block_map_at(ordinal), pool)

    def artifacts_in_rows(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, media type, payload) of all that came with it, as rows have them.

        Of what is in blocks, that is the lengths of its chunks; see `artifact`.
        """
        for name, media_type in sorted(self._media_types().items()):
            recorded, _ = self._artifact(name)
            if recorded is not None:
                yield name, media_type, recorded

    def _media_types(self) -> dict[str, str]:
        """Return the media types of its artifacts by name, empty for those that are lost."""
        lost = dict.fromkeys(self._artifact_digests, "")
        return {**lost, **dict(self._adapter.artifacts(self.row.id))}

    def graph(self) -> Graph | None:
        """Return its graph, if the store knows it. Raises CorruptStoreError where it is damaged."""
        if not self._graph_is_known:
            payload = self.artifact(GRAPH_ARTIFACT)
            if payload is not None:
                try:
                    self._graph = parsed_graph(payload)
                except ArgumentError as exc:
                    raise CorruptStoreError(
                        f"the graph of {self.address} cannot be read: {exc}"
                    ) from exc
            self._graph_is_known = True
        return self._graph


def _is_recorded(digests: object, ordinal: int, parts: Sequence[bytes]) -> bool:
    """Whether the parts of a block map are those of which a certificate has the digests, if any."""
    if digests is None:
        return True
    digest = map_digest(parts)
    at = ordinal * len(digest)
    return str(digests)[at : at + len(digest)] == digest


class SourceHashes:
    """The hashes of the blocks that a model was added with, read once, for several tensors each.

    Memory: 16 bytes for each block that was asked about.
    """

    def __init__(self, adapter: Adapter, model: StoredModel) -> None:
        self._adapter = adapter
        self._model = model
        self._read: dict[int, bytes] = {}

    def are_as_added(self) -> bool:
        """Whether all of them, and the tensors, are those that the model was added with."""
        named = ModelDigest()
        for ordinal, info in enumerate(self._model.tensors):
            named.add(info, self.of(ordinal))
        return named.digest() == self._model.row.digest

    def of(self, ordinal: int) -> bytes:
        """Return the hashes of one tensor's blocks, 16 bytes each; none where none are recorded."""
        if ordinal not in self._read:
            blocks, stop = 0, ordinal
            for info in self._model.in_blocks[ordinal:]:
                blocks += grid_of(info).count
                if stop > ordinal and blocks > _HASHES_PER_READ:
                    break
                stop += 1
            parts: dict[int, list[bytes]] = {number: [] for number in range(ordinal, stop)}
            for number, part in self._adapter.source_hashes(self._model.row.id, ordinal, stop):
                parts[number].append(part)
            self._read.update((number, b"".join(found)) for number, found in parts.items())
        return self._read[ordinal]
