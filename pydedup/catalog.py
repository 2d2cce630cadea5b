# SPDX-License-Identifier: Apache-2.0
"""The read side of the tables: addresses to models, models to tensors and block maps.

Thread-safe. Rows of a published model never change, but a vacuum may move its blocks: whoever
misses a page calls `StoredModel.refresh` and reads the block map again, once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow, TensorRow
from pydedup.adapter_options import CopiesAdapter, only_sound_rows, telling_rows
from pydedup.blocks import BlockGrid, BlockMap, as_block_shape, matrix_shape
from pydedup.certificates import ARTIFACTS, TENSORS, artifact_digest, error_of, keeps_bits
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError, UnavailableError
from pydedup.graph import Graph
from pydedup.names import parse_address
from pydedup.text import did_you_mean, it_has
from pydedup.types import GRAPH_ARTIFACT, DType, ModelInfo, TensorInfo

__all__ = [
    "Catalog",
    "ModelDigest",
    "SourceHashes",
    "StoredModel",
    "certificate_of",
    "known_versions",
    "model_info",
    "page_readers",
    "recorded_object",
    "tensors_digest",
    "version_of",
]

_HASHES_PER_READ = 16 * 1024
# Models whose tensors and block maps are kept in memory: about 6 bytes per block each.
_CACHED_MODELS = 256
# What a clock says before then, calendars have a date for.
_YEAR_10000 = 253_402_300_800
# Of so many models, the newest ones, a message about an unknown one suggests names.
_SUGGESTED_MODELS = 10_000


class StoredModel:
    """One published model: its tensors and where their blocks are.

    Raises NotFoundError when it was removed, CorruptStoreError when what is recorded of a tensor
    cannot be read.
    """

    def __init__(self, adapter: Adapter, row: ModelRow) -> None:
        self.row = row
        self._adapter = adapter
        self._maps: dict[int, BlockMap] = {}
        self._graph: Graph | None = None
        self._layers_key: object = None
        #: How often its block maps were forgotten: its pages are the same as long as this is.
        self.state = 0
        self.tensors = tuple(
            _tensor_info(self.address, ordinal, tensor)
            for ordinal, tensor in enumerate(adapter.tensors(row.id))
        )
        if not self.tensors:
            self.check_live()
        found = sum(math.prod(info.shape) * info.dtype.itemsize for info in self.tensors)
        if found != row.logical_bytes:
            raise CorruptStoreError(
                f"{self.address} has tensors of {found:,} bytes where {row.logical_bytes:,} are "
                "recorded: rows of them are missing; restore a backup"
            )
        wanted = self._recorded.get(TENSORS)
        if wanted is not None and wanted != tensors_digest(self.tensors):
            raise CorruptStoreError(
                f"{self.address}: its tensors are not those that it was added with"
            )
        self._ordinal = {info.name: ordinal for ordinal, info in enumerate(self.tensors)}

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.row.name}@{self.row.version}"

    def check_live(self) -> None:
        """Raise NotFoundError when it was removed meanwhile, with all that was to be read of it."""
        if self._adapter.model(self.row.id) is None:
            raise NotFoundError(f"{self.address} was removed from the store")

    @cached_property
    def certificate(self) -> dict[str, Any]:
        """What was guaranteed when it was added, and what was measured of it."""
        return certificate_of(self.row)

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
        ordinal = self._ordinal[name]
        block_map = self._maps.get(ordinal)
        if block_map is None:
            block_map = self._parse(ordinal, self._adapter.block_map(self.row.id, ordinal))
        return block_map

    def block_maps(self) -> list[BlockMap]:
        """Return the block maps of all tensors, in order; all that miss are read at once."""
        maps = dict(self._maps)  # which another thread may refresh
        if len(maps) < len(self.tensors):
            parts: dict[int, list[bytes]] = {}
            for ordinal, part in self._adapter.block_maps(self.row.id):
                parts.setdefault(ordinal, []).append(part)
            for ordinal in range(len(self.tensors)):
                if ordinal not in maps:
                    maps[ordinal] = self._parse(ordinal, parts.get(ordinal, []))
        return [maps[ordinal] for ordinal in range(len(self.tensors))]

    def _parse(self, ordinal: int, parts: Sequence[bytes]) -> BlockMap:
        info = self.tensors[ordinal]
        grid = BlockGrid(*matrix_shape(info.shape), *info.block_shape)
        try:
            block_map = BlockMap.from_parts(parts, grid, info.dtype)
        except CorruptStoreError as exc:
            if not self._adapter.tensors(self.row.id):
                raise NotFoundError(f"{self.address} was removed from the store") from exc
            raise CorruptStoreError(f"{self.address}, tensor {info.name!r}: {exc}") from exc
        self._maps[ordinal] = block_map
        return block_map

    def refresh(self) -> None:
        """Forget the block maps: a vacuum has moved blocks."""
        self._maps.clear()
        self.state += 1

    @property
    def layers_key(self) -> object:
        """Equal for models with the same graph, and tensors of the same names and shapes."""
        if self._layers_key is None:
            graph = self.graph()
            self._layers_key = (None if graph is None else graph.to_json(), self.tensors)
        return self._layers_key

    def page_ids(self) -> NDArray[np.int64]:
        """Return the pages it reads, those of bases included."""
        return np.array(
            [page for _, page, _, _ in self._adapter.model_pages(self.row.id)], np.int64
        )

    @cached_property
    def _recorded(self) -> Mapping[str, Any]:
        """Its certificate as it is recorded; an empty one where that is damaged."""
        try:
            return _recorded_certificate(self.row)
        except CorruptStoreError:
            return {}

    @property
    def _artifact_digests(self) -> Mapping[str, object]:
        """What its artifacts were recorded to hold, by name; none where that is not known."""
        found = self._recorded.get(ARTIFACTS)
        return found if isinstance(found, dict) else {}

    def artifact_names(self) -> list[str]:
        """Return the names of what came with it beside tensors; also of what is lost."""
        return sorted(self._media_types())

    def artifact(self, name: str) -> bytes | None:
        """Return what came with it under a name. Raises CorruptStoreError where that is damaged."""
        payload = self._adapter.artifact(self.row.id, name)
        wanted = self._artifact_digests.get(name)
        if wanted is not None and (payload is None or artifact_digest(payload) != wanted):
            self.check_live()
            what = "lost" if payload is None else "not what it was added with"
            raise CorruptStoreError(f"{self.address}: its {name!r} is {what}; restore a backup")
        return payload

    def artifacts(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, media type, payload) of all that came with it; see `artifact`."""
        for name, media_type in sorted(self._media_types().items()):
            payload = self.artifact(name)
            if payload is not None:
                yield name, media_type, payload

    def _media_types(self) -> dict[str, str]:
        """Return the media types of its artifacts by name, empty for those that are lost."""
        lost = dict.fromkeys(self._artifact_digests, "")
        return {**lost, **dict(self._adapter.artifacts(self.row.id))}

    def graph(self) -> Graph | None:
        """Return the model's graph, if the store knows it."""
        if self._graph is None:
            payload = self.artifact(GRAPH_ARTIFACT)
            if payload is not None:
                try:
                    self._graph = Graph.from_json(payload)
                except ArgumentError as exc:
                    raise CorruptStoreError(
                        f"the graph of {self.address} cannot be read: {exc}"
                    ) from exc
        return self._graph


