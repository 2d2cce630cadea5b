# SPDX-License-Identifier: Apache-2.0
"""Convolutions with stored weights against plain sums in float64 and against torch, every kernel.

As for products, sums are held to the bound that no order of adding exceeds (Higham 2002, section
3.1).
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import conv, matmul
from pydedup.blocks import BlockMap
from pydedup.pool import PagePool
from pydedup.testing.kernels import RUNNABLE, run_with_kernel
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType

Array = NDArray[Any]
Pads = tuple[int, int, int, int]


def reference(
    x: Array,
    w: Array,
    stride: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    groups: int,
) -> Array:
    """Return the sums in float64, one weight of the filter at a time."""
    top, left, bottom, right = pads
    wide = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    filters = w.astype(np.float64)
    out, group_in, kernel_h, kernel_w = w.shape
    height = (wide.shape[2] - (kernel_h - 1) * dilation[0] - 1) // stride[0] + 1
    width = (wide.shape[3] - (kernel_w - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((len(x), out, height, width))
    for o in range(out):
        first = o // (out // groups) * group_in
        for i in range(kernel_h):
            for j in range(kernel_w):
                rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1)
                cols = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1)
                seen = wide[:, first : first + group_in, rows, cols]
                seen = seen[:, :, :: stride[0], :: stride[1]]
                y[:, o] += np.einsum("nchw,c->nhw", seen, filters[o, :, i, j])
    return y


def assert_close(got: Array, x: Array, w: Array, *how: Any) -> None:
    exact, magnitude = reference(x, w, *how), reference(np.abs(x), np.abs(w), *how)
    info = np.finfo(got.dtype)
    terms = w[0].size
    allowed = (terms + 2) * (info.eps + np.finfo(np.float64).eps) * magnitude + info.tiny
    assert got.shape == exact.shape
    worst = np.max(np.abs(got - exact) / allowed, initial=0.0)
    assert worst <= 1.0, f"{worst:.2f} times the bound"


def stored(w: Array, block: tuple[int, int], **how: Any) -> tuple[BlockMap, PagePool]:
    pages = MemoryPages()
    block_map = pages.add(w, block, **how)
    return block_map, pages.pool()


def assert_holds(kernel: str, check: Callable[[], None]) -> None:
    """Run a check of this file with a kernel, which a process chooses once."""
    called = f"runpy.run_path({__file__!r})[{check.__name__!r}]()"
    code = f"import runpy; {called}; print('all hold')"
    assert run_with_kernel(kernel, code) == "all hold\n"


def check_layers(dtype: DType, seed: int) -> None:
    """Layers that reach every path: edges, strides, many rows, groups, several strips."""
    rng = np.random.default_rng(seed)
    compute = matmul.compute_dtype(dtype)
    for channels, out, kernel, size, stride, pad, groups in (
        (5, 70, (3, 3), (9, 40), (1, 1), 1, 1),
        (4, 6, (1, 1), (5, 7), (1, 1), 0, 1),
        *((4, 6, (1, 1), (5, 7), (1, 1), tuple(pads), 1) for pads in np.eye(4, dtype=int).tolist()),
        (3, 9, (7, 5), (23, 21), (2, 2), 3, 1),
        (6, 12, (3, 2), (8, 8), (3, 1), 2, 3),
        (8, 8, (3, 3), (6, 11), (1, 2), 1, 8),
        (130, 5, (3, 3), (4, 4), (1, 1), 1, 1),
        # Few channels in a group: outputs that are one piece, rows of them, parts of a row.
        (7, 7, (7, 7), (7, 6), (1, 1), 3, 7),
        (6, 12, (5, 3), (60, 90), (1, 1), 2, 6),
        (6, 2, (5, 3), (9, 9), (1, 3), (0, 4, 2, 1), 2),
        (2, 2, (3, 4), (5, 19_000), (1, 2), (1, 3, 0, 2), 2),
    ):
        w = rng.standard_normal((out, channels // groups, *kernel)).astype(dtype.numpy)
        x = rng.standard_normal((2, channels, *size)).astype(compute)
        block_map, pool = stored(w, (16, 29), planes=bool(seed % 2))
        y = conv.conv2d(
            block_map, pool, x, kernel=kernel, stride=stride, padding=pad, groups=groups
        )
        assert y.dtype == compute
        pads = pad if isinstance(pad, tuple) else (pad,) * 4
        assert_close(y, x, w, stride, pads, (1, 1), groups)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_convolves(kernel: str) -> None:
    code = (
        "import runpy\n"
        "from pydedup.types import DType\n"
        f"check = runpy.run_path({__file__!r})['check_layers']\n"
        "for i, dtype in enumerate((DType.F32, DType.F64, DType.BF16, DType.F16, DType.F32)):\n"
        "    check(dtype, i)\n"
        "print('all hold')\n"
    )
    assert run_with_kernel(kernel, code) == "all hold\n"


def check_sizes() -> None:
    """Numbers of any size, in layers large enough for products that AMX cuts them for.

    An image is the same whatever is in the others, and all are for any number of threads.
    """
    rng = np.random.default_rng(3)
    for channels, out, kernel, size, block, groups in (
        (7, 64, 3, (9, 40), (32, 32), 1),
        (24, 96, 3, (12, 13), (64, 64), 1),
        (96, 64, 1, (17, 20), (32, 16), 2),
        (3, 40, 3, (30, 9), (40, 27), 1),
    ):
        w = rng.standard_normal((out, channels // groups, kernel, kernel)).astype(np.float32)
        w *= np.ldexp(1.0, rng.integers(-40, -8, (out, 1, 1, 1))).astype(np.float32)
        x = rng.standard_normal((4, channels, *size)).astype(np.float32)
        x *= np.ldexp(1.0, rng.integers(-40, 40, (4, 1, size[0], 1))).astype(np.float32)
        w[: block[0], 0] *= np.float32(2.0**-100)
        x[0, :, 3] *= np.float32(2.0**-100)
        x[2, :, 4] = 0
        x[2, 1, 5, 4] = 2.0**127
        how = {"kernel": (kernel, kernel), "padding": kernel // 2, "groups": groups}
        block_map, pool = stored(w, block)
        y = conv.conv2d(block_map, pool, x, threads=1, **how)
        assert_close(y, x, w, (1, 1), (kernel // 2,) * 4, (1, 1), groups)
        for threads in (2, 3):
            np.testing.assert_array_equal(
                y, conv.conv2d(block_map, pool, x, threads=threads, **how)
            )
        x[1, 0, 2, 7] = np.nan
        dirty = conv.conv2d(block_map, pool, x, threads=2, **how)
        np.testing.assert_array_equal(y[[0, 2, 3]], dirty[[0, 2, 3]])
        assert np.isnan(dirty[1]).any(axis=0).sum() == kernel * kernel


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_takes_numbers_of_any_size(kernel: str) -> None:
    assert_holds(kernel, check_sizes)


def check_halves() -> None:
    """Images of bf16 numbers by weights that are, which AMX takes as they are, and others."""
    rng = np.random.default_rng(4)
    half = ml_dtypes.bfloat16
    for channels, out, kernel, size, block, groups in (
        (7, 64, 3, (9, 40), (32, 32), 1),
        (24, 70, 3, (12, 13), (64, 64), 1),
        (300, 33, 1, (7, 9), (64, 64), 1),
        (96, 40, 2, (6, 7), (32, 16), 2),
        (3, 40, 3, (30, 9), (40, 27), 1),
        (5, 9, 3, (8, 8), (64, 64), 1),
    ):
        w = rng.standard_normal((out, channels // groups, kernel, kernel)).astype(half)
        x = rng.standard_normal((3, channels, *size)).astype(half).astype(np.float32)
        how: dict[str, Any] = {"kernel": (kernel, kernel), "padding": kernel // 2, "groups": groups}
        bound = ((1, 1), (kernel // 2,) * 4, (1, 1), groups)
        for planes in (False, True):
            block_map, pool = stored(w, block, planes=planes)
            y = conv.conv2d(block_map, pool, x, threads=1, **how)
            assert_close(y, x, w, *bound)
            for threads in (2, 3):
                again = conv.conv2d(block_map, pool, x, threads=threads, **how)
                np.testing.assert_array_equal(y, again)
        dirty = x.copy()
        dirty[1, 0, 2, 3] = np.inf
        got = conv.conv2d(block_map, pool, dirty, **how)
        np.testing.assert_array_equal(y[[0, 2]], got[[0, 2]])
        assert np.isinf(got[1]).any(axis=0).sum() == kernel * kernel
        for other in (1.001, 2.0**-130):  # no bf16 number; one that is subnormal
            x[2, 0, 0, 0] = other
            assert_close(conv.conv2d(block_map, pool, x, **how), x, w, *bound)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_takes_bf16_numbers(kernel: str) -> None:
    assert_holds(kernel, check_halves)


def check_halves_in_and_out() -> None:
    """Images that come in bf16, and results in it: those in f32, rounded."""
    rng = np.random.default_rng(5)
    half = DType.BF16.numpy
    for channels, out, kernel, size, stride, block, groups in (
        (24, 70, 3, (12, 13), 1, (64, 64), 1),
        (300, 33, 1, (7, 9), 1, (64, 64), 1),
        (96, 150, 3, (17, 60), 1, (32, 100), 1),  # sums rest between strips
        (7, 64, 3, (9, 40), 2, (32, 31), 1),
        (40, 40, 7, (20, 23), 1, (16, 49), 40),
        (40, 80, 7, (20, 41), 2, (16, 20), 40),  # sums rest between blocks
    ):
        how: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "groups": groups}
        how |= {"kernel": kernel, "activation": "silu", "bias": rng.standard_normal(out)}
        x = rng.standard_normal((3, channels, *size)).astype(half)
        x[1, 0, 2, 3] = np.nan
        for dtype in (half, np.float32):
            w = rng.standard_normal((out, channels // groups, kernel, kernel)).astype(dtype)
            pages = MemoryPages()
            block_map = pages.add(w, block)
            largest = max(map(len, pages.payloads.values()))
            want = conv.conv2d(block_map, pages.pool(), x.astype(np.float32), **how)
            assert want.dtype == np.float32
            for memory in (4 * largest, 1 << 30):
                pool = pages.pool(memory)
                for threads in (1, 3):
                    got = conv.conv2d(block_map, pool, x, threads=threads, **how)
                    np.testing.assert_array_equal(got, want)
                    got = conv.conv2d(block_map, pool, x, threads=threads, dtype=DType.BF16, **how)
                    assert got.dtype == half
                    rounded = want.astype(half).astype(np.float32)  # numpy knows its NaN
                    np.testing.assert_array_equal(got.astype(np.float32), rounded)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_takes_and_gives_bf16(kernel: str) -> None:
    assert_holds(kernel, check_halves_in_and_out)


def check_wide_blocks() -> None:
    """A block with more columns than a task gathers at once; how many depends on the threads."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((40, 40, 7, 7)).astype(np.float32)
    x = rng.standard_normal((2, 40, 12, 13)).astype(np.float32)
    block_map, pool = stored(w, (64, 1960))
    y = conv.conv2d(block_map, pool, x, kernel=7, padding=3, threads=1)
    for threads in (2, 3):
        other = conv.conv2d(block_map, pool, x, kernel=7, padding=3, threads=threads)
        np.testing.assert_array_equal(y, other)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_wide_blocks_give_the_same_bits_for_any_number_of_threads(kernel: str) -> None:
    assert_holds(kernel, check_wide_blocks)


