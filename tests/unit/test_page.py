# SPDX-License-Identifier: Apache-2.0
"""Pages: what a Page is, that it borrows its bytes, and that damage is noticed."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError, SchemaVersionError
from pydedup.types import DType


def small_page() -> bytes:
    rng = np.random.default_rng(3)
    blocks: list[NDArray[np.generic]] = [
        rng.normal(0, 0.02, (24, 40)).astype(np.float32),
        rng.integers(0, 256, (3, 5), np.uint8),
        np.zeros((16, 16), np.int64),
    ]
    views = [MatrixView.of(block, (24, 40)) for block in blocks]
    encoded = [codec.encode_blocks(view, [0], planes=True) for view in views]
    lengths = np.array([len(one.arena) for one in encoded])
    return codec.build_page(
        np.concatenate([one.arena for one in encoded]),
        np.cumsum(lengths) - lengths,
        lengths,
        [int(one.encodings[0]) for one in encoded],
        [view.dtype.code for view in views],
        [view.grid.rows for view in views],
        [view.grid.cols for view in views],
    )


def test_page_borrows_the_bytes() -> None:
    payload = small_page()
    page = codec.Page(payload)
    before = sys.getrefcount(payload)
    assert page.payload is payload
    slots = page.slots
    assert sys.getrefcount(payload) == before + 1
    del page
    assert slots.dtype == codec.SLOT_DTYPE
    assert slots["rows"].tolist() == [24, 3, 16]
    assert slots["length"].tolist()[1] == 15
    assert sys.getrefcount(payload) == before
    del slots
    assert sys.getrefcount(payload) == before - 1


def test_page_figures() -> None:
    payload = small_page()
    page = codec.Page(payload)
    assert (page.nbytes, page.n_slots) == (len(payload), 3)
    assert page.checksum == codec.page_checksum(payload) == payload[8:24]
    assert not page.slots.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        page.slots["rows"][0] = 1
    most = codec.PAGE_OVERHEAD_BYTES + int(codec.page_cost(page.slots["length"]).sum())
    assert len(payload) <= most < len(payload) + codec.PAGE_OVERHEAD_BYTES


@pytest.mark.parametrize("payload", [bytearray(64), memoryview(bytes(64)), "text", None])
def test_page_takes_bytes_alone(payload: object) -> None:
    with pytest.raises(TypeError):
        codec.Page(payload)  # type: ignore[arg-type]


class MadeWhenAsked(Sequence[codec.Page]):
    """Pages of which nobody but who asked for one holds it."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        return codec.Page(self.payload)


def test_pages_need_nobody_else_to_hold_them() -> None:
    payload = small_page()
    wanted = codec.page_digests(codec.Page(payload))
    for _ in range(100):
        found = codec.block_digests(MadeWhenAsked(payload), [0, 1, 1], [0, 1, 2])
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("other", [None, "page", b"PDPG", np.zeros(1)])
def test_what_is_no_page_is_named(other: object) -> None:
    pages: Any = [codec.Page(small_page()), other]
    with pytest.raises(ArgumentError, match=f"pages holds a .*{type(other).__name__}"):
        codec.block_digests(pages, [0], [0])


@pytest.mark.parametrize("encoding", [codec.Encoding.PLANES, codec.Encoding.QUANTISED])
def test_what_a_slot_claims_takes_no_memory(encoding: codec.Encoding) -> None:
    base = [1 if encoding.is_delta else 0]
    payload = codec.build_page(
        np.zeros(600, np.uint8), [0], [600], [encoding], [2], [1 << 24], [63], base
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptStoreError):
        codec.page_digests(codec.Page(payload))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB, of 4 GiB


def test_empty_page() -> None:
    nothing = np.empty(0, np.uint8)
    page = codec.Page(codec.build_page(nothing, [], [], [], [], [], []))
    assert (page.nbytes, page.n_slots, len(page.slots)) == (64, 0, 0)
    assert codec.page_digests(page).shape == (0, 2)


def test_every_changed_byte_is_noticed() -> None:
    payload = small_page()
    for at in range(len(payload)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[at] ^= change
            newer = at in (4, 5) and damaged[4:6] != b"\0\0"
            error = SchemaVersionError if newer else CorruptStoreError
            with pytest.raises(error):
                codec.Page(bytes(damaged))


def test_every_truncation_is_noticed() -> None:
    payload = small_page()
    for length in range(len(payload)):
        with pytest.raises(CorruptStoreError):
            codec.Page(payload[:length])
    with pytest.raises(CorruptStoreError, match=f"should have {len(payload)} bytes"):
        codec.Page(payload + b"\0")


def test_newer_version_is_told_apart() -> None:
    payload = bytearray(small_page())
    payload[4:6] = b"\x03\0"
    with pytest.raises(SchemaVersionError, match=r"format version 3.*use a newer pydedup"):
        codec.Page(bytes(payload))
    with pytest.raises(SchemaVersionError, match="format version 3"):
        codec.page_checksum(bytes(payload))
    payload[4:6] = b"\x02\0"
    with pytest.raises(CorruptStoreError, match="version 2 is for pages with deltas"):
        codec.Page(bytes(payload))


def test_pages_are_read_and_dropped_by_many_threads() -> None:
    payload = small_page()
    before = sys.getrefcount(payload)
    wanted = codec.page_digests(codec.Page(payload))
    wrong: list[int] = []

    def read() -> None:
        for _ in range(200):
            if not (codec.page_digests(codec.Page(payload)) == wanted).all():
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sys.getrefcount(payload) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": [1]}, "outside of the arena"),
        ({"offsets": [-1]}, "outside of the arena"),
        ({"lengths": [63]}, "does not fit its shape"),
        ({"lengths": [-1]}, "outside of the arena"),
        ({"encodings": [4]}, "unknown encoding"),
        ({"encodings": [2], "lengths": [32]}, "names no base"),
        ({"encodings": [1]}, "longer than its raw block"),
        ({"encodings": [256]}, "encodings must hold integers of uint8, not of 256 to 256"),
        ({"dtypes": [0]}, "unknown dtype"),
        ({"rows": [5]}, "does not fit its shape"),
        ({"rows": [0]}, "no elements"),
        ({"rows": [4, 4]}, "differ in length"),
        ({"bases": [1]}, "base"),
        ({"bases": [-1]}, "bases must hold integers of uint64, not of -1 to -1"),
    ],
)
def test_blocks_that_no_page_can_hold(changed: dict[str, list[int]], message: str) -> None:
    columns: dict[str, list[int]] = {
        "offsets": [0],
        "lengths": [64],
        "encodings": [0],
        "dtypes": [DType.F32.code],
        "rows": [4],
        "cols": [4],
        "bases": [0],
    }
    arena = np.arange(64, dtype=np.uint8)
    assert len(codec.build_page(arena, **columns)) == 192
    with pytest.raises(ArgumentError, match=message):
        codec.build_page(arena, **{**columns, **changed})
