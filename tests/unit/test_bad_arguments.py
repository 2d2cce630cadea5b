# SPDX-License-Identifier: Apache-2.0
"""Arguments that are no arguments: refused by name before the core sees them.

What belongs to one area alone is with its tests; the store as a whole is in tests/e2e.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pydedup import codec, conv, lookup, matmul, packing
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, BudgetError
from pydedup.hashing import hash_blocks
from pydedup.similarity import L2LSH, distances, magnitude
from pydedup.testing.memory_pages import MemoryPages


@pytest.mark.parametrize(
    "shape", [(0, 1), (1, 0), (-1, 1), (1 << 70, 1), (1,), (1, 2, 3), (1.5, 1), "ab", 4, None]
)
def test_block_shapes_that_are_none_are_named(shape: Any) -> None:
    """Some came through to the core, whose message was a list of C++ types."""
    with pytest.raises(ArgumentError, match=r"block.shape"):
        hash_blocks(np.ones((4, 4), np.float32), shape)


@pytest.mark.parametrize("shape", [(4, 4), (5, 1 << 40), (2**63 - 1, 2**63 - 1)])
def test_a_block_larger_than_its_matrix_is_the_matrix(shape: tuple[int, int]) -> None:
    """The number of blocks is found by adding the size of one, which may not wrap around."""
    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(hash_blocks(matrix, shape), hash_blocks(matrix, (4, 3)))


RAGGED: Any = [[1, 2], [3]]
MASKED: Any = np.ma.array([[1, 2]], mask=[[False, True]])


@pytest.mark.parametrize(
    ("wrong", "says"), [(RAGGED, "does not make an array"), (MASKED, "has masked elements")]
)
def test_what_is_no_array_of_numbers_is_named(wrong: Any, says: str) -> None:
    pages = MemoryPages()
    block_map = pages.add(np.ones((6, 4), np.float32), (2, 2), per_page=2)
    pool = pages.pool()
    for call, name in (
        (lambda: matmul.matmul(block_map, pool, wrong), "x"),
        (lambda: matmul.matmul(block_map, pool, np.ones((1, 4)), bias=wrong), "bias"),
        (lambda: lookup.take(block_map, pool, wrong), "ids"),
        (lambda: lookup.bag(block_map, pool, wrong, None, "sum"), "ids"),
        (lambda: lookup.bag(block_map, pool, [1, 2], wrong, "sum"), "offsets"),
        (lambda: lookup.bag(block_map, pool, [[1]], None, "sum", weights=wrong), "weights"),
    ):
        with pytest.raises(ArgumentError, match=f"^{name} {says}"):
            call()


def test_masked_elements_are_not_read_below_their_mask() -> None:
    """Blocks were hashed and compared by what lies under the mask."""
    plain, index = np.arange(8, dtype=np.float32).reshape(2, 4), L2LSH((1, 4), np.float32)
    index.add(plain, [0, 1])
    masked, unmasked = np.ma.masked_greater(plain, 6), np.ma.masked_greater(plain, 7)
    ids: Any = np.ma.array([0, 1], mask=[False, True])
    for call, name in (
        (lambda: hash_blocks(masked, (1, 4)), "matrix"),
        (lambda: index.add(masked, [2, 3]), "blocks"),
        (lambda: index.add(plain, ids), "ids"),
        (lambda: index.add_matrix(masked, [2, 3]), "matrix"),
        (lambda: index.query(masked), "blocks"),
        (lambda: index.query(plain, fetch=lambda ids: masked), "what fetch returned"),
        (lambda: index.remove(ids), "ids"),
        (lambda: distances(plain, masked), "b"),
        (lambda: magnitude(masked), "blocks"),
        (lambda: packing.pack([[1], ids], 2), r"owners\[1\]"),
        (lambda: packing.pack([[1], [2]], 2, weights=ids), "weights"),
    ):
        with pytest.raises(ArgumentError, match=f"^{name} has masked elements"):
            call()
    assert np.array_equal(hash_blocks(unmasked, (1, 4)), hash_blocks(plain, (1, 4)))
    assert index.ids.tolist() == [0, 1]


@pytest.mark.parametrize("transpose", [np.array([True, False]), np.ones((2, 2)), "yes", None])
def test_what_does_not_say_whether_to_transpose_is_named(transpose: Any) -> None:
    """Of an array numpy's own error came through."""
    pages = MemoryPages()
    block_map = pages.add(np.ones((4, 4), np.float32), (2, 2), per_page=2)
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ArgumentError, match=r"^transpose must be True or False, not "):
        matmul.matmul(block_map, pages.pool(), x, transpose=transpose)
    for plain in (True, 1, np.True_):
        assert matmul.matmul(block_map, pages.pool(), x, transpose=plain).tolist() == [[4.0] * 4]


