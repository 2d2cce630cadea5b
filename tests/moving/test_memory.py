# SPDX-License-Identifier: Apache-2.0
"""A copy takes its two pools and little more, whatever the store holds: RSS of a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup

POOL = 24 * 1024 * 1024

CHILD = """
import json, sys
import pydedup
from pydedup.testing.resident import ResidentMemory

source, target, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])

with pydedup.open(source, mode="r", memory=memory) as store:
    store.copy_to(target, ["warm-up"], memory=memory)
    with ResidentMemory() as resident:
        before = resident.now()
        report = store.copy_to(target, memory=memory)
        peak = resident.peak()
    print(json.dumps({"peak": peak - before, "stored": report.stored_bytes}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four models of 64 MiB."""
    path = tmp_path_factory.mktemp("large") / "large.db"
    rng = np.random.default_rng(0)
    with pydedup.open(path) as store:
        store.add("warm-up", {"w": rng.standard_normal((512, 512), np.float32)})
        for number in range(4):
            layers = {f"w{n}": rng.standard_normal((4096, 1024), np.float32) for n in range(4)}
            store.add(f"m{number}", layers, policy=pydedup.policies.Exact())
    return path


@pytest.mark.parametrize("target", ["sqlite", "postgres", "mysql"])
@pytest.mark.parametrize("into", ["empty", pytest.param("others", marks=pytest.mark.long)])
def test_a_copy_takes_its_pools_and_little_more(
    large: Path, new_store: Callable[[str], str], target: str, into: str
) -> None:
    url = new_store(target)
    if into == "others":
        with pydedup.open(url) as store:
            store.add("other", {"w": np.ones((512, 512), np.float32)})
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(large), url, str(2 * POOL)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["stored"] > 240 * 1024 * 1024
    # Half of each budget is a pool; groups of 16 pages are written and read back at once.
    assert 16 * 1024 * 1024 < result["peak"] < 2 * POOL + 96 * 1024 * 1024, result
