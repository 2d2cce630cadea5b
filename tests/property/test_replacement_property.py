# SPDX-License-Identifier: Apache-2.0
"""Replays against plain Python models of the policies, and no policy against the optimum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup.errors import ArgumentError, FormatError
from pydedup.replacement import POLICIES, Trace, replay

_CALLS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=12)),
    min_size=1,
    max_size=12,
)


def trace_of(calls: list[tuple[int, list[int]]], nbytes: int = 10) -> Trace:
    pages = [page for _, used in calls for page in used]
    return Trace(
        np.array(pages, np.int64),
        np.full(len(pages), nbytes, np.uint32),
        np.repeat(np.arange(1, len(calls) + 1, dtype=np.uint32), [len(used) for _, used in calls]),
        np.array([owner for owner, _ in calls], np.int64),
    )


def plain_misses(trace: Trace, places: int, policy: str) -> list[int]:
    """Calls that missed, ``places`` pages of one size, as one would write the policy down."""
    resident: list[int] = []
    last: dict[int, int] = {}
    before: dict[int, int] = {}
    call_of: dict[int, int] = {}
    misses = []
    uses = list(zip(trace.pages.tolist(), trace.calls.tolist(), strict=True))
    for now, (page, call) in enumerate(uses, 1):
        if page not in resident:
            misses.append(call)
            if len(resident) == places:
                resident.remove(_victim(policy, resident, last, before, uses, now))
            resident.append(page)
        if page in last and call_of[page] != call:
            before[page] = last[page]
        last[page], call_of[page] = now, call
    return misses


def _victim(
    policy: str,
    resident: list[int],
    last: dict[int, int],
    before: dict[int, int],
    uses: list[tuple[int, int]],
    now: int,
) -> int:
    if policy == "lru":
        return min(resident, key=lambda page: last[page])
    if policy == "mru":
        return max(resident, key=lambda page: last[page])
    if policy == "lru2":
        return min(resident, key=lambda page: (page in before, before.get(page, last[page])))
    later = [page for page, _ in uses[now - 1 :]]
    return max(resident, key=lambda page: later.index(page) if page in later else len(later))


@pytest.mark.parametrize("policy", ["lru", "mru", "lru2", "optimum"])
@given(calls=_CALLS, places=st.integers(1, 8))
def test_misses_are_those_of_the_policy_as_written_down(
    policy: str, calls: list[tuple[int, list[int]]], places: int
) -> None:
    trace = trace_of(calls)
    result = replay(trace, places * 10 + 9, policy)
    missed = plain_misses(trace, places, policy)
    assert (result.misses, result.missed_calls) == (len(missed), len(set(missed)))
    assert result.hits == len(trace) - result.misses
    assert result.missed_bytes == 10 * result.misses


@given(calls=_CALLS, places=st.integers(1, 8))
def test_nobody_misses_less_than_the_optimum(
    calls: list[tuple[int, list[int]]], places: int
) -> None:
    trace = trace_of(calls)
    optimum = replay(trace, places * 10, "optimum").misses
    for policy in POLICIES:
        misses = replay(trace, places * 10, policy).misses
        assert optimum <= misses <= len(trace)


def looped(rounds: int, pages: int) -> Trace:
    return trace_of([(0, list(range(pages)))] * rounds)


def test_a_loop_that_does_not_fit_keeps_what_does() -> None:
    trace = looped(20, 100)
    assert replay(trace, 500, "lru").misses == 2000
    assert replay(trace, "0.5kB", "lru") == replay(trace, 500, "lru")
    optimum = replay(trace, 500, "optimum").misses
    assert replay(trace, 500, "reuse").misses <= 1.02 * optimum


def test_one_pass_over_others_does_not_cost_the_pages_of_busy_models() -> None:
    calls = [(0, list(range(50)))] * 20 + [(1, list(range(1000, 1400)))]
    calls += [(0, list(range(50)))]
    trace = trace_of(calls)
    assert replay(trace, 600, "lru").misses == 500
    assert replay(trace, 600, "reuse").misses == 450


def test_pages_of_many_callers_outlive_those_of_one() -> None:
    """Tenants in groups of ten that share three quarters of their pages, called by Zipf's law."""
    rng = np.random.default_rng(7)
    weights = 1 / np.arange(1, 101)
    calls = []
    for tenant in rng.choice(100, 1500, p=weights / weights.sum()).tolist():
        shared = [10_000 + tenant % 10 * 12 + i for i in range(12)]
        calls.append((tenant, shared + [tenant * 4 + i for i in range(4)]))
    trace = trace_of(calls)
    misses = {policy: replay(trace, 1500, policy).misses for policy in POLICIES}
    assert misses["reuse"] <= 1.02 * min(misses.values())
    assert 1.3 * misses["reuse"] < misses["lru"]


def test_traces_that_make_no_sense_are_refused() -> None:
    trace = trace_of([(0, [1, 2])])
    with pytest.raises(ArgumentError, match=r"unknown replacement policy 'fifo'.*optimum"):
        replay(trace, 100, "fifo")
    with pytest.raises(ArgumentError, match=r"trace must be a pydedup.replacement.Trace.*not str"):
        replay("trace.npz", 100, "lru")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="page of 10 bytes, more than the budget of 9"):
        replay(trace, 9, "lru")
    sizes = Trace(np.array([1, 1]), np.array([3, 4], np.uint32), trace.calls, trace.owners)
    with pytest.raises(ArgumentError, match="two sizes of page 1"):
        replay(sizes, 100, "lru")
    short = Trace(trace.pages, trace.nbytes[:1], trace.calls, trace.owners)
    with pytest.raises(ArgumentError, match="2 uses, but 1 sizes"):
        replay(short, 100, "lru")
    late = Trace(trace.pages, trace.nbytes, np.array([1, 9], np.uint32), trace.owners)
    with pytest.raises(ArgumentError, match="call 9 at use 1"):
        replay(late, 100, "lru")


def test_damage_to_a_saved_trace_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    trace_of([(owner, [3, 1, 4]) for owner in range(20)]).save(path)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 9]) + whole[at + 1 :])
        try:
            Trace.load(path)
        except FormatError as error:
            refused += "no recorded trace, or a damaged one" in str(error)
    assert refused > len(whole) / 7 / 2
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "missing.npz")


def test_many_sets_of_owners_take_little_memory() -> None:
    """300 models that each read a random half of 2,000 pages: as many sets as pages at any time."""
    code = """
import resource, numpy as np
from pydedup import _core
pool = _core.BufferPool(1 << 30)
rng = np.random.default_rng(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for owner in range(300):
    pool.owns(owner, np.flatnonzero(rng.random(2000) < 0.5).astype(np.int64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024  # KiB; it was 371 MB when steps between sets were kept