@pytest.mark.parametrize("threads", [-1, 1.5, None, 1 << 31, 1 << 40])
def test_what_is_no_number_of_threads_is_named(threads: Any) -> None:
    pages = MemoryPages()
    w = np.ones((6, 4), np.float32)
    block_map = pages.add(w, (2, 2), per_page=2)
    pool = pages.pool()
    page = codec.Page(next(iter(pages.payloads.values())))
    view = MatrixView.of(w, (2, 2))
    x = np.ones((1, 4), np.float32)
    for call in (
        lambda: matmul.matmul(block_map, pool, x, threads=threads),
        lambda: matmul.activate(x, "relu", threads=threads),
        lambda: lookup.take(block_map, pool, [0], threads=threads),
        lambda: lookup.bag(block_map, pool, [[0]], threads=threads),
        lambda: conv.conv2d(block_map, pool, np.ones((4, 1, 1)), kernel=1, threads=threads),
        lambda: codec.page_digests(page, threads=threads),
        lambda: codec.block_digests([page], [0], [0], threads=threads),
        lambda: codec.read_blocks(view, [0], [page], [0], [0], threads=threads),
        lambda: codec.blocks_equal(view, [0], [page], [0], [0], threads=threads),
        lambda: codec.encode_blocks(view, [0], planes=True, threads=threads),
        lambda: codec.encode_deltas(view, [0], view, [1], threads=threads),
        lambda: codec.estimate_deltas(view, [0], view, [1], threads=threads),
    ):
        with pytest.raises(ArgumentError, match=r"^threads must be"):
            call()


def test_x_without_memory_of_its_own_is_read_right() -> None:
    """Broadcast, strided, reversed and misaligned."""
    pages = MemoryPages()
    w = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    block_map = pages.add(w, (4, 3), per_page=2)
    pool = pages.pool()
    wide = np.random.default_rng(1).standard_normal((10, 28)).astype(np.float32)
    odd = np.frombuffer(b"0" + wide[:, :7].tobytes(), np.uint8)[1:].view(np.float32)
    for x in (
        np.broadcast_to(np.float32(1.5), (5, 7)),
        np.broadcast_to(wide[:1, :7], (5, 7)),
        wide[::2, ::4],
        wide[::-1, 6::-1],
        odd.reshape(10, 7),
    ):
        want = matmul.matmul(block_map, pool, np.array(x, order="C"))
        assert np.array_equal(matmul.matmul(block_map, pool, x), want)
        assert np.allclose(want, x @ w.T, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: L2LSH((4, 4), np.float32, r=1e-9), "^r is 1e-09;"),
        (lambda: packing.pack([{1}, {2}], 1, weights=[1, -1e-9]), r"^weights\[1\] is -1e-09;"),
    ],
)
def test_small_numbers_are_told_as_they_are(call: Any, says: str) -> None:
    """They were 0.000000 and -0.000000, of which the second may pass for not negative."""
    with pytest.raises(ArgumentError, match=says):
        call()


def test_what_claims_more_than_there_is_memory_for() -> None:
    """A view of one element may; of a copy of it, numpy's own error was shown."""
    index = L2LSH((1, 4), np.float32)
    ids, row = np.broadcast_to(np.int64(0), (1 << 50,)), np.ones((1, 4), np.float32)
    wide = np.broadcast_to(np.float32(1), (1 << 50, 4))
    pages = MemoryPages()
    block_map, pool = pages.add(np.ones((6, 4), np.float32), (2, 2), per_page=2), pages.pool()
    large = r"int64 of shape \(1125899906842624,\)"
    for call, says in (
        (lambda: index.add(row, ids), f"a copy of ids: {large}"),
        (lambda: index.remove(ids), f"a copy of ids: {large}"),
        (lambda: hash_blocks(wide, (2, 2)), "a copy of the matrix: float32 of shape"),
        (lambda: lookup.take(block_map, pool, ids), f"a copy of ids: {large}"),
        (lambda: lookup.bag(block_map, pool, [0], ids, "sum"), f"a copy of offsets: {large}"),
        (lambda: lookup.bag(block_map, pool, ids[:, None][:, :0]), "where bags begin: int64 of"),
        (lambda: matmul.matmul(block_map, pool, wide), "a copy of x: float32 of shape"),
    ):
        with pytest.raises(BudgetError, match=f"^no memory for {says}"):
            call()


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 7), (2, 4), (8,), (), (1, 3, 2, 4)])
def test_blocks_of_another_shape_are_told_theirs(shape: tuple[int, ...]) -> None:
    """It was said which shape they must have, and not which they had."""
    index, blocks = L2LSH((2, 4), np.float32), np.ones(shape, np.float32)
    for call in (
        lambda: index.add(blocks, [1]),
        lambda: index.query(blocks),
        lambda: index.hashes(blocks),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        said = f"blocks has the shape {shape}; n blocks of this index have (n, 2, 4) or (n, 8)"
        assert str(caught.value).startswith(said)
        assert str(caught.value).endswith("blocks[None]") == (shape == (2, 4))
