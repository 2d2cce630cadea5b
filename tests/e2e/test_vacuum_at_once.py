# SPDX-License-Identifier: Apache-2.0
"""Removals and vacuums while others add, read and export, on each back end."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import policies, registry
from pydedup.adapter import STAGING
from pydedup.adapter_options import StagingAdapter
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.maintenance.vacuum import VacuumReport
from pydedup.signatures import read_segments
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject

from .test_at_once import same, version

_CHURN = """
import sys, time
import numpy as np
import pydedup

url, me, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
rng = np.random.default_rng(int(me))
kept = np.random.default_rng(9).standard_normal((128, 256)).astype(np.float32)
end, count = time.monotonic() + seconds, 0
with pydedup.open(url) as store:
    while time.monotonic() < end or count < 5:
        mine = kept.copy()
        mine[rng.choice(128, 8)] += 0.1
        store.add(f"w{me}_{count}", {"w": mine})
        store.remove(f"w{me}_{count}")
        count += 1
print(count)
"""


def test_adds_go_on_while_others_remove_models(store_url: str) -> None:
    """What an add compares with may be removed by somebody else at any moment."""
    kept = np.random.default_rng(9).standard_normal((128, 256)).astype(np.float32)
    with pydedup.open(store_url) as store:
        store.add("keep", {"w": kept})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CHURN, store_url, str(me), "1.5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) >= 5
    with pydedup.open(store_url) as store:
        assert [info.address for info in store.models()] == ["keep@1"]
        assert np.array_equal(store.load("keep")["w"], kept)
        assert store.verify().ok


def test_a_vacuum_takes_no_add_that_publishes_meanwhile(store_url: str) -> None:
    """Between what a vacuum reads, an add that was staged before gets to its end, or tries to."""
    staged, go = threading.Event(), threading.Event()
    model = version(2)

    def wait(stage: str, done: int, total: int) -> None:
        if stage == "writing" and not staged.is_set():
            staged.set()
            assert go.wait(30)

    failures: list[BaseException] = []

    def add() -> None:
        try:
            with pydedup.open(store_url) as store:
                store.add("new@1", model, policy=policies.Exact(), progress=wait)
        except BaseException as error:  # shown below
            failures.append(error)

    with pydedup.open(store_url) as store:
        store.add("kept@1", version(1), policy=policies.Exact())
    adder = threading.Thread(target=add)
    adder.start()
    assert staged.wait(30)

    def meanwhile() -> None:
        go.set()
        adder.join(0.3)  # it may have to wait for the vacuum

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("jobs", meanwhile))
    with Store(adapter, 64 << 20) as store:
        store.vacuum()
        adder.join(60)
        assert not failures, failures
        assert same(store.load("new"), model)
        store.vacuum()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


def test_an_alias_never_points_at_what_is_removed_meanwhile(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        for number in (1, 2):
            store.add(f"m@{number}", version(number), policy=policies.Exact())
    told: list[Exception] = []

    def remove() -> None:
        try:
            with pydedup.open(store_url) as store:
                store.remove("m@1")
        except ArgumentError as error:
            told.append(error)

    remover = threading.Thread(target=remove)

    def meanwhile() -> None:
        remover.start()
        remover.join(0.3)  # it may have to wait

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("set_alias", meanwhile))
    with Store(adapter, 64 << 20) as store:
        store.alias("m", "prod", "1")
        remover.join(60)
        assert "alias 'prod' points at m@1" in str(told[0])
        assert same(store.load("m@prod"), version(1))
        assert store.verify().errors == []


def test_a_model_that_is_removed_before_its_layers_are_read_is_told_as_removed(
    store_url: str,
) -> None:
    """It was said to have no graph."""
    x = np.ones((1, 3), np.float32)
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(store_url) as store:
        store.add("m", {"w": x}, graph=graph)

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m@1")

    adapter, _ = inject(registry.connect(store_url, mode="r"), Fault("artifact", remove))
    with (
        Store(adapter, 64 << 20) as store,
        pytest.raises(NotFoundError, match="m@1 was removed from the store"),
    ):
        store.predict("m", x)


def test_a_vacuum_leaves_pages_that_an_add_has_staged(store_url: str, small_pages: None) -> None:
    """While they are written no model is recorded as reading them."""
    model = {"w": np.random.default_rng(0).standard_normal((768, 1024))}
    unread: list[int] = []

    def vacuum() -> None:
        with pydedup.open(store_url) as store:
            staged = {row.id for row in store._adapter.page_rows(state=STAGING)}
            unread.append(len(staged.intersection(store._adapter.orphan_pages())))
            store.vacuum()

    with pydedup.open(store_url):
        pass
    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    with Store(adapter, 64 << 20) as store:
        for call in (2, 3, 4):  # between two transactions
            control.add_fault(Fault(scope, vacuum, call=control.calls[scope] + call))
        store.add("m", model, workers=1)
        assert max(unread) > 0
        assert np.array_equal(store.load("m")["w"], model["w"])
        assert store.verify().errors == []


def test_what_an_add_shares_is_removed_before_it_is_staged(store_url: str) -> None:
    """By a removal alone, without a vacuum: the pages are nobody's from then on."""
    shared, own = np.random.default_rng(0).standard_normal((2, 128, 128))
    with pydedup.open(store_url) as store:
        store.add("m", {"w": shared})

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m")

    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    control.add_fault(Fault(scope, remove))
    with Store(adapter, 64 << 20) as store:
        store.add("n", {"w": shared, "own": own})
        assert [info.name for info in store.models()] == ["n"]
        assert store.verify().errors == []
        store.vacuum()
        assert np.array_equal(store.load("n")["w"], shared)
        assert np.array_equal(store.load("n")["own"], own)


