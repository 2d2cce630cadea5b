# SPDX-License-Identifier: Apache-2.0
"""The confidence of the accuracy policy: that bounds cover, also after a search that looked often.

Frequencies are compared with what they may be plus four standard errors, on fixed seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.certificates import describe
from pydedup.errors import ArgumentError, EvaluationError
from pydedup.ingest.accuracy import Choice, Replacement, choose
from pydedup.ingest.confidence import Bets, rows_needed, split_rows

Arrays = Mapping[str, NDArray[Any]]


@pytest.mark.parametrize("limit", [0.01, 0.05])
@pytest.mark.parametrize("better", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("n_rows", [500, 3000])
def test_a_mean_drop_at_the_limit_is_seldom_refuted(
    limit: float, better: float, n_rows: int
) -> None:
    rng = np.random.default_rng([int(1000 * limit), int(100 * better), n_rows])
    trials, confidence = 1500, 0.9
    odds = [better, 1 - 2 * better - limit, better + limit]
    refuted = 0
    for _ in range(trials):
        drops = rng.choice([-1.0, 0.0, 1.0], n_rows, p=odds)
        steering, judging = drops[: n_rows // 5], drops[n_rows // 5 :]
        bets = Bets.of(steering, len(judging), limit, 1.0)
        refuted += bets.refutes(judging, limit, confidence)
    assert refuted / trials <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / trials)


@pytest.mark.parametrize("worse", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("steering", [[0.0] * 4, [1.0, 0.0], [-1.0, 0.0, 0.5]])
def test_betting_against_the_truth_wins_nothing_on_average(
    worse: float, steering: list[float]
) -> None:
    # Exactly: over all outcomes of six rows that get worse by 1 or better by a half.
    limit = worse * 1.0 - (1 - worse) * 0.5 if worse > 0.34 else worse
    better = -0.5 if worse > 0.34 else 0.0
    bets = Bets.of(np.array(steering), 6, limit, 1.0)
    mean = 0.0
    for outcome in itertools.product([1.0, better], repeat=6):
        chance = math.prod(worse if drop == 1 else 1 - worse for drop in outcome)
        mean += chance * math.exp(bets.log_capital(np.array(outcome), limit))
    assert mean == pytest.approx(1.0)


def test_a_small_drop_is_shown() -> None:
    rng = np.random.default_rng(1)
    shown = 0
    for _ in range(200):
        drops = rng.choice([-1.0, 0.0, 1.0], 5000, p=[0.004, 0.992, 0.004])
        bets = Bets.of(drops[:1000], 4000, 0.01, 1.0)
        shown += bets.refutes(drops[1000:], 0.01, 0.95)
    assert shown >= 190


def test_the_upper_bound_is_where_refutation_begins() -> None:
    drops = np.repeat([-1.0, 0.0, 1.0], [10, 2000, 20])
    bets = Bets.of(drops[::5], len(drops), 0.02, 1.0)
    bound = bets.upper_bound(drops, 0.95)
    assert drops.mean() < bound < 0.03
    assert bets.refutes(drops, bound + 1e-9, 0.95)
    assert not bets.refutes(drops, bound - 1e-9, 0.95)
    assert bets.upper_bound(drops, 0.99) > bound


def test_bounds_scale_with_the_range_of_scores() -> None:
    drops = np.random.default_rng(0).uniform(-0.1, 0.12, 800)
    one = Bets.of(drops, 800, 0.05, 1.0).upper_bound(drops, 0.95)
    ten = Bets.of(10 * drops, 800, 0.5, 10.0).upper_bound(10 * drops, 0.95)
    assert ten == pytest.approx(10 * one, rel=1e-6)


def test_steering_rows_say_something_by_their_shares() -> None:
    """One that stayed as it was or a hundred suggest the same bet; what counts is who is bet on."""
    one, many = (Bets.of(np.zeros(count), 10, 0.05, 1.0).shares[0] for count in (1, 100))
    assert one == many < Bets.of(np.zeros(1), 1000, 0.05, 1.0).shares[0]


@pytest.mark.parametrize(
    ("limit", "confidence", "span"),
    [(0.01, 0.95, 1), (0.05, 0.9, 1), (0.5, 0.99, 4), (0.9, 0.5, 1)],
)
def test_rows_needed_is_exact_and_near_the_rule_of_three(
    limit: float, confidence: float, span: float
) -> None:
    needed = rows_needed(limit, span, confidence)
    for n_rows, enough in ((needed, True), (needed - 1, False)):
        steering, judging = (len(rows) for rows in split_rows(n_rows, 0)) if n_rows > 1 else (1, 0)
        bets = Bets.of(np.zeros(steering), judging, limit, span)
        assert bets.refutes(np.zeros(judging), limit, confidence) is enough
    assert needed >= math.log(1 - confidence) / math.log(1 - limit / span)
    assert needed <= 2 + 1.7 * math.log(1 - confidence) / math.log(1 - limit / span)


def test_rows_needed_for_very_small_drops_are_counted_and_not_listed() -> None:
    one, other = rows_needed(1e-6, 1.0, 0.95), rows_needed(1e-9, 1.0, 0.95)
    assert other == pytest.approx(1000 * one, rel=0.01)
    assert rows_needed(1e-9, 1e6, 0.95) == pytest.approx(1e6 * other, rel=0.01)
    assert rows_needed(5e-324, 1.0, 0.95) == 1 << 62


def test_a_limit_of_the_whole_range_always_holds() -> None:
    assert rows_needed(1.0, 1.0, 0.95) == 2
    assert Bets.of(np.ones(3), 3, 1.0, 1.0).refutes(np.ones(3), 1.0, 0.95)


def test_rows_are_split_by_the_seed() -> None:
    steering, judging = split_rows(103, 5)
    assert sorted([*steering, *judging]) == list(range(103))
    assert len(steering) == 20
    assert np.array_equal(steering, split_rows(103, 5)[0])
    assert not np.array_equal(steering, split_rows(103, 6)[0])
    assert [len(rows) for rows in split_rows(2, 0)] == [1, 1]


# ---- the search as a whole ----------------------------------------------------------------------


class Population:
    """Validation examples from a population whose true drops are known.

    Each block, once replaced, makes each example that was right wrong with the chance ``harm``,
    and each that was wrong right with the chance ``luck``, independently.
    """

    right = 0.8

    def __init__(self, rng: np.random.Generator, rows: int, blocks: int, harm: float) -> None:
        self.harm, self.luck = harm, harm * self.right / (1 - self.right) / 2
        self.base = rng.random(rows) < self.right
        self.broken = rng.random((blocks, rows)) < harm
        self.mended = rng.random((blocks, rows)) < self.luck
        self.weights: dict[str, NDArray[Any]] = {"w": np.zeros((blocks, 1), np.float32)}
        self.replacements = [
            Replacement(
                "w",
                slice(i, i + 1),
                slice(0, 1),
                (lambda: np.ones((1, 1), np.float32),),
                (4,),
                float(i),
                4 * blocks,
            )
            for i in range(blocks)
        ]

    def evaluate(self, weights: Arrays) -> NDArray[np.float64]:
        on = weights["w"][:, 0] == 1
        kept = self.base & ~self.broken[on].any(0)
        return (kept | (~self.base & self.mended[on].any(0))).astype(np.float64)

    def true_drop(self) -> float:
        count = int(self.weights["w"].sum())
        kept = self.right * (1 - self.harm) ** count
        return self.right - kept - (1 - self.right) * (1 - (1 - self.luck) ** count)

    def choose(self, max_drop: float, **options: Any) -> Choice:
        return choose(self.weights, self.replacements, Accuracy(self.evaluate, max_drop, **options))


@pytest.mark.parametrize("search", ["bisect", "step", "halving"])
def test_what_is_stored_keeps_the_promise_in_the_population(search: str) -> None:
    trials, max_drop, broken, replaced = 150, 0.03, 0, 0
    for seed in range(trials):
        population = Population(np.random.default_rng(seed), 1500, 24, 0.004)
        population.choose(max_drop, confidence=0.9, search=search, seed=seed, every=2)
        broken += population.true_drop() > max_drop
        replaced += int(population.weights["w"].sum())
    assert broken / trials <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / trials)
    assert replaced / trials > 3  # the promise is not kept by doing nothing


def test_without_confidence_the_search_finds_states_that_are_lucky() -> None:
    # What the test above would let through if confidence did nothing.
    broken = 0
    for seed in range(60):
        population = Population(np.random.default_rng(seed), 1500, 24, 0.004)
        population.choose(0.03, every=1, max_evaluations=60)
        broken += population.true_drop() > 0.03
    assert broken > 20


def test_the_certificate_names_the_bound_and_the_rows() -> None:
    population = Population(np.random.default_rng(0), 4000, 24, 0.002)
    certificate = population.choose(0.03, confidence=0.95).certificate
    assert certificate["rows"] == {"all": 4000, "steering": 800, "judging": 3200}
    assert certificate["replaced"] > 0
    assert certificate["metric_drop"] < certificate["bound"] <= 0.03
    assert "with confidence 0.95, of scores from 0 to 1 (" in "\n".join(describe(certificate))


def test_batches_that_are_judged_stay_small() -> None:
    population = Population(np.random.default_rng(0), 2000, 64, 0.0)
    certificate = population.choose(0.03, confidence=0.95).certificate
    assert certificate["replaced"] == 64
    assert certificate["evaluations"] == 2 + 64 // 2 + 1  # of zeros


def test_nothing_replaced_is_no_drop_for_sure() -> None:
    population = Population(np.random.default_rng(0), 2000, 4, 0.5)
    certificate = population.choose(0.01, confidence=0.95).certificate
    assert (certificate["replaced"], certificate["bound"]) == (0, 0.0)


def test_the_judging_rows_end_the_search() -> None:
    # Harmless on the steering rows, harmful on all others: steering would let everything pass.
    population = Population(np.random.default_rng(0), 2000, 8, 0.0)
    population.base[:] = True
    population.broken[:, split_rows(2000, 3)[1]] = True
    # A delta round comes first: what ends it must end the rounds after it, too.
    population.replacements = [
        Replacement(r.tensor, r.rows, r.cols, r.levels * 2, (4, 3), r.magnitude, r.layer_bytes)
        for r in population.replacements
    ]
    calls = 0
    evaluate = population.evaluate

    def counting(weights: Arrays) -> NDArray[np.float64]:
        nonlocal calls
        calls += 1
        return evaluate(weights)

    population.evaluate = counting  # type: ignore[method-assign]
    certificate = population.choose(
        0.05, confidence=0.95, seed=3, finetune=lambda weights, _: pytest.fail("it is over")
    ).certificate
    assert certificate["replaced"] == 0
    assert certificate["ended"] == "the judging examples refused a state"
    assert calls == 3


def test_what_the_steering_rows_refuse_the_others_are_not_asked_about() -> None:
    # They may refuse but once, and then no further block is tried.
    population = Population(np.random.default_rng(0), 2000, 4, 0.0)
    population.base[:] = population.broken[0] = True
    certificate = population.choose(0.05, confidence=0.95, every=1).certificate
    assert population.weights["w"][:, 0].tolist() == [0, 1, 1, 1]
    assert certificate["ended"] == "every candidate was tried"


@pytest.mark.parametrize("worse", [1, 4, 5])
def test_bets_are_chosen_by_the_steering_rows_and_made_on_the_others(worse: int) -> None:
    """Five that got worse are one too many; the best bets in hindsight would let them pass."""
    population = Population(np.random.default_rng(0), 200, 1, 0.0)
    population.base[:] = True
    steering, judging = split_rows(200, 0)
    population.broken[0, judging[:worse]] = True
    drops = population.broken[0].astype(np.float64)
    bets = Bets.of(drops[steering], len(judging), 0.1, 1.0)
    certificate = population.choose(0.1, confidence=0.95).certificate
    assert certificate["replaced"] == bets.refutes(drops[judging], 0.1, 0.95) == (worse < 5)
    if worse < 5:
        assert certificate["bound"] == bets.upper_bound(drops[judging], 0.95) < 0.1


@pytest.mark.parametrize("helps", ["steering", "judging"])
def test_training_is_kept_for_what_it_does_on_the_steering_rows(helps: str) -> None:
    """Those that judge must have no say in what they are to judge."""
    steering, judging = split_rows(400, 0)
    mended = (steering if helps == "steering" else judging)[:20]

    def evaluate(weights: Arrays) -> NDArray[np.float64]:
        scores = np.ones(400)
        scores[mended] = weights["trained"][0]
        return scores

    def finetune(weights: Arrays, _: Arrays) -> Arrays:
        return {**weights, "trained": np.ones(1, np.float32)}

    weights = {"trained": np.zeros(1, np.float32)}
    policy = Accuracy(evaluate, 0.1, confidence=0.95, finetune=finetune)
    assert choose(weights, [], policy).certificate["finetuned"] == (helps == "steering")
    assert weights["trained"][0] == (helps == "steering")


def test_too_few_examples_are_told_how_many_it_takes() -> None:
    needed = rows_needed(0.01, 1.0, 0.95)
    for rows, fits in ((1, False), (needed - 1, False), (needed, True)):
        population = Population(np.random.default_rng(0), rows, 3, 0.0)
        if fits:
            assert population.choose(0.01, confidence=0.95).certificate["replaced"] == 3
            continue
        with pytest.raises(ArgumentError, match=f"at least {needed}.*scored {rows}:"):
            population.choose(0.01, confidence=0.95)


def test_confidence_needs_scores_within_their_range() -> None:
    population = Population(np.random.default_rng(0), 800, 3, 0.0)
    with pytest.raises(EvaluationError, match="a score per validation example"):
        choose(
            population.weights,
            population.replacements,
            Accuracy(lambda _: 0.5, 0.1, confidence=0.9),
        )
    population.broken[:] = True
    for factor, said in ((1.5, "from 0 to 1.5, outside"), (-1.0, "from -1 to -0, outside")):
        policy = Accuracy(lambda w, f=factor: f * population.evaluate(w), 0.1, confidence=0.9)
        with pytest.raises(EvaluationError, match=said):
            choose(population.weights, population.replacements, policy)
