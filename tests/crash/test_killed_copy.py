# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a copy in each phase of it and at random moments; then it is run again.

What the killed copy had published is there, whole, and is not copied again; the second run brings
the rest and takes away what the first one left unfinished. On every back end 10 kills in `make
test`, 200 in `make crash` (PYDEDUP_CRASH_ROUNDS).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.adapter import LIVE
from pydedup.ingest import pages
from pydedup.moving import together
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import plan_copy
from pydedup.store import Store
from pydedup.testing.crash import PHASES, ROUNDS, kills, work_and_kill
from pydedup.testing.pages import small_pages

Model = dict[str, np.ndarray]


def member(number: int) -> Model:
    table = np.random.default_rng(0).standard_normal((4000, 50)).astype(np.float32)
    own = np.random.default_rng(1000 + number)
    table[2000:] *= 1 + 0.01 * own.standard_normal((2000, 50)).astype(np.float32)
    return {"embedding": table, "bias": own.standard_normal(100).astype(np.float32)}


MODELS = {f"m{number}@1": member(number) for number in range(3)}
OTHER = {"other@1": member(7)}


@pytest.fixture(scope="module", autouse=True)
def _small_pages() -> Iterator[None]:
    before = pages.PAGES_PER_TRANSACTION, together._MOST_MODELS
    with small_pages():
        yield
    pages.PAGES_PER_TRANSACTION, together._MOST_MODELS = before


@pytest.fixture(scope="module")
def source(_small_pages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.db"
    with pydedup.open(path) as store:
        for address, model in MODELS.items():
            store.add(address, model, policy=policies.Lossless())
            store.alias(address.partition("@")[0], "prod", "1")
    return path


def copy(source: Path, target: Store, most: int = 1) -> list[str]:
    """Copy all models to an open store, so many together; return those that were not there."""
    pages.PAGES_PER_TRANSACTION, together._MOST_MODELS = 1, most
    with pydedup.open(source, mode="r", memory="64MiB") as store:
        items = plan_copy(
            store._adapter, target._adapter, None, all_versions=False, on_conflict="error"
        )
        report = copy_models(store._end(), target._end(), items)
    return [model.model for model in report.models if model.is_new]


def assert_holds(store: Store, models: dict[str, Model]) -> None:
    for address, model in models.items():
        loaded = store.load(address)
        assert loaded.keys() == model.keys()
        assert all(loaded[name].tobytes() == array.tobytes() for name, array in model.items())


@pytest.mark.timeout(120 + 20 * ROUNDS)
@pytest.mark.parametrize("into", ["empty", "others", "empty, together"])
def test_a_killed_copy_goes_on(store_url: str, source: Path, into: str) -> None:
    most = len(MODELS) if into == "empty, together" else 1
    there = OTHER if into == "others" else {}
    with pydedup.open(store_url) as store:
        for address, model in there.items():
            store.add(address, model)
        begun = time.monotonic()
        copy(source, store, most)
        seconds = time.monotonic() - begun
    phases = PHASES["copy" if most == 1 else "add"]  # one transaction publishes, as in an add
    for kill in kills(phases, seconds):
        with pydedup.open(store_url) as store:
            for name in {info.name for info in store.models()} - {"other"}:
                store.remove(name, all_versions=True)
            store.vacuum()
        phase = phases[kill.phase] if kill.phase else None
        kill.killed = work_and_kill(
            store_url, lambda store: copy(source, store, most), phase, kill.delay
        )
        with pydedup.open(store_url) as store:
            published = {info.address for info in store.models()} - set(there)
            assert published in [set(list(MODELS)[:count]) for count in range(4)]
            assert store.verify().errors == []
            assert_holds(store, {address: MODELS[address] for address in published})
            if kill.phase in ("between models", "after"):
                assert len(published) == (1 if kill.phase == "between models" else 3)
            assert set(copy(source, store)) == set(MODELS) - published
            report = store.verify()
            assert (report.errors, report.notes) == ([], []), "nothing of the killed copy is left"
            assert store._adapter.jobs() == []
            assert {row.state for row in store._adapter.page_rows()} == {LIVE}
            assert_holds(store, {**there, **MODELS})
            assert all(info.aliases == ("prod",) for info in store.models() if info.name != "other")
