# SPDX-License-Identifier: Apache-2.0
"""Policies on the command line: deltas, error bounds, and a metric of the user's own."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pydedup.testing.program import run_here

METRICS = """
import numpy as np

X = np.random.default_rng(9).standard_normal((600, 128)).astype(np.float32)
LABELS = np.load("labels.npy")

def accuracy(weights):
    return (np.argmax(X @ weights["w"].T, 1) == LABELS).astype(float)

def blind(weights):
    return 0.0

def broken(weights):
    raise KeyError("no such column")

def ends(weights):
    raise SystemExit(0)

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((192, 128)).astype(np.float32)
    near = base + 0.02 * rng.standard_normal(base.shape).astype(np.float32)
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": near}, tmp_path / "near.safetensors")
    inputs = np.random.default_rng(9).standard_normal((600, 128)).astype(np.float32)
    np.save(tmp_path / "labels.npy", np.argmax(inputs @ near.T, 1))
    (tmp_path / "metrics.py").write_text(METRICS)
    (tmp_path / "script.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    assert run("add", "m.db", "base", "base.safetensors").returncode == 0
    return tmp_path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = run_here(*arguments)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def document(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_lossless_adds_say_how_many_deltas_there_are(folder: Path) -> None:
    (report,) = document("add", "m.db", "near", "near.safetensors")["models"]
    assert report["delta_blocks"] == report["blocks"] == 6
    assert "Deltas" in run("add", "m.db", "again", "near.safetensors", "--dry-run").stdout
    assert run("export", "m.db", "near", "back.safetensors").returncode == 0
    assert np.array_equal(load_file("back.safetensors")["w"], load_file("near.safetensors")["w"])
    (tensor,) = document("explain", "m.db", "near")["tensors"]
    assert (tensor["delta_blocks"], tensor["largest_error"]) == (6, 0.0)
    # Which is more than its size.
    for command in ("info", "explain"):
        said = " ".join(run(command, "m.db", "near").stdout.split())
        assert re.search(
            r"blocks take \S+ KiB, bases of deltas and headers of blocks included", said
        )


def test_bounded(folder: Path) -> None:
    bounded = ("--policy", "bounded", "--max-rel-error", 0.001)
    done = run("add", "m.db", "near", "near.safetensors", *bounded)
    assert done.returncode == 0, done.stderr
    assert "by at most 0.001 of its norm" in done.stdout + done.stderr
    shown = re.sub(r"\s+", " ", run("info", "m.db", "near").stdout)
    said = "policy bounded: each block differs from the source by at most 0.001 of its norm"
    assert said in shown
    assert document("info", "m.db", "near")["certificate"]["max_rel_error"] == 0.001
    assert run("verify", "m.db").returncode == 0


def test_accuracy_and_its_certificate(folder: Path) -> None:
    words = ("--policy", "accuracy", "--max-drop", 0.1, "--evaluate", "metrics:accuracy")
    (report,) = document("add", "m.db", "near", "near.safetensors", *words)["models"]
    assert report["stored_bytes"] < 0.1 * report["logical_bytes"]
    certificate = document("info", "m.db", "near")["certificate"]
    assert certificate["metric_before"] == 1.0
    assert certificate["metric_after"] >= 0.9
    shown = re.sub(r"\s+", " ", run("info", "m.db", "near").stdout)
    assert "policy accuracy: metric 1 before," in shown
    done = run("verify", "m.db", "--evaluate", "near", "metrics:accuracy")
    assert done.returncode == 0, done.stderr
    assert "as certified" in done.stdout + done.stderr
    np.save("labels.npy", np.zeros(600, np.int64))
    done = run("verify", "m.db", "--evaluate", "near", "metrics:accuracy")
    assert done.returncode == 1
    said = re.sub(r"\s+", " ", done.stdout)
    assert "promise broken: near@1: the metric is" in said
    assert "where 0.1 was promised" in said
    assert "damaged" not in said.lower()
    done = run("verify", "m.db", "--evaluate", "near", "metrics:broken")
    assert done.returncode == 2
    assert "near@1: evaluate raised " in done.stderr  # of several models, which one
    assert run("verify", "m.db", "--evaluate", "near", "metrics:ends").returncode == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--policy bounded", "--max-rel-error"),
        ("--policy bounded --max-rel-error 2", "max_rel_error"),
        ("--max-rel-error 0.1", "goes with --policy bounded"),
        ("--policy accuracy --max-drop 0.1", "--evaluate"),
        ("--policy accuracy --evaluate metrics:accuracy", "--max-drop"),
        ("--policy exact --max-drop 0.1", "goes with --policy accuracy"),
        ("--policy accuracy --max-drop 0.1 --evaluate metrics", "MODULE:FUNCTION"),
        ("--policy accuracy --max-drop 0.1 --evaluate nowhere:f", "nowhere"),
        ("--policy accuracy --max-drop 0.1 --evaluate metrics.py:f", "without .py, as metrics:f"),
        ("--policy accuracy --max-drop 0.1 --evaluate metrics:f", "no function 'f'"),
        ("--policy accuracy --max-drop 0.1 --evaluate metrics:not_a_function", "no function"),
        ("--policy accuracy --max-drop 0.1 --evaluate metrics:broken", "no such column"),
        # These ended the program, in silence and with their status.
        ("--policy accuracy --max-drop 0.1 --evaluate metrics:ends", "it called sys.exit(0)"),
        ("--policy accuracy --max-drop 0.1 --evaluate script:f", "'script' failed: SystemExit"),
        ("--policy accuracy --max-drop -1 --evaluate metrics:accuracy", "max_drop"),
        (
            "--policy accuracy --max-drop 0.001 --confidence 0.95 --evaluate metrics:accuracy",
            "examples",
        ),
    ],
)
def test_wrong_policies_are_one_line(folder: Path, words: str, says: str) -> None:
    done = run("add", "m.db", "near", "near.safetensors", *words.split())
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert re.fullmatch(r"pydedup: error: [^\n]+\n", done.stderr), done.stderr
    assert says in done.stderr
    assert [m["model"] for m in document("ls", "m.db")["models"]] == ["base@1"]


