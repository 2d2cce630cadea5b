# SPDX-License-Identifier: Apache-2.0
"""Searches for how many blocks may be replaced, and `choose` on metrics that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.certificates import describe
from pydedup.errors import ArgumentError
from pydedup.ingest.accuracy import Choice, Replacement, choose
from pydedup.ingest.searches import bisect, halving, step

Arrays = Mapping[str, NDArray[Any]]


class Additive:
    """An ``attempt`` whose harm adds up."""

    def __init__(self, costs: Sequence[float], tolerance: float) -> None:
        self.costs, self.tolerance = costs, tolerance
        self.kept: list[int] = []
        self.calls = 0

    def __call__(self, batch: Sequence[int]) -> bool:
        self.calls += 1
        if sum(self.costs[i] for i in [*self.kept, *batch]) > self.tolerance:
            return False
        self.kept += batch
        return True


@pytest.mark.parametrize("where", [0, 1, 500, 640, 1023])
def test_one_bad_block_costs_a_logarithm_and_is_refused_alone(where: int) -> None:
    attempt = Additive([float(i == where) for i in range(1024)], 0.5)
    assert list(bisect(range(1024), attempt, 128, 1024)) == [where]
    assert sorted(attempt.kept) == [i for i in range(1024) if i != where]
    # At most: batches that grow to 512, 9 halvings of it, and batches that grow again.
    assert attempt.calls <= 4 + math.ceil(math.log2(512)) + 9


def test_bisect_fills_the_tolerance_in_order() -> None:
    attempt = Additive([3.0, 4.0, 5.0, 1.0, 0.0, 2.0], 8.0)
    assert list(bisect(range(6), attempt, 2, 6)) == [2, 5]
    assert sorted(attempt.kept) == [0, 1, 3, 4]


def test_bisect_where_all_is_bad_costs_little_more_than_one_each() -> None:
    attempt = Additive([1.0] * 300, 0.5)
    assert list(bisect(range(300), attempt, 64, 300)) == list(range(300))
    assert attempt.calls <= 300 + 30


def test_steps_stop_at_the_first_bad_batch() -> None:
    attempt = Additive([0.0] * 12 + [9.0] + [0.0] * 50, 1.0)
    assert list(step(range(63), attempt, 5, 63)) == [10, 11, 12, 13, 14]
    assert attempt.kept == list(range(10))
    assert attempt.calls == 3


@pytest.mark.parametrize("bad", [0, 1, 2, 31, 32, 63])
def test_halving_keeps_all_before_the_first_bad_block(bad: int) -> None:
    attempt = Additive([float(i >= bad) for i in range(64)], 0.5)
    assert list(halving(range(64), attempt, 1, 64)) == [bad]
    assert attempt.kept == list(range(bad))
    assert attempt.calls <= 2 * 7 + 6


@pytest.mark.parametrize("search", [step, bisect, halving])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_searches_reach_every_harmless_block(search: Any, count: int) -> None:
    attempt = Additive([0.0] * count, 0.0)
    assert list(search(range(count), attempt, 3, max(count, 1))) == []
    assert attempt.kept == list(range(count))


# ---- choose -------------------------------------------------------------------------------------


class Model:
    """Rows of a matrix are blocks; an element's distance from 0 costs what its row costs."""

    def __init__(self, costs: Sequence[float], gentle: Sequence[float] = ()) -> None:
        self.costs = np.asarray(costs, np.float64)
        n = len(costs)
        self.weights: dict[str, NDArray[Any]] = {
            "w": np.zeros((n, 2), np.float32),
            "bias": np.arange(3, dtype=np.float32),
        }
        self.weights["w"][:, 1] = 2
        contents = (1.0, *gentle)
        self.replacements = [
            Replacement(
                "w",
                slice(i, i + 1),
                slice(0, 2),
                tuple(content(value) for value in contents),
                tuple(100 - 10 * k for k in range(len(contents))),
                float(i),
                8 * n,
            )
            for i in range(n)
        ]
        self.evaluated: list[NDArray[np.float32]] = []

    def evaluate(self, weights: Arrays) -> float:
        self.evaluated.append(weights["w"][:, 0].copy())
        return float(0.9 - weights["w"][:, 0].astype(np.float64) @ self.costs)

    def choose(self, max_drop: float = 0.05, **options: Any) -> Choice:
        return choose(self.weights, self.replacements, Accuracy(self.evaluate, max_drop, **options))


