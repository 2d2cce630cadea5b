# SPDX-License-Identifier: Apache-2.0
"""Deltas: the golden page, a second reader from docs/format.md, arguments, bounds, sizes."""

from __future__ import annotations

import runpy
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.hashing import hash_blocks
from pydedup.testing.kernels import RUNNABLE, run_with_kernel
from pydedup.types import DType

GOLDEN = Path(__file__).parents[1] / "golden"
MAKER = runpy.run_path(str(GOLDEN / "make_delta_golden.py"))
PLANES = runpy.run_path(str(Path(__file__).with_name("test_codec.py")))
DTYPES = {dtype.code: dtype for dtype in DType}
FIELDS = {DType.F64: (11, 52), DType.F32: (8, 23), DType.F16: (5, 10), DType.BF16: (8, 7)}

# ---- a second reader, in plain Python -----------------------------------------------------------


class Reader:
    """Bytes and bits from the front."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.at, self.bits = payload, 0, ""

    def byte(self) -> int:
        self.at += 1
        return self.payload[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                assert byte or shift == 7
                return value

    def number(self, n: int) -> int:
        """Return n bits, the lowest first."""
        while len(self.bits) < n:
            self.bits += f"{self.byte():08b}"[::-1]
        taken, self.bits = self.bits[:n], self.bits[n:]
        return int(taken[::-1] or "0", 2)

    def align(self) -> None:
        assert set(self.bits) <= {"0"}
        self.bits = ""


def read_lengths(reader: Reader) -> dict[int, int]:
    first, last = reader.number(8), reader.number(8)
    lengths, known, unused = {}, 6, False
    for symbol in range(first, last + 1):
        around = [known]
        for far in range(1, 11):
            around += [length for length in (known + far, known - far) if 1 <= length <= 11]
            if far == 1 and not unused:
                around.append(0)
        order = [0, *around] if unused else around
        rank = 0
        while reader.number(1):
            rank += 1
        lengths[symbol] = order[rank]
        unused = order[rank] == 0
        known = order[rank] or known
    return {symbol: length for symbol, length in lengths.items() if length}


def code_words(lengths: dict[int, int]) -> dict[str, int]:
    code, previous, words = 0, 0, {}
    for bits, symbol in sorted((bits, symbol) for symbol, bits in lengths.items()):
        code <<= bits - previous
        words[f"{code:0{bits}b}"] = symbol
        code, previous = code + 1, bits
    assert code == 1 << previous
    return words


def read_contexts(reader: Reader, x: NDArray[Any], dtype: DType) -> tuple[NDArray[Any], int]:
    rows, _ = x.shape
    n_groups, group_of = reader.byte(), [0] * rows
    if n_groups > 1:
        group_of = [reader.number((n_groups - 1).bit_length()) for _ in range(rows)]
        reader.align()
    groups = []
    for _ in range(n_groups):
        feature = reader.byte()
        bounds = [reader.byte() for _ in range(reader.byte() - 1)] if feature else []
        groups.append((feature, bounds))
    reference = 0
    if any(feature == 1 for feature, _ in groups):
        reference = reader.byte() | reader.byte() << 8
    first, total = [], 0
    for _, bounds in groups:
        first.append(total)
        total += len(bounds) + 1
    contexts = np.zeros(x.shape, np.int64)
    for row in range(rows):
        feature, bounds = groups[group_of[row]]
        if feature:
            exponent_bits, mantissa_bits = FIELDS[dtype]
            mantissa = x[row] & ((1 << mantissa_bits) - 1)
            exponent = x[row] >> mantissa_bits & ((1 << exponent_bits) - 1)
            value = (
                np.clip(reference - exponent.astype(np.int64), 0, 255)
                if feature == 1
                else mantissa >> max(0, mantissa_bits - 8)
            )
            contexts[row] = np.searchsorted(bounds, value.astype(np.int64), side="right")
        contexts[row] += first[group_of[row]]
    return contexts.reshape(-1), total


def read_coded(reader: Reader, x: NDArray[Any], dtype: DType) -> list[int]:
    contexts, n_contexts = read_contexts(reader, x, dtype)
    dictionary: list[int] = []
    end = 0
    for _ in range(reader.varint()):
        start = end + reader.varint()
        end = start + reader.varint() + 1
        dictionary += range(start, end)
    assert all(a < b for a, b in pairwise(dictionary))
    first_class, n_classes = reader.byte(), reader.byte()
    codes: list[dict[str, int]] = []
    for _ in range(n_contexts):
        kind = reader.number(2)
        assert kind < 3
        codes.append({})
        if kind == 1:
            codes[-1] = {"": reader.number(8)}
        elif kind == 2:
            codes[-1] = code_words(read_lengths(reader))
    reader.align()
    sizes = [reader.varint() for _ in range(4)]
    count, symbols = x.size, []
    step = -(-count // 4)
    for stream, size in enumerate(sizes):
        stored = "".join(f"{reader.byte():08b}" for _ in range(size))
        used = 0
        for element in range(min(count, stream * step), min(count, (stream + 1) * step)):
            words, word = codes[contexts[element]] or {"": 0}, ""
            while word not in words:
                word += stored[used]
                used += 1
            symbols.append(words[word])
        assert len(stored) - used < 8
        assert set(stored[used:]) <= {"0"}
    values = []
    for symbol in symbols:
        if symbol < len(dictionary):
            values.append(dictionary[symbol])
            continue
        z_class = symbol - len(dictionary) + first_class
        assert z_class < first_class + n_classes
        width = z_class // 2 - 1 if z_class >= 4 else 0
        start = (2 + z_class % 2) << width if z_class >= 4 else z_class
        values.append(start + reader.number(width))
    reader.align()
    assert reader.at == len(reader.payload)
    return values


def read_mask(reader: Reader, words: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Return the base's words, with those that are masked made 0."""
    size, sign = words.itemsize, 1 << (8 * words.itemsize - 1) if dtype.is_float else 0
    magnitude = np.array(((1 << 8 * size) - 1) ^ sign, words.dtype)
    form = reader.byte()
    if form == 0:
        return words
    keeps_sign = reader.byte()
    assert keeps_sign in (0, 1)
    assert dtype.is_float or not keeps_sign
    if form == 2:
        threshold = int.from_bytes(bytes(reader.byte() for _ in range(size)), "little")
        assert 0 < threshold <= int(magnitude)
        gone = (words & magnitude) <= threshold
    else:
        assert form == 1
        (length,) = struct.unpack_from("<I", reader.payload, reader.at + 4)
        n_bytes = -(-words.size // 8)
        end = reader.at + 8 + length
        # A block of bytes whose only plane is the mask.
        of_bytes = struct.pack("<BBBBI", 1, 1, 0, 0, n_bytes) + reader.payload[reader.at : end]
        plane = PLANES["decode"](1, DType.U8, 1, n_bytes, of_bytes)
        reader.at = end
        bits = np.unpackbits(np.frombuffer(plane, np.uint8), bitorder="little")
        assert not bits[words.size :].any()
        gone = bits[: words.size].reshape(words.shape) == 1
    kept = words & np.array(sign, words.dtype) if keeps_sign else np.zeros_like(words)
    return np.where(gone, kept, words)


def decode_delta(slot: tuple[Any, ...], base: tuple[Any, ...], base_content: bytes) -> bytes:
    """Return the elements of a delta, as docs/format.md says."""
    encoding, dtype, rows, cols, payload = slot
    version, form, base_dtype, shift, count = struct.unpack_from("<BBBBI", payload)
    assert version in (1, 2)
    assert (DTYPES[base_dtype], count) == (base[1], rows * cols)
    stored = np.frombuffer(base_content, base[1].numpy).reshape(rows, cols)
    assert payload[8:12] == hash_blocks(stored, (rows, cols)).tobytes()[:4]
    reader = Reader(payload)
    reader.at = 20 if encoding == 3 else 12
    whole, dtype = dtype, DTYPES[reader.byte()] if version == 2 else dtype
    assert dtype is whole or (encoding == 2 and dtype.itemsize < whole.itemsize)
    x = stored.astype(dtype.numpy)
    bits = 8 * dtype.itemsize
    words = x.view(f"u{dtype.itemsize}")
    if version == 2:
        words = read_mask(reader, words, dtype)
        x = words.view(dtype.numpy)
    values = [0] * count
    if form == 0:
        at = 0
        for _ in range(reader.varint()):
            at += reader.varint()
            values[at] = reader.varint()
            at += 1
        assert reader.at == len(payload)
    else:
        values = read_coded(reader, words, dtype)
    signed = [-(z + 1) // 2 if z & 1 else z // 2 for z in values]
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    if encoding == 3:
        (step,) = struct.unpack_from("<d", payload, 12)
        wide = np.float64 if dtype is DType.F64 else np.float32
        flat, out = x.astype(wide).reshape(-1), np.empty(count, wide)
        negative = (words.reshape(-1) & np.array(top, words.dtype)) != 0
        for i, d in enumerate(signed):
            if d == -(1 << 31):
                out[i] = 0
            else:
                d = -d if negative[i] else d
                out[i] = flat[i] + wide(d) * wide(step) if d else flat[i]
        return out.astype(dtype.numpy).tobytes()
    order = lambda word: word ^ (mask >> 1) if dtype.is_float and word & top else word  # noqa: E731
    elements = []
    for word, d in zip(words.reshape(-1).tolist(), signed, strict=True):
        moved = -d if dtype.is_float and word & top else d
        elements.append(order((order(word) + (moved << shift)) & mask))
    coded = np.array(elements, words.dtype).view(dtype.numpy)
    return coded.astype(whole.numpy).tobytes()


# ---- the golden page ----------------------------------------------------------------------------


GOLDEN_PAGES = [("page_v2.page", "golden_blocks"), ("page_v2_extended.page", "extended_blocks")]
# Of the first, which is from before version 2: floats of a narrower dtype, and a pruned block.
BEFORE_VERSION_2 = (8, 9, 15)


def slots_of(payload: bytes) -> list[tuple[Any, ...]]:
    slots = []
    assert struct.unpack_from("<H", payload, 4) == (2,)
    for slot in codec.Page(payload).slots:
        start = int(slot["offset"])
        slots.append(
            (
                int(slot["encoding"]),
                DTYPES[int(slot["dtype"])],
                int(slot["rows"]),
                int(slot["cols"]),
                payload[start : start + int(slot["length"])],
                int(slot["base"]),
            )
        )
    return slots


@pytest.mark.parametrize(("name", "blocks"), GOLDEN_PAGES)
def test_golden_page_says_what_the_format_document_says(name: str, blocks: str) -> None:
    slots = slots_of((GOLDEN / name).read_bytes())
    assert {slot[0] for slot in slots} == {1, 2, 3}
    contents: list[bytes] = []
    for *slot, base in slots:
        if base:
            contents.append(decode_delta(tuple(slot), slots[base - 1][:5], contents[base - 1]))
        else:
            contents.append(PLANES["decode"](*slot))
    assert b"".join(contents) == MAKER["read_golden"]((GOLDEN / name).read_bytes())
    for content, (block, _, bound) in zip(contents, MAKER[blocks](), strict=True):
        if bound is None:
            assert content == block.tobytes()
        else:
            back = np.frombuffer(content, block.dtype).reshape(block.shape)
            assert relative_error(block, back) <= bound
            assert (back[block == 0] == 0).all()


@pytest.mark.parametrize(("name", "blocks"), GOLDEN_PAGES)
def test_golden_page_is_written(name: str, blocks: str) -> None:
    built, golden = MAKER["build_golden"](MAKER[blocks]()), (GOLDEN / name).read_bytes()
    if name == "page_v2_extended.page":
        assert built == golden
        return
    slots, before = slots_of(built), slots_of(golden)
    for number, (now, then) in enumerate(zip(slots, before, strict=True)):
        if number in BEFORE_VERSION_2:
            assert (now[4][0], then[4][0]) == (2, 1)
            assert len(now[4]) <= len(then[4]) + 2
        else:
            assert now == then


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_reads_and_writes_the_golden_page(kernel: str) -> None:
    script = (
        "import runpy, sys\n"
        "tests = runpy.run_path(sys.argv[1])\n"
        "for page in tests['GOLDEN_PAGES']:\n"
        "    tests['test_golden_page_says_what_the_format_document_says'](*page)\n"
        "    tests['test_golden_page_is_written'](*page)\n"
        "print('read and written')\n"
    )
    assert run_with_kernel(kernel, script, __file__) == "read and written\n"


# ---- behaviour ----------------------------------------------------------------------------------


def relative_error(block: NDArray[Any], back: NDArray[Any]) -> float:
    want, got = block.astype(np.float64), back.astype(np.float64)
    return float(np.linalg.norm(want - got) / np.linalg.norm(want))


def pair(shape: tuple[int, int] = (150, 130)) -> tuple[MatrixView, MatrixView]:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    moved = (base + rng.normal(0, 2e-4, shape)).astype(np.float32)
    return MatrixView.of(moved, (32, 48)), MatrixView.of(base, (32, 48))


def read_back(
    view: MatrixView, base: MatrixView, encoded: codec.EncodedBlocks
) -> NDArray[np.uint8]:
    grid, every = view.grid, np.arange(view.grid.count)
    pages = []
    for arena, ids in ((codec.encode_blocks(base, every, planes=True), None), (encoded, every + 1)):
        pages.append(
            codec.Page(
                codec.build_page(
                    arena.arena,
                    arena.offsets,
                    arena.lengths,
                    arena.encodings,
                    np.full(grid.count, view.dtype.code),
                    *grid.all_shapes(),
                    ids,
                )
            )
        )
    out = MatrixView(np.zeros_like(view.data), view.dtype, grid)
    bases = codec.StoredBases([pages[0]], np.zeros(grid.count, np.int64), every)
    codec.read_blocks(out, every, [pages[1]], np.zeros(grid.count, int), every, bases=bases)
    with pytest.raises(CorruptStoreError, match="without its base"):
        codec.read_blocks(out, [0], [pages[1]], [0], [0])
    for reason, wrong in (
        ("without its base", codec.StoredBases([], [-1], [0])),
        ("not the base that it was made from", codec.StoredBases([pages[0]], [0], [1])),
        ("base is a delta itself", codec.StoredBases([pages[1]], [0], [0])),
    ):
        with pytest.raises(CorruptStoreError, match=reason):
            codec.read_blocks(out, [0], [pages[1]], [0], [0], bases=wrong)
    return out.data


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_exact_deltas_come_back(threads: int) -> None:
    view, base = pair()
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, threads=threads)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.DELTA}
    assert codec.Encoding.DELTA.is_delta
    assert not codec.Encoding.PLANES.is_delta
    assert len(encoded.arena) < 0.67 * view.data.nbytes
    assert read_back(view, base, encoded).tobytes() == view.data.tobytes()
    estimates = codec.estimate_deltas(view, every, base, every, threads=threads)
    assert abs(estimates.sum() / len(encoded.arena) - 1) < 0.1


