# SPDX-License-Identifier: Apache-2.0
"""The parts of a report against plain arithmetic."""

from __future__ import annotations

from xml.etree import ElementTree as Tree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup.replacement import Trace
from pydedup.report import charts, curves, families
from pydedup.report.detail import NOTHING, picture
from pydedup.report.families import common_blocks
from pydedup.usage import Readers

OWNERS = st.lists(st.frozensets(st.integers(0, 40), max_size=30), max_size=8)


def readers(owners: list[frozenset[int]]) -> Readers:
    def places(number: int) -> NDArray[np.int64]:
        found = np.array(sorted(owners[number]), np.int64)
        return np.concatenate([found, found[:2]])  # with repeats

    return Readers(np.zeros((0, 4), np.int64), places, lambda asked: asked)


@given(OWNERS, st.randoms())
def test_common_blocks_are_those_of_both(owners: list[frozenset[int]], random: object) -> None:
    order = list(range(len(owners)))
    random.shuffle(order)  # type: ignore[attr-defined]
    common = common_blocks(readers(owners), order)
    assert common.readers == tuple(range(len(owners)))
    wanted = [[len(a & b) for b in owners] for a in owners]
    assert common.blocks.tolist() == wanted
    places = np.arange(45)
    counts = [sum(place in one for one in owners) for place in range(45)]
    assert common.others(places).tolist() == [max(count - 1, 0) for count in counts]
    for i, mine in enumerate(owners):
        shares = [len(mine & other) / max(len(mine), 1) for other in owners]
        assert common.shares[i].tolist() == pytest.approx(shares)


def test_what_is_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = [frozenset(range(10)), frozenset(range(10)), frozenset(range(5))]
    monkeypatch.setattr(families, "MOST_BLOCKS", 16)
    assert common_blocks(readers(owners), [1, 2, 0]).readers == (1, 2)
    # One is always looked at, however large.
    monkeypatch.setattr(families, "MOST_BLOCKS", 3)
    assert common_blocks(readers(owners), [1, 2, 0]).readers == (1,)
    monkeypatch.setattr(families, "MOST_MODELS", 2)
    monkeypatch.setattr(families, "MOST_BLOCKS", 100)
    assert common_blocks(readers(owners), [2, 0, 1]).readers == (0, 2)


@given(OWNERS, st.integers(1, 8))
def test_families_are_groups_of_all_models(owners: list[frozenset[int]], most: int) -> None:
    blocks = common_blocks(readers(owners), range(len(owners))).blocks
    groups = families.families(blocks, most)
    assert sorted(number for group in groups for number in group) == list(range(len(owners)))
    if len(owners) <= most:
        assert all(len(group) == 1 for group in groups)
    for group in groups:  # nobody is in a family with which it has nothing in common
        if len(group) > 1:
            assert all(any(blocks[i, j] for j in group if j != i) for i in group)
    if len(groups) > max(most, 1):
        for at, group in enumerate(groups):
            others = [j for k, other in enumerate(groups) if k != at for j in other]
            assert not blocks[np.ix_(group, others)].any()


def test_families_come_together() -> None:
    a, b = frozenset(range(20)), frozenset(range(100, 120))
    owners = [a, b, a | {50}, b | {51}, a | {52}, b - {100}]
    blocks = common_blocks(readers(owners), range(6)).blocks
    assert sorted(map(sorted, families.families(blocks, 2))) == [[0, 2, 4], [1, 3, 5]]
    order = [group[0] % 2 for group in families.families(blocks, 6)]
    assert order in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


@settings(max_examples=50)
@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_a_picture_has_room_for_all_and_shows_what_is_frequent(
    rows: int, cols: int, seed: int
) -> None:
    kinds = np.random.default_rng(seed).integers(0, 6, (rows, cols)).astype(np.uint8)
    cells = picture(kinds, 48, 12)
    assert cells.shape[0] <= 12
    assert cells.shape[1] <= 48
    assert (cells.size == 0) == (kinds.size == 0)
    if kinds.size and rows <= 12 and cols <= 48:
        assert np.array_equal(cells, kinds)
    elif rows * cols <= 400 and cols < 24:  # laid in columns: nothing is lost
        shown = np.bincount(cells[cells != NOTHING], minlength=6)
        assert shown.tolist() == np.bincount(kinds.ravel(), minlength=6).tolist()
    one = np.full((rows, cols), 4, np.uint8)
    assert set(np.unique(picture(one, 48, 12)).tolist()) <= {4, NOTHING}


@pytest.mark.parametrize("most", [1, 2, 5, 9, 10, 11, 49, 51, 99, 100, 101, 12345])
def test_ticks_are_few_whole_and_reach_the_top(most: int) -> None:
    ticks = charts._whole_ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most > ticks[-2]
    assert 2 <= len(ticks) <= 11


def test_a_chart_is_well_formed_whatever_a_label_holds() -> None:
    label = "</text><script>&\"'\x1b[31m\u202e\x00"
    chart = charts.heat_map(
        [label, "b" * 80],
        np.array([[1.0, 0.004], [0.5, 1.0]]),
        lambda i, j: f"{label} {i} {j}",
        diagonal=[False, False],
        title=label,
        summary=label,
    )
    root = Tree.fromstring(chart)
    assert {element.tag for element in root.iter()} == {"svg", "text", "title", "rect"}
    texts = [element.text for element in root.iter("text")]
    assert "<1" in texts
    assert all(character.isprintable() for text in texts for character in text or "")
    assert max(len(text or "") for text in texts) == 28


def test_a_long_trace_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1000
    trace = Trace(
        np.arange(n) % 7, np.full(n, 100, np.uint32), np.ones(n, np.uint32), np.array([1])
    )
    whole = curves.miss_curves(trace)
    assert (whole.replayed, whole.pages, whole.page_bytes) == (n, 7, 700)
    assert whole.ratios["lru"][-1] == pytest.approx(7 / n)
    assert (whole.memory[0], whole.memory[-1]) == (100, 700)
    monkeypatch.setattr(curves, "_FIRST_USES", 60)
    assert curves.miss_curves(trace).replayed == n  # it is fast enough for all of it
    monkeypatch.setattr(curves, "_SECONDS", 0.0)
    cut = curves.miss_curves(trace)
    assert (cut.replayed, cut.uses) == (60, n)
    assert cut.ratios["lru"][-1] == pytest.approx(7 / 60)
    nothing = np.empty(0, np.int64)
    empty = Trace(nothing, nothing.astype(np.uint32), nothing.astype(np.uint32), nothing)
    assert curves.miss_curves(empty).memory == ()


def test_a_bar_of_one_page_is_told_in_the_singular() -> None:
    """It was 1 pages."""
    bars = charts.histogram([0, 1, 2], ["a", "b", "c"], title="", summary="", noun="page")
    titles = [one.text for one in Tree.fromstring(bars).iter("title")]
    assert titles == ["a: 0 pages", "b: 1 page", "c: 2 pages"]