def content(value: float) -> Callable[[], NDArray[Any]]:
    return lambda: np.array([[value, 2]], np.float32)


def test_a_refused_block_gets_the_next_level() -> None:
    model = Model([0.001, 1.0, 0.001, 0.1, 0.001], gentle=(0.4, 0.01))
    choice = model.choose(0.08)
    # 1.0 and 0.1 are too much to share; of 0.1, 0.4 is not; of 1.0 it is, and 0.01 remains.
    assert choice.levels.tolist() == [0, 2, 0, 1, 0]
    certificate = choice.certificate
    assert certificate["metric_drop"] == pytest.approx(0.003 + 0.04 + 0.01)
    assert certificate["levels"] == [3, 1, 1]
    assert (certificate["replaced"], certificate["shared"]) == (5, 3)
    assert certificate["saved"] == 3 * 100 + 90 + 80
    assert model.weights["w"][:, 0] == pytest.approx([1, 0.01, 1, 0.4, 1])
    assert model.weights["bias"].tolist() == [0, 1, 2]


def test_deltas_for_all_come_before_sharing_eats_the_tolerance() -> None:
    model = Model([0.01] * 20, gentle=(0.01,))
    choice = model.choose(0.1)
    # Ten shared blocks would be the whole tolerance, and leave the other ten as they are.
    assert choice.levels.tolist() == [0] * 9 + [1] * 11


def test_small_errors_come_first_and_in_ascending_order() -> None:
    model = Model([1.0] * 16, gentle=(0.03, 0.005, 0.001))
    model.replacements = [
        replace(r, errors=(0.0005 if i == 3 else 0.5, 0.03, 0.005, 0.001))
        for i, r in enumerate(model.replacements)
    ]
    # What is that near is shared at once, sharing anything else is too much.
    model.costs[3] = 0.001
    choice = model.choose(0.5)
    assert choice.levels.tolist() == [1] * 3 + [0] + [1] * 12
    assert model.evaluated[2][3] == 1
    assert np.delete(model.evaluated[2], 3) == pytest.approx(0.001)
    for value in (0.005, 0.03):  # in batches, of what all had before
        first = next(state for state in model.evaluated if (state == np.float32(value)).any())
        assert (first == np.float32(value)).sum() == 2
        assert len(set(first.tolist())) == 3


def test_errors_that_are_too_large_wait_for_the_rounds_of_batches() -> None:
    model = Model([0.01] * 40)
    model.replacements = [replace(r, errors=(0.2,)) for r in model.replacements]
    model.choose(1.0)
    assert (model.evaluated[2] == 1).sum() == 5  # an eighth


def test_what_was_stored_was_evaluated() -> None:
    model = Model(np.random.default_rng(0).uniform(0, 0.02, 40).tolist(), gentle=(0.1,))
    choice = model.choose(0.1)
    final = model.weights["w"][:, 0]
    assert any(np.array_equal(final, state) for state in model.evaluated)
    assert choice.certificate["evaluations"] == len(model.evaluated)
    assert choice.certificate["metric_after"] == pytest.approx(
        0.9 - final.astype(np.float64) @ model.costs
    )


@pytest.mark.parametrize("search", ["step", "bisect", "halving"])
def test_a_tolerance_that_nothing_meets_replaces_nothing(search: str) -> None:
    model = Model([1.0] * 6, gentle=(0.5,))
    choice = model.choose(0.05, search=search)
    assert (choice.levels == -1).all()
    assert not model.weights["w"][:, 0].any()
    certificate = choice.certificate
    assert certificate["replaced"] == 0
    assert certificate["metric_drop"] == 0
    assert certificate["largest_block_error"] == 0
    assert any("0 of 6" in line for line in describe(certificate))


