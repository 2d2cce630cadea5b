# SPDX-License-Identifier: Apache-2.0
"""Copies while others add, remove, rename and vacuum, at the source and at the destination."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE, STAGING, Adapter
from pydedup.errors import ArgumentError, ConflictError, DuplicateError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import plan_copy
from pydedup.store import Store
from pydedup.testing.faults import Fault, FaultyAdapter, inject
from pydedup.types import CopyReport

New = Callable[[str], str]
BACKENDS = ("sqlite", "postgres", "mysql")


def copy_with(
    source_url: str,
    url: str,
    faults: Callable[[FaultyAdapter], None],
    source_faults: Callable[[FaultyAdapter], None] = lambda control: None,
) -> CopyReport:
    """Copy all models, with these faults at the destination, and at the source."""
    with pydedup.open(url):
        pass
    target, control = inject(registry.connect(url, mode="a"))
    source, source_control = inject(registry.connect(source_url, mode="r"))
    with Store(source, 64 << 20) as ours, Store(target, 64 << 20) as theirs:
        items = plan_copy(source, target, None, all_versions=False, on_conflict="error")
        faults(control)
        source_faults(source_control)
        return copy_models(ours._end(), theirs._end(), items)


def before(method: str, call: int, act: Callable[[], None]) -> Callable[[FaultyAdapter], None]:
    """Let something happen before a call of the adapter, in another connection."""

    def happen() -> None:
        act()

    return lambda control: control.add_fault(
        Fault(method, happen, call=control.calls[method] + call)
    )


def blocks_and_hashes(adapter: Adapter) -> tuple[int, int]:
    rows = adapter.blocks_on_pages([row.id for row in adapter.page_rows()])
    return len(rows), len({row.hash128 for row in rows})


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_another_adds_meanwhile_is_not_stored_twice(
    filled: New, new_store: New, family: Callable[..., Any], assert_same: Any, backend: str
) -> None:
    source_url, url = filled("sqlite"), new_store(backend)

    def add() -> None:
        with pydedup.open(url) as store:
            store.add("rival@1", family(0) | {"step": np.array(99)})

    # Before the first model is published, whose pages go whole.
    publishing = ("publishing", 1) if backend == "sqlite" else ("transaction", 3)
    report = copy_with(source_url, url, before(*publishing, add))
    assert report.copied == 8
    assert_same(source_url, url)
    with pydedup.open(url) as store:
        assert "rival@1" in {info.address for info in store.models()}
        rows, hashes = blocks_and_hashes(store._adapter)
        assert rows == hashes


def test_what_another_takes_away_meanwhile(
    filled: New, new_store: New, family: Callable[..., Any], assert_same: Any
) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    with pydedup.open(url) as store:
        store.add("other@1", family(0))

    def take() -> None:
        with pydedup.open(url) as store:
            store.remove("other")
            store.vacuum()

    # After base@1 was found to be all there, before it is published.
    copy_with(source_url, url, before("insert_model", 1, lambda: None))
    with pydedup.open(url) as store:
        for name in {info.name for info in store.models()} - {"other"}:
            store.remove(name, all_versions=True)
        store.vacuum()
    report = copy_with(source_url, url, before("publishing", 1, take))
    assert report.copied == 8
    assert_same(source_url, url)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vacuum_of_the_source_meanwhile(
    filled: New, new_store: New, assert_same: Any, backend: str
) -> None:
    source_url, url = filled(backend), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.remove("exact@1")
        store.remove("base@1")

    def vacuum() -> None:
        with pydedup.open(source_url) as store:
            assert store.vacuum().repacked_pages > 0

    copy_with(source_url, url, lambda control: None, before("read_pages", 3, vacuum))
    assert_same(source_url, url)


@pytest.mark.usefixtures("one_by_one")
def test_what_is_there_is_found_after_a_vacuum_of_the_source(
    new_store: New, assert_same: Any
) -> None:
    """Between two models it moves the blocks that both have, so nothing is known of them."""
    source_url, url = new_store("sqlite"), new_store("sqlite")
    rng = np.random.default_rng(5)
    shared, more, *own = (rng.standard_normal((200, 128)).astype(np.float32) for _ in range(4))
    with pydedup.open(source_url) as store:
        store.add("gone", {"t": shared, "w": more}, policy=pydedup.policies.Exact())
        for name, array in zip("ab", own, strict=True):
            store.add(name, {"t": shared, "w": array}, policy=pydedup.policies.Exact())
        store.remove("gone")
    moved: list[int] = []

    def vacuum(stage: str, done: int, total: int) -> None:
        with pydedup.open(url, mode="r") as target:
            is_time = not moved and len(target.models()) == 1
        if is_time:
            with pydedup.open(source_url) as other:
                moved.append(other.vacuum().repacked_pages)

    with pydedup.open(source_url, mode="r") as store:
        report = store.copy_to(url, progress=vacuum)
    assert moved[0] > 0
    assert [model.shared_blocks > 0 for model in report.models] == [False, True]
    assert_same(source_url, url)


def test_a_model_that_is_removed_meanwhile(filled: New, new_store: New, assert_same: Any) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")

    def remove() -> None:
        with pydedup.open(source_url) as store:
            store.remove("exact@1")

    report = copy_with(source_url, url, before("insert_model", 2, remove))
    status = {model.model: model.status for model in report.models}
    assert status.pop("exact@1") == "gone"
    assert set(status.values()) == {"copied"}
    assert_same(source_url, url)


@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "of before it was"])
def test_a_model_that_is_removed_while_it_is_copied_does_not_arrive_without_its_graph(
    new_store: New, family: Callable[..., Any], is_recorded: bool
) -> None:
    """Its blocks were read, its graph was gone, and the copy said that all was there."""
    source_url, url = new_store("sqlite"), new_store("sqlite")
    node = Node("linear", ("x",), "y", {"weight": "w", "bias": "b"})
    with pydedup.open(source_url) as store:
        store.add("m@1", family(0), graph=Graph(("x",), ("y",), (node,)))
        if not is_recorded:  # that there is a graph
            (row,) = store._adapter.models()
            certificate = json.loads(row.certificate)
            assert certificate.pop("artifacts")
            with store._adapter.transaction():
                store._adapter.update_model(row.id, certificate=json.dumps(certificate))
    with pydedup.open(url) as target:
        target.add("other@1", family(7, 9))  # so the blocks are read one by one

    def remove(stage: str, _: int, __: int) -> None:
        with pydedup.open(source_url) as other:
            if other.models():
                assert other.remove("m") == ["m@1"]

    with pydedup.open(source_url, mode="r") as store:
        (model,) = store.copy_to(url, progress=remove).models
    with pydedup.open(url) as target:
        assert (model.status, [info.address for info in target.models()]) == ("gone", ["other@1"])
        assert target.verify().errors == []
        assert target._adapter.models(state=STAGING) == []


def test_two_copies_at_once(filled: New, new_store: New, assert_same: Any) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")

    def copy() -> None:
        with pydedup.open(source_url, mode="r") as store:
            store.copy_to(url, ["base", "near@1"])

    report = copy_with(source_url, url, before("publishing", 1, copy))
    status = {model.model: model.status for model in report.models}
    assert (status.pop("base@1"), status.pop("near@1")) == ("there", "there")
    assert set(status.values()) == {"copied"}
    assert_same(source_url, url)


def test_others_who_never_stop(filled: New, new_store: New, family: Callable[..., Any]) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    count = [0]

    def disturb() -> None:
        with pydedup.open(url) as store:
            if store.models():
                store.remove("rival", all_versions=True)
                store.vacuum()
            count[0] += 1
            store.add("rival", family(0))

    def always(control: FaultyAdapter) -> None:
        control.add_fault(Fault("bump_epoch", lambda: None, call=0))
        control.add_fault(Fault("insert_model", lambda: None, call=0))
        control.add_fault(Fault("checkpoint", lambda: None, call=0))

    copy_with(source_url, url, always)
    with pydedup.open(url) as store:
        for name in {info.name for info in store.models()}:
            store.remove(name, all_versions=True)
        store.vacuum()

    def between(control: FaultyAdapter) -> None:
        # Each time that it looks where blocks are, before anything is staged.
        control.add_fault(Fault("find_blocks", disturb, call=0, after=True))
        control.add_fault(Fault("read_pages", disturb, call=0, after=True))

    with pydedup.open(url) as store:
        store.add("rival", family(0))
    with pytest.raises((ConflictError, DuplicateError)):
        copy_with(source_url, url, between)
    assert count[0] >= 8
    with pydedup.open(url) as store:
        store.vacuum()
        assert (store.verify().errors, store.verify().notes) == ([], [])


def test_a_removed_model_that_was_named(filled: New, new_store: New) -> None:
    with pydedup.open(filled("sqlite")) as store:
        store.remove("exact")
        with pytest.raises(NotFoundError, match="exact"):
            store.copy_to(new_store("sqlite"), ["exact"])


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_while_another_model_is_published_is_not_relied_upon(
    new_store: New, backend: str
) -> None:
    """A removal and a vacuum between two tries to publish m1 take pages that m2 would share."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(3))
    url = new_store(backend)
    done: list[str] = []

    def remove(stage: str, _: int, __: int) -> None:
        with pydedup.open(url) as other:
            names = {info.address for info in other.models()}
            if stage == "checking" and names == {"m0@1"} and not done:
                done.append("removed")
                other.remove("m0@1")
                other.vacuum()

    with pydedup.open(new_store("sqlite")) as store:
        store.add("m0@1", {"a": a})
        store.add("m1@1", {"b": b})
        store.add("m2@1", {"a": a, "c": c})
        store.copy_to(url, progress=remove)
    assert done
    with pydedup.open(url) as target:
        assert target.verify().ok
        assert np.array_equal(target.load("m2@1")["a"], a)
        assert np.array_equal(target.load("m1@1")["b"], b)


