# SPDX-License-Identifier: Apache-2.0
"""One stored tensor: what it tells, gives back, and does when its pages have moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.blocks import BlockMap
from pydedup.errors import ArgumentError, PageNotFoundError
from pydedup.serving.tensor import StoredTensor
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType, TensorInfo

RNG = np.random.default_rng(12)


def stored(array: NDArray[Any]) -> StoredTensor:
    pages = MemoryPages()
    block_map = pages.add(array, (8, 8))
    info = TensorInfo("t", DType.of(array.dtype), array.shape, (8, 8))
    return StoredTensor(info, lambda: block_map, pages.pool(), lambda: None)


def no_map() -> BlockMap:
    raise PageNotFoundError.of([1])


def test_a_tensor_tells_what_it_is() -> None:
    tensor = stored(np.ones((3, 4, 5), ml_dtypes.bfloat16))
    assert (tensor.name, tensor.shape, tensor.dtype) == ("t", (3, 4, 5), DType.BF16)
    assert repr(tensor) == "<StoredTensor 't' bf16 (3, 4, 5)>"


@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 0), (5, 6), (4, 3, 2, 2)])
def test_a_tensor_comes_back_bit_for_bit(shape: tuple[int, ...]) -> None:
    for dtype in DType:
        array = RNG.integers(0, 2, shape).astype(dtype.numpy)
        back = stored(array).numpy()
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert back.tobytes() == array.tobytes()


def test_numpy_takes_a_tensor_for_its_values() -> None:
    """Without a word, it took one for an array of one object."""
    array = RNG.standard_normal((5, 6)).astype(np.float16)
    tensor: Any = stored(array)
    assert np.array_equal(np.asarray(tensor), array)
    assert np.asarray(tensor, np.float32).dtype == np.float32
    assert np.array_equal(tensor @ np.eye(6), array)
    with pytest.raises(ArgumentError, match="always a copy"):
        np.array(tensor, copy=False)
    x = np.eye(6, dtype=np.float32)
    assert np.array_equal(stored(x).matmul(tensor), array)
    gone: Any = StoredTensor(tensor._info, no_map, MemoryPages().pool(), lambda: None)
    with pytest.raises(PageNotFoundError):  # and no error of what was given
        stored(x).matmul(gone)


def test_rows_without_columns_may_be_any_number() -> None:
    """A lookup made room for a number for each 4,096 of them."""
    tensor = stored(np.empty((2**50, 0), np.float32))
    assert tensor.take([0, 2**50 - 1]).shape == (2, 0)
    assert tensor.bag([2**50 - 1], [0]).shape == (1, 0)


def test_columns_are_those_that_there_are() -> None:
    """Others were told as damage of the store, or were fewer than asked for."""
    w = RNG.standard_normal((6, 20)).astype(np.float32)
    tensor = stored(w)
    assert np.array_equal(tensor.columns(3, 17), w[:, 3:17])
    assert tensor.columns(20, 20).shape == (6, 0)
    for first, stop in ((-5, 3), (5, 3), (15, 21)):
        with pytest.raises(ArgumentError, match=f"'t' has 20 columns; {first} to {stop} are none"):
            tensor.columns(first, stop)


def test_tensors_of_more_axes_are_matrices_by_their_first() -> None:
    w = RNG.standard_normal((6, 2, 3)).astype(np.float32)
    tensor = stored(w)
    x = RNG.standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_allclose(
        tensor.matmul(x, transpose=True), x @ w.reshape(6, 6), rtol=1e-4, atol=1e-5
    )
    assert np.array_equal(tensor.take([[5, 0]]), w[[[5, 0]]])
    np.testing.assert_allclose(tensor.bag([[5, 0]], mode="sum"), w[[5]] + w[[0]], rtol=1e-6)
    uses: list[Callable[[StoredTensor], Any]] = [lambda t: t.take([0]), lambda t: t.bag([[0]])]
    for use in uses:
        with pytest.raises(ArgumentError, match=r"needs a tensor of 2 axes or more; 't' has"):
            use(stored(np.ones(4, np.float32)))


def test_a_missed_page_makes_the_map_be_read_again_once() -> None:
    w = RNG.standard_normal((6, 4)).astype(np.float32)
    pages = MemoryPages()
    old, new = pages.add(w, (2, 2)), pages.add(w, (3, 4))
    del pages.payloads[1]  # what a vacuum does to pages that it emptied
    info = TensorInfo("t", DType.F32, w.shape, (2, 2))
    current: list[BlockMap] = [old]
    refreshed: list[int] = []

    def refresh_to(block_map: BlockMap) -> Callable[[], None]:
        def refresh() -> None:
            refreshed.append(1)
            current[0] = block_map

        return refresh

    x = np.ones((1, 4), np.float32)
    uses: list[Callable[[StoredTensor], Any]] = [
        lambda t: t.matmul(x),
        lambda t: t.take([1]),
        lambda t: t.bag([[1]]),
        lambda t: t.numpy(),
    ]
    for use in uses:
        current[0] = old
        refreshed.clear()
        tensor = StoredTensor(info, lambda: current[0], pages.pool(), refresh_to(new))
        assert np.size(use(tensor)) > 0
        assert refreshed == [1]
        current[0] = old
        lost = StoredTensor(info, lambda: current[0], pages.pool(), refresh_to(old))
        with pytest.raises(PageNotFoundError):
            use(lost)
        assert refreshed == [1, 1]


def test_a_product_in_another_dtype() -> None:
    x = RNG.standard_normal((3, 20)).astype(np.float32)
    tensor = stored(RNG.standard_normal((9, 20)).astype(np.float32))
    whole = tensor.matmul(x)
    for same in ("f32", np.float32, DType.F32):
        assert tensor.matmul(x, dtype=same).tobytes() == whole.tobytes()
    for half in ("bf16", ml_dtypes.bfloat16, DType.BF16):
        y = tensor.matmul(x, dtype=half)
        assert y.dtype == ml_dtypes.bfloat16
        assert y.tobytes() == whole.astype(ml_dtypes.bfloat16).tobytes()
    for other in ("f16", np.float64):
        with pytest.raises(ArgumentError, match="weights of f32 has results of float32 or bf16"):
            tensor.matmul(x, dtype=other)
    with pytest.raises(ArgumentError, match="no dtype of floats 'i8'"):
        tensor.matmul(x, dtype="i8")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="weights of f64 has results of float64, not of bf16"):
        stored(np.ones((4, 20))).matmul(x, dtype="bf16")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_products_are_the_same_from_the_pool_and_past_it(scattered: bool, transpose: bool) -> None:
    w = RNG.standard_normal((64, 96)).astype(np.float32)
    x = RNG.standard_normal((3, 64 if transpose else 96)).astype(np.float32)
    pages = MemoryPages()
    block_map = pages.add(w, (8, 8), per_page=4, scattered=scattered)
    info = TensorInfo("t", DType.F32, w.shape, (8, 8))
    page_bytes = max(map(len, pages.payloads.values()))
    results = []
    # All pages stay in the one pool; in the other those of a window push out others.
    for budget in (1 << 30, 8 * page_bytes):
        pool = pages.pool(budget)
        tensor = StoredTensor(info, lambda: block_map, pool, lambda: None)
        results += [tensor.matmul(x, transpose=transpose) for _ in range(3)]
        if budget == 1 << 30:  # nothing is fetched twice
            fetched = [number for fetch in pages.fetches for number in fetch]
            assert sorted(fetched) == sorted(pages.payloads)
        assert pool.stats()["pinned_bytes"] == 0
    np.testing.assert_allclose(results[0], x @ (w if transpose else w.T), rtol=1e-4, atol=1e-4)
    for result in results[1:]:
        assert np.array_equal(result, results[0])
