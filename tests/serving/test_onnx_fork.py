# SPDX-License-Identifier: Apache-2.0
"""Children of a process that predicts by ONNX Runtime, whose threads they do not have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydedup

from .onnx_models import X, normal, run, stack

CHILD = """
import os, signal, sys
import numpy as np
import pydedup

store = pydedup.open(sys.argv[1])
x = np.ones((1000, 64), np.float32)  # so large that the runtime uses its threads
for _ in range(3):
    store.predict("m", x)
child = os.fork()
if child == 0:
    signal.alarm(60)
    if sys.argv[2] == "predicts":
        store.predict("m", x)
    sys.exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("how", ["idle", "predicts"])
def test_a_child_ends(tmp_path: Path, how: str) -> None:
    """It waited for ever, for a thread with which ONNX Runtime tells its makers of its use."""
    weights = {"w": normal(64, 512), "v": normal(512, 300), "bias": normal(300)}
    with pydedup.open(tmp_path / "m.db") as store:
        store.add("m", stack(tmp_path, "m.onnx", weights))
        url = store.url
    environment = {name: v for name, v in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    quiet = "ignore:This process:DeprecationWarning"  # of who forks beside threads, as ours does
    command = [sys.executable, "-W", quiet, "-c", CHILD, url, how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_child_has_the_weights_and_room_for_others(tmp_path: Path) -> None:
    """What the parent had in memory was taken off the child's budget, for good."""
    paths = []
    for name in "01":
        large = {"w": normal(64, 8000), "v": normal(8000, 64), "bias": normal(64)}  # 4 MB
        paths.append(stack(tmp_path, name, large))
    with pydedup.open(tmp_path / "small.db", memory="12MiB") as store:
        for path in paths:
            store.add(path.name, path)
        for _ in range(2):
            store.predict("0", X)
        reserved = store.stats().pool["reserved_bytes"]
        wanted = [run(path, x=X) for path in paths]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            fine = False
            try:
                same = store.stats().pool["reserved_bytes"] <= reserved
                for number in (0, 1, 1, 0):
                    found = store.predict(str(number), X)
                    same &= np.allclose(found, wanted[number], rtol=1e-3, atol=1e-4)
                    same &= store.stats().pool["bytes"] <= 12 << 20
                fine = same
            finally:
                os._exit(0 if fine else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_allclose(store.predict("0", X), wanted[0], rtol=1e-3, atol=1e-4)
