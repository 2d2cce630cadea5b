# SPDX-License-Identifier: Apache-2.0
"""`hash_buffer` is a function of the C API, without pybind11's checks: here are the checks."""

from __future__ import annotations

import gc
import sys
import threading
from array import array

import numpy as np
import pytest

from pydedup.errors import ArgumentError
from pydedup.hashing import hash_blocks, hash_buffer


def test_every_kind_of_buffer_gives_the_same_digest() -> None:
    data = bytes(range(200)) * 3
    wanted = hash_buffer(data)
    assert isinstance(wanted, bytes)
    assert len(wanted) == 16
    read_only = np.frombuffer(data, np.uint8)
    shifted = np.zeros(len(data) + 3, np.uint8)[3:]
    shifted[:] = read_only
    for same in (
        bytearray(data),
        memoryview(data),
        array("B", data),
        read_only,
        shifted,
        read_only.reshape(20, 30),
        read_only.view(np.uint32),
    ):
        assert hash_buffer(same) == wanted, type(same)
    assert hash_buffer(read_only[:0]) == hash_buffer(b"")


def test_large_pieces_are_hashed_without_the_gil_and_alike() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
    wanted = hash_buffer(data.tobytes())
    # One row is one block: the other way to the same kernel.
    blocks = hash_blocks(data.reshape(1, -1), (1, data.size))
    assert blocks.astype("<u8").tobytes() == wanted
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(hash_buffer(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


def test_seed_is_any_integer_in_range() -> None:
    assert hash_buffer(b"x", seed=np.uint64(7)) == hash_buffer(b"x", seed=7)
    assert hash_buffer(b"x", seed=2**64 - 1) != hash_buffer(b"x")
    assert hash_buffer(b"x", seed=0) == hash_buffer(b"x")


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((), {}, "1 positional argument"),
        ((b"x", 1), {}, "seed is passed by name"),
        ((), {"buffer": b"x"}, "1 positional argument"),
        (("text",), {}, "got str"),
        ((None,), {}, "got NoneType"),
        ((memoryview(b"abcdef")[::2],), {}, "contiguous"),
        ((np.zeros((4, 4))[:, :2],), {}, "contiguous"),
        ((b"x",), {"seed": -1}, r"0 to 2\*\*64 - 1"),
        ((b"x",), {"seed": 2**64}, r"0 to 2\*\*64 - 1"),
        ((b"x",), {"seed": 1.0}, "got float"),
        ((b"x",), {"seed": np.arange(2)}, "seed must be an integer, got numpy.ndarray"),
        ((b"x",), {"salt": 1}, "'salt'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[object, ...], named: dict[str, object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        hash_buffer(*arguments, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*64 - 1, not -1"),
        ({"seed": 2**64}, "seed must be an integer from 0"),
        ({"seed": "1"}, "seed must be an integer"),
        ({"threads": -1}, "threads must be an integer from 0"),
        ({"threads": 2**31}, r"threads must be an integer from 0 to 2\*\*31 - 1"),
        ({"threads": 1.5}, "threads must be an integer"),
        ({"threads": True}, "threads must be an integer"),
    ],
)
def test_bad_arguments_of_hash_blocks_are_named(named: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hash_blocks(np.zeros((4, 4), np.float32), (2, 2), **named)  # type: ignore[arg-type]


def test_nothing_is_kept_of_a_call() -> None:
    """Neither the buffer nor its export: a bytearray that is still exported cannot grow."""
    piece = bytearray(1 << 20)
    array_ = np.zeros(1000, np.uint8)
    before = sys.getrefcount(piece), sys.getrefcount(array_)
    for _ in range(100):
        hash_buffer(piece)
        hash_buffer(array_)
        for bad in ({"seed": -1}, {"salt": 2}):
            with pytest.raises(ArgumentError):
                hash_buffer(piece, **bad)  # type: ignore[arg-type]
    gc.collect()
    piece.extend(b"grows")
    assert (sys.getrefcount(piece), sys.getrefcount(array_)) == before