def test_bases_of_what_an_add_shares_are_removed_before_it_is_staged(store_url: str) -> None:
    """The deltas are still there, on a page that another model reads; their bases are nobody's."""
    base, own = np.random.default_rng(0).standard_normal((2, 128, 128)).astype(np.float32)
    near = base * np.float32(1 + 1e-6)
    with pydedup.open(store_url) as store:
        store.add("base", {"w": base})
        added = store.add_many({"mixed": {"w": near, "own": own}, "other": {"own": own}})
        assert added[0].delta_blocks > 0

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("mixed")
            store.remove("base")
            assert any("whose base is gone" in note for note in store.verify().notes)

    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    control.add_fault(Fault(scope, remove))
    with Store(adapter, 64 << 20) as store:
        store.add("n", {"w": near})
        assert [info.name for info in store.models()] == ["n", "other"]
        assert store.verify().errors == []
        store.vacuum()
        assert np.array_equal(store.load("n")["w"], near)


@pytest.mark.parametrize("always", [False, True])
def test_a_vacuum_gives_way_to_who_publishes_before_its_layout(
    store_url: str, always: bool
) -> None:
    """Pages that came meanwhile are not of its layout, and would go with the old ones.

    It tries again, and says so where that is always for nothing.
    """
    a, b, c = np.random.default_rng(0).standard_normal((3, 128, 128))
    with pydedup.open(store_url) as store:
        store.add_many({"gone": {"a": a, "b": b}, "kept": {"a": a}}, policy=policies.Exact())
        store.remove("gone")

    is_alone = False

    def add() -> None:
        if not is_alone:
            with pydedup.open(store_url) as store:
                store.add("new", {"c": c}, policy=policies.Exact())

    adapter, control = inject(registry.connect(store_url, mode="a"))
    if always:
        control.add_fault(Fault("epoch", add, call=0, after=True))
    else:
        # What is staged is so in the first transaction of that kind, else in the second of all.
        scope, call = ("staging", 1) if isinstance(adapter, StagingAdapter) else ("transaction", 2)
        control.add_fault(Fault(scope, add, call=call, after=True))
    with Store(adapter, 64 << 20) as store:
        for is_alone in (False, True):
            vacuum = store.vacuum()
            assert (vacuum.rewritten_pages > 0) == (is_alone == always)
            assert ("3 attempts" in str(vacuum.not_repacked)) == (always and not is_alone)
            assert np.array_equal(store.load("kept")["a"], a)
            assert np.array_equal(store.load("new")["c"], c)
            report = store.verify()
            assert (report.errors, report.notes) == ([], []), "what it staged is gone"


