# SPDX-License-Identifier: Apache-2.0
"""Blocks by their hash: from another store, from a file of a model, from a damaged page itself.

What is given out was decoded, and hashes to what was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pydedup import codec
from pydedup.adapter import Adapter, BlockRow
from pydedup.adapter_options import only_sound_rows, page_copies
from pydedup.blocks import MatrixView, row_axes
from pydedup.catalog import recorded_pages
from pydedup.errors import (
    CorruptStoreError,
    FormatError,
    MissingStoreError,
    NotAStoreError,
    PydedupError,
    UnsupportedFormatError,
)
from pydedup.formats.base import ModelSource
from pydedup.formats.registry import open_source
from pydedup.hashing import digest_bytes, hash_keys, hash_view
from pydedup.ingest.artifacts import LEAST_BYTES, in_chunks, is_noise
from pydedup.ingest.deltas import delta_limits
from pydedup.ingest.staged import artifacts_of
from pydedup.layout import are_deltas, block_at, split_place
from pydedup.pool import PagePool
from pydedup.sets import in_parts
from pydedup.types import DType

__all__ = [
    "BlockSource",
    "EncodedBlock",
    "FileSource",
    "StoreSource",
    "Wanted",
    "as_raw",
    "base_dtypes",
    "block_source",
    "delta_on",
    "dtype_of_base",
    "on_base",
    "page_of_slot",
    "read_block",
]

_HASHES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block: what its content hashes to, its dtype code and shape.

    Blocks of another dtype may have the same bytes, so the hash says too little.
    """

    digest: bytes
    dtype: int
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block as a page holds it.

    Attributes
    ----------
    tag
        That of its base, 0 for a block that is no delta.
    delta
        What a block by itself is where it was found, if that is a delta.
    """

    content: Wanted
    encoding: int
    data: bytes
    tag: int = 0
    delta: EncodedBlock | None = None


class BlockSource(Protocol):
    """Where blocks are looked for.

    Attributes
    ----------
    damage
        What could not be read there: of a page or a tensor, what is wrong with it.
    unreadable
        Digests of blocks that are there, on damaged pages: which.
    """

    damage: dict[str, str]
    unreadable: dict[bytes, set[int]]

    def find(
        self,
        wanted: Collection[Wanted],
        block_shapes: Collection[tuple[int, int]],
        tell: Callable[[], None],
    ) -> Iterator[EncodedBlock]:
        """Yield those that are there, in any order, perhaps more than once; none is a delta.

        ``block_shapes`` are those of the tensors that they are of; ``tell`` is called time and
        again, also where nothing is found for long.
        """


class StoreSource:
    """Another store, on any database."""

    def __init__(self, adapter: Adapter, memory_bytes: int) -> None:
        self._adapter = adapter
        self._pool = PagePool(recorded_pages(adapter), memory_bytes, copies=page_copies(adapter))
        self.damage: dict[str, str] = {}
        self.unreadable: dict[bytes, set[int]] = {}

    def find(
        self,
        wanted: Collection[Wanted],
        block_shapes: Collection[tuple[int, int]],
        tell: Callable[[], None],
    ) -> Iterator[EncodedBlock]:
        """Yield those that are there; see `BlockSource`. Damaged pages of it are passed over."""
        asked, found = set(wanted), set[Wanted]()
        hashes = sorted({block.digest for block in asked})
        for some in in_parts(hashes, _HASHES_AT_ONCE):
            rows = self._adapter.find_blocks(some)
            for row in sorted(rows, key=lambda row: (row.page_id, row.slot)):
                tell()
                block = self._read(row)
                if block is not None and block.content in asked:
                    found.add(block.content)
                    yield block
        for payload in self._payloads_in_rows(asked - found):
            tell()
            yield from _chunks_matching(payload, asked)

    def _payloads_in_rows(self, asked: Collection[Wanted]) -> Iterator[bytes]:
        """Yield artifacts that may have these blocks: stores of before have them whole."""
        if not any(block.dtype == DType.U8.code for block in asked):
            return
        with only_sound_rows(self._adapter):
            for model in self._adapter.models():
                for name, _ in self._adapter.artifacts(model.id):
                    payload = self._adapter.artifact(model.id, name)
                    if payload is not None:
                        yield payload

    def _read(self, row: BlockRow) -> EncodedBlock | None:
        """Return a block by itself, and what it is here; None where that is damaged."""
        at = row.page_id
        try:
            base = None
            if row.base_id is not None:
                at, _ = split_place(row.base_id)
                base = block_at(self._pool, row.base_id)
                at = row.page_id
            block = read_block(self._pool.pages([at])[0], row.slot, base)
        except CorruptStoreError as exc:
            self._note(row, at, str(exc))
            return None
        if block.content.digest != row.hash128:
            self._note(row, at, "it does not hold what was recorded")
        return block

    def _note(self, row: BlockRow, page_id: int, said: str) -> None:
        said = said.removeprefix(f"page {page_id}: ")
        self.damage.setdefault(f"page {page_id}", said)
        self.unreadable.setdefault(row.hash128, set()).add(page_id)


class FileSource:
    """A model as it was added, in a file or folder of any known format."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.damage: dict[str, str] = {}
        self.unreadable: dict[bytes, set[int]] = {}

    def find(
        self,
        wanted: Collection[Wanted],
        block_shapes: Collection[tuple[int, int]],
        tell: Callable[[], None],
    ) -> Iterator[EncodedBlock]:
        """Yield those that are there; see `BlockSource`. Memory: one tensor, or artifact."""
        asked = set(wanted)
        dtypes = {block.dtype for block in asked}
        for entry in self._source.entries:
            if entry.dtype.code not in dtypes or not asked:
                continue
            try:
                array = self._source.read(entry.name)
            except FormatError as exc:
                self.damage.setdefault(f"tensor {entry.name!r}", str(exc))
                continue
            # Of an older add, a stack of matrices may be cut as one matrix.
            for axes, shape in itertools.product({1, row_axes(array.shape)}, block_shapes):
                tell()
                yield from _matching(MatrixView.of(array, shape, axes), asked)
        if DType.U8.code in dtypes:
            for artifact in artifacts_of(self._source, self._source.graph):
                tell()
                yield from _chunks_matching(artifact.payload, asked)


