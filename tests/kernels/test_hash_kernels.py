# SPDX-License-Identifier: Apache-2.0
"""The block hash: golden vectors, an independent reference, and every kernel that runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.errors import ArgumentError
from pydedup.hashing import hash_blocks, hash_buffer
from pydedup.testing.kernels import RUNNABLE, run_with_kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "hash_v1.json"
MASK = (1 << 64) - 1


def _split_mix(index: int) -> int:
    z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


KEYS = [_split_mix(i) for i in range(8 * 16 + 16 + 16 + 32)]


def reference_hash(rows: list[bytes], seed: int = 0) -> bytes:
    """The definition at the top of hash_common-inl.hpp, in integers of unbounded size."""
    scramble, start, fold = KEYS[128:144], KEYS[144:160], (KEYS[160:176], KEYS[176:192])
    product, total, stripe = list(start), [0] * 16, 0
    for row in rows:
        for at in range(0, len(row), 128):
            lanes = np.frombuffer(row[at : at + 128].ljust(128, b"\0"), "<u8").tolist()
            for i, d in enumerate(lanes):
                key = (KEYS[16 * stripe + i] + (-seed if i % 2 else seed)) & MASK
                keyed = d ^ key
                product[i] = (product[i] + (keyed & 0xFFFFFFFF) * (keyed >> 32)) & MASK
                total[i] = (total[i] + d) & MASK
            stripe += 1
            if stripe == 8:
                mixed = [(product[i] + total[i ^ 1]) & MASK for i in range(16)]
                product = [
                    (m ^ (m >> 47) ^ scramble[i]) * 0x9E3779B1 & MASK for i, m in enumerate(mixed)
                ]
                total, stripe = [0] * 16, 0
    halves = []
    for key in fold:
        wide = ((len(rows) + key[0]) & MASK) * (((len(rows[0]) if rows else 0) + key[1]) & MASK)
        folded = (((wide & MASK) ^ (wide >> 64)) + (seed ^ key[2])) & MASK
        for i in range(0, 16, 2):
            even = (product[i] + total[i + 1]) & MASK
            odd = (product[i + 1] + total[i]) & MASK
            wide = (even ^ key[i]) * (odd ^ key[i + 1])
            folded = (((folded << 23) | (folded >> 41)) + ((wide & MASK) ^ (wide >> 64))) & MASK
        for _ in range(2):
            folded = (folded ^ (folded >> 32)) * 0xD6E8FEB86659FD93 & MASK
        halves.append(folded ^ (folded >> 32))
    return b"".join(half.to_bytes(8, "little") for half in halves)


def golden_input(length: int) -> bytes:
    """Bytes of a fixed congruential generator: no library's random numbers are in the file."""
    state, out = 1, bytearray()
    for _ in range(length):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return bytes(out)


def test_golden_vectors() -> None:
    vectors = json.loads(GOLDEN.read_text())["vectors"]
    assert len(vectors) >= 20
    for vector in vectors:
        data = golden_input(vector["length"])
        assert hash_buffer(data, seed=vector["seed"]).hex() == vector["digest"], vector
        assert reference_hash([data], vector["seed"]).hex() == vector["digest"], vector


@given(
    rows=st.integers(1, 12),
    row_bytes=st.integers(1, 400),
    seed=st.integers(0, MASK),
    data=st.data(),
)
@settings(max_examples=60)
def test_blocks_hash_like_the_reference(
    rows: int, row_bytes: int, seed: int, data: st.DataObject
) -> None:
    content = np.frombuffer(
        data.draw(st.binary(min_size=rows * row_bytes, max_size=rows * row_bytes)), np.uint8
    )
    digest = hash_blocks(content.reshape(rows, row_bytes), (rows, row_bytes), seed=seed)
    wanted = reference_hash([row.tobytes() for row in content.reshape(rows, row_bytes)], seed)
    assert digest.shape == (1, 2)
    assert digest.astype("<u8").tobytes() == wanted


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(["f8", "f4", "f2", "i1"]),
)
@settings(max_examples=60)
def test_strided_blocks_hash_like_their_copies(
    shape: tuple[int, int], block: tuple[int, int], dtype: str
) -> None:
    matrix = np.random.default_rng(shape[0]).integers(-99, 99, shape).astype(dtype)
    digests = hash_blocks(matrix, block)
    number = 0
    for top in range(0, shape[0], block[0]):
        for left in range(0, shape[1], block[1]):
            copy = np.ascontiguousarray(matrix[top : top + block[0], left : left + block[1]])
            assert (digests[number] == hash_blocks(copy, copy.shape)[0]).all()
            number += 1
    assert number == len(digests)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_gives_the_golden_digests(kernel: str) -> None:
    script = (
        "import json, sys\n"
        "from pydedup.hashing import hash_buffer\n"
        "state, data = 1, bytearray()\n"
        "for _ in range(70000):\n"
        "    state = (state * 1664525 + 1013904223) & 0xFFFFFFFF\n"
        "    data.append(state >> 24)\n"
        "vectors = json.load(open(sys.argv[1]))['vectors']\n"
        "def digest(v): return hash_buffer(bytes(data[:v['length']]), seed=v['seed']).hex()\n"
        "wrong = [v for v in vectors if digest(v) != v['digest']]\n"
        "print(json.dumps([len(vectors), wrong]))\n"
    )
    count, wrong = json.loads(run_with_kernel(kernel, script, GOLDEN))
    assert count >= 20
    assert wrong == []


def test_a_kernel_that_cannot_be_had_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from pydedup import config; config.kernels()"],
        env={**os.environ, "PYDEDUP_KERNEL": "SCALAR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    for said in ("KernelUnavailableError", "PYDEDUP_KERNEL", "unknown", "scalar"):
        assert said in done.stderr


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="2-D"):
        hash_blocks(np.zeros(3), (1, 1))
    with pytest.raises(ArgumentError, match=r"\(0, 4\)"):
        hash_blocks(np.zeros((3, 3)), (0, 4))
    with pytest.raises(ArgumentError, match="complex128"):
        hash_blocks(np.zeros((3, 3), complex), (1, 1))
    with pytest.raises(ArgumentError, match="numpy array, not list"):
        hash_blocks([[1.0]], (1, 1))  # type: ignore[arg-type]