class SourceHashes:
    """The hashes of the blocks that a model was added with, read for several tensors at once."""

    def __init__(self, adapter: Adapter, model: StoredModel) -> None:
        self._adapter = adapter
        self._model = model
        self._read: dict[int, bytes] = {}

    def of(self, ordinal: int) -> bytes:
        """Return the hashes of one tensor's blocks, 16 bytes each; none where none are recorded."""
        if ordinal not in self._read:
            blocks, stop = 0, ordinal
            for info in self._model.tensors[ordinal:]:
                blocks += BlockGrid(*matrix_shape(info.shape), *info.block_shape).count
                if stop > ordinal and blocks > _HASHES_PER_READ:
                    break
                stop += 1
            parts: dict[int, list[bytes]] = {number: [] for number in range(ordinal, stop)}
            for number, part in self._adapter.source_hashes(self._model.row.id, ordinal, stop):
                parts[number].append(part)
            self._read = {number: b"".join(found) for number, found in parts.items()}
        return self._read[ordinal]


class ModelDigest:
    """Names what a model holds: names, dtypes and shapes of its tensors, hashes of their blocks."""

    def __init__(self) -> None:
        self._content = hashlib.blake2b(digest_size=16)

    def add(self, info: TensorInfo, hashes: bytes) -> None:
        """Take in the next tensor and the hashes of its source's blocks, 16 bytes each."""
        self._content.update(_head(info))
        self._content.update(hashes)

    def digest(self) -> bytes:
        """Return 16 bytes."""
        return self._content.digest()


