# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a table lie in a SQLite file, by its format.

https://sqlite.org/fileformat2.html, 1.5 (b-trees), 1.6 (rows that go on elsewhere) and 2.1 (what a
row has). The file may be in the middle of a change while it is looked at: what is found is a guess
that has to be held against something.
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["NotFoundInFileError", "Place", "Tree"]

#: Deeper no tree is that fits a file.
_MOST_LEVELS: Final = 20

_INTERIOR, _LEAF = 5, 13
#: Bytes of what a column has, by its type; from 12 on those of blobs and texts.
_FIXED_BYTES: Final = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)


class NotFoundInFileError(Exception):
    """Where something lies cannot be told."""


class Place(NamedTuple):
    """Where a row lies, as offsets in the file, and its last value, a blob.

    Attributes
    ----------
    start, stop
        Where the row goes on, supposing that it does so in one piece; else its leaf.
    value, here
        Where on its leaf the value begins, and how much of it is there.
    nbytes
        Of the value.
    """

    start: int
    stop: int
    value: int
    here: int
    nbytes: int


class Tree:
    """The b-tree of a table, as it is in the file, above its leaves as it was when first looked at.

    Attributes
    ----------
    page_bytes, usable
        Bytes of a page, and those of them that are not reserved for something else.
    file
        The handle of the file, and its size.
    """

    def __init__(self, handle: int, size: int) -> None:
        self.file = self._handle, self._size = handle, size
        header = os.pread(handle, 100, 0)
        if len(header) < 100:
            raise NotFoundInFileError
        (page_bytes,) = struct.unpack_from(">H", header, 16)
        self.page_bytes = 65536 if page_bytes == 1 else page_bytes
        self.usable = self.page_bytes - header[20]
        if self.usable < 480:
            raise NotFoundInFileError
        self._interior: dict[int, bytes] = {}
        self._leaf_level = -1  # below the root; not known yet

    def find(self, root: int, rows: Sequence[int]) -> dict[int, Place]:
        """Return the places of those of the rows that are found."""
        leaves: dict[int, list[int]] = {}
        for row in rows:
            leaves.setdefault(self._leaf_of(root, row), []).append(row)
        for leaf in leaves if len(leaves) > 1 else ():
            os.posix_fadvise(
                self._handle, self._offset(leaf), self.page_bytes, os.POSIX_FADV_WILLNEED
            )
        found = {}
        for leaf, wanted in leaves.items():
            on_leaf = self._rows_on(leaf)
            found.update({row: on_leaf[row] for row in wanted if row in on_leaf})
        return found

    def _offset(self, number: int) -> int:
        at = (number - 1) * self.page_bytes
        if not 0 <= at <= self._size - self.page_bytes:
            raise NotFoundInFileError
        return at

    def _read(self, number: int) -> bytes:
        page = os.pread(self._handle, self.page_bytes, self._offset(number))
        if len(page) < self.page_bytes:
            raise NotFoundInFileError
        return page

    def _leaf_of(self, root: int, row: int) -> int:
        """Return the number of the leaf that has the row, if any has."""
        number = root
        for level in range(_MOST_LEVELS):
            if level == self._leaf_level:
                return number
            page = self._interior.get(number) or self._read(number)
            if page[0] == _LEAF:
                self._leaf_level = level
                return number
            if page[0] != _INTERIOR:
                break
            self._interior[number] = page
            number = _child(page, row)
        raise NotFoundInFileError

    def _rows_on(self, leaf: int) -> dict[int, Place]:
        """Return the rows on a leaf."""
        page = self._read(leaf)
        if page[0] != _LEAF:
            raise NotFoundInFileError
        found = {}
        for cell in _cells(page, 8):
            row, place = self._place_of(page, self._offset(leaf), cell)
            if place.stop <= self._size:
                found[row] = place
        return found

    def _place_of(self, page: bytes, leaf: int, cell: int) -> tuple[int, Place]:
        """Return the number of a row, and its place; ``cell`` is where on its leaf it begins."""
        length, at = _varint(page, cell)
        row, at = _varint(page, at)
        before, nbytes = _last_value(page, at)
        if before + nbytes != length:
            raise NotFoundInFileError
        most, least = self.usable - 35, (self.usable - 12) * 32 // 255 - 23
        value = leaf + at + before
        if length <= most:
            return row, Place(leaf, leaf + self.page_bytes, value, nbytes, nbytes)
        here = least + (length - least) % (self.usable - 4)
        here = here if here <= most else least
        start = self._offset(_number(page, at + here))
        pages = -(-(length - here) // (self.usable - 4))
        stop = start + pages * self.page_bytes
        return row, Place(start, stop, value, here - before, nbytes)


def _last_value(head: bytes, at: int) -> tuple[int, int]:
    """Return how far behind ``at``, where a row's header is, its last value is, and its bytes."""
    header_bytes, types_at = _varint(head, at)
    kind, before = 0, 0
    while types_at < at + header_bytes:
        before += _value_bytes(kind)
        kind, types_at = _varint(head, types_at)
    return header_bytes + before, _value_bytes(kind)


def _value_bytes(kind: int) -> int:
    return (kind - 12) // 2 if kind >= 12 else _FIXED_BYTES[min(kind, 9)]


def _child(page: bytes, row: int) -> int:
    """Return the number of the child of an interior page that a row is below."""
    count = _count(page, 12)

    def cell(number: int) -> int:
        (at,) = struct.unpack_from(">H", page, 12 + 2 * number)
        return int(at)

    # Of thousands of cells a dozen are looked at.
    number = bisect.bisect_left(range(count), row, key=lambda n: _varint(page, cell(n) + 4)[0])
    return _number(page, cell(number) if number < count else 8)


def _cells(page: bytes, header_bytes: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{_count(page, header_bytes)}H", page, header_bytes)


def _count(page: bytes, header_bytes: int) -> int:
    """Return how many cells a page has, of which the header is followed by where they are."""
    if len(page) < header_bytes:
        raise NotFoundInFileError
    count = int.from_bytes(page[3:5], "big")
    if header_bytes + 2 * count > len(page):
        raise NotFoundInFileError
    return count


def _number(page: bytes, at: int) -> int:
    if at + 4 > len(page):
        raise NotFoundInFileError
    return int.from_bytes(page[at : at + 4], "big")


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to 64 bits, and where it ends."""
    value = 0
    for end, byte in enumerate(page[at : at + 8], at + 1):
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, end
    if at + 9 > len(page):
        raise NotFoundInFileError
    return value << 8 | page[at + 8], at + 9
