# SPDX-License-Identifier: Apache-2.0
"""Sizes of models and of a store, from the tables alone; no page is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydedup.adapter import LIVE, Adapter
from pydedup.adapter_options import telling_rows, told_damage
from pydedup.catalog import (
    ARTIFACT_DTYPE,
    Catalog,
    ModelsAhead,
    StoredModel,
    aliases_of,
    model_info,
)
from pydedup.formats.onnx import GRAPH as ONNX_GRAPH
from pydedup.layout import least_pages
from pydedup.types import GRAPH_ARTIFACT, ModelInfo, TensorInfo

__all__ = ["ModelFigures", "StoreStats", "model_figures", "store_stats"]


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model in numbers.

    Attributes
    ----------
    used_bytes
        What its distinct blocks take on their pages, also those of artifacts, if it
        ``has_artifacts_in_blocks``.
    has_graph
        Whether it can predict; where ``by_onnx_runtime`` is true, ONNX Runtime runs it.
    exclusive_bytes
        The part of it on pages that no other model reads: what removing it frees at once.
    pages, least_pages, read_amplification
        Pages it reads, the fewest that could hold its blocks, and their ratio.
    """

    info: ModelInfo
    certificate: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    artifacts: tuple[str, ...]
    has_graph: bool
    used_bytes: int
    exclusive_bytes: int
    pages: int
    least_pages: int
    has_artifacts_in_blocks: bool = False

    @property
    def by_onnx_runtime(self) -> bool:
        """Whether it predicts, and has operations that pydedup has no kernels for."""
        return self.has_graph and GRAPH_ARTIFACT not in self.artifacts

    @property
    def read_amplification(self) -> float:
        """Pages read / least possible; 1.0 for a model without blocks."""
        return self.pages / self.least_pages if self.least_pages else 1.0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store in numbers.

    ``stored_bytes`` is all it occupies in its database, at least where ``stored_bytes_exact`` is
    false: MariaDB and MySQL tell it only to who has the privilege PROCESS, and a shard may be down.
    ``damaged`` has a sentence about each row that cannot be read, and is in no number here.
    """

    url: str
    models: int
    versions: int
    tensors: int
    pages: int
    page_bytes: int
    retired_pages: int
    distinct_blocks: int
    logical_bytes: int
    stored_bytes: int
    stored_bytes_exact: bool
    schema_version: int
    pool: Mapping[str, int]
    damaged: tuple[str, ...] = ()

    @property
    def saved_share(self) -> float:
        """Share of the logical bytes that the store does without; negative when it is larger.

        At most that where ``stored_bytes_exact`` is false.
        """
        return 1.0 - self.stored_bytes / self.logical_bytes if self.logical_bytes else 0.0


def model_figures(adapter: Adapter, catalog: Catalog, address: str) -> ModelFigures:
    """Return one model in numbers. Raises NotFoundError."""
    with adapter.snapshot():
        model: StoredModel = catalog.model(address)
        row = model.row
        aliases = aliases_of(adapter, row.name).get(row.id, ())
        mine = {page: size for _, page, _, size in adapter.model_pages(row.id)}
        others = {page for owner, page in adapter.readers_of(list(mine)) if owner != row.id}
        artifacts = tuple(name for name, _ in adapter.artifacts(row.id))
    return ModelFigures(
        info=model_info(row, aliases),
        certificate=model.certificate,
        tensors=model.tensors,
        artifacts=artifacts,
        has_graph=not {GRAPH_ARTIFACT, ONNX_GRAPH}.isdisjoint(artifacts),
        used_bytes=sum(mine.values()),
        exclusive_bytes=sum(size for page, size in mine.items() if page not in others),
        pages=len(mine),
        least_pages=least_pages(sum(mine.values())),
        has_artifacts_in_blocks=len(model.in_blocks) > len(model.tensors),
    )


def store_stats(adapter: Adapter, catalog: Catalog, pool: Mapping[str, int]) -> StoreStats:
    """Return a store in numbers, without rows that are damaged, which it tells."""
    damaged: list[str] = []
    with adapter.snapshot(), telling_rows(adapter, damaged):
        rows = catalog.sound_infos(damaged)
        pages = adapter.page_rows()
        adapter.model_pages()  # rows of it may be damaged
        live = [page for page in pages if page.state == LIVE]
        ahead = ModelsAhead(adapter, rows)
        return StoreStats(
            url=adapter.url,
            models=len({row.name for row in rows}),
            versions=len(rows),
            tensors=sum(
                tensor.dtype != ARTIFACT_DTYPE for row in rows for tensor in ahead.tensors(row.id)
            ),
            pages=len(live),
            page_bytes=sum(page.payload_bytes for page in live),
            retired_pages=len(pages) - len(live),
            distinct_blocks=adapter.count_blocks(),
            logical_bytes=sum(row.logical_bytes for row in rows),
            stored_bytes=adapter.stored_bytes(),
            stored_bytes_exact=adapter.size_is_exact(),
            schema_version=adapter.schema_version() or 0,
            pool=dict(pool),
            damaged=told_damage(adapter, damaged),
        )
