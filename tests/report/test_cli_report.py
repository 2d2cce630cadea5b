# SPDX-License-Identifier: Apache-2.0
"""``pydedup report`` as a program, and ``Store.report`` with what cannot be shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.replacement import Trace
from pydedup.testing.program import run_here, run_process


def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_here("report", *words, cwd=folder)


def test_a_report_is_written_and_replaced(family_url: str, tmp_path: Path) -> None:
    done = run(family_url, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote report.html: ")
    before = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert before.startswith("<!DOCTYPE html>")
    assert "No trace was given" in before
    again = run(family_url, "-o", "report.html", "--model", "other", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_on_standard_output_is_the_page_alone(family_url: str, tmp_path: Path) -> None:
    done = run_process("report", family_url, "-o", "-", cwd=tmp_path)
    assert done.stdout.startswith("<!DOCTYPE html>")
    assert done.stdout.rstrip().endswith("</html>")
    assert list(tmp_path.iterdir()) == []


def test_where_a_report_is_as_json(family_url: str, tmp_path: Path) -> None:
    done = run(family_url, "-o", "r.html", "--json", folder=tmp_path)
    size = (tmp_path / "r.html").stat().st_size
    assert json.loads(done.stdout) == {
        "url": family_url,
        "path": "r.html",
        "bytes": size,
        "damaged": [],
    }
    both = run(family_url, "-o", "-", "--json", folder=tmp_path)
    assert (both.returncode, both.stdout) == (2, "")
    assert "name a file with -o" in both.stderr


def test_what_is_wrong_is_said_and_nothing_written(family_url: str, tmp_path: Path) -> None:
    (tmp_path / "notes.npz").write_text("no trace")
    (tmp_path / "x.json").write_text("[[1, 2]]")
    for words, status, said in (
        (["--trace", "notes.npz"], 5, "notes.npz is no recorded trace"),
        (["--trace", "x.json"], 5, "trace, or a damaged one; `pydedup serve --record FILE` makes"),
        (["--trace", "missing.npz"], 3, "missing.npz"),
        (["--model", "nobody"], 3, "no model 'nobody'"),
        (["-o", "missing/report.html"], 2, "missing/report.html cannot be written: folder"),
        (["-o", "."], 2, "is a directory"),
    ):
        done = run(family_url, *words, folder=tmp_path)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"notes.npz", "x.json"}


def test_a_trace_of_another_store_is_told_apart(family_url: str) -> None:
    trace = Trace(
        np.array([1, 987_654, 987_655, 987_656]),
        np.full(4, 1000, np.uint32),
        np.ones(4, np.uint32),
        np.array([424_242]),
        complete=False,
    )
    with pydedup.open(family_url, mode="r") as store:
        page = store.report(trace=trace)
        assert "75.0 % of the pages in the trace are not in this store" in page
        assert "a model that is not in the store" in page
        assert "The recording was full" in page
        bad = Trace(trace.pages, trace.nbytes[:2], trace.calls, trace.owners)
        with pytest.raises(ArgumentError):
            store.report(trace=bad)
        with pytest.raises(NotFoundError):
            store.report(models=["nobody@1"])


def test_uses_outside_of_calls_are_shown_too(family_url: str) -> None:
    with pydedup.open(family_url, mode="r") as store:
        store.record()
        store.explain("reviews@1")
        trace = store.recorded()
        page = store.report(trace=trace)
    assert len(trace) > 0
    assert len(trace.owners) == 0
    assert "in 0 calls" in page
    assert "Models by their calls" not in page


def test_what_must_be_installed_is_said(family_url: str) -> None:
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from pydedup.cli import main\n"
        f"sys.exit(main(['report', {family_url!r}, '-o', '-']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stderr.strip().endswith("pip install 'pydedup[report]'")


def test_every_back_end_has_a_report(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        weights = np.random.default_rng(0).standard_normal((128, 64), np.float32)
        store.add("a@1", {"w": weights})
        store.add("b@1", {"w": weights, "v": weights + 1})
        page = store.report(trace=store.recorded())
        logical = store.stats().logical_bytes
    assert f'<data value="{logical}">' in page
    assert "100.0 %) are in b@1 too" in page


def test_recording_begins_and_ends(family_url: str) -> None:
    ids = np.arange(8).reshape(1, 8)
    with pydedup.open(family_url, mode="r") as store:
        store.predict("reviews@1", ids)
        assert len(store.recorded()) == 0
        store.record(max_uses=3)
        for _ in range(5):
            store.predict("reviews@1", ids)
        trace = store.recorded()
        assert len(trace) == 3
        assert not trace.complete
        store.record(0)
        store.predict("reviews@1", ids)
        assert len(store.recorded()) == 0
