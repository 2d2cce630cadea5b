# SPDX-License-Identifier: Apache-2.0
"""The self test that ships: it passes here, and it fails when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pydedup import config, selftest


def run(*words: str, code: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    program = ["-m", "pydedup.selftest"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, "-P", *program, *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_kernel_passes_every_check() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    runnable = [kernel.name for kernel in config.kernels().available if kernel.runnable]
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"kernel in use: {config.kernels().in_use} (")
    for kernel in runnable:
        for name in selftest.CHECKS:
            begin = f"  ok      {kernel:<8} {name:<16} "
            assert sum(line.startswith(begin) for line in lines) == 1, begin
    total = len(runnable) * len(selftest.CHECKS)
    assert lines[-1] == f"{total} of {total} checks passed"


def test_a_kernel_that_cannot_be_had_fails() -> None:
    done = run(PYDEDUP_KERNEL="abacus")
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED  kernel")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ("s.GOLDEN_HASHES[64] = ('00' * 16, '00' * 16)", "hash"),
        ("s.GOLDEN_BLOCKS = '00' * 16", "block hash"),
        ("s.GOLDEN_PAGE = s.GOLDEN_PAGE[::-1]", "page bytes"),
        ("pydedup.Store.load = lambda self, name: {}", "store load"),
        ("pydedup.Store.predict = lambda self, name, x: x", "store predict"),
        ("s.CHECKS['store verify'] = lambda lab: 1 / 0", "store verify"),
    ],
)
def test_what_is_wrong_is_named(change: str, check: str) -> None:
    code = f"import sys, pydedup, pydedup.selftest as s\n{change}\nsys.exit(s.main(['--here']))"
    done = run(code=code)
    assert done.returncode == 1, done.stderr
    outcomes = {name: passed for name, passed, _ in json.loads(done.stdout)["checks"]}
    assert list(outcomes) == list(selftest.CHECKS)
    assert not outcomes[check]


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ([("hash", False, "other bits")], "other bits"),
        ([("process", False, "was killed by SIGILL")], "SIGILL"),
        ([(name, True, "") for name in selftest.CHECKS if name != "store load"], "was not run"),
    ],
)
def test_what_a_process_does_not_report_counts_as_failed(
    outcomes: list[tuple[str, bool, str]],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(selftest, "_run_apart", lambda kernel: outcomes)
    assert selftest.main([]) == 1
    assert says in capsys.readouterr().out


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ((name, passed, seen),) = selftest._run_apart("scalar")
    assert (name, passed) == ("process", False)
    assert "ended with status 1" in seen


def test_arguments_that_it_does_not_know() -> None:
    done = run("--quick")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