def test_pages_of_a_model_that_is_replaced_are_not_relied_upon(new_store: New) -> None:
    """They have what a later model of the copy needs, and go with the one that is replaced."""
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    url = new_store("sqlite")
    with pydedup.open(url) as target:
        target.add("m@1", {"w": b})
    with pydedup.open(new_store("sqlite")) as store:
        store.add("m@1", {"w": a})
        store.add("n@1", {"w": b})
        report = store.copy_to(url, on_conflict="replace")
    assert [model.status for model in report.models] == ["replaced", "copied"]
    with pydedup.open(url) as target:
        target.vacuum()
        assert target.verify().ok
        assert np.array_equal(target.load("m@1")["w"], a)
        assert np.array_equal(target.load("n@1")["w"], b)


def test_a_model_that_is_there_and_goes_meanwhile_gets_no_alias(
    new_store: New, family: Callable[..., Any]
) -> None:
    url = new_store("sqlite")
    with pydedup.open(new_store("sqlite")) as store:
        store.add("a@1", family(0))
        store.copy_to(url)
        store.alias("a", "prod", "1")
        store.add("b@1", family(1))

        def remove(stage: str, _: int, __: int) -> None:
            with pydedup.open(url) as target:
                if any(info.name == "a" for info in target.models()):
                    target.remove("a")

        report = store.copy_to(url, progress=remove)
    assert [(m.model, m.status) for m in report.models] == [("a@1", "there"), ("b@1", "copied")]
    with pydedup.open(url) as target:
        assert [info.address for info in target.models()] == ["b@1"]
        assert target._adapter.aliases() == []
        target.add("a@2", family(2))
        with pytest.raises(NotFoundError):
            target.info("a@prod")


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("1", "an alias", "an alias m@1 since a moment ago"),
        ("prod", "an alias", "m@prod as an alias of another version"),
        ("prod", "a version", "m@prod as a version"),
    ],
)
def test_names_that_others_take_meanwhile(
    new_store: New, family: Callable[..., Any], name: str, by: str, said: str
) -> None:
    url = new_store("sqlite")
    with pydedup.open(url) as target:
        target.add("m@7", family(7))

    def take(stage: str, _: int, __: int) -> None:
        with pydedup.open(url) as target:
            if target.info("m@7").info.aliases or len(target.models()) > 1:
                return
            if by == "an alias":
                target.alias("m", name, "7")
            else:
                target.add(f"m@{name}", family(9))

    with pydedup.open(new_store("sqlite")) as store:
        store.add("m@1", family(1))
        if name != "1":
            store.alias("m", name, "1")
        with pytest.raises(DuplicateError, match=said):
            store.copy_to(url, progress=take)
    with pydedup.open(url) as target:
        assert "m@1" not in {info.address for info in target.models()}
        if by == "an alias":
            assert target.info(f"m@{name}").info.address == "m@7"
        report = target.verify()
        assert (report.errors, report.ok) == ([], True)


