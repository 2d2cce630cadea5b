# SPDX-License-Identifier: Apache-2.0
"""The Cython module: cutting and joining payloads, from many threads at once."""

from __future__ import annotations

import hashlib
import random
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup._pages import begin_writeback, is_in_memory, join_parts, scatter, split_payload


@given(st.binary(max_size=2000), st.integers(min_value=1, max_value=300))
def test_joining_undoes_cutting(payload: bytes, part_bytes: int) -> None:
    parts = split_payload(payload, part_bytes)
    assert join_parts(parts) == payload
    assert [len(part) for part in parts[:-1]] == [part_bytes] * (len(parts) - 1)
    assert len(parts[-1]) <= part_bytes
    assert len(parts[-1]) > 0 or not payload


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_parts_of_any_kind_are_joined(parts: list[bytes]) -> None:
    joined = join_parts(parts)
    assert type(joined) is bytes
    assert joined == b"".join(parts)
    assert join_parts(map(bytearray, parts)) == joined
    assert join_parts(memoryview(part) for part in parts) == joined


def test_cutting_copies_nothing() -> None:
    payload = bytearray(b"abcdef")
    parts = split_payload(payload, 4)
    payload[5] = 0x21
    assert bytes(parts[1]) == b"e!"
    assert bytes(split_payload(array("i", [1, 2]), 4)[1]) == (2).to_bytes(4, sys.byteorder)


def test_one_part_of_bytes_is_returned_itself() -> None:
    payload = bytes(100_000)
    assert join_parts([payload]) is payload
    copied = join_parts([memoryview(payload)])
    assert copied == payload
    assert copied is not payload


@pytest.mark.parametrize("part_bytes", [0, -1])
def test_parts_have_a_size(part_bytes: int) -> None:
    with pytest.raises(ValueError, match=str(part_bytes)):
        split_payload(b"x", part_bytes)


@pytest.mark.parametrize("part", ["text", 7, None, memoryview(b"abcd")[::2]])
def test_what_is_no_buffer_is_refused(part: object) -> None:
    good = bytearray(b"good")
    with pytest.raises((TypeError, BufferError)):
        join_parts([good, part])  # type: ignore[list-item]
    good.append(1)  # its buffer was released
    if not isinstance(part, memoryview):
        with pytest.raises(TypeError):
            split_payload(part, 1)  # type: ignore[arg-type]


def test_threads_join_at_once() -> None:
    # Each has its own parts, and shares one with all others.
    shared = random.Random(0).randbytes(1 << 20)
    wrong: list[int] = []

    def join(number: int) -> None:
        own = random.Random(number).randbytes(300_001)
        expected = hashlib.sha256(own + shared + own).digest()
        for _ in range(20):
            parts: list[Any] = [*split_payload(own, 1 << 12), shared, bytearray(own)]
            if hashlib.sha256(join_parts(parts)).digest() != expected:
                wrong.append(number)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(min_value=0, max_value=5))
def test_scattering_undoes_joining(parts: list[bytes], more: int) -> None:
    given_parts = [bytearray(len(part)) for part in parts]
    scatter(b"".join(parts) + bytes(more), given_parts)
    assert given_parts == parts
    if any(parts):
        with pytest.raises(ValueError, match=f"parts take {sum(map(len, parts))}"):
            scatter(b"".join(parts)[:-1], given_parts)
    for part in given_parts:
        part.append(1)  # no buffer is held any more


def test_what_is_not_writable_is_not_scattered_into() -> None:
    good = bytearray(4)
    for bad in (b"fixed", memoryview(b"fixed"), memoryview(bytearray(8))[::2], None):
        with pytest.raises((TypeError, BufferError)):
            scatter(b"12345678", [good, bad])  # type: ignore[list-item]
    good.append(1)


def test_what_is_in_memory_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    with path.open("rb") as file:
        assert file.read() == bytes(100_000)
        assert is_in_memory(file.fileno(), 5, 99_999)
        assert is_in_memory(file.fileno(), 0, 1)
        for start, stop in ((-1, 5), (7, 7), (9, 7)):
            with pytest.raises(ValueError, match=f"start is {start}, stop {stop}"):
                is_in_memory(file.fileno(), start, stop)
    assert is_in_memory(-1, 0, 5), "what cannot be told is left to who reads"


def test_writing_back_is_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"changed")
        begin_writeback(file.fileno())
        handle = file.fileno()
    begin_writeback(handle)  # closed
    begin_writeback(-1)
    assert path.read_bytes() == b"changed"
