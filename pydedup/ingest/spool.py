# SPDX-License-Identifier: Apache-2.0
"""New distinct blocks on their way to the store, as pages in a temporary file.

The spool keeps memory bounded whatever a batch of models holds: blocks are appended in order of
first appearance, each full page goes to the file. Blocks are addressed by their number. Once a
layout is known, `images` cuts final pages out of it, copying encoded bytes and never encoding
twice. Pages of another store that are to be taken over as they are need not go to the file: their
blocks are only listed (`list_blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import CorruptStoreError
from pydedup.ingest.spool_file import SpoolFile
from pydedup.ingest.workers import Task, Workers
from pydedup.layout import PAGE_CAPACITY, copy_page, shape_codes
from pydedup.pool import PagePool

__all__ = ["NO_BASE", "Spool", "Window", "with_room"]

#: Instead of a reference to a base, for a block that is no delta.
NO_BASE = int(np.iinfo(np.int64).min)

# Bytes of pages in memory once all blocks are there: each is needed about once then.
_FROZEN_BYTES = 4 * 1024 * 1024
# Full pages that wait to be written, at most.
_SEALING = 8
# Added to the ids of pages that are elsewhere.
_ELSEWHERE = 1 << 48

_Item = TypeVar("_Item", bound=np.generic)
#: Which blocks, the pages they are on, which of these each is on, and the slots.
Window = tuple[NDArray[np.int64], list[codec.Page], NDArray[np.uint32], NDArray[np.uint32]]


class Spool:
    """Append-only pages of new blocks. Not thread-safe, but for `images`; a context manager.

    ``memory_bytes`` are those of pages kept in memory until it is frozen, ``elsewhere`` the pages
    of the store whose pages may be listed; ``workers`` build pages and write them to the file.
    """

    def __init__(
        self,
        memory_bytes: int,
        elsewhere: PagePool | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._elsewhere = elsewhere
        self._workers = workers
        self._file = SpoolFile()
        self._pages = PagePool(self._file.read, memory_bytes)
        self._sealed = 0
        self._sealing: dict[int, Task[None]] = {}  # the oldest first
        self._open = _OpenPage()
        self._page_of = _Column(np.empty(0, np.int64))
        self._slot_of = _Column(np.empty(0, np.uint32))
        self._cost = _Column(np.empty(0, np.int64))
        self._length = _Column(np.empty(0, np.int64))
        self._alone = _Column(np.empty(0, np.int64))  # lengths of blocks with factors, else 0
        self._hashes = _Column(np.empty((0, 2), np.uint64))
        self._bases = _Column(np.empty(0, np.int64))
        self._dtypes = _Column(np.empty(0, np.int64))
        self._shapes = _Column(np.empty(0, np.uint64))
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for task in self._sealing.values():
            task.drop()
        self._file.close()
        self._pages.clear()

    def append(
        self,
        view: MatrixView,
        indices: NDArray[np.int64],
        encoded: codec.EncodedBlocks,
        digests: NDArray[np.uint64],
        bases: NDArray[np.int64],
        base_tags: NDArray[np.uint64],
    ) -> None:
        """Append these blocks of a matrix as they are encoded; they get the next numbers.

        ``digests`` are those of what the encoded blocks hold, ``bases`` references (places.py) or
        `NO_BASE`, ``base_tags`` what their slots are to carry.
        """
        costs = codec.page_cost(encoded.lengths)
        dtypes = np.full(len(indices), view.dtype.code, np.int64)
        shapes = view.grid.shapes(indices)
        columns = (
            *(encoded.offsets, encoded.lengths, encoded.encodings.astype(np.int64)),
            *(dtypes, *shapes, base_tags),
        )
        pages = np.empty(len(indices), np.int64)
        slots = np.empty(len(indices), np.uint32)
        start = 0
        while start < len(indices):
            room = PAGE_CAPACITY - self._open.bytes
            fit = int(np.searchsorted(np.cumsum(costs[start:]), room, side="right"))
            if fit == 0 and self._open.count:
                self._seal()
                continue
            stop = start + max(fit, 1)
            pages[start:stop] = self._sealed
            slots[start:stop] = self._open.count + np.arange(stop - start, dtype=np.uint32)
            part = [column[start:stop] for column in columns]
            self._open.add(encoded.arena, part, int(costs[start:stop].sum()))
            start = stop
        self._page_of.append(pages)
        self._slot_of.append(slots)
        self._cost.append(costs)
        self._length.append(encoded.lengths)
        self._alone.append(np.where(encoded.have_factors(), encoded.lengths, 0))
        self._hashes.append(digests)
        self._bases.append(bases)
        self._dtypes.append(dtypes)
        self._shapes.append(shape_codes(*shapes))
        self.count += len(indices)

    def list_blocks(
        self,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint32],
        digests: NDArray[np.uint64],
        bases: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Append blocks that lie elsewhere and return their numbers.

        They must come to lie on a page that has all blocks of the one they are on, in its order.
        What they take, their dtypes and shapes are known once `images` has read that; until then
        they are 0.
        """
        count = len(page_ids)
        self._page_of.append(page_ids + _ELSEWHERE)
        self._slot_of.append(slots)
        self._hashes.append(digests)
        self._bases.append(bases)
        for column in (self._cost, self._length, self._alone, self._dtypes):
            column.append(np.zeros(count, np.int64))
        self._shapes.append(np.zeros(count, np.uint64))
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def freeze(self) -> None:
        """Write the last page out; call once after the last `append`."""
        if self._open.count:
            self._seal()
        self._finish(len(self._sealing))
        self._pages.clear()
        self._pages = PagePool(self._file.read, _FROZEN_BYTES)

    @property
    def lists(self) -> bool:
        """Whether it has blocks that are on pages elsewhere."""
        return bool((self._page_of.values() >= _ELSEWHERE).any())

    @property
    def costs(self) -> NDArray[np.int64]:
        """Bytes that each block takes on a page, its slot included."""
        return self._cost.values()

    @property
    def factored(self) -> NDArray[np.bool_]:
        """Which blocks have factors: what these take depends on which others are on their page."""
        return self._alone.values() > 0

    def unsettle(self) -> None:
        """Let blocks take again what they do by themselves."""
        numbers = np.flatnonzero(self.factored)
        self._note_lengths(numbers, self._alone.values()[numbers])

    def settle(self, numbers: NDArray[np.int64]) -> int:
        """Find out what these blocks take on a page, return it for all of them; when frozen.

        Of those with factors only the first has them there, of several with the same.
        """
        if self.factored[numbers].any():
            page = codec.Page(self.images([numbers])[0])
            self._note_lengths(numbers, page.slots["length"].astype(np.int64))
        return self.cost_of([numbers])

    def cost_of(self, layout: Sequence[NDArray[np.int64]]) -> int:
        """Return what the blocks of pages take together, their slots included."""
        return sum(int(self.costs[page].sum()) for page in layout)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Encoded bytes of each block."""
        return self._length.values()

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Digests of all blocks, shape (count, 2)."""
        return self._hashes.values()

    @property
    def dtypes(self) -> NDArray[np.int64]:
        """Dtype code of each block."""
        return self._dtypes.values()

    @property
    def shapes(self) -> NDArray[np.uint64]:
        """Code of each block's shape (`layout.shape_codes`)."""
        return self._shapes.values()

    @property
    def bases(self) -> NDArray[np.int64]:
        """References to what each block is a delta of, or `NO_BASE`."""
        return self._bases.values()

    def move_bases(self, moved: NDArray[np.int64]) -> None:
        """Point bases at ``moved[n]`` instead of block n of the spool."""
        bases = self._bases.values()
        new = bases >= 0
        bases[new] = moved[bases[new]]

    def windows(self, numbers: NDArray[np.int64]) -> Iterator[Window]:
        """Walk over blocks, as `PagePool.windows` does over pages; also yields the slots."""
        if not len(numbers):
            return
        page_of = self._page_of.values()[numbers]
        slots = self._slot_of.values()[numbers]
        last = np.flatnonzero(page_of == self._sealed)
        if len(last):
            page = codec.Page(self._open.image())
            yield last, [page], np.zeros(len(last), np.uint32), slots[last]
        sealed = np.flatnonzero(page_of < self._sealed)
        if self._sealing and len(sealed) and page_of[sealed].max() >= min(self._sealing):
            self._finish(len(self._sealing))
        yield from _walk(self._pages, sealed, page_of[sealed], slots)
        if self._elsewhere is not None:
            listed = np.flatnonzero(page_of >= _ELSEWHERE)
            yield from _walk(self._elsewhere, listed, page_of[listed] - _ELSEWHERE, slots)

    def block(self, number: int) -> tuple[codec.Page, int]:
        """Return the page and slot of one block; only when frozen."""
        slot = int(self._slot_of.values()[number])
        page_id = int(self._page_of.values()[number])
        if self._elsewhere is not None and page_id >= _ELSEWHERE:
            (page,) = self._elsewhere.pages([page_id - _ELSEWHERE])
        else:
            (page,) = self._pages.pages([page_id])
        return page, slot

    def images(self, group: Sequence[NDArray[np.int64]]) -> list[bytes]:
        """Return the pages that hold exactly these blocks, in this order; only when frozen."""
        page_of, slot_of = self._page_of.values(), self._slot_of.values()
        images = [b""] * len(group)
        listed = [i for i, numbers in enumerate(group) if page_of[numbers[0]] >= _ELSEWHERE]
        if listed and self._elsewhere is not None:
            ids = np.array([page_of[group[i][0]] for i in listed], np.int64) - _ELSEWHERE
            for rows, pages, page_index in self._elsewhere.windows(ids):
                for row, index in zip(rows.tolist(), page_index.tolist(), strict=True):
                    number = listed[row]
                    images[number] = self._taken_over(group[number], pages[index])
        for number in set(range(len(group))).difference(listed):
            numbers = group[number]
            images[number] = copy_page(self._pages, page_of[numbers], slot_of[numbers])
        return images

    def _taken_over(self, numbers: NDArray[np.int64], page: codec.Page) -> bytes:
        """Return a page that is elsewhere, and note what its blocks are like."""
        table = page.slots
        if len(table) != len(numbers):
            raise CorruptStoreError(
                f"a page has {len(table)} blocks where {len(numbers)} are recorded; run verify on "
                "the store that it is copied from"
            )
        self._note_lengths(numbers, table["length"].astype(np.int64))
        self._dtypes.values()[numbers] = table["dtype"]
        self._shapes.values()[numbers] = shape_codes(table["rows"], table["cols"])
        return bytes(page.payload)

    def _note_lengths(self, numbers: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._length.values()[numbers] = lengths
        self._cost.values()[numbers] = codec.page_cost(lengths)

    def _seal(self) -> None:
        number, page = self._sealed, self._open
        self._sealed += 1
        self._open = _OpenPage()
        if self._workers is None or not self._workers.are_several:
            self._write(number, page)
            return
        self._finish(len(self._sealing) - _SEALING + 1)
        work = partial(self._write, number, page)
        self._sealing[number] = self._workers.submit(lambda _threads: work())

    def _finish(self, count: int) -> None:
        """Wait for the oldest of the pages that are being written."""
        for number in list(self._sealing)[: max(count, 0)]:
            self._sealing.pop(number).result()

    def _write(self, number: int, page: _OpenPage) -> None:
        self._file.write(number, page.image())


def _walk(
    pool: PagePool, at: NDArray[np.int64], page_ids: NDArray[np.int64], slots: NDArray[np.uint32]
) -> Iterator[Window]:
    """Walk over the blocks ``at``, which are on these pages; ``slots`` are those of all."""
    for rows, pages, page_index in pool.windows(page_ids):
        yield at[rows], pages, page_index, slots[at[rows]]


class _OpenPage:
    """Encoded blocks of the page being filled."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self._arena: list[NDArray[np.uint8]] = []
        self._columns: list[tuple[NDArray[Any], ...]] = []
        self._image: bytes | None = None

    def add(self, arena: NDArray[np.uint8], columns: Sequence[NDArray[Any]], cost: int) -> None:
        """Add blocks that lie one after another; ``columns`` are those of `codec.build_page`."""
        offsets, lengths, *others = columns
        first, last = int(offsets[0]), int(offsets[-1] + lengths[-1])
        start = sum(len(piece) for piece in self._arena)
        self._arena.append(arena[first:last])
        self._columns.append((offsets - first + start, lengths, *others))
        self.count += len(offsets)
        self.bytes += cost
        self._image = None

    def image(self) -> bytes:
        if self._image is None:
            # Kept joined: it is asked for again, while some blocks of small tensors are added each.
            self._columns = [tuple(map(np.concatenate, zip(*self._columns, strict=True)))]
            if len(self._arena) > 1:
                self._arena = [np.concatenate(self._arena)]
            self._image = codec.build_page(self._arena[0], *self._columns[0])
        return self._image


class _Column(Generic[_Item]):
    """A growing array."""

    def __init__(self, empty: NDArray[_Item]) -> None:
        self._room = empty
        self._count = 0

    def append(self, part: NDArray[_Item]) -> None:
        before, count = self._count, self._count + len(part)
        self._room = with_room(self._room, count)
        self._room[before:count] = part
        self._count = count

    def values(self) -> NDArray[_Item]:
        return self._room[: self._count]


def with_room(column: NDArray[_Item], count: int) -> NDArray[_Item]:
    """Return an array that begins as this one does and has at least so many entries.

    It doubles, so that what is appended bit by bit is seldom moved.
    """
    if len(column) >= count:
        return column
    wider = np.empty((max(count, 2 * len(column)), *column.shape[1:]), column.dtype)
    wider[: len(column)] = column
    return wider
