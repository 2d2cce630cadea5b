# SPDX-License-Identifier: Apache-2.0
"""The similarity index against a plain model: dictionaries of sets, and the rules as documented."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from pydedup.errors import ArgumentError, CorruptStoreError, SchemaVersionError
from pydedup.similarity import L2LSH, distances, magnitude

SHAPE = (3, 5)


def make_blocks() -> NDArray[np.float32]:
    """Return blocks that share buckets: families of near copies, scaled, equal and odd ones."""
    rng = np.random.default_rng(11)
    families = rng.standard_normal((4, 1, *SHAPE))
    near = families * (1 + 0.02 * rng.standard_normal((4, 8, *SHAPE)))
    plain = near.reshape(-1, *SHAPE)
    blocks = np.concatenate([plain, plain[:4], 2 * plain[:4], np.zeros((2, *SHAPE)), plain[:3]])
    blocks[-1, 0, 0] = np.nan
    blocks[-2, 2, 4] = -np.inf
    blocks[-3] *= 1e-30
    return blocks.astype(np.float32)


BLOCKS = make_blocks()


class Model:
    """What the index holds, and which blocks a query may give."""

    def __init__(self, index: L2LSH) -> None:
        self.hashes = index.hashes(BLOCKS)
        self.held: dict[int, int] = {}  # id -> number of its block

    def candidates(self, block: int) -> set[int]:
        asked = BLOCKS[block]
        if not np.isfinite(asked).all():
            return set()
        found = set()
        for key, number in self.held.items():
            other = BLOCKS[number]
            if not np.isfinite(other).all():
                continue
            if not asked.any() or not other.any():
                near = not asked.any() and not other.any()
            else:
                near = (self.hashes[block] == self.hashes[number]).all(axis=1).any()
            if near:
                found.add(key)
        return found


class IndexMachine(RuleBasedStateMachine):
    """Adds, removes, queries and reloads in any order."""

    @initialize(bands=st.integers(1, 6), rows=st.integers(1, 4), r=st.sampled_from([0.1, 0.5, 2.0]))
    def start(self, bands: int, rows: int, r: float) -> None:
        self.index = L2LSH(SHAPE, np.float32, r=r, bands=bands, rows=rows, seed=bands)
        self.model = Model(self.index)

    @rule(
        numbers=st.lists(st.integers(0, len(BLOCKS) - 1), max_size=8),
        first=st.integers(0, 52),  # ids stay below 61, which nothing here holds
        threads=st.integers(1, 2),
    )
    def add(self, numbers: Sequence[int], first: int, threads: int) -> None:
        ids = list(range(first, first + len(numbers)))
        if set(ids) & set(self.model.held):
            with pytest.raises(ArgumentError, match="in the index"):
                self.index.add(BLOCKS[list(numbers)], ids)
            return
        self.index.add(BLOCKS[list(numbers)], ids, threads=threads)
        self.model.held |= dict(zip(ids, numbers, strict=True))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        held = sorted(self.model.held)
        ids = data.draw(st.lists(st.sampled_from(held), min_size=1, unique=True))
        self.index.remove(ids)
        for key in ids:
            del self.model.held[key]

    @rule(ids=st.lists(st.integers(61, 99), min_size=1))
    def remove_what_is_not_there(self, ids: Sequence[int]) -> None:
        with pytest.raises(ArgumentError, match=r"not in the index|twice"):
            self.index.remove(ids)

    @rule()
    def reload(self) -> None:
        payload = self.index.save()
        self.index = L2LSH.load(payload)
        assert self.index.save() == payload

    @rule(k=st.integers(1, 40))
    def query(self, k: int) -> None:
        ids, found = self.index.query(BLOCKS, k)
        exact_ids, exact = self.index.query(BLOCKS, k, self.fetch)
        for number in range(len(BLOCKS)):
            wanted = self.model.candidates(number)
            row = ids[number][ids[number] >= 0]
            assert len(row) == min(k, len(wanted))
            assert set(row.tolist()) <= wanted
            assert (np.diff(found[number][: len(row)]) >= 0).all()
            for i in range(1, len(row)):
                assert found[number, i - 1] < found[number, i] or row[i - 1] < row[i]
            same = [key for key in wanted if (BLOCKS[self.model.held[key]] == BLOCKS[number]).all()]
            if same:
                assert row[0] == min(same)
                assert found[number, 0] == 0
                assert exact_ids[number, 0] == min(same)
                assert exact[number, 0] == 0
            assert (exact_ids[number] >= 0).sum() <= len(wanted)

    def fetch(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert (np.diff(ids) > 0).all()
        return BLOCKS[[self.model.held[key] for key in ids.tolist()]]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "model"):
            return
        assert len(self.index) == len(self.model.held)
        assert self.index.ids.tolist() == sorted(self.model.held)
        assert all(key in self.index for key in self.model.held)
        assert 100 not in self.index


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=25)


@given(
    data=st.data(),
    n=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    threads=st.integers(0, 3),
)
@settings(max_examples=60)
def test_batches_may_be_cut_anywhere(
    data: st.DataObject, n: int, cuts: list[int], threads: int
) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(BLOCKS) - 1), min_size=n, max_size=n))
    blocks = BLOCKS[numbers]
    whole = L2LSH(SHAPE, np.float32)
    whole.add(blocks, np.arange(n), threads=1)
    parts = L2LSH(SHAPE, np.float32)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    for start, stop in itertools.pairwise(edges):
        parts.add(blocks[start:stop], np.arange(start, stop), threads=threads)
    assert whole.save() == parts.save()
    together = whole.query(BLOCKS, 3, threads=threads)
    for number in range(len(BLOCKS)):
        ids, found = parts.query(BLOCKS[number : number + 1], 3)
        assert (ids[0] == together[0][number]).all()
        assert (found[0] == together[1][number]).all()


@given(
    data=st.data(),
    dtype=st.sampled_from(["f4", "f8", "f2"]),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=100)
def test_distances_and_magnitudes_are_those_of_numpy(
    data: st.DataObject, dtype: str, shape: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.sampled_from([1.0, 1e-4, 100.0]))
    a = (rng.standard_normal(shape) * scale).astype(dtype)
    b = np.where(rng.random(shape) < 0.5, a, (rng.standard_normal(shape) * scale).astype(dtype))
    eps = 0.5 * scale
    found = distances(a, b, eps=eps)
    left, right = a.astype(np.float64), b.astype(np.float64)
    difference = np.abs(left - right)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.linalg.norm(left - right, axis=(1, 2)) / np.linalg.norm(left, axis=(1, 2))
    np.testing.assert_allclose(found.relative_l2, np.nan_to_num(wanted, posinf=np.inf), rtol=2e-6)
    np.testing.assert_allclose(found.max_difference, difference.max(axis=(1, 2)), rtol=2e-6)
    assert found.share_within is not None
    size = shape[1] * shape[2]
    near_eps = (np.abs(difference - eps) < 1e-5 * scale).sum(axis=(1, 2))
    counted = np.rint(found.share_within * size)
    assert (np.abs(counted - (difference <= eps).sum(axis=(1, 2))) <= near_eps).all()
    limit = float(np.median(found.relative_l2))
    capped = distances(a, b, limit=limit)
    kept = found.relative_l2 <= limit
    assert (capped.relative_l2[kept] == found.relative_l2[kept]).all()
    assert np.isinf(capped.relative_l2[~kept]).all()
    quartiles = magnitude(a)
    expected = np.percentile(np.abs(left).reshape(shape[0], -1), 75, axis=1)
    np.testing.assert_allclose(quartiles, expected, rtol=1e-15)


@given(
    n=st.integers(1, 9000),
    kind=st.sampled_from(["normal", "ties", "sorted", "zeros", "alternating"]),
    dtype=st.sampled_from(["f4", "f8", "f2"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80)
def test_a_sample_that_misleads_does_no_harm(n: int, kind: str, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = {
        "normal": lambda: rng.standard_normal(n),
        "ties": lambda: rng.integers(-2, 3, n),
        "sorted": lambda: np.sort(rng.standard_normal(n)),
        "zeros": lambda: np.where(rng.random(n) < 0.2, rng.standard_normal(n), 0),
        "alternating": lambda: np.where(np.arange(n) // 16 % 3 == 0, 1e4, 1) * rng.random(n),
    }[kind]()
    block = block.astype(dtype)[np.newaxis]
    wanted = np.percentile(np.abs(block.astype(np.float64)), 75)
    np.testing.assert_allclose(magnitude(block)[0], wanted, rtol=1e-15, atol=0)


SAVED = L2LSH(SHAPE, np.float32, bands=2, rows=2)
SAVED.add(BLOCKS[-14:], [5, 3, 1000, 7, 8, 9, 2**62, 11, 12, 13, 14, 15, 0, 1])
PAYLOAD = SAVED.save()


@given(place=st.integers(0, len(PAYLOAD) - 1), value=st.integers(1, 255))
@settings(max_examples=300)
def test_a_damaged_byte_is_noticed(place: int, value: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[place] ^= value
    if place in (4, 5):  # a newer version, or one that never was
        with pytest.raises((SchemaVersionError, CorruptStoreError)):
            L2LSH.load(bytes(damaged))
        return
    with pytest.raises(CorruptStoreError):
        L2LSH.load(bytes(damaged))


@given(length=st.integers(0, len(PAYLOAD) - 1))
@settings(max_examples=100)
def test_a_cut_payload_is_noticed(length: int) -> None:
    with pytest.raises(CorruptStoreError):
        L2LSH.load(PAYLOAD[:length])
