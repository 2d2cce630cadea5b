# SPDX-License-Identifier: Apache-2.0
"""Block maps and graphs that were parsed before, for whoever reads those of many models."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Final, TypeAlias

from pydedup.blocks import BlockGrid, BlockMap
from pydedup.graph import Graph
from pydedup.types import DType

__all__ = ["ParsedMaps", "parsed_graph"]

#: Of a map, about: its entry, and 100 bytes for each of its objects.
_ENTRY_BYTES: Final = 700
_MOST_BYTES: Final = 16 << 20
#: Larger ones take longer to hash, and are parsed as fast.
_LARGEST: Final = 64 << 10

_Key: TypeAlias = tuple[tuple[bytes, ...], BlockGrid, DType]


class ParsedMaps:
    """Parses block maps, those with the same bytes once: models of a family have most in common.

    Keeps up to 16 MiB of them. Those of several models are one object then, not to be changed.
    """

    def __init__(self) -> None:
        self._known: dict[_Key, BlockMap] = {}
        self._nbytes = 0

    def parse(self, parts: Sequence[bytes], grid: BlockGrid, dtype: DType) -> BlockMap:
        """Return what `BlockMap.from_parts` does. Raises CorruptStoreError."""
        size = sum(map(len, parts))
        if size > _LARGEST:
            return BlockMap.from_parts(parts, grid, dtype)
        key = (tuple(parts), grid, dtype)
        found = self._known.get(key)
        if found is None:
            found = BlockMap.from_parts(parts, grid, dtype)
            # What was parsed takes at most 24 bytes for each 4 of a part.
            taken = _ENTRY_BYTES + 7 * size
            if self._nbytes + taken > _MOST_BYTES:
                self._known.clear()
                self._nbytes = 0
            self._nbytes += taken
            self._known[key] = found
        return found


#: Graphs in use by the digest of what they were parsed from.
_graphs: weakref.WeakValueDictionary[bytes, Graph] = weakref.WeakValueDictionary()


def parsed_graph(payload: bytes) -> Graph:
    """Return what `Graph.from_json` does: one object for all models that have the same layers.

    Parsed, it takes several times its text, more than all else that is kept of a version.
    """
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    found = _graphs.get(digest)
    if found is None:
        found = _graphs[digest] = Graph.from_json(payload)
    return found
