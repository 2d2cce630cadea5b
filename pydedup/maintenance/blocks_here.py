# SPDX-License-Identifier: Apache-2.0
"""Blocks that a store has twice: of one on a damaged page, the other may be sound.

What is added while a page is damaged is stored anew, and a block that is a delta by itself where it
had to be a base. So a repair looks here before it asks a source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from pydedup.adapter import Adapter, BlockRow
from pydedup.adapter_options import only_sound_rows
from pydedup.errors import CorruptStoreError, SchemaVersionError, UnavailableError
from pydedup.layout import block_at
from pydedup.maintenance.blocks_from import BlockSource, EncodedBlock, Wanted, read_block
from pydedup.pool import PagePool
from pydedup.sets import in_parts

__all__ = ["HereFirst"]

_HASHES_AT_ONCE = 4096


class HereFirst:
    """The store that is repaired, but for its damaged pages; then a source (a `BlockSource`).

    ``moved`` says where blocks of damaged pages are by now, by place, as it grows.
    """

    def __init__(
        self,
        adapter: Adapter,
        pool: PagePool,
        damaged: Collection[int],
        source: BlockSource,
        moved: Mapping[int, int],
    ) -> None:
        self._adapter = adapter
        self._pool = pool
        self._damaged = damaged
        self._source = source
        self._moved = moved
        self.damage = source.damage
        self.unreadable = source.unreadable

    def find(
        self,
        wanted: Collection[Wanted],
        block_shapes: Collection[tuple[int, int]],
        tell: Callable[[], None],
    ) -> Iterator[EncodedBlock]:
        """Yield those that are there; see `BlockSource`. The source is asked for what is left."""
        left = set(wanted)
        for some in in_parts(sorted({block.digest for block in wanted}), _HASHES_AT_ONCE):
            with only_sound_rows(self._adapter):
                rows = self._adapter.find_blocks(some)
            for row in sorted(rows, key=lambda row: (row.page_id, row.slot)):
                tell()
                block = None if row.page_id in self._damaged else self._read(row)
                if block is not None and block.content in left:
                    left.remove(block.content)
                    yield block
        if left:
            yield from self._source.find(left, block_shapes, tell)

    def _read(self, row: BlockRow) -> EncodedBlock | None:
        """Return a block by itself; None where it, or its base, cannot be read."""
        try:
            at = row.base_id
            base = None if at is None else block_at(self._pool, self._moved.get(at, at))
            return read_block(self._pool.pages([row.page_id])[0], row.slot, base)
        except (CorruptStoreError, SchemaVersionError, UnavailableError):
            return None
