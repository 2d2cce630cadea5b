# SPDX-License-Identifier: Apache-2.0
"""Similarity: arguments, layouts of memory, odd values, many equal blocks, memory and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.similarity import L2LSH

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def random_blocks(
    n: int, shape: tuple[int, int], dtype: Any = np.float32, seed: int = 0
) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(dtype)


# ---- the index ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (1, 50), (50, 1), (1, 1), (3, 1030), (7, 13)])
def test_every_shape_and_dtype_finds_its_own_blocks(dtype: Any, shape: tuple[int, int]) -> None:
    blocks = random_blocks(40, shape, dtype)
    index = L2LSH(shape, dtype)
    index.add(blocks, range(100, 140))
    ids, found = index.query(blocks)
    assert ids.shape == found.shape == (40, 1)
    assert (found == 0).all()
    for number, key in enumerate(ids[:, 0] - 100):
        assert (blocks[key] == blocks[number]).all()
    ids, found = index.query(blocks.reshape(40, -1), 2, lambda wanted: blocks[wanted - 100])
    assert (found[:, 0] == 0).all()


def test_strided_and_read_only_blocks_are_read_where_they_lie() -> None:
    matrix = random_blocks(1, (200, 150))[0]
    matrix.flags.writeable = False
    cut = np.stack([matrix[r : r + 64, c : c + 48] for r in (0, 64, 128) for c in (0, 48, 96)])
    cut.flags.writeable = False
    one, other = (L2LSH((64, 48), np.float32) for _ in range(2))
    one.add(cut, range(9))
    other.add_matrix(matrix, range(9))
    assert one.save() == other.save()
    assert (one.query(cut, 3)[0] == other.query_matrix(matrix, 3)[0]).all()
    exact = other.query_matrix(matrix, 1, lambda ids: cut[ids])
    assert (exact[0][:, 0] == np.arange(9)).all()
    assert (exact[1] == 0).all()
    # Every second block, and rows with a gap.
    third = L2LSH((64, 48), np.float32)
    third.add(cut[::2], range(5))
    wide = np.zeros((5, 64, 60), np.float32)
    wide[:, :, :48] = cut[::2]
    fourth = L2LSH((64, 48), np.float32)
    fourth.add(wide[:, :, :48], range(5))
    assert third.save() == fourth.save()
    odd = np.frombuffer(b"x" + cut.tobytes(), np.uint8)[1:].view(np.float32).reshape(cut.shape)
    fifth = L2LSH((64, 48), np.float32)
    fifth.add(odd, range(9))
    assert fifth.save() == one.save(), "misaligned blocks"


def test_blocks_that_cannot_be_read_in_place_are_refused() -> None:
    index = L2LSH((4, 6), np.float32)
    blocks = random_blocks(3, (4, 6))
    for wrong in (blocks[:, :, ::-1], blocks.swapaxes(1, 2).copy().swapaxes(1, 2)):
        with pytest.raises(ArgumentError, match="dense in its last axis"):
            index.add(wrong, range(3))
    with pytest.raises(ArgumentError, match="negative stride"):
        index.add(blocks[::-1], range(3))
    assert len(index) == 0


def test_scaled_copies_are_told_apart() -> None:
    blocks = random_blocks(1, (16, 16))
    index = L2LSH((16, 16), np.float32)
    index.add(np.concatenate([2 * blocks, blocks, 1.5 * blocks]), [7, 8, 9])
    ids, found = index.query(blocks, 3)
    assert ids.tolist() == [[8, 9, 7]]
    assert found[0] == pytest.approx([0, 0.5, 1], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_blocks_are_like_others(dtype: Any) -> None:
    blocks = random_blocks(20, (8, 16), np.float64)
    least, most = float(ml_dtypes.finfo(dtype).smallest_normal), float(ml_dtypes.finfo(dtype).max)
    index = L2LSH((8, 16), dtype)
    scaled = np.concatenate([blocks * (least * 512), blocks * (most / 16)]).astype(dtype)
    index.add(scaled, range(40))
    ids, found = index.query(scaled, 1, lambda wanted: scaled[wanted])
    assert (ids[:, 0] == np.arange(40)).all()
    assert (found == 0).all()
    with np.errstate(over="ignore"):
        near = (scaled.astype(np.float64) * 1.01).astype(dtype)
    ids, found = index.query(near, 1, lambda wanted: scaled[wanted])
    assert (ids[:, 0] == np.arange(40)).all()
    assert (np.abs(found - 0.0099) < 0.004).all()


def test_what_is_not_finite_is_never_found() -> None:
    blocks = random_blocks(6, (8, 8))
    blocks[1, 3, 3] = np.nan
    blocks[2, 0, 0] = np.inf
    blocks[3] = 0
    index = L2LSH((8, 8), np.float32)
    index.add(blocks, range(6))
    assert len(index) == 6
    assert 1 in index
    ids, found = index.query(blocks, 6)
    assert ids[1].tolist() == ids[2].tolist() == [-1] * 6
    assert ids[3].tolist() == [3, *[-1] * 5], "a zero block is near to zero blocks alone"
    assert not set(ids[[0, 4, 5]].reshape(-1).tolist()) & {1, 2, 3}
    assert found[3, 0] == 0
    index.add(-blocks[3:4], [10])  # minus zero is zero
    assert index.query(blocks[3:4], 2)[0].tolist() == [[3, 10]]
    index.remove([1, 2, 3])
    assert index.ids.tolist() == [0, 4, 5, 10]
    assert L2LSH.load(index.save()).ids.tolist() == [0, 4, 5, 10]
    # A block that went bad since it was added does not come out of an exact query.
    poisoned = np.full((1, 8, 8), np.nan, np.float32)
    ids, found = index.query(blocks[:1], 1, lambda wanted: np.repeat(poisoned, len(wanted), 0))
    assert ids.tolist() == [[-1]]
    assert np.isinf(found).all()


def test_many_equal_and_nearly_equal_blocks_are_no_trouble() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal((1, 16, 16)).astype(np.float32)
    equal = np.broadcast_to(base, (100_000, 16, 16))
    near = base * (1 + 1e-3 * rng.standard_normal((20_000, 16, 16), np.float32))
    index = L2LSH((16, 16), np.float32)
    index.add(near, np.arange(200_000, 220_000))
    index.add(equal, np.arange(100_000))
    assert index.memory_bytes < 20_000 * 700 + 100_000 * 100
    # All are in the same buckets: a query that looked at each would take hours.
    ids, found = index.query(equal[:20_000], 2)
    assert (ids == [0, 1]).all()
    assert (found == 0).all()
    ids, found = index.query(near, 1)
    assert (ids[:, 0] == np.arange(200_000, 220_000)).all(), (
        "the capped buckets hide no equal block"
    )
    assert (found == 0).all()
    ids, _ = index.query(base, 500)
    assert (ids[0, :500] == np.arange(500)).all()
    index.remove(np.arange(99_990))
    index.remove(np.arange(200_000, 219_990))
    assert len(index) == 20
    assert index.query(base, 30)[0][0, :10].tolist() == list(range(99_990, 100_000))
    assert len(L2LSH.load(index.save())) == 20


def test_numbers_are_used_again_after_removal() -> None:
    index = L2LSH((8, 8), np.float32)
    sizes = []
    for turn in range(6):
        index.add(random_blocks(3000, (8, 8), seed=turn), np.arange(3000))
        sizes.append(index.memory_bytes)
        kept = random_blocks(3000, (8, 8), seed=turn)[1500:]
        index.remove(np.arange(1500))
        assert (index.query(kept)[0][:, 0] == np.arange(1500, 3000)).all()
        index.remove(np.arange(1500, 3000))
        assert len(index) == 0
    assert sizes[-1] == sizes[1]


def test_changes_are_all_or_nothing() -> None:
    index = L2LSH((4, 4), np.float32)
    blocks = random_blocks(4, (4, 4))
    index.add(blocks[:2], [5, 6])
    before = index.save()
    for ids in ([7, 5], [8, 8], [-1, 9]):
        with pytest.raises(ArgumentError, match="ids holds"):
            index.add(blocks[:2], ids)
    with pytest.raises(ArgumentError, match="3 ids for 2 blocks"):
        index.add(blocks[:2], [1, 2, 3])
    for ids in ([5, 7], [5, 5]):
        with pytest.raises(ArgumentError, match="ids holds"):
            index.remove(ids)
    assert index.save() == before


def test_nothing_is_a_batch_too() -> None:
    index = L2LSH((4, 4), np.float32)
    empty = np.empty((0, 4, 4), np.float32)
    index.add(empty, [])
    index.remove([])
    ids, found = index.query(empty, 3)
    assert ids.shape == found.shape == (0, 3)
    assert index.query(random_blocks(2, (4, 4)), 2)[0].tolist() == [[-1, -1]] * 2
    assert index.query(empty, 1, lambda ids: empty)[0].shape == (0, 1)
    index.add_matrix(np.empty((3, 9), np.float32), [])  # no whole block
    assert len(L2LSH.load(index.save())) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_shape": (0, 4)}, "block_shape"),
        ({"block_shape": 7}, "block_shape"),
        ({"block_shape": (1 << 20, 1 << 20)}, "elements"),
        ({"dtype": np.int32}, "int32"),
        ({"dtype": ">f4"}, "native byte order"),
        ({"r": 0}, "r is"),
        ({"dtype": np.int32}, "^dtype: similarity takes .* in native byte order, not dtype int32"),
        ({"r": float("nan")}, "r must be"),
        ({"r": "wide"}, "r must be"),
        ({"r": 17}, "r is"),
        ({"bands": 0}, "bands"),
        ({"bands": 65}, "bands"),
        ({"rows": 0}, "rows"),
        ({"rows": 2.5}, "rows"),
        ({"bands": 64, "rows": 9}, "512"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_wrong_parameters_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {"block_shape": (4, 4), "dtype": np.float32, **arguments}
    with pytest.raises(ArgumentError, match=message):
        L2LSH(given.pop("block_shape"), given.pop("dtype"), **given)


def test_wrong_batches_are_named() -> None:
    index = L2LSH((4, 4), np.float32)
    blocks = random_blocks(2, (4, 4))
    wrong: list[tuple[Any, Any, str]] = [
        (blocks.astype(np.float64), [0, 1], "float64"),
        (blocks.tolist(), [0, 1], "numpy array"),
        (blocks[:, :3], [0, 1], "shape"),
        (blocks[0, 0], [0, 1], "shape"),
        (blocks, [0.0, 1.0], "integers"),
        (blocks, [[0, 1]], "one dimension"),
        (blocks, np.array([2**63, 1], np.uint64), "integers of int64"),
        (blocks, "ab", "one dimension"),
    ]
    for given, ids, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            index.add(given, ids)
    with pytest.raises(ArgumentError, match="2-D"):
        index.add_matrix(blocks, [0, 1])
    for k in (0, -1, 1.5, True, None):
        with pytest.raises(ArgumentError, match="k must be"):
            index.query(blocks, k)  # type: ignore[arg-type]
    index.add(blocks, [0, 1])
    for answer in (blocks[:1, :3], blocks[:1].astype(np.float16), None, blocks[:0]):
        with pytest.raises(ArgumentError, match=r"fetch|blocks|b must"):
            index.query(blocks[:1], 1, lambda _, answer=answer: answer)
    with pytest.raises(ArgumentError, match="fetch must be a function of ids, not ndarray"):
        index.query(blocks[:1], 1, blocks)  # type: ignore[arg-type]
    assert "0" not in index
    assert None not in index
    assert 2**70 not in index
    with pytest.raises(ArgumentError, match="bytes"):
        L2LSH.load("text")  # type: ignore[arg-type]
    with pytest.raises(CorruptStoreError):
        L2LSH.load(b"")


def test_results_do_not_depend_on_threads() -> None:
    blocks = random_blocks(3000, (16, 24))
    saved, answers = [], []
    for threads in (1, 2, 5):
        index = L2LSH((16, 24), np.float32, r=2.0)
        index.add(blocks, np.arange(3000), threads=threads)
        saved.append(index.save())
        answers.append(index.query(blocks * np.float32(1.1), 4, threads=threads))
    assert saved[0] == saved[1] == saved[2]
    for ids, found in answers[1:]:
        assert (ids == answers[0][0]).all()
        assert (found == answers[0][1]).all()


def test_queries_and_changes_from_many_threads() -> None:
    index = L2LSH((8, 8), np.float32)
    blocks = random_blocks(400, (8, 8))
    index.add(blocks[:200], range(200))
    failures: list[BaseException] = []

    def change() -> None:
        try:
            for _ in range(30):
                index.add(blocks[200:], range(200, 400))
                index.remove(range(200, 400))
        except BaseException as error:
            failures.append(error)

    def ask() -> None:
        try:
            for _ in range(60):
                assert (index.query(blocks[:200])[0][:, 0] == np.arange(200)).all()
                assert len(index) in (200, 400)
                index.save()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (change, ask, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_million_blocks_take_less_than_a_gibibyte() -> None:
    script = """
