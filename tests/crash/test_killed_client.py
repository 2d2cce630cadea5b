# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a client in each phase of what it does to a store, and at random moments of it.

Afterwards the store verifies, what was published is there bit for bit, all of an add or nothing of
it, and a vacuum leaves nothing behind. On every back end 10 kills each in `make test`, 200 in
`make crash` (PYDEDUP_CRASH_ROUNDS): first the named phases of ``pydedup.testing.crash``, then
random moments, and so on in turns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.adapter import LIVE, STAGING, Adapter
from pydedup.adapters._schema import TABLES
from pydedup.errors import StorageFullError
from pydedup.ingest import candidates, pages, write
from pydedup.maintenance import repack, vacuum
from pydedup.store import Store
from pydedup.testing.crash import PHASES, ROUNDS, Phase, kills, work_and_kill
from pydedup.testing.faults import Fault, inject

Model = dict[str, np.ndarray]


def member(seed: int, rows: int = 2500) -> Model:
    """One of a family: half of its rows are everybody's, of the others some near to them."""
    table = np.random.default_rng(0).standard_normal((5000, 50)).astype(np.float32)
    own = np.random.default_rng(1000 + seed)
    table[2500 : 2500 + rows] *= 1 + 0.01 * own.standard_normal((rows, 50)).astype(np.float32)
    return {"embedding": table, "bias": own.standard_normal(100).astype(np.float32)}


KEPT = {"kept0@1": member(0), "kept1@1": member(1)}
SMALL = {f"small{number}@1": member(10 + number, rows=250) for number in range(3)}


def twins(number: int) -> dict[str, Model]:
    """What round ``number`` adds."""
    first = member(100 + number)
    return {"new@1": first, "twin@1": {**first, "bias": first["bias"] + 1}}


def policy(number: int) -> policies.Policy:
    """In turns: deltas on similar blocks, or nothing but blocks as they are."""
    return policies.Exact() if (number + number // 10) % 2 else policies.Lossless()


# ---- what is done, before a kill and in the child ------------------------------------------------


def before_add(store: Store, number: int) -> dict[str, Model]:
    return {}


def add(store: Store, number: int) -> None:
    pages.PAGES_PER_TRANSACTION = 1  # so that a small add takes as many as a large one
    # A kill takes all workers along, whatever each of them is at.
    store.add_many(twins(number), policy=policy(number), workers=(1, 2, 4)[number % 3])


def before_remove(store: Store, number: int) -> dict[str, Model]:
    store.add_many(twins(number), policy=policy(number))
    return twins(number)


def remove(store: Store, number: int) -> None:
    store.remove("new@1")


def before_vacuum(store: Store, number: int) -> dict[str, Model]:
    """Leave pages that are mostly empty, and some without an owner."""
    for address, model in [*SMALL.items(), *twins(number).items()]:
        store.add(address, model, policy=policies.Exact())
    for address in twins(number):
        store.remove(address)
    return dict(SMALL)


def before_vacuum_of_bases(store: Store, number: int) -> dict[str, Model]:
    """Leave deltas on the blocks of a model that is gone."""
    rng = np.random.default_rng(200 + number)
    models, table = dict[str, Model](), rng.standard_normal((2500, 50))
    for night in range(1, 3 + number % 3):
        models[f"m@{night}"] = {"embedding": table.astype(np.float32)}
        store.add(f"m@{night}", models[f"m@{night}"])
        table += 1e-4 * rng.standard_normal(table.shape)
    store.remove("m@1")
    del models["m@1"]
    assert store.vacuum(dry_run=True).reencoded_blocks > 0
    return models


def clean(store: Store, number: int) -> None:
    repack.PAGES_PER_TRANSACTION = vacuum._ROWS_PER_TRANSACTION = 1
    store.vacuum()


WORK: dict[str, tuple[Callable[[Store, int], dict[str, Model]], Callable[[Store, int], None]]] = {
    "add": (before_add, add),
    "remove": (before_remove, remove),
    "vacuum": (before_vacuum, clean),
    "vacuum of bases": (before_vacuum_of_bases, clean),
}
#: Phase -> whether what was done has happened: else it depends.
HAPPENED = {"after": True, "freeing pages": True, "pages freed": True, "in the commit": None}


# ---- what must hold ------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[Store, Adapter]]:
    adapter = registry.connect(url, mode="a")
    with Store(adapter, 64 << 20) as store:
        yield store, adapter


def assert_holds(store: Store, models: dict[str, Model]) -> None:
    report = store.verify()
    assert report.errors == []
    assert {info.address for info in store.models()} == set(models)
    for address, model in models.items():
        loaded = store.load(address)
        assert loaded.keys() == model.keys()
        assert all(loaded[name].tobytes() == array.tobytes() for name, array in model.items())


def assert_nothing_is_left(store: Store, adapter: Adapter) -> None:
    """After a vacuum: the process that was killed is known to be gone."""
    store.vacuum()
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])
    assert adapter.jobs() == []
    assert adapter.models(state=STAGING) == []
    assert {row.state for row in adapter.page_rows()} <= {LIVE}
    assert adapter.orphan_pages() == []


