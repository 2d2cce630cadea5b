# SPDX-License-Identifier: Apache-2.0
"""Gives models other block maps, as blocks that move demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydedup.adapter import Adapter, ModelRow
from pydedup.catalog import map_digest, with_other_maps

__all__ = ["replace_maps"]


def replace_maps(
    adapter: Adapter,
    row: ModelRow,
    maps: Mapping[int, Sequence[bytes]],
    tags: Mapping[int, bytes],
) -> None:
    """Record other block maps of a model: by ordinal, their parts.

    In a transaction that its row was read in. ``tags`` are those of the pages that it reads then.
    """
    adapter.replace_block_maps(row.id, maps)
    digests = {ordinal: map_digest(parts) for ordinal, parts in maps.items()}
    certificate = with_other_maps(row.certificate, digests, tags)
    if certificate != row.certificate:
        adapter.update_model(row.id, certificate=certificate)
