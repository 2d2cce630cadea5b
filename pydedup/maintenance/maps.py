# SPDX-License-Identifier: Apache-2.0
"""Gives models other block maps, as blocks that move demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydedup.adapter import Adapter, ModelRow
from pydedup.blocks import BlockMap
from pydedup.catalog import map_digest, tags_of, with_other_maps

__all__ = ["replace_maps"]


def replace_maps(
    adapter: Adapter, row: ModelRow, maps: Mapping[int, BlockMap], page_ids: Sequence[int]
) -> None:
    """Record other block maps of a model, by ordinal; in a transaction that its row was read in.

    ``page_ids`` are the pages that it reads then.
    """
    digests = {}
    for ordinal, block_map in maps.items():
        parts = list(block_map.parts())
        adapter.replace_block_map(row.id, ordinal, parts)
        digests[ordinal] = map_digest(parts)
    certificate = with_other_maps(row.certificate, digests, tags_of(adapter, page_ids))
    if certificate != row.certificate:
        adapter.update_model(row.id, certificate=certificate)
