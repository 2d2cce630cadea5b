# SPDX-License-Identifier: Apache-2.0
"""Arrays as callers have them: read-only, off by a byte, in rows that overlap, backwards.

Each public function that reads an array natively gives what it gives for a plain copy of it, and
changes nothing. What it cannot read in place it refuses, where its documentation says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError
from pydedup.hashing import hash_blocks
from pydedup.packing import pack
from pydedup.similarity import L2LSH, distances, magnitude

Array: TypeAlias = np.ndarray[Any, Any]
ROWS, COLS = 70, 90


def off_by_a_byte(array: Array) -> Array:
    return (
        np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    )


def overlapping(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    return np.lib.stride_tricks.sliding_window_view(flat, COLS)[: 7 * ROWS : 7]


KINDS: dict[str, Callable[[Array], Array]] = {
    "read-only and off by a byte": off_by_a_byte,
    "overlapping rows": overlapping,
    "one row again and again": lambda array: np.broadcast_to(array[:1], array.shape),
    "one number again and again": lambda array: np.broadcast_to(array[:1, :1], array.shape),
    "upside down": lambda array: array[::-1],
    "backwards": lambda array: array[:, ::-1],
    "column by column": np.asfortranarray,
    "every second": lambda array: np.repeat(np.repeat(array, 2, 0), 2, 1)[::2, ::2],
    "the bytes in the other order": lambda array: array.astype(array.dtype.newbyteorder()),
}

#: What reads blocks in place alone, by its documentation.
IN_PLACE = {"similarity", "magnitude", "distances"}
NOT_IN_PLACE = {
    "one number again and again": "dense in its last axis",
    "upside down": "negative stride",
    "backwards": "dense in its last axis",
    "column by column": "dense in its last axis",
    "every second": "dense in its last axis",
    "the bytes in the other order": "dtype >f4",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pydedup.Store]:
    path: Path = tmp_path_factory.mktemp("odd") / "odd.db"
    with pydedup.open(path) as opened:
        rng = np.random.default_rng(5)
        opened.add("w@1", {"w": rng.standard_normal((ROWS, COLS)).astype(np.float32)})
        yield opened


def added(store: pydedup.Store, array: Array) -> Array:
    store.add("odd@1", {"w": array})
    try:
        return store.load("odd@1")["w"]
    finally:
        store.remove("odd@1")


def indexed(array: Array) -> Array:
    index = L2LSH((ROWS // 2, COLS // 2), np.float32)
    index.add_matrix(array, range(4))
    return np.frombuffer(index.save(), np.uint8)


READERS: dict[str, Callable[[pydedup.Store, Array], Array]] = {
    "hash": lambda _, array: hash_blocks(array, (16, 24)),
    "similarity": lambda _, array: indexed(array),
    "magnitude": lambda _, array: magnitude(array[None]),
    "distances": lambda _, array: (
        distances(array[None], np.ones((1, ROWS, COLS), "f4")).relative_l2
    ),
    "matmul": lambda store, array: store.tensor("w@1", "w").matmul(array),
    "matmul transposed": lambda store, array: store.tensor("w@1", "w").matmul(
        array.T, transpose=True
    ),
    "bias": lambda store, array: store.tensor("w@1", "w").matmul(
        np.ones((2, COLS), "f4"), bias=array[:, 3]
    ),
    "add": added,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_any_array_is_read_as_its_copy(store: pydedup.Store, reader: str, kind: str) -> None:
    plain = np.random.default_rng(7).standard_normal((ROWS, COLS)).astype(np.float32)
    odd = KINDS[kind](plain)
    before = odd.copy()
    wanted = READERS[reader](store, np.array(odd, np.float32, order="C"))
    if reader in IN_PLACE and kind in NOT_IN_PLACE:
        with pytest.raises(ArgumentError, match=NOT_IN_PLACE[kind]):
            READERS[reader](store, odd)
        return
    found = READERS[reader](store, odd)
    np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))
    np.testing.assert_array_equal(odd, before)


@pytest.mark.parametrize("kind", ["read-only and off by a byte", "backwards", "overlapping rows"])
def test_ids_in_any_array_are_read_as_its_copy(store: pydedup.Store, kind: str) -> None:
    ids = np.arange(ROWS * COLS).reshape(ROWS, COLS) % ROWS
    odd = KINDS[kind](ids)[2]
    assert not (odd.flags.c_contiguous and odd.flags.aligned and odd.flags.owndata)
    tensor = store.tensor("w@1", "w")
    np.testing.assert_array_equal(tensor.take(odd), tensor.take(odd.copy()))
    own = np.unique(odd)
    shifted = off_by_a_byte(own)
    layout, wanted = (pack((np.array([0, len(own)]), part), 8) for part in (shifted, own))
    for page, same in zip(layout.pages, wanted.pages, strict=True):
        np.testing.assert_array_equal(page, same)
