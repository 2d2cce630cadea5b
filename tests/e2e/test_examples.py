# SPDX-License-Identifier: Apache-2.0
"""The examples run and say what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / "quickstart.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bit for bit: True; store verified: True" in done.stdout
    assert "tenant-a@1" in done.stdout
