# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""SIGKILL of a scoring, in each phase of it and at random moments: run again, it goes on.

Afterwards each row of the query has one prediction, all of the version that the alias meant when
the work began, and nothing of the work is left in the store. On every back end 10 kills in
`make test`, 200 in `make crash` (PYDEDUP_CRASH_ROUNDS).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.store import Store
from pydedup.testing.crash import Phase, work_and_kill

from .conftest import Tables, add, features

ROUNDS = int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "10"))
ROWS, BATCH = 400, 16

#: What is done in the child before it is killed, by name; of the others the moment is random.
PHASES: dict[str, Phase] = {
    "before the table": Phase("create_predictions", 1, "within"),
    "version noted": Phase("put_job", 1, "after the commit"),
    "first batch written": Phase("insert_predictions", 1, "within"),
    "some batches written": Phase("insert_predictions", 9, "within"),
    "all but the note taken back": Phase("delete_job", 1, "within"),
}


def die_in_transaction(store: Store) -> None:
    """Die when rows were sent, and not committed."""
    kind = type(store._adapter._adapter)  # type: ignore[attr-defined]
    real, calls = kind._insert_lines, []

    def insert(self: Any, *given: Any) -> None:
        real(self, *given)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    kind._insert_lines = insert


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_a_killed_scoring_goes_on(
    tables: Tables, source: Callable[..., str], new_name: Callable[[], str]
) -> None:
    w1 = add(tables.url, "m@1", seed=1)
    add(tables.url, "m@2", seed=2)
    x = features(ROWS)
    table = source(x)
    query = f"SELECT id, f0, f1, f2 FROM {table}"
    wanted = (x @ w1.T)[:, 0]
    # How long it takes here: random moments are spread over that, and a bit beyond.
    whole, begun = new_name(), time.monotonic()
    assert not work_and_kill(
        tables.url, lambda store: store.score(query, "m", into=whole, batch=BATCH), None, 60.0
    )
    chance, seconds = random.Random(6), 1.1 * (time.monotonic() - begun)
    moments = [*PHASES, "in a transaction", None, None, None, None]
    for number in range(ROUNDS):
        into, moment = new_name(), moments[number % len(moments)]

        def work(store: Store, into: str = into, moment: str | None = moment) -> None:
            if moment == "in a transaction":
                die_in_transaction(store)
            store.score(query, "m@prod", into=into, batch=BATCH)

        with pydedup.open(tables.url) as store:
            store.alias("m", "prod", "1")
        phase = PHASES.get(moment or "")
        delay = 60.0 if moment == "in a transaction" else chance.random() * seconds
        killed = work_and_kill(tables.url, work, phase, delay)
        assert killed or moment is None
        with pydedup.open(tables.url) as store:
            noted = bool(store._adapter.jobs())
            store.vacuum()
            assert bool(store._adapter.jobs()) == noted
            store.alias("m", "prod", "2" if noted or not killed else "1")
            report = store.score(query, "m@prod", into=into, batch=BATCH)
            assert report.resumed == noted
            assert store._adapter.jobs() == []
        if moment in ("first batch written", "some batches written"):
            assert report.skipped == BATCH * (1 if moment.startswith("first") else 9)
        if moment == "in a transaction":
            assert report.skipped == 4 * BATCH
        rows = dict(tables.run(f"SELECT id, prediction FROM {into}"))
        assert tables.run(f"SELECT COUNT(*), MIN(model), MAX(model) FROM {into}") == [
            (ROWS, "m@1", "m@1")
        ]
        np.testing.assert_allclose([rows[i + 1] for i in range(ROWS)], wanted, rtol=1e-5, atol=1e-6)
