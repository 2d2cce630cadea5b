# SPDX-License-Identifier: Apache-2.0
"""Whatever two blocks are: exact deltas give the very bytes back, bounded ones keep their bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.types import DType

FLOATS = [DType.F64, DType.F32, DType.F16, DType.BF16]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[DType, NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a dtype and the bytes of a block and of its base."""
    dtype = draw(st.sampled_from(list(DType)))
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    width = cols * dtype.itemsize
    base = rng.integers(0, 256, (rows, width), np.uint8)
    kind = draw(st.sampled_from(["few", "some", "rows", "low", "scaled", "any"]))
    block = base.copy()
    if kind == "few":
        block.reshape(-1)[rng.integers(0, base.size, 3)] ^= 5
    elif kind == "some":
        chosen = rng.random((rows, cols)) < draw(st.sampled_from([0.02, 0.1, 0.3]))
        block.reshape(rows, cols, -1)[chosen, 0] ^= draw(st.sampled_from([1, 7, 128]))
    elif kind == "rows":
        block[:: draw(st.integers(1, 9))] ^= 3
    elif kind == "low":
        block[:, :: dtype.itemsize] ^= rng.integers(0, 8, (rows, cols), np.uint8)
    elif kind == "scaled" and dtype in FLOATS:
        values = rng.normal(0, 0.02, (rows, cols))
        base = values.astype(dtype.numpy).view(np.uint8)
        block = (values * (1 - 1e-4)).astype(dtype.numpy).view(np.uint8)
    else:
        block = rng.integers(0, 256, (rows, width), np.uint8)
    # Some or nearly all elements became 0, and which bytes of the base stay is chance.
    gone = rng.random((rows, cols)) < draw(st.sampled_from([0, 0.1, 0.9]))
    block = block.copy()
    block.reshape(rows, cols, -1)[gone] = 0
    return dtype, block, base


@st.composite
def factors_of(draw: st.DrawFn, shape: tuple[int, int]) -> codec.LowRankFactors:
    """Draw what moves a base of that shape."""
    rank, largest = draw(st.integers(1, 5)), draw(st.sampled_from([0, 1, 300, 2**23 - 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    of_rows, of_cols = (
        rng.integers(-largest, largest + 1, (1, rank, side), np.int32) for side in shape
    )
    exponent = draw(st.sampled_from([-900, -60, -30, -20, 0, 900]))
    at = np.zeros(1, np.int64)
    return codec.LowRankFactors(exponent, of_rows, of_cols, at, at)


def read(
    dtype: DType, shape: tuple[int, int], encoded: codec.EncodedBlocks, base: MatrixView
) -> NDArray[np.uint8]:
    """Return what a delta holds, the same at each of two places of a page."""
    rows, cols = shape
    pages = []
    for one, ids in ((codec.encode_blocks(base, [0], planes=True), [0, 0]), (encoded, [9, 9])):
        columns = ([0, 0], *(np.repeat(column, 2) for column in (one.lengths, one.encodings)))
        kinds = ([dtype.code] * 2, [rows] * 2, [cols] * 2)
        pages.append(codec.Page(codec.build_page(one.arena, *columns, *kinds, ids)))
    alone = codec.encoded_blocks([pages[1]], [0, 0], [1, 0])
    assert alone.arena.tobytes() == 2 * encoded.arena.tobytes()
    bases = codec.StoredBases([pages[0]], [0], [0])
    outs = []
    for slot in (0, 1):
        out = MatrixView(np.zeros((rows, cols * dtype.itemsize), np.uint8), dtype, base.grid)
        codec.read_blocks(out, [0], [pages[1]], [0], [slot], bases=bases)
        outs.append(out.data)
    assert outs[0].tobytes() == outs[1].tobytes()
    return outs[1]


@settings(max_examples=150)
@given(pairs(), st.sampled_from([None, 1e-4, 0.01, 0.5]), st.booleans(), st.data())
def test_what_was_encoded_comes_back(
    case: tuple[DType, NDArray[Any], NDArray[Any]],
    bound: float | None,
    is_moved: bool,
    data: st.DataObject,
) -> None:
    dtype, block, base = case
    shape = (len(block), block.shape[1] // dtype.itemsize)
    views = [MatrixView.of(array.view(dtype.numpy), shape) for array in (block, base)]
    factors = data.draw(factors_of(shape)) if is_moved and dtype in FLOATS else None
    encoded = codec.encode_deltas(
        views[0], [0], views[1], [0], max_rel_error=bound, factors=factors
    )
    assert encoded.have_factors().tolist() == [factors is not None and encoded.lengths[0] > 0]
    estimate = codec.estimate_deltas(views[0], [0], views[1], [0], max_rel_error=bound)
    assert 0 < estimate[0] <= block.nbytes
    if not encoded.lengths[0]:
        return
    assert encoded.lengths[0] < block.nbytes
    back = read(dtype, shape, encoded, views[1])
    if encoded.encodings[0] == codec.Encoding.DELTA:
        assert back.tobytes() == block.tobytes()
        return
    assert bound is not None
    want, got = (array.view(dtype.numpy).astype(np.float64) for array in (block, back))
    assert np.linalg.norm(want - got) <= bound * np.linalg.norm(want)
    assert (got[want == 0] == 0).all()
