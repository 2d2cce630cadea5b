# SPDX-License-Identifier: Apache-2.0
"""The block hash beside XXH3-128 of the `xxhash` package.

    python bench/peers/hashing.py [--seconds S] [--only AREA] [--json]

cached: one piece, hashed again and again, from 64 bytes to 16 MiB, called from Python; both sides
give `bytes`. memory: what is read from memory, one thread: 64 KiB pieces in one call of ours and
2,048 of theirs (there is no other way to ask xxhash), and square blocks of a matrix, which xxhash
can only have as copies. The share of the memory's own speed is bench/native's to tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from _timing import Row, compare, main, timed

from pydedup.hashing import hash_blocks, hash_buffer

PIECE = 64 * 1024
SIZES = [64, 128, 256, 1024, 4096, 16384, PIECE, 1 << 18, 1 << 20, 1 << 22, 1 << 24]


def cached(seconds: float) -> Iterator[Row]:
    """Yield the curve over sizes."""
    rng = np.random.default_rng(0)
    for size in SIZES:
        piece = rng.integers(0, 256, size, np.uint8).tobytes()
        yield from compare(
            f"{size} bytes" if size < 1024 else f"{size >> 10} KiB",
            unit="GB/s",
            work=size,
            sides={
                "pydedup": timed("f(x)", f=hash_buffer, x=piece),
                "xxh3_128_digest": timed("f(x)", f=xxhash.xxh3_128_digest, x=piece),
            },
            seconds=seconds,
            target=1.0 if size == PIECE else None,
        )


def memory(seconds: float) -> Iterator[Row]:
    """Yield what is read from memory."""
    matrix = np.random.default_rng(0).standard_normal((32768, 1024), np.float32)
    blocks = matrix.view(np.uint8).reshape(-1, PIECE)

    def peer_rows() -> None:
        for block in blocks:
            xxhash.xxh3_128_digest(block)

    def peer_squares() -> None:
        for top in range(0, 32768, 64):
            for left in range(0, 1024, 64):
                xxhash.xxh3_128_digest(matrix[top : top + 64, left : left + 64].tobytes())

    yield from compare(
        "128 MiB in 64 KiB rows",
        unit="GB/s",
        work=matrix.nbytes,
        sides={
            "pydedup": lambda: hash_blocks(blocks, (1, PIECE), threads=1),
            "xxh3_128_digest": peer_rows,
        },
        seconds=seconds,
        target=1.0,
    )
    yield from compare(
        "64x64 f32 blocks of a 1024-wide matrix",
        unit="GB/s",
        work=matrix.nbytes,
        sides={
            "pydedup": lambda: hash_blocks(matrix, (64, 64), threads=1),
            "copy + xxh3_128_digest": peer_squares,
        },
        seconds=seconds,
    )


if __name__ == "__main__":
    main(__doc__, [cached, memory])
