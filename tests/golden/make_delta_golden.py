# SPDX-License-Identifier: Apache-2.0
"""Writes pages of deltas of each version: page_v2.page and the others from version 2 on.

Run only for a NEW page format: old files stay.

The first slots are bases, every other one a delta on one of them; the base id of a slot is the
number of its base's slot plus one. The content comes from a congruential generator, so that no
library's random numbers are in the file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before pydedup is there; not when a test imports this file
    os.environ["PYDEDUP_KERNEL"] = "scalar"

import numpy as np
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.types import DType

Block = NDArray[np.generic]


def noise(n: int, seed: int) -> NDArray[np.uint8]:
    """Return n bytes without structure."""
    state, out = seed, bytearray()
    for _ in range(n):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return np.frombuffer(bytes(out), np.uint8)


def weights(seed: int) -> NDArray[np.float64]:
    """Return 64 x 64 numbers that look like weights: sums of twelve uniform ones, exact in f32."""
    sums = noise(12 * 4096, seed).reshape(4096, 12).astype(np.int64) @ (256 ** np.arange(12) % 257)
    return ((sums - int(sums.mean())) / 2.0**22).reshape(64, 64)


def golden_blocks() -> list[tuple[Block, int | None, float | None]]:
    """Return (block, slot of its base, error bound) of each slot."""
    base = weights(1)
    f32 = base.astype(np.float32)
    moved = (base * 65536 + (noise(4096, 2).reshape(64, 64).astype(np.float64) - 128) / 64) / 65536
    rows = f32.copy()
    rows[::9] = moved[::9]
    bits = f32.view(np.uint32)
    decayed = (bits - 700 - (bits >> 21 & 3) * 150).astype(np.uint32).view(np.float32)
    few = f32.copy()
    few.reshape(-1)[::500] = 1.0
    pruned = moved.astype(np.float32)
    pruned[:, ::5] = 0.0
    coarse = f32.astype(DType.BF16.numpy).astype(np.float32)
    ints = (noise(4096, 3).reshape(64, 64).astype(np.int32) - 128) * 1000
    return [
        (f32, None, None),
        (ints, None, None),
        (coarse, None, None),
        (f32, 0, None),  # no change
        (few, 0, None),  # sparse
        (moved.astype(np.float32), 0, None),  # contexts by exponent
        (rows, 0, None),  # row groups
        (decayed, 0, None),  # contexts by mantissa
        ((coarse.view(np.uint32) + (1 << 16)).view(np.float32), 2, None),  # shifted
        (moved, 0, None),  # f64 on f32
        (moved.astype(DType.BF16.numpy), 0, None),
        (moved.astype(np.float16), 0, None),
        (ints + (noise(4096, 4).reshape(64, 64) % 3).astype(np.int32), 1, None),
        (moved.astype(np.float32), 0, 0.001),
        (rows, 0, 0.001),
        (pruned, 0, 0.01),
        (moved, 0, 0.001),
        (moved.astype(DType.BF16.numpy), 0, 0.004),
    ]


def extended_blocks() -> list[tuple[Block, int | None, float | None]]:
    """Return the same of deltas of version 2: some elements became 0, or a dtype is narrower."""
    base = weights(5)
    f32 = base.astype(np.float32)
    moved = ((base * 65536 + (noise(4096, 6).reshape(64, 64) - 128.0) / 64) / 65536).astype("f4")
    gone = noise(4096, 7).reshape(64, 64)
    least = np.abs(f32) <= np.sort(np.abs(f32), axis=None)[2500]
    bf16 = f32.astype(DType.BF16.numpy)
    ints = (noise(4096, 8).reshape(64, 64).astype(np.int16) - 128) * 100
    flipped = bf16.astype(np.float32)
    flipped.reshape(-1)[::50] *= -1
    halves = moved.astype(np.float16).astype(np.float64)
    others = least.copy()
    others.reshape(-1)[::100] = True
    return [
        (f32, None, None),
        (ints, None, None),
        (f32 * (gone > 127), 0, None),  # raw bits, signs kept
        (np.where(gone > 20, f32, np.float32(0)), 0, None),  # Huffman
        (np.where(np.arange(64) % 4 < 2, moved, np.float32(0)), 0, None),  # constant
        (np.where(least, np.float32(0), f32), 0, None),  # threshold
        (f32 * ~others, 0, None),  # and some others; signs kept
        (np.where(least, np.float32(0), moved), 0, None),
        (np.where(least, np.zeros_like(bf16), bf16), 0, None),
        (np.where(least, 0, f32.astype(np.float64)), 0, None),
        (ints * (gone > 127).astype(np.int16), 1, None),
        (ints * (np.abs(ints) > 5000).astype(np.int16), 1, None),  # the least of an int are 0, 1...
        (np.where(gone > 127, moved, np.float32(0)), 0, 0.001),
        (np.where(least, np.float32(0), moved), 0, 0.01),
        (np.where(least, np.zeros_like(bf16), moved.astype(bf16.dtype)), 0, 0.02),
        (flipped, 0, None),  # bf16 saved in f32
        (halves, 0, None),  # f16 in f64
        (moved.astype(np.float64), 0, None),  # f32 in f64
        (np.where(least, np.float32(0), flipped), 0, None),  # masked as well
    ]


def golden_factors() -> dict[int, codec.LowRankFactors]:
    """Return the factors of slots of `factored_blocks`: of rows and of columns there are two."""
    numbers = noise(4 * 5 * 64, 9).reshape(4, 5, 64).astype(np.int32) - 128
    numbers *= 3 ** np.arange(5, dtype=np.int32)[:, None]
    numbers[:, 3] = 0  # no bits
    at = np.zeros(1, np.int64)
    pairs = [(0, 1), (0, 2), (0, 1), (3, 1), (0, 1), (0, 1), (3, 2), (0, 1)]
    pairs += [(0, 1), (3, 2), (0, 1), (0, 1), (0, 1), (0, 1)]
    made = {
        slot: codec.LowRankFactors(-36, numbers[[rows]], numbers[[cols]], at, at)
        for slot, (rows, cols) in enumerate(pairs, 3)
    }
    largest = np.full((1, 1, 64), (1 << 23) - 1, np.int32)
    nothing = np.zeros((1, 1, 64), np.int32)
    made[17] = codec.LowRankFactors(-60, largest, -largest, at, at)
    made[18] = codec.LowRankFactors(900, nothing, largest, at, at)  # one of a byte
    made[19] = codec.LowRankFactors(-900, nothing, largest, at, at)
    return made


def moved_by(block: Block, factors: codec.LowRankFactors, numpy: np.dtype[Any]) -> Block:
    """Return a block moved by factors, by way of f64, as docs/format.md says."""
    base = block.astype(numpy)
    sums = factors.of_rows[0].T.astype(np.int64) @ factors.of_cols[0].astype(np.int64)
    moved = base.astype(np.float64) + sums * 2.0**factors.exponent
    if numpy != np.float64:
        moved = moved.astype(np.float32)
    return np.where((sums == 0) | ~np.isfinite(base.astype(np.float64)), base, moved.astype(numpy))


def factored_blocks() -> list[tuple[Block, int | None, float | None]]:
    """Return the same of deltas of version 3: a base was moved by factors."""
    f32 = weights(10).astype(np.float32)
    odd = f32.copy()
    odd.reshape(-1)[:6] = np.inf, -np.inf, np.nan, -0.0, 1e-42, 3e38
    wide = weights(11)
    bf16, f16, f64 = DType.BF16.numpy, np.dtype(np.float16), np.dtype(np.float64)
    f = golden_factors()
    few = moved_by(f32, f[4], f32.dtype)
    few.reshape(-1)[::500] = 1.0
    near = noise(4096, 12).reshape(64, 64).astype(np.uint32)
    some = moved_by(f32, f[5], f32.dtype).view(np.uint32)
    some = (some + np.where(near < 50, near % 3, 0)).astype(np.uint32)
    some.reshape(-1)[::700] += 1000
    every = moved_by(f32, f[6], f32.dtype).view(np.uint32) + (near >> 3)
    gone = noise(4096, 13).reshape(64, 64) > 127
    doubles = moved_by(wide, f[10], f64).view(np.uint64)
    doubles = doubles + np.where(near < 40, 1, 0).astype(np.uint64)
    doubles.reshape(-1)[::900] += np.uint64(1 << 40)
    return [
        (f32, None, None),
        (odd, None, None),
        (wide, None, None),
        (moved_by(f32, f[3], f32.dtype), 0, None),  # no change
        (few, 0, None),  # sparse; the same factor of rows
        (some.view(np.float32), 0, None),  # changed, some by more than a byte
        (every.astype(np.uint32).view(np.float32), 0, None),  # coded
        (moved_by(f32, f[7], f32.dtype) * gone, 0, None),  # a mask as well
        (moved_by(f32, f[8], bf16), 0, None),  # bf16 on f32
        (moved_by(f32, f[9], f16), 0, None),  # f16 on f32
        (doubles.view(np.float64), 2, None),  # f64, changed by more than 32 bits
        (moved_by(f32, f[11], f64), 0, None),  # f64 on f32
        (moved_by(f32, f[12], bf16).astype(np.float32), 0, None),  # bf16 saved in f32
        (moved_by(odd, f[13], f32.dtype), 1, None),  # not all finite
        (every.astype(np.uint32).view(np.float32), 0, 0.0001),
        (moved_by(f32, f[15], f32.dtype) * gone, 0, 0.001),
        (moved_by(f32, f[16], bf16), 0, 0.004),
        (moved_by(f32, f[17], f32.dtype), 0, None),  # the largest numbers
        (f32, 0, None),  # nothing moves
        (few, 0, None),
    ]


def transposed_blocks() -> list[tuple[Block, int | None, float | None]]:
    """Return the same of deltas of version 4: a base is transposed, and may be moved then."""
    f32 = weights(20).astype(np.float32)
    tall = np.ascontiguousarray(f32[:, :40])
    ints = noise(64 * 24, 21).reshape(24, 64) >> 4
    t, wide = np.ascontiguousarray(f32.T), np.ascontiguousarray(tall.T)
    bf16, f64 = DType.BF16.numpy, np.dtype(np.float64)
    few = wide.copy()
    few.reshape(-1)[::500] = 1.0
    every = (t.view(np.uint32) + (noise(4096, 22).reshape(64, 64) >> 3)).astype(np.uint32)
    gone = noise(4096, 23).reshape(64, 64) > 127
    f = transposed_factors()
    moved = moved_by(t, f[10], f32.dtype)
    some = moved_by(wide, f[11], f32.dtype).view(np.uint32)
    some = (some + (noise(2560, 24).reshape(40, 64) < 40)).astype(np.uint32)
    return [
        (f32, None, None),
        (tall, None, None),
        (ints, None, None),
        (t, 0, None),  # no change
        (few, 1, None),  # sparse, and not square
        (every.view(np.float32), 0, None),  # coded
        (t * gone, 0, None),  # a mask
        (t.astype(bf16), 0, None),  # bf16 on f32
        (t.astype(f64), 0, None),  # f64 on f32
        (np.ascontiguousarray(ints.T), 2, None),
        (moved, 0, None),  # factors
        (some.view(np.float32), 1, None),  # factors, changed by little
        (moved_by(t, f[12], bf16), 0, None),  # the same factors, bf16
        ((t + f32 / 4096).astype(np.float32), 0, 0.0001),
        ((moved + t / 512).astype(np.float32), 0, 0.001),  # factors, quantised
    ]


def listed_blocks() -> list[tuple[Block, int | None, float | None]]:
    """Return the same of deltas of version 5: lists of where frequent values are, and of others."""
    f32 = weights(30).astype(np.float32)
    bf16 = f32.astype(DType.BF16.numpy)
    bits, halves = f32.view(np.uint32), bf16.view(np.uint16)
    ints = (noise(4096, 31).reshape(64, 64) >> 4) + np.uint8(60)
    chance, sign = noise(4096, 32).reshape(64, 64), noise(4096, 33).reshape(64, 64) & 2
    few, some, many = chance < 6, chance < 30, chance < 60
    one = sign.astype(np.int64) - 1
    size = noise(4096, 34).reshape(64, 64).astype(np.int64)
    far = np.zeros((64, 64), np.bool_)
    far[:20] = some[:20]
    far[63, 60] = True
    least = np.abs(f32) <= np.sort(np.abs(f32), axis=None)[1000]
    scattered = np.where(some, bits + one * (size % 24 + 1), bits).astype(np.uint32)
    halved = np.where(some, halves + one * (size % 3 + 1), halves).astype(np.uint16)
    moved = (f32 * np.where(some, 1.25, 1.0)).astype(np.float32)
    return [
        (f32, None, None),
        (ints, None, None),
        (bf16, None, None),
        (halved.view(bf16.dtype), 2, None),  # lists alone
        (np.where(few, bits + one * size**3, bits).astype(np.uint32).view(np.float32), 0, None),
        (scattered.view(np.float32), 0, None),  # as many lists as there may be, and others
        (np.where(many, ints + one, ints).astype(np.uint8), 1, None),
        (np.where(far, ints + one * 16, ints).astype(np.uint8), 1, None),  # far apart
        (np.where(least, np.zeros_like(bf16), halved.view(bf16.dtype)), 2, None),  # masked
        (halved.view(bf16.dtype).astype(np.float32), 0, None),  # narrower
        (moved, 0, 0.02),
        (moved.astype(bf16.dtype), 0, 0.05),
    ]


def transposed_factors() -> dict[int, codec.LowRankFactors]:
    """Return the factors of slots of `transposed_blocks`."""
    numbers = noise(2 * 3 * 64, 25).reshape(2, 1, 3, 64).astype(np.int32) - 128
    at = np.zeros(1, np.int64)
    square = codec.LowRankFactors(-36, numbers[0], numbers[1], at, at)
    wide = codec.LowRankFactors(-36, numbers[0][:, :, :40].copy(), numbers[1], at, at)
    return {10: square, 11: wide, 12: square, 14: square}


def build_golden(
    blocks: list[tuple[Block, int | None, float | None]],
    factors: dict[int, codec.LowRankFactors] | None = None,
    *,
    is_transposed: bool = False,
) -> bytes:
    """Return the page of these blocks, every one with a base as a delta; factors are by slot."""
    views = [MatrixView.of(block, block.shape) for block, _, _ in blocks]
    encoded = []
    for number, (view, (_, base, bound)) in enumerate(zip(views, blocks, strict=True)):
        if base is None:
            encoded.append(codec.encode_blocks(view, [0], planes=True))
        else:
            encoded.append(
                codec.encode_deltas(
                    view,
                    [0],
                    views[base],
                    [0],
                    max_rel_error=bound,
                    factors=(factors or {}).get(number),
                    is_transposed=is_transposed,
                )
            )
    lengths = np.array([len(one.arena) for one in encoded])
    return codec.build_page(
        np.concatenate([one.arena for one in encoded]),
        np.cumsum(lengths) - lengths,
        lengths,
        [int(one.encodings[0]) for one in encoded],
        [view.dtype.code for view in views],
        [block.shape[0] for block, _, _ in blocks],
        [block.shape[1] for block, _, _ in blocks],
        [0 if base is None else base + 1 for _, base, _ in blocks],
    )


def read_golden(payload: bytes) -> bytes:
    """Return what the slots of such a page decode to."""
    page, content = codec.Page(payload), []
    for number, slot in enumerate(page.slots):
        numpy = next(dtype.numpy for dtype in DType if dtype.code == slot["dtype"])
        out = MatrixView.of(np.zeros((slot["rows"], slot["cols"]), numpy), (64, 64))
        base = int(slot["base"])
        bases = codec.StoredBases([page], [0 if base else -1], [max(base - 1, 0)])
        codec.read_blocks(out, [0], [page], [0], [number], bases=bases)
        content.append(out.data.tobytes())
    return b"".join(content)


def main() -> None:
    """Write the file, or refuse."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, blocks, factors, is_transposed in (
        ("page_v2.page", golden_blocks, None, False),
        ("page_v2_extended.page", extended_blocks, None, False),
        ("page_v3_factors.page", factored_blocks, golden_factors(), False),
        ("page_v4_transposed.page", transposed_blocks, transposed_factors(), True),
        ("page_v5_listed.page", listed_blocks, None, False),
    ):
        if (folder / name).exists():
            print(f"{folder / name} exists; golden files are never rewritten")
        else:
            (folder / name).write_bytes(
                build_golden(blocks(), factors, is_transposed=is_transposed)
            )


if __name__ == "__main__":
    main()