def row_counts(adapter: Adapter) -> dict[str, int]:
    """How many rows each table has."""
    name = adapter._sql.dialect.name  # type: ignore[attr-defined]
    return {
        table: adapter._query(f"SELECT COUNT(*) FROM {name(table)}")[0][0]  # type: ignore[attr-defined]  # noqa: S608
        for table in TABLES
    }


def expected(phase: str | None, killed: bool) -> bool | None:
    """Whether the work was done; ``None`` when that cannot be said."""
    if not killed:
        return True
    return None if phase is None else HAPPENED.get(phase, False)


@pytest.mark.timeout(120 + 20 * ROUNDS)
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("action", WORK)
def test_a_killed_client_leaves_a_sound_store(store_url: str, action: str) -> None:
    prepare, work = WORK[action]
    with pydedup.open(store_url) as store:
        store.add_many(KEPT, policy=policies.Exact())
        prepare(store, ROUNDS)
    begun = time.monotonic()
    assert not work_and_kill(store_url, lambda store: work(store, ROUNDS), None, 60.0)
    seconds = time.monotonic() - begun
    phases = PHASES[action.partition(" of ")[0]]
    for kill in kills(phases, seconds):
        number, phase = kill.number, kill.phase
        with opened(store_url) as (store, adapter):
            for info in store.models():
                if info.address not in KEPT:
                    store.remove(info.address)
            assert_nothing_is_left(store, adapter)
            there = {**KEPT, **prepare(store, number)}
        kill.killed = work_and_kill(
            store_url,
            lambda store, number=number: work(store, number),  # type: ignore[misc]
            phases[phase] if phase else None,
            kill.delay,
        )
        with opened(store_url) as (store, adapter):
            done = {**there, **twins(number)} if action == "add" else dict(there)
            if action == "remove":
                del done["new@1"]
            names = {info.address for info in store.models()}
            happened = names == set(done)
            wanted = expected(phase, kill.killed)
            if clean is not work and wanted is not None:
                assert happened == wanted, phase
            assert_holds(store, done if happened else there)
            assert_nothing_is_left(store, adapter)
            assert_holds(store, done if happened else there)
    with opened(store_url) as (store, adapter):
        for info in store.models():
            store.remove(info.address)
        store.vacuum()
        counts = row_counts(adapter)
        assert counts.pop("meta") > 0
        assert set(counts.values()) == {0}, counts


@pytest.mark.parametrize("killed", [True, False])
def test_a_similarity_index_that_is_written_in_part_goes(
    store_url: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a kill with the next vacuum, at an error at once: every add would read it."""
    monkeypatch.setattr(candidates, "_PIECE_BLOCKS", 8)
    monkeypatch.setattr(write, "_BYTES_PER_TRANSACTION", 1)
    pydedup.open(store_url).close()  # makes the tables
    with opened(store_url) as (_, adapter):
        empty = row_counts(adapter)
    if killed:
        phase = Phase("insert_signatures", 2, "after the commit")
        assert work_and_kill(store_url, lambda store: store.add("new", member(0)), phase, 0)
        with opened(store_url) as (store, adapter):
            assert row_counts(adapter)["signatures"] == 2
            store.vacuum()
    else:
        adapter, control = inject(registry.connect(store_url, mode="a"))
        with Store(adapter, 64 << 20) as store:
            control.add_fault(Fault("insert_signatures", StorageFullError("no room"), 3))
            with pytest.raises(StorageFullError, match="no room"):
                store.add("new", member(0))
    with opened(store_url) as (_, adapter):
        assert row_counts(adapter) == empty