few = st.integers(1, 3)


@settings(max_examples=150)
@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 4),
    group_in=st.integers(1, 6),
    group_out=st.integers(1, 12),
    size=st.tuples(st.integers(1, 12), st.integers(1, 50)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(few, few),
    dilation=st.tuples(few, few),
    pads=st.tuples(*[st.integers(0, 6)] * 4),
    block=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    dtype=st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.I8]),
    seed=st.integers(0, 1 << 30),
)
def test_any_layer(
    batch: int,
    groups: int,
    group_in: int,
    group_out: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: Pads,
    block: tuple[int, int],
    dtype: DType,
    seed: int,
) -> None:
    assume((kernel[0] - 1) * dilation[0] < size[0] + pads[0] + pads[2])
    assume((kernel[1] - 1) * dilation[1] < size[1] + pads[1] + pads[3])
    rng = np.random.default_rng(seed)
    w = (4 * rng.standard_normal((groups * group_out, group_in, *kernel))).astype(dtype.numpy)
    x = rng.standard_normal((batch, groups * group_in, *size)).astype(matmul.compute_dtype(dtype))
    pages = MemoryPages()
    block_map = pages.add(w, block, per_page=3, scattered=bool(seed % 2), planes=bool(seed % 3))
    # A window of one page: blocks are fed a few at a time, rows of blocks cut anywhere.
    pool = pages.pool(4 * max(map(len, pages.payloads.values())))
    y = conv.conv2d(
        block_map,
        pool,
        x,
        kernel=kernel,
        stride=stride,
        padding=pads,
        dilation=dilation,
        groups=groups,
        threads=seed % 4,
    )
    assert_close(y, x, w, stride, pads, dilation, groups)


