# SPDX-License-Identifier: Apache-2.0
"""Whatever the metric does, what is stored meets the tolerance; where harm adds up, no less would.

Metrics are exact (sums of 64ths) or tables over all states, so that a brute-force model can say
what the search should have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.ingest.accuracy import Choice, Replacement, choose

Arrays = Mapping[str, NDArray[Any]]

SEARCHES = st.sampled_from(["bisect", "step", "halving"])
EVERY = st.none() | st.integers(1, 6)
SIXTYFOURTHS = st.integers(0, 64).map(lambda n: n / 64)


def prepared(levels: Sequence[int], seed: int) -> tuple[dict[str, Any], list[Replacement]]:
    """Blocks of one element whose content is the level they are at, plus 1."""
    rng = np.random.default_rng(seed)
    cut = len(levels) // 2
    weights = {name: np.zeros(n, np.int8) for name, n in (("a", cut), ("b", len(levels) - cut))}
    replacements = []
    for index, count in enumerate(levels):
        name, at = ("a", index) if index < cut else ("b", index - cut)
        contents = tuple(
            lambda value=level + 1: np.array([[value]], np.int8) for level in range(count)
        )
        saved = tuple(range(100, 100 - count, -1))
        place = slice(0, 1), slice(at, at + 1)
        magnitude = float(rng.random())
        replacements.append(
            Replacement(name, *place, contents, saved, magnitude, weights[name].nbytes)
        )
    return weights, replacements


def state_of(arrays: Arrays) -> tuple[int, ...]:
    return tuple(int(value) - 1 for name in ("a", "b") for value in arrays[name])


@st.composite
def runs(draw: st.DrawFn, **fixed: Any) -> tuple[list[int], dict[str, Any], int]:
    levels = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
    options = {
        "search": draw(SEARCHES),
        "every": draw(EVERY),
        "max_evaluations": draw(st.integers(3, 60)),
        **fixed,
    }
    return levels, options, draw(st.integers(0, 2**32))


def checked(
    run: tuple[list[int], dict[str, Any], int], metric: Any, max_drop: float
) -> tuple[Choice, list[tuple[int, ...]]]:
    """Choose, and check what must hold for any metric of a state."""
    levels, options, seed = run
    weights, replacements = prepared(levels, seed)
    states: list[tuple[int, ...]] = []

    def evaluate(arrays: Arrays) -> float:
        states.append(state_of(arrays))
        return float(metric(states[-1]))

    choice = choose(weights, replacements, Accuracy(evaluate, max_drop, **options))
    final, certificate = state_of(weights), choice.certificate
    before = metric((-1,) * len(levels))
    assert final == tuple(choice.levels.tolist())
    assert final in states
    assert before - metric(final) <= max_drop + 1e-12
    assert certificate["metric_before"] == before
    assert certificate["metric_after"] == metric(final)
    assert certificate["evaluations"] == len(states) <= options["max_evaluations"]
    assert certificate["replaced"] == sum(level >= 0 for level in final)
    assert all(level < count for level, count in zip(final, levels, strict=True))
    parts = ("replaced", "refused", "untried")
    assert sum(certificate[part] for part in parts) == len(levels)
    assert all(certificate[part] >= 0 for part in parts)
    if certificate["ended"] == "the evaluations ran out":
        assert certificate["evaluations"] == options["max_evaluations"]
    if certificate["ended"] == "every candidate was tried":
        assert certificate["untried"] == 0
    return choice, states


@given(runs(), st.integers(0, 2**32), SIXTYFOURTHS)
def test_a_metric_without_rhyme_or_reason(
    run: tuple[list[int], dict[str, Any], int], seed: int, max_drop: float
) -> None:
    # Better or worse by chance for each state: neither monotone nor additive.
    def metric(state: tuple[int, ...]) -> float:
        mixed = np.random.default_rng([seed, *(level + 1 for level in state)])
        return float(mixed.integers(0, 65)) / 64

    checked(run, metric, max_drop)


@given(runs(), st.data(), SIXTYFOURTHS)
def test_a_monotone_metric(
    run: tuple[list[int], dict[str, Any], int], data: st.DataObject, max_drop: float
) -> None:
    # Harm comes from pairs: a block that did none alone may do some beside others.
    n = len(run[0])
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2, SIXTYFOURTHS), max_size=20))

    def weight(level: int, count: int) -> float:
        return 0.0 if level < 0 else (count - level) / 4

    def metric(state: tuple[int, ...]) -> float:
        harm = [weight(level, count) for level, count in zip(state, run[0], strict=True)]
        return 8 - sum(cost * harm[i] * harm[j] for i, j, cost in pairs)

    checked(run, metric, max_drop)


@given(
    runs(search="bisect", max_evaluations=100_000),
    st.data(),
    st.integers(0, 40).map(lambda n: n / 64),
)
def test_bisect_where_harm_adds_up(
    run: tuple[list[int], dict[str, Any], int], data: st.DataObject, max_drop: float
) -> None:
    levels = run[0]
    # Negative: sharing makes the metric better. The gentler the level, the smaller the change.
    costs = [data.draw(st.integers(-2, 30)) / 64 for _ in levels]
    table = [
        [cost / 2**level for level in range(count)]
        for cost, count in zip(costs, levels, strict=True)
    ]

    def metric(state: tuple[int, ...]) -> float:
        return 1 - sum(table[i][level] for i, level in enumerate(state) if level >= 0)

    choice, _ = checked(run, metric, max_drop)
    final = choice.levels.tolist()
    drop = 1 - metric(tuple(final))
    for index, (cost, level) in enumerate(zip(costs, final, strict=True)):
        if cost <= 0:
            assert level == 0, "a block that does no harm was refused"
        if min(costs) < 0:
            continue  # refused before others made the metric better
        # Each block is where it is because the next level that saves more did not fit in.
        for other in range(level if level >= 0 else levels[index]):
            without = drop - (table[index][level] if level >= 0 else 0)
            assert without + table[index][other] > max_drop
