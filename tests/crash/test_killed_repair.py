# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of `verify --repair-from` in each phase and at random moments; then it is run again.

After the kill every model is as damaged as before, or restored: what loads is right. The second
repair restores the rest, and nothing of the first is left. On every back end 10 kills in `make
test`, 200 in `make crash` (PYDEDUP_CRASH_ROUNDS).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.adapter import LIVE
from pydedup.errors import CorruptStoreError
from pydedup.maintenance import repair
from pydedup.store import Store
from pydedup.testing.crash import PHASES, ROUNDS, kills, work_and_kill

#: Phases after the one transaction that publishes what was restored.
DONE = ("after", "deleting pages", "pages deleted")

Model = dict[str, np.ndarray]
Change = Callable[[str, int, Callable[[bytearray], Any]], None]


def member(number: int) -> Model:
    """One of a family whose second half are deltas on the first one's."""
    table = np.random.default_rng(0).standard_normal((3000, 50)).astype(np.float32)
    own = np.random.default_rng(1000 + number)
    table[1500:] *= 1 + 0.001 * own.standard_normal((1500, 50)).astype(np.float32)
    return {"embedding": table, "bias": own.standard_normal(100).astype(np.float32)}


MODELS = {f"m{number}@1": member(number) for number in range(3)}
SPARED = {"spared@1": {"w": np.random.default_rng(9).standard_normal((300, 50))}}


def fill(url: str, models: dict[str, Model]) -> None:
    with pydedup.open(url) as store:
        for address, model in models.items():
            store.add(address, model)


def flip(payload: bytearray) -> None:
    payload[len(payload) // 2] ^= 16
    payload[-3] ^= 1


def mend(store: Store, source: Path) -> None:
    repair.PAGES_PER_TRANSACTION = 1
    assert store.verify(repair_from=source).ok


def loads(store: Store, address: str) -> bool:
    """Whether a model is served, and then as it was added."""
    wanted = {**MODELS, **SPARED}[address]
    try:
        loaded = store.load(address)
    except CorruptStoreError:
        return False
    assert {k: a.tobytes() for k, a in loaded.items()} == {
        k: a.tobytes() for k, a in wanted.items()
    }
    return True


@pytest.mark.timeout(120 + 20 * ROUNDS)
@pytest.mark.usefixtures("small_pages")
def test_a_killed_repair_is_done_again(store_url: str, change_page: Change, tmp_path: Path) -> None:
    source = tmp_path / "source.db"
    fill(str(source), MODELS)
    fill(store_url, {**MODELS, **SPARED})
    with pydedup.open(store_url, mode="r") as store:
        spared = {row[1] for row in store._adapter.model_pages(store.info("spared").info.id)}

    def damage() -> list[int]:
        with pydedup.open(store_url, mode="r") as store:
            pages = [row.id for row in store._adapter.page_rows(state=LIVE)]
        damaged = [page for page in pages if page not in spared]
        for page in damaged:
            change_page(store_url, page, flip)
        return damaged

    damage()
    begun = time.monotonic()
    assert not work_and_kill(store_url, lambda store: mend(store, source), None, 60.0)
    seconds = time.monotonic() - begun
    phases = PHASES["repair"]
    for kill in kills(phases, seconds):
        damaged = damage()
        phase = phases[kill.phase] if kill.phase else None
        kill.killed = work_and_kill(store_url, lambda store: mend(store, source), phase, kill.delay)
        with pydedup.open(store_url) as store:
            left = sorted(store.verify().damaged_pages)
            assert left in ([], damaged), "all of it is published, or nothing"
            assert not (kill.killed and kill.phase in DONE and left)
            early = kill.phase not in (None, "in the commit", *DONE)
            assert not (kill.killed and early and not left)
            assert [loads(store, address) for address in MODELS] == [not left] * len(MODELS)
            assert loads(store, "spared@1")
            mend(store, source)
            store.vacuum()
            report = store.verify()
            assert (report.errors, report.notes) == ([], [])
            assert store._adapter.jobs() == []
            assert {row.state for row in store._adapter.page_rows()} == {LIVE}
            assert store._adapter.orphan_pages() == []
            assert all(loads(store, address) for address in (*MODELS, *SPARED))
            spared = {row[1] for row in store._adapter.model_pages(store.info("spared").info.id)}
