# SPDX-License-Identifier: Apache-2.0
"""A second reader of deltas, in plain Python, from docs/format.md; not for speed."""

from __future__ import annotations

import math
import runpy
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.hashing import hash_blocks
from pydedup.types import DType

PLANES = runpy.run_path(str(Path(__file__).with_name("test_codec.py")))
DTYPES = {dtype.code: dtype for dtype in DType}
FIELDS = {DType.F64: (11, 52), DType.F32: (8, 23), DType.F16: (5, 10), DType.BF16: (8, 7)}


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


def read_plane(reader: Reader, n_bytes: int) -> NDArray[np.uint8]:
    (length,) = struct.unpack_from("<I", reader.payload, reader.at + 4)
    end = reader.at + 8 + length
    # A block of bytes that has no other plane.
    of_bytes = struct.pack("<BBBBI", 1, 1, 0, 0, n_bytes) + reader.payload[reader.at : end]
    reader.at = end
    return np.frombuffer(PLANES["decode"](1, DType.U8, 1, n_bytes, of_bytes), np.uint8)


def read_bits(reader: Reader, count: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(read_plane(reader, -(-count // 8)), bitorder="little")
    assert not bits[count:].any()
    return bits[:count] == 1


def read_changed(reader: Reader, count: int) -> list[int]:
    values = read_bits(reader, count).astype(np.int64).tolist()
    at = [i for i, changed in enumerate(values) if changed]
    if at:
        for i, above in zip(at, read_plane(reader, len(at)).tolist(), strict=True):
            values[i] = above + 1
    for i in at:
        if values[i] == 256:
            values[i] += reader.varint()
    assert reader.at == len(reader.payload)
    return values


def read_factor(reader: Reader, before: bytes, rank: int, n: int) -> list[list[int]]:
    """Return a factor, n numbers for each k: what follows, or what lies before on the page."""
    behind = reader.varint()
    if behind:
        assert behind <= len(before)
        reader = Reader(before[len(before) - behind :])
    widths = [reader.byte() for _ in range(rank)]
    assert max(widths) <= 24
    factor = []
    for width in widths:
        numbers = [reader.number(width) for _ in range(n)]
        factor.append([x - (1 << width) if x >> max(width - 1, 0) else x for x in numbers])
    reader.align()
    assert min(map(min, factor)) > -(1 << 23)
    return factor


def read_moved(reader: Reader, before: bytes, x: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Return a base as factors move it."""
    assert dtype in FIELDS
    rank = reader.byte()
    assert 1 <= rank <= 64
    (exponent,) = struct.unpack_from("<h", reader.payload, reader.at)
    assert abs(exponent) <= 900
    reader.at += 2
    of_rows = read_factor(reader, before, rank, x.shape[0])
    of_cols = read_factor(reader, before, rank, x.shape[1])
    moved = x.copy()
    for i, j in np.ndindex(x.shape):
        s = sum(of_rows[k][i] * of_cols[k][j] for k in range(rank))
        with np.errstate(over="ignore", invalid="ignore"):  # NaNs that signal
            value = float(x[i, j])
            if s != 0 and math.isfinite(value):
                total = np.float64(value + s * 2.0**exponent)
                moved[i, j] = (total if dtype is DType.F64 else np.float32(total)).astype(x.dtype)
            elif dtype.itemsize == 2 and math.isnan(value):
                moved[i, j] = np.float32(math.copysign(math.nan, value)).astype(x.dtype)
    return moved


def read_listed(reader: Reader, count: int) -> list[int]:
    n_lists = reader.varint()
    assert n_lists <= 16
    lists = []
    for i in range(n_lists + 1):
        value = reader.varint() if i < n_lists else 0
        n = reader.varint()
        assert n or i == n_lists
        lists.append((value, n, reader.byte() if n else 0))
    listed = [value for value, *_ in lists[:-1]]
    assert listed == sorted(set(listed) - {0})
    values, others = [0] * count, []
    for value, n, low_bits in lists:
        at = -1
        for _ in range(n):
            high = 0
            while high < 24 and reader.number(1):
                high += 1
            distance = (
                reader.number(32) if high == 24 else high << low_bits | reader.number(low_bits)
            )
            at += distance + 1
            assert values[at] == 0
            values[at] = value
            others += [] if value else [at]
    reader.align()
    for at in others:
        values[at] = reader.varint()
        assert values[at]
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
        gone = read_bits(reader, words.size).reshape(words.shape)
    kept = words & np.array(sign, words.dtype) if keeps_sign else np.zeros_like(words)
    return np.where(gone, kept, words)


def decode_delta(
    slot: tuple[Any, ...], base: tuple[Any, ...], base_content: bytes, before: bytes
) -> bytes:
    """Return the elements of a delta, as docs/format.md says; its page begins with ``before``."""
    encoding, dtype, rows, cols, payload = slot
    version, form, base_dtype, shift, count = struct.unpack_from("<BBBBI", payload)
    assert version in (1, 2, 3, 4, 5)
    assert (DTYPES[base_dtype], count) == (base[1], rows * cols)
    stored = np.frombuffer(base_content, base[1].numpy).reshape(base[2:4])
    assert payload[8:12] == hash_blocks(stored, stored.shape).tobytes()[:4]
    if version == 4:
        stored = np.ascontiguousarray(stored.T)
    assert stored.shape == (rows, cols)
    reader = Reader(payload)
    reader.at = 20 if encoding == 3 else 12
    whole, dtype = dtype, DTYPES[reader.byte()] if version >= 2 else dtype
    assert dtype is whole or (encoding == 2 and dtype.itemsize < whole.itemsize)
    x = stored.astype(dtype.numpy)
    if version == 4 and reader.payload[reader.at] == 0:
        reader.at += 1
    elif version in (3, 4):
        x = read_moved(reader, before, x, dtype)
    bits = 8 * dtype.itemsize
    words = x.view(f"u{dtype.itemsize}")
    if version >= 2:
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
    elif form == 2:
        assert version in (3, 4)
        values = read_changed(reader, count)
    elif form == 3:
        assert version == 5
        values = read_listed(reader, count)
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
