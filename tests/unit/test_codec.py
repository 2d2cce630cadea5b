# SPDX-License-Identifier: Apache-2.0
"""Block encodings: the golden page, a second reader from docs/format.md, arguments, savings."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.hashing import hash_blocks, hash_buffer
from pydedup.testing.kernels import RUNNABLE, run_with_kernel
from pydedup.types import DType

GOLDEN_PAGE = Path(__file__).parents[1] / "golden" / "page_v1.page"
GOLDEN_CONTENT = GOLDEN_PAGE.with_suffix(".content")
DTYPES = {dtype.code: dtype for dtype in DType}

# ---- a second reader, in plain Python -----------------------------------------------------------


def parse_page(page: bytes) -> list[tuple[int, DType, int, int, bytes]]:
    """Return (encoding, dtype, rows, cols, payload) of each slot, as docs/format.md says."""
    magic, version, header_bytes = struct.unpack_from("<4sHH", page)
    assert (magic, version, header_bytes) == (b"PDPG", 1, 64)
    (seed,) = struct.unpack_from("<Q", page)
    assert page[8:24] == hash_buffer(page[24:], seed=seed)
    n_slots, slot_bytes, total = struct.unpack_from("<IIQ", page, 24)
    assert slot_bytes == 32
    assert total == len(page)
    assert page[40:64] == bytes(24)
    blocks, end = [], 64 + 32 * n_slots
    for slot in range(n_slots):
        encoding, dtype, reserved, rows, cols, length, offset, base = struct.unpack_from(
            "<BBHIIIQQ", page, 64 + 32 * slot
        )
        assert (reserved, base) == (0, 0)
        assert offset == -(-end // 64) * 64
        end = offset + length
        blocks.append((encoding, DTYPES[dtype], rows, cols, page[offset:end]))
    assert end == len(page)
    return blocks


def decode(encoding: int, dtype: DType, rows: int, cols: int, payload: bytes) -> bytes:
    """Return the elements of a block, as docs/format.md says."""
    if encoding == 0:
        return payload
    assert encoding == 1
    count, n_planes = rows * cols, dtype.itemsize
    rotated = dtype.is_float and n_planes > 1
    assert struct.unpack_from("<BBBBI", payload) == (1, n_planes, int(rotated), 0, count)
    at = 8 + 8 * n_planes
    planes = np.empty((n_planes, count), np.uint64)
    for number, plane in enumerate(reversed(range(n_planes))):
        kind, value, reserved, length = struct.unpack_from("<BBHI", payload, 8 + 8 * number)
        assert reserved == 0
        body = payload[at : at + length]
        assert len(body) == length
        if kind == 0:
            assert (length, value) == (count, 0)
            planes[plane] = list(body)
        elif kind == 1:
            assert length == 0
            planes[plane] = value
        else:
            assert (kind, value) == (2, 0)
            planes[plane] = decode_huffman(body, count)
        at += length
    assert at == len(payload)
    bits = 8 * n_planes
    elements = []
    for column in planes.T.tolist():
        element = sum(byte << (8 * p) for p, byte in enumerate(column))
        if rotated:
            element = element >> 1 | (element & 1) << (bits - 1)
        elements.append(element.to_bytes(n_planes, "little"))
    return b"".join(elements)


def decode_huffman(body: bytes, count: int) -> list[int]:
    if body[0] == 0:
        symbols, at = list(range(body[1], body[2] + 1)), 3
    else:
        assert body[0] == 1
        bitmap = int.from_bytes(body[1:33], "little")
        symbols, at = [symbol for symbol in range(256) if bitmap >> symbol & 1], 33
    nibbles = [
        half for byte in body[at : at + (len(symbols) + 1) // 2] for half in (byte & 15, byte >> 4)
    ]
    at += (len(symbols) + 1) // 2
    code, previous, table = 0, 0, {}
    for bits, symbol in sorted(zip(nibbles, symbols, strict=False)):
        if bits:
            code <<= bits - previous
            table[f"{code:0{bits}b}"] = symbol
            code, previous = code + 1, bits
    assert code == 1 << previous
    sizes = list(struct.unpack_from("<III", body, at))
    at += 12
    sizes.append(len(body) - at - sum(sizes))
    step, out = -(-count // 4), []
    for stream, size in enumerate(sizes):
        stored = "".join(f"{byte:08b}" for byte in body[at : at + size])
        at += size
        word, wanted = "", max(0, min(step, count - stream * step))
        used = 0
        while wanted:
            word += stored[used]
            used += 1
            if word in table:
                out.append(table[word])
                word, wanted = "", wanted - 1
        assert len(stored) - used < 8
        assert set(stored[used:]) <= {"0"}
    return out


# ---- the golden page ----------------------------------------------------------------------------


def golden_blocks() -> list[NDArray[np.generic]]:
    content, blocks, at = GOLDEN_CONTENT.read_bytes(), [], 0
    for slot in codec.Page(GOLDEN_PAGE.read_bytes()).slots:
        dtype, rows, cols = DTYPES[int(slot["dtype"])], int(slot["rows"]), int(slot["cols"])
        blocks.append(np.frombuffer(content, dtype.numpy, rows * cols, at).reshape(rows, cols))
        at += blocks[-1].nbytes
    assert at == len(content)
    return blocks


def build(blocks: list[NDArray[np.generic]], *, planes: bool = True) -> bytes:
    views = [MatrixView.of(block, block.shape) for block in blocks]
    encoded = [codec.encode_blocks(view, [0], planes=planes) for view in views]
    lengths = np.array([len(one.arena) for one in encoded])
    return codec.build_page(
        np.concatenate([one.arena for one in encoded]),
        np.cumsum(lengths) - lengths,
        lengths,
        [int(one.encodings[0]) for one in encoded],
        [view.dtype.code for view in views],
        [block.shape[0] for block in blocks],
        [block.shape[1] for block in blocks],
    )


def test_golden_page_says_what_the_format_document_says() -> None:
    slots = parse_page(GOLDEN_PAGE.read_bytes())
    assert {dtype for _, dtype, _, _, _ in slots} == set(DType)
    assert {encoding for encoding, *_ in slots} == {0, 1}
    assert b"".join(decode(*slot) for slot in slots) == GOLDEN_CONTENT.read_bytes()


def test_golden_page_is_read() -> None:
    blocks = golden_blocks()
    page = codec.Page(GOLDEN_PAGE.read_bytes())
    assert page.n_slots == len(blocks)
    for slot, block in enumerate(blocks):
        out = MatrixView.of(np.zeros_like(block), block.shape)
        codec.read_blocks(out, [0], [page], [0], [slot])
        assert out.data.tobytes() == block.tobytes()
        assert (codec.page_digests(page)[slot] == hash_blocks(block, block.shape)[0]).all()


def test_golden_page_is_written() -> None:
    assert build(golden_blocks()) == GOLDEN_PAGE.read_bytes()


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_reads_and_writes_the_golden_page(kernel: str) -> None:
    script = (
        "import runpy, sys\n"
        "tests = runpy.run_path(sys.argv[1])\n"
        "tests['test_golden_page_is_read']()\n"
        "tests['test_golden_page_is_written']()\n"
        "print('read and written')\n"
    )
    assert run_with_kernel(kernel, script, __file__) == "read and written\n"


def test_raw_blocks_are_the_elements() -> None:
    blocks = golden_blocks()
    slots = parse_page(build(blocks, planes=False))
    assert [slot[0] for slot in slots] == [0] * len(blocks)
    assert b"".join(slot[4] for slot in slots) == GOLDEN_CONTENT.read_bytes()


# ---- arguments ----------------------------------------------------------------------------------


@pytest.fixture
def view() -> MatrixView:
    matrix = np.random.default_rng(0).normal(size=(50, 70)).astype(np.float32)
    return MatrixView.of(matrix, (16, 32))


def page_of(view: MatrixView) -> codec.Page:
    encoded = codec.encode_blocks(view, np.arange(view.grid.count), planes=True)
    return codec.Page(
        codec.build_page(
            encoded.arena,
            encoded.offsets,
            encoded.lengths,
            encoded.encodings,
            np.full(view.grid.count, view.dtype.code),
            *view.grid.all_shapes(),
        )
    )


def test_threads_change_nothing(view: MatrixView) -> None:
    big = MatrixView.of(np.random.default_rng(1).normal(size=(1024, 1024)).astype(np.float32))
    indices = np.arange(big.grid.count)
    one = codec.encode_blocks(big, indices, planes=True, threads=1)
    for threads in (0, 2, 7):
        many = codec.encode_blocks(big, indices, planes=True, threads=threads)
        assert many.arena.tobytes() == one.arena.tobytes()
        assert (many.offsets == one.offsets).all()


def test_shared_blocks_are_compared_by_bytes(view: MatrixView) -> None:
    page = page_of(view)
    indices = np.arange(view.grid.count)
    where = np.zeros(len(indices), np.int64)
    assert codec.blocks_equal(view, indices, [page], where, indices).all()
    changed = view.data.copy()
    changed[20, 130] ^= 1  # row 20, column 32: block 4
    other = MatrixView(changed, view.dtype, view.grid)
    equal = codec.blocks_equal(other, indices, [page], where, indices)
    assert np.flatnonzero(~equal).tolist() == [4]
    as_ints = MatrixView(view.data, DType.I32, view.grid)
    assert not codec.blocks_equal(as_ints, indices, [page], where, indices).any()
    assert codec.same_block(page, 4, page, 4)
    assert not codec.same_block(page, 4, page, 3)
    assert codec.blocks_equal(view, [], [], [], []).shape == (0,)


def test_other_shape_or_dtype_than_stored_is_corruption(view: MatrixView) -> None:
    page = page_of(view)
    out = MatrixView(np.zeros_like(view.data), view.dtype, view.grid)
    codec.read_blocks(out, [1], [page], [0], [4])  # another block of the same shape: allowed
    with pytest.raises(CorruptStoreError, match=r"slot 0 holds a block of 16 x 32 .* 16 x 6"):
        codec.read_blocks(out, [2], [page], [0], [0])
    with pytest.raises(CorruptStoreError, match="slot 99"):
        codec.read_blocks(out, [0], [page], [0], [99])
    ints = MatrixView(out.data, DType.U32, view.grid)
    with pytest.raises(CorruptStoreError, match="dtype code 2"):
        codec.read_blocks(ints, [0], [page], [0], [0])


def test_bad_arguments(view: MatrixView) -> None:
    page = page_of(view)
    out = MatrixView(np.zeros_like(view.data), view.dtype, view.grid)
    for index in (-1, view.grid.count):
        with pytest.raises(ArgumentError, match="outside of a grid of 12 blocks"):
            codec.encode_blocks(view, [index], planes=True)
        with pytest.raises(ArgumentError, match="outside of a grid of 12 blocks"):
            codec.read_blocks(out, [index], [page], [0], [0])
    with pytest.raises(ArgumentError, match="list of 1 pages"):
        codec.read_blocks(out, [0], [page], [1], [0])
    for number in (-1, 1 << 32):
        with pytest.raises(ArgumentError, match="page_index must hold integers of uint32, not of"):
            codec.read_blocks(out, [0], [page], [number], [0])
    with pytest.raises(ArgumentError, match="indices must hold integers of int64, not float64"):
        codec.encode_blocks(view, [0.5], planes=True)
    with pytest.raises(ArgumentError, match="differ in length"):
        codec.read_blocks(out, [0], [page], [0, 0], [0])
    with pytest.raises(ArgumentError, match="2 block indices came with 1"):
        codec.blocks_equal(view, [0, 1], [page], [0], [0])
    with pytest.raises(ArgumentError, match="None"):
        codec.blocks_equal(view, [0], [None], [0], [0])  # type: ignore[list-item]
    fixed = MatrixView(np.zeros_like(view.data), view.dtype, view.grid)
    fixed.data.flags.writeable = False
    with pytest.raises(ArgumentError, match="read-only"):
        codec.read_blocks(fixed, [0], [page], [0], [0])


# ---- what compression is worth ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "at_most"), [("f32", 0.84), ("bf16", 0.69), ("f16", 0.90), ("f64", 0.92)]
)
def test_weights_get_smaller(dtype: str, at_most: float) -> None:
    weights = np.random.default_rng(5).normal(0, 0.02, (512, 512))
    view = MatrixView.of(weights.astype(DType.of_label(dtype).numpy))
    encoded = codec.encode_blocks(view, np.arange(view.grid.count), planes=True)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.PLANES}
    assert len(encoded.arena) / view.data.nbytes < at_most


def test_noise_stays_raw() -> None:
    noise = np.random.default_rng(6).integers(0, 256, (512, 512), np.uint8)
    view = MatrixView.of(noise.view(np.float32))
    encoded = codec.encode_blocks(view, np.arange(view.grid.count), planes=True)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.RAW}
    assert len(encoded.arena) == noise.nbytes
