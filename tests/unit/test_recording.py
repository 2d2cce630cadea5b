# SPDX-License-Identifier: Apache-2.0
"""Recordings of uses of pages, which `replay` takes: they have an end, and take memory at once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pydedup.errors import ArgumentError
from pydedup.pool import Called, PagePool
from pydedup.replacement import replay
from pydedup.testing.memory_pages import MemoryPages


def pool_of_two() -> PagePool:
    pages = MemoryPages()
    pages.add(np.ones((2, 1000), np.float32), (1, 1000), per_page=1)
    return pages.pool()


def test_a_recording_that_is_full_takes_no_more_memory() -> None:
    pool = pool_of_two()
    for uses_pages in (True, False):  # calls of ONNX Runtime's sessions use none
        pool.record(4)
        for _ in range(100):
            with pool.call(Called(7, 0, lambda: np.array([1, 2]))):
                if uses_pages:
                    pool.pages([1, 2])
        pool.pages([1])
        trace = pool.recorded()
        assert not trace.complete
        assert len(trace) == (4 if uses_pages else 0)
        assert len(trace.owners) <= 5
        assert replay(trace, "1MiB", "lru").misses == (2 if uses_pages else 0)
    for wrong in (-1, 1.5, 1 << 58):
        with pytest.raises(ArgumentError, match="max_uses"):
            pool.record(wrong)  # type: ignore[arg-type]


def test_a_recording_beyond_memory_is_refused_and_the_one_before_goes_on() -> None:
    code = f"""
import resource, runpy
from pydedup.errors import BudgetError
pool = runpy.run_path({__file__!r})["pool_of_two"]()
pool.record(4)
pool.pages([1])
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    pool.record(2**32 - 1)
except BudgetError as error:
    print(error)
pool.pages([2])
print(pool.recorded().pages)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no memory to record 4294967295 uses of pages" in done.stdout, done.stderr
    assert "[1 2]" in done.stdout
