# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo, on small made-up data: reading, training, and checks that can say no."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file

pytest.importorskip("torch")

import torch

import pydedup
from pydedup.demo import models, run, show, train
from pydedup.demo.checks import compare_outputs, differing_tensors
from pydedup.demo.data import Bags, Split, Task, WordVectors, encode, predict_all
from pydedup.demo.models import Spec, base_table, build, embedding
from pydedup.errors import PydedupError

WORDS = ("do", "n't", "'s", "good", "bad", "film", "!", "it", "2")


def bags_of(lists: list[list[int]]) -> Bags:
    lengths = [0, *(len(item) for item in lists[:-1])]
    return Bags(
        np.array([row for item in lists for row in item], np.int64),
        np.cumsum(lengths).astype(np.int64),
    )


def lists_of(bags: Bags) -> list[list[int]]:
    return [part.tolist() for part in np.split(bags.ids, bags.offsets[1:])]


# ---- text ---------------------------------------------------------------------------------------


def test_text_becomes_rows_of_known_words() -> None:
    vectors = WordVectors(
        {word: row for row, word in enumerate(WORDS)}, np.zeros((len(WORDS), 2), np.float32)
    )
    found = encode(["Don\u2019t!<br />GOOD film", "", "it's a 2"], vectors)
    words = [[WORDS[row] for row in bag] for bag in lists_of(found)]
    assert words == [["do", "n't", "!", "good", "film"], [], ["it", "'s", "2"]]


def test_selected_bags_keep_their_words_in_any_order() -> None:
    lists = [[1, 2, 3], [], [4], [5, 6]]
    bags = bags_of(lists)
    assert lists_of(bags.select(np.array([3, 0, 1, 1]))) == [[5, 6], [1, 2, 3], [], []]


def test_padded_batches_hold_every_text_once() -> None:
    lists = [[7] * length for length in (5, 1, 0, 3, 2, 9)]
    seen = []
    for rows, ids in bags_of(lists).padded_batches(4, pad=99):
        for row, words in zip(rows, ids, strict=True):
            seen.append(row)
            assert [word for word in words if word != 99] == lists[row]
    assert sorted(seen) == list(range(len(lists)))


def test_predictions_come_back_in_the_order_of_the_texts() -> None:
    lists = [[3] * length for length in (5, 1, 4, 2)]
    outputs = predict_all(
        lambda ids: (ids != -1).sum(axis=1, keepdims=True).astype(np.float32), bags_of(lists), 1, -1
    )
    assert outputs[:, 0].tolist() == [5, 1, 4, 2]


# ---- checks -------------------------------------------------------------------------------------


def test_equal_outputs_agree_and_a_shifted_one_does_not() -> None:
    outputs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    rounded = outputs + np.float32(1e-6)
    assert compare_outputs(outputs, rounded).agrees
    wrong = outputs.copy()
    wrong[7, 1] += 1e-3
    assert not compare_outputs(outputs, wrong).agrees


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_never_agree(bad: float) -> None:
    outputs = np.zeros((4, 2), np.float32)
    wrong = outputs.copy()
    wrong[1, 1] = bad
    assert not compare_outputs(outputs, wrong).agrees
    assert not compare_outputs(outputs, outputs[:3]).agrees


def test_another_class_is_forgiven_only_for_a_tie() -> None:
    expected = np.array([[0.0, 1e-6], [2.0, 1.0]], np.float32)
    tied = np.array([[1e-6, 0.0], [2.0, 1.0]], np.float32)
    found = compare_outputs(expected, tied)
    assert (found.same_class, found.ties, found.agrees) == (1, 1, True)
    swapped = expected[:, ::-1]
    assert not compare_outputs(expected, swapped).agrees


def test_tensors_are_compared_by_their_bits() -> None:
    original: dict[str, NDArray[Any]] = {
        "a": np.array([0.0, np.nan], np.float32),
        "b": np.array(3, np.int8),
    }
    same = {name: array.copy() for name, array in original.items()}
    assert differing_tensors(original, same) == []
    negative = same | {"a": np.array([-0.0, np.nan], np.float32)}
    assert differing_tensors(original, negative) == ["a"]
    assert differing_tensors(original, {"a": same["a"]}) == ["b"]
    assert differing_tensors(original, same | {"c": same["b"]}) == ["c"]
    assert differing_tensors(original, same | {"b": np.array([3], np.int8)}) == ["b"]