@contextlib.contextmanager
def block_source(
    place: str, connect: Callable[[str], Adapter], memory_bytes: int
) -> Iterator[BlockSource]:
    """Open what blocks are looked for in: a store (a backup is one), or a model's file or folder.

    Parameters
    ----------
    place
        URL of a store, or a path.
    connect
        Opens a store for reading.

    Raises
    ------
    UnsupportedFormatError
        When a path is neither a store nor a model.
    """
    # Not `Path.is_dir`, which raises where that cannot be told: who connects says why.
    if "://" in place or not os.path.isdir(place):  # noqa: PTH112
        try:
            adapter = connect(place)
        except NotAStoreError as exc:
            if isinstance(exc, MissingStoreError) and "://" in place:
                raise NotAStoreError(f"there is nothing to repair from: {exc.what}") from exc
            if "://" in place:
                raise
        else:
            with contextlib.closing(adapter):
                yield StoreSource(adapter, memory_bytes)
            return
    try:
        opened = open_source(place, every_set=True)  # blocks are looked for by their hash
    except UnsupportedFormatError as exc:
        raise UnsupportedFormatError(
            f"{place} is neither a store nor a model in a format that pydedup reads"
        ) from exc
    with opened as model:
        yield FileSource(model)


def _chunks_matching(payload: bytes, asked: Collection[Wanted]) -> Iterator[EncodedBlock]:
    """Yield the blocks of an artifact that are wanted, encoded."""
    if len(payload) >= LEAST_BYTES:
        for seldom in (False, True) if is_noise(payload) else (False,):
            yield from _matching(in_chunks(payload, seldom=seldom)[0], asked)


def _matching(view: MatrixView, asked: Collection[Wanted]) -> Iterator[EncodedBlock]:
    """Yield the blocks of a matrix that are wanted, encoded."""
    grid = view.grid
    heights, widths = grid.all_shapes()
    columns = hash_keys(hash_view(view)), heights.tolist(), widths.tolist()
    contents = [
        Wanted(digest, view.dtype.code, *shape) for digest, *shape in zip(*columns, strict=True)
    ]
    hits = [i for i, content in enumerate(contents) if content in asked]
    encoded = codec.encode_blocks(view, np.array(hits, np.int64), planes=True)
    found = zip(hits, encoded.encodings.tolist(), encoded.pieces(), strict=True)
    for number, encoding, piece in found:
        yield EncodedBlock(contents[number], encoding, piece.tobytes())


def read_block(
    page: codec.Page, slot: int, base: tuple[codec.Page, int] | None, *, keep_delta: bool = False
) -> EncodedBlock:
    """Return a block of a page with what it holds; a delta also by itself, unless it is kept.

    Raises CorruptStoreError when it does not decode.
    """
    if slot >= page.n_slots:
        raise CorruptStoreError(f"there is no slot {slot}")
    entry = page.slots[slot]
    dtype, rows, cols = (int(entry[name]) for name in ("dtype", "rows", "cols"))
    view = MatrixView.of(np.empty((rows, cols), DType.of_code(dtype).numpy), (rows, cols))
    bases = None if base is None else codec.StoredBases([base[0]], [0], [base[1]])
    codec.read_blocks(view, [0], [page], [0], [slot], bases=bases)
    content = Wanted(digest_bytes(hash_view(view)), dtype, rows, cols)
    encoding = codec.Encoding(int(entry["encoding"]))
    data = codec.encoded_blocks([page], [0], [slot]).arena.tobytes()
    tag = 0
    if bases is not None and encoding.is_delta:
        tag = int(codec.base_tags(codec.block_digests(bases.pages, [0], bases.slots))[0])
    block = EncodedBlock(content, int(encoding), data, tag)
    if keep_delta or not encoding.is_delta:
        return block
    fresh = codec.encode_blocks(view, [0], planes=True)
    return EncodedBlock(content, int(fresh.encodings[0]), fresh.arena.tobytes(), delta=block)


