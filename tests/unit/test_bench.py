# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py, on documents made here. (The harness itself is tried by ctest.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def document(**seconds: float) -> dict[str, Any]:
    return {
        "format": 1,
        "commit": "abc",
        "kernel": "avx2",
        "machine": {"cpu": "a", "compiler": "gcc 14", "date": "2026-01-01T00:00:00Z"},
        "results": [
            {"name": name, "seconds": value, "spread_percent": 1.0}
            for name, value in seconds.items()
        ],
    }


def compare(
    tmp_path: Path, old: object, new: object, *options: str
) -> subprocess.CompletedProcess[str]:
    for name, content in (("old", old), ("new", new)):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text)
    return subprocess.run(
        [sys.executable, ROOT / "bench" / "compare.py", "old.json", "new.json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ratios_and_noise(tmp_path: Path) -> None:
    done = compare(
        tmp_path,
        document(fast=2.0, slow=1.0, same=1.0),
        document(fast=1.0, slow=2.0, same=1.015),
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert "x 2.00  faster" in lines["fast"]
    assert "x 0.50  SLOWER" in lines["slow"]
    assert "noise" in lines["same"]
    assert done.stderr == ""


def test_it_fails_when_asked_to(tmp_path: Path) -> None:
    old, new = document(a=1.0, b=1.0), document(a=1.3, b=1.01)
    done = compare(tmp_path, old, new, "--fail-below", "0.9")
    assert done.returncode == 1
    assert "below 0.9: a" in done.stderr
    assert compare(tmp_path, old, new, "--fail-below", "0.7").returncode == 0


def test_what_differs_is_told(tmp_path: Path) -> None:
    other = document(a=1.0, c=1.0) | {"kernel": "scalar"}
    done = compare(tmp_path, document(a=1.0, b=1.0), other)
    assert done.returncode == 0
    assert "kernel: avx2 against scalar" in done.stderr
    assert "only in one of them: b, c" in done.stderr


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("[]", "no document"),
        ("{", "no document"),
        (document(a=1.0) | {"format": 2}, "format 2"),
        (document(a=0.0), "took 0.0 seconds"),
        (document(b=1.0), "no workload in common"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, old: object, message: str) -> None:
    done = compare(tmp_path, old, document(a=1.0))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