# ---- training -----------------------------------------------------------------------------------

FROZEN = Spec("frozen@1", "toy", epochs=3, batch=4, rate=1e-2, row_rate=0.0, seed=1)
TUNED = Spec("tuned@1", "toy", epochs=3, batch=4, rate=1e-2, row_rate=0.1, seed=2)
FURTHER = Spec(
    "tuned@2", "toy", epochs=1, batch=4, rate=1e-2, row_rate=0.1, seed=3, further="tuned@1"
)


@pytest.fixture
def base() -> torch.Tensor:
    rng = np.random.default_rng(4)
    return base_table(rng.normal(size=(20, 50)).astype(np.float32))


@pytest.fixture
def task() -> Task:
    """Texts of words 0 to 4 are of class 0, of 5 to 9 of class 1; words 10 to 19 do not occur."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 24)
    lists = [rng.integers(5 * label, 5 * label + 5, 6).tolist() for label in labels]
    split = Split(bags_of(lists), labels.astype(np.int64))
    return Task("toy", "Toy", ("low", "high"), split, split)


def trained(
    cache: Path, base: torch.Tensor, task: Task, *, retrain: bool = False
) -> tuple[Mapping[str, dict[str, torch.Tensor]], str]:
    """Return the state of each model, and what was shown."""
    shown = io.StringIO()
    found = train.train_all(
        {"toy": task}, base, cache, Console(file=shown, width=200), retrain=retrain
    )
    return {name: model.state_dict() for name, model in found.items()}, shown.getvalue()


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return not differing_tensors(
        {name: tensor.numpy() for name, tensor in one.items()},
        {name: tensor.numpy() for name, tensor in other.items()},
    )


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    chosen = [FROZEN, TUNED, FURTHER]
    monkeypatch.setattr(train, "SPECS", {spec.name: spec for spec in chosen})
    return chosen


def test_training_moves_the_rows_of_seen_words_alone(base: torch.Tensor, task: Task) -> None:
    before = base.clone()
    for spec in (FROZEN, TUNED):
        model = build(base, 2, frozen=spec.frozen)
        train.fit(model, task.train, spec, lambda epoch: None)
        moved = (embedding(model).weight.data != before).any(dim=1).nonzero().flatten().tolist()
        assert moved == ([] if spec.frozen else list(range(10)))
    assert torch.equal(base, before)


def test_training_again_gives_the_same_bits(
    base: torch.Tensor, task: Task, specs: list[Spec], tmp_path: Path
) -> None:
    one, _ = trained(tmp_path / "a", base, task)
    torch.rand(7)  # the state of the global generator must not matter
    other, _ = trained(tmp_path / "b", base, task)
    assert one.keys() == {spec.name for spec in specs}
    for name in one:
        assert same_bits(one[name], other[name])
    assert not same_bits(one["tuned@1"], one["tuned@2"])


def test_trained_models_come_from_the_cache_as_they_were(
    base: torch.Tensor,
    task: Task,
    specs: list[Spec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = trained(tmp_path, base, task)
    fits: list[str] = []
    really_fit = train.fit

    def counted(model: torch.nn.Sequential, split: Split, spec: Spec, step: object) -> None:
        fits.append(spec.name)
        really_fit(model, split, spec, lambda epoch: None)

    monkeypatch.setattr(train, "fit", counted)
    again, shown = trained(tmp_path, base, task)
    assert fits == []
    assert "held-out accuracy 1.0000" in shown
    for name in first:
        assert same_bits(first[name], again[name])

    # A checkpoint that is cut off is trained again; so is everything after other settings.
    path = tmp_path / "tuned@1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    healed, _ = trained(tmp_path, base, task)
    assert fits == ["tuned@1"]
    assert same_bits(first["tuned@1"], healed["tuned@1"])
    fits.clear()
    trained(tmp_path, base, task, retrain=True)
    assert fits == [spec.name for spec in specs]
    fits.clear()
    monkeypatch.setattr(train, "_key", lambda specs: "made by other code")
    trained(tmp_path, base, task)
    assert fits == [spec.name for spec in specs]


# ---- the run ------------------------------------------------------------------------------------


@pytest.fixture
def toy(
    base: torch.Tensor,
    task: Task,
    specs: list[Spec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Give the run a family of toys in place of what it downloads; returns the store's URL."""
    folders = {run.MINILM: tmp_path / "encoder", run.MINILM_TUNED: tmp_path / "tuned"}
    for seed, folder in enumerate(folders.values()):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
        weight = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
        save_file({"weight": weight}, folder / "model.safetensors")
    vectors = WordVectors({}, base.numpy()[:-1])
    monkeypatch.setattr(models, "SPECS", {spec.name: spec for spec in specs})
    monkeypatch.setattr(run, "ensure_packages", lambda cache, console: {})
    monkeypatch.setattr(run, "_unpack_encoders", lambda wheels, cache: folders)
    monkeypatch.setattr(run, "_read", lambda wheels, console: (vectors, {"toy": task}))
    return f"sqlite:///{tmp_path}/toy.db"


