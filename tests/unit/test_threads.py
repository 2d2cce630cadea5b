# SPDX-License-Identifier: Apache-2.0
"""``PYDEDUP_THREADS``: how many threads a computation takes that asks for no number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os
import numpy as np
from pydedup import config, hashing
hashing.hash_blocks(np.ones((4096, 1024), np.float32), (64, 64))
print(config.threads(), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize(("said", "threads"), [("1", 1), ("3", 3), ("0", 0), ("many", 0)])
def test_threads_are_as_many_as_said(said: str, threads: int) -> None:
    environment = os.environ | {"PYDEDUP_THREADS": said, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    wanted, running = map(int, done.stdout.split())
    assert wanted == (threads or os.cpu_count())
    assert running == wanted