def test_a_vacuum_goes_on_when_another_deletes_what_it_looks_at(
    store_url: str, small_pages: None
) -> None:
    """The store was said to be damaged: a page was gone between its block maps and its blocks."""
    rng = np.random.default_rng(0)
    base, own, later = rng.standard_normal((3, 1024, 1024)).astype(np.float32)
    a, b = rng.standard_normal((2, 1024, 2)).astype(np.float32)
    tuned = base + a @ b.T * np.float32(0.01)  # deltas with factors in common: read for their sizes
    with pydedup.open(store_url) as store:
        store.add("base", {"w": base})
        store.add("mixed", {"w": tuned, "own": own})
        store.add("kept", {"w": tuned})
        store.add("later", {"w": later})  # which a small pool has when all was looked at
        store.remove("mixed")
    others: list[VacuumReport] = []

    def vacuum() -> None:
        with pydedup.open(store_url) as store:
            others.append(store.vacuum())

    # Of its snapshots the first tells whether a new layout may pay, the second what it is of.
    fault = Fault("snapshot", vacuum, call=2, after=True)
    adapter, _ = inject(registry.connect(store_url, mode="a"), fault)
    with Store(adapter, 4 << 20) as store:
        report = store.vacuum()
        assert others[0].rewritten_pages > 0, "it came in between"
        assert (report.rewritten_pages, report.not_repacked) == (0, None)
        assert np.array_equal(store.load("kept")["w"], tuned)
        assert store.verify().errors == []


@pytest.mark.parametrize("is_removed", [False, True])
def test_pages_that_go_while_a_model_is_warmed(store_url: str, is_removed: bool) -> None:
    """They were said to be missing; a vacuum had moved the blocks, or deleted the model's."""
    a, b = np.random.default_rng(0).standard_normal((2, 128, 128))
    with pydedup.open(store_url) as store:
        store.add_many({"gone": {"a": a, "b": b}, "kept": {"a": a}}, policy=policies.Exact())
        store.remove("gone")

    def vacuum() -> None:
        with pydedup.open(store_url) as store:
            if is_removed:
                store.remove("kept")
            assert store.vacuum().freed_pages == 1

    fault = Fault("model_pages", vacuum, after=True)
    adapter, _ = inject(registry.connect(store_url, mode="r"), fault)
    with Store(adapter, 64 << 20) as store:
        if is_removed:
            with pytest.raises(NotFoundError, match="no model 'kept'"):
                store.warm("kept")
        else:
            assert store.warm("kept") == 1


def test_a_vacuum_leaves_the_index_of_what_is_added_meanwhile(store_url: str) -> None:
    """The pages were looked at before, so all that it had indexed was on none of them."""
    # Of a full page each: of small ones a vacuum may make one, which the next add indexes.
    arrays = np.random.default_rng(0).standard_normal((2, 480, 256))
    with pydedup.open(store_url) as store:
        store.add("m@1", {"w": arrays[0]})

    def add() -> None:
        with pydedup.open(store_url) as store:
            store.add("m@2", {"w": arrays[1]})

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("signatures", add))
    with Store(adapter, 64 << 20) as store:
        store.vacuum()
        covered = np.concatenate([segment.page_ids for segment in read_segments(adapter)])
        assert set(covered.tolist()) == {row.id for row in adapter.page_rows()}


def test_a_model_that_is_removed_meanwhile_is_not_exported_without_its_files(
    store_url: str, tmp_path: Path
) -> None:
    """What it had beside its tensors was left out."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones((3, 3), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with pydedup.open(store_url) as store:
        store.add("m", folder)

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m@1")

    adapter, _ = inject(registry.connect(store_url, mode="r"), Fault("artifacts", remove))
    with Store(adapter, 64 << 20) as store:
        store.load("m")  # so that no page has to be read
        with pytest.raises(NotFoundError, match="m@1 was removed from the store"):
            store.export("m", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