def run_toy(url: str, tmp_path: Path) -> tuple[list[str], str]:
    """Return the failures, and the output.

    One failure is certain, and not returned: toys are smaller than the tables of an empty store.
    """
    shown = io.StringIO()
    with pytest.raises(PydedupError) as caught:
        run.run_demo(url, tmp_path / "cache", Console(file=shown, width=200))
    assert "larger than what was put into it" in str(caught.value)
    return str(caught.value).split("; ")[1:], shown.getvalue()


def test_what_is_said_of_a_fine_tune_is_what_was_stored(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    tuned = base.copy()
    tuned[:192] *= 1 + 1e-4  # of four blocks one stays
    with pydedup.open(tmp_path / "store.db") as store:
        policy = pydedup.policies.Lossless()
        reports = [store.add("a@1", {"w": base}, policy=policy)]
        reports.append(store.add("b@1", {"w": tuned}, policy=policy))
    shown = io.StringIO()
    show.pair(Console(file=shown, width=500), "a@1", "b@1", reports)
    assert (
        "only 25.0 % of its blocks are shared. 75.0 % are kept as their difference"
        in shown.getvalue()
    )


def test_commands_that_are_shown_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "pydedup"
    program.parent.mkdir()
    program.touch(mode=0o755)

    def shown(path: str) -> str:
        monkeypatch.setenv("PATH", path)
        said = io.StringIO()
        show.next_commands(Console(file=said, width=500), "sqlite:///demo.db")
        return said.getvalue()

    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    assert "\n  pydedup ls sqlite:///demo.db\n" in shown(str(program.parent))
    assert f"\n  {program} ls sqlite:///demo.db\n" in shown(os.devnull)
    monkeypatch.setattr(sys, "argv", [str(Path(pydedup.__file__).with_name("__main__.py"))])
    assert "\n  pydedup ls sqlite:///demo.db\n" in shown(os.devnull)


def test_a_sound_store_fails_no_check_but_that_of_its_size(toy: str, tmp_path: Path) -> None:
    failures, shown = run_toy(toy, tmp_path)
    assert failures == []
    assert "same bit for bit" in shown
    assert "all as recorded" in shown


def test_a_wrong_prediction_ends_the_demo_with_an_error(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_predict = pydedup.Store.predict

    def wrong(store: pydedup.Store, name: str, x: Any) -> Any:
        return really_predict(store, name, x) + (1e-3 if name == "tuned@1" else 0.0)

    monkeypatch.setattr(pydedup.Store, "predict", wrong)
    failures, _ = run_toy(toy, tmp_path)
    assert failures == ["tuned@1 predicts otherwise from the store"]


def test_a_wrong_weight_ends_the_demo_with_an_error(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_load = pydedup.Store.load_torch

    def wrong(store: pydedup.Store, name: str) -> dict[str, torch.Tensor]:
        found = really_load(store, name)
        if name == run.MINILM:
            found["weight"] = found["weight"].clone()
            found["weight"].view(torch.int32)[3, 5] ^= 1
        return found

    monkeypatch.setattr(pydedup.Store, "load_torch", wrong)
    failures, shown = run_toy(toy, tmp_path)
    assert failures == [f"loaded weights differ: {run.MINILM}: weight"]
    assert "1 DIFFER" in shown
