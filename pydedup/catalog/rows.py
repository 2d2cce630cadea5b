# SPDX-License-Identifier: Apache-2.0
"""What the rows of models, tensors and pages say, or that they are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from pydedup.adapter import STAGING, Adapter, ModelRow, TensorRow
from pydedup.arguments import as_block_shape
from pydedup.certificates import ADDRESS, ARTIFACTS, METADATA, OF_MODEL, artifact_digest
from pydedup.errors import CorruptStoreError
from pydedup.types import DType, ModelInfo, TensorInfo, shape_problem

__all__ = [
    "ARTIFACT_DTYPE",
    "SUGGESTED_MODELS",
    "added_as",
    "artifact_digests",
    "certificate_of",
    "check_row",
    "known_versions",
    "model_info",
    "page_readers",
    "promised",
    "recorded_certificate",
    "recorded_object",
    "taken_versions",
    "tensor_info",
    "version_of",
    "with_recorded",
]

#: What a row of ``tensors`` has for dtype when it is no tensor but an artifact that is kept in
#: blocks, of bytes.
ARTIFACT_DTYPE: Final = "bytes"
#: Of so many models, the newest ones, a message about an unknown one suggests names.
SUGGESTED_MODELS: Final = 10_000
# What a clock says before then, calendars have a date for.
_YEAR_10000: Final = 253_402_300_800


def model_info(row: ModelRow, aliases: Sequence[str] = ()) -> ModelInfo:
    """Return a row as users see it. Raises CorruptStoreError."""
    if not 0 <= row.created_at < _YEAR_10000:
        raise CorruptStoreError(
            f"when {row.address} was added cannot be read ({row.created_at:g}); restore a backup"
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
        metadata=recorded_object(row.metadata, f"the metadata of {row.address}"),
    )


def check_row(row: ModelRow) -> None:
    """Raise CorruptStoreError where what users see of a model is damaged."""
    model_info(row)
    recorded = recorded_certificate(row)
    wanted, certified = recorded.get(METADATA), recorded.get("policy", row.policy)
    if wanted is not None and wanted != artifact_digest(row.metadata.encode()):
        raise CorruptStoreError(
            f"the metadata of {row.address} are not those that it was added with; restore a backup"
        )
    if certified != row.policy:
        raise CorruptStoreError(
            f"{row.address} has the policy {row.policy!r}, and a certificate of {certified!r}; "
            "restore a backup"
        )


def certificate_of(row: ModelRow) -> dict[str, Any]:
    """Return what was recorded of a promise. Raises CorruptStoreError."""
    return promised(recorded_certificate(row))


def promised(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded certificate without what is of the model, and not of what was promised."""
    return {name: said for name, said in recorded.items() if name not in OF_MODEL}


def recorded_certificate(row: ModelRow) -> dict[str, Any]:
    """Return a certificate with the digests that are recorded in it. Raises CorruptStoreError."""
    return recorded_object(row.certificate, f"the certificate of {row.address}")


def artifact_digests(row: ModelRow) -> Mapping[str, object]:
    """Return what a model's artifacts were recorded to hold; none where that is not known."""
    try:
        found = recorded_certificate(row).get(ARTIFACTS)
    except CorruptStoreError:
        return {}
    return found if isinstance(found, dict) else {}


def with_recorded(certificate: str, what: Mapping[str, object]) -> str:
    """Return a certificate, as it is recorded, with more of the model; a damaged one as it is."""
    try:
        found = recorded_object(certificate, "a certificate")
    except CorruptStoreError:
        return certificate
    return json.dumps({**found, **what})


def recorded_object(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object that was recorded. Raises CorruptStoreError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptStoreError(f"{what} cannot be read ({exc}); restore a backup") from exc
    if not isinstance(found, dict):
        raise CorruptStoreError(f"{what} cannot be read (it is no object); restore a backup")
    return found


def tensor_info(address: str, ordinal: int, row: TensorRow) -> TensorInfo:
    """Return what is recorded of tensor number ``ordinal``. Raises CorruptStoreError."""
    if row.ordinal != ordinal:  # block maps are those of ordinals
        raise CorruptStoreError(f"{address} lacks its tensor number {ordinal}; restore a backup")
    try:
        return _info(row.name, row.dtype, row.shape, row.block_shape)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise CorruptStoreError(
            f"{address}, tensor {row.name!r}: its shape or dtype cannot be read ({exc}); restore a "
            "backup"
        ) from exc


@lru_cache(maxsize=8192)  # models of a family have the same ones
def _info(name: str, dtype: str, shape: str, block_shape: str) -> TensorInfo:
    """Return what is recorded of a tensor. Raises as JSON does, ValueError."""
    label = DType.U8.label if dtype == ARTIFACT_DTYPE else dtype
    return TensorInfo(name, DType.of_label(label), *_shapes(shape, block_shape))


@lru_cache(maxsize=4096)  # the tensors of a family have few different ones
def _shapes(shape: str, blocks: str) -> tuple[tuple[int, ...], tuple[int, int], int]:
    """Return the recorded shape of a tensor and of its blocks, and how many axes are its rows.

    Raises as JSON does, ValueError.
    """
    extents = tuple(int(extent) for extent in json.loads(shape))
    problem = shape_problem(extents)
    if problem is not None:
        raise ValueError(f"it {problem}")
    recorded = json.loads(blocks)
    if not isinstance(recorded, list) or len(recorded) != 3:
        return extents, as_block_shape(recorded), 1
    *block_shape, axes = recorded
    if len(extents) < 3 or axes != len(extents) - 1:
        raise ValueError(f"{axes!r:.100} of its {len(extents)} axes cannot be rows")
    return extents, as_block_shape(block_shape), len(extents) - 1


def known_versions(adapter: Adapter, name: str) -> list[str]:
    """Return the versions of a model, oldest first; of very many, the newest."""
    return [row.version for row in adapter.models(name=name, newest=SUGGESTED_MODELS)]


def taken_versions(adapter: Adapter, name: str) -> set[str]:
    """Return the versions that a model has, and those of damaged rows, which nobody else may get.

    Such a row has a state that is none, or another version than it was added as.
    """
    taken = set()
    for row in adapter.models(name=name, state=None):
        if row.state == STAGING:
            continue
        taken.add(row.version)
        if f'"{row.address}"' in row.certificate:  # as it was added; there may be thousands
            continue
        address = added_as(row)
        if address.startswith(f"{name}@"):
            taken.add(address.removeprefix(f"{name}@"))
    return taken


def added_as(row: ModelRow) -> str:
    """Return the ``name@version`` that a model was added as; empty where that is not known."""
    try:
        return str(recorded_certificate(row).get(ADDRESS, ""))
    except CorruptStoreError:
        return ""


def version_of(adapter: Adapter, name: str, version: str) -> ModelRow | None:
    """Return a live model of a name and version; an alias is none."""
    row = adapter.model_called(name, version)
    return row if row is not None and row.version == version else None


def page_readers(adapter: Adapter) -> dict[int, list[str]]:
    """Return per page the addresses of the live models that read it, ordered."""
    address = {row.id: row.address for row in adapter.models()}
    readers: dict[int, list[str]] = {}
    for model_id, page_id, _, _ in adapter.model_pages():
        if model_id in address:
            readers.setdefault(page_id, []).append(address[model_id])
    return {page_id: sorted(names) for page_id, names in readers.items()}
