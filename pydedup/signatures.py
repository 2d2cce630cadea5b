# SPDX-License-Identifier: Apache-2.0
"""The similarity index of a store, as segments in the table ``signatures`` (docs/format.md).

Each add leaves a segment: what it indexed of its new blocks, by their place, in pieces per kind of
block, and which pages that covers. Nothing is ever changed in a segment. When its pages go, what it
says of them is needless but not wrong, and what is on a page that no segment covers can be indexed
again from the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.sets import is_among
from pydedup.similarity import L2LSH
from pydedup.types import DType

__all__ = [
    "SIDE_BITS",
    "BlockKind",
    "Segment",
    "covering_rows",
    "drop_dead_segments",
    "drop_segment",
    "group_of",
    "load_piece",
    "new_index",
    "read_pieces",
    "read_segments",
    "rows_of_kind",
    "segment_rows",
]

#: (dtype, rows, cols) of a block.
BlockKind = tuple[DType, int, int]

#: Rows and columns of a block that is indexed are below two to the power of this.
SIDE_BITS = 28

_SIDE = (1 << SIDE_BITS) - 1
# Before the index of blocks whose dtype has no distances. It is of f32, and a pydedup that does not
# know of that must not take them for blocks of f32.
_AS_F32 = b"PDLN"
_COVERAGE = 0  # group of the rows that say what a segment covers
_NUMBER_BITS = 20
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """What one add indexed.

    Attributes
    ----------
    rows
        The numbers (column ``segment``) of all its rows.
    page_ids
        The pages whose blocks it covers, int64, ascending.
    """

    rows: Sequence[int]
    page_ids: NDArray[np.int64]


def group_of(kind: BlockKind) -> int:
    """Return the group of a kind of block: dtype code, rows and columns; never 0."""
    dtype, rows, cols = kind
    return (dtype.code << 2 * SIDE_BITS) | (rows << SIDE_BITS) | cols


def new_index(kind: BlockKind) -> L2LSH:
    """Return an empty index for one kind of block: of f32 where the dtype has no distances."""
    dtype, rows, cols = kind
    return L2LSH((rows, cols), _index_dtype(dtype).numpy)


def _index_dtype(dtype: DType) -> DType:
    return dtype if dtype.has_distances else DType.F32


def _prefix(dtype: DType) -> bytes:
    return b"" if dtype.has_distances else _AS_F32


def segment_rows(
    number: int, page_ids: Iterable[int], pieces: Iterable[tuple[BlockKind, L2LSH]]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield the rows of a segment; ``number`` is that of the add's first model, used once."""
    first = count = number << _NUMBER_BITS
    for kind, index in pieces:
        count += 1
        yield count, group_of(kind), _prefix(kind[0]) + index.save()
    covered = np.array([count - first, *sorted(page_ids)], "<i8")
    yield first, _COVERAGE, covered.tobytes()


def covering_rows(adapter: Adapter) -> NDArray[np.int64]:
    """Return the rows that say what segments cover, one for each; int64, ascending."""
    return np.array(adapter.segments(_COVERAGE), np.int64)


def rows_of_kind(adapter: Adapter, kind: BlockKind) -> NDArray[np.int64]:
    """Return the rows of the pieces of one kind of block; int64, ascending."""
    return np.array(adapter.segments(group_of(kind)), np.int64)


def read_segments(adapter: Adapter, rows: Sequence[int] | None = None) -> list[Segment]:
    """Return what is in the table, or in some of `covering_rows`.

    What does not parse is left out, since it can be made anew.
    """
    read = adapter.signatures(_COVERAGE, rows)
    sound = [row for row in read if row[1] and len(row[1]) % 8 == 0]
    # All are looked at together: there may be thousands, of a few pages each.
    numbers = np.frombuffer(b"".join(payload for _, payload in sound), "<i8").astype(np.int64)
    sizes = np.array([len(payload) // 8 for _, payload in sound], np.int64)
    stops = np.cumsum(sizes)
    starts = stops - sizes
    falls = np.concatenate([[False], numbers[1:] <= numbers[:-1]])
    falls[starts] = False  # a count, and the first page behind it, are not compared
    falls[starts[sizes > 1] + 1] = False
    wrong = set(np.searchsorted(stops, np.flatnonzero(falls), side="right").tolist())
    found = []
    places = zip(sound, numbers[starts].tolist(), starts.tolist(), stops.tolist(), strict=True)
    for number, ((first, _), count, start, stop) in enumerate(places):
        may_be = 0 <= count < min(1 << _NUMBER_BITS, (1 << 63) - first)
        if may_be and number not in wrong:
            found.append(Segment(range(first, first + count + 1), numbers[start + 1 : stop]))
    return found


def read_pieces(adapter: Adapter, kind: BlockKind, rows: Sequence[int]) -> Iterator[L2LSH]:
    """Yield the pieces of some of `rows_of_kind`, oldest first.

    A damaged one is left out: then similar blocks may be missed, which costs space and nothing
    else.
    """
    for _, payload in adapter.signatures(group_of(kind), rows):
        with suppress(CorruptStoreError):
            yield load_piece(group_of(kind), payload)[1]


def load_piece(group: int, payload: bytes) -> tuple[BlockKind, L2LSH]:
    """Return what blocks a piece of this group is of, and their index.

    Raises
    ------
    CorruptStoreError
        When there is no such group, or the payload is no index of its blocks.
    """
    code, rows, cols = group >> 2 * SIDE_BITS, group >> SIDE_BITS & _SIDE, group & _SIDE
    try:
        dtype = DType.of_code(code)
    except ArgumentError as error:
        raise CorruptStoreError(f"signatures are of group {group}, which is none") from error
    prefix = _prefix(dtype)
    if not payload.startswith(prefix):
        raise CorruptStoreError(f"signatures of group {group} do not begin with {prefix!r}")
    index = L2LSH.load(payload.removeprefix(prefix))
    if (index.dtype, index.block_shape) != (_index_dtype(dtype).numpy, (rows, cols)):
        raise CorruptStoreError(f"signatures of group {group} are those of other blocks")
    return (dtype, rows, cols), index


def drop_segment(adapter: Adapter, number: int) -> None:
    """Delete the segment of an add that came to nothing; inside a transaction of the caller.

    ``number`` is that of `segment_rows`. A segment that was not written to its end has no row that
    says how many there are, but none is missing between them.
    """
    first = number << _NUMBER_BITS
    rows = range(first, first + _ROWS_AT_ONCE)
    while any(True for _ in adapter.signatures_of(rows)):
        adapter.delete_signatures(rows)
        rows = range(rows.stop, rows.stop + _ROWS_AT_ONCE)


def drop_dead_segments(adapter: Adapter) -> int:
    """Delete segments of whose pages none is left; returns how many. Opens a transaction."""
    segments = read_segments(adapter)
    # Only now: the pages of one that an add has written meanwhile are there.
    existing = np.array([row.id for row in adapter.page_rows()], np.int64)
    dead = [segment for segment in segments if not is_among(segment.page_ids, existing).any()]
    if dead:
        with adapter.transaction():
            adapter.delete_signatures([number for segment in dead for number in segment.rows])
    return len(dead)