@settings(max_examples=60)
@given(
    padding=st.sampled_from(["same", "valid", 0, 1, (2, 1), [0, 3]]),
    kernel=st.tuples(few, st.integers(1, 4)),
    dilation=few,
    activation=st.sampled_from([None, *matmul.ACTIVATIONS]),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_as_torch_does(
    padding: Any,
    kernel: tuple[int, int],
    dilation: int,
    activation: str | None,
    bias: bool,
    seed: int,
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((6, 4, *kernel))
    b = rng.standard_normal(6) if bias else None
    x = rng.standard_normal((2, 4, 9, 11))
    block_map, pool = stored(w, (4, 5))
    y = conv.conv2d(
        block_map,
        pool,
        x,
        kernel=kernel,
        bias=b,
        padding=padding,
        dilation=dilation,
        activation=activation,
    )
    t = torch.from_numpy
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")  # it copies
        want = torch.nn.functional.conv2d(
            t(x), t(w), None if b is None else t(b), padding=padding, dilation=dilation
        )
    if activation == "gelu_tanh":
        want = torch.nn.functional.gelu(want, approximate="tanh")
    elif activation is not None:
        want = getattr(torch.nn.functional, activation)(want)
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-11, atol=1e-11)
    alone = conv.conv2d(
        block_map,
        pool,
        x[1],
        kernel=kernel,
        bias=b,
        padding=padding,
        dilation=dilation,
        activation=activation,
    )
    assert np.array_equal(alone, y[1])


# Threads share positions, or, where an image has few of them, output channels.
@pytest.mark.parametrize(("out", "size"), [(150, (3, 40, 30, 30)), (300, (1, 40, 6, 7))])
def test_result_depends_on_neither_threads_nor_memory(out: int, size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((out, 40, 3, 3)).astype(np.float32)
    x = rng.standard_normal(size).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (32, 50), per_page=2)
    options: dict[str, Any] = {"kernel": 3, "padding": 1, "activation": "silu"}
    want = conv.conv2d(block_map, pages.pool(), x, threads=1, **options)
    largest = max(map(len, pages.payloads.values()))
    for threads in (1, 2, 3, 7):
        for memory in (4 * largest, 20 * largest, 1 << 30):
            pool = pages.pool(memory)
            assert np.array_equal(want, conv.conv2d(block_map, pool, x, threads=threads, **options))


def test_images_are_never_unfolded() -> None:
    # Unfolded, this image would take 49 times its 4 MiB.
    tracker = (
        "import re, numpy as np\n"
        "from pydedup import conv\n"
        "from pydedup.testing.memory_pages import MemoryPages\n"
        "pages = MemoryPages()\n"
        "block_map = pages.add(np.ones((1, 16, 7, 7), np.float32))\n"
        "pool, x = pages.pool(), np.ones((1, 16, 256, 256), np.float32)\n"
        "conv.conv2d(block_map, pool, x[:, :, :16], kernel=7, padding=3)\n"
        # VmHWM: ru_maxrss begins with what pytest had when it forked
        "hwm = lambda: re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())\n"
        "peak = lambda: int(hwm()[1])\n"
        "before = peak()\n"
        "conv.conv2d(block_map, pool, x, kernel=7, padding=3)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", tracker], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 * 1024  # KiB


def test_nan_and_infinity_stay_where_they_are() -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((3, 2, 3, 3)).astype(np.float32)
    x = rng.standard_normal((2, 2, 8, 40)).astype(np.float32)
    x[1, 0, 4, 20] = np.nan
    x[0, 1, 0, 0] = np.inf
    block_map, pool = stored(w, (2, 5))
    y = conv.conv2d(block_map, pool, x, kernel=3)
    assert np.array_equal(np.isnan(y[1]).any(axis=0).nonzero()[0], [2, 2, 2, 3, 3, 3, 4, 4, 4])
    assert np.isnan(y[1, :, 2:5, 18:21]).all()
    assert np.isinf(y[0, :, 0, 0]).all()
    assert np.isfinite(y[0, :, 1:, :]).all()
    w[1, 0, 1, 1] = np.nan
    block_map, pool = stored(w, (2, 5))
    y = conv.conv2d(block_map, pool, np.zeros_like(x), kernel=3, activation="relu")
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


def test_x_of_any_layout_and_dtype() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((4, 3, 2, 2)).astype(np.float32)
    block_map, pool = stored(w, (4, 4))
    x = rng.standard_normal((2, 3, 6, 7)).astype(np.float32)
    want = conv.conv2d(block_map, pool, x, kernel=2)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    odd = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    swapped, locked = x.astype(">f4"), x.copy()
    locked.flags.writeable = False
    for other in (last, odd, swapped, locked, x.tolist(), x.astype(np.float64)):
        assert np.array_equal(conv.conv2d(block_map, pool, other, kernel=2), want)
    halves = x.astype(ml_dtypes.bfloat16)
    got = conv.conv2d(block_map, pool, halves, kernel=2)
    assert np.array_equal(got, conv.conv2d(block_map, pool, halves.astype(np.float32), kernel=2))
