# SPDX-License-Identifier: Apache-2.0
"""Connections that are cut in the middle of a copy, and a copy that fails at any commit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import pydedup
from pydedup import registry
from pydedup.errors import StorageFullError, UnavailableError
from pydedup.moving import together
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import plan_copy
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject
from pydedup.testing.proxy import CuttingProxy

PAGE = 1 << 18
New = Callable[[str], str]


@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_a_source_that_is_cut_is_read_on(
    filled: New, new_store: New, assert_same: Any, backend: str
) -> None:
    source_url, url = filled(backend), new_store("sqlite")
    with CuttingProxy(source_url) as proxy, pydedup.open(proxy.url, mode="r") as store:
        items = plan_copy(store._adapter, None, None, all_versions=False, on_conflict="error")
        assert len(items) == 8
        proxy.cut_after(PAGE + 7, PAGE, PAGE // 2)
        store.copy_to(url)
        assert proxy.cuts == 3
    assert_same(source_url, url)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_a_destination_that_is_cut_is_told_and_gone_on_with(
    filled: New, new_store: New, assert_same: Any, backend: str
) -> None:
    source_url, url = filled("sqlite"), new_store(backend)
    with pydedup.open(url):
        pass
    with CuttingProxy(url) as proxy:
        adapter, control = inject(registry.connect(proxy.url, mode="a"))
        # In the middle of a transaction of the second model; of the first, reading is only
        # repeated.
        control.add_fault(Fault("bump_epoch", lambda: proxy.cut_after(0), call=2))
        with pydedup.open(source_url, mode="r") as store:
            items = plan_copy(
                store._adapter, adapter, None, all_versions=False, on_conflict="error"
            )
            with Store(adapter, 64 << 20) as target, pytest.raises(UnavailableError) as caught:
                copy_models(store._end(), target._end(), items)
            assert proxy.cuts == 1
            assert "root:" not in str(caught.value)
            with pydedup.open(url, mode="r") as target:
                assert [info.address for info in target.models()] == ["base@1"]
            report = store.copy_to(proxy.url)
    assert [m.model for m in report.models if m.status == "there"] == ["base@1"]
    assert_same(source_url, url)


FULL, STOPPED, LOST = StorageFullError("full"), KeyboardInterrupt(), UnavailableError("gone")


@pytest.mark.parametrize(
    ("backend", "error", "after"),
    [
        pytest.param("sqlite", FULL, False, id="sqlite-full"),
        pytest.param("sqlite", FULL, True, id="sqlite-full-after"),
        pytest.param("sqlite", STOPPED, False, id="sqlite-^C"),
        pytest.param("sqlite", STOPPED, True, id="sqlite-^C-after"),
        pytest.param("postgres", LOST, True, id="postgres-lost-after"),
        pytest.param("mysql", LOST, True, id="mysql-lost-after"),
    ],
)
def test_every_commit_may_fail(
    filled: New,
    new_store: New,
    assert_same: Any,
    backend: str,
    error: BaseException,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source_url, url = filled("sqlite"), new_store(backend)
    # The number of commits counts twice, so most do with two models.
    names = None if (backend, error, after) == ("sqlite", STOPPED, True) else ["base@1", "near@1"]
    if names is None:
        monkeypatch.setattr(together, "_MOST_MODELS", 1)
    number, ended = 0, False
    with pydedup.open(source_url, mode="r") as source:
        while not ended:
            number += 1
            with pydedup.open(url) as store:
                for name in {info.name for info in store.models()}:
                    store.remove(name, all_versions=True)
                store.vacuum()
            adapter, control = inject(registry.connect(url, mode="a"))
            with Store(adapter, 64 << 20) as target:
                items = plan_copy(
                    source._adapter, adapter, names, all_versions=False, on_conflict="error"
                )
                control.add_fault(Fault("commit", error, call=number, after=after))
                with contextlib.suppress(type(error)):
                    copy_models(source._end(), target._end(), items)
                    ended = True
                control.clear_faults()
                report = target.verify()
                # What a copy does not know to have committed, it leaves to the next.
                assert report.errors == []
                assert report.notes == [] or after
                there = len(target.models())
                assert there == len(items) or not ended
                assert source.copy_to(url, names).copied == len(items) - there
                report = target.verify()
                assert (report.errors, report.notes) == ([], [])
            assert_same(source_url, url, names=None if names is None else set(names))
    assert number > len(items)
