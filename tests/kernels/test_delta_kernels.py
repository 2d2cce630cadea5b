# SPDX-License-Identifier: Apache-2.0
"""Computing on matrices some of whose blocks are deltas: the same bits as on the raw matrix.

Whatever holds of raw blocks (accuracy, dtypes, kernels) is tested next door; here, that a delta is
read with its base by everything that reads blocks, within any memory budget, and that a base which
is missing or wrong is an error and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup import codec, conv, hashing, lookup, matmul
from pydedup.blocks import NO_PAGE, BlockMap, MatrixView
from pydedup.errors import BudgetError, CorruptStoreError
from pydedup.pool import PagePool
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType

Array = NDArray[Any]
SHAPE = (70, 135)  # edge blocks on both sides
BLOCK = (16, 32)


def near(base: Array, dtype: DType, seed: int = 1) -> Array:
    """A matrix that differs from another in a fifth of its elements, by little."""
    rng = np.random.default_rng(seed)
    changed = rng.random(base.shape) < 0.2
    if dtype.is_float:
        values = base.astype(np.float64)
        step = 2.0**-2 if dtype.itemsize == 1 else 2.0**-6
        return np.where(changed, values * (1 + step), values).astype(dtype.numpy)
    return np.where(changed, base ^ np.array(1, base.dtype), base).astype(dtype.numpy)


def first(dtype: DType, shape: tuple[int, int] = SHAPE) -> Array:
    rng = np.random.default_rng(0)
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    return rng.integers(0, 100, shape).astype(dtype.numpy)


class Pair:
    """A matrix stored raw and as deltas; the deltas on pages of their own."""

    def __init__(
        self,
        dtype: DType = DType.F32,
        base_dtype: DType | None = None,
        *,
        every: int = 1,
        planes: bool = False,
        shape: tuple[int, int] = SHAPE,
        scattered: bool = False,
    ) -> None:
        self.pages = MemoryPages()
        self.base = first(base_dtype or dtype, shape)
        self.w = near(self.base, dtype)
        self.base_map = self.pages.add(self.base, BLOCK, planes=planes, scattered=scattered)
        self.raw = self.pages.add(self.w, BLOCK)
        self.delta = self.pages.add_deltas(
            self.w, self.base, self.base_map, every=every, per_page=5, scattered=scattered
        )
        assert self.delta.bases is not None
        n_deltas = (self.delta.bases[0] != NO_PAGE).sum()
        assert n_deltas == -(-self.delta.grid.count // every)

    @property
    def two_pages(self) -> int:
        """Bytes of the largest page of deltas and the largest of bases."""
        assert self.delta.bases is not None
        sizes = {number: len(payload) for number, payload in self.pages.payloads.items()}
        bases = set(self.delta.bases[0].tolist()) - {NO_PAGE}
        return max(sizes[n] for n in set(self.delta.page_ids.tolist())) + max(
            sizes[n] for n in bases
        )


def x_for(pair: Pair, m: int, transpose: bool = False) -> Array:
    rng = np.random.default_rng(m)
    inner = pair.w.shape[0] if transpose else pair.w.shape[1]
    return rng.standard_normal((m, inner)).astype(matmul.compute_dtype(pair.delta.dtype))


KINDS = [
    (DType.F32, None),
    (DType.BF16, None),
    (DType.BF16, DType.F32),
    (DType.F16, DType.BF16),
    (DType.F64, DType.F32),
    (DType.I8, None),
    (DType.I32, None),
    (DType.F8_E4M3, None),
]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("dtype", "base_dtype"), KINDS)
def test_products(dtype: DType, base_dtype: DType | None, transpose: bool) -> None:
    for planes in (False, True):
        pair = Pair(dtype, base_dtype, planes=planes)
        pool = pair.pages.pool()
        for m in (1, 3, 40):
            x = x_for(pair, m, transpose)
            got = matmul.matmul(pair.delta, pool, x, transpose=transpose)
            want = matmul.matmul(pair.raw, pool, x, transpose=transpose)
            assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("every", [1, 2, 7])
def test_products_of_bf16_numbers(every: int) -> None:
    """What takes the kernels of bf16 pairs, where there are any."""
    pair = Pair(DType.BF16, DType.F32, every=every)
    x = x_for(pair, 40).astype(DType.BF16.numpy).astype(np.float32)
    got = matmul.matmul(pair.delta, pair.pages.pool(), x, activation="relu")
    assert (
        got.tobytes() == matmul.matmul(pair.raw, pair.pages.pool(), x, activation="relu").tobytes()
    )


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_two_pages_are_memory_enough(every: int, scattered: bool) -> None:
    pair = Pair(every=every, scattered=scattered)
    everything, little = pair.pages.pool(), pair.pages.pool(pair.two_pages)
    ids = np.array([[0, 69, 3], [17, 17, 40]])
    x, x_t = x_for(pair, 5), x_for(pair, 5, True)
    uses: list[Callable[[BlockMap, PagePool], Array]] = [
        matmul.read,
        lambda m, pool: matmul.matmul(m, pool, x),
        lambda m, pool: matmul.matmul(m, pool, x_t, transpose=True),
        lambda m, pool: lookup.take(m, pool, ids),
        lambda m, pool: lookup.bag(m, pool, ids, mode="max"),
    ]
    for use in uses:
        want = use(pair.raw, everything).tobytes()
        assert use(pair.delta, everything).tobytes() == want
        assert use(pair.delta, little).tobytes() == want
        assert little.stats()["pinned_bytes"] == 0


def test_less_than_two_pages_is_an_error_not_a_loop() -> None:
    pair = Pair()
    pool = pair.pages.pool(pair.two_pages - 1000)
    with pytest.raises(BudgetError):
        matmul.read(pair.delta, pool)
    with pytest.raises(BudgetError):
        matmul.matmul(pair.delta, pool, x_for(pair, 1))
    with pytest.raises(BudgetError):
        lookup.take(pair.delta, pool, [0])
    assert pool.stats()["pinned_bytes"] == 0


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F64, DType.I8])
def test_bags_of_whole_numbers(dtype: DType) -> None:
    """Sums of integers are exact in any order, so they can be compared to the bit."""
    pages = MemoryPages()
    rng = np.random.default_rng(5)
    base = rng.integers(-9, 9, SHAPE).astype(dtype.numpy)
    w = base.copy()
    w[::3, ::2] = np.array(7).astype(dtype.numpy)
    base_map = pages.add(base, BLOCK)
    delta = pages.add_deltas(w, base, base_map, every=2, per_page=3)
    ids = rng.integers(0, SHAPE[0], 300)
    offsets = [0, 4, 4, 200]
    scales = rng.integers(-3, 3, 300)
    exact = w.astype(np.float64)[ids]
    for pool in (pages.pool(), pages.pool(6 * 16 * 32 * w.itemsize + 4000 + base.nbytes // 2)):
        got = lookup.bag(delta, pool, ids, offsets, "sum")
        assert (
            got == np.add.reduceat(exact, [0, 4, 200]).take([0, 0, 1, 2], 0) * [[1], [0], [1], [1]]
        ).all()
        weighted = lookup.bag(delta, pool, ids, offsets, "sum", weights=scales)
        assert (weighted[0] == (exact[:4] * scales[:4, None]).sum(0)).all()
        assert (lookup.take(delta, pool, ids).view(np.uint8) == w[ids].view(np.uint8)).all()


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_convolutions(dtype: DType) -> None:
    rng = np.random.default_rng(3)
    pages = MemoryPages()
    base = first(DType.F32, (20, 3 * 9))
    w = near(base, dtype)
    base_map = pages.add(base, (8, 16))
    raw = pages.add(w, (8, 16))
    delta = pages.add_deltas(w, base, base_map, every=2, per_page=2, scattered=True)
    x = rng.standard_normal((2, 3, 9, 11)).astype(np.float32)
    want = conv.conv2d(raw, pages.pool(), x, kernel=3, padding=1)
    assert conv.conv2d(delta, pages.pool(), x, kernel=3, padding=1).tobytes() == want.tobytes()
    assert conv.conv2d(delta, pages.pool(9000), x, kernel=3, padding=1).tobytes() == want.tobytes()


def test_quantised_blocks_compute_as_what_they_decode_to() -> None:
    pages = MemoryPages()
    base = first(DType.F32)
    rng = np.random.default_rng(8)
    w = (base + 0.01 * rng.standard_normal(SHAPE)).astype(np.float32)
    base_map = pages.add(base, BLOCK)
    delta = pages.add_deltas(w, base, base_map, max_rel_error=1e-3)
    pool = pages.pool()
    read = matmul.read(delta, pool)
    assert 0 < np.linalg.norm(read - w) <= 1e-3 * np.linalg.norm(w)
    again = pages.add(read, BLOCK)
    x = rng.standard_normal((4, SHAPE[1])).astype(np.float32)
    assert (matmul.matmul(delta, pool, x) == matmul.matmul(again, pool, x)).all()
    assert (lookup.take(delta, pool, [5, 69]) == read[[5, 69]]).all()


def test_threads() -> None:
    """Many readers in a pool for a few pages; large enough that calls use threads of their own."""
    pair = Pair(DType.BF16, DType.F32, every=2, shape=(700, 1000), scattered=True)
    pool = pair.pages.pool(8 * pair.two_pages)
    x = x_for(pair, 40)
    ids = np.arange(0, 700, 3)
    want = matmul.matmul(pair.raw, pair.pages.pool(), x, threads=1).tobytes()
    wrong: list[str] = []

    def use(threads: int) -> None:
        try:
            for _ in range(3):
                if matmul.matmul(pair.delta, pool, x, threads=threads).tobytes() != want:
                    wrong.append("matmul")
                if lookup.take(pair.delta, pool, ids).tobytes() != pair.w[ids].tobytes():
                    wrong.append("take")
        except Exception as exc:
            wrong.append(repr(exc))

    users = [threading.Thread(target=use, args=(n,)) for n in (1, 2, 4, 0)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert wrong == []
    assert pool.stats()["pinned_bytes"] == 0


# ---- digests and comparisons --------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "base_dtype"), KINDS)
def test_digests_and_comparisons_see_the_content(dtype: DType, base_dtype: DType | None) -> None:
    pair = Pair(dtype, base_dtype, every=2, planes=True)
    assert pair.delta.bases is not None
    view = MatrixView.of(pair.w, BLOCK)
    digests = hashing.hash_view(view)
    pool = pair.pages.pool()
    other = pair.w.copy()
    other.view(np.uint8)[-1, -1] ^= 1
    other_view = MatrixView.of(other, BLOCK)
    for number in np.unique(pair.delta.page_ids).tolist():
        on_page = np.flatnonzero(pair.delta.page_ids == number)
        base_pages = pair.delta.bases[0][on_page]
        ids = np.unique(base_pages[base_pages != NO_PAGE])
        index = np.where(base_pages == NO_PAGE, -1, np.searchsorted(ids, base_pages))
        (page,), base_of = pool.pages([number]), pool.pages(ids)
        slots = pair.delta.slots[on_page]
        bases = codec.StoredBases(base_of, index, pair.delta.bases[1][on_page])
        where = np.zeros(len(on_page), np.uint32)
        found = codec.block_digests([page], where, slots, bases=bases)
        assert (found == digests[on_page]).all()
        assert codec.blocks_equal(view, on_page, [page], where, slots, bases=bases).all()
        equal = codec.blocks_equal(other_view, on_page, [page], where, slots, bases=bases)
        assert equal.tolist() == (on_page != pair.delta.grid.count - 1).tolist()
        for at, block in enumerate(on_page.tolist()):
            (raw,) = pool.pages([int(pair.raw.page_ids[block])])
            base = (base_of[index[at]], int(pair.delta.bases[1][block])) if index[at] >= 0 else None
            raw_slot, slot = int(pair.raw.slots[block]), int(slots[at])
            assert codec.same_block(raw, raw_slot, page, slot, base_b=base)
            assert codec.same_block(page, slot, raw, raw_slot, base_a=base)
            if base is not None:
                assert not codec.same_block(page, slot, *base, base_a=base)
                with pytest.raises(CorruptStoreError, match="without its base"):
                    codec.same_block(page, slot, raw, raw_slot)
        with pytest.raises(CorruptStoreError, match="without its base"):
            codec.page_digests(page)