def test_bounded_deltas_keep_their_bound() -> None:
    view, base = pair((128, 96))
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, max_rel_error=0.001)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.QUANTISED}
    assert len(encoded.arena) < 0.15 * view.data.nbytes
    back = read_back(view, base, encoded).view(np.float32)
    for top in range(0, 128, 32):
        for left in range(0, 96, 48):
            block = np.s_[top : top + 32, left : left + 48]
            assert relative_error(view.data.view(np.float32)[block], back[block]) <= 0.001


def test_a_limit_that_is_too_small_gives_no_delta() -> None:
    view, base = pair()
    limits = np.full(view.grid.count, 10**4)
    limits[::2] = 100
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, limits=limits)
    assert (encoded.lengths[::2] == 0).all()
    assert (encoded.lengths[1::2] > 0).all()
    assert (encoded.lengths <= limits).all()
    assert encoded.lengths.sum() == len(encoded.arena)
    some = encoded.select(every[1::3])
    assert some.encodings.tolist() == encoded.encodings[1::3].tolist()
    for number, of_all in enumerate(every[1::3].tolist()):
        parts = [
            one.arena[one.offsets[at] :][: one.lengths[at]].tobytes()
            for one, at in ((some, number), (encoded, of_all))
        ]
        assert parts[0] == parts[1]
    none = codec.encode_deltas(view, [], base, [])
    assert len(none.lengths) == len(none.arena) == len(encoded.select(every[:0]).arena) == 0