def test_a_metric_that_guards_nothing_is_told(folder: Path) -> None:
    words = ("--policy", "accuracy", "--max-drop", 0.1, "--evaluate", "metrics:blind")
    done = run("add", "m.db", "near", "near.safetensors", *words)
    assert done.returncode == 0
    why = "the metric guards nothing: it is 0 for the model, and 0 with zeros for all"
    for shown in (done.stdout, run("info", "m.db", "near").stdout):
        assert why in " ".join(shown.split())
    words = ("--policy", "accuracy", "--max-drop", 0.1, "--evaluate", "metrics:accuracy")
    done = run("add", "m.db", "other", "near.safetensors", *words)
    assert "guards nothing" not in done.stdout + run("info", "m.db", "other").stdout


def test_what_a_metric_prints_is_not_in_the_document(folder: Path) -> None:
    """It came before the document of --json, which then was none."""
    lines = ["from metrics import accuracy", "print('imported')", "def talks(weights):"]
    lines += ["    print('an epoch')", "    return accuracy(weights)"]
    (folder / "talking.py").write_text("\n".join(lines))
    words = ("--policy", "accuracy", "--max-drop", 0.1, "--evaluate", "talking:talks")
    document("add", "m.db", "near", "near.safetensors", *words)
    verified = run("verify", "m.db", "--evaluate", "near", "talking:talks", "--json")
    assert json.loads(verified.stdout)["ok"]
    assert verified.stderr.startswith("imported\nan epoch\n")


def test_only_accuracy_models_are_evaluated(folder: Path) -> None:
    done = run("verify", "m.db", "--evaluate", "base", "metrics:accuracy")
    assert done.returncode == 2
    assert "lossless" in done.stderr
    assert run("verify", "m.db", "--evaluate", "none", "metrics:accuracy").returncode == 3
