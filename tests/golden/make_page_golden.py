# SPDX-License-Identifier: Apache-2.0
"""Writes page_v1.page and page_v1.content. Run only for a NEW page format: old files stay.

The page holds one block of each dtype and of each way that a plane can be kept; the other file is
what its blocks hold, one after another, in slot order. The content comes from a congruential
generator, so that no library's random numbers are in the files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before pydedup is there; not when a test imports this file
    os.environ["PYDEDUP_KERNEL"] = "scalar"

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.types import DType


def noise(n: int, seed: int) -> NDArray[np.uint8]:
    """Return n bytes without structure."""
    state, out = seed, bytearray()
    for _ in range(n):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return np.frombuffer(bytes(out), np.uint8)


def weights(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """Return numbers that look like weights: sums of twelve uniform ones, exact in f32."""
    n = shape[0] * shape[1]
    sums = noise(12 * n, seed).reshape(n, 12).astype(np.int64) @ (256 ** np.arange(12) % 257)
    return ((sums - int(sums.mean())) / 2.0**22).reshape(shape)


def bytes_with(counts: dict[int, int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the given byte values so many times, scattered by a fixed permutation."""
    values = np.repeat(np.array(list(counts), np.uint8), list(counts.values()))
    order = np.arange(len(values)) * 7919 % len(values)
    return values[order].reshape(shape)


FIBONACCI = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987]
BLOCKS: list[NDArray[np.generic]] = [
    weights((64, 64), 1).astype(np.float32),
    weights((64, 63), 2).astype(DType.BF16.numpy),
    weights((50, 33), 3).astype(np.float16),
    weights((40, 40), 4),
    np.zeros((32, 32), np.float32),
    noise(3 * 7 * 4, 5).view(np.float32).reshape(3, 7),  # too small and too random: raw
    noise(4096, 6).reshape(64, 64).view(np.int8),  # raw
    np.array([[-1]], np.int16),
    (noise(2000, 7) % 9).astype(np.int32).reshape(20, 100) - 4,
    (noise(2000, 8) % 100).astype(np.int64).reshape(100, 20),
    bytes_with(dict.fromkeys(range(0, 256, 16), 40), (16, 40)),  # table with a bitmap
    bytes_with(dict(enumerate(FIBONACCI, start=100)), (1, sum(FIBONACCI))),  # limited code
    (noise(600, 9) % 3).astype(np.uint16).reshape(6, 100),
    (noise(600, 10) % 3).astype(np.uint32).reshape(6, 100),
    (noise(600, 11) % 3).astype(np.uint64).reshape(6, 100),
    noise(500, 12).reshape(5, 100) > 250,
    (weights((20, 60), 13) * 4).astype(DType.F8_E4M3.numpy),
    (weights((20, 60), 14) * 4).astype(DType.F8_E5M2.numpy),
]


def main() -> None:
    """Write both files, or refuse."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    page_file, content_file = folder / "page_v1.page", folder / "page_v1.content"
    for target in (page_file, content_file):
        if target.exists():
            sys.exit(f"{target} exists; golden files are never rewritten")
    arena, columns = [], []
    for block in BLOCKS:
        view = MatrixView.of(block, block.shape)
        encoded = codec.encode_blocks(view, [0], planes=True)
        arena.append(encoded.arena)
        columns.append((len(encoded.arena), encoded.encodings[0], view.dtype.code, *block.shape))
    lengths, encodings, dtypes, rows, cols = (
        np.array(column) for column in zip(*columns, strict=True)
    )
    page = codec.build_page(
        np.concatenate(arena), np.cumsum(lengths) - lengths, lengths, encodings, dtypes, rows, cols
    )
    page_file.write_bytes(page)
    content_file.write_bytes(b"".join(block.tobytes() for block in BLOCKS))


if __name__ == "__main__":
    main()
