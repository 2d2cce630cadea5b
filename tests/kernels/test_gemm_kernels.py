# SPDX-License-Identifier: Apache-2.0
"""Products with stored matrices against numpy in float64, with every kernel.

Sums are compared within the bound that holds for any order of adding (Higham 2002, section 3.1),
so a kernel may add as it likes, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup import lookup, matmul
from pydedup.errors import ArgumentError, BudgetError, CorruptStoreError, PageNotFoundError
from pydedup.testing.kernels import RUNNABLE, run_with_kernel
from pydedup.testing.memory_pages import MemoryPages, random_weights
from pydedup.types import DType

DTYPES = list(DType)


def assert_close(got: NDArray[Any], x: NDArray[Any], w: NDArray[Any]) -> None:
    """Whether ``got`` is ``x @ w.T`` up to what rounding may do."""
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    exact = wide_x @ wide_w.T
    magnitude = np.abs(wide_x) @ np.abs(wide_w.T)
    eps, tiny = np.finfo(got.dtype).eps, np.finfo(got.dtype).tiny
    # The reference is itself a float64 sum: it may be off by as much again.
    allowed = (w.shape[1] + 2) * (eps + np.finfo(np.float64).eps) * magnitude + tiny
    assert got.shape == exact.shape
    worst = np.max(np.abs(got - exact) / allowed, initial=0.0)
    assert worst <= 1.0, f"{worst:.2f} times the bound"


def check_products(dtype: DType, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (70, 135), dtype)
    compute = matmul.compute_dtype(dtype)
    for planes in (False, True):
        pages = MemoryPages()
        block_map = pages.add(w, (16, 32), planes=planes)
        x = rng.standard_normal((m, 135)).astype(compute)
        assert_close(matmul.matmul(block_map, pages.pool(), x), x, w)
        x = rng.standard_normal((m, 70)).astype(compute)
        assert_close(matmul.matmul(block_map, pages.pool(), x, transpose=True), x, w.T)


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_multiplies_every_dtype(kernel: str) -> None:
    code = (
        "import runpy\n"
        f"check = runpy.run_path({__file__!r})\n"
        "for dtype in check['DTYPES']:\n"
        "    for m in (1, 2, 3, 4, 6, 20, 33):\n"
        "        check['check_products'](dtype, m, m)\n"
        "print('all hold')\n"
    )
    assert run_with_kernel(kernel, code) == "all hold\n"


sizes = st.integers(1, 90)


@settings(max_examples=60)
@given(
    m=st.integers(0, 40),
    rows=sizes,
    cols=sizes,
    block=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    dtype=st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.F16, DType.I8, DType.F8_E4M3]),
    planes=st.booleans(),
    transpose=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape(
    m: int,
    rows: int,
    cols: int,
    block: tuple[int, int],
    dtype: DType,
    planes: bool,
    transpose: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    w = random_weights(rng, (rows, cols), dtype)
    pages = MemoryPages()
    block_map = pages.add(w, block, planes=planes, per_page=3, scattered=bool(seed % 2))
    x = rng.standard_normal((m, rows if transpose else cols))
    x = x.astype(matmul.compute_dtype(dtype))
    y = matmul.matmul(block_map, pages.pool(), x, transpose=transpose)
    assert_close(y, x, w.T if transpose else w)


def test_result_depends_on_neither_threads_nor_memory() -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((300, 700)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (64, 64), per_page=2, scattered=True)
    small = 3 * max(map(len, pages.payloads.values()))
    for m in (1, 30):
        for transpose in (False, True):
            x = rng.standard_normal((m, 300 if transpose else 700)).astype(np.float32)
            want = matmul.matmul(block_map, pages.pool(), x, transpose=transpose, threads=1)
            for threads, memory in ((2, 1 << 30), (1, small), (3, small)):
                pool = pages.pool(memory)
                got = matmul.matmul(block_map, pool, x, transpose=transpose, threads=threads)
                assert np.array_equal(got, want)
                assert pool.stats()["bytes"] <= memory


def test_x_of_any_rank_and_dtype() -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((7, 11)).astype(np.float32)
    pages = MemoryPages()
    block_map, pool = pages.add(w, (4, 4)), pages.pool()
    x = rng.standard_normal((2, 3, 5, 11)).astype(np.float32)
    whole = matmul.matmul(block_map, pool, x)
    assert whole.shape == (2, 3, 5, 7)
    assert np.array_equal(whole.reshape(30, 7), matmul.matmul(block_map, pool, x.reshape(30, 11)))
    one = matmul.matmul(block_map, pool, x[0, 0, 0])
    assert one.shape == (7,)
    assert_close(one[None], x[0, 0, 0][None], w)
    part = matmul.matmul(block_map, pool, x[0])
    assert_close(part.reshape(15, 7), x[0].reshape(15, 11), w)
    for given_as in (
        x[0].astype(np.float64),
        x[0][..., ::-1][..., ::-1],  # not contiguous
        np.asfortranarray(x[0]),
        x[0].tolist(),
    ):
        assert np.array_equal(matmul.matmul(block_map, pool, given_as), part)
    half = x[0].astype(ml_dtypes.bfloat16)
    assert np.array_equal(
        matmul.matmul(block_map, pool, half),
        matmul.matmul(block_map, pool, half.astype(np.float32)),
    )
    assert matmul.matmul(block_map, pool, np.ones((2, 11), np.int64)).dtype == np.float32


def test_bias_and_activations_match_torch() -> None:
    torch = pytest.importorskip("torch")
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    assert set(functions) == set(matmul.ACTIVATIONS)
    rng = np.random.default_rng(8)
    for dtype, tolerance in ((np.float32, 4e-6), (np.float64, 1e-14)):
        w = rng.standard_normal((33, 40)).astype(dtype)
        bias = rng.standard_normal(33).astype(dtype)
        pages = MemoryPages()
        block_map, pool = pages.add(w, (8, 16)), pages.pool()
        for m in (1, 9):
            x = rng.standard_normal((m, 40)).astype(dtype)
            linear = torch.from_numpy(x) @ torch.from_numpy(w).T + torch.from_numpy(bias)
            for name, function in functions.items():
                y = matmul.matmul(block_map, pool, x, bias=bias, activation=name)
                np.testing.assert_allclose(
                    y, function(linear).numpy(), rtol=tolerance, atol=8 * tolerance
                )
        extremes = np.array([0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 88.0, -88.0], dtype)
        for name, function in functions.items():
            got = matmul.activate(extremes, name)
            want = function(torch.from_numpy(extremes)).numpy()
            if name == "gelu":
                # torch's vector erf makes NaN of infinity, where the function tends to infinity.
                assert got[4] == np.inf
                got[4] = want[4]
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("m", [1, 3, 8, 40])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_nan_and_infinity_stay_in_their_rows(m: int, dtype: DType) -> None:
    rng = np.random.default_rng(9)
    w = rng.standard_normal((20, 37)).astype(dtype.numpy)
    w[4, 36], w[11, 0] = np.nan, np.inf
    x = np.abs(rng.standard_normal((m, 37))).astype(np.float32)
    x[0, 5] = -np.inf
    x[m // 2 :, 0] = 1.5  # a bf16 number, beside others that are none
    pages = MemoryPages()
    y = matmul.matmul(pages.add(w, (8, 8)), pages.pool(), x)
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.array_equal(np.isposinf(y), np.isposinf(want))
    assert np.array_equal(np.isneginf(y), np.isneginf(want))


@pytest.mark.parametrize("scale", [1e-20, 1e-29, 1e30])
def test_inputs_of_any_size_with_bf16_weights(scale: float) -> None:
    rng = np.random.default_rng(9)
    w = rng.standard_normal((70, 135)).astype(DType.BF16.numpy)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 32))
    x = (rng.standard_normal((33, 135)) * scale).astype(np.float32)
    assert_close(matmul.matmul(block_map, pages.pool(), x), x, w)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32, DType.F64, DType.I8])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("special", ["none", "subnormal", "not finite"])
def test_inputs_in_bf16_count_as_the_same_numbers_in_f32(
    dtype: DType, transpose: bool, special: str
) -> None:
    """Bit for bit, also where a kernel that multiplies bf16 numbers cannot take them."""
    rng = np.random.default_rng(5)
    rows, cols = 70, 135
    w = (rng.standard_normal((rows, cols)) * 20).astype(dtype.numpy)
    pages = MemoryPages()
    block_map = pages.add(w, (16, 32))
    for m in (1, 2, 5, 33, 100):
        x = rng.standard_normal((m, rows if transpose else cols)).astype(DType.BF16.numpy)
        if special == "subnormal":
            x[-1, -1] = 2.0**-130
        elif special == "not finite":
            x[-1, -1], x[0, 0] = np.inf, np.nan
        want = matmul.matmul(
            block_map, pages.pool(), x.astype(np.float32), transpose=transpose, threads=2
        )
        for same in (x, np.asfortranarray(x), x[None]):
            y = matmul.matmul(block_map, pages.pool(), same, transpose=transpose, threads=2)
            assert y.dtype == want.dtype
            assert y.shape == (*same.shape[:-1], want.shape[-1])
            assert y.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32, DType.I8])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("budget", [None, 2 << 20])
def test_results_in_bf16_are_rounded(dtype: DType, transpose: bool, budget: int | None) -> None:
    """Also where pages come window by window, and where an input in bf16 has to be widened."""
    rng = np.random.default_rng(6)
    rows, cols = (70, 135) if budget is None else (700, 1350)
    pages = MemoryPages()
    block_map = pages.add((rng.standard_normal((rows, cols)) * 20).astype(dtype.numpy), (16, 32))
    pool = pages.pool() if budget is None else pages.pool(budget)
    bias = rng.standard_normal(cols if transpose else rows).astype(np.float32)
    for m in (1, 2, 33, 100):
        x = rng.standard_normal((m, rows if transpose else cols)).astype(np.float32)
        subnormal = x.astype(DType.BF16.numpy)
        subnormal[-1, -1] = 2.0**-130
        for same in (x, x.astype(DType.BF16.numpy), subnormal):
            for activation in (None, "relu"):
                want = matmul.matmul(
                    block_map, pool, same, bias=bias, activation=activation, transpose=transpose
                )
                got = matmul.matmul(
                    block_map,
                    pool,
                    same,
                    bias=bias,
                    activation=activation,
                    transpose=transpose,
                    dtype=DType.BF16,
                )
                assert got.dtype == DType.BF16.numpy
                assert got.tobytes() == want.astype(DType.BF16.numpy).tobytes()


@pytest.mark.parametrize(
    ("rows", "cols", "transpose"), [(0, 4, False), (4, 0, False), (0, 4, True), (4, 0, True)]
)
def test_empty_matrices(rows: int, cols: int, transpose: bool) -> None:
    pages = MemoryPages()
    block_map = pages.add(np.empty((rows, cols), np.float32), (2, 2))
    inner, outer = (rows, cols) if transpose else (cols, rows)
    bias = np.arange(outer, dtype=np.float32)
    y = matmul.matmul(block_map, pages.pool(), np.ones((3, inner)), bias=bias, transpose=transpose)
    assert np.array_equal(y, np.tile(bias, (3, 1)))
    half = matmul.matmul(
        block_map, pages.pool(), np.ones((3, inner)), transpose=transpose, dtype=DType.BF16
    )
    assert (half.dtype, half.shape) == (DType.BF16.numpy, (3, outer))
    assert not half.any()
    assert matmul.read(block_map, pages.pool()).shape == (rows, cols)


def test_wrong_arguments_are_refused() -> None:
    pages = MemoryPages()
    block_map = pages.add(np.ones((3, 4), np.float32))
    pool = pages.pool()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("last axis must be 4", {"x": np.ones((2, 3))}),
        ("last axis must be 3", {"x": np.ones((2, 4)), "transpose": True}),
        ("last axis", {"x": np.float32(1.0)}),
        ("real numbers", {"x": np.ones((2, 4), np.complex64)}),
        ("real numbers", {"x": np.array([["a"] * 4])}),
        (r"bias has shape \(4,\)", {"x": np.ones((2, 4)), "bias": np.ones(4)}),
        ("unknown activation 'swish'; choose", {"x": np.ones((2, 4)), "activation": "swish"}),
    ]
    for message, arguments in cases:
        with pytest.raises(ArgumentError, match=message):
            matmul.matmul(block_map, pool, **arguments)
    with pytest.raises(ArgumentError, match="unknown activation"):
        matmul.activate(np.ones(3, np.float32), "swish")
    with pytest.raises(ArgumentError, match="float32 or float64"):
        matmul.activate(np.ones(3, np.int32), "relu")


def test_what_is_stored_must_be_what_the_map_says() -> None:
    pages = MemoryPages()
    rng = np.random.default_rng(1)
    block_map = pages.add(rng.standard_normal((8, 8)).astype(np.float32), (4, 4))
    other = pages.add(rng.standard_normal((6, 8)).astype(np.float32), (3, 4))
    swapped = type(block_map)(block_map.grid, block_map.dtype, other.page_ids, other.slots)
    uses: list[Callable[[], object]] = [
        lambda: matmul.matmul(swapped, pages.pool(), np.ones((1, 8))),
        lambda: lookup.take(swapped, pages.pool(), [0]),
        lambda: lookup.bag(swapped, pages.pool(), [[0]]),
        lambda: matmul.read(swapped, pages.pool()),
    ]
    for use in uses:
        with pytest.raises(CorruptStoreError):
            use()
    beyond = type(block_map)(
        block_map.grid, block_map.dtype, block_map.page_ids, block_map.slots + np.uint32(100)
    )
    with pytest.raises(CorruptStoreError):
        matmul.matmul(beyond, pages.pool(), np.ones((1, 8)))
    with pytest.raises(BudgetError, match="more memory"):
        matmul.matmul(block_map, pages.pool(10), np.ones((1, 8)))
    del pages.payloads[1]
    with pytest.raises(PageNotFoundError, match="1 page does not exist: 1;"):
        matmul.matmul(block_map, pages.pool(), np.ones((1, 8)))


def test_what_is_beyond_memory_is_told() -> None:
    pages = MemoryPages()
    block_map = pages.add(np.ones((1 << 20, 1), np.float32))
    wide = pages.add(np.ones((1, 1 << 20), np.float32))
    pool = pages.pool()
    x = np.ones((1 << 24, 1), np.float32)
    uses: list[Callable[[], object]] = [
        lambda: matmul.matmul(block_map, pool, x),
        lambda: matmul.matmul(wide, pool, x, transpose=True),
        lambda: lookup.take(wide, pool, np.zeros(1 << 24, np.int64)),
        lambda: lookup.bag(wide, pool, np.zeros((1 << 24, 1), np.int64)),
        lambda: matmul.matmul(block_map, pool, np.broadcast_to(np.float32(1), (1 << 44, 1))),
        lambda: matmul.matmul(block_map, pool, np.broadcast_to(np.int8(1), (1 << 44, 1))),
        lambda: lookup.take(wide, pool, np.broadcast_to(np.int64(0), (1 << 44,))),
    ]
    for use in uses:
        with pytest.raises(BudgetError, match="no memory for"):
            use()