def test_bad_arguments() -> None:
    view, base = pair()
    for index in (-view.grid.count - 1, -1, view.grid.count):
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [index], base, [0])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [3, index], base, [3, 0])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [0], base, [index])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.estimate_deltas(view, [index], base, [0])
    with pytest.raises(ArgumentError, match="1 block indices came with 2 bases"):
        codec.encode_deltas(view, [0], base, [0, 1])
    with pytest.raises(ArgumentError, match="shape of its base"):
        codec.encode_deltas(view, [0], base, [14])
    for bound in (0.0, 1.0, -0.5, float("nan"), True):
        with pytest.raises(ArgumentError, match="max_rel_error"):
            codec.encode_deltas(view, [0], base, [0], max_rel_error=bound)
    with pytest.raises(ArgumentError, match="max_rel_error"):
        codec.encode_deltas(view, [0], base, [0], max_rel_error="0.1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="limit"):
        codec.encode_deltas(view, [0], base, [0], limits=[-1])
    with pytest.raises(ArgumentError, match="limits"):
        codec.encode_deltas(view, [0], base, [0], limits=[5, 5])
    ints = MatrixView(base.data, DType.I32, base.grid)
    with pytest.raises(ArgumentError, match="only f64, f32, f16 and bf16 are converted"):
        codec.encode_deltas(view, [0], ints, [0])


def test_a_page_names_the_bases_of_its_deltas() -> None:
    view, base = pair((32, 48))
    encoded = codec.encode_deltas(view, [0], base, [0])
    columns = ([0], encoded.lengths, encoded.encodings, [view.dtype.code], [32], [48])
    with pytest.raises(ArgumentError, match="names no base"):
        codec.build_page(encoded.arena, *columns)
    for tag in (7, 2**64 - 1):  # any digest there is
        page = codec.build_page(encoded.arena, *columns, [tag])
        assert page[4] == codec.DELTA_PAGE_VERSION == codec.PAGE_VERSION
        assert codec.Page(page).slots["base"].tolist() == [tag]


def test_on_a_page_with_deltas_only_raw_blocks_are_aligned() -> None:
    payload = (GOLDEN / "page_v2.page").read_bytes()
    (n_slots,) = struct.unpack_from("<I", payload, 24)
    end, gaps = 64 + 32 * n_slots, 0
    for slot in range(n_slots):
        encoding, _, _, _, _, length, offset, _ = struct.unpack_from(
            "<BBHIIIQQ", payload, 64 + 32 * slot
        )
        start = -(-end // 64) * 64 if encoding == 0 else end
        assert offset == start
        assert not any(payload[end:start])
        gaps += encoding != 0 and end % 64 != 0
        end = start + length
    assert end == len(payload)
    assert gaps > 3  # places where version 1 would have left a gap