def tensors_digest(tensors: Iterable[TensorInfo]) -> str:
    """Return what names the names, dtypes and shapes of a model's tensors."""
    return artifact_digest(b"".join(map(_head, tensors)))


def _head(info: TensorInfo) -> bytes:
    head = [info.name, info.dtype.label, list(info.shape), list(info.block_shape)]
    return json.dumps(head).encode()


class Catalog:
    """Finds models by address."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        # No lock, which a fork could leave held: each use is one operation on the dict.
        self._models: dict[int, StoredModel] = {}
        self._store_id: str | None = None

    def resolve(self, address: str) -> ModelRow:
        """Return the live model that an address means.

        Raises
        ------
        ArgumentError
            When the address is malformed.
        NotFoundError
            When there is no such model, version or alias; the message names close ones.
        UnavailableError
            When another store has taken the place of the one that was opened.
        """
        row = self._find(address)
        self._cached(row)
        return row

    def _find(self, address: str) -> ModelRow:
        parsed = parse_address(address)
        if parsed.selector is not None:
            called = self._adapter.model_called(parsed.name, parsed.selector)
            if called is not None:
                return called
        rows = self._adapter.models(name=parsed.name, newest=1)
        if not rows:
            names = sorted({row.name for row in self._adapter.models(newest=_SUGGESTED_MODELS)})
            raise NotFoundError(
                f"no model {parsed.name!r} in {self._adapter.url}{did_you_mean(parsed.name, names)}"
            )
        if parsed.selector is None:
            return rows[-1]
        known = known_versions(self._adapter, parsed.name)
        known += [alias for _, alias, _ in self._adapter.aliases(parsed.name)]
        raise NotFoundError(
            f"{parsed.name!r} has no version or alias {parsed.selector!r}"
            f"{it_has(parsed.selector, known)}"
        )

    def model(self, address: str) -> StoredModel:
        """Return the model of an address, with what is cached of it."""
        return self.of_row(self.resolve(address))

    def of_row(self, row: ModelRow) -> StoredModel:
        """Return the model of a row, with what is cached of it. Raises as `resolve` does."""
        model = self._cached(row)
        if model is None:
            self._refuse_another_store()
            model = StoredModel(self._adapter, row)
            self._models[row.id] = model
            for oldest in list(self._models)[:-_CACHED_MODELS]:
                self._models.pop(oldest, None)
        return model

    def _cached(self, row: ModelRow) -> StoredModel | None:
        """Return the model of a row, if it is cached.

        Ids are given once in a store: where one means another model, tables were dropped and made
        anew, and what is cached, pages too, is of the store before.
        """
        model = self._models.get(row.id)
        if model is not None and _is_other(model.row, row):
            raise self._another_store()
        return model

    def _refuse_another_store(self) -> None:
        """Raise UnavailableError where a model that is not cached is of another store.

        What is cached of pages, whose ids begin anew with the tables, would be taken for its own.
        """
        with only_sound_rows(self._adapter):
            found = self._adapter.meta().get("store_id")
        if self._store_id is None:
            self._store_id = found
        elif found != self._store_id:
            raise self._another_store()

    def _another_store(self) -> UnavailableError:
        return UnavailableError(
            f"{self._adapter.url} is another store than the one that was opened: its tables "
            "were made anew; open it again"
        )

    def infos(self, name: str | None = None) -> list[ModelInfo]:
        """Return what the store knows of its live models, ordered by name, then age."""
        return list(self._infos(name, None))

    def sound_infos(self, said: list[str]) -> list[ModelInfo]:
        """Return the same without models, or aliases, of which it cannot be read.

        ``said`` gets a sentence about each.
        """
        with telling_rows(self._adapter, said):
            return list(self._infos(None, said))

    def _infos(self, name: str | None, said: list[str] | None) -> Iterator[ModelInfo]:
        aliases: dict[int, list[str]] = {}
        for _, alias, model_id in self._adapter.aliases(name):
            aliases.setdefault(model_id, []).append(alias)
        for row in sorted(self._adapter.models(name=name), key=lambda row: (row.name, row.id)):
            try:
                yield model_info(row, aliases.get(row.id, ()))
            except CorruptStoreError as exc:
                if said is None:
                    raise
                said.append(str(exc))

    def forget(self, model_id: int) -> None:
        """Drop what is cached of a model."""
        self._models.pop(model_id, None)

    def refresh(self) -> None:
        """Forget all block maps."""
        for model in list(self._models.values()):
            model.refresh()


def model_info(row: ModelRow, aliases: Sequence[str] = ()) -> ModelInfo:
    """Return a row as users see it. Raises CorruptStoreError."""
    if not 0 <= row.created_at < _YEAR_10000:
        raise CorruptStoreError(
            f"when {row.name}@{row.version} was added cannot be read ({row.created_at:g}); restore "
            "a backup"
        )
    return ModelInfo(
        id=row.id,
        name=row.name,
        version=row.version,
        policy=row.policy,
        created_at=row.created_at,
        logical_bytes=row.logical_bytes,
        digest=row.digest.hex(),
        aliases=tuple(sorted(aliases)),
        metadata=recorded_object(row.metadata, f"the metadata of {row.name}@{row.version}"),
    )


def certificate_of(row: ModelRow) -> dict[str, Any]:
    """Return what was recorded of a promise. Raises CorruptStoreError."""
    certificate = _recorded_certificate(row)
    for name in (ARTIFACTS, TENSORS):  # of the model, and not of what was promised
        certificate.pop(name, None)
    return certificate


def _recorded_certificate(row: ModelRow) -> dict[str, Any]:
    return recorded_object(row.certificate, f"the certificate of {row.name}@{row.version}")


def recorded_object(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object that was recorded, an empty one for no text.

    Raises CorruptStoreError.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError as exc:
        raise CorruptStoreError(f"{what} cannot be read ({exc}); restore a backup") from exc
    if not isinstance(found, dict):
        raise CorruptStoreError(f"{what} cannot be read (it is no object); restore a backup")
    return found


def _is_other(one: ModelRow, other: ModelRow) -> bool:
    """Whether two rows of one id are of different models."""
    if one.digest == other.digest and math.isnan(one.created_at):  # in a damaged row
        return not math.isnan(other.created_at)
    return (one.created_at, one.digest) != (other.created_at, other.digest)


def _tensor_info(address: str, ordinal: int, row: TensorRow) -> TensorInfo:
    if row.ordinal != ordinal:  # block maps are those of ordinals
        raise CorruptStoreError(f"{address} lacks its tensor number {ordinal}")
    try:
        block_shape = as_block_shape(json.loads(row.block_shape))
        shape = tuple(int(extent) for extent in json.loads(row.shape))
        if min(shape, default=0) < 0:
            raise ValueError(f"an extent of {min(shape)}")
        return TensorInfo(row.name, DType.of_label(row.dtype), shape, block_shape)
    except (ValueError, TypeError, OverflowError, ArgumentError) as exc:
        raise CorruptStoreError(
            f"{address}, tensor {row.name!r}: its shape or dtype cannot be read ({exc})"
        ) from exc


def known_versions(adapter: Adapter, name: str) -> list[str]:
    """Return the versions of a model, oldest first; of very many, the newest."""
    return [row.version for row in adapter.models(name=name, newest=_SUGGESTED_MODELS)]


def page_copies(adapter: Adapter) -> Callable[[int], Iterable[bytes]] | None:
    """Return what gives the copies of a page, ``None`` where a store keeps one of each."""
    if isinstance(adapter, CopiesAdapter) and adapter.copies > 1:
        return adapter.page_copies
    return None


def page_readers(adapter: Adapter) -> dict[int, list[str]]:
    """Return per page the addresses of the live models that read it, ordered."""
    address = {row.id: f"{row.name}@{row.version}" for row in adapter.models()}
    readers: dict[int, list[str]] = {}
    for model_id, page_id, _, _ in adapter.model_pages():
        if model_id in address:
            readers.setdefault(page_id, []).append(address[model_id])
    return {page_id: sorted(names) for page_id, names in readers.items()}


def version_of(adapter: Adapter, name: str, version: str) -> ModelRow | None:
    """Return a live model of a name and version; an alias is none."""
    row = adapter.model_called(name, version)
    return row if row is not None and row.version == version else None