def test_the_number_of_evaluations_is_bounded_and_the_rest_stays() -> None:
    model = Model([1.0, 0.0] * 500)
    choice = model.choose(0.5, max_evaluations=40)
    certificate = choice.certificate
    assert certificate["evaluations"] == len(model.evaluated) == 40
    assert certificate["ended"] == "the evaluations ran out"
    assert certificate["replaced"] + certificate["refused"] + certificate["untried"] == 1000
    assert certificate["refused"] > 0
    assert certificate["untried"] > 0
    assert model.weights["w"][:, 0] @ model.costs == 0


def test_training_is_not_asked_for_when_nothing_is_left_to_evaluate_it() -> None:
    model, trained = Model([0.0, 0.0]), []

    def finetune(weights: Arrays, _: Arrays) -> Arrays:
        trained.append(True)
        return {name: array + 1 for name, array in weights.items()}

    certificate = model.choose(0.5, max_evaluations=3, finetune=finetune).certificate
    assert certificate["evaluations"] == len(model.evaluated) == 3
    assert not trained


def test_a_fruitless_round_leaves_evaluations_for_the_next() -> None:
    costs = [1.0] * 200
    model = Model(costs, gentle=(0.5, 0.0))
    choice = model.choose(0.1, max_evaluations=50)
    assert (choice.levels == 2).all()


def test_a_fruitless_round_of_sharing_leaves_evaluations_for_deltas() -> None:
    model = Model([0.1] * 60, gentle=(0.5, 0.0))
    choice = model.choose(0.06, max_evaluations=30)
    assert sorted(choice.levels.tolist()) == [1] + [2] * 59


@pytest.mark.parametrize(("most", "shared"), [(90, 20), (40, 11)])
def test_evaluations_that_later_rounds_do_not_need_go_to_sharing(most: int, shared: int) -> None:
    # All become deltas at once, so nothing follows the round of sharing. It ended at half of the
    # evaluations, of which a certificate said that they ran out.
    model = Model([1.0, 0.0] * 20, gentle=(0.0,))
    choice = model.choose(0.5, max_evaluations=most)
    certificate = choice.certificate
    assert (choice.levels == 0).sum() == shared
    assert all(choice.levels[::2] == 1)
    assert certificate["evaluations"] == len(model.evaluated)
    ran_out = certificate["ended"] == "the evaluations ran out"
    assert ran_out == (certificate["evaluations"] == most) == (shared < 20)


def test_a_fruitless_round_of_sharing_leaves_evaluations_for_training() -> None:
    model, trained = Model([1.0] * 60), []

    def finetune(weights: Arrays, _: Arrays) -> Arrays:
        trained.append(True)
        return dict(weights)

    model.choose(0.1, max_evaluations=30, finetune=finetune)
    assert trained


@pytest.mark.parametrize(("blocks", "batch"), [(10, 5), (320, 10)])
def test_steps_are_of_five_blocks_or_one_in_32(blocks: int, batch: int) -> None:
    model = Model([0.0] * blocks)
    model.choose(0.5, search="step")
    shared = [int(state.sum()) for state in model.evaluated[2:-1]]  # the last one is of zeros
    assert shared == list(range(batch, blocks + 1, batch))


def test_nothing_is_evaluated_in_vain() -> None:
    # What is too much at the gentlest level is not tried at those in between, and a level that a
    # block has already is not tried again.
    model = Model([1.0, 0.0, 1.0], gentle=(0.5, 0.25))
    assert model.choose(0.1).levels.tolist() == [-1, 0, -1]
    assert not any((state == 0.5).any() for state in model.evaluated)
    model = Model([1.0, 1.0], gentle=(0.0,))
    assert model.choose(0.1).levels.tolist() == [1, 1]
    # Twice as it was, all as deltas, and each shared.
    assert len(model.evaluated) == 5


