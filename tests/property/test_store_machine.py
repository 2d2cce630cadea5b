# SPDX-License-Identifier: Apache-2.0
"""What clients do to a store, in any order, against plain dicts of what has to be in it.

Two writers and a reader that stay open, adds under each policy, some of which fail or are cut off,
aliases, removals, vacuums, products, copies to another store and back, and backups. Hypothesis
draws the steps, and shortens those that went wrong. What a store says of sizes is looked at in
`test_store_life.py`, with larger models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

import pydedup
from pydedup.errors import ArgumentError, DuplicateError, EvaluationError
from pydedup.policies import Accuracy, Bounded, Exact, Lossless, Policy
from pydedup.types import DType

Array = NDArray[Any]
Model = dict[str, Array]
Recipe = list[tuple[int, int]]
AllRows = Callable[[pydedup.Store], dict[str, list[str]]]

RNG = np.random.default_rng(22)
BASES: list[Array] = [
    RNG.standard_normal((96, 128)).astype(np.float32),
    RNG.standard_normal((96, 128)).astype(ml_dtypes.bfloat16),
    RNG.standard_normal((70, 40)),
    RNG.standard_normal((8, 4, 3, 3)).astype(np.float16),
    np.array([[np.nan, np.inf, -0.0, 1], [-np.inf, 0, 2, 3]], np.float32),
    RNG.integers(-9, 9, 900).astype(np.int32),
    RNG.random(33) < 0.5,
    np.empty((0, 5), np.float32),
    np.array(2.5, np.float32),
]


class StoppedError(Exception):
    """Raised where something is cut off."""


def metric(arrays: Any) -> float:
    """Falls as weights move."""
    sizes = (np.abs(a.astype(np.float64)) for a in arrays.values())
    return -float(sum(size[np.isfinite(size)].sum() for size in sizes))


def refuse(arrays: Any) -> float:
    raise StoppedError


def near(number: int, step: int) -> Array:
    """A tensor, or for a step above 0 another one whose second half was moved a little."""
    array = BASES[number].copy()
    if step and DType.of(array.dtype).is_float and array.size > 1:
        half = array.reshape(-1)[array.size // 2 :]
        noise = np.random.default_rng(step).standard_normal(half.shape)
        half[:] = (half.astype(np.float64) * (1 + 1e-4 * noise)).astype(array.dtype)
    return array


def model_of(recipe: Recipe) -> Model:
    return {f"t{key}": near(number, step) for key, (number, step) in enumerate(recipe)}


def bits(model: Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in model.items()}


def away(a: Array, b: Array) -> float:
    """How far one is from the other, relative to it."""
    if a.tobytes() == b.tobytes():
        return 0.0
    wide = a.astype(np.float64)
    return float(np.linalg.norm(wide - b.astype(np.float64)) / np.linalg.norm(wide))


def stop_after(calls: int) -> Callable[[str, int, int], None]:
    """A progress that ends what tells it."""
    left = calls

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StoppedError

    return progress


# What is drawn is short, and so is what is printed of steps that went wrong.
RECIPES = st.lists(
    st.tuples(st.integers(0, len(BASES) - 1), st.integers(0, 2)), min_size=1, max_size=4
)
POLICIES: list[Policy] = [Lossless(), Exact(), Bounded(0.001), Accuracy(metric, 0.01)]
POLICY = st.sampled_from([policy.name for policy in POLICIES])
NAMES = st.sampled_from(["a", "b"])
PICK = st.integers(0, 99)


@dataclasses.dataclass
class Holds:
    """What has to be in a store: models by name and version, versions by name and alias."""

    models: dict[tuple[str, str], Model] = dataclasses.field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    def check(self, store: pydedup.Store) -> None:
        pointed: dict[tuple[str, str], set[str]] = {key: set() for key in self.models}
        for (name, alias), version in self.aliases.items():
            pointed[name, version].add(alias)
        infos = store.models()
        assert {(info.name, info.version): set(info.aliases) for info in infos} == pointed
        for (name, version), model in self.models.items():
            assert bits(store.load(f"{name}@{version}")) == bits(model)


class StoreMachine(RuleBasedStateMachine):
    """One store, what has to be in it, and another one that models are copied to."""

    def __init__(self, url: str, far: str, folder: Path, all_rows: AllRows) -> None:
        super().__init__()
        self.all_rows = all_rows
        self.url, self.far, self.folder = url, far, folder
        self.holds, self.far_holds = Holds(), Holds()
        self.clients = [pydedup.open(url, mode=mode) for mode in ("a", "a", "r")]

    def teardown(self) -> None:
        store = self.clients[0]
        for name in {name for name, _ in self.holds.models}:
            store.remove(name, all_versions=True)
        store.vacuum()
        left = self.all_rows(store)
        assert {table for table, rows in left.items() if rows} == {"meta"}
        for client in self.clients:
            client.close()

    # ---- what is drawn ------------------------------------------------------------------------

    def writer(self, pick: int) -> pydedup.Store:
        return self.clients[pick % 2]

    def client(self, pick: int) -> pydedup.Store:
        return self.clients[pick % 3]

    def one(self, pick: int) -> tuple[str, str]:
        return list(self.holds.models)[pick % len(self.holds.models)]

    def versions(self, name: str) -> list[str]:
        """Those of a model, oldest first."""
        return [version for other, version in self.holds.models if other == name]

    def next_version(self, name: str) -> str:
        number = 1 + max((int(v) for v in self.versions(name) if v.isdigit()), default=0)
        while (name, str(number)) in self.holds.aliases:
            number += 1
        return str(number)

    # ---- adding -------------------------------------------------------------------------------

    @initialize(recipes=st.lists(RECIPES, min_size=3, max_size=3))
    def add_several(self, recipes: list[Recipe]) -> None:
        """So that most of what follows has something to do."""
        for recipe, name in zip(recipes, "aab", strict=True):
            self.add(name, recipe, "lossless", 0)
        self.clients[0].alias("a", "prod", "1")
        self.holds.aliases["a", "prod"] = "1"

    @rule(name=NAMES, recipe=RECIPES, called=POLICY, pick=PICK)
    def add(self, name: str, recipe: Recipe, called: str, pick: int) -> None:
        model, version = model_of(recipe), self.next_version(name)
        (policy,) = (policy for policy in POLICIES if policy.name == called)
        dry = self.client(pick + 1).add(name, model, policy=policy, dry_run=True)
        report = self.writer(pick).add(name, model, policy=policy)
        assert report.model == f"{name}@{version}"
        assert dataclasses.replace(dry, seconds=0, dry_run=False) == dataclasses.replace(
            report, seconds=0
        )
        stored = self.writer(pick + 1).load(report.model)
        for key, source in model.items():
            assert away(source, stored[key]) <= policy.max_rel_error
        if isinstance(policy, Accuracy):
            assert metric(model) - metric(stored) <= policy.max_drop
        self.holds.models[name, version] = stored

    @rule(name=NAMES, recipe=RECIPES, at=st.integers(1, 9), pick=PICK)
    def add_cut_off(self, name: str, recipe: Recipe, at: int, pick: int) -> None:
        model = model_of(recipe)
        before, version = self.all_rows(self.clients[0]), self.next_version(name)
        try:
            self.writer(pick).add(name, model, progress=stop_after(at))
        except StoppedError:
            assert self.all_rows(self.clients[0]) == before
        else:
            self.holds.models[name, version] = model

    @rule(name=NAMES, recipe=RECIPES, pick=PICK)
    def add_what_is_wrong(self, name: str, recipe: Recipe, pick: int) -> None:
        model = model_of(recipe)
        before, store = self.all_rows(self.clients[0]), self.writer(pick)
        with pytest.raises(EvaluationError):
            store.add(name, model, policy=Accuracy(refuse, 0.1))
        with pytest.raises(ArgumentError, match="complex128"):
            store.add_many({"new": model, name: {**model, "bad": np.array([1j])}})
        for other, taken in [*self.holds.models, *self.holds.aliases]:
            with pytest.raises((DuplicateError, ArgumentError), match=r"already|is an alias"):
                store.add_many({"new": model, f"{other}@{taken}": model})
        assert self.all_rows(self.clients[0]) == before

    # ---- names --------------------------------------------------------------------------------

    @precondition(lambda self: self.holds.models)
    @rule(alias=st.sampled_from(["prod", "2"]), pick=PICK)
    def point(self, alias: str, pick: int) -> None:
        name, version = self.one(pick)
        if (name, alias) in self.holds.models:
            with pytest.raises(ArgumentError, match="is a version"):
                self.writer(pick).alias(name, alias, version)
            return
        self.writer(pick).alias(name, alias, version)
        self.holds.aliases[name, alias] = version

    @precondition(lambda self: self.holds.models)
    @rule(pick=PICK)
    def remove(self, pick: int) -> None:
        name, version = self.one(pick)
        for alias in [a for (n, a), v in self.holds.aliases.items() if (n, v) == (name, version)]:
            with pytest.raises(ArgumentError, match="alias"):
                self.writer(pick).remove(f"{name}@{version}")
            self.writer(pick).alias(name, alias, None)
            del self.holds.aliases[name, alias]
        assert self.writer(pick).remove(f"{name}@{version}") == [f"{name}@{version}"]
        del self.holds.models[name, version]

    @precondition(lambda self: self.holds.models)
    @rule(keep=st.integers(1, 2), pick=PICK)
    def remove_the_oldest(self, keep: int, pick: int) -> None:
        name, _ = self.one(pick)
        aliased = {version for (other, _), version in self.holds.aliases.items() if other == name}
        doomed = [v for v in self.versions(name)[:-keep] if v not in aliased]
        assert self.writer(pick).remove(name, keep=keep) == [f"{name}@{v}" for v in doomed]
        for version in doomed:
            del self.holds.models[name, version]

    # ---- upkeep and serving -------------------------------------------------------------------

    @rule(at=st.integers(1, 9), pick=PICK)
    def vacuum(self, at: int, pick: int) -> None:
        store = self.writer(pick)
        try:
            store.vacuum(progress=stop_after(at))
        except StoppedError:
            self.holds.check(store)
            store.vacuum()
        stats = store.stats()
        assert (stats.versions, stats.retired_pages) == (len(self.holds.models), 0)

    @rule(memory=st.sampled_from(["2MiB", "64MiB"]), pick=PICK)
    def open_again(self, memory: str, pick: int) -> None:
        self.client(pick).close()
        mode: Any = "r" if pick % 3 == 2 else "a"
        self.clients[pick % 3] = pydedup.open(self.url, mode=mode, memory=memory)

    @precondition(lambda self: self.holds.models)
    @rule(dtype=st.sampled_from(["f32", "bf16"]), transpose=st.booleans(), pick=PICK)
    def compute(self, dtype: Any, transpose: bool, pick: int) -> None:
        (name, version), store = self.one(pick), self.client(pick)
        converted = store.load(f"{name}@{version}", dtype=dtype)
        for key, weight in self.holds.models[name, version].items():
            wanted = DType.of_label(dtype).numpy
            with np.errstate(over="ignore"):
                same = weight.astype(wanted) if DType.of(weight.dtype).is_float else weight
            assert bits({key: converted[key]}) == bits({key: same})
            if weight.ndim != 2 or not np.isfinite(weight.astype(np.float64)).all():
                continue
            tensor, wide = store.tensor(f"{name}@{version}", key), weight.astype(np.float64)
            matrix = wide if transpose else wide.T
            x = np.random.default_rng(pick).standard_normal((3, len(matrix))).astype(np.float32)
            product = tensor.matmul(x, transpose=transpose)
            np.testing.assert_allclose(product, x @ matrix, rtol=1e-4, atol=1e-4)
            rows = np.arange(len(weight))[::-3]
            assert tensor.take(rows).tobytes() == weight[rows].tobytes()

    # ---- moving -------------------------------------------------------------------------------

    @precondition(lambda self: self.holds.models)
    @rule(at=st.integers(1, 12), pick=PICK)
    def copy_there(self, at: int, pick: int) -> None:
        """One model or all, in the place of what is there under the same names."""
        mine, theirs, store = self.holds, self.far_holds, self.client(pick)
        chosen = [self.one(pick)] if pick % 2 else list(mine.models)
        given: Any = {"names": ["@".join(key) for key in chosen], "on_conflict": "replace"}
        taken = [(n, a) for n, a in theirs.models if (n, a) in mine.aliases]
        taken += [(n, v) for n, v in theirs.aliases if (n, v) in chosen]
        if any(key in chosen or (key[0], mine.aliases.get(key)) in chosen for key in taken):
            with pytest.raises(DuplicateError, match="alias"):
                store.copy_to(self.far, **given)
            return
        try:
            store.copy_to(self.far, **given, progress=stop_after(at))
        except StoppedError:
            store.copy_to(self.far, **given)
        theirs.models.update({key: mine.models[key] for key in chosen})
        for (name, alias), version in mine.aliases.items():
            if (name, version) in chosen:
                theirs.aliases[name, alias] = version
        self.check_far()

    @precondition(lambda self: self.far_holds.models)
    @rule(pick=PICK)
    def copy_back(self, pick: int) -> None:
        """What is not here any more; aliases stay with what has them here."""
        mine, theirs = self.holds, self.far_holds
        name, version = key = list(theirs.models)[pick % len(theirs.models)]
        if key in mine.models or key in mine.aliases:
            return
        with pydedup.open(self.far, mode="r") as far:
            far.copy_to(self.url, f"{name}@{version}", on_conflict="skip")
        mine.models[key] = theirs.models[key]
        for (other, alias), pointed in theirs.aliases.items():
            if (other, pointed) == key and (name, alias) not in mine.models:
                mine.aliases.setdefault((name, alias), version)

    @rule(pick=PICK)
    def back_up(self, pick: int) -> None:
        path = self.folder / "store.backup"
        self.client(pick).backup(path, replace=True)
        with pydedup.open(path, mode="r") as backup:
            self.holds.check(backup)
            assert backup.verify().errors == []

    def check_far(self) -> None:
        with pydedup.open(self.far) as far:
            self.far_holds.check(far)
            far.vacuum()
            report = far.verify()
        assert (report.errors, report.notes) == ([], [])

    @invariant()
    def everything_is_there(self) -> None:
        for client in self.clients:
            self.holds.check(client)
        report = self.clients[0].verify()
        assert report.errors == []
        assert [note for note in report.notes if "retired" not in note] == []


@pytest.mark.timeout(1800)  # for a search
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("backend", "lives"), [("sqlite", 10), ("postgres", 2), ("mysql", 2)])
def test_a_store_holds_what_it_was_given(
    new_store: Callable[[str], str], all_rows: AllRows, tmp_path: Path, backend: str, lives: int
) -> None:
    # Steps that went wrong are only shortened in a search, which takes minutes.
    is_search = not settings().derandomize
    run_state_machine_as_test(
        lambda: StoreMachine(new_store(backend), new_store("sqlite"), tmp_path, all_rows),
        settings=settings(
            max_examples=10 * lives if is_search else lives,
            stateful_step_count=20,
            phases=list(Phase) if is_search else [Phase.generate],
        ),
    )