import re
from pathlib import Path
import numpy as np
from pydedup.similarity import L2LSH

def peak():  # unlike ru_maxrss, without what the parent had when it forked
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

index = L2LSH((4, 8), np.float32)
rng = np.random.default_rng(0)
before = peak()
for start in range(0, 1_000_000, 50_000):
    index.add(rng.standard_normal((50_000, 4, 8), np.float32), np.arange(start, start + 50_000))
after = peak()
assert len(index) == 1_000_000
print(after, after - before, index.memory_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240
    )
    peak, grown, held = map(int, done.stdout.split())
    assert peak < 1 << 30, "with the interpreter and numpy"
    assert held / 1e6 < 480
    assert grown < 700e6


# ---- merging ------------------------------------------------------------------------------------


def test_merged_indexes_answer_as_one_that_was_filled_alone() -> None:
    blocks = random_blocks(60, (16, 16), seed=5)
    blocks[7] = 0.0
    blocks[9, 3, 3] = np.nan
    blocks[41] = blocks[2]  # one sketch on both sides
    whole, one, other = (L2LSH((16, 16), np.float32, seed=3) for _ in range(3))
    whole.add(blocks, range(60))
    one.add(blocks[:30], range(30))
    other.add(blocks[:60], range(60))
    other.remove(range(20))  # dead places among those that are merged
    one.merge(other)
    assert one.save() == whole.save()
    near = blocks + np.float32(0.01) * random_blocks(60, (16, 16), seed=6)
    for got, want in zip(one.query(near, 4), whole.query(near, 4), strict=True):
        assert np.array_equal(got, want)
    one.merge(one)
    one.merge(L2LSH((16, 16), np.float32, seed=3))
    assert one.save() == whole.save()


