# SPDX-License-Identifier: Apache-2.0
"""The examples run and say what they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydedup.testing.adapter_contract import AdapterContract

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


@pytest.mark.long
def test_an_adapter_of_a_third_party(tmp_path: Path) -> None:
    """The adapter for DuckDB is installed as any package is, and passes its own tests."""
    source, target = EXAMPLES / "duckdb", tmp_path / "installed"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", *install, "--target", str(target), str(source)], check=True
    )
    tests = ["pytest", "-q", "-p", "no:cacheprovider", "-c", str(source / "pyproject.toml")]
    tests += ["--basetemp", str(tmp_path / "base")]  # what other runs left is not its business
    done = subprocess.run(
        [sys.executable, "-P", "-m", *tests, str(source)],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    contract = [name for name in dir(AdapterContract) if name.startswith("test_")]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > len(contract) > 60
