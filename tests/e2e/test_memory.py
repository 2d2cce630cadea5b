# SPDX-License-Identifier: Apache-2.0
"""Adding a large model takes one tensor plus the pool, measured as RSS of a child process.

That is with one worker. What more of them do ahead of their turn is bounded, too
(docs/architecture.md, "Workers").

Synthetic weights: they imitate a network of equal dense layers and a fine-tune of its last half.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.ingest.match import Matcher
from pydedup.ingest.spool import Spool
from pydedup.ingest.stored_index import StoredIndex

TENSOR_BYTES = 48 * 1024 * 1024
TENSORS = 4
POOL_BYTES = 64 * 1024 * 1024

CHILD = """
import json, sys
import pydedup
from pydedup.testing.resident import ResidentMemory

url, small, first, second, pool, workers = sys.argv[1:]
workers = int(workers)

with pydedup.open(url, memory=int(pool)) as store:
    store.add("warm-up", small, workers=workers)
    peaks, left = [], []
    with ResidentMemory() as memory:
        before = memory.now()
        for name, path in (("first", first), ("second", second)):
            memory.forget()
            store.add(name, path, workers=workers)
            peaks.append(memory.peak() - before)
            left.append(memory.now() - before)
    print(json.dumps({"peaks": peaks, "left": left, "errors": store.verify().errors}))
"""


class Taken(NamedTuple):
    """Bytes of adding a file, beyond what there was before: at most, and afterwards."""

    peak: int
    left: int


def taken_by(tmp_path: Path, paths: list[Path], pool_bytes: int, workers: int) -> list[Taken]:
    """Return what adding a second and a third file took beyond what the first left behind."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url, *map(str, paths), str(pool_bytes), str(workers)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["errors"] == []
    return list(map(Taken, result["peaks"], result["left"]))


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt"])
def test_adding_takes_one_tensor_plus_the_pool(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    rows = TENSOR_BYTES // 4 // 1024
    layers = {
        f"layer{n}.weight": rng.standard_normal((rows, 1024), np.float32) for n in range(TENSORS)
    }
    # The first file is small: it loads what libraries the format needs before the measurement.
    whole, layers = layers, {"w": np.ones((64, 64), np.float32)}
    paths = []
    for number in range(3):
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "safetensors":
            save_file(layers, path)
        elif suffix == "npz":
            np.savez(path, **layers)
        else:
            import torch

            torch.save({name: torch.from_numpy(array) for name, array in layers.items()}, path)
        paths.append(path)
        layers = whole
        if number == 1:
            for name in list(layers)[TENSORS // 2 :]:
                layers[name][::7] += 0.5
    del layers, whole
    for taken in taken_by(tmp_path, paths, POOL_BYTES, workers=1):
        assert taken.peak < TENSOR_BYTES + POOL_BYTES
        assert taken.peak > TENSOR_BYTES // 4, "the measurement saw nothing"
        assert taken.left < POOL_BYTES // 2


def test_what_workers_do_ahead_is_bounded(tmp_path: Path) -> None:
    """Of models of many tensors, each of which may be read ahead.

    What they needed is given back: glibc kept 120 to 190 MiB of it for the next add.
    """
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    np.savez(paths[0], w=np.ones((64, 64), np.float32))
    for path in paths[1:]:
        layers = {f"l{n}": rng.standard_normal((2048, 1024), np.float32) for n in range(40)}
        np.savez(path, **layers)
        model_bytes = sum(array.nbytes for array in layers.values())
    del layers
    for taken in taken_by(tmp_path, paths, 16 << 20, workers=4):
        assert taken.peak < 256 << 20 < model_bytes
        assert taken.left < 96 << 20


def test_a_difference_takes_parts_of_two_tensors(tmp_path: Path) -> None:
    before = np.random.default_rng(0).standard_normal(2**23 + 7, np.float32)
    after = before.copy()
    after[[0, -1]] += np.float32([3.0, -4.0])
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        store.add("m@1", {"w": before})
        store.add("m@2", {"w": after})
        store.diff("m@1", "m@2")
        tracemalloc.start()
        try:
            (found,) = store.diff("m@1", "m@2").tensors
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 0.75 * before.nbytes
    apart = after.astype(np.float64) - before
    assert found.status == "changed"
    assert found.max_abs == np.abs(apart).max()
    norm = np.linalg.norm(before.astype(np.float64))
    assert found.relative_l2 == pytest.approx(np.linalg.norm(apart) / norm)


def test_verify_keeps_no_pages(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        for number in range(6):
            store.add(f"m{number}", {"w": rng.standard_normal(2**21, np.float32)})
        store.verify()
        tracemalloc.start()
        try:
            report = store.verify()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert report.ok
    assert peak < report.page_bytes // 2


COPY = """
import ctypes, gc, json, sys
import pydedup
from pydedup.testing.resident import ResidentMemory

url, other, backup = sys.argv[1:]
libc, memory = ctypes.CDLL(None), ResidentMemory()
free = []
with pydedup.open(url, mode="r", memory="16MiB") as store:
    for copy in (lambda: store.copy_to(other), lambda: store.backup(backup)):
        copy()
        gc.collect()
        before = memory.now()
        libc.malloc_trim(0)
        free.append(before - memory.now())
print(json.dumps(free))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_a_copy_needed_is_given_back(tmp_path: Path) -> None:
    """Some 25 MiB of freed memory stayed with the process."""
    rng = np.random.default_rng(0)
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        tensors = {str(i): rng.random((1024, 1024), np.float32) for i in range(80)}
        store.add("m", tensors, policy=pydedup.policies.Exact())
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", COPY, url, str(tmp_path / "other.db"), str(tmp_path / "backup")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(json.loads(done.stdout)) < 12 << 20


def test_pairs_of_models_take_what_their_rows_take(tmp_path: Path) -> None:
    """Each row had four texts of its own, and a database sorted all of them: 2.4 GB for 3,000."""
    weights = np.random.default_rng(0).standard_normal((32, 32), np.float32)
    names = [f"tenant-with-a-long-name-{number}" for number in range(300)]
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        store.add_many({name: {"w": weights} for name in names})
        tracemalloc.start()
        try:
            found = store.sharing()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len(found) == 300 * 299 // 2
    assert peak < 400 * len(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_of_an_add_waits_for_the_garbage_collector(tmp_path: Path, workers: int) -> None:
    """Adds held the index that each had read: after ten, a hundred MiB that nobody used."""
    rng = np.random.default_rng(3)
    gc.collect()
    gc.disable()
    before = Counter(map(type, gc.get_objects()))  # what other tests of this process hold
    try:
        with pydedup.open(tmp_path / "store.db") as store:
            for number in range(2):
                weights = {"w": rng.standard_normal((1024, 512), np.float32)}
                store.add(f"m{number}", weights, workers=workers)
            kinds = Counter(map(type, gc.get_objects()))
            kinds.subtract(before)
            assert kinds[Matcher] == kinds[Spool] == 0
            assert kinds[StoredIndex] <= 1  # what the store keeps for the next add
    finally:
        gc.enable()
