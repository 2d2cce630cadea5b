# SPDX-License-Identifier: Apache-2.0
"""Gives models other block maps, as blocks that move demand."""

from __future__ import annotations

from collections.abc import Mapping

from pydedup.adapter import Adapter, ModelRow
from pydedup.blocks import BlockMap
from pydedup.catalog import map_digest, with_other_maps

__all__ = ["replace_maps"]


def replace_maps(adapter: Adapter, row: ModelRow, maps: Mapping[int, BlockMap]) -> None:
    """Record other block maps of a model, by ordinal; in a transaction that its row was read in."""
    digests = {}
    for ordinal, block_map in maps.items():
        parts = list(block_map.parts())
        adapter.replace_block_map(row.id, ordinal, parts)
        digests[ordinal] = map_digest(parts)
    certificate = with_other_maps(row.certificate, digests)
    if certificate != row.certificate:
        adapter.update_model(row.id, certificate=certificate)
