# SPDX-License-Identifier: Apache-2.0
"""The gate on instruction counts fails when a count rises: it is fed doctored numbers here.

Counting needs valgrind and is `make bench-gate`; what is tested is the judging, and that the
baseline in the repository is whole.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "callgrind"
BASELINE: dict[str, dict[str, dict[str, int]]] = json.loads((FOLDER / "baseline.json").read_text())
COMPILER = sorted(BASELINE)[0]


def gate(tmp_path: Path, counts: Any, *options: str) -> subprocess.CompletedProcess[str]:
    recorded = tmp_path / "counts.json"
    recorded.write_text(json.dumps({"compiler": COMPILER, "counts": counts}))
    return run(tmp_path, recorded, *options)


def run(tmp_path: Path, recorded: Path, *options: str) -> subprocess.CompletedProcess[str]:
    baseline = tmp_path / "baseline.json"
    if not baseline.exists():
        baseline.write_text(json.dumps(BASELINE))
    return subprocess.run(
        [
            sys.executable,
            FOLDER / "gate.py",
            "--counts",
            recorded,
            "--baseline",
            baseline,
            *options,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def counts() -> dict[str, dict[str, int]]:
    return copy.deepcopy(BASELINE[COMPILER])


def test_the_baseline_is_whole() -> None:
    assert BASELINE, "a compiler was recorded"
    for compiler, kernels in BASELINE.items():
        assert kernels.keys() == {"scalar", "avx2"}, compiler
        assert kernels["scalar"].keys() == kernels["avx2"].keys()
        for area in ("hash.", "codec.", "gemm.", "pack.", "similarity."):
            assert any(name.startswith(area) for name in kernels["avx2"]), (compiler, area)
        # A call that was optimised away would count next to nothing.
        assert min(count for kernel in kernels.values() for count in kernel.values()) > 5000


def test_the_same_counts_pass(tmp_path: Path, counts: dict[str, dict[str, int]]) -> None:
    done = gate(tmp_path, counts)
    assert done.returncode == 0, done.stderr
    assert "+0.00 %" in done.stdout


@pytest.mark.parametrize("kernel", ["scalar", "avx2"])
def test_an_inflated_count_fails(
    tmp_path: Path, counts: dict[str, dict[str, int]], kernel: str
) -> None:
    counts[kernel]["hash.64-kib"] = int(counts[kernel]["hash.64-kib"] * 1.04)
    done = gate(tmp_path, counts)
    assert done.returncode == 1
    assert f"{kernel} hash.64-kib" in done.stderr
    assert "bench-gate-update" in done.stderr
    assert gate(tmp_path, counts, "--tolerance", "5").returncode == 0


def test_a_small_rise_and_a_fall_pass(tmp_path: Path, counts: dict[str, dict[str, int]]) -> None:
    counts["scalar"]["hash.64-kib"] = int(counts["scalar"]["hash.64-kib"] * 1.02)
    counts["avx2"]["hash.64-kib"] = int(counts["avx2"]["hash.64-kib"] * 0.5)
    done = gate(tmp_path, counts)
    assert done.returncode == 0, done.stderr
    assert "update the baseline" in done.stdout


def test_a_workload_that_vanished_fails(tmp_path: Path, counts: dict[str, dict[str, int]]) -> None:
    del counts["avx2"]["hash.64-kib"]
    done = gate(tmp_path, counts)
    assert done.returncode == 1
    assert "was not counted" in done.stderr


def test_a_new_workload_is_told(tmp_path: Path, counts: dict[str, dict[str, int]]) -> None:
    counts["avx2"]["hash.new"] = 12345
    done = gate(tmp_path, counts)
    assert done.returncode == 0
    assert "not in the baseline yet" in done.stdout


def test_another_compiler_is_reported_and_can_be_recorded(
    tmp_path: Path, counts: dict[str, dict[str, int]]
) -> None:
    recorded = tmp_path / "other.json"
    recorded.write_text(json.dumps({"compiler": "g++ 99", "counts": counts}))
    before = run(tmp_path, recorded)
    assert before.returncode == 0
    assert "NO BASELINE for g++ 99" in before.stdout
    assert run(tmp_path, recorded, "--update").returncode == 0
    kept = json.loads((tmp_path / "baseline.json").read_text())
    assert kept.keys() == {*BASELINE, "g++ 99"}
    counts["avx2"]["hash.64-kib"] *= 2
    recorded.write_text(json.dumps({"compiler": "g++ 99", "counts": counts}))
    assert run(tmp_path, recorded).returncode == 1
