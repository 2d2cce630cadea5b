# SPDX-License-Identifier: Apache-2.0
"""The typed entry to page packing: forms of input, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pydedup.errors import ArgumentError
from pydedup.packing import Algorithm, Layout, pack

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


def scattered(counts: dict[tuple[int, ...], int], models: int) -> list[np.ndarray[Any, Any]]:
    """Owners with so many blocks per owner set, the ids of each set drawn at random."""
    ids = np.random.default_rng(5).permutation(sum(counts.values()))
    owned: list[list[int]] = [[] for _ in range(models)]
    start = 0
    for owner_set, count in counts.items():
        for model in owner_set:
            owned[model].extend(ids[start : start + count].tolist())
        start += count
    return [np.array(sorted(blocks), np.int64) for blocks in owned]


#: Six variants of an embedding of 500 blocks, 450 of them the same.
WORD2VEC = scattered(
    {(0, 1, 2, 3, 4, 5): 450, **{(model,): 50 for model in range(6)}},
    6,
)


def as_lists(layout: Layout) -> list[list[int]]:
    return [page.tolist() for page in layout.pages]


def test_word2vec_reaches_the_bound_and_reads_one_page_more_at_most() -> None:
    layout = pack(WORD2VEC, 8)
    layout.check(WORD2VEC)
    assert layout.stored_pages == len(layout.pages) == layout.lower_bound == 94
    assert layout.least_reads.tolist() == [63] * 6
    assert sorted(layout.page_reads.tolist()) == [63, 63, 63, 64, 64, 64]
    assert layout.read_amplification.max() == pytest.approx(64 / 63)


@pytest.mark.parametrize(
    ("algorithm", "pages"), [("two_stage", 98), ("greedy1", 99), ("greedy2", 98)]
)
def test_word2vec_with_exact_cover(algorithm: Algorithm, pages: int) -> None:
    layout = pack(WORD2VEC, 8, algorithm=algorithm)
    layout.check(WORD2VEC)
    assert layout.stored_pages == pages
    for owned, numbers in zip(WORD2VEC, layout.reads, strict=True):
        union = np.unique(np.concatenate([layout.pages[number] for number in numbers]))
        assert union.tolist() == owned.tolist()


def test_baseline_stores_more_than_the_others() -> None:
    baseline = pack(WORD2VEC, 8, algorithm="baseline")
    baseline.check(WORD2VEC)
    assert baseline.stored_pages > pack(WORD2VEC, 8, algorithm="greedy2").stored_pages


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_models_are_stored_once(algorithm: Algorithm) -> None:
    layout = pack([range(5), range(5)], 8, algorithm=algorithm)
    assert as_lists(layout) == [[0, 1, 2, 3, 4]]
    assert layout.page_reads.tolist() == [1, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_model_keeps_its_order(algorithm: Algorithm) -> None:
    layout = pack([np.arange(10)[::-1]], 4, algorithm=algorithm)
    assert as_lists(layout) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_all_forms_of_owners_mean_the_same() -> None:
    expected = as_lists(pack([[1, 2, 3], [3, 4]], 2))
    indptr, ids = np.array([0, 3, 5]), np.array([1, 2, 3, 3, 4])
    forms: list[Any] = [
        [{1, 2, 3}, {3, 4}],
        [frozenset({1, 2, 3}), (4, 3)],
        ({1, 2, 3}, [3, 4]),
        [np.array([3, 1, 2], np.int32), np.array([3, 4], np.uint64)],
        [np.array([1, 9, 2, 9, 3])[::2], [3, 4]],
        (indptr, ids),
        (indptr.astype(np.int32), ids.astype(np.uint8)),
    ]
    for owners in forms:
        layout = pack(owners, 2)
        assert as_lists(layout) == expected
        layout.check(owners)


@pytest.mark.parametrize("stride", [1, 1000, 2**40])
def test_ids_may_have_holes(stride: int) -> None:
    near = [[0, 1, 2, 3], [2, 3, 4], [9]]
    far = [[block * stride for block in owned] for owned in near]
    layout = pack(far, 2, existing=[[9 * stride, 7]])
    layout.check(far, [[9 * stride, 7]])
    plain = pack(near, 2, existing=[[9, 7]])
    assert as_lists(layout) == [[b * stride for b in page] for page in as_lists(plain)]


def test_sizes_by_id_or_by_rank() -> None:
    owners = [{10, 30}, {20, 30}]
    by_id = pack(owners, 100, sizes={10: 60, 20: 50, 30: 40, 99: 1000})
    by_rank = pack(owners, 100, sizes=[60, 50, 40])
    assert as_lists(by_id) == as_lists(by_rank)
    assert by_id.lower_bound == by_id.stored_pages == 2
    assert by_id.least_reads.tolist() == [1, 1]
    by_id.check(owners, sizes={10: 60, 20: 50, 30: 40})


def test_existing_pages_are_read_and_kept() -> None:
    existing = [[1, 2], [50, 51], [3]]
    layout = pack([{1, 2, 3, 4, 5}, {3, 5, 6}], 2, existing=existing)
    layout.check([{1, 2, 3, 4, 5}, {3, 5, 6}], existing)
    assert layout.existing_pages == 3
    assert layout.stored_pages == layout.lower_bound == 5
    assert sorted(np.concatenate(layout.pages).tolist()) == [4, 5, 6]
    assert layout.reads[0].tolist()[:2] == [0, 2]
    assert layout.reads[1].tolist()[0] == 2


def test_weights_favour_the_model_that_is_called() -> None:
    # Two pages for three blocks each of a, b and shared ones: someone must read a page more.
    owners = scattered({(0,): 3, (1,): 3, (0, 1): 2}, 2)
    for busy in (0, 1):
        weights = [1.0, 1.0]
        weights[busy] = 10.0
        layout = pack(owners, 4, weights=weights)
        layout.check(owners)
        assert layout.page_reads[busy] == 2 == layout.least_reads[busy]


def family(models: int, blocks: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """Owner sets of which few are frequent."""
    random = np.random.default_rng(seed)
    share = random.random(1 << models) ** 8
    share[0] = 0
    sets = random.choice(1 << models, blocks, p=share / share.sum())
    return [np.flatnonzero(sets >> model & 1) for model in range(models)]


@pytest.mark.parametrize("seed", range(8))
def test_the_heavier_a_model_the_fewer_pages_it_reads(seed: int) -> None:
    owners = family(5, 400, seed)
    plain = pack(owners, 16)
    for heavy in range(5):
        weights = [1.0] * 5
        weights[heavy] = 1000.0
        layout = pack(owners, 16, weights=weights)
        layout.check(owners)
        assert layout.stored_pages == plain.stored_pages
        assert layout.page_reads[heavy] <= plain.page_reads[heavy]
        assert layout.page_reads @ weights <= plain.page_reads @ weights
        assert layout.page_reads[heavy] == layout.least_reads[heavy]


@pytest.mark.parametrize("seed", range(8))
def test_weights_by_call_rate_never_cost_reads(seed: int) -> None:
    owners = family(6, 500, seed)
    weights = np.random.default_rng(seed).zipf(1.8, 6).clip(max=1000)
    weighted = pack(owners, 16, weights=weights)
    assert weighted.page_reads @ weights <= pack(owners, 16).page_reads @ weights


def test_scaled_weights_are_the_same_weights() -> None:
    owners = family(4, 200, 0)
    expected = as_lists(pack(owners, 8, weights=[1, 2, 4, 8]))
    assert as_lists(pack(owners, 8, weights=[0.125, 0.25, 0.5, 1.0])) == expected
    assert as_lists(pack(owners, 8, weights=[5, 5, 5, 5])) == as_lists(pack(owners, 8))
    assert as_lists(pack(owners, 8, weights=[0, 0, 0, 0])) == as_lists(pack(owners, 8))


def test_layouts_do_not_depend_on_the_process(tmp_path: Path) -> None:
    program = tmp_path / "pack.py"
    program.write_text(
        "import numpy as np\n"
        "from pydedup.packing import pack\n"
        "random = np.random.default_rng(3)\n"
        "owners = [set(random.integers(0, 600, 250).tolist()) for _ in range(6)]\n"
        "layout = pack(owners, 16, weights=[3, 1, 4, 1, 5, 9])\n"
        "print([page.tolist() for page in layout.pages])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-P", str(program)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYDEDUP_KERNEL": kernel},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed, kernel in (("0", "scalar"), ("1", ""), ("4242", "scalar"))
    }
    assert len(outputs) == 1


def test_large_csr_is_read_where_it_is() -> None:
    models, per_model = 50, 40_000
    ids = np.arange(models * per_model, dtype=np.int64) // 2 + 2**33
    indptr = np.arange(models + 1, dtype=np.int64) * per_model
    ids.flags.writeable = False
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError, match=r"owners\[0\] lists block 8589934592 twice"):
            pack((indptr, ids), 64)
        ids = np.arange(models * per_model, dtype=np.int64) + 2**33
        layout = pack((indptr, ids), 64)
        # What Python holds: the result, and no object per block.
        assert tracemalloc.get_traced_memory()[1] < 2.5 * ids.nbytes
    finally:
        tracemalloc.stop()
    assert layout.stored_pages == layout.lower_bound == models * per_model // 64
    layout.check((indptr, ids))


def test_arrays_may_lie_anywhere() -> None:
    expected = as_lists(pack([[1, 2, 3], [3, 4]], 2, weights=[1, 2]))
    ids = np.array([1, 2, 3, 3, 4], np.int64)
    odd = np.frombuffer(b"x" + ids.tobytes(), np.uint8)[1:].view(np.int64)
    assert not odd.flags.aligned
    swapped = ids.astype(ids.dtype.newbyteorder())
    weights = np.frombuffer(b"x" + np.array([1.0, 2.0]).tobytes(), np.uint8)[1:].view(np.float64)
    for given in (odd, swapped, np.repeat(ids, 2)[::2]):
        assert as_lists(pack((np.array([0, 3, 5]), given), 2, weights=weights)) == expected


def test_one_block_and_empty_models() -> None:
    for algorithm in ALGORITHMS:
        layout = pack([[], [7], [], [7]], 1, algorithm=algorithm)
        layout.check([[], [7], [], [7]])
        assert as_lists(layout) == [[7]]
        assert layout.page_reads.tolist() == [0, 1, 0, 1]
    assert pack([[7]], 2**63 - 1, sizes=[2**63 - 1]).optimal
    assert pack([[0, 1]], 2**63 - 1, sizes=[2**62, 2**62 - 1]).stored_pages == 1


def test_room_on_existing_pages_stays_empty() -> None:
    # Pages are immutable: one block on a page for four leaves three places that nobody may use.
    layout = pack([{1, 2}, {2, 3}], 4, existing=[[1], [2]])
    layout.check([{1, 2}, {2, 3}], [[1], [2]])
    assert as_lists(layout) == [[3]]
    assert [numbers.tolist() for numbers in layout.reads] == [[0, 1], [1, 2]]
    with pytest.raises(ArgumentError, match="is on an existing page already"):
        dataclasses.replace(layout, pages=[np.array([2, 3])]).check([{1, 2}, {2, 3}], [[1], [2]])


def test_nothing_to_pack() -> None:
    empty = pack([], 4)
    assert (empty.pages, empty.reads, empty.stored_pages, empty.lower_bound) == ([], [], 0, 0)
    empty.check([])
    blank = pack([set(), np.empty(0)], 4)
    assert blank.page_reads.tolist() == [0, 0]
    assert blank.read_amplification.tolist() == [1.0, 1.0]
    full = pack([{1}], 4, existing=[[1, 2]])
    assert (full.pages, full.page_reads.tolist(), full.stored_pages) == ([], [1], 1)


def test_layouts_are_read_only() -> None:
    layout = pack([{1, 2}], 4)
    with pytest.raises(ValueError, match="read-only"):
        layout.pages[0][0] = 7
    with pytest.raises(ValueError, match="read-only"):
        layout.page_reads[0] = 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"owners": [[1, 1]]}, r"owners\[0\] lists block 1 twice"),
        ({"owners": [[-1]]}, "owners: block id -1 is negative"),
        ({"owners": [[1.5]]}, r"owners\[0\] must hold integers of int64, not float64"),
        ({"owners": [[2**63]]}, "must hold integers of int64"),
        ({"owners": [[True]]}, "must hold integers of int64, not bool"),
        ({"owners": [[[1]]]}, "one dimension"),
        ({"owners": [[[1], [2, 3]]]}, "does not make an array"),
        ({"owners": {"a": [1]}}, "not a dict"),
        ({"owners": "12"}, "not a str"),
        ({"owners": 3}, "not a int"),
        ({"owners": np.zeros((2, 2), np.int64)}, "not a ndarray"),
        ({"owners": (np.array([5, 6]), np.array([6, 7]))}, "row pointers must run from 0"),
        (
            {"owners": (np.array([0, 2, 1, 2]), np.array([6, 7]))},
            "owners: row pointers must not fall",
        ),
        ({"owners": (np.array([0, 2**62, 2]), np.array([6, 7]))}, "owners: row pointers must not"),
        ({"owners": (np.array([0, 2**62]), np.array([6, 7]))}, "owners: row pointers must run"),
        ({"owners": (np.array([-2, 2]), np.array([6, 7]))}, "owners: row pointers must run"),
        ({"owners": (np.array([], np.int64), np.array([], np.int64))}, "indptr of owners is empty"),
        ({"existing": (np.array([0, 3]), np.array([6, 7]))}, "existing: row pointers must run"),
        ({"existing": (np.array([], int), np.array([], int))}, "indptr of existing is empty"),
        ({"capacity": 0}, "from 1 to"),
        ({"capacity": True}, "from 1 to"),
        ({"capacity": 2**63}, "from 1 to"),
        ({"capacity": 2.0}, "must be an integer"),
        ({"algorithm": "best"}, "unknown packing algorithm 'best'; choose one of: layout,"),
        ({"sizes": [1, 5]}, "2 entries for 3 distinct blocks"),
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": [1, 5, 4]}, "sizes: block 2 has size 5"),
        ({"sizes": [1, 2]}, "sizes has 2 entries for 3 distinct blocks"),
        ({"sizes": [1, 2, 3, 4]}, "sizes has 4 entries for 3 distinct blocks"),
        ({"sizes": [1.0, 2.0, 3.0]}, "sizes must hold integers of int64"),
        ({"sizes": [2**62] * 3, "capacity": 2**63 - 1}, "sizes add up to"),
        ({"sizes": [0, 1, 1]}, "sizes: block 1 has size 0"),
        ({"sizes": {1: 1, 3: 1}}, "no entry for block 2"),
        ({"weights": [1, 2, 3]}, "weights has shape"),
        ({"weights": [1, -1]}, r"weights\[1\] is -1"),
        ({"weights": [1, float("nan")]}, r"weights\[1\] is nan"),
        ({"weights": ["a", "b"]}, "weights must be real numbers, one per model, not <U1"),
        ({"weights": [1j, 1j]}, "weights must be real numbers, one per model, not complex128"),
        ({"weights": [10**400, 1]}, "weights must be real numbers, one per model, not object"),
        ({"existing": [[4, 4, 1, 1]]}, r"existing\[0\] lists block 1 twice"),
        ({"existing": [[-4]]}, "existing: block id -4 is negative"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"owners": [{1, 2}, {2, 3}], "capacity": 4}
    with pytest.raises(ArgumentError, match=message):
        pack(**{**good, **arguments})


def test_check_refuses_what_does_not_fit_the_request() -> None:
    owners = [{1, 2, 3}, {3, 4}]
    layout = pack(owners, 2)
    layout.check(owners)
    with pytest.raises(ArgumentError, match="block 5 is on no page"):
        layout.check([{1, 2, 3}, {3, 4, 5}])
    with pytest.raises(ArgumentError, match="belongs to no model"):
        layout.check([{1, 2}, {4}])
    with pytest.raises(ArgumentError, match="reads of 2 models, not of 1"):
        layout.check([{1, 2, 3, 4}])
    with pytest.raises(ArgumentError, match="counts 0 existing pages, not 1"):
        layout.check(owners, [[1]])
    with pytest.raises(ArgumentError, match="sizes must be given"):
        layout.check(owners, sizes=[1, 1, 1, 1])
    with pytest.raises(ArgumentError, match="more than its capacity 1"):
        dataclasses.replace(layout, capacity=1).check(owners)
    with pytest.raises(ArgumentError, match="page_reads"):
        dataclasses.replace(layout, page_reads=layout.page_reads + 1).check(owners)
    with pytest.raises(ArgumentError, match="several new pages"):
        dataclasses.replace(layout, pages=[*layout.pages, np.array([1])]).check(owners)


def test_threads_get_the_same_layout() -> None:
    expected = as_lists(pack(WORD2VEC, 8))
    found: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: found.append(as_lists(pack(WORD2VEC, 8)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
