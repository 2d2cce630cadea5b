# SPDX-License-Identifier: Apache-2.0
"""Whatever a matrix holds and however it is cut, its blocks come back from a page bit for bit."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.types import DType

FLOATS = [dtype for dtype in DType if dtype.is_float]


@st.composite
def contents(draw: st.DrawFn, dtype: DType, shape: tuple[int, int]) -> NDArray[np.generic]:
    """Arrays of one dtype: zeros, noise, small integers, weights, and what floats can be odd in."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = ["zeros", "noise", "small", "few"]
    kind = draw(st.sampled_from([*kinds, "weights", "odd"] if dtype in FLOATS else kinds))
    bits = f"u{dtype.itemsize}"
    noise = rng.integers(0, 256, (shape[0], shape[1] * dtype.itemsize), np.uint8)
    if dtype is DType.BOOL:
        return noise[:, : shape[1]] > draw(st.integers(0, 255))
    if kind == "zeros":
        array = np.zeros(shape, dtype.numpy)
    elif kind == "noise":  # NaN with any payload among them
        array = noise.view(dtype.numpy)
    elif kind == "small":
        array = rng.integers(0, 8, shape).astype(dtype.numpy)
    elif kind == "few":
        array = noise.view(dtype.numpy).flat[rng.integers(0, min(3, shape[1]), shape)]
    elif kind == "weights":
        array = rng.normal(0, 0.02, shape).astype(dtype.numpy)
    else:
        sign = 1 << (8 * dtype.itemsize - 1)
        special = np.array([0, sign, 1, sign + 1, sign - 1, 2 * sign - 1, sign // 2], bits)
        array = special[rng.integers(0, len(special), shape)].view(dtype.numpy)
    return np.ascontiguousarray(array).reshape(shape)


@st.composite
def views(draw: st.DrawFn) -> MatrixView:
    """Views of matrices of any dtype, cut in any way."""
    dtype = draw(st.sampled_from(list(DType)))
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    block = draw(st.tuples(st.integers(1, 100), st.integers(1, 100)))
    return MatrixView.of(draw(contents(dtype, shape)), block)


def page_of(view: MatrixView, indices: NDArray[np.int64], *, planes: bool) -> codec.Page:
    encoded = codec.encode_blocks(view, indices, planes=planes)
    return codec.Page(
        codec.build_page(
            encoded.arena,
            encoded.offsets,
            encoded.lengths,
            encoded.encodings,
            np.full(len(indices), view.dtype.code),
            *view.grid.shapes(indices),
        )
    )


@given(view=views(), planes=st.booleans(), order=st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_blocks_come_back(view: MatrixView, planes: bool, order: Random) -> None:
    indices = np.array(order.sample(range(view.grid.count), view.grid.count), np.int64)
    page = page_of(view, indices, planes=planes)
    out = MatrixView(np.full_like(view.data, 0x5A), view.dtype, view.grid)
    slots = np.arange(len(indices))
    codec.read_blocks(out, indices, [page], np.zeros_like(slots), slots)
    assert out.data.tobytes() == view.data.tobytes()
    assert codec.blocks_equal(view, indices, [page], np.zeros_like(slots), slots).all()
    assert (codec.page_digests(page) == hash_view(view)[indices]).all()
    lengths = page.slots["length"].astype(np.int64)
    raw = view.block_bytes()[indices]
    compressed = page.slots["encoding"] == codec.Encoding.PLANES
    assert (lengths[~compressed] == raw[~compressed]).all()
    assert (lengths[compressed] * 20 <= raw[compressed] * 19).all()
    assert not compressed.any() or planes
    assert page.nbytes <= codec.PAGE_OVERHEAD_BYTES + int(codec.page_cost(lengths).sum())


@given(view=views(), data=st.data())
@settings(max_examples=100)
def test_one_changed_bit_is_one_unequal_block(view: MatrixView, data: st.DataObject) -> None:
    indices = np.arange(view.grid.count)
    page = page_of(view, indices, planes=True)
    row = data.draw(st.integers(0, view.data.shape[0] - 1))
    byte = data.draw(st.integers(0, view.data.shape[1] - 1))
    changed = view.data.copy()
    changed[row, byte] ^= 1 << data.draw(st.integers(0, 7))
    grid = view.grid
    block = row // grid.block_rows * grid.grid_cols + byte // view.dtype.itemsize // grid.block_cols
    other = MatrixView(changed, view.dtype, grid)
    equal = codec.blocks_equal(other, indices, [page], np.zeros_like(indices), indices)
    assert np.flatnonzero(~equal).tolist() == [block]