def test_a_vacuum_of_the_source_meanwhile_is_no_damage(
    new_store: New, family: Callable[..., Any], assert_same: Any
) -> None:
    """It moves blocks to other pages between what a copy reads of the source."""
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        for number in range(4):
            store.add(f"m{number}", family(number))
        store.remove("m0")
    vacuumed: list[int] = []

    def vacuum(stage: str, _: int, __: int) -> None:
        if len(vacuumed) < 2:
            vacuumed.append(1)
            with pydedup.open(source_url) as other:
                other.add(f"more{len(vacuumed)}", family(10 + len(vacuumed)))
                other.remove(f"more{len(vacuumed)}")
                other.vacuum()

    with pydedup.open(source_url) as store:
        report = store.copy_to(url, progress=vacuum)
    assert vacuumed
    assert report.copied == 3
    assert_same(source_url, url)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_alias_of_a_copy_never_points_at_what_is_removed_meanwhile(
    new_store: New, family: Callable[..., Any], backend: str
) -> None:
    source_url, url = new_store("sqlite"), new_store(backend)
    with pydedup.open(source_url) as store:
        store.add("a@1", family(0))
        store.copy_to(url)
        store.alias("a", "prod", "1")
    told: list[Exception] = []

    def remove() -> None:
        try:
            with pydedup.open(url) as target:
                target.remove("a@1")
        except ArgumentError as error:
            told.append(error)

    remover = threading.Thread(target=remove)

    def meanwhile() -> None:
        remover.start()
        remover.join(0.3)  # it has to wait

    copy_with(source_url, url, before("set_alias", 1, meanwhile))
    remover.join(60)
    assert "alias 'prod' points at a@1" in str(told[0])
    with pydedup.open(url) as target:
        assert target.info("a@prod").info.address == "a@1"
        assert target.verify().errors == []


def test_what_a_dead_copy_left_goes_and_pages_in_grace_stay(
    new_store: New, family: Callable[..., Any]
) -> None:
    """The next copy takes away the one, and readers may still ask for the other."""
    url = new_store("sqlite")
    with pydedup.open(url) as target:
        target.add("m@1", family(0))
        pages = len(target._adapter.page_rows(state=LIVE))
        target.remove("m@1")
        assert target.vacuum(grace_seconds=3600).waiting_pages == pages
        adapter = target._adapter
        with adapter.transaction():
            adapter.put_job("silent", '{"kind": "copy", "models": []}', "0.0", "running")
            adapter.insert_pages([(bytes(16), b"unfinished")], state=STAGING)
    with pydedup.open(new_store("sqlite")) as store:
        store.add("n@1", family(1, 9))
        store.copy_to(url)
    with pydedup.open(url) as target:
        assert target._adapter.jobs() == []
        states = [row.state for row in target._adapter.page_rows() if row.state != LIVE]
        assert states == ["retired"] * pages
