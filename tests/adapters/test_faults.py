# SPDX-License-Identifier: Apache-2.0
"""The adapter that fails on purpose fails where it is told to, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, Adapter
from pydedup.errors import StorageFullError, UnavailableError
from pydedup.testing.faults import Fault, inject

FULL = StorageFullError("no space (injected)")


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[Adapter]:
    adapter = registry.connect(f"sqlite:///{tmp_path}/store.db", mode="a")
    adapter.create_schema({})
    yield adapter
    adapter.close()


def put(adapter: Adapter, job: str) -> None:
    with adapter.transaction():
        adapter.put_job(job, "", "", "")


def names(adapter: Adapter) -> list[str]:
    return [job[0] for job in adapter.jobs()]


def test_without_a_fault_nothing_changes(adapter: Adapter) -> None:
    faulty, control = inject(adapter)
    assert isinstance(faulty, Adapter)
    assert (faulty.url, faulty.capabilities) == (adapter.url, adapter.capabilities)
    put(faulty, "a")
    with faulty.transaction():
        (page,) = faulty.insert_pages([(bytes(16), b"p")], state=LIVE)
    with faulty.snapshot():
        assert list(faulty.read_pages([page])) == [(page, b"p")]
    assert names(adapter) == ["a"]
    assert control.calls["transaction"] == control.calls["commit"] == 2
    assert control.calls["put_job"] == control.calls["snapshot"] == 1


def test_the_chosen_call_fails(adapter: Adapter) -> None:
    faulty, control = inject(adapter, Fault("put_job", FULL, call=2))
    put(faulty, "a")
    with pytest.raises(StorageFullError, match="injected"):
        put(faulty, "b")
    put(faulty, "c")
    assert names(adapter) == ["a", "c"]
    control.add_fault(Fault("put_job", FULL, call=0))
    for _ in range(2):
        with pytest.raises(StorageFullError):
            put(faulty, "d")
    control.clear_faults()
    put(faulty, "d")
    assert names(adapter) == ["a", "c", "d"]


def test_a_commit_fails_before_or_after(adapter: Adapter) -> None:
    lost = UnavailableError("connection lost (injected)")
    faulty, _ = inject(adapter, Fault("commit", lost, call=1), Fault("commit", lost, 2, after=True))
    with pytest.raises(UnavailableError):
        put(faulty, "not committed")
    with pytest.raises(UnavailableError):
        put(faulty, "committed, and the answer lost")
    assert names(adapter) == ["committed, and the answer lost"]


def test_reading_fails_on_the_way(adapter: Adapter) -> None:
    with adapter.transaction():
        ids = adapter.insert_pages([(bytes(16), b"a"), (bytes(16), b"b")], state=LIVE)
    faulty, _ = inject(adapter, Fault("read_pages", FULL, after=True))
    pages = faulty.read_pages(ids)
    assert next(pages) == (ids[0], b"a")
    with pytest.raises(StorageFullError):
        next(pages)
    assert len(list(faulty.read_pages(ids))) == 2


def test_a_fault_may_only_look(adapter: Adapter) -> None:
    seen: list[str] = []
    faulty, _ = inject(adapter, Fault("jobs", lambda: seen.append("looked"), call=0))
    assert faulty.jobs() == []
    assert seen == ["looked"]
    faulty, _ = inject(adapter, Fault("jobs", lambda: FULL))
    with pytest.raises(StorageFullError):
        faulty.jobs()


@pytest.mark.parametrize("method", ["url", "insert_page", "capabilities", ""])
def test_a_fault_names_a_method(method: str) -> None:
    with pytest.raises(ValueError, match="no method"):
        Fault(method, FULL)
