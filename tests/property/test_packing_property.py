# SPDX-License-Identifier: Apache-2.0
"""What holds for every packing problem: nothing is lost, bounds are kept, the answer is stable.

Page reads are not compared between orders of the models: ties fall differently, and should.
"""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pydedup.packing import Algorithm, Layout, pack

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

owner_lists = st.lists(st.frozensets(st.integers(0, 60), max_size=40), max_size=7)
capacities = st.integers(1, 12)
algorithms = st.sampled_from(ALGORITHMS)
page_lists = st.lists(st.frozensets(st.integers(0, 80), max_size=8), max_size=4)


def contents(layout: Layout) -> tuple[list[list[int]], list[list[int]]]:
    return [p.tolist() for p in layout.pages], [r.tolist() for r in layout.reads]


def ceil_div(amount: int, capacity: int) -> int:
    return -(-amount // capacity)


@given(owners=owner_lists, capacity=capacities, existing=page_lists, algorithm=algorithms)
def test_a_model_gets_all_of_its_blocks_back(
    owners: list[frozenset[int]],
    capacity: int,
    existing: list[frozenset[int]],
    algorithm: Algorithm,
) -> None:
    layout = pack(owners, capacity, existing=existing, algorithm=algorithm)
    layout.check(owners, existing)
    # Once more without the native checker.
    pages = [*existing, *(frozenset(page.tolist()) for page in layout.pages)]
    stored = frozenset[int]().union(*existing)
    for owned, numbers in zip(owners, layout.reads, strict=True):
        read = frozenset[int]().union(*(pages[number] for number in numbers))
        assert owned <= read
        if algorithm != "layout":
            new = [pages[number] for number in numbers if number >= len(existing)]
            assert frozenset[int]().union(*new) == owned - stored
    assert all(len(page) <= capacity for page in layout.pages)
    assert layout.stored_pages >= layout.lower_bound


@given(owners=owner_lists, capacity=capacities, existing=page_lists)
def test_layout_stores_each_block_once_on_the_fewest_pages(
    owners: list[frozenset[int]], capacity: int, existing: list[frozenset[int]]
) -> None:
    layout = pack(owners, capacity, existing=existing)
    new = frozenset[int]().union(*owners) - frozenset[int]().union(*existing)
    placed = [block for page in layout.pages for block in page.tolist()]
    assert sorted(placed) == sorted(new)
    assert len(layout.pages) == ceil_div(len(new), capacity)
    assert layout.lower_bound == len(existing) + len(layout.pages)


@given(owners=owner_lists, capacity=capacities)
def test_reads_lie_between_the_bounds(owners: list[frozenset[int]], capacity: int) -> None:
    layout = pack(owners, capacity)
    assert layout.least_reads.tolist() == [ceil_div(len(owned), capacity) for owned in owners]
    for owned, reads, least in zip(owners, layout.page_reads, layout.least_reads, strict=True):
        assert least <= reads <= min(len(owned), layout.stored_pages)


@given(data=st.data(), owners=owner_lists, algorithm=algorithms)
def test_sizes_are_kept_within_the_capacity(
    data: st.DataObject, owners: list[frozenset[int]], algorithm: Algorithm
) -> None:
    ids = sorted(frozenset[int]().union(*owners))
    capacity = data.draw(st.integers(20, 60))
    sizes = {block: data.draw(st.integers(1, 20)) for block in ids}
    layout = pack(owners, capacity, sizes=sizes, algorithm=algorithm)
    layout.check(owners, sizes=sizes)
    assert layout.lower_bound >= ceil_div(sum(sizes.values()), capacity)
    for page in layout.pages:
        assert sum(sizes[block] for block in page.tolist()) <= capacity
    if algorithm == "layout":
        # First fit leaves no two pages that would fit into one.
        most = ceil_div(2 * sum(sizes.values()), capacity)
        assert len(layout.pages) <= max(layout.lower_bound + 1, most)


@given(
    owners=owner_lists, capacity=capacities, algorithm=algorithms, seed=st.integers(0, 2**32 - 1)
)
def test_the_form_of_the_input_does_not_matter(
    owners: list[frozenset[int]], capacity: int, algorithm: Algorithm, seed: int
) -> None:
    expected = contents(pack(owners, capacity, algorithm=algorithm))
    assert contents(pack(owners, capacity, algorithm=algorithm)) == expected
    random = np.random.default_rng(seed)
    shuffled = [random.permutation(np.array(sorted(owned), np.int64)) for owned in owners]
    assert contents(pack(shuffled, capacity, algorithm=algorithm)) == expected
    ids = np.concatenate([np.empty(0, np.int64), *shuffled])
    indptr = np.array([0, *itertools.accumulate(len(owned) for owned in owners)])
    assert contents(pack((indptr, ids), capacity, algorithm=algorithm)) == expected
    # Ids are names: a monotone renaming renames the layout.
    pages, reads = contents(
        pack(
            [{7 * block + 3 for block in owned} for owned in owners], capacity, algorithm=algorithm
        )
    )
    assert (pages, reads) == ([[7 * b + 3 for b in page] for page in expected[0]], expected[1])


@given(data=st.data(), owners=owner_lists, capacity=capacities)
def test_the_order_of_models_changes_no_page_count(
    data: st.DataObject, owners: list[frozenset[int]], capacity: int
) -> None:
    order = data.draw(st.permutations(range(len(owners))))
    layout = pack([owners[model] for model in order], capacity)
    layout.check([owners[model] for model in order])
    plain = pack(owners, capacity)
    assert layout.stored_pages == plain.stored_pages
    assert layout.least_reads.tolist() == [plain.least_reads[model] for model in order]


@given(owners=owner_lists, capacity=capacities, algorithm=algorithms)
def test_packing_again_on_top_of_a_layout_adds_nothing(
    owners: list[frozenset[int]], capacity: int, algorithm: Algorithm
) -> None:
    first = pack(owners, capacity, algorithm=algorithm)
    again = pack(owners, capacity, algorithm=algorithm, existing=first.pages)
    again.check(owners, first.pages)
    assert again.pages == []
    if algorithm == "layout":
        assert contents(again)[1] == contents(first)[1]
