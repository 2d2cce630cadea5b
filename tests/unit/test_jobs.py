# SPDX-License-Identifier: Apache-2.0
"""Whether work that left a row is still going on: by its process, else by its last sign of life."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup import jobs
from pydedup.jobs import LEASE_SECONDS, Job, job_is_dead, staging_jobs

DAY = 86400.0


def spec_of(process: dict[str, Any] | None) -> str:
    return json.dumps({"kind": "add", "models": [], "process": process})


def stamp(seconds: float = 0.0) -> str:
    """The time so many seconds ago."""
    return repr(time.time() - seconds)


def test_who_was_killed_is_dead_before_its_parent_has_waited_for_it() -> None:
    """Of a client that a service restarts, say: the next one begins at once."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        spec = spec_of(jobs._identity(child.pid))
        assert not job_is_dead(spec, stamp())
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert job_is_dead(spec, stamp())
    finally:
        child.kill()
        child.communicate()
    assert job_is_dead(spec, stamp())


@pytest.mark.parametrize(
    ("change", "is_dead"),
    [
        ({}, False),
        ({"started": "1"}, True),  # another process has its number by now
        # Of those elsewhere nothing is known.
        ({"started": "1", "boot": "another machine"}, False),
        ({"started": "1", "namespace": "pid:[1]"}, False),
    ],
)
def test_a_process_is_asked_for_where_it_can_be(change: dict[str, str], is_dead: bool) -> None:
    process = jobs._identity(os.getpid())
    assert process is not None
    spec, room = spec_of({**process, **change}), bytearray(64 << 20)
    assert job_is_dead(spec, stamp()) == is_dead, "whatever memory it has taken since"
    assert job_is_dead(spec, stamp(LEASE_SECONDS + 60))
    del room


@pytest.mark.parametrize("jump", [LEASE_SECONDS + 60, -LEASE_SECONDS - 60, -8 * DAY])
def test_a_clock_that_is_set_ends_nobody_on_its_machine(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vacuum took a writer for silent, or its row for damaged, since the clock was set."""
    now = time.time
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        adapter = store._adapter
        job = Job(adapter, "add")
        with job.staging():
            job.beat()
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        store.vacuum()
        assert len(staging_jobs(adapter)) == 1
        store.vacuum(lease_seconds=0)
        assert staging_jobs(adapter) == []


def test_where_nothing_is_known_of_processes_the_last_sign_of_life_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(jobs._identity(os.getpid()))
    monkeypatch.setattr(jobs, "_identity", lambda pid: None)  # as without /proc
    assert not job_is_dead(spec, stamp())
    assert job_is_dead(spec, stamp(LEASE_SECONDS + 60))


@pytest.mark.parametrize(
    ("silent_for", "is_dead"),
    [
        (LEASE_SECONDS - 60, False),
        (LEASE_SECONDS + 60, True),
        (-DAY, False),  # by the clock of another machine, which is ahead
        (-8 * DAY, True),  # as none is: the row is damaged
    ],
)
def test_of_a_process_that_is_not_named_the_last_sign_of_life_counts(
    silent_for: float, is_dead: bool
) -> None:
    assert job_is_dead(spec_of(None), stamp(silent_for)) == is_dead