@pytest.mark.parametrize(
    "other", [L2LSH((16, 16), np.float32, seed=1), L2LSH((16, 8), np.float32), object()]
)
def test_indexes_that_do_not_fit_are_not_merged(other: Any) -> None:
    index = L2LSH((16, 16), np.float32)
    index.add(random_blocks(3, (16, 16)), range(3))
    before = index.save()
    with pytest.raises(ArgumentError, match=r"other must (have|be an L2LSH)"):
        index.merge(other)
    assert index.save() == before


def test_two_indexes_merge_into_each_other_at_once() -> None:
    one, other = L2LSH((8, 8), np.float32), L2LSH((8, 8), np.float32)
    blocks = random_blocks(400, (8, 8))

    def fill(into: L2LSH, others: L2LSH, first: int) -> None:
        for i in range(first, 400, 2):
            into.add(blocks[i : i + 1], [i])
            into.merge(others)

    threads = [
        threading.Thread(target=fill, args=args) for args in ((one, other, 0), (other, one, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    one.merge(other)
    assert one.ids.tolist() == list(range(400))


def test_selected_blocks_keep_their_sketches_under_new_ids() -> None:
    blocks = random_blocks(30, (16, 16), seed=5)
    blocks[3] = 0.0
    blocks[5, 1, 1] = np.inf
    blocks[9] = blocks[8]
    index, want = (L2LSH((16, 16), np.float32, seed=2) for _ in range(2))
    index.add(blocks, range(30))
    chosen = np.array([9, 3, 17, 5, 8])
    want.add(blocks[chosen], chosen * 10)
    assert index.select(chosen, chosen * 10).save() == want.save()
    assert len(index.select([], [])) == 0
    for ids, new_ids, says in (
        ([1, 30], [1, 2], "30, which is not in the index"),
        ([1, 2], [4, 4], "4 twice"),
        ([1], [-1], "-1"),
        ([1, 2], [1], "new_ids"),
    ):
        with pytest.raises(ArgumentError, match=says):
            index.select(ids, new_ids)
    assert len(index) == 30
