# SPDX-License-Identifier: Apache-2.0
"""What each model of a store takes, so that the parts add up to the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pydedup.adapter import Adapter
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import Catalog
from pydedup.layout import by_page
from pydedup.sets import is_among
from pydedup.types import ModelInfo

__all__ = ["ModelSize", "model_sizes", "shared_pages"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """One version of a model, and what it takes.

    Attributes
    ----------
    pages, page_bytes
        The pages it reads, and their size.
    exclusive_bytes
        The part of ``page_bytes`` that no other model reads.
    share_bytes
        Its part of all pages, when each page counts for the models that read it by how much of it
        they use. The shares of all models add up to the size of all pages (to within a byte per
        model).
    """

    info: ModelInfo
    pages: int
    page_bytes: int
    exclusive_bytes: int
    share_bytes: int

    @property
    def saved_share(self) -> float:
        """Part of its logical bytes that its share of the pages does without."""
        logical = self.info.logical_bytes
        return 1.0 - self.share_bytes / logical if logical else 0.0


def model_sizes(adapter: Adapter, catalog: Catalog) -> list[ModelSize]:
    """Return what each model takes, ordered by name, then age; no page is read.

    Without those whose row is damaged, and pages of which it is; `store_stats` tells of them.
    """
    with adapter.snapshot(), only_sound_rows(adapter):
        infos = catalog.sound_infos([])
        reads = adapter.model_pages()
        size = {page.id: page.payload_bytes for page in adapter.page_rows()}
    live = {info.id for info in infos}
    # Per model, what it uses of each page.
    uses: dict[int, dict[int, int]] = {model_id: {} for model_id in live}
    for model_id, page_id, _, used in reads:
        if model_id in live and page_id in size:
            uses[model_id][page_id] = used
    owners = Counter(page for pages in uses.values() for page in pages)
    whole: Counter[int] = Counter()
    for pages in uses.values():
        whole.update(pages)
    return [
        ModelSize(
            info=info,
            pages=len(uses[info.id]),
            page_bytes=sum(size[page] for page in uses[info.id]),
            exclusive_bytes=sum(size[page] for page in uses[info.id] if owners[page] == 1),
            share_bytes=round(
                sum(size[page] * used / (whole[page] or 1) for page, used in uses[info.id].items())
            ),
        )
        for info in infos
    ]


def shared_pages(adapter: Adapter) -> list[dict[str, object]]:
    """Return the rows of the view ``sharing``, in its order.

    A database sorts all pairs of models on all pages for it, and gives each row names of its own.
    """
    with adapter.snapshot():
        models = sorted(adapter.models(), key=lambda row: (row.name, row.version))
        reads = np.array(adapter.model_pages(), np.int64).reshape(-1, 4)
    ids = np.array([row.id for row in models], np.int64)
    reads = reads[is_among(reads[:, 0], ids)]
    reads = reads[np.lexsort((reads[:, 0], reads[:, 1]))]
    by_id = np.argsort(ids)
    # Models are numbered in the order of the result.
    reader = by_id[np.searchsorted(ids[by_id], reads[:, 0])]
    # Of a pair, the model with the lower id is in front: of a page, those behind come along.
    behind = np.searchsorted(reads[:, 1], reads[:, 1], side="right") - np.arange(len(reads)) - 1
    found: list[dict[str, object]] = []
    for number, mine in by_page(reader):
        counts = behind[mine]
        at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - mine - 1, counts)
        smaller = np.minimum(reads[at, 2:], np.repeat(reads[mine, 2:], counts, axis=0))
        others, pair, pages = np.unique(reader[at], return_inverse=True, return_counts=True)
        blocks, sizes = (
            np.bincount(pair, column, len(others)).astype(np.int64) for column in smaller.T
        )
        columns = (column.tolist() for column in (others, pages, blocks, sizes))
        model = models[number]
        found += [
            {
                "name": model.name,
                "version": model.version,
                "other_name": models[other].name,
                "other_version": models[other].version,
                "shared_pages": n_pages,
                "shared_blocks": n_blocks,
                "shared_bytes": n_bytes,
            }
            for other, n_pages, n_blocks, n_bytes in zip(*columns, strict=True)
        ]
    return found