def on_base(delta: EncodedBlock, base: tuple[codec.Page, int]) -> EncodedBlock:
    """Return a delta on a base of the same content as its own.

    Raises CorruptStoreError when the base is another.
    """
    return read_block(_page_of(delta), 0, base, keep_delta=True)


def delta_on(block: EncodedBlock, base: tuple[codec.Page, int]) -> EncodedBlock:
    """Return a block that is no delta as one on a base, if that is smaller; else as it is.

    Raises CorruptStoreError when the base does not decode.
    """
    page, slot = base
    content, entry = block.content, page.slots[slot]
    dtype = int(entry["dtype"])
    if dtype not in base_dtypes(content.dtype):
        return block
    values, of = _decoded(_page_of(block), 0, content.dtype), _decoded(page, slot, dtype)
    limit = delta_limits(np.array([len(block.data)], np.int64))
    shape = values.grid.block_shape
    made = [
        codec.encode_deltas(values, [0], of, [0], limits=limit, is_transposed=is_transposed)
        for is_transposed, its in ((False, of.grid.block_shape), (True, of.grid.block_shape[::-1]))
        if its == shape
    ]
    sound = [one for one in made if one.lengths[0]]
    if not sound:
        return block
    delta = min(sound, key=lambda one: int(one.lengths[0]))
    tag = int(codec.base_tags(codec.block_digests([page], [0], [slot]))[0])
    return EncodedBlock(content, int(delta.encodings[0]), delta.arena.tobytes(), tag)


def as_raw(block: EncodedBlock) -> EncodedBlock:
    """Return a block that is no delta with its elements as they are."""
    if block.encoding == codec.Encoding.RAW:
        return block
    view = _decoded(_page_of(block), 0, block.content.dtype)
    fresh = codec.encode_blocks(view, [0], planes=False)
    return EncodedBlock(block.content, int(fresh.encodings[0]), fresh.arena.tobytes())


def _decoded(page: codec.Page, slot: int, dtype: int) -> MatrixView:
    """Return a block that is no delta."""
    shape = int(page.slots[slot]["rows"]), int(page.slots[slot]["cols"])
    view = MatrixView.of(np.empty(shape, DType.of_code(dtype).numpy), shape)
    codec.read_blocks(view, [0], [page], [0], [slot])
    return view


def _page_of(block: EncodedBlock) -> codec.Page:
    """Return a page with nothing but a block."""
    data = np.frombuffer(block.data, np.uint8)
    content = block.content
    columns = [block.encoding], [content.dtype], [content.rows], [content.cols]
    tags = np.array([block.tag], np.uint64)
    return codec.Page(codec.build_page(data, [0], [len(data)], *columns, tags))


def page_of_slot(payload: bytes, slot: int) -> codec.Page | None:
    """Return a page with nothing but what a damaged page says is in a slot, if that can be true.

    Whether the block is as it was only its hash can tell.
    """
    at = codec.PAGE_HEADER_BYTES + codec.SLOT_BYTES * slot
    if at + codec.SLOT_BYTES > len(payload):
        return None
    entry = np.frombuffer(payload, codec.SLOT_DTYPE, 1, at)
    # Reading checks the base itself; any tag will do.
    tags = are_deltas(entry["encoding"]).astype(np.uint64)
    try:
        image = codec.build_page(
            np.frombuffer(payload, np.uint8),
            entry["offset"],
            entry["length"],
            entry["encoding"],
            entry["dtype"],
            entry["rows"],
            entry["cols"],
            tags,
        )
        return codec.Page(image)
    except PydedupError:
        return None


def base_dtypes(dtype: int) -> tuple[int, ...]:
    """Return the dtype codes that the base of a delta can have; the delta's own first."""
    codes = (of.code for of in DType.of_code(dtype).base_dtypes)
    return tuple(sorted(codes, key=lambda code: code != dtype))


def dtype_of_base(page: codec.Page) -> int:
    """Return the dtype code of the base of a page's first block, a delta (docs/format.md)."""
    return page.payload[int(page.slots[0]["offset"]) + 2]