def test_the_paper_s_order_is_by_layer_then_magnitude() -> None:
    seen: list[tuple[str, int]] = []
    weights: dict[str, NDArray[Any]] = {
        "small": np.zeros((2, 1), np.float32),
        "large": np.zeros((3, 1), np.float32),
    }

    def one(tensor: str, row: int, magnitude: float) -> Replacement:
        def level() -> NDArray[Any]:
            if weights[tensor][row] == 0:
                seen.append((tensor, row))
            return np.ones((1, 1), np.float32)

        place = slice(row, row + 1), slice(0, 1)
        return Replacement(tensor, *place, (level,), (1,), magnitude, weights[tensor].nbytes)

    replacements = [
        one("small", 0, 0.1),
        one("large", 0, 0.9),
        one("large", 1, 0.2),
        one("small", 1, 0.0),
        one("large", 2, 0.5),
    ]
    choose(weights, replacements, Accuracy(lambda _: 1.0, 0.0, every=1))
    assert seen == [("large", 1), ("large", 2), ("large", 0), ("small", 1), ("small", 0)]


def test_saliency_orders_by_its_mean_over_each_block() -> None:
    def chosen(saliency: Any) -> list[int]:
        model = Model([0.01] * 4)
        return model.choose(0.01, order="saliency", saliency=saliency, every=1).levels.tolist()

    values = np.array([[3, -3], [0, 2], [5, 0], [1, 1.5]], np.float32)
    assert chosen({"w": values}) == [-1, 0, -1, -1]
    assert chosen(lambda weights: {"w": values[::-1] + 0 * weights["w"]}) == [-1, -1, 0, -1]


def test_the_mean_saliency_of_a_small_block_counts_as_much_as_that_of_a_large_one() -> None:
    weights = {"w": np.zeros((3, 1), np.float32)}
    seen: list[int] = []

    def part(rows: slice) -> Replacement:
        def level() -> NDArray[Any]:
            seen.append(rows.start)
            return np.ones((rows.stop - rows.start, 1), np.float32)

        return Replacement("w", rows, slice(0, 1), (level,), (1,), 0.0, 12)

    saliency = {"w": np.array([[2], [2], [3]], np.float32)}
    policy = Accuracy(lambda _: 1.0, 0.0, every=1, order="saliency", saliency=saliency)
    choose(weights, [part(slice(2, 3)), part(slice(0, 2))], policy)
    assert seen == [0, 2]


