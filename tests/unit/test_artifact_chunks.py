# SPDX-License-Identifier: Apache-2.0
"""Where artifacts are cut into chunks, and how these are put together again."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup.catalog import chunk_lengths, joined_chunks, laid_out
from pydedup.ingest.artifacts import cut_at, in_chunks, is_noise

SHORTEST, LONGEST = 28 * 1024, 32 * 1024


def content(count: int, seed: int = 0, letters: int = 256) -> bytes:
    """The same bytes with every version of every library, ``letters`` different ones."""
    hashed = b"".join(
        hashlib.blake2b(b"%d %d" % (seed, n)).digest() for n in range(-(-count // 64))
    )
    return bytes(byte % letters for byte in hashed[:count])


def cuts(text: bytes, *, seldom: bool = False) -> list[int]:
    return cut_at(np.frombuffer(text, np.uint8), seldom=seldom).tolist()


def cuts_one_by_one(text: bytes, bits: int = 11) -> list[int]:
    """The rule, place by place."""
    ends, start = [], 0
    while len(text) - start > LONGEST:
        for end in range(start + SHORTEST, start + LONGEST + 1):
            word = int.from_bytes(text[end - 8 : end], "little")
            if (word * 0x9E3779B97F4A7C15) % 2**64 >> (64 - bits) == 0:
                break
        ends.append(end)
        start = end
    return [*ends, len(text)]


@pytest.mark.parametrize("count", [0, 7, 8, LONGEST, LONGEST + 1, 3 * LONGEST + 5, 2_200_000])
@pytest.mark.parametrize("letters", [1, 3, 256])
def test_chunks_end_where_the_rule_says(count: int, letters: int) -> None:
    text = content(count, letters=letters)
    assert cuts(text, seldom=True) == cuts_one_by_one(text, 16)
    found = cuts(text)
    assert found == cuts_one_by_one(text)
    lengths = np.diff(found, prepend=0)
    assert (lengths <= LONGEST).all()
    assert (lengths[:-1] >= SHORTEST).all()


def test_zeros_take_no_memory() -> None:
    """Each of their places may be where a chunk ends: 64 MiB took a GiB."""
    zeros = np.zeros(20_000_000, np.uint8)
    tracemalloc.start()
    try:
        count = len(cut_at(zeros))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == -(-len(zeros) // SHORTEST)
    assert peak < len(zeros) // 10


@pytest.mark.parametrize("end", [SHORTEST, LONGEST - 1])
def test_the_first_and_the_last_place_where_a_chunk_may_end(end: int) -> None:
    text = bytearray(b"\1" * (LONGEST + 9))
    text[end - 8 : end] = bytes(8)
    assert cuts(bytes(text)) == [end, len(text)] == cuts_one_by_one(bytes(text))


@pytest.mark.parametrize(("count", "shape"), [(20_000, (1, 20_000)), (100_000, (4, LONGEST))])
def test_rows_are_as_long_as_a_chunk_may_be(count: int, shape: tuple[int, int]) -> None:
    text = content(count)
    view, lengths = in_chunks(text)
    assert (view.grid.rows, view.grid.cols) == shape
    assert view.grid.block_shape == (1, shape[1])
    assert sum(lengths) == count
    assert joined_chunks(chunk_lengths(lengths), view.data) == text


def test_places_are_kept_by_later_versions() -> None:
    """Others would share nothing with what is stored."""
    assert cuts(content(200_000)) == [28931, 59780, 92548, 123479, 152328, 184578, 200_000]
    noise = cuts(content(1_200_000), seldom=True)
    assert noise[:29] == list(range(LONGEST, 29 * LONGEST + 1, LONGEST))
    assert noise[29:32] == [981_255, 1_014_023, 1_046_791]


@pytest.mark.parametrize("letters", [256, 192, 64])
@pytest.mark.parametrize("count", [1_000_000, 1_048_576, 1_500_000])
def test_noise_is_what_is_large_and_does_not_compress(count: int, letters: int) -> None:
    text = content(count, letters=letters)
    assert is_noise(text) is (count >= 1 << 20 and letters == 256)
    assert not is_noise(text[: count // 3] + bytes(2 * count // 3))


@pytest.mark.parametrize("at", [0, 100, 150_000])
def test_what_was_put_in_changes_few_chunks(at: int) -> None:
    before = content(3_000_000, 1, 40)
    after = before[:at] + b'"padding": null, ' + before[at:]

    def chunks(text: bytes) -> set[bytes]:
        ends = cuts(text)
        return {text[start:end] for start, end in zip([0, *ends], ends, strict=False)}

    assert len(chunks(after) - chunks(before)) <= 6
    assert len(chunks(after)) > 40


@given(st.lists(st.binary(max_size=9), min_size=1), st.integers(9, 12))
def test_what_was_laid_out_is_joined(parts: list[bytes], width: int) -> None:
    text, lengths = b"".join(parts), [len(part) for part in parts]
    matrix = laid_out(np.frombuffer(text, np.uint8), lengths, width)
    assert matrix.shape == (len(parts), width)
    assert matrix.sum() == sum(text)  # the rest is zeros
    assert joined_chunks(chunk_lengths(lengths), matrix) == text


@pytest.mark.parametrize(
    "recorded",
    [
        *(b"", b"[", b"7", b"null", b'{"a": 1}', b"\xff", b"[" * 100_000),
        *(b"[1]", b"[1, 2, 3]", b"[1, -1]", b"[1, 9]", b"[1, []]", b"[1, 1e999]", b"[1, null]"),
    ],
)
def test_damaged_lengths(recorded: bytes) -> None:
    assert joined_chunks(recorded, np.ones((2, 8), np.uint8)) is None
