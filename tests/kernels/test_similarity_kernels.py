# SPDX-License-Identifier: Apache-2.0
"""Sketches and their serialised form: golden files, a second reader, every kernel there is here."""

from __future__ import annotations

import json
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest

from pydedup.hashing import hash_buffer
from pydedup.similarity import L2LSH, SIMILARITY_VERSION
from pydedup.testing.kernels import RUNNABLE, run_with_kernel

GOLDEN = Path(__file__).parents[1] / "golden"
MASK = (1 << 64) - 1


MAKE = runpy.run_path(str(GOLDEN / "make_similarity_golden.py"))
INDEXES = json.loads((GOLDEN / "similarity_v1.json").read_text())["indexes"]


@pytest.mark.parametrize("number", range(len(INDEXES)))
def test_old_indexes_are_read_and_written_again(number: int) -> None:
    assert SIMILARITY_VERSION == 1
    case = INDEXES[number]
    payload = bytes.fromhex(case["payload"])
    index = L2LSH.load(payload)
    assert index.save() == payload
    assert index.block_shape == tuple(case["shape"])
    assert (index.bands, index.rows, index.seed, index.r) == (
        case["bands"],
        case["rows"],
        case["seed"],
        0.5,
    )
    assert index.ids.tolist() == [0, 3, 10, 11, 12, 2**40]
    blocks = MAKE["golden_blocks"](case["dtype"], case["shape"])
    ids, found = index.query(blocks)
    assert ids[:, 0].tolist() == [10, 2**40, 10, 12, -1, 3]
    assert (found[ids >= 0] == 0).all()


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_writes_the_golden_indexes(kernel: str) -> None:
    script = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('golden', sys.argv[1])\n"
        "make = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(make)\n"
        "cases = json.load(open(sys.argv[2]))['indexes']\n"
        "wrong = [c['dtype'] for c in cases if make.golden_index(c).save().hex() != c['payload']]\n"
        "print(json.dumps([len(cases), wrong]))\n"
    )
    golden = (GOLDEN / "make_similarity_golden.py", GOLDEN / "similarity_v1.json")
    count, wrong = json.loads(run_with_kernel(kernel, script, *golden))
    assert count == len(INDEXES) >= 6
    assert wrong == []


# ---- a second reader and a second sketch, from docs/format.md -----------------------------------


def random_word(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def stream(seed: int, number: int) -> int:
    return random_word(random_word(seed, number) ^ 0xD1B54A32D192ED03, 0)


def sign_of(seed: int, strip: int, bucket: int) -> int:
    group, lane = divmod(bucket, 16)
    word = random_word(seed, strip * 32 + group // 32 * 16 + lane) >> 32
    return -1 if word >> (31 - group % 32) & 1 else 1


def hadamard(values: np.ndarray, bits: list[int]) -> np.ndarray:
    """Walsh-Hadamard over these bits of the position, in float64."""
    out = values.copy()
    places = np.arange(len(out))
    for bit in bits:
        other = out[places ^ (1 << bit)]
        out = np.where(places >> bit & 1, other - out, out + other)
    return out


def second_sketch(block: np.ndarray, seed: int, length: int) -> np.ndarray:
    """The projections of a block, as real numbers in units of the sketch."""
    rows, cols = block.shape
    padded = -(-cols // 16) * 16
    strips = []
    if cols <= 1024:
        height = 1024 // padded
        for top in range(0, rows, height):
            strip = np.zeros(1024)
            for r, row in enumerate(block[top : top + height]):
                strip[r * padded : r * padded + cols] = row
            strips.append(strip)
    else:
        for row in block:
            for left in range(0, cols, 1024):
                strips.append(np.pad(row[left : left + 1024], (0, 1024))[:1024])
    buckets = np.zeros(1024)
    signs, moves, mixed = stream(seed, 1), stream(seed, 2), stream(seed, 3)
    places = np.arange(1024)
    for number, strip in enumerate(strips):
        move = random_word(moves, number) % 1024
        sign = np.array([sign_of(signs, number, bucket) for bucket in range(1024)])
        buckets += sign * strip[places ^ move]
    value = hadamard(buckets, [4, 5, 6, 7, 8, 9])
    value *= [sign_of(mixed, 0, bucket) for bucket in range(1024)]
    value = hadamard(value, list(range(10)))
    value *= [sign_of(mixed, 1, bucket) for bucket in range(1024)]
    projections = hadamard(value, list(range(10)))[:length] / 256
    return projections / np.linalg.norm(block) * 2048


@pytest.mark.parametrize("number", range(len(INDEXES)))
def test_the_format_is_what_the_document_says(number: int) -> None:
    case = INDEXES[number]
    payload = bytes.fromhex(case["payload"])
    magic, version, header = struct.unpack_from("<4sHH", payload)
    assert (magic, version, header) == (b"PDLS", 1, 96)
    seed_of_checksum = int.from_bytes(payload[:8], "little")
    assert payload[8:24] == hash_buffer(payload[24:], seed=seed_of_checksum)
    total, r, seed, rows, cols, groups, members, others, bands, band_rows, length = (
        struct.unpack_from("<QdQQQQQQHHH", payload, 24)
    )
    assert total == len(payload)
    assert (r, seed, [rows, cols], bands, band_rows) == (
        0.5,
        case["seed"],
        case["shape"],
        case["bands"],
        case["rows"],
    )
    assert length == max(64, -(-bands * band_rows // 32) * 32)
    assert (groups, members, others) == (4, 5, 1)
    rms = np.frombuffer(payload, "<f8", groups, 96)
    sketches = np.frombuffer(payload, "<i2", groups * length, 96 + 8 * groups)
    at = 96 + 8 * groups + 2 * groups * length
    numbers = []
    while at < len(payload):
        value = shift = 0
        while True:
            byte = payload[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value)
    assert numbers[:groups] == [2, 1, 1, 1], "blocks per sketch"
    ids, last = [], 0
    for step in numbers[groups:]:
        last += (step >> 1) ^ -(step & 1)
        ids.append(last)
    assert ids == [10, 11, 2**40, 12, 3, 0]
    blocks = MAKE["golden_blocks"](case["dtype"], case["shape"]).astype(np.float64)
    for group, block in enumerate((blocks[0], blocks[1], blocks[3], blocks[5])):
        assert rms[group] == pytest.approx(np.sqrt((block**2).mean()), rel=1e-6)
        sketch = sketches.reshape(groups, length)[group]
        if not block.any():
            assert not sketch.any()
            continue
        wanted = second_sketch(block, seed, length)
        # Rounded down; f32 sums may put a number that is nearly whole on the other side.
        assert np.abs(sketch + 0.5 - wanted).max() < 0.51