@pytest.mark.parametrize(
    ("saliency", "said"),
    [
        ({}, "no tensor 'w'"),
        ({"w": np.zeros((3, 2))}, "shape"),
        ({"w": np.full((4, 2), np.nan)}, "NaN"),
    ],
)
def test_saliency_must_fit(saliency: Arrays, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Model([0.0] * 4).choose(order="saliency", saliency=saliency)


def test_equal_arguments_choose_equally() -> None:
    costs = np.random.default_rng(3).uniform(0, 0.01, 60).tolist()
    first, second = (Model(costs, gentle=(0.3, 0.1)).choose(0.05) for _ in range(2))
    assert first.levels.tolist() == second.levels.tolist()
    assert first.certificate == second.certificate


def test_the_certificate_is_json_and_reads_well() -> None:
    certificate = Model([0.004] * 6, gentle=(0.1,)).choose(0.01).certificate
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    text = "\n".join(describe(certificate))
    assert "metric 0.9 before" in text
    assert "search bisect by magnitude" in text


def test_the_certificate_in_words_has_the_parameters() -> None:
    """Which the promise rests on; only its document had them all."""
    model = Model([0.004] * 6)
    given = model.choose(0.01, search="step", every=5, max_rel_error=0.2, max_evaluations=7, seed=3)
    assert any(
        line.startswith("search step by magnitude, every 5 blocks, replacements within 0.2, ")
        and "of at most 7 evaluations, seed 3; " in line
        for line in describe(given.certificate)
    )


def test_an_early_certificate_is_read() -> None:
    """It does not name all parameters."""
    whole = Model([0.004] * 6).choose(0.01).certificate
    early = {key: whole[key] for key in whole.keys() - {"max_rel_error", "score_range"}}
    before, after = ("\n".join(describe(one)) for one in (whole, early))
    assert "replacements within 0.25, " in before
    assert after == before.replace("replacements within 0.25, ", "")


def test_the_largest_error_is_that_of_the_worst_replaced_block() -> None:
    weights = {"w": np.array([[3, 4], [0, 0], [6, 8]], ml_dtypes.bfloat16)}
    contents = [[3.0, 5.0], [0.0, 0.0], [60.0, 8.0]]
    replacements = [
        Replacement(
            "w",
            slice(i, i + 1),
            slice(0, 2),
            (lambda row=row: np.array([row], ml_dtypes.bfloat16),),
            (1,),
            0.0,
            12,
        )
        for i, row in enumerate(contents)
    ]

    def evaluate(arrays: Arrays) -> float:
        return -float(arrays["w"].astype(np.float32)[2, 0] > 10)

    choice = choose(weights, replacements, Accuracy(evaluate, 0.5))
    assert choice.levels.tolist() == [0, 0, -1]
    assert choice.certificate["largest_block_error"] == pytest.approx(1 / 5)


def test_no_candidates_is_no_error() -> None:
    choice = choose({"w": np.ones((2, 2))}, [], Accuracy(lambda _: 0.5, 0.0))
    assert choice.levels.tolist() == []
    assert choice.certificate["ended"] == "there was nothing to replace"
    assert choice.certificate["bound"] is None
    assert describe(choice.certificate)


def test_tensors_of_any_rank_are_given_in_their_own_shape() -> None:
    weights: dict[str, NDArray[Any]] = {
        "conv": np.zeros((4, 3, 2, 2), np.float32),
        "line": np.zeros(8, np.float32),
        "scalar": np.zeros((), np.float32),
    }
    places = {"conv": (slice(2, 4), slice(3, 9)), "line": (slice(0, 1), slice(4, 8)),
              "scalar": (slice(0, 1), slice(0, 1))}  # fmt: skip
    replacements = [
        Replacement(
            name,
            *place,
            (
                lambda r=place[0], c=place[1]: np.ones(
                    (r.stop - r.start, c.stop - c.start), np.float32
                ),
            ),
            (1,),
            0.0,
            weights[name].nbytes,
        )
        for name, place in places.items()
    ]
    shapes: set[tuple[int, ...]] = set()

    def evaluate(arrays: Arrays) -> float:
        shapes.update(array.shape for array in arrays.values())
        return 1.0

    choose(weights, replacements, Accuracy(evaluate, 0.0))
    assert shapes == {(4, 3, 2, 2), (8,), ()}
    assert weights["conv"].sum() == 12
    assert weights["conv"].reshape(4, 12)[2:, 3:9].all()
    assert weights["line"].tolist() == [0] * 4 + [1] * 4
    assert weights["scalar"] == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (np.ones((2, 2), np.float32), "is float32"),
        (np.ones((1, 2), np.float64), "is float64"),
    ],
)
def test_a_level_must_fit_its_block(bad: NDArray[Any], said: str) -> None:
    model = Model([0.0])
    only = model.replacements[0]
    model.replacements[0] = Replacement(
        only.tensor, only.rows, only.cols, (lambda: bad,), (1,), 0.0, 8
    )
    with pytest.raises(ArgumentError, match=said):
        model.choose()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tensor": "other"}, "names the tensor 'other', which is not there"),
        ({"rows": slice(1, 1)}, "an empty block"),
        ({"levels": ()}, "has no level"),
    ],
)
def test_a_replacement_must_be_of_a_block_that_is_there(changed: Any, said: str) -> None:
    model = Model([0.0])
    model.replacements[0] = replace(model.replacements[0], **changed)
    with pytest.raises(ArgumentError, match=said):
        model.choose()


def test_working_copies_must_be_such() -> None:
    fixed = np.zeros((4, 4), np.float32)
    fixed.flags.writeable = False
    for array in (np.zeros((4, 4), np.float32)[:, ::2], fixed):
        with pytest.raises(ArgumentError, match="copy of 'w' must be C-contiguous and writeable"):
            choose({"w": array}, [], Accuracy(lambda _: 1.0, 0.0))
