# SPDX-License-Identifier: Apache-2.0
"""New distinct blocks on their way to the store, as pages in a temporary file.

The spool keeps memory bounded whatever a batch of models holds: blocks are appended in order of
first appearance, each full page goes to the file. Blocks are addressed by their number. Once a
layout is known, `image` cuts final pages out of it, copying encoded bytes and never encoding
twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import PageNotFoundError, StorageFullError
from pydedup.layout import PAGE_CAPACITY, copy_page
from pydedup.pool import PagePool

__all__ = ["NO_BASE", "Spool"]

#: Instead of a reference to a base, for a block that is no delta.
NO_BASE = int(np.iinfo(np.int64).min)

_Item = TypeVar("_Item", bound=np.generic)


class Spool:
    """Append-only pages of new blocks. Not thread-safe; a context manager."""

    def __init__(self, memory_bytes: int) -> None:
        # Closed by __exit__; it has no name, so it vanishes with the process whatever happens.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=_spool_folder())  # noqa: SIM115
        self._pages = PagePool(self._read_pages, memory_bytes)
        self._extents: list[tuple[int, int]] = []
        self._end = 0
        self._open = _OpenPage()
        self._page_of = _Column(np.empty(0, np.int64))
        self._slot_of = _Column(np.empty(0, np.uint32))
        self._cost = _Column(np.empty(0, np.int64))
        self._length = _Column(np.empty(0, np.int64))
        self._hashes = _Column(np.empty((0, 2), np.uint64))
        self._bases = _Column(np.empty(0, np.int64))
        self._dtypes = _Column(np.empty(0, np.int64))
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        heights, widths = view.grid.shapes(indices)
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
            pages[start:stop] = len(self._extents)
            slots[start:stop] = self._open.count + np.arange(stop - start, dtype=np.uint32)
            self._open.add(encoded, view.dtype.code, heights, widths, base_tags, start, stop, costs)
            start = stop
        self._page_of.append(pages)
        self._slot_of.append(slots)
        self._cost.append(costs)
        self._length.append(encoded.lengths)
        self._hashes.append(digests)
        self._bases.append(bases)
        self._dtypes.append(np.full(len(indices), view.dtype.code, np.int64))
        self.count += len(indices)

    def freeze(self) -> None:
        """Write the last page out; call once after the last `append`."""
        if self._open.count:
            self._seal()

    @property
    def costs(self) -> NDArray[np.int64]:
        """Bytes that each block takes on a page, its slot included."""
        return self._cost.values()

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
    def bases(self) -> NDArray[np.int64]:
        """References to what each block is a delta of, or `NO_BASE`."""
        return self._bases.values()

    def move_bases(self, moved: NDArray[np.int64]) -> None:
        """Point bases at ``moved[n]`` instead of block n of the spool."""
        bases = self._bases.values()
        new = bases >= 0
        bases[new] = moved[bases[new]]

    def windows(
        self, numbers: NDArray[np.int64]
    ) -> Iterator[
        tuple[NDArray[np.int64], list[codec.Page], NDArray[np.uint32], NDArray[np.uint32]]
    ]:
        """Walk over blocks, as `PagePool.windows` does over pages; also yields the slots."""
        if not len(numbers):
            return
        page_of = self._page_of.values()[numbers]
        slots = self._slot_of.values()[numbers]
        last = np.flatnonzero(page_of == len(self._extents))
        if len(last):
            page = codec.Page(self._open.image())
            yield last, [page], np.zeros(len(last), np.uint32), slots[last]
        sealed = np.flatnonzero(page_of < len(self._extents))
        for rows, pages, page_index in self._pages.windows(page_of[sealed]):
            at = sealed[rows]
            yield at, pages, page_index, slots[at]

    def block(self, number: int) -> tuple[codec.Page, int]:
        """Return the page and slot of one block; only when frozen."""
        page_of = self._page_of.values()
        slot_of = self._slot_of.values()
        (page,) = self._pages.pages([int(page_of[number])])
        return page, int(slot_of[number])

    def image(self, numbers: NDArray[np.int64]) -> bytes:
        """Return the page that holds exactly these blocks, in this order; only when frozen."""
        page_of = self._page_of.values()
        slot_of = self._slot_of.values()
        return copy_page(self._pages, page_of[numbers], slot_of[numbers])

    def _seal(self) -> None:
        payload = self._open.image()
        try:
            self._file.seek(self._end)
            self._file.write(payload)
            self._file.flush()
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(
                    f"no space left for the temporary file of this add in {_spool_folder()}; "
                    "free some or set TMPDIR to a folder with room for the new blocks"
                ) from exc
            raise
        self._extents.append((self._end, len(payload)))
        self._end += len(payload)
        self._open = _OpenPage()

    def _read_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        for page_id in ids:
            offset, length = self._extents[page_id]
            self._file.seek(offset)
            payload = self._file.read(length)
            if len(payload) != length:
                raise PageNotFoundError("the temporary file of this add was cut short by someone")
            yield page_id, payload


class _OpenPage:
    """Encoded blocks of the page being filled."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self._arena: list[NDArray[np.uint8]] = []
        self._columns: list[tuple[NDArray[Any], ...]] = []
        self._image: bytes | None = None

    def add(
        self,
        encoded: codec.EncodedBlocks,
        dtype: int,
        rows: NDArray[np.int64],
        cols: NDArray[np.int64],
        base_tags: NDArray[np.uint64],
        start: int,
        stop: int,
        costs: NDArray[np.int64],
    ) -> None:
        lengths = encoded.lengths[start:stop]
        first = int(encoded.offsets[start])
        last = int(encoded.offsets[stop - 1] + encoded.lengths[stop - 1])
        base = sum(len(piece) for piece in self._arena)
        self._arena.append(encoded.arena[first:last].copy())
        self._columns.append(
            (
                encoded.offsets[start:stop] - first + base,
                lengths,
                encoded.encodings[start:stop].astype(np.int64),
                np.full(stop - start, dtype, np.int64),
                rows[start:stop],
                cols[start:stop],
                base_tags[start:stop],
            )
        )
        self.count += stop - start
        self.bytes += int(costs[start:stop].sum())
        self._image = None

    def image(self) -> bytes:
        if self._image is None:
            columns = [np.concatenate(column) for column in zip(*self._columns, strict=True)]
            self._image = codec.build_page(np.concatenate(self._arena), *columns)
        return self._image


class _Column(Generic[_Item]):
    """A growing array."""

    def __init__(self, empty: NDArray[_Item]) -> None:
        self._parts = [empty]

    def append(self, part: NDArray[_Item]) -> None:
        self._parts.append(part)

    def values(self) -> NDArray[_Item]:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


def _spool_folder() -> str:
    # /tmp is memory on many machines; /var/tmp is meant for files that may be large.
    if "TMPDIR" not in os.environ:
        with contextlib.suppress(OSError):
            folder = Path("/var/tmp")
            if folder.is_dir() and os.access(folder, os.W_OK):
                return str(folder)
    return tempfile.gettempdir()
