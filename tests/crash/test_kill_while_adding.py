# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random points of an add: the store verifies, and what was there is there bit for bit.

10 kills in `make test`, 200 in `make crash` (PYDEDUP_CRASH_ROUNDS).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pydedup

ROUNDS = int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "10"))
SHAPES = {"embedding": (9000, 50), "hidden.weight": (512, 384), "hidden.bias": (512,), "step": ()}

WRITER = """
import sys
import numpy as np
import pydedup

url, name, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
shapes = {"embedding": (9000, 50), "hidden.weight": (512, 384), "hidden.bias": (512,), "step": ()}
rng, base = np.random.default_rng(seed), np.random.default_rng(0)
model = {}
for key, shape in shapes.items():
    tensor = base.standard_normal(shape).astype(np.float32)
    if tensor.ndim == 2:
        rows = rng.integers(0, shape[0], shape[0] // 3)
        tensor[rows] += 0.1 * rng.standard_normal((len(rows), shape[1])).astype(np.float32)
    model[key] = tensor
with pydedup.open(url) as store:
    print("started", flush=True)
    store.add_many({name: model, name + "-twin": {**model, "step": np.float32(seed)}})
    print("added", flush=True)
"""


def family_member(seed: int) -> dict[str, np.ndarray]:
    rng, base = np.random.default_rng(seed), np.random.default_rng(0)
    model = {}
    for key, shape in SHAPES.items():
        tensor = np.asarray(base.standard_normal(shape)).astype(np.float32)
        if tensor.ndim == 2:
            rows = rng.integers(0, shape[0], shape[0] // 3)
            tensor[rows] += 0.1 * rng.standard_normal((len(rows), shape[1])).astype(np.float32)
        model[key] = tensor
    return model


def start_writer(url: str, name: str, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(seed)], stdout=subprocess.PIPE, text=True
    )


def wait_for(writer: subprocess.Popen[str], word: str) -> None:
    assert writer.stdout is not None
    line = writer.stdout.readline()
    assert line.strip() == word, line


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_a_killed_add_leaves_a_sound_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    first = family_member(1)
    with pydedup.open(url) as store:
        store.add("first@1", first)
    # How long an add takes here: kills are spread over it and a bit beyond.
    writer = start_writer(f"sqlite:///{tmp_path / 'probe.db'}", "probe", 2)
    wait_for(writer, "started")
    began = time.monotonic()
    wait_for(writer, "added")
    duration = time.monotonic() - began
    writer.communicate()
    assert writer.returncode == 0

    chance = random.Random(20220815)
    killed_inside = 0
    for number in range(ROUNDS):
        name = f"victim{number}"
        writer = start_writer(url, name, 100 + number)
        wait_for(writer, "started")
        time.sleep(duration * 1.1 * (number + chance.random()) / ROUNDS)
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        assert writer.returncode in (-signal.SIGKILL, 0)
        with pydedup.open(url) as store:
            report = store.verify()
            assert report.errors == []
            names = {info.name for info in store.models()}
            published = {name, name + "-twin"} & names
            assert published in (set(), {name, name + "-twin"}), "all of an add, or nothing"
            if "added" in rest:
                assert published
            killed_inside += not published
            loaded = store.load("first@1")
            assert loaded.keys() == first.keys()
            assert all(np.array_equal(loaded[key], first[key]) for key in first)
            if published:
                wanted = family_member(100 + number)
                again = store.load(name)
                assert all(np.array_equal(again[key], wanted[key]) for key in wanted)
    assert killed_inside > 0, "no kill hit an add: the test would have shown nothing"

    with pydedup.open(url) as store:
        report = store.vacuum()
        assert store.verify().errors == []
        assert store.verify().notes == [], "vacuum collects what killed adds left"
        assert report.stored_bytes_after <= report.stored_bytes_before
        store.add("victim0@2", family_member(100))
        assert store.verify().errors == []


@pytest.mark.parametrize("action", ["vacuum", "remove"])
def test_a_killed_upkeep_leaves_a_sound_store(tmp_path: Path, action: str) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    models = {f"m{seed}": family_member(seed) for seed in range(4)}
    script = (
        "import sys, pydedup\n"
        "store = pydedup.open(sys.argv[1])\n"
        "print('started', flush=True)\n"
        + (
            "store.remove('m0@1'); store.vacuum()\n"
            if action == "vacuum"
            else "store.remove('m0@1')\n"
        )
    )
    chance = random.Random(7)
    for number in range(max(2, ROUNDS // 5)):
        path = tmp_path / f"{action}{number}.db"
        url = f"sqlite:///{path}"
        with pydedup.open(url) as store:
            for name, model in models.items():
                store.add(name, model)
        child = subprocess.Popen(
            [sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True
        )
        wait_for(child, "started")
        time.sleep(chance.random() * 0.25)
        child.kill()
        child.communicate()
        with pydedup.open(url) as store:
            assert store.verify().errors == []
            for info in store.models():
                loaded = store.load(info.address)
                assert all(np.array_equal(loaded[k], v) for k, v in models[info.name].items())
            assert {"m1", "m2", "m3"} <= {info.name for info in store.models()}
            store.vacuum()
            assert store.verify().errors == []
        path.unlink()
