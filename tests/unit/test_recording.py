# SPDX-License-Identifier: Apache-2.0
"""Recordings of uses of pages, which `replay` takes: they have an end, and take memory at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, FormatError, StorageFullError
from pydedup.pool import Called, PagePool
from pydedup.replacement import Trace, replay
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


def test_a_record_is_written_in_one_step_and_over_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full left half of one, and what was there before was gone."""
    pool = pool_of_two()
    pool.record(4)
    pool.pages([1])
    path, store = tmp_path / "trace.npz", tmp_path / "models.db"
    pool.recorded().save(path)
    pool.pages([2])

    def half(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(StorageFullError, match=r"trace\.npz"):
            pool.recorded().save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert len(Trace.load(path)) == 1
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(ArgumentError, match="is a SQLite database"):
        pool.recorded().save(store)
    pool.recorded().save(path)
    assert len(Trace.load(path)) == 2


@pytest.mark.parametrize("end", ["", "-wal", "-shm"])
def test_an_open_store_is_no_trace_and_keeps_its_locks(end: str, tmp_path: Path) -> None:
    """It was read to say so, and closed again: by a rule of POSIX its locks were gone then."""
    path = tmp_path / "store.db"
    (tmp_path / "link").symlink_to(f"{path}{end}")

    def locks() -> list[str]:
        inodes = [f":{Path(f'{path}{kind}').stat().st_ino} " for kind in ("", "-shm")]
        lines = Path("/proc/locks").read_text().splitlines()
        return [line.split(maxsplit=1)[1] for line in lines if any(i in line for i in inodes)]

    with pydedup.open(path) as store:
        store.add("m", {"w": np.ones((4, 4), np.float32)})
        before = locks()
        assert before
        for given in (f"{path}{end}", tmp_path / "link"):
            with pytest.raises(FormatError, match="is a SQLite database, maybe a store, and no"):
                Trace.load(given)
        assert locks() == before
