# SPDX-License-Identifier: Apache-2.0
"""The paper's algorithms against the same algorithms on Python sets, and `layout` against trying
every placement: same pages, same reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.packing import Algorithm, pack

Owners = list[frozenset[int]]
Pages = list[list[int]]
Reads = list[list[int]]

owner_lists = st.lists(st.frozensets(st.integers(0, 40), max_size=30), max_size=6)


def batched(blocks: list[int], count: int) -> Iterator[list[int]]:
    """itertools.batched of Python 3.12."""
    for start in range(0, len(blocks), count):
        yield blocks[start : start + count]


def sharers_of(owners: Owners) -> dict[int, int]:
    blocks = frozenset[int]().union(*owners)
    return {block: sum(block in owned for owned in owners) for block in blocks}


def classes_of(owners: Owners) -> list[tuple[frozenset[int], list[int]]]:
    """Owner set and blocks of each class, in order of the first block."""
    classes: dict[frozenset[int], list[int]] = {}
    for block in sorted(frozenset[int]().union(*owners)):
        models = frozenset(m for m, owned in enumerate(owners) if block in owned)
        classes.setdefault(models, []).append(block)
    return list(classes.items())


class Cover:
    """Covers models with pages inside them, then with new ones."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: Pages = []

    def cover(self, owned: frozenset[int], sharers: dict[int, int] | None) -> list[int]:
        rest = set(owned)
        inner = [n for n, page in enumerate(self.pages) if owned.issuperset(page)]
        full = [n for n in inner if len(self.pages[n]) == self.capacity]
        used = []
        for number in full:
            if rest.issuperset(self.pages[number]):
                used.append(number)
                rest.difference_update(self.pages[number])
        partial = [n for n in inner if n not in full]
        for number in sorted(partial, key=lambda n: -len(self.pages[n])):
            page = self.pages[number]
            saves = -(-(len(rest) - len(page)) // self.capacity) < -(-len(rest) // self.capacity)
            if rest.issuperset(page) and saves:
                used.append(number)
                rest.difference_update(page)
        left = sorted(rest)
        if sharers is not None:
            left.sort(key=lambda block: -sharers[block])
        for page in batched(left, self.capacity):
            used.append(len(self.pages))
            self.pages.append(page)
        return sorted(used)


def baseline(owners: Owners, capacity: int) -> tuple[Pages, Reads]:
    cover, sharers = Cover(capacity), sharers_of(owners)
    reads = [cover.cover(owned, sharers if m else None) for m, owned in enumerate(owners)]
    return cover.pages, reads


def greedy1(owners: Owners, capacity: int) -> tuple[Pages, Reads]:
    pages: Pages = []
    reads: Reads = [[] for _ in owners]
    for models, blocks in classes_of(owners):
        for page in batched(blocks, capacity):
            for model in models:
                reads[model].append(len(pages))
            pages.append(page)
    return pages, reads


def greedy2(owners: Owners, capacity: int) -> tuple[Pages, Reads]:
    cover, sharers = Cover(capacity), sharers_of(owners)
    reads: Reads = [[] for _ in owners]
    for model in sorted(range(len(owners)), key=lambda m: -len(owners[m])):
        reads[model] = cover.cover(owners[model], sharers)
    return cover.pages, reads


def two_stage(owners: Owners, capacity: int) -> tuple[Pages, Reads]:
    pages: Pages = []
    reads: Reads = [[] for _ in owners]
    placed: set[int] = set()
    for models, blocks in classes_of(owners):
        for page in batched(blocks, capacity):
            if len(page) == capacity:
                for model in models:
                    reads[model].append(len(pages))
                pages.append(page)
                placed.update(page)
    more_pages, more_reads = greedy2([owned - placed for owned in owners], capacity)
    for model, numbers in enumerate(more_reads):
        reads[model] += [len(pages) + number for number in numbers]
    return pages + more_pages, reads


MODELS = {"baseline": baseline, "greedy1": greedy1, "greedy2": greedy2, "two_stage": two_stage}


def test_every_algorithm_has_a_model() -> None:
    assert {*MODELS, "layout"} == set(get_args(Algorithm))


@pytest.mark.parametrize("algorithm", list(MODELS))
@settings(max_examples=150)
@given(owners=owner_lists, capacity=st.integers(1, 9))
def test_exact_cover_packs_as_the_model_does(
    algorithm: Algorithm, owners: Owners, capacity: int
) -> None:
    layout = pack(owners, capacity, algorithm=algorithm)
    pages, reads = MODELS[algorithm](owners, capacity)
    assert [page.tolist() for page in layout.pages] == pages
    assert [numbers.tolist() for numbers in layout.reads] == reads
    assert layout.page_reads.tolist() == [len(numbers) for numbers in reads]


def placements(blocks: list[int], sizes: dict[int, int], capacity: int) -> Iterator[Pages]:
    """Yield every way to put the blocks on pages."""
    if not blocks:
        yield []
        return
    *others, last = blocks
    for pages in placements(others, sizes, capacity):
        for number, page in enumerate(pages):
            if sum(sizes[b] for b in page) + sizes[last] <= capacity:
                yield [*pages[:number], [*page, last], *pages[number + 1 :]]
        yield [*pages, [last]]


@settings(max_examples=60)
@given(data=st.data(), by_bytes=st.booleans())
def test_layout_is_the_best_of_all_placements(data: st.DataObject, by_bytes: bool) -> None:
    owners = data.draw(st.lists(st.frozensets(st.integers(0, 6)), min_size=1, max_size=4))
    weights = data.draw(st.lists(st.integers(0, 5), min_size=len(owners), max_size=len(owners)))
    blocks = sorted(frozenset[int]().union(*owners))
    capacity = data.draw(st.integers(10, 20) if by_bytes else st.integers(1, 4))
    sizes = {b: data.draw(st.integers(1, 10)) if by_bytes else 1 for b in blocks}
    layout = pack(owners, capacity, sizes=sizes if by_bytes else None, weights=weights)

    def cost(pages: Pages) -> tuple[int, int]:
        readers = [[not owned.isdisjoint(page) for page in pages] for owned in owners]
        return len(pages), sum(w * sum(read) for w, read in zip(weights, readers, strict=True))

    best = min(cost(pages) for pages in placements(blocks, sizes, capacity))
    assert cost([page.tolist() for page in layout.pages]) == best
    assert layout.optimal
