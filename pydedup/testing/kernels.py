# SPDX-License-Identifier: Apache-2.0
"""Each kernel that this machine runs, for tests: the one in use is chosen once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from pydedup import config

__all__ = ["RUNNABLE", "run_with_kernel"]

#: Names of the kernels that are built and that this CPU can run.
RUNNABLE: Final = [
    kernel.name for kernel in config.kernels().available if kernel.built and kernel.runnable
]


def run_with_kernel(kernel: str, script: str, *arguments: object) -> str:
    """Return what a script prints in a process of its own that computes with this kernel.

    Raises
    ------
    AssertionError
        The script failed, or another kernel was in use.
    """
    checked = (
        "from pydedup import config\n"
        f"assert config.kernels().in_use == {kernel!r}, config.kernels()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", checked + script, *map(str, arguments)],
        env={**os.environ, "PYDEDUP_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
