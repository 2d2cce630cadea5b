# SPDX-License-Identifier: Apache-2.0
"""bench/scale: the simulator of large stores, on cases small enough to be counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import NotFoundError

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "scale"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def measured() -> Any:
    from _measure import load

    return load(FOLDER / "measured.json")


def models(count: int, seed: int = 0) -> list[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    """Return a base, and copies with a few rows of one tensor moved."""
    rng = np.random.default_rng(seed)
    base = {
        "table": rng.standard_normal((4096, 64), np.float32),
        "head": rng.standard_normal((64, 64), np.float32),
    }
    found = [("m-000", base)]
    for number in range(1, count):
        table = base["table"].copy()
        rows = rng.choice(64, 32, replace=False) + 64 * number % 4096
        table[rows] += 0.01 * rng.standard_normal((32, 64), np.float32)
        head = rng.standard_normal((64, 64), np.float32)
        found.append((f"m-{number:03}", {"table": table, "head": head}))
    return found


def store_of(path: Path, count: int) -> pydedup.Store:
    store = pydedup.open(path)
    for name, arrays in models(count):
        store.add(name, arrays)
    return store


def small(measured: Any, **changes: Any) -> Any:
    from _simulate import Scenario

    return Scenario(**{"models": 2000, "total_bytes": 2e10, "requests": 400, **changes})


def fleet(families: int = 20, size: int = 5) -> Any:
    from _traffic import Fleet

    rng = np.random.default_rng(3)
    return Fleet(
        family=np.repeat(np.arange(families), size),
        base_pages=rng.integers(4, 12, families),
        own_pages=rng.integers(1, 4, families),
        base_bytes=np.full(families, 1000),
        own_bytes=np.full(families, 1000),
        touches=np.zeros(families, np.int64),
    )


def requests(fleet: Any, count: int, seed: int = 1) -> Any:
    from _traffic import draw_requests, zipf

    rng = np.random.default_rng(seed)
    return draw_requests(zipf(fleet.models, 1.0)[rng.permutation(fleet.models)], count, rng)


# ---- statistics and sizes against a real store ---------------------------------------------------


def test_what_models_brought_adds_up_to_what_the_tables_hold(tmp_path: Path) -> None:
    from _sharing import family_of, index_bytes
    from _tables import TABLES, predicted, table_rows

    with store_of(tmp_path / "store.db", 6) as store:
        family = family_of(store, "m-")
        tables = predicted([(1, family.first), (5, family.further)])
        rows = table_rows(store._adapter)
        assert {t: round(tables[t].rows, 6) for t in TABLES} == rows
        payload = sum(row.payload_bytes for row in store._adapter.page_rows())
        assert tables["pages"].payload == pytest.approx(payload)
        indexed = family.first.indexed + 5 * family.further.indexed
        assert index_bytes(store)[1] == pytest.approx(indexed)
    # The moved rows of a copy are one block or two; all others are those of the first model.
    assert 2 <= family.further.new_blocks <= 3
    assert family.first.blocks == 65
    assert family.base_reads == family.first.pages
    assert sum(family.owners.values()) == rows["distinct_blocks"]


def test_a_pilot_predicts_a_larger_store(tmp_path: Path, measured: Any) -> None:
    from _sharing import family_of
    from _simulate import stock_of
    from _tables import table_rows

    with store_of(tmp_path / "pilot.db", 4) as pilot:
        fed = replace(measured, families={"m": family_of(pilot, "m-")})
    logical = np.array([fed.families["m"].first.logical])
    scenario = small(measured, models=16, database="sqlite")
    held = stock_of(fed, scenario, ["m"], np.array([16]), logical, np.array([0]))
    with store_of(tmp_path / "whole.db", 16) as store:
        rows = table_rows(store._adapter)
        payload = sum(row.payload_bytes for row in store._adapter.page_rows())
    for table in ("models", "tensors", "block_maps", "source_hashes", "signatures"):
        assert held.tables[table].rows == rows[table], table
    for table in ("pages", "model_pages", "distinct_blocks"):
        assert held.tables[table].rows == pytest.approx(rows[table], rel=0.2), table
    assert held.stored_bytes == pytest.approx(payload, rel=0.1)


def test_what_is_about_one_model_does_not_list_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An add read a million rows to find the 32 newest, and so did a typing error in a name.
    with store_of(tmp_path / "store.db", 3) as store:
        adapter, seen = store._adapter, []
        original, reads = adapter.models, adapter.model_pages

        def listed(**given: Any) -> Any:
            seen.append(given)
            return original(**given)

        def of_one(model_id: int | None = None) -> Any:
            assert model_id is not None
            return reads(model_id)

        monkeypatch.setattr(adapter, "models", listed)
        monkeypatch.setattr(adapter, "model_pages", of_one)
        store.add("other", dict(models(2)[1][1]))
        shared = store.info("m-002")
        assert 0 < shared.exclusive_bytes < shared.used_bytes
        with pytest.raises(NotFoundError, match="did you mean 'm-00"):
            store.load("m-00")
        assert seen
        assert all("name" in given or "newest" in given for given in seen), seen


# ---- laws of the simulated store -----------------------------------------------------------------


def test_models_and_bytes_are_those_that_were_asked_for(measured: Any) -> None:
    from _simulate import stock

    held = stock(measured, small(measured))
    assert held.size.sum() == 2000
    assert held.tables["models"].rows == 2000
    assert held.logical_bytes == pytest.approx(2e10)
    assert 0 < held.stored_bytes < held.logical_bytes
    assert held.tables["distinct_blocks"].rows == pytest.approx(
        held.index_blocks + held.new_deltas, rel=0.02
    )


def test_more_models_of_the_same_kind_take_more_of_everything(measured: Any) -> None:
    from _simulate import ingest, stock_of

    one = measured.families["minilm"]
    held = [
        stock_of(
            measured,
            small(measured),
            ["minilm"],
            np.array([count]),
            np.array([one.first.logical]),
            np.array([0]),
        )
        for count in (10, 20)
    ]
    assert held[1].stored_bytes - held[0].stored_bytes == pytest.approx(
        10 * one.further.page_payload
    )
    assert held[0].index_blocks == one.first.indexed + 9 * one.further.indexed
    for table, larger in held[1].tables.items():
        assert larger.rows >= held[0].tables[table].rows, table
    first, second = (ingest(measured, h) for h in held)
    # Work grows with what is added; what each add reads of the store grows with the square.
    assert second.work / first.work == pytest.approx(2, rel=0.1)
    assert second.growing / first.growing > 2


def test_exact_copies_store_nothing(measured: Any) -> None:
    from _simulate import stock_of

    one = measured.families["minilm"].first
    held = [
        stock_of(
            measured,
            small(measured),
            ["minilm"],
            np.array([1 + copies]),
            np.array([one.logical]),
            np.array([copies]),
        )
        for copies in (0, 7)
    ]
    assert held[0].stored_bytes == held[1].stored_bytes
    assert held[1].tables["source_hashes"].rows == 8 * held[0].tables["source_hashes"].rows


def test_shards_keep_families_whole_or_repeat_their_first_models(measured: Any) -> None:
    from _simulate import sharded, stock

    held = stock(measured, small(measured))
    by_family, at_random = zip(*(sharded(measured, held, n) for n in (1, 2, 8, 64)), strict=True)
    assert len(set(by_family)) == 1
    assert at_random[0] == pytest.approx(held.stored_bytes, rel=1e-9)
    assert list(at_random) == sorted(at_random)
    assert at_random[-1] < held.logical_bytes


def test_prices_come_out_of_sums_of_work() -> None:
    from _costs import ingest_seconds, nonnegative, residual

    rng = np.random.default_rng(0)
    works = [
        {"add": 1.0, "tensor": t, "block": b, "hash_byte": 1e4 * b}
        for t, b in rng.integers(1, 500, (20, 2)).astype(float)
    ]
    prices = {"add": 0.02, "tensor": 1e-4, "block": 5e-5, "hash_byte": 1e-9}
    seconds = [ingest_seconds(work, prices) for work in works]
    found = residual(works, seconds, {"hash_byte": 1e-9, "add": 7.0})
    assert found == pytest.approx({k: prices[k] for k in ("add", "tensor", "block")})
    # A second column that only a negative price would fit gets none.
    matrix = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert nonnegative(matrix, np.array([3.0, 2.0, 1.0])).tolist() == [pytest.approx(2.0), 0.0]


# ---- traffic -------------------------------------------------------------------------------------


def lru_misses(trace: Any, budget: int) -> int:
    """Count them in another way than the native replay."""
    held: OrderedDict[int, int] = OrderedDict()
    used = misses = 0
    for page, size in zip(trace.pages.tolist(), trace.nbytes.tolist(), strict=True):
        if page in held:
            held.move_to_end(page)
            continue
        misses += 1
        while used + size > budget:
            used -= held.popitem(last=False)[1]
        held[page] = size
        used += size
    return misses


def test_a_replay_of_all_pages_is_exact() -> None:
    from _traffic import fleet_trace, serve

    given = fleet()
    asked = requests(given, 300)
    trace, uses = fleet_trace(given, asked, 1.0, np.random.default_rng(0))
    first = given.first[given.family[asked]] == asked
    counted = given.base_pages[given.family[asked]] + np.where(
        first, 0, given.own_pages[given.family[asked]]
    )
    assert len(trace) == uses == counted.sum()
    assert (np.bincount(trace.calls - 1, minlength=300) == counted).all()
    served = serve(given, asked, 40_000, policy="lru", rate=1.0, warm=0.0)
    assert served.reads * 300 == lru_misses(trace, 40_000)
    assert served.uses == uses / 300


def test_a_sample_of_pages_misses_as_all_pages_do() -> None:
    from _traffic import serve

    given = fleet(families=300)
    asked = requests(given, 4000)
    for policy in ("lru", "reuse"):
        exact = serve(given, asked, 600_000, policy=policy, rate=1.0)
        sampled = serve(given, asked, 600_000, policy=policy, rate=0.2)
        assert 0.2 < exact.hit_ratio < 0.95
        assert sampled.hit_ratio == pytest.approx(exact.hit_ratio, abs=0.05)
        assert sampled.uses == exact.uses


def test_more_memory_reads_less_and_enough_memory_nothing_again() -> None:
    from _traffic import serve

    given = fleet()
    asked = np.tile(np.arange(given.models), 4)
    reads = [serve(given, asked, m, rate=1.0).reads for m in (20_000, 80_000, 10_000_000)]
    assert reads[0] > reads[1] > reads[2] == 0


def test_pages_are_used_as_often_as_their_profile_says() -> None:
    from _traffic import Touches, fleet_trace

    given = replace(fleet(families=1, size=2), profiles=(Touches((1.0, 0.25), (0.5,)),))
    given = replace(given, base_pages=np.array([2]), own_pages=np.array([1]))
    asked = np.ones(4000, np.int64)
    trace, uses = fleet_trace(given, asked, 1.0, np.random.default_rng(0))
    counts = np.unique(trace.pages, return_counts=True)[1] / 4000
    assert counts == pytest.approx([1.0, 0.25, 0.5], abs=0.03)
    assert uses / 4000 == pytest.approx(1.75)


def test_a_family_on_one_node_is_hit_more_often(measured: Any) -> None:
    from _nodes import nodes
    from _simulate import stock

    held = stock(measured, small(measured, memory=3 << 30, popularity=0.8, requests=1500))
    found = {(n.nodes, n.routing): n for n in nodes(measured, held, [1, 8])}
    one, rest = found[1, "random"], found[8, "random"]
    assert rest.served.hit_ratio == pytest.approx(one.served.hit_ratio, abs=0.05)
    assert found[8, "family"].served.hit_ratio > rest.served.hit_ratio + 0.05
    assert found[8, "family"].busiest > 1
    assert one.seconds > one.cpu_seconds > 0


def test_writers_are_held_up_by_one_another_less_on_shards(measured: Any) -> None:
    from _simulate import stock, writers

    held = stock(measured, small(measured))
    rates = [w.adds_per_second for w in writers(measured, held, [1, 4, 16, 64, 1024])]
    assert rates == sorted(rates)
    assert rates[-1] / rates[0] < 1024
    alone, sharing = (writers(measured, held, [1024], shards)[0] for shards in (64, 1))
    assert alone.attempts < sharing.attempts


def test_the_program_prints_its_tables() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, str(FOLDER / "run.py"), "simulate", "--models", "1000"]
    command += ["--bytes", "1e10", "--requests", "300", "--memory", "2", "--nodes", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for words in ("1,000 models, 10 GB", "similarity index in memory", "ingest", "family", "reads"):
        assert words in done.stdout
    wrong = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--measured", "nothing.json", "simulate"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert wrong.returncode == 1
    assert "run.py measure" in wrong.stderr


@pytest.mark.parametrize("rounds", [1, 7, 14, 29, 44, 100, 150, 1000])
def test_a_check_of_any_size_has_models_for_its_controls(rounds: int) -> None:
    from _check import AT_A_POINT, CONTROLS, POINTS, control_points

    points = control_points(rounds)
    assert 0 in points
    assert points <= set(range(rounds))
    assert len(points) == min(POINTS, rounds)
    assert 1 + (len(points) + 1) * AT_A_POINT <= CONTROLS  # the first add, and those at the end
