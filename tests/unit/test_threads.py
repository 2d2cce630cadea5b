# SPDX-License-Identifier: Apache-2.0
"""``PYDEDUP_THREADS``: how many threads a computation takes that asks for no number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import pydedup
from pydedup.errors import ArgumentError

CODE = """
import os
import numpy as np
from pydedup import config, hashing
hashing.hash_blocks(np.ones((4096, 1024), np.float32), (64, 64))
print(config.threads(), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize(("said", "threads"), [("1", 1), ("3", 3), ("", 0)])
def test_threads_are_as_many_as_said(said: str, threads: int) -> None:
    environment = os.environ | {"PYDEDUP_THREADS": said, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    wanted, running = map(int, done.stdout.split())
    assert wanted == (threads or os.cpu_count())
    assert running == wanted


@pytest.mark.parametrize("said", ["0", "-3", "many", "2.5"])
def test_what_is_no_number_of_threads_is_refused(said: str, tmp_path: Path) -> None:
    """One per core was taken instead, without a word."""
    with (
        mock.patch.dict(os.environ, PYDEDUP_THREADS=said),
        pytest.raises(ArgumentError, match=f"PYDEDUP_THREADS: '{said}' is no number of threads"),
    ):
        pydedup.open(tmp_path / "new.db")
    assert list(tmp_path.iterdir()) == []
