# SPDX-License-Identifier: Apache-2.0
"""What models that ONNX Runtime runs take and give back, as RSS of a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydedup

from .onnx_models import node, normal, save, value

MIB = 1 << 20
#: Of which only one model fits, of matrices that are below what the heap always maps by itself.
BUDGET = 160 * MIB
MATRICES, SIDE, MODELS, CALLS = 24, 1024, 3, 8

CHILD = """
import json, sys, threading
import numpy as np, onnx, onnxruntime
import pydedup
from pydedup.testing.resident import ResidentMemory

url, budget, models, calls = sys.argv[1], *map(int, sys.argv[2:])
x = np.ones((2, 1024), np.float32)
found = [set() for _ in range(models)]

def predict(first):
    for number in range(first, first + calls):
        name = number % models
        found[name].add(round(float(store.predict(str(name), x).sum()), 2))

with pydedup.open(url, memory=budget) as store, ResidentMemory() as memory:
    before = memory.now()
    threads = [threading.Thread(target=predict, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"peak": memory.peak() - before, "found": list(map(len, found))}))
"""

#: Of a call on each of some models, which have sessions of their own.
ROWS, WIDTH = 4096, 4096

CHILD_OF_LARGE_CALLS = """
import sys
import numpy as np, onnx, onnxruntime
import pydedup
from pydedup.serving import onnx_kept
from pydedup.testing.resident import ResidentMemory

url, rows, models, first = sys.argv[1], *map(int, sys.argv[2:])
x = np.ones((rows, 64), np.float32)
with pydedup.open(url) as store, ResidentMemory() as memory:
    before = memory.now()
    for number in range(models):
        for _ in range(2):
            store.predict(str(number), x[:first])
    assert len(onnx_kept.runner_of(store._pool)._own) == models
    for number in range(models):
        store.predict(str(number), x)
    print(memory.now() - before, memory.peak() - before)
"""

CHILD_OF_OWN_SESSIONS = """
import sys
import numpy as np, onnx, onnxruntime
import pydedup
from pydedup.serving import onnx_kept
from pydedup.testing.resident import ResidentMemory

url, models = sys.argv[1], int(sys.argv[2])
x = np.ones((1, 1024), np.float32)
with pydedup.open(url, memory="1GiB") as store, ResidentMemory() as memory:
    before = memory.now()
    for number in range(models):
        for _ in range(2):
            store.predict(str(number), x)
    runner = onnx_kept.runner_of(store._pool)
    assert len(runner._own) == models
    counted = []
    for _ in range(2):
        pool = store.stats().pool
        counted.append(sum(pool[key] for key in ("bytes", "decoded_bytes", "reserved_bytes")))
        counted.append(memory.now() - before)
        while runner.give_up():
            pass
    print(*counted)
"""


def add_models(path: Path, matrices: int) -> str:
    """Add models without a block in common to a store, and return its URL."""
    shared = normal(SIDE, SIDE)
    with pydedup.open(path / "m.db") as store:
        for number in range(MODELS):
            weights = {f"w{i}": shared + np.float32(number * 24 + i) for i in range(matrices)}
            nodes = [node("MatMul", "x w0", "a0"), node("Sin", "a0", "s0")]
            for i in range(1, matrices):
                nodes += [node("MatMul", f"s{i - 1} w{i}", f"a{i}"), node("Sin", f"a{i}", f"s{i}")]
            nodes.append(node("Sin", f"a{matrices - 1}", "y"))
            file, given = path / f"{number}.onnx", [value("x", 1, ("b", SIDE))]
            store.add(str(number), save(file, nodes, weights, given))
        return store.url


def test_sessions_of_models_take_what_is_counted(tmp_path: Path) -> None:
    """Making one left free memory behind, two thirds of the weights; so did giving it up."""
    url = add_models(tmp_path, 12)
    done = subprocess.run(
        [sys.executable, "-c", CHILD_OF_OWN_SESSIONS, url, str(MODELS)],
        capture_output=True,
        text=True,
        check=True,
    )
    counted, made, left, freed = map(int, done.stdout.split())
    assert counted > 2 * MODELS * 12 * SIDE * SIDE * 4, "the sessions were made"
    assert made < counted + 40 * MIB
    assert freed < left + 40 * MIB


def test_memory_of_models_that_make_room_goes_back(tmp_path: Path) -> None:
    """What lay between others in the heap stayed, up to twice the budget."""
    url = add_models(tmp_path, MATRICES)
    numbers = map(str, (BUDGET, MODELS, CALLS))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url, *numbers], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["found"] == [1] * MODELS
    assert result["peak"] < BUDGET + 64 * MIB
    assert result["peak"] > MATRICES * SIDE * SIDE * 4, "the measurement saw nothing"


@pytest.mark.parametrize("first", [1, ROWS])
def test_sessions_do_not_keep_what_a_large_call_took(tmp_path: Path, first: int) -> None:
    """Each kept the most that one of its calls had ever needed, which is counted nowhere.

    Later what the first of them had.
    """
    with pydedup.open(tmp_path / "m.db") as store:
        for number in range(MODELS):
            weights = {"w": normal(64, WIDTH), "v": normal(WIDTH, 8)}
            nodes = [node("MatMul", "x w", "a"), node("Sin", "a", "s"), node("MatMul", "s v", "y")]
            store.add(str(number), save(tmp_path / "m.onnx", nodes, weights))
        url = store.url
    done = subprocess.run(
        [sys.executable, "-c", CHILD_OF_LARGE_CALLS, url, str(ROWS), str(MODELS), str(first)],
        capture_output=True,
        text=True,
        check=True,
    )
    kept, peak = map(int, done.stdout.split())
    assert peak > ROWS * WIDTH * 4, "the measurement saw nothing"
    assert kept < ROWS * WIDTH * 4
